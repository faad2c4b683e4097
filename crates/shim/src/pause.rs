//! Process 1 of a PID namespace that a pod shares: it reaps, and does nothing else.
//!
//! It runs our own static executable, as nobody and without capabilities, in a mount namespace whose read-only root is
//! empty, and executes the shim's protected file (`linux::exe`): its `/proc/1/root` and `/proc/1/exe` are no way out for
//! whoever may trace it.

use std::os::fd::AsFd;
use std::path::Path;

use linux::child::{self, Fork};
use linux::event::SignalFd;
use linux::namespace::{self, Kind};

use crate::disk;
use crate::sandbox::PAUSE_PID;

/// The directory in the sandbox' bundle on which its root is built.
pub(crate) const WORKDIR: &str = "pause";

/// In a child of the shim: starts the pause process, which becomes the shim's child, and writes its pid.
pub(crate) fn make(bundle: &Path) -> Result<(), String> {
    let said = |what: &str, error: std::io::Error| format!("failed to start the pause process: {what}: {error}");
    namespace::unshare(&[Kind::Pid]).map_err(|error| said("making the PID namespace", error.into()))?;
    let (reader, writer) = linux::pipes::pipe().map_err(|error| said("making a pipe", error))?;
    match child::fork().map_err(|error| said("fork", error))? {
        Fork::Child => {
            let error = become_pause(bundle);
            let _ = linux::pipes::write(&writer, error.as_bytes());
            child::exit_now(1)
        }
        Fork::Parent(pid) => {
            drop(writer);
            linux::pipes::set_nonblocking(&reader, false).map_err(|error| said("setting up a pipe", error))?;
            // The end comes when exec has closed the child's side.
            let mut text = [0u8; 512];
            match linux::pipes::read(&reader, &mut text) {
                Ok(0) => {}
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(text.get(..bytes).unwrap_or_default()).into_owned();
                    return Err(format!("failed to start the pause process: {text}"));
                }
                Err(error) => return Err(said("reading a pipe", error)),
            }
            let path = bundle.join(PAUSE_PID);
            disk::replace(&path, pid.to_string().as_bytes()).map_err(|error| said(&format!("writing {}", path.display()), error))
        }
    }
}

/// Becomes the pause process; answers only why it could not.
fn become_pause(bundle: &Path) -> String {
    let workdir = bundle.join(WORKDIR);
    let steps = || -> std::io::Result<std::fs::File> {
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        for number in 0..3 {
            child::dup_to(null.as_fd(), number)?;
        }
        linux::process::setsid()?;
        let executable = std::fs::File::open("/proc/self/exe")?;
        std::fs::create_dir_all(&workdir)?;
        linux::confine::empty_root(&workdir)?;
        linux::confine::drop_privileges()?;
        Ok(executable)
    };
    let executable = match steps() {
        Ok(executable) => executable,
        Err(error) => return format!("confining it: {error}"),
    };
    let strings = |words: &[&str]| linux::process::ExecStrings::new(words.iter().copied());
    let (args, env) = match (strings(&["/pause", "pause"]), strings(&[])) {
        (Ok(args), Ok(env)) => (args, env),
        (Err(error), _) | (_, Err(error)) => return format!("exec: {error}"),
    };
    let error = linux::process::exec_fd(executable.as_fd(), &args, &env);
    format!("exec: {error} (the shim must be a static executable)")
}

/// The pause process: reaps until it is told to end.
#[must_use]
pub fn run() -> u8 {
    let _ = linux::process::set_name("pause");
    let Ok(signals) = SignalFd::new(&[17, 15, 2]) else { return 1 };
    let Ok(epoll) = linux::event::Epoll::new() else { return 1 };
    if epoll.add(&signals, 0, linux::event::Interest::READ).is_err() {
        return 1;
    }
    let mut ready = Vec::new();
    loop {
        ready.clear();
        if epoll.wait(None, &mut ready).is_err() {
            return 1;
        }
        while let Ok(Some(signal)) = signals.read() {
            if signal != 17 {
                return 0;
            }
        }
        while let Ok(Some(ended)) = child::ended_child(None) {
            let _ = child::reap(ended.pid);
        }
    }
}
