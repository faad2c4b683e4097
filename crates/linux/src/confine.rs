//! The confinement of a pause process: it needs nothing of the host.

use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::namespace::{self, Kind};
use crate::{Result, mount, process};

/// Leaves this process (which must be alone and about to exec a descriptor) an empty root, read-only. `workdir` is an empty
/// directory to build on; nothing stays there.
///
/// # Errors
/// The kernel's answer to the step that failed.
pub fn empty_root(workdir: &Path) -> std::io::Result<()> {
    namespace::unshare(&[Kind::Mount])?;
    mount::set_propagation(Path::new("/"), mount::flags::MS_PRIVATE | mount::flags::MS_REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", workdir, "tmpfs", flags, c"size=4k,mode=555,nr_inodes=2")?;
    rustix::process::chdir(workdir)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Takes every privilege from this process for good: user and group 65535, no capabilities (leaving root's user id clears all sets), no new
/// privileges.
///
/// # Errors
/// The kernel's answer to the step that failed.
pub fn drop_privileges() -> Result<()> {
    const NOBODY: u32 = 65535;
    process::set_ids(NOBODY, NOBODY, &[])?;
    process::set_no_new_privileges()
}
