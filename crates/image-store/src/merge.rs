//! A layer that writes through a link of the layers below: "lib/x" where "lib" is a link to "usr/lib".
//!
//! The archive does not tell: it names "lib/x" and no "lib". Unpacked by itself it has a directory that would hide the link, and with it all of
//! "usr/lib". So when the layers below are known, such directories are moved to where the link leads: what an unpacker
//! sees that works on top of the mounted layers below. (containerd does so but for overlayfs, where it writes into the upper directory alone.)

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::unpack::{Unpacked, split};

const LINKS_MAX: usize = 40;
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// What the layers below have at a path.
enum Below {
    Nothing,
    Dir,
    Link(Vec<u8>),
    Other,
}

/// Moves the implicit directories of the layer at `root` that a link of `lower` (top first) stands for. Corrects `done`'s paths.
pub(crate) fn follow_links(root: &OwnedFd, done: &mut Unpacked, lower: &[OwnedFd]) -> io::Result<()> {
    let mut next = 0;
    // Parents stand before their children; what is appended on the way is looked at as well.
    while next < done.implicit.len() {
        let path = done.implicit[next].clone();
        next += 1;
        if path.is_empty() || !matches!(look(lower, &path)?, Below::Link(_)) {
            continue;
        }
        let target = resolve(lower, &path)?;
        if target == path || target.is_empty() || inside(&target, &path) {
            continue;
        }
        make_path(root, &target, done)?;
        move_into(root, &path, &target)?;
        done.implicit.retain(|p| *p != path);
        next -= 1;
        let moved = |p: &mut Vec<u8>| {
            if inside(p, &path) {
                *p = [&target, &p[path.len()..]].concat();
            }
        };
        done.implicit.iter_mut().for_each(moved);
        done.links_below.iter_mut().map(|(p, _)| p).for_each(moved);
    }
    Ok(())
}

fn inside(path: &[u8], dir: &[u8]) -> bool {
    path.starts_with(dir) && path.get(dir.len()) == Some(&b'/')
}

fn open(dir: &OwnedFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    openat2(dir, OsStr::from_bytes(path), flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), BENEATH)
}

/// The topmost layer's word about a path counts; a whiteout says that there is nothing.
fn look(lower: &[OwnedFd], path: &[u8]) -> io::Result<Below> {
    for layer in lower {
        let fd = match open(layer, path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(e) => return Err(e.into()),
        };
        let stat = rustix::fs::fstat(&fd)?;
        return Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Below::Dir,
            FileType::Symlink => Below::Link(rustix::fs::readlinkat(&fd, "", Vec::new())?.into_bytes()),
            FileType::CharacterDevice if stat.st_rdev == 0 => Below::Nothing,
            _ => Below::Other,
        });
    }
    Ok(Below::Nothing)
}

/// The path without links, as the layers below have them; ".." ends at their root.
fn resolve(lower: &[OwnedFd], path: &[u8]) -> io::Result<Vec<u8>> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> { path.split(|b| *b == b'/').rev().map(<[u8]>::to_vec).collect() };
    let mut left = parts(path);
    let mut done: Vec<u8> = Vec::new();
    let mut links = 0;
    while let Some(part) = left.pop() {
        match part.as_slice() {
            b"" | b"." => continue,
            b".." => {
                done = split(&done).0.to_vec();
                continue;
            }
            _ => {}
        }
        let here = if done.is_empty() { part } else { [&done, &b"/"[..], &part].concat() };
        match look(lower, &here)? {
            Below::Link(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP.into());
                }
                if target.first() == Some(&b'/') {
                    done.clear();
                }
                left.extend(parts(&target));
            }
            _ => done = here,
        }
    }
    Ok(done)
}

/// Makes the directories of `path` that the layer does not have; they are implicit, too.
fn make_path(root: &OwnedFd, path: &[u8], done: &mut Unpacked) -> io::Result<()> {
    for end in (1..=path.len()).filter(|end| *end == path.len() || path[*end] == b'/') {
        match rustix::fs::mkdirat(root, OsStr::from_bytes(&path[..end]), Mode::from(0o755)) {
            Ok(()) => done.implicit.push(path[..end].to_vec()),
            // Opening it below tells whether it is a directory.
            Err(Errno::EXIST) => drop(open(root, &path[..end], OFlags::PATH | OFlags::DIRECTORY)?),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Moves what is in `from` into `to`: directories that both have are merged, anything else is replaced; then removes `from`.
fn move_into(root: &OwnedFd, from: &[u8], to: &[u8]) -> io::Result<()> {
    let source = open(root, from, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let target = open(root, to, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let names: Result<Vec<_>, _> = Dir::read_from(&source)?.map(|entry| entry.map(|e| e.file_name().to_owned())).collect();
    for name in names?.iter().filter(|name| name.as_bytes() != b"." && name.as_bytes() != b"..") {
        match rustix::fs::renameat(&source, name.as_c_str(), &target, name.as_c_str()) {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                move_into(root, &[from, b"/", name.as_bytes()].concat(), &[to, b"/", name.as_bytes()].concat())?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    let (above, name) = split(from);
    let above = open(root, above, OFlags::PATH | OFlags::DIRECTORY)?;
    Ok(rustix::fs::unlinkat(&above, OsStr::from_bytes(name), AtFlags::REMOVEDIR)?)
}
