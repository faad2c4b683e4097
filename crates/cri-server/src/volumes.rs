//! The volumes that an image declares: directories of the container's own beside its writable layer, with what the image has at that place.
//!
//! Source: containerd v2.4.2, `internal/cri/server/container_create.go` (volumeMounts), `internal/cri/opts/container.go` (WithVolumes).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use protocols::cri::v1::Mount as CriMount;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, XattrFlags};

use crate::error::{Error, Result};
use crate::spec::mounts::clean;

/// An extended attribute may be this long (limits.h, XATTR_SIZE_MAX).
const XATTR_BYTES_MAX: usize = 65536;
/// Directories may be nested this deep.
const DEPTH_MAX: usize = 512;

/// Where in the container a volume is made: what the image declares and the request does not mount itself. Pure.
pub fn wanted(declared: &[String], requested: &[CriMount]) -> Vec<String> {
    let mut places: Vec<String> = declared.iter().map(|place| clean(place)).filter(|place| place != "/").collect();
    places.sort();
    places.dedup();
    places.retain(|place| !requested.iter().any(|mount| clean(&mount.container_path) == *place));
    places
}

/// The mount of a volume as a request would have it. Pure.
pub fn mount(place: &str, source: &str) -> CriMount {
    CriMount { container_path: place.to_owned(), host_path: source.to_owned(), ..CriMount::default() }
}

/// Copies what the image has at `place` into the empty directory `to`; where it has no directory there, `to` stays empty.
///
/// # Errors
/// [`Error::Kernel`], [`Error::Io`] with the volume's path.
pub fn fill(root: &OwnedFd, place: &str, to: &Path) -> Result<()> {
    let flags = (OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC).bits();
    let relative = Path::new(place.trim_start_matches('/'));
    let from = match linux::fs::open_in_root(root.as_fd(), relative, flags as i32) {
        Ok(from) => from,
        Err(error) if matches!(error.source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        Err(source) => return Err(Error::Kernel { act: format!("open the image's {place}"), source }),
    };
    let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copied =
        rustix::fs::open(to, directory, Mode::empty()).map_err(io::Error::from).and_then(|into| copy_directory(&from, &into, DEPTH_MAX));
    copied.map_err(Error::io("copy the image's volume to", to.to_string_lossy().into_owned()))
}

fn copy_directory(from: &OwnedFd, into: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other(format!("directories are nested deeper than {DEPTH_MAX}")));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = |dir: &OwnedFd, flags: OFlags| {
            rustix::fs::openat(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(into, name, Mode::RWXU)?;
                let directory = OFlags::RDONLY | OFlags::DIRECTORY;
                copy_directory(&open(from, directory)?, &open(into, directory)?, depth - 1)?;
            }
            FileType::RegularFile => {
                let source = open(from, OFlags::RDONLY)?;
                let target = open(into, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
                let (mut source, mut target) = (File::from(source), File::from(target));
                io::copy(&mut source, &mut target)?;
                look_alike(&OwnedFd::from(source), &OwnedFd::from(target), &stat)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, into, name)?;
                own(into, name, &stat)?;
            }
            kind => {
                rustix::fs::mknodat(into, name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
                own(into, name, &stat)?;
            }
        }
    }
    look_alike(from, into, &rustix::fs::fstat(from)?)
}

fn own(dir: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    Ok(rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Owner, then mode and attributes, for a change of the owner takes set-id bits and file capabilities away.
fn look_alike(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> io::Result<()> {
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    let mut names = vec![0_u8; XATTR_BYTES_MAX];
    let length = match rustix::fs::flistxattr(from, names.as_mut_slice()) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    names.truncate(length);
    let mut value = vec![0_u8; XATTR_BYTES_MAX];
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = rustix::fs::fgetxattr(from, name, value.as_mut_slice())?;
        let value = value.get(..length).unwrap_or_default();
        rustix::fs::fsetxattr(to, name, value, XattrFlags::empty())?;
    }
    Ok(())
}

/// Makes the directory of a volume.
///
/// # Errors
/// [`Error::Io`].
pub fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("make directory", path.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_mount_of_the_request_takes_the_place_of_the_volume() {
        let declared = ["/data/".to_owned(), "cache".to_owned(), "/data".to_owned(), "/".to_owned(), "/own".to_owned()];
        let requested = [mount("/own/", "/host")];
        assert_eq!(wanted(&declared, &requested), ["/cache", "/data"]);
    }

    #[test]
    fn a_volume_has_what_the_image_has() {
        let dir = tempfile::tempdir().expect("a directory");
        let (image, volume) = (dir.path().join("image"), dir.path().join("volume"));
        fs::create_dir_all(image.join("data/sub")).expect("made");
        fs::create_dir(&volume).expect("made");
        fs::write(image.join("data/sub/file"), "text").expect("written");
        std::os::unix::fs::symlink("/etc/shadow", image.join("data/link")).expect("linked");
        // The image's own link leads within the image.
        std::os::unix::fs::symlink("/data", image.join("alias")).expect("linked");
        fs::set_permissions(image.join("data"), fs::Permissions::from_mode(0o1777)).expect("set");
        fs::set_permissions(image.join("data/sub/file"), fs::Permissions::from_mode(0o4711)).expect("set");
        let root = linux::fs::open_directory(&image).expect("opened");
        fill(&root, "/alias", &volume).expect("filled");
        assert_eq!(fs::read_to_string(volume.join("sub/file")).expect("read"), "text");
        assert_eq!(fs::metadata(volume.join("sub/file")).expect("there").mode() & 0o7777, 0o4711);
        assert_eq!(fs::metadata(&volume).expect("there").mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_link(volume.join("link")).expect("a link"), Path::new("/etc/shadow"));
        let empty = dir.path().join("empty");
        make_directory(&empty).expect("made");
        fill(&root, "/nowhere", &empty).expect("nothing to copy");
        assert_eq!(fs::read_dir(&empty).expect("listed").count(), 0);
    }
}
