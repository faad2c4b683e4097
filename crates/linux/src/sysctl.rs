//! Kernel settings below `/proc/sys`.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The path of a setting below `/proc/sys`: dots part it, unless it is written with slashes.
///
/// # Errors
/// When a part is empty or leads upwards.
pub fn path(name: &str) -> Result<PathBuf> {
    let slashed = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'/');
    // In the dotted form a slash stands for a dot within a part (net.ipv4.conf.eth0/100.forwarding).
    let relative: String = if slashed {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    if relative.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::invalid("set sysctl", name, "it is not the name of a setting"));
    }
    Ok(Path::new("sys").join(relative))
}

/// Writes a setting, of the caller's own namespaces, through this procfs (see [`crate::fs::open_procfs`]).
///
/// # Errors
/// The kernel's answer, with the name.
pub fn set(procfs: BorrowedFd<'_>, name: &str, value: &str) -> Result<()> {
    crate::fs::write_beneath(procfs, &path(name)?, value)
}

/// Reads a setting.
///
/// # Errors
/// The kernel's answer, with the name.
pub fn get(procfs: BorrowedFd<'_>, name: &str) -> Result<String> {
    Ok(crate::fs::read_beneath(procfs, &path(name)?)?.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::path;
    use std::path::Path;

    #[test]
    fn dots_and_slashes() {
        assert_eq!(path("net.ipv4.ip_forward").expect("valid"), Path::new("sys/net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.1/rp_filter").expect("valid"), Path::new("sys/net/ipv4/conf/eth0.1/rp_filter"));
        assert_eq!(path("net.ipv4.conf.eth0/1.rp_filter").expect("valid"), Path::new("sys/net/ipv4/conf/eth0.1/rp_filter"));
        assert!(path("a/../../b").is_err() && path("").is_err() && path("a..b").is_err());
    }
}
