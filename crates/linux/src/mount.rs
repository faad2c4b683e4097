//! Mounts: the classic calls for whole trees that the caller owns, and the descriptor-based API (Linux 5.2, 5.12) for
//! everything that is put below a directory which somebody else may change.
//!
//! Source: mount(2), mount_setattr(2), open_tree(2), move_mount(2), fsopen(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr;

use crate::sys::{check, cpath, cstr, own, retry};
use crate::{Error, Result};

/// `mount(2)`'s flags.
pub mod flags {
    pub use libc::{
        MS_BIND, MS_DIRSYNC, MS_I_VERSION, MS_LAZYTIME, MS_MANDLOCK, MS_NOATIME, MS_NODEV, MS_NODIRATIME, MS_NOEXEC, MS_NOSUID, MS_PRIVATE,
        MS_RDONLY, MS_REC, MS_RELATIME, MS_REMOUNT, MS_SHARED, MS_SILENT, MS_SLAVE, MS_STRICTATIME, MS_SYNCHRONOUS, MS_UNBINDABLE,
    };
}

/// Attributes of a mount, for [`set_attributes`] and [`Context::mount`] (`MOUNT_ATTR_*`).
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-uid bits have no effect.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes have no effect.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The field of the access-time mode; `0` in it is `relatime`.
    pub const ATIME_MASK: u64 = 0x70;
    /// Access times are not updated.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always updated.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are not updated.
    pub const NODIRATIME: u64 = 0x80;
    /// The mount is idmapped (`userns_fd` gives the mapping).
    pub const IDMAP: u64 = 0x0010_0000;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
}

const OPEN_TREE_CLONE: u32 = 1;
const AT_RECURSIVE: u32 = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const FSOPEN_CLOEXEC: u32 = 1;
const FSMOUNT_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// The classic `mount(2)`. `target` is followed as any path is: for targets that a container can change use
/// [`open_tree`]/[`Context`] with [`attach`].
///
/// # Errors
/// The kernel's answer, with the target.
pub fn mount(source: &str, target: &Path, fstype: &str, flags: u64, data: &str) -> Result<()> {
    let source_c = cstr("mount", source)?;
    let target_c = cpath("mount", target)?;
    let fstype_c = cstr("mount", fstype)?;
    let data_c = cstr("mount", data)?;
    let data_ptr = if data.is_empty() { ptr::null() } else { data_c.as_ptr().cast() };
    // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
    let ret = unsafe { libc::mount(source_c.as_ptr(), target_c.as_ptr(), fstype_c.as_ptr(), flags, data_ptr) };
    check(ret.into()).map_err(|e| Error::new("mount", format!("{fstype} on {}", target.display()), e))?;
    Ok(())
}

/// Bind-mounts `source` on `target`, with all mounts below when `recursive`.
///
/// # Errors
/// The kernel's answer, with both paths.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> Result<()> {
    let rec = if recursive { libc::MS_REC } else { 0 };
    let source_c = cpath("mount", source)?;
    let target_c = cpath("mount", target)?;
    // SAFETY: the strings outlive the call; a bind mount takes no type and no data.
    let ret = unsafe { libc::mount(source_c.as_ptr(), target_c.as_ptr(), ptr::null(), libc::MS_BIND | rec, ptr::null()) };
    check(ret.into()).map_err(|e| Error::new("bind mount", format!("{} on {}", source.display(), target.display()), e))?;
    Ok(())
}

/// Changes the propagation of the mount at `target`: one of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`,
/// with `MS_REC` for all below.
///
/// # Errors
/// The kernel's answer, with the target.
pub fn set_propagation(target: &Path, flags: u64) -> Result<()> {
    let target_c = cpath("mount", target)?;
    // SAFETY: the string outlives the call; a propagation change takes no source, type or data.
    let ret = unsafe { libc::mount(ptr::null(), target_c.as_ptr(), ptr::null(), flags, ptr::null()) };
    check(ret.into()).map_err(|e| Error::new("set propagation of", target.display().to_string(), e))?;
    Ok(())
}

/// Unmounts `target`, never following a symbolic link at its end. With `detach` the mount leaves the tree at once and
/// is freed when its last user is gone.
///
/// # Errors
/// The kernel's answer, with the target; `EINVAL` when nothing is mounted there, `EBUSY` when in use.
pub fn unmount(target: &Path, detach: bool) -> Result<()> {
    let target_c = cpath("umount2", target)?;
    let flags = libc::UMOUNT_NOFOLLOW | if detach { libc::MNT_DETACH } else { 0 };
    // SAFETY: the string outlives the call.
    let ret = unsafe { libc::umount2(target_c.as_ptr(), flags) };
    check(ret.into()).map_err(|e| Error::new("unmount", target.display().to_string(), e))?;
    Ok(())
}

/// Unmounts everything that is stacked at `target`; fine when nothing is there, or the path does not exist.
///
/// # Errors
/// Any answer of the kernel other than "not a mount" and "no such path".
pub fn unmount_all(target: &Path, detach: bool) -> Result<()> {
    // A stack deeper than this is not of our making.
    const STACKED_MAX: usize = 64;
    for _ in 0..STACKED_MAX {
        match unmount(target, detach) {
            Ok(()) => {}
            Err(e) if e.is(libc::EINVAL) || e.is(libc::ENOENT) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Err(Error::invalid("unmount", target.display().to_string(), "more than 64 mounts are stacked here"))
}

/// A detached copy of the mount at `path` (below `dir` when given), with all mounts below it when `recursive`
/// (`open_tree(OPEN_TREE_CLONE)`). A symbolic link at the end of `path` is followed.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn clone_tree(dir: Option<BorrowedFd<'_>>, path: &Path, recursive: bool) -> Result<OwnedFd> {
    let path_c = cpath("open_tree", path)?;
    let dir_raw = dir.map_or(libc::AT_FDCWD, |d| d.as_raw_fd());
    let empty = if path.as_os_str().is_empty() { libc::AT_EMPTY_PATH as u32 } else { 0 };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | if recursive { AT_RECURSIVE } else { 0 } | empty;
    // SAFETY: the string outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_open_tree, dir_raw, path_c.as_ptr(), flags) };
    check(ret).map(own).map_err(|e| Error::new("clone mount of", path.display().to_string(), e))
}

/// A detached copy of the mount that `fd` (O_PATH is enough) stands on, from that file or directory downwards.
///
/// # Errors
/// The kernel's answer.
pub fn clone_tree_fd(fd: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    clone_tree(Some(fd), Path::new(""), recursive)
}

/// Attaches the detached mount `tree` on the file or directory that `target` (O_PATH) is, so that no path is walked.
///
/// # Errors
/// The kernel's answer.
pub fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    let empty = c"";
    // SAFETY: both strings are static and empty, as the EMPTY_PATH flags ask.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            target.as_raw_fd(),
            empty.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(ret).map_err(|e| Error::new("move_mount", "", e))?;
    Ok(())
}

/// A change of mount attributes: `attr::*` to set and to clear, and a propagation (`MS_*`, 0 for none).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear; with an access-time mode in `set` this must hold `attr::ATIME_MASK`.
    pub clear: u64,
    /// One of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`, or 0.
    pub propagation: u64,
}

impl AttributeChange {
    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes the mount that `mount` is the root of; all mounts below too when `recursive` (Linux 5.12).
///
/// # Errors
/// The kernel's answer.
pub fn set_attributes(mount: BorrowedFd<'_>, change: AttributeChange, recursive: bool) -> Result<()> {
    let attr = MountAttr { attr_set: change.set, attr_clr: change.clear, propagation: change.propagation, userns_fd: 0 };
    setattr(mount, &attr, recursive)
}

fn setattr(mount: BorrowedFd<'_>, attr: &MountAttr, recursive: bool) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static empty string and the struct, with its true size, outlives the call.
    let ret = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, ptr::from_ref(attr), size_of::<MountAttr>())
    };
    check(ret).map_err(|e| Error::new("mount_setattr", "", e))?;
    Ok(())
}

/// A new file system that is being configured (`fsopen(2)`).
pub struct Context {
    fd: OwnedFd,
    fstype: String,
}

impl Context {
    /// Begins a file system of this type.
    ///
    /// # Errors
    /// The kernel's answer; `ENODEV` for a type that it does not know.
    pub fn open(fstype: &str) -> Result<Self> {
        let name = cstr("fsopen", fstype)?;
        // SAFETY: the string outlives the call.
        let ret = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) };
        let fd = check(ret).map(own).map_err(|e| Error::new("fsopen", fstype, e))?;
        Ok(Self { fd, fstype: fstype.to_owned() })
    }

    /// Sets an option that has a value. Values are limited to 255 bytes by the kernel.
    ///
    /// # Errors
    /// The kernel's answer, and its own words about it.
    pub fn set(&self, key: &str, value: &str) -> Result<()> {
        let value = cstr("fsconfig", value)?;
        self.config(FSCONFIG_SET_STRING, Some(key), value.as_ptr())
    }

    /// Sets an option that has no value.
    ///
    /// # Errors
    /// The kernel's answer, and its own words about it.
    pub fn set_flag(&self, key: &str) -> Result<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), ptr::null())
    }

    /// Makes the superblock and a detached mount of it with these attributes (`attr::*`).
    ///
    /// # Errors
    /// The kernel's answer, and its own words about it.
    pub fn mount(self, attributes: u64) -> Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, ptr::null())?;
        // SAFETY: only integers are passed.
        let ret = unsafe { libc::syscall(libc::SYS_fsmount, self.fd.as_raw_fd(), FSMOUNT_CLOEXEC, attributes as u32) };
        check(ret).map(own).map_err(|e| Error::new("fsmount", self.fstype.clone(), e))
    }

    fn config(&self, command: u32, key: Option<&str>, value: *const libc::c_char) -> Result<()> {
        let key_c = key.map(|k| cstr("fsconfig", k)).transpose()?;
        let key_ptr = key_c.as_ref().map_or(ptr::null(), |k| k.as_ptr());
        // SAFETY: `key_ptr` and `value` are null or NUL-terminated strings that outlive the call.
        let ret = unsafe { libc::syscall(libc::SYS_fsconfig, self.fd.as_raw_fd(), command, key_ptr, value, 0) };
        check(ret).map_err(|e| {
            let mut object = self.fstype.clone();
            if let Some(key) = key {
                object = format!("{object}, option {key}");
            }
            if let Some(words) = self.words() {
                object = format!("{object} ({words})");
            }
            Error::new("configure file system", object, e)
        })?;
        Ok(())
    }

    /// What the kernel has to say about the last failure.
    fn words(&self) -> Option<String> {
        let mut buffer = [0u8; 512];
        // SAFETY: the buffer is ours and its length is given.
        let ret = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let length = usize::try_from(ret).ok().filter(|n| *n > 2)?;
        // Messages start with a level letter and a space ("e ").
        Some(String::from_utf8_lossy(&buffer[2..length]).trim_end().to_owned())
    }
}

/// Makes the mount at `new_root`, which must be the present directory's mount, the root of this mount namespace and
/// drops the old root: `pivot_root(".", ".")` on the directory `new_root`, then a detached unmount of what is below.
///
/// # Errors
/// The kernel's answer to the step that failed.
pub fn pivot_root(new_root: BorrowedFd<'_>) -> Result<()> {
    let open_root = || crate::fs::open_path(Path::new("/"));
    let old_root = open_root()?;
    crate::fs::chdir_fd(new_root)?;
    // SAFETY: both strings are static.
    let ret = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    check(ret).map_err(|e| Error::new("pivot_root", "", e))?;
    crate::fs::chdir_fd(old_root.as_fd())?;
    // Nothing of the unmount below may travel to the host.
    set_propagation(Path::new("."), libc::MS_SLAVE | libc::MS_REC)?;
    let dot = Path::new(".");
    // SAFETY: the string is static.
    let ret = unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) };
    check(ret.into()).map_err(|e| Error::new("unmount", dot.display().to_string(), e))?;
    crate::fs::chdir(Path::new("/"))
}

/// Enters the root `new_root`, which is mounted over "/" (`--no-pivot`: for hosts whose root is the initial ramfs, which
/// cannot be pivoted away from). The host's root stays below it, so its procfs and sysfs mounts are taken out of this mount
/// namespace first: a container must not find them unmasked.
///
/// # Errors
/// The kernel's answer to the step that failed.
pub fn move_root(new_root: BorrowedFd<'_>) -> Result<()> {
    let mut mounts = crate::mountinfo::read()?;
    mounts.retain(|mount| matches!(mount.fstype.as_str(), "proc" | "sysfs") && mount.root == Path::new("/"));
    for mount in mounts.iter().rev() {
        match unmount(&mount.target, true) {
            // The new root's own mounts are in the list too, by paths that are the old root's here.
            Err(e) if e.is(libc::EINVAL) || e.is(libc::ENOENT) => {}
            other => other?,
        }
    }
    crate::fs::chdir_fd(new_root)?;
    // SAFETY: the string is static.
    let ret = retry(|| unsafe { libc::chroot(c".".as_ptr()) }.into());
    ret.map_err(|e| Error::new("chroot", ".", e))?;
    crate::fs::chdir(Path::new("/"))
}
