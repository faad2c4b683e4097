//! Files: paths below a root that somebody else may change, made and opened without ever leaving it.
//!
//! Everything goes through `openat2(RESOLVE_IN_ROOT)` (Linux 5.6): absolute links and `..` stay below the root, and
//! magic links are refused.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use crate::sys::{check, cpath, own, retry};
use crate::{Error, Result};

const RESOLVE_NO_XDEV: u64 = 0x01;
const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_NO_SYMLINKS: u64 = 0x04;
const RESOLVE_BENEATH: u64 = 0x08;
const RESOLVE_IN_ROOT: u64 = 0x10;

const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// `struct open_how` of openat2(2).
#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

fn openat2(dir: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32, resolve: u64) -> Result<OwnedFd> {
    // The kernel asks for a retry when a rename raced with the resolution; a few of them are not an attack yet.
    const AGAIN_MAX: usize = 128;
    let path_c = cpath("openat2", path)?;
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u32 as u64, mode: mode.into(), resolve };
    for attempt in 0.. {
        let ret = retry(|| {
            // SAFETY: the string and the struct, with its true size, outlive the call.
            unsafe { libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path_c.as_ptr(), &raw const how, size_of::<OpenHow>()) }
        });
        match ret {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && attempt < AGAIN_MAX => {}
            other => return other.map(own).map_err(|e| Error::new("open", path.display().to_string(), e)),
        }
    }
    unreachable!("the loop ends by returning")
}

/// Opens `path` as if `root` were "/". `flags` as of open(2); close-on-exec is added.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: i32) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, flags, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
}

/// Opens the file `name` directly in `dir`: one component, no link, no other mount.
///
/// # Errors
/// The kernel's answer, with the name.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32) -> Result<OwnedFd> {
    openat2(dir, path, flags, mode, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV)
}

/// An O_PATH descriptor of `path`, links followed.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn open_path(path: &Path) -> Result<OwnedFd> {
    open_plain(path, libc::O_PATH)
}

/// An O_PATH descriptor of the directory `path`, links followed.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    open_plain(path, libc::O_PATH | libc::O_DIRECTORY)
}

/// Opens with these flags of open(2), close-on-exec added.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn open_plain(path: &Path, flags: i32) -> Result<OwnedFd> {
    let path_c = cpath("open", path)?;
    // SAFETY: the string outlives the call.
    retry(|| unsafe { libc::open(path_c.as_ptr(), flags | libc::O_CLOEXEC) }.into())
        .map(own)
        .map_err(|e| Error::new("open", path.display().to_string(), e))
}

/// The components of a path as if it began at a root, without `.`; `..` takes the previous one away.
fn clean(path: &Path) -> Vec<&std::ffi::OsStr> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => parts.push(name),
            Component::ParentDir => {
                parts.pop();
            }
            _ => {}
        }
    }
    parts
}

/// How many links that lead to nothing yet are followed on one path (the kernel's own bound for links).
const DANGLING_MAX: usize = 40;

/// The directory `path` below `root`, made with all that is missing above it (mode 0755), as an O_PATH descriptor. A
/// link that leads to nothing is followed, within the root, and what it leads to is made.
///
/// # Errors
/// The kernel's answer; `ENOTDIR` when something on the way is no directory.
pub fn make_directories_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let mut path = path.to_path_buf();
    for _ in 0..DANGLING_MAX {
        match try_make_directories(root, &path)? {
            Made::Open(fd) => return Ok(fd),
            Made::LeadsTo(other) => path = other,
        }
    }
    Err(Error::new("mkdir", path.display().to_string(), std::io::Error::from_raw_os_error(libc::ELOOP)))
}

enum Made {
    Open(OwnedFd),
    /// A link without an end was met; the path is to be this one.
    LeadsTo(PathBuf),
}

fn try_make_directories(root: BorrowedFd<'_>, path: &Path) -> Result<Made> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    match open_in_root(root, path, flags) {
        Err(e) if e.is(libc::ENOENT) => {}
        other => return other.map(Made::Open),
    }
    let mut present = PathBuf::new();
    let mut dir = open_in_root(root, Path::new("."), flags)?;
    let parts = clean(path);
    for (index, part) in parts.iter().enumerate() {
        let above = present.clone();
        present.push(part);
        dir = match open_in_root(root, &present, flags) {
            Err(e) if e.is(libc::ENOENT) => {
                if let Some(target) = read_link_at(dir.as_fd(), Path::new(part))? {
                    let rest: PathBuf = parts[index + 1..].iter().collect();
                    return Ok(Made::LeadsTo(above.join(target).join(rest)));
                }
                make_directory_at(dir.as_fd(), Path::new(part), 0o755)?;
                open_in_root(root, &present, flags)?
            }
            other => other?,
        };
    }
    Ok(Made::Open(dir))
}

/// Where the link `name` in `dir` leads; `None` when it is not there or no link.
fn read_link_at(dir: BorrowedFd<'_>, name: &Path) -> Result<Option<PathBuf>> {
    use std::os::unix::ffi::OsStringExt;
    let name_c = cpath("readlink", name)?;
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the string and the buffer, with its length, outlive the call.
    let ret = unsafe { libc::readlinkat(dir.as_raw_fd(), name_c.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    match check(ret as libc::c_long) {
        Ok(length) => {
            buffer.truncate(length as usize);
            Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(buffer))))
        }
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(None),
        Err(e) => Err(Error::new("readlink", name.display().to_string(), e)),
    }
}

/// The file `path` below `root`, made empty (mode 0644) with all directories above it when it is missing, as an O_PATH
/// descriptor; links are followed within the root.
///
/// # Errors
/// The kernel's answer.
pub fn make_file_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let mut path = path.to_path_buf();
    for _ in 0..DANGLING_MAX {
        match open_in_root(root, &path, libc::O_PATH) {
            Err(e) if e.is(libc::ENOENT) => {}
            other => return other,
        }
        let (dir, name) = parent_in_root(root, &path)?;
        if let Some(target) = read_link_at(dir.as_fd(), &name)? {
            path = path.parent().unwrap_or(Path::new("/")).join(target);
            continue;
        }
        openat2(dir.as_fd(), &name, libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY, 0o644, RESOLVE_BENEATH)?;
        return open_in_root(root, &path, libc::O_PATH);
    }
    Err(Error::new("create", path.display().to_string(), std::io::Error::from_raw_os_error(libc::ELOOP)))
}

/// The directory that holds `path` below `root`, made when missing, and the last name of `path`.
///
/// # Errors
/// The kernel's answer; a path without a last name is invalid.
pub fn parent_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<(OwnedFd, PathBuf)> {
    let parts = clean(path);
    let Some((name, above)) = parts.split_last() else {
        return Err(Error::invalid("open", path.display().to_string(), "the path has no last name"));
    };
    let dir = make_directories_in_root(root, &above.iter().collect::<PathBuf>())?;
    Ok((dir, PathBuf::from(name)))
}

/// Makes the directory `name` in `dir`; fine when there is one.
///
/// # Errors
/// The kernel's answer.
pub fn make_directory_at(dir: BorrowedFd<'_>, name: &Path, mode: u32) -> Result<()> {
    let name_c = cpath("mkdir", name)?;
    // SAFETY: the string outlives the call.
    match check(unsafe { libc::mkdirat(dir.as_raw_fd(), name_c.as_ptr(), mode) }.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EEXIST) => Err(Error::new("mkdir", name.display().to_string(), e)),
        _ => Ok(()),
    }
}

/// Makes the symbolic link `name` in `dir`; fine when something of that name is there.
///
/// # Errors
/// The kernel's answer.
pub fn make_link_at(target: &Path, dir: BorrowedFd<'_>, name: &Path) -> Result<()> {
    let target_c = cpath("symlink", target)?;
    let name_c = cpath("symlink", name)?;
    // SAFETY: the strings outlive the call.
    match check(unsafe { libc::symlinkat(target_c.as_ptr(), dir.as_raw_fd(), name_c.as_ptr()) }.into()) {
        Err(e) if e.raw_os_error() != Some(libc::EEXIST) => Err(Error::new("symlink", name.display().to_string(), e)),
        _ => Ok(()),
    }
}

/// Removes the file `name` in `dir`; fine when there is none.
///
/// # Errors
/// The kernel's answer.
pub fn remove_at(dir: BorrowedFd<'_>, name: &Path) -> Result<()> {
    let name_c = cpath("unlink", name)?;
    // SAFETY: the string outlives the call.
    match check(unsafe { libc::unlinkat(dir.as_raw_fd(), name_c.as_ptr(), 0) }.into()) {
        Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(Error::new("unlink", name.display().to_string(), e)),
        _ => Ok(()),
    }
}

/// What kind of node [`make_node_at`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A block device.
    Block,
    /// A character device.
    Char,
    /// A FIFO.
    Fifo,
}

/// Makes a node in `dir`, with this mode whatever the umask is, and this owner.
///
/// # Errors
/// The kernel's answer; `EEXIST` when something of that name is there.
pub fn make_node_at(dir: BorrowedFd<'_>, name: &Path, kind: NodeKind, mode: u32, device: (u32, u32), owner: (u32, u32)) -> Result<()> {
    let object = || name.display().to_string();
    let name_c = cpath("mknod", name)?;
    let format = match kind {
        NodeKind::Block => libc::S_IFBLK,
        NodeKind::Char => libc::S_IFCHR,
        NodeKind::Fifo => libc::S_IFIFO,
    };
    let number = libc::makedev(device.0, device.1);
    // SAFETY: the string outlives the call.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name_c.as_ptr(), format | mode, number) }.into())
        .map_err(|e| Error::new("mknod", object(), e))?;
    // SAFETY: as above.
    let ret = unsafe { libc::fchownat(dir.as_raw_fd(), name_c.as_ptr(), owner.0, owner.1, libc::AT_SYMLINK_NOFOLLOW) };
    check(ret.into()).map_err(|e| Error::new("chown", object(), e))?;
    // SAFETY: as above.
    check(unsafe { libc::fchmodat(dir.as_raw_fd(), name_c.as_ptr(), mode, 0) }.into()).map_err(|e| Error::new("chmod", object(), e))?;
    Ok(())
}

/// What fstat(2) says of a descriptor.
///
/// # Errors
/// The kernel's answer.
pub fn stat_fd(fd: BorrowedFd<'_>) -> Result<Stat> {
    // SAFETY: a zeroed stat is valid, and the pointer to it outlives the call.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above; the path is empty and static.
    let ret = unsafe { libc::fstatat(fd.as_raw_fd(), c"".as_ptr(), &mut stat, libc::AT_EMPTY_PATH) };
    check(ret.into()).map_err(|e| Error::new("fstat", "", e))?;
    Ok(Stat {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        device: stat.st_dev,
        inode: stat.st_ino,
        node: (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)),
    })
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Kind and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The file system's device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
    /// For a device node: major and minor.
    pub node: (u32, u32),
}

impl Stat {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether it is the character device of these numbers.
    pub fn is_char_device(&self, major: u32, minor: u32) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFCHR && self.node == (major, minor)
    }
}

/// Sets the owner of what `fd` is open on.
///
/// # Errors
/// The kernel's answer.
pub fn chown_fd(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::fchown(fd.as_raw_fd(), uid, gid) }.into())
        .map_err(|e| Error::new("chown", format!("descriptor {}", fd.as_raw_fd()), e))?;
    Ok(())
}

/// The magic number of the file system at `path` (`f_type` of statfs(2)).
///
/// # Errors
/// The kernel's answer.
pub fn filesystem_magic(path: &Path) -> Result<i64> {
    let fd = open_path(path)?;
    filesystem_magic_fd(fd.as_fd())
}

/// The magic number of the file system that `fd` is on.
///
/// # Errors
/// The kernel's answer.
pub fn filesystem_magic_fd(fd: BorrowedFd<'_>) -> Result<i64> {
    // SAFETY: a zeroed statfs is valid, and the pointer to it outlives the call.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &mut stat) }.into()).map_err(|e| Error::new("fstatfs", "", e))?;
    #[allow(clippy::unnecessary_cast)]
    Ok(stat.f_type as i64)
}

/// A directory descriptor of a procfs' root that is truly one.
///
/// # Errors
/// When there is something else at `path`.
pub fn open_procfs(path: &Path) -> Result<OwnedFd> {
    const PROC_ROOT_INODE: u64 = 1;
    let fd = open_directory(path)?;
    let magic = filesystem_magic_fd(fd.as_fd())?;
    if magic != PROC_SUPER_MAGIC || stat_fd(fd.as_fd())?.inode != PROC_ROOT_INODE {
        return Err(Error::invalid("open procfs", path.display().to_string(), "it is not the root of a procfs"));
    }
    Ok(fd)
}

/// Whether the descriptor is on a procfs.
///
/// # Errors
/// The kernel's answer.
pub fn is_on_procfs(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(filesystem_magic_fd(fd)? == PROC_SUPER_MAGIC)
}

/// Writes `text` in one write(2) to the existing file `path` directly beneath `dir`, never crossing a mount or a link:
/// for kernel files, where the answer to the write is the answer to the request.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn write_beneath(dir: BorrowedFd<'_>, path: &Path, text: &str) -> Result<()> {
    let mut file = File::from(open_beneath(dir, path, libc::O_WRONLY, 0)?);
    file.write_all(text.as_bytes()).map_err(|e| Error::new("write", format!("{text:?} to {}", path.display()), e))
}

/// Reads the whole file `path` beneath `dir`, never crossing a mount or a link.
///
/// # Errors
/// The kernel's answer, with the path.
pub fn read_beneath(dir: BorrowedFd<'_>, path: &Path) -> Result<String> {
    let mut text = String::new();
    let mut file = File::from(open_beneath(dir, path, libc::O_RDONLY, 0)?);
    file.read_to_string(&mut text).map_err(|e| Error::new("read", path.display().to_string(), e))?;
    Ok(text)
}

/// Reads the whole file `path`, which somebody else may have put there: a regular one, of at most `bytes_max` bytes. Nothing is waited for.
///
/// # Errors
/// It is of another kind or larger; the kernel's answer.
pub fn read_regular(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    read_regular_fd(open_plain(path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY)?, bytes_max)
}

/// As [`read_regular`], of what is open for reading, with `O_NONBLOCK`.
///
/// # Errors
/// As [`read_regular`].
pub fn read_regular_fd(file: OwnedFd, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let invalid = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(invalid("it is not a regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max { Err(invalid(format!("it is larger than {bytes_max} bytes"))) } else { Ok(bytes) }
}

/// Whether this process may execute the file, by its effective user.
///
/// # Errors
/// Any answer of the kernel other than "not permitted".
pub fn is_executable(path: &Path) -> Result<bool> {
    let path_c = cpath("access", path)?;
    // SAFETY: the string outlives the call.
    match check(unsafe { libc::faccessat(libc::AT_FDCWD, path_c.as_ptr(), libc::X_OK, libc::AT_EACCESS) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => Ok(false),
        Err(e) => Err(Error::new("access", path.display().to_string(), e)),
    }
}

/// Changes the present directory of this process: for children about to execute a program, never for daemons.
///
/// # Errors
/// The kernel's answer.
pub fn chdir(path: &Path) -> Result<()> {
    let path_c = cpath("chdir", path)?;
    // SAFETY: the string outlives the call.
    check(unsafe { libc::chdir(path_c.as_ptr()) }.into()).map_err(|e| Error::new("chdir", path.display().to_string(), e))?;
    Ok(())
}

/// Changes the present directory of this process to that of a descriptor.
///
/// # Errors
/// The kernel's answer.
pub fn chdir_fd(dir: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: only an integer is passed.
    check(unsafe { libc::fchdir(dir.as_raw_fd()) }.into()).map_err(|e| Error::new("fchdir", "", e))?;
    Ok(())
}

/// The present directory as the kernel sees it: not below the present root when it does not begin with "/"
/// (the check against CVE-2024-21626).
///
/// # Errors
/// The kernel's answer.
pub fn present_directory() -> Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // The raw call, for libc's getcwd replaces what is unreachable by an error or a walk upwards.
    // SAFETY: the buffer is ours and its length is given.
    let ret = unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) };
    let length = check(ret).map_err(|e| Error::new("getcwd", "", e))?;
    buffer.truncate((length as usize).saturating_sub(1));
    Ok(PathBuf::from(std::ffi::OsString::from_vec(buffer)))
}

/// Takes an exclusive lock on the open file `fd` (flock(2)); the lock belongs to the open file, so that copies in
/// children hold it too. `false` when it is taken and `block` is not set.
///
/// # Errors
/// Any other answer of the kernel.
pub fn lock_exclusive(fd: BorrowedFd<'_>, block: bool) -> Result<bool> {
    let operation = libc::LOCK_EX | if block { 0 } else { libc::LOCK_NB };
    // SAFETY: only integers are passed.
    match retry(|| unsafe { libc::flock(fd.as_raw_fd(), operation) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
        Err(e) => Err(Error::new("flock", "", e)),
    }
}

/// Waits until one of these can be read, or its other side is gone; `None` is not waited for. Answers which.
///
/// # Errors
/// The kernel's answer to poll(2).
pub fn wait_readable(fds: &[Option<BorrowedFd<'_>>]) -> Result<Vec<bool>> {
    let poll = |fd: &Option<BorrowedFd<'_>>| libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events: libc::POLLIN, revents: 0 };
    let mut polled: Vec<libc::pollfd> = fds.iter().map(poll).collect();
    // SAFETY: the pointer and the count are those of a vector that outlives the call.
    retry(|| unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) }.into()).map_err(|e| Error::new("poll", "", e))?;
    Ok(polled.iter().map(|fd| fd.revents != 0).collect())
}

/// Whether somebody holds an exclusive lock on this file. Those who ask do not see one another.
///
/// # Errors
/// The kernel's answer.
pub fn is_locked(fd: BorrowedFd<'_>) -> Result<bool> {
    // SAFETY: only integers are passed.
    match retry(|| unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) }.into()) {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(true),
        Err(e) => Err(Error::new("flock", "", e)),
    }
}

/// The path by which the kernel finds the file behind a descriptor, whatever its name is by now.
pub fn descriptor_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("coracle-linux-fs-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch directory");
        dir
    }

    #[test]
    fn nothing_leaves_the_root() {
        let dir = scratch("root");
        symlink("/etc", dir.join("absolute")).expect("link");
        symlink("../../../../etc", dir.join("dots")).expect("link");
        symlink("/nowhere/at/all", dir.join("dangling")).expect("link");
        let root = open_directory(&dir).expect("root");
        for path in ["absolute/passwd", "dots/passwd", "../../etc/passwd"] {
            let error = open_in_root(root.as_fd(), Path::new(path), libc::O_RDONLY).expect_err(path);
            assert!(error.is(libc::ENOENT), "{path}: {error}");
        }
        make_directories_in_root(root.as_fd(), Path::new("/a/../b/c")).expect("directories");
        assert!(dir.join("b/c").is_dir());
        make_file_in_root(root.as_fd(), Path::new("/d/e")).expect("file");
        assert!(dir.join("d/e").is_file());
        make_directories_in_root(root.as_fd(), Path::new("dangling/x")).expect("what it leads to is made, below the root");
        assert!(dir.join("nowhere/at/all/x").is_dir() && !Path::new("/nowhere").exists());
        symlink("loop", dir.join("loop")).expect("link");
        assert!(make_directories_in_root(root.as_fd(), Path::new("loop/x")).is_err());
        symlink("../../new", dir.join("d/link")).expect("link");
        make_file_in_root(root.as_fd(), Path::new("d/link")).expect("what it leads to is made, below the root");
        assert!(dir.join("new").is_file());
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn procfs_is_told_from_others() {
        open_procfs(Path::new("/proc")).expect("/proc");
        assert!(open_procfs(Path::new("/proc/self")).is_err());
        assert!(open_procfs(Path::new("/tmp")).is_err());
    }
}
