//! A model of a file tree, and the same view of a real one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags};
use sha2::{Digest, Sha256};

use super::Effect;

/// What a disk writes whole.
const SECTOR: usize = 512;
/// An extended attribute may be this long (limits.h, XATTR_SIZE_MAX).
const XATTR_BYTES_MAX: usize = 65536;

/// A file, directory, link or device.
pub(super) type Inode = usize;
/// The directory that is recorded.
pub(super) const ROOT: Inode = 0;

/// What an inode is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    File(Vec<u8>),
    Dir(BTreeMap<Vec<u8>, Inode>),
    Symlink(Vec<u8>),
    /// A device, FIFO or socket: the type's bits of the mode, major, minor.
    Special(u32, u32, u32),
}

/// An inode.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub fn new(kind: Kind, mode: u32) -> Self {
        Self { kind, mode, uid: 0, gid: 0, xattrs: BTreeMap::new() }
    }

    fn describe(&self) -> String {
        let kind = match &self.kind {
            Kind::File(bytes) => format!("file {} {}", bytes.len(), hex::encode(Sha256::digest(bytes))),
            Kind::Dir(_) => "directory".to_owned(),
            Kind::Symlink(target) => format!("link {}", String::from_utf8_lossy(target)),
            Kind::Special(kind, major, minor) => format!("special {kind:o} {major}:{minor}"),
        };
        // A link has no mode of its own.
        let mode = if matches!(self.kind, Kind::Symlink(_)) { 0 } else { self.mode };
        let xattrs: Vec<String> =
            self.xattrs.iter().map(|(name, value)| format!("{}={}", String::from_utf8_lossy(name), hex::encode(value))).collect();
        format!("{kind} {mode:o} {}:{} {}", self.uid, self.gid, xattrs.join(","))
    }
}

/// Inodes by number; none has the number of one that is gone.
#[derive(Clone, Debug)]
pub(super) struct Tree(pub BTreeMap<Inode, Node>);

impl Default for Tree {
    fn default() -> Self {
        Self(BTreeMap::from([(ROOT, Node::new(Kind::Dir(BTreeMap::new()), 0o755))]))
    }
}

impl Tree {
    fn entries(&mut self, dir: Inode) -> Option<&mut BTreeMap<Vec<u8>, Inode>> {
        match self.0.get_mut(&dir).map(|node| &mut node.kind) {
            Some(Kind::Dir(entries)) => Some(entries),
            _ => None,
        }
    }

    fn content(&mut self, inode: Inode) -> Option<&mut Vec<u8>> {
        match self.0.get_mut(&inode).map(|node| &mut node.kind) {
            Some(Kind::File(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Plays an effect; what of it is there is `keeps`' choice, of a write sector by sector.
    pub fn apply(&mut self, effect: &Effect, mut keeps: impl FnMut(()) -> bool) {
        match effect {
            Effect::Make { inode, node } => drop(self.0.insert(*inode, node.clone())),
            Effect::Write { inode, offset, bytes } => {
                if let Some(file) = self.content(*inode) {
                    write(file, *offset, bytes, &mut keeps);
                }
            }
            Effect::Sync { .. } | Effect::SyncAll | Effect::Mark(_) => {}
            _ if !keeps(()) => {}
            Effect::Name { dir, name, inode } => {
                if let Some(entries) = self.entries(*dir) {
                    match inode {
                        Some(inode) => drop(entries.insert(name.clone(), *inode)),
                        None => drop(entries.remove(name)),
                    }
                }
            }
            Effect::Rename { from, to, inode } => {
                let is_dir = matches!(self.0.get(inode).map(|node| &node.kind), Some(Kind::Dir(_)));
                for (dir, name) in [from, to] {
                    if let Some(entries) = self.entries(*dir) {
                        // A directory has one name, also if an earlier change of it was lost.
                        entries.retain(|present, is| is != inode || !(is_dir || present == name));
                    }
                }
                if let Some(entries) = self.entries(to.0) {
                    entries.insert(to.1.clone(), *inode);
                }
            }
            Effect::SetLength { inode, length } => {
                if let Some(file) = self.content(*inode) {
                    file.resize(*length, 0);
                }
            }
            Effect::SetMode { inode, mode } => {
                if let Some(node) = self.0.get_mut(inode) {
                    node.mode = *mode;
                }
            }
            Effect::SetOwner { inode, uid, gid } => {
                if let Some(node) = self.0.get_mut(inode) {
                    node.uid = uid.unwrap_or(node.uid);
                    node.gid = gid.unwrap_or(node.gid);
                    if !matches!(node.kind, Kind::Dir(_)) {
                        // The kernel takes these bits away from what changes hands.
                        node.mode &= if node.mode & 0o010 == 0 { !0o4000 } else { !0o6000 };
                    }
                }
            }
            Effect::SetXattr { inode, name, value } => {
                if let Some(node) = self.0.get_mut(inode) {
                    match value {
                        Some(value) => drop(node.xattrs.insert(name.clone(), value.clone())),
                        None => drop(node.xattrs.remove(name)),
                    }
                }
            }
        }
    }

    /// The inode at a path below the root; links are not followed.
    pub fn find(&self, path: &[u8]) -> Option<Inode> {
        let mut at = ROOT;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
            match &self.0.get(&at)?.kind {
                Kind::Dir(entries) => at = *entries.get(part)?,
                _ => return None,
            }
        }
        Some(at)
    }

    pub fn describe(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let mut left = vec![(PathBuf::new(), ROOT)];
        while let Some((path, dir)) = left.pop() {
            let Some(Kind::Dir(entries)) = self.0.get(&dir).map(|node| &node.kind) else { continue };
            for (name, inode) in entries {
                let path = path.join(std::ffi::OsStr::from_bytes(name));
                if let Some(node) = self.0.get(inode) {
                    found.insert(path.clone(), node.describe());
                }
                left.push((path, *inode));
            }
        }
        found
    }

    /// Makes what is in a directory.
    pub fn write_to(&self, dir: Inode, at: &Path, made: &mut BTreeMap<Inode, PathBuf>) -> io::Result<()> {
        let Some(Kind::Dir(entries)) = self.0.get(&dir).map(|node| &node.kind) else { return Ok(()) };
        for (name, inode) in entries {
            let path = at.join(std::ffi::OsStr::from_bytes(name));
            let Some(node) = self.0.get(inode) else { continue };
            if let Some(first) = made.get(inode) {
                fs::hard_link(first, &path)?;
                continue;
            }
            match &node.kind {
                Kind::File(bytes) => fs::write(&path, bytes)?,
                Kind::Dir(_) => {
                    fs::create_dir(&path)?;
                    self.write_to(*inode, &path, made)?;
                }
                Kind::Symlink(target) => std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &path)?,
                Kind::Special(kind, major, minor) => {
                    let device = rustix::fs::makedev(*major, *minor);
                    rustix::fs::mknodat(CWD, &path, FileType::from_raw_mode(*kind), Mode::RUSR, device)?;
                }
            }
            made.insert(*inode, path.clone());
            dress(node, &path)?;
        }
        Ok(())
    }
}

/// Owner, mode and attributes.
fn dress(node: &Node, path: &Path) -> io::Result<()> {
    if (node.uid, node.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    if !matches!(node.kind, Kind::Symlink(_)) {
        fs::set_permissions(path, fs::Permissions::from_mode(node.mode))?;
    }
    for (name, value) in &node.xattrs {
        rustix::fs::lsetxattr(path, std::ffi::OsStr::from_bytes(name), value, XattrFlags::empty())?;
    }
    Ok(())
}

fn write(file: &mut Vec<u8>, start: usize, bytes: &[u8], keeps: &mut impl FnMut(()) -> bool) {
    // The length may be on disk without the data.
    let end = start + bytes.len();
    if keeps(()) && file.len() < end {
        file.resize(end, 0);
    }
    let mut at = start;
    while at < end {
        let next = ((at / SECTOR + 1) * SECTOR).min(end);
        if keeps(()) {
            if file.len() < next {
                file.resize(next, 0);
            }
            file[at..next].copy_from_slice(&bytes[at - start..next - start]);
        }
        at = next;
    }
}

/// All that is in a real directory, by path: kind, content's digest, mode, owner, extended attributes. No times.
///
/// # Errors
/// Those of reading it.
pub fn describe(dir: &Path) -> io::Result<BTreeMap<PathBuf, String>> {
    let mut found = describe_below(dir)?;
    found.remove(Path::new(""));
    Ok(found)
}

/// As [`describe`], with the directory itself as the empty path.
///
/// # Errors
/// Those of reading it.
pub fn describe_below(dir: &Path) -> io::Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(relative) = left.pop() {
        let path = dir.join(&relative);
        let meta = path.symlink_metadata()?;
        let kind = meta.file_type();
        let kind = if kind.is_file() {
            Kind::File(fs::read(&path)?)
        } else if kind.is_symlink() {
            Kind::Symlink(fs::read_link(&path)?.into_os_string().into_vec())
        } else if kind.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(relative.join(entry?.file_name()));
            }
            Kind::Dir(BTreeMap::new())
        } else {
            debug_assert!(kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device());
            Kind::Special(meta.mode() & 0o170_000, rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))
        };
        let node = Node { kind, mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid(), xattrs: xattrs(&path)? };
        found.insert(relative, node.describe());
    }
    Ok(found)
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; XATTR_BYTES_MAX];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Err(rustix::io::Errno::NOTSUP) => return Ok(BTreeMap::new()),
        length => length?,
    };
    names.truncate(length);
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; XATTR_BYTES_MAX];
        let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), value.as_mut_slice())?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
