//! The list of mounts: `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's id, unique while it exists.
    pub id: u64,
    /// The parent mount's id.
    pub parent: u64,
    /// The path within the file system that is the mount's root.
    pub root: PathBuf,
    /// Where it is mounted, as seen from the process' root.
    pub target: PathBuf,
    /// Options of the mount.
    pub options: String,
    /// `shared:N`, `master:N` and the like.
    pub optional: Vec<String>,
    /// The file system's type.
    pub fstype: String,
    /// The source, as the mounter gave it.
    pub source: String,
    /// Options of the superblock.
    pub super_options: String,
}

impl Mount {
    /// Whether the mount is in a peer group.
    pub fn is_shared(&self) -> bool {
        self.optional.iter().any(|field| field.starts_with("shared:"))
    }
}

/// The mounts of this process' mount namespace.
///
/// # Errors
/// When the file cannot be read or has a line that is no mount.
pub fn read() -> Result<Vec<Mount>> {
    read_at(Path::new("/proc/self/mountinfo"))
}

/// The mounts in a `mountinfo` file (of another process, for instance).
///
/// # Errors
/// When the file cannot be read or has a line that is no mount.
pub fn read_at(path: &Path) -> Result<Vec<Mount>> {
    let text = std::fs::read(path).map_err(|e| Error::new("read", path.display().to_string(), e))?;
    parse(&String::from_utf8_lossy(&text))
}

/// Parses `mountinfo`.
///
/// # Errors
/// When a line is no mount.
pub fn parse(text: &str) -> Result<Vec<Mount>> {
    text.lines().map(|line| parse_line(line).ok_or_else(|| Error::invalid("parse mountinfo", line, "the line is no mount"))).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let parent = left.next()?.parse().ok()?;
    let _device = left.next()?;
    let root = unescape(left.next()?).into();
    let target = unescape(left.next()?).into();
    let options = left.next()?.to_owned();
    let optional = left.map(str::to_owned).collect();
    let mut right = right.split(' ');
    Some(Mount {
        id,
        parent,
        root,
        target,
        options,
        optional,
        fstype: right.next()?.to_owned(),
        source: unescape(right.next()?),
        super_options: right.next().unwrap_or_default().to_owned(),
    })
}

/// Undoes the kernel's `\040` escapes.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        });
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_escapes_and_peer_groups() {
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n";
        let mounts = parse(line).expect("a valid line");
        assert_eq!(mounts[0].target, Path::new("/mnt 2"));
        assert_eq!(mounts[0].fstype, "ext3");
        assert!(mounts[0].is_shared());
        assert!(parse("nonsense").is_err());
    }

    #[test]
    fn reads_the_present_mounts() {
        let mounts = read().expect("mountinfo");
        assert!(mounts.iter().any(|m| m.target == Path::new("/")));
    }
}
