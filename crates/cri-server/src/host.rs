//! What this server asks of the host: its facts, and what a request's paths are. All synchronous.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use camino::{Utf8Path, Utf8PathBuf};
use protocols::cri::v1::{ContainerConfig, Device, Mount as CriMount};

use crate::error::{Error, Result};
use crate::images::SnapshotMount;
use crate::spec::mounts::{MountSource, SourcePropagation};
use crate::spec::user::UserFiles;
use crate::spec::{HostDevice, HostFacts, SpecError};

/// `/etc/passwd` and `/etc/group` beyond this are refused, in bytes.
const USER_FILE_BYTES_MAX: u64 = 16 << 20;
/// A pod's `/dev/shm`, in bytes, as containerd's.
const SHM_BYTES: u64 = 64 << 20;

/// A kernel's refusal, for `map_err`.
pub fn kernel(act: impl Into<String>) -> impl FnOnce(linux::Error) -> Error {
    let act = act.into();
    move |source| Error::Kernel { act, source }
}

/// Reads the host's facts.
///
/// # Errors
/// [`Error::Kernel`] if no cgroups are mounted or the capabilities cannot be read.
pub fn facts() -> Result<HostFacts> {
    let cgroups = linux::cgroup::Host::detect().map_err(kernel("find the cgroups"))?;
    let cgroup_v2 = cgroups.mode() == linux::cgroup::Mode::V2;
    let v1 = |controller: &str| cgroups.v1.iter().find(|hierarchy| hierarchy.controllers.iter().any(|name| name == controller));
    let v2_controllers = || {
        let mount = cgroups.v2.as_ref().filter(|_| cgroup_v2)?;
        fs::read_to_string(mount.join("cgroup.controllers")).ok()
    };
    let hugetlb = v1("hugetlb").is_some() || v2_controllers().is_some_and(|names| names.split_whitespace().any(|name| name == "hugetlb"));
    let swap_accounting = if cgroup_v2 {
        // The root group has no such file, its children have it or not.
        cgroups.v2.as_ref().is_some_and(|mount| has_child_file(mount, "memory.swap.max"))
    } else {
        v1("memory").is_some_and(|hierarchy| hierarchy.mount.join("memory.memsw.limit_in_bytes").exists())
    };
    let permitted = linux::caps::permitted().map_err(kernel("read the capabilities of this process"))?;
    let may_lower = permitted.names().any(|name| name == "CAP_SYS_RESOURCE");
    let own = linux::process::oom_score_adj().map_err(kernel("read the oom_score_adj of this process"))?;
    Ok(HostFacts {
        cgroup_v2,
        hugetlb,
        swap_accounting,
        recursive_read_only: true,
        capabilities: permitted.names().map(str::to_owned).collect(),
        oom_score_adj_min: if may_lower { -1000 } else { own.into() },
        architecture: std::env::consts::ARCH.to_owned(),
        hostname: hostname(),
    })
}

fn has_child_file(mount: &Path, name: &str) -> bool {
    fs::read_dir(mount).into_iter().flatten().flatten().any(|entry| entry.path().join(name).exists())
}

/// The host's name, as it is now.
pub fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// The id of this boot.
///
/// # Errors
/// [`Error::Kernel`] without a procfs.
pub fn boot_id() -> Result<String> {
    linux::process::boot_id().map_err(kernel("read the boot id"))
}

/// A new id: 64 hexadecimal digits.
///
/// # Errors
/// [`Error::Io`] if the kernel has no random numbers.
pub fn new_id() -> Result<String> {
    let path = "/dev/urandom";
    let mut bytes = [0u8; 32];
    File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map_err(Error::io("read", path))?;
    Ok(hex(&bytes))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Mounts a pod's `/dev/shm`.
///
/// # Errors
/// [`Error::Io`] for the directory, [`Error::Kernel`] for the mount.
pub fn mount_shm(path: &Utf8Path) -> Result<()> {
    use linux::mount::flags::{MS_NODEV, MS_NOEXEC, MS_NOSUID};
    fs::create_dir_all(path).map_err(Error::io("make directory", path))?;
    let options = format!("mode=1777,size={SHM_BYTES}");
    linux::mount::mount("shm", path.as_std_path(), "tmpfs", MS_NODEV | MS_NOEXEC | MS_NOSUID, &options)
        .map_err(kernel(format!("mount {path}")))
}

/// Unmounts all that is mounted on the path; nothing is fine.
///
/// # Errors
/// [`Error::Kernel`].
pub fn unmount(path: &Utf8Path) -> Result<()> {
    linux::mount::unmount_all(path.as_std_path(), true).map_err(kernel(format!("unmount {path}")))
}

/// Reads the image's user files through a mount that nobody else sees.
///
/// # Errors
/// [`Error::Kernel`] for a mount that cannot be made, [`Error::Io`] for files that cannot be read.
pub fn user_files(mounts: &[SnapshotMount], scratch: &Utf8Path) -> Result<UserFiles> {
    let read = |root: &OwnedFd| Ok(UserFiles { passwd: read_user_file(root, "etc/passwd")?, group: read_user_file(root, "etc/group")? });
    Ok(with_root(mounts, scratch, read)?.unwrap_or_default())
}

/// Looks at a snapshot's root file system through a mount that nobody else sees; `None` if it has no layers.
///
/// # Errors
/// [`Error::Kernel`] for a mount that cannot be made; those of `look`.
pub fn with_root<T>(mounts: &[SnapshotMount], scratch: &Utf8Path, look: impl FnOnce(&OwnedFd) -> Result<T>) -> Result<Option<T>> {
    let layers = layers(mounts);
    let (root, attached) = match layers.as_slice() {
        [] => return Ok(None),
        [only] => (open_directory(only)?, None),
        layers => match detached_overlay(layers) {
            Ok(root) => (root, None),
            Err(_) => (attached_overlay(layers, scratch)?, Some(scratch)),
        },
    };
    let seen = look(&root);
    drop(root);
    if let Some(scratch) = attached {
        unmount(scratch)?;
        fs::remove_dir(scratch).map_err(Error::io("remove directory", scratch))?;
    }
    seen.map(Some)
}

fn open_directory(path: &str) -> Result<OwnedFd> {
    linux::fs::open_directory(Path::new(path)).map_err(kernel(format!("open {path}")))
}

/// The directories of a snapshot, the uppermost first.
fn layers(mounts: &[SnapshotMount]) -> Vec<String> {
    let Some(mount) = mounts.first() else { return Vec::new() };
    if mount.kind != "overlay" {
        return vec![mount.source.clone()];
    }
    let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name)).map(str::to_owned);
    let upper = option("upperdir=");
    let lower = option("lowerdir=").unwrap_or_default();
    upper.into_iter().chain(lower.split(':').filter(|layer| !layer.is_empty()).map(str::to_owned)).collect()
}

/// An overlay without a place in the file tree (Linux 6.8): nothing is left of it if this process dies.
fn detached_overlay(layers: &[String]) -> linux::Result<OwnedFd> {
    let context = linux::mount::Context::open("overlay")?;
    for layer in layers {
        context.set("lowerdir+", layer)?;
    }
    context.mount(linux::mount::attr::RDONLY)
}

fn attached_overlay(layers: &[String], scratch: &Utf8Path) -> Result<OwnedFd> {
    fs::create_dir_all(scratch).map_err(Error::io("make directory", scratch))?;
    let options = format!("lowerdir={}", layers.join(":"));
    linux::mount::mount("overlay", scratch.as_std_path(), "overlay", linux::mount::flags::MS_RDONLY, &options)
        .map_err(kernel(format!("mount {scratch}")))?;
    open_directory(scratch.as_str())
}

fn read_user_file(root: &OwnedFd, path: &str) -> Result<Option<String>> {
    use rustix::fs::OFlags;
    let open = |flags: OFlags| linux::fs::open_in_root(root.as_fd(), Path::new(path), flags.bits() as i32);
    // Opening a device may do what it is for: it is looked at first.
    let regular = open(OFlags::PATH).and_then(|fd| Ok(linux::fs::stat_fd(fd.as_fd())?.is_regular()));
    match regular {
        Ok(true) => {}
        Ok(false) => {
            let why = io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file");
            return Err(Error::io("read the image's", format!("/{path}"))(why));
        }
        Err(error) if matches!(error.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(source) => return Err(Error::Kernel { act: format!("open the image's /{path}"), source }),
    }
    let fd = open(OFlags::RDONLY | OFlags::NONBLOCK).map_err(kernel(format!("open the image's /{path}")))?;
    let bytes = linux::fs::read_regular_fd(fd, USER_FILE_BYTES_MAX).map_err(Error::io("read the image's", format!("/{path}")))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Looks the sources of a request's mounts up; one that does not exist is made, as a directory.
///
/// # Errors
/// [`SpecError::Mount`] with the container's path.
pub fn mount_sources(mounts: &[CriMount]) -> Result<Vec<MountSource>> {
    if mounts.is_empty() {
        return Ok(Vec::new());
    }
    let needs_table = mounts.iter().any(|mount| mount.propagation != 0);
    let table = if needs_table { linux::mountinfo::read().map_err(kernel("read the mounts"))? } else { Vec::new() };
    mounts.iter().map(|mount| mount_source(mount, &table)).collect()
}

fn mount_source(mount: &CriMount, table: &[linux::mountinfo::Mount]) -> Result<MountSource> {
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        return Ok(MountSource::default());
    }
    let refuse = |reason: String| Error::Spec(SpecError::Mount { container_path: mount.container_path.clone(), reason });
    let host = Path::new(&mount.host_path);
    if !host.is_absolute() {
        return Err(refuse(format!("host path {:?} is not absolute", mount.host_path)));
    }
    if !host.exists() {
        fs::create_dir_all(host).map_err(|error| refuse(format!("failed to make {}: {error}", mount.host_path)))?;
    }
    let path = fs::canonicalize(host).map_err(|error| refuse(format!("failed to resolve {}: {error}", mount.host_path)))?;
    let path = path.into_os_string().into_string().map_err(|_| refuse("host path is not UTF-8".to_owned()))?;
    let covering = table
        .iter()
        .enumerate()
        .filter(|(_, entry)| Path::new(&path).starts_with(&entry.target))
        // The deepest, and of those on one target the last.
        .max_by_key(|(place, entry)| (entry.target.as_os_str().len(), *place))
        .map(|(_, entry)| entry);
    let propagation = match covering {
        Some(entry) if entry.is_shared() => SourcePropagation::Shared,
        Some(entry) if entry.optional.iter().any(|field| field.starts_with("master:")) => SourcePropagation::Slave,
        _ => SourcePropagation::Private,
    };
    Ok(MountSource { path, propagation })
}

/// Looks the devices of a request up; a directory stands for all device nodes below it. Privileged containers have the
/// host's besides.
///
/// # Errors
/// [`SpecError::Device`] with the path.
pub fn devices(config: &ContainerConfig, privileged: bool) -> Result<Vec<HostDevice>> {
    let mut found = Vec::new();
    for device in &config.devices {
        find_devices(device, &mut found)?;
    }
    if privileged {
        host_devices(Utf8Path::new("/dev"), &mut found);
    }
    Ok(found)
}

fn find_devices(device: &Device, found: &mut Vec<HostDevice>) -> Result<()> {
    let refuse = |reason: String| Error::Spec(SpecError::Device { path: device.host_path.clone(), reason });
    if device.permissions.is_empty() || !device.permissions.chars().all(|c| "rwm".contains(c)) {
        return Err(refuse(format!("permissions {:?} are not of r, w and m", device.permissions)));
    }
    let path = fs::canonicalize(&device.host_path).map_err(|error| refuse(error.to_string()))?;
    let path = Utf8PathBuf::from_path_buf(path).map_err(|_| refuse("not UTF-8".to_owned()))?;
    let target = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
    let metadata = fs::metadata(&path).map_err(|error| refuse(error.to_string()))?;
    if metadata.is_dir() {
        let before = found.len();
        for entry in path.read_dir_utf8().map_err(|error| refuse(error.to_string()))?.flatten() {
            if let Some(node) = node(entry.path(), &format!("{target}/{}", entry.file_name()), &device.permissions) {
                found.push(node);
            }
        }
        if found.len() == before {
            return Err(refuse("no device nodes in it".to_owned()));
        }
        return Ok(());
    }
    found.push(node(&path, target, &device.permissions).ok_or_else(|| refuse("not a device node".to_owned()))?);
    Ok(())
}

fn node(path: &Utf8Path, target: &str, access: &str) -> Option<HostDevice> {
    let metadata = fs::symlink_metadata(path).ok()?;
    let kind = if metadata.file_type().is_char_device() {
        "c"
    } else if metadata.file_type().is_block_device() {
        "b"
    } else {
        return None;
    };
    let device = metadata.rdev();
    Some(HostDevice {
        path: target.to_owned(),
        kind: kind.to_owned(),
        major: rustix::fs::major(device).into(),
        minor: rustix::fs::minor(device).into(),
        file_mode: metadata.permissions().mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
    })
}

/// The device nodes of the host, but for those that a container has of its own.
fn host_devices(dir: &Utf8Path, found: &mut Vec<HostDevice>) {
    const SKIPPED: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
    // What vanishes meanwhile is not there.
    for entry in dir.read_dir_utf8().into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && !SKIPPED.contains(&entry.file_name()) {
            host_devices(path, found);
        } else if path != "/dev/console"
            && let Some(node) = node(path, path.as_str(), "rwm")
            && !found.iter().any(|known| known.path == node.path)
        {
            found.push(node);
        }
    }
}

/// Reads the administrator's seccomp profile.
///
/// # Errors
/// [`SpecError::Seccomp`] with the path.
pub fn seccomp_file(path: &str) -> Result<crate::oci::Seccomp> {
    let text = fs::read_to_string(path).map_err(|error| SpecError::Seccomp(format!("profile {path}: {error}")))?;
    Ok(crate::spec::seccomp::parse(path, &text)?)
}
