//! What a process holds.

use std::{fs, io};

/// Proportional set size of a process, KiB (`Pss` of `smaps_rollup`, proc_pid_smaps(5)).
///
/// # Errors
/// When the process is gone, or the file says nothing of it.
pub fn pss_kib(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path)?;
    let size = text.lines().find_map(|line| line.strip_prefix("Pss:")).and_then(|rest| rest.trim().strip_suffix("kB"));
    let size = size.and_then(|number| number.trim().parse().ok());
    size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has no Pss")))
}
