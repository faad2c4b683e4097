//! Capabilities. Source: capabilities(7), capget(2).

use crate::process::prctl;
use crate::sys::check;
use crate::{Error, Result};

/// The names, by number.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// A set of capabilities: bit N is capability number N.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set(pub u64);

impl Set {
    /// Adds the capability of this name (`CAP_…`); `false` when there is none of that name.
    pub fn add(&mut self, name: &str) -> bool {
        match NAMES.iter().position(|known| *known == name) {
            Some(bit) => {
                self.0 |= 1 << bit;
                true
            }
            None => false,
        }
    }

    /// The names in the set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().enumerate().filter(move |(bit, _)| self.0 & (1 << bit) != 0).map(|(_, name)| *name)
    }

    /// What is in both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// All names that this kernel knows.
pub fn known() -> impl Iterator<Item = &'static str> {
    let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|text| text.trim().parse::<usize>().ok())
        .unwrap_or(NAMES.len() - 1);
    NAMES.iter().take(last + 1).copied()
}

/// The five sets of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// What it and its descendants can ever have.
    pub bounding: Set,
    /// What it has now.
    pub effective: Set,
    /// What execve(2) of a file with inheritable capabilities keeps.
    pub inheritable: Set,
    /// What it may have.
    pub permitted: Set,
    /// What execve(2) of an ordinary file keeps.
    pub ambient: Set,
}

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The permitted set of this process.
///
/// # Errors
/// The kernel's answer.
pub fn permitted() -> Result<Set> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 takes two data structs; both outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    check(ret).map_err(|e| Error::new("capget", "", e))?;
    Ok(Set(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32))
}

/// The bounding set of this process.
pub fn bounding() -> Set {
    let mut set = Set::default();
    for bit in 0..64 {
        // SAFETY: only integers are passed; an unknown capability is answered by an error.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, bit, 0, 0, 0) } == 1 {
            set.0 |= 1 << bit;
        }
    }
    set
}

/// Drops everything that is not in `keep` from the bounding set. Takes CAP_SETPCAP.
///
/// # Errors
/// The kernel's answer.
pub fn limit_bounding(keep: Set) -> Result<()> {
    let drop = bounding().0 & !keep.0;
    for bit in (0..64).filter(|bit| drop & (1 << bit) != 0) {
        prctl("PR_CAPBSET_DROP", libc::PR_CAPBSET_DROP, [bit, 0, 0, 0])?;
    }
    Ok(())
}

/// Sets the effective, permitted and inheritable sets.
///
/// # Errors
/// The kernel's answer.
pub fn set(effective: Set, permitted: Set, inheritable: Set) -> Result<()> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let half = |shift: u32| Data {
        effective: (effective.0 >> shift) as u32,
        permitted: (permitted.0 >> shift) as u32,
        inheritable: (inheritable.0 >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes two data structs; both outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    check(ret).map_err(|e| Error::new("capset", format!("{:#x}", permitted.0), e))?;
    Ok(())
}

/// Makes `wanted` the ambient set. What is not both permitted and inheritable cannot be ambient and is an error.
///
/// # Errors
/// The kernel's answer.
pub fn set_ambient(wanted: Set) -> Result<()> {
    let (clear, raise) = (libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, libc::PR_CAP_AMBIENT_RAISE as u64);
    prctl("PR_CAP_AMBIENT", libc::PR_CAP_AMBIENT, [clear, 0, 0, 0])?;
    for bit in (0..64).filter(|bit| wanted.0 & (1 << bit) != 0) {
        prctl("PR_CAP_AMBIENT", libc::PR_CAP_AMBIENT, [raise, bit, 0, 0])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let mut set = Set::default();
        assert!(set.add("CAP_SYS_ADMIN") && set.add("CAP_CHOWN") && !set.add("CAP_NONE"));
        assert_eq!(set, Set(1 << 21 | 1));
        assert_eq!(set.names().collect::<Vec<_>>(), ["CAP_CHOWN", "CAP_SYS_ADMIN"]);
        assert_eq!(NAMES[40], "CAP_CHECKPOINT_RESTORE");
        assert!(known().count() >= 38);
    }
}
