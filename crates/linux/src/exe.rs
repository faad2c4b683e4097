//! Keeping the running executable out of the reach of containers.
//!
//! A process that enters a container shows it its own executable as `/proc/PID/exe`; a container whose entry point is
//! `/proc/self/exe` can so get hold of the host's file, and write it as soon as nobody executes it (CVE-2019-5736).
//! The answer here is not a copy in memory, whose pages no two processes would share: the program executes itself again
//! through a detached, read-only mount of its own file. What the container gets hold of is a file on that mount, which
//! is in no mount namespace and so can be made writable by nobody; pages stay shared by all on the node.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::process::{ExecStrings, exec_fd};
use crate::{Error, Result, mount};

/// Whether this process executes a protected file: one on a detached mount (whose path is "/"), or a sealed memfd.
pub fn is_protected() -> bool {
    let Ok(link) = std::fs::read_link("/proc/self/exe") else { return false };
    if link == Path::new("/") {
        return true;
    }
    let Ok(file) = std::fs::File::open("/proc/self/exe") else { return false };
    // SAFETY: only integers are passed.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_WRITE != 0
}

/// The variable by which [`protect`] tells the program that it becomes where its file is.
const PATH_VARIABLE: &str = "CORACLE_EXECUTABLE";

/// Where this program's file is: `/proc/self/exe`, or, once protected, what that was before.
///
/// # Errors
/// When it is not known.
pub fn path() -> Result<std::path::PathBuf> {
    let fail = |e| Error::new("find executable", "/proc/self/exe", e);
    let link = std::fs::read_link("/proc/self/exe").map_err(fail)?;
    if link != Path::new("/") {
        return Ok(link);
    }
    let known = std::env::var_os(PATH_VARIABLE).map(std::path::PathBuf::from);
    known.ok_or_else(|| fail(std::io::Error::from_raw_os_error(libc::ENOENT)))
}

/// Executes this program again, from its protected file and with the same arguments and environment, unless it is
/// protected already. To be called first thing in `main`; afterwards `/proc/self/exe` still opens, but the path that
/// it shows is "/", and [`path`] is to be asked.
///
/// # Errors
/// When the mount cannot be made (it takes CAP_SYS_ADMIN and Linux 5.12) or the execution fails.
pub fn protect() -> Result<()> {
    if is_protected() {
        return Ok(());
    }
    let own = path()?;
    let tree = mount::clone_tree(None, Path::new("/proc/self/exe"), false)?;
    let change = mount::AttributeChange { set: mount::attr::RDONLY, ..Default::default() };
    mount::set_attributes(tree.as_fd(), change, false)?;
    let text = |s: std::ffi::OsString| s.into_string().map_err(|s| Error::invalid("exec", s.to_string_lossy(), "an argument is not UTF-8"));
    let args = std::env::args_os().map(text).collect::<Result<Vec<_>>>()?;
    let env = std::env::vars_os()
        .filter(|(key, _)| key != PATH_VARIABLE)
        .chain([(PATH_VARIABLE.into(), own.into_os_string())])
        .map(|(k, v)| Ok(format!("{}={}", text(k)?, text(v)?)))
        .collect::<Result<Vec<_>>>()?;
    let args = ExecStrings::new(args.iter().map(String::as_str))?;
    let env = ExecStrings::new(env.iter().map(String::as_str))?;
    Err(exec_fd(tree.as_fd(), &args, &env))
}
