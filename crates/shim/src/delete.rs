//! The `delete` command: what is left of a container or sandbox when its shim is gone, or has done its work.

use std::io::Write;
use std::path::{Path, PathBuf};

use linux::mount;
use prost::Message;
use protocols::shim::options::runc::Options;
use protocols::shim::task::v3::{ConnectRequest, DeleteResponse};
use protocols::ttrpc::{self, FrameType, Request};

use crate::args::Args;
use crate::disk::{self, ExitRecord, Task};
use crate::process::Exit;
use crate::runtime::Runtime;
use crate::sandbox::{PAUSE_PID, PINS, RECORD, Record};

/// How long a shim may take to answer whether it lives.
const ANSWER_TIME: std::time::Duration = std::time::Duration::from_secs(1);

/// Runs `delete`: kills and removes what there is, and prints how the first process ended (137 if nobody knows).
///
/// # Errors
/// What could not be removed; containerd shows it. Nothing to remove is no error.
pub fn run(args: &Args) -> Result<(), String> {
    let bundle = if args.bundle.is_empty() {
        std::env::current_dir().map_err(|error| format!("failed to find the bundle: {error}"))?
    } else {
        PathBuf::from(&args.bundle)
    };
    let task: Option<Task> = disk::read(&bundle.join("task.json")).unwrap_or_default();
    let record: Option<Record> = disk::read(&bundle.join(RECORD)).unwrap_or_default();
    let mut errors = Vec::new();
    let sockets = [task.as_ref().map(|task| &task.socket), record.as_ref().map(|record| &record.socket)];
    for socket in sockets.into_iter().flatten() {
        remove_dead_socket(socket);
    }
    if let Some(record) = &record {
        remove_sandbox(&bundle, record, &mut errors);
    } else if bundle.join("config.json").exists() {
        remove_container(args, &bundle, task.as_ref(), &mut errors);
    } else if bundle.join(PINS).exists() {
        // A sandbox whose record could not be written, or was not yet.
        errors.extend(crate::sandbox::take_down(&bundle).err());
    }
    let exit: Option<ExitRecord> = disk::read(&bundle.join("exit.json")).unwrap_or_default();
    let exit_of = exit.map_or_else(|| Exit::now(137), |record| record.exit);
    let pid = task.map_or(0, |task| task.init.pid);
    let response = DeleteResponse { pid, exit_status: exit_of.status, exited_at: Some(exit_of.at()) };
    std::io::stdout().write_all(&response.encode_to_vec()).map_err(|error| format!("failed to print the answer: {error}"))?;
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}

fn remove_container(args: &Args, bundle: &Path, task: Option<&Task>, errors: &mut Vec<String>) {
    let default = || Runtime::new(&Options::default(), &args.namespace);
    let runtime = task.map_or_else(default, |task| task.runtime.clone());
    let line = runtime.line(bundle, &["delete", "--force", &args.id]);
    // stdout is for the answer alone: the runtime runs with it turned to stderr.
    match run_aside(line) {
        Ok(0) => {}
        Ok(code) => errors.push(format!("the runtime's delete of {} ended with {code}", args.id)),
        Err(error) => errors.push(format!("failed to run the runtime's delete of {}: {error}", args.id)),
    }
    let rootfs = bundle.join("rootfs");
    if let Err(error) = mount::unmount_all(&rootfs, true).map_err(std::io::Error::from) {
        errors.push(format!("failed to unmount {}: {error}", rootfs.display()));
    }
}

/// A killed shim's socket is of no use to anybody; one that is answered is left alone.
fn remove_dead_socket(socket: &Path) {
    if socket.exists() && !is_answered(socket) {
        let _ = std::fs::remove_file(socket);
    }
}

/// Whether a shim answers there. That it can be connected to says little: a shim's connections may be closed a moment
/// before its listener is.
fn is_answered(socket: &Path) -> bool {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    let call = ConnectRequest { id: String::new() };
    let request = Request::unary(protocols::shim::task::v3::SERVICE, "Connect", &call);
    let mut frame = Vec::new();
    if ttrpc::encode_frame(&mut frame, FrameType::Request, 1, &request).is_err() {
        return true;
    }
    let answer = UnixStream::connect(socket).and_then(|mut stream| {
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.write_all(&frame)?;
        stream.read_exact(&mut [0; 1])
    });
    match answer {
        Ok(()) => true,
        // In doubt it lives: a stopped one is not dead.
        Err(error) => matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
    }
}

fn run_aside(line: crate::runtime::Line) -> std::io::Result<u32> {
    use linux::child::{Fork, dup_to, exit_now, fork, wait_for};
    match fork()? {
        Fork::Child => {
            let aside = dup_to(std::os::fd::AsFd::as_fd(&std::io::stderr()), 1);
            exit_now(if aside.is_ok() { line.run() } else { 1 })
        }
        Fork::Parent(pid) => wait_for(pid).map(|exited| exited.status),
    }
}

fn remove_sandbox(bundle: &Path, record: &Record, errors: &mut Vec<String>) {
    let pid = disk::read_pid(&bundle.join(PAUSE_PID)).unwrap_or(record.pause);
    // A later process of the same number is left alone.
    if pid != 0 && record.pause_start_time != 0 && disk::start_time(pid) == record.pause_start_time {
        let _ = linux::child::send_signal(pid, 9);
    }
    errors.extend(crate::sandbox::take_down(bundle).err());
}
