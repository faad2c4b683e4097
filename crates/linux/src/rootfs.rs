//! A container's root as containerd's mounts describe it: type, source and option words.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags};

/// What mount options mean: flags, propagation, and the rest as data.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    propagation: Option<MountPropagationFlags>,
    data: Vec<String>,
}

/// The data of a mount fits in a page, with its final 0.
const DATA_BYTES_MAX: usize = 4095;

fn parse(options: &[String]) -> Options {
    let mut parsed = Options { flags: MountFlags::empty(), propagation: None, data: Vec::new() };
    for option in options {
        let (flag, on) = match option.as_str() {
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "bind" => (MountFlags::BIND, true),
            "rbind" => (MountFlags::BIND | MountFlags::REC, true),
            "defaults" => (MountFlags::empty(), true),
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" | "unbindable" | "runbindable" => {
                parsed.propagation = Some(propagation(option));
                continue;
            }
            _ => {
                parsed.data.push(option.clone());
                continue;
            }
        };
        parsed.flags.set(flag, on);
    }
    parsed
}

fn propagation(word: &str) -> MountPropagationFlags {
    let kind = match word.strip_prefix("r").unwrap_or(word) {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        _ => MountPropagationFlags::UNBINDABLE,
    };
    if word.starts_with('r') { kind | MountPropagationFlags::REC } else { kind }
}

/// Mounts one entry on `target`. Only for a process of its own (a forked child): when an overlay's directories do not
/// fit in a page of options, the working directory is changed to what they have in common.
///
/// # Errors
/// `mount(2)`'s; `InvalidInput` if the options do not fit even so.
pub fn mount(kind: &str, source: &str, options: &[String], target: &Path) -> io::Result<()> {
    let parsed = parse(options);
    let mut data = parsed.data.join(",");
    if data.len() > DATA_BYTES_MAX && kind == "overlay" {
        data = shorten(&parsed.data)?;
    }
    if data.len() > DATA_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "mount options do not fit in a page"));
    }
    let data = std::ffi::CString::new(data)?;
    if parsed.flags.contains(MountFlags::BIND) || kind == "bind" {
        let bind = MountFlags::BIND | (parsed.flags & MountFlags::REC);
        if bind.contains(MountFlags::REC) {
            rustix::mount::mount_bind_recursive(source, target)?;
        } else {
            rustix::mount::mount_bind(source, target)?;
        }
        let rest = parsed.flags - MountFlags::BIND - MountFlags::REC;
        if !rest.is_empty() {
            rustix::mount::mount_remount(target, MountFlags::BIND | rest, c"")?;
        }
    } else {
        rustix::mount::mount(source, target, kind, parsed.flags, data.as_c_str())?;
    }
    if let Some(propagation) = parsed.propagation {
        rustix::mount::mount_change(target, propagation)?;
    }
    Ok(())
}

/// The same options with the lower directories named from their common parent, which becomes the working directory.
fn shorten(options: &[String]) -> io::Result<String> {
    let Some(lower) = options.iter().find_map(|option| option.strip_prefix("lowerdir=")) else {
        return Ok(options.join(","));
    };
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common: PathBuf = dirs.first().map(|dir| dir.to_path_buf()).unwrap_or_default();
    while !dirs.iter().all(|dir| dir.starts_with(&common)) {
        common.pop();
    }
    if !common.is_absolute() {
        return Ok(options.join(","));
    }
    rustix::process::chdir(&common)?;
    let names: Vec<String> = dirs
        .iter()
        .map(|dir| match dir.strip_prefix(&common) {
            Ok(rest) if rest.as_os_str().is_empty() => ".".to_owned(),
            Ok(rest) => rest.display().to_string(),
            Err(_) => dir.display().to_string(),
        })
        .collect();
    let joined: Vec<String> = options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", names.join(":")),
            None => option.clone(),
        })
        .collect();
    Ok(joined.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_flags_and_data() {
        let words = ["ro", "nosuid", "suid", "rshared", "lowerdir=/a:/b", "index=off"].map(str::to_owned);
        let parsed = parse(&words);
        assert_eq!(parsed.flags, MountFlags::RDONLY);
        assert_eq!(parsed.propagation, Some(MountPropagationFlags::SHARED | MountPropagationFlags::REC));
        assert_eq!(parsed.data, ["lowerdir=/a:/b", "index=off"]);
        assert_eq!(propagation("private"), MountPropagationFlags::PRIVATE);
        assert_eq!(propagation("rprivate"), MountPropagationFlags::PRIVATE | MountPropagationFlags::REC);
        assert_eq!(propagation("rslave"), MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC);
        assert_eq!(propagation("runbindable"), MountPropagationFlags::UNBINDABLE | MountPropagationFlags::REC);
        assert_eq!(propagation("unbindable"), MountPropagationFlags::UNBINDABLE);
    }
}
