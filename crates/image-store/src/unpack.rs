//! A layer's archive onto disk, as overlayfs wants it, and never outside of the layer's directory.
//!
//! **Invariant**: every path is resolved by the kernel beneath the layer's directory (`openat2` with `RESOLVE_IN_ROOT`), and the last component is
//! never followed. So ".." is resolved lexically and may not lead out, links of the archive lead at most to the layer's own root, and nothing
//! that the archive says can reach another file of the host.
//!
//! Facts: OCI image-spec layer.md (whiteouts); kernel Documentation/filesystems/overlayfs.rst (character device 0/0, `trusted.overlay.opaque`).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, linkat, makedev,
    mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::error::Error;
use crate::merge;
use crate::tar::{Archive, Entry, Kind};
use crate::types::Usage;

const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
const COPY_BUFFER_BYTES: usize = 256 * 1024;
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// What the archive left for the time when the layers below are known, and what it took.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    /// Directories that the archive uses but does not describe: they look as the layer below has them.
    pub implicit: Vec<Vec<u8>>,
    /// Hard links to files of layers below: (path, target).
    pub links_below: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes and entries made.
    pub usage: Usage,
}

/// Limits of one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub bytes: u64,
    pub entries: u64,
}

/// Unpacks `archive` into the empty directory `root`; `layer` is named in errors.
pub(crate) fn unpack<R: Read>(archive: &mut Archive<R>, root: OwnedFd, limits: Limits, layer: &str) -> Result<Unpacked, Error> {
    let mut unpacker = Unpacker {
        root,
        layer,
        parent: None,
        directories: Vec::new(),
        root_described: false,
        done: Unpacked::default(),
        buffer: vec![0; COPY_BUFFER_BYTES],
    };
    loop {
        let entry = archive.next().map_err(|e| unpacker.archive_error(&e, b""))?;
        let Some(entry) = entry else { break };
        unpacker.done.usage.inodes += 1;
        unpacker.done.usage.bytes = unpacker.done.usage.bytes.saturating_add(entry.size);
        if unpacker.done.usage.inodes > limits.entries || unpacker.done.usage.bytes > limits.bytes {
            return Err(unpacker.refuse(format!("it unpacks to more than {} bytes or {} entries", limits.bytes, limits.entries)));
        }
        unpacker.apply(&entry, archive)?;
    }
    unpacker.finish()
}

struct Unpacker<'a> {
    root: OwnedFd,
    layer: &'a str,
    /// The directory of the last entry; most entries follow one of the same directory.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Directories and their times, to be set when nothing is put into them any more.
    directories: Vec<(Vec<u8>, (i64, u32))>,
    root_described: bool,
    done: Unpacked,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn refuse(&self, why: String) -> Error {
        Error::Layer { layer: self.layer.to_owned(), why }
    }

    fn failed(&self, path: &[u8], source: impl Into<io::Error>) -> Error {
        Error::Unpack { layer: self.layer.to_owned(), path: String::from_utf8_lossy(path).into_owned(), source: source.into() }
    }

    /// An error of the archive itself is the layer's; one of the input is passed on as it is (the transfer broke).
    fn archive_error(&self, error: &io::Error, path: &[u8]) -> Error {
        match error.kind() {
            io::ErrorKind::InvalidData => self.refuse(error.to_string()),
            kind => self.failed(path, io::Error::new(kind, error.to_string())),
        }
    }

    fn apply<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), Error> {
        let Some(path) = normalise(&entry.path) else {
            return Err(self.refuse(format!("path {:?} leads outside", String::from_utf8_lossy(&entry.path))));
        };
        if path.is_empty() {
            return self.describe_root(entry);
        }
        let (parent, name) = split(&path);
        let name = name.to_vec();
        if name.starts_with(WHITEOUT_PREFIX) {
            return self.whiteout(parent, &name);
        }
        self.enter(parent)?;
        match entry.kind {
            Kind::Dir => self.directory(entry, &path, &name)?,
            Kind::File => self.file(entry, archive, &path, &name)?,
            Kind::HardLink => return self.hard_link(entry, &path, &name),
            Kind::Symlink => {
                self.clear(&path, &name)?;
                let made = symlinkat(OsStr::from_bytes(&entry.link), self.dir(), OsStr::from_bytes(&name));
                made.map_err(|e| self.failed(&path, e))?;
                self.attributes(entry, &path, &name)?;
            }
            Kind::Char | Kind::Block | Kind::Fifo => {
                self.clear(&path, &name)?;
                let kind = match entry.kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = makedev(entry.major, entry.minor);
                mknodat(self.dir(), OsStr::from_bytes(&name), kind, Mode::from(0o600), device).map_err(|e| self.failed(&path, e))?;
                self.attributes(entry, &path, &name)?;
            }
        }
        Ok(())
    }

    /// The directory that [`Self::enter`] opened last.
    fn dir(&self) -> &OwnedFd {
        self.parent.as_ref().map_or(&self.root, |(_, fd)| fd)
    }

    /// Makes the directory at `path` the present one, with all above it.
    fn enter(&mut self, path: &[u8]) -> Result<(), Error> {
        match &self.parent {
            Some((present, _)) if present == path => return Ok(()),
            None if path.is_empty() => return Ok(()),
            _ => {}
        }
        self.parent = None;
        if path.is_empty() {
            return Ok(());
        }
        let fd = self.open_or_make(path)?;
        self.parent = Some((path.to_vec(), fd));
        Ok(())
    }

    fn open_or_make(&mut self, path: &[u8]) -> Result<OwnedFd, Error> {
        match self.open_below(path) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(|e| self.failed(path, e)),
        }
        let (above, name) = split(path);
        let made = if above.is_empty() {
            mkdirat(&self.root, OsStr::from_bytes(name), Mode::from(0o755))
        } else {
            let above = self.open_or_make(above)?;
            mkdirat(&above, OsStr::from_bytes(name), Mode::from(0o755))
        };
        made.map_err(|e| self.failed(path, e))?;
        self.done.implicit.push(path.to_vec());
        self.open_below(path).map_err(|e| self.failed(path, e))
    }

    fn open_below(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        openat2(&self.root, OsStr::from_bytes(path), DIRECTORY, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    fn describe_root(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.kind == Kind::Dir {
            self.parent = None;
            self.root_described = true;
            self.attributes(entry, b"", b".")?;
            self.directories.push((Vec::new(), entry.mtime));
        }
        Ok(())
    }

    /// Removes what an earlier entry of the archive put at the name; true if that was a whiteout.
    fn clear(&mut self, path: &[u8], name: &[u8]) -> Result<bool, Error> {
        let stat = match statat(self.dir(), OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(self.failed(path, e)),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let below = |p: &[u8]| p == path || (p.starts_with(path) && p.get(path.len()) == Some(&b'/'));
            self.done.implicit.retain(|p| !below(p));
            self.done.links_below.retain(|(p, _)| !below(p));
            self.directories.retain(|(p, _)| !below(p));
            linux::tree::remove_at(self.dir(), name).map_err(|e| self.failed(path, e))?;
        } else {
            unlinkat(self.dir(), OsStr::from_bytes(name), AtFlags::empty()).map_err(|e| self.failed(path, e))?;
        }
        Ok(kind == FileType::CharacterDevice && stat.st_rdev == 0)
    }

    fn directory(&mut self, entry: &Entry, path: &[u8], name: &[u8]) -> Result<(), Error> {
        let stat = statat(self.dir(), OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory) {
            self.done.implicit.retain(|p| p != path);
        } else {
            let was_whiteout = self.clear(path, name)?;
            mkdirat(self.dir(), OsStr::from_bytes(name), Mode::from(0o700)).map_err(|e| self.failed(path, e))?;
            if was_whiteout {
                self.set_opaque(path)?;
            }
        }
        self.attributes(entry, path, name)?;
        self.directories.push((path.to_vec(), entry.mtime));
        Ok(())
    }

    fn file<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>, path: &[u8], name: &[u8]) -> Result<(), Error> {
        self.clear(path, name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(self.dir(), OsStr::from_bytes(name), flags, Mode::from(0o600)).map_err(|e| self.failed(path, e))?;
        let mut file = File::from(fd);
        loop {
            let len = match archive.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.archive_error(&e, path)),
            };
            file.write_all(&self.buffer[..len]).map_err(|e| self.failed(path, e))?;
        }
        self.attributes(entry, path, name)
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], name: &[u8]) -> Result<(), Error> {
        let Some(target) = normalise(&entry.link).filter(|t| !t.is_empty()) else {
            return Err(self.refuse(format!("hard link {:?} leads outside", String::from_utf8_lossy(&entry.link))));
        };
        if target == path {
            return Ok(());
        }
        self.clear(path, name)?;
        let (above, target_name) = split(&target);
        let from = if above.is_empty() {
            self.root.try_clone().map_err(|e| self.failed(path, e))
        } else {
            self.open_below(above).map_err(|e| self.failed(path, e))
        };
        let linked = from.map(|from| linkat(&from, OsStr::from_bytes(target_name), self.dir(), OsStr::from_bytes(name), AtFlags::empty()));
        match linked {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Errno::NOENT)) => {
                self.done.links_below.push((path.to_vec(), target));
                Ok(())
            }
            Err(Error::Unpack { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                self.done.links_below.push((path.to_vec(), target));
                Ok(())
            }
            Ok(Err(e)) => Err(self.failed(path, e)),
            Err(e) => Err(e),
        }
    }

    fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<(), Error> {
        let path = [parent, b"/", name].concat();
        if name == OPAQUE_NAME {
            if !parent.is_empty() {
                self.enter(parent)?;
                return self.set_opaque(parent);
            }
            // The root of the upper layers: everything below is hidden by each name's whiteout or not at all.
            return set_xattr(&self.root, OPAQUE_XATTR, b"y").map_err(|e| self.failed(&path, e));
        }
        let hidden = &name[WHITEOUT_PREFIX.len()..];
        // Other names of this form are aufs' own notes.
        if hidden.is_empty() || hidden == b"." || hidden == b".." || name.starts_with(b".wh..wh.") {
            return Ok(());
        }
        self.enter(parent)?;
        match mknodat(self.dir(), OsStr::from_bytes(hidden), FileType::CharacterDevice, Mode::from(0o600), makedev(0, 0)) {
            Ok(()) => Ok(()),
            // The same layer has put something there already, which hides what is below; a directory must not show it through.
            Err(Errno::EXIST) => {
                let stat = statat(self.dir(), OsStr::from_bytes(hidden), AtFlags::SYMLINK_NOFOLLOW).map_err(|e| self.failed(&path, e))?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    let at = if parent.is_empty() { hidden.to_vec() } else { [parent, b"/", hidden].concat() };
                    return self.set_opaque(&at);
                }
                Ok(())
            }
            Err(e) => Err(self.failed(&path, e)),
        }
    }

    fn set_opaque(&self, path: &[u8]) -> Result<(), Error> {
        let dir = self.open_below(path).map_err(|e| self.failed(path, e))?;
        set_xattr(&dir, OPAQUE_XATTR, b"y").map_err(|e| self.failed(path, e))
    }

    /// Owner, then mode (a change of owner clears set-user-id), then attributes (it clears capabilities, too), then time.
    fn attributes(&self, entry: &Entry, path: &[u8], name: &[u8]) -> Result<(), Error> {
        let os_name = OsStr::from_bytes(name);
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        chownat(self.dir(), os_name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(|e| self.failed(path, e))?;
        if entry.kind != Kind::Symlink {
            chmodat(self.dir(), os_name, Mode::from(entry.mode), AtFlags::empty()).map_err(|e| self.failed(path, e))?;
        }
        for (key, value) in &entry.xattrs {
            if key.starts_with("trusted.overlay.") {
                return Err(self.refuse(format!("{:?} has attribute {key}, which is overlayfs' own", String::from_utf8_lossy(path))));
            }
            // Others (SELinux labels, IMA) are of the host that built the image, as for containerd and Docker.
            if key != "security.capability" && !key.starts_with("user.") && !key.starts_with("system.posix_acl_") {
                continue;
            }
            match lset_xattr(self.dir(), name, key, value) {
                // User attributes exist on files and directories only; some file systems have no ACLs.
                Ok(()) | Err(Errno::NOTSUP) => {}
                Err(Errno::PERM) if key.starts_with("user.") => {}
                Err(e) => return Err(self.failed(path, e)),
            }
        }
        set_time(self.dir(), name, entry.mtime).map_err(|e| self.failed(path, e))
    }

    fn finish(mut self) -> Result<Unpacked, Error> {
        if !self.root_described {
            self.done.implicit.push(Vec::new());
        }
        self.parent = None;
        for (path, mtime) in std::mem::take(&mut self.directories) {
            let dir = if path.is_empty() {
                self.root.try_clone().map_err(|e| self.failed(&path, e))?
            } else {
                self.open_below(&path).map_err(|e| self.failed(&path, e))?
            };
            set_time(&dir, b".", mtime).map_err(|e| self.failed(&path, e))?;
        }
        Ok(self.done)
    }
}

/// Moves what was written through links of the layers below, gives implicit directories the look that they have there, and makes hard links whose target is there. `lower` is the stack, top first.
pub(crate) fn complete(root: &OwnedFd, done: &mut Unpacked, lower: &[OwnedFd], layer: &str) -> Result<(), Error> {
    let failed = |path: &[u8], source: io::Error| Error::Unpack {
        layer: layer.to_owned(),
        path: String::from_utf8_lossy(path).into_owned(),
        source,
    };
    merge::follow_links(root, done, lower).map_err(|e| failed(b"", e))?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let here = |path: &[u8]| if path.is_empty() { b".".to_vec() } else { path.to_vec() };
    for (path, target) in &done.links_below {
        let open = |dir: &OwnedFd| {
            openat2(
                dir,
                OsStr::from_bytes(target),
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT,
            )
        };
        let found = lower.iter().find_map(|dir| open(dir).ok());
        let source = found.ok_or_else(|| {
            let why = format!("hard link {:?} has no target {:?}", String::from_utf8_lossy(path), String::from_utf8_lossy(target));
            Error::Layer { layer: layer.to_owned(), why }
        })?;
        copy_up(root, path, source).map_err(|e| failed(path, e))?;
    }
    // Times last, deepest first, so that nothing changes them again.
    for path in done.implicit.iter().rev() {
        let name = here(path);
        let Some(model) = lower.iter().find_map(|dir| openat2(dir, OsStr::from_bytes(&name), DIRECTORY, Mode::empty(), beneath).ok())
        else {
            continue;
        };
        let stat = rustix::fs::fstat(&model).map_err(|e| failed(path, e.into()))?;
        let dir = openat2(root, OsStr::from_bytes(&name), DIRECTORY, Mode::empty(), beneath).map_err(|e| failed(path, e.into()))?;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        chownat(&dir, ".", Some(uid), Some(gid), AtFlags::empty()).map_err(|e| failed(path, e.into()))?;
        chmodat(&dir, ".", Mode::from_raw_mode(stat.st_mode), AtFlags::empty()).map_err(|e| failed(path, e.into()))?;
        set_time(&dir, b".", (stat.st_mtime, stat.st_mtime_nsec as u32)).map_err(|e| failed(path, e.into()))?;
    }
    Ok(())
}

/// A file of a lower layer copied into this one: overlayfs' layers cannot share an inode.
fn copy_up(root: &OwnedFd, path: &[u8], source: OwnedFd) -> io::Result<()> {
    let (above, name) = split(path);
    let above = if above.is_empty() { b".".as_slice() } else { above };
    let dir = openat2(root, OsStr::from_bytes(above), DIRECTORY, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let stat = rustix::fs::fstat(&source)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the link's target in the layer below is no regular file"));
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(&dir, OsStr::from_bytes(name), flags, Mode::from(0o600))?);
    io::copy(&mut File::from(source), &mut file)?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(&dir, OsStr::from_bytes(name), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    chmodat(&dir, OsStr::from_bytes(name), Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
    Ok(set_time(&dir, name, (stat.st_mtime, stat.st_mtime_nsec as u32))?)
}

/// The path without empty and "." components, ".." resolved; `None` if it leads above its start or has a NUL.
fn normalise(path: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            part if part.contains(&0) => return None,
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn set_time(dir: impl AsFd, name: &[u8], (seconds, nanoseconds): (i64, u32)) -> rustix::io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    utimensat(dir, OsStr::from_bytes(name), &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)
}

/// By way of /proc, since an O_PATH descriptor itself takes no attributes.
fn set_xattr(dir: &OwnedFd, key: &str, value: &[u8]) -> rustix::io::Result<()> {
    rustix::fs::setxattr(format!("/proc/self/fd/{}", dir.as_raw_fd()), key, value, XattrFlags::empty())
}

fn lset_xattr(dir: &OwnedFd, name: &[u8], key: &str, value: &[u8]) -> rustix::io::Result<()> {
    let path = [format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(), name].concat();
    rustix::fs::lsetxattr(OsStr::from_bytes(&path), key, value, XattrFlags::empty())
}

/// Opens a directory to unpack into or look below.
pub(crate) fn open_root(path: &std::path::Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Bytes (as allocated) and entries below a directory.
pub(crate) fn measure(path: &std::path::Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut left = vec![path.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let metadata = match entry.path().symlink_metadata() {
                Ok(metadata) => metadata,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            usage.inodes += 1;
            usage.bytes += std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
            if metadata.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(usage)
}
