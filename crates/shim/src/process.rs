//! Containers and their processes as the shim knows them.
//!
//! ```text
//! Creating --create done--> Created --start done--> Running <--pause, resume--> Paused
//!     |                        |                       |                          |
//!   failed: gone               `-----------------------+----- exit --> Stopped <--'  -- Delete --> gone
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use protocols::shim::GO_ZERO_TIME_SECONDS;
use protocols::shim::task::Status;
use protocols::ttrpc::{RpcError, code};
use serde::{Deserialize, Serialize};

use crate::runtime::Runtime;
use crate::server::Reply;
use crate::stream::{LogId, StreamId};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal; 255 if nobody saw it.
    pub status: u32,
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: i32,
}

impl Exit {
    /// An exit at this moment.
    #[must_use]
    pub fn now(status: u32) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            status,
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        }
    }

    /// When.
    #[must_use]
    pub fn at(&self) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds: self.seconds, nanos: self.nanos }
    }
}

/// Go's zero time, which stands for "not yet".
#[must_use]
pub fn never() -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: GO_ZERO_TIME_SECONDS, nanos: 0 }
}

/// The time now.
#[must_use]
pub fn timestamp() -> prost_types::Timestamp {
    Exit::now(0).at()
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The runtime is making it, or (an exec) it has not been started.
    Creating,
    /// Made, its program not yet executed.
    Created,
    /// Its program runs.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped(Exit),
}

impl State {
    /// The wire's word for it.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::Creating | Self::Created => Status::Created,
            Self::Running => Status::Running,
            Self::Paused => Status::Paused,
            Self::Stopped(_) => Status::Stopped,
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            _ => None,
        }
    }
}

/// The streams that a client asked for, as it named them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// A terminal instead of three streams.
    pub terminal: bool,
    /// A FIFO's path, or empty.
    pub stdin: String,
    /// As [`Sink::parse`] reads it.
    pub stdout: String,
    /// As [`Sink::parse`] reads it; unused with a terminal.
    pub stderr: String,
}

/// Where output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Nowhere.
    None,
    /// A log file in CRI's format, written by the shim.
    Log(PathBuf),
    /// A client's FIFO.
    Fifo(PathBuf),
    /// A file, appended to as it comes.
    File(PathBuf),
}

impl Sink {
    /// Reads a stream's name: empty, `cri-log:///PATH`, `file:///PATH`, or a path.
    ///
    /// # Errors
    /// `Unimplemented` for other schemes (`binary://`, `vsock://`), `InvalidArgument` for a relative path.
    pub fn parse(text: &str) -> Result<Self, RpcError> {
        if text.is_empty() {
            return Ok(Self::None);
        }
        let (kind, path): (fn(PathBuf) -> Self, &str) = match text.split_once("://") {
            None => (Self::Fifo, text),
            Some(("cri-log", path)) => (Self::Log, path),
            Some(("file", path)) => (Self::File, path),
            Some(("fifo", path)) => (Self::Fifo, path),
            Some((scheme, _)) => {
                let text = format!("stdio scheme {scheme:?} is not implemented: use a FIFO, file:// or cri-log://");
                return Err(RpcError::new(code::UNIMPLEMENTED, text));
            }
        };
        if !path.starts_with('/') {
            return Err(RpcError::new(code::INVALID_ARGUMENT, format!("stdio path {text:?} is not absolute")));
        }
        Ok(kind(PathBuf::from(path)))
    }
}

/// A container's first process, or one that was put into it.
#[derive(Debug)]
pub struct Process {
    /// The exec's id; empty: the container's first process.
    pub exec_id: String,
    /// The streams as they were asked for.
    pub stdio: Stdio,
    /// Where it is in its life.
    pub state: State,
    /// Its pid; 0: none yet.
    pub pid: u32,
    /// An exec's OCI process, until it is started.
    pub spec: Vec<u8>,
    /// The output streams that still flow.
    pub outputs: Vec<StreamId>,
    /// The copy of the client's stdin.
    pub input: Option<StreamId>,
    /// Copies of attached clients' input.
    pub attached_inputs: Vec<StreamId>,
    /// The writing end of the container's stdin, for readers that attach.
    pub stdin: Option<OwnedFd>,
    /// Ends that are held until the container's side has its own.
    pub guards: Vec<OwnedFd>,
    /// Where the runtime brings the terminal's master.
    pub console: Option<Console>,
    /// The terminal's master.
    pub master: Option<OwnedFd>,
    /// Who waits for the exit.
    pub waiters: Vec<Reply>,
    /// The exit, seen before the start was reported.
    pub early_exit: Option<Exit>,
    /// A command of the runtime on this process is under way.
    pub starting: bool,
}

impl Process {
    /// A process that is not there yet.
    #[must_use]
    pub fn new(exec_id: &str, stdio: Stdio, spec: Vec<u8>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            state: State::Creating,
            pid: 0,
            spec,
            outputs: Vec::new(),
            input: None,
            attached_inputs: Vec::new(),
            stdin: None,
            guards: Vec::new(),
            console: None,
            master: None,
            waiters: Vec::new(),
            early_exit: None,
            starting: false,
        }
    }

    /// The file name of something of this process in the bundle: `stdout`, or `EXEC.stdout`.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        if self.exec_id.is_empty() { name.to_owned() } else { format!("{}.{name}", self.exec_id) }
    }
}

/// A socket on which the runtime brings a terminal's master; its file goes with it.
#[derive(Debug)]
pub struct Console {
    /// The socket.
    pub listener: std::os::unix::net::UnixListener,
    /// Its file.
    pub path: PathBuf,
}

impl Drop for Console {
    fn drop(&mut self) {
        // It may be gone already; it is of no use to anybody.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What waits for a container's turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Start its program.
    Start,
    /// Signal the first process, or all.
    Kill {
        /// The signal's number.
        signal: u32,
        /// To every process of the container.
        all: bool,
    },
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Change limits; the value is OCI resources as JSON.
    Update(Vec<u8>),
    /// Remove.
    Delete,
}

/// Operations that may wait for one container.
pub const OPERATIONS_MAX: usize = 64;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What runs it.
    pub runtime: Runtime,
    /// Its first process.
    pub init: Process,
    /// The others, by exec id.
    pub execs: BTreeMap<String, Process>,
    /// A command of the runtime on the container is under way.
    pub busy: bool,
    /// What waits for it.
    pub queue: VecDeque<(Reply, Operation)>,
    /// It has a PID namespace of its own, so the kernel ends all with the first.
    pub own_pid_namespace: bool,
    /// The log that its output goes to.
    pub log: Option<LogId>,
    /// Its cgroups, by `/proc/PID/cgroup` of its first process.
    pub cgroups: Vec<(String, PathBuf)>,
    /// The out-of-memory watch.
    pub oom: Option<crate::stats::OomWatch>,
    /// Its first process has ended, and the runtime is killing the others.
    pub killing_all: bool,
    /// The shim has mounted its rootfs.
    pub mounted: bool,
    /// The first process' exit, held until all is reported that comes before.
    pub held_exit: Option<Exit>,
}

impl Container {
    /// One of its processes.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec_id: &str) -> Result<&Process, RpcError> {
        if exec_id.is_empty() {
            return Ok(&self.init);
        }
        self.execs.get(exec_id).ok_or_else(|| no_exec(&self.id, exec_id))
    }

    /// One of its processes, to change.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process_mut(&mut self, exec_id: &str) -> Result<&mut Process, RpcError> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec_id).ok_or_else(|| no_exec(&self.id, exec_id))
    }
}

fn no_exec(id: &str, exec_id: &str) -> RpcError {
    RpcError::new(code::NOT_FOUND, format!("process {exec_id} does not exist in container {id}: not found"))
}

/// Checks an id that becomes a part of file names.
///
/// # Errors
/// `InvalidArgument`.
pub fn check_id(what: &str, id: &str) -> Result<(), RpcError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if !id.is_empty() && id.len() <= 200 && id.bytes().all(good) && !id.starts_with(['.', '-']) {
        return Ok(());
    }
    let text = format!("{what} {id:?} is not made of letters, digits, '_', '.' and '-', or begins with '.' or '-'");
    Err(RpcError::new(code::INVALID_ARGUMENT, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks() {
        assert_eq!(Sink::parse(""), Ok(Sink::None));
        assert_eq!(Sink::parse("/a"), Ok(Sink::Fifo("/a".into())));
        assert_eq!(Sink::parse("file:///a"), Ok(Sink::File("/a".into())));
        assert_eq!(Sink::parse("cri-log:///a/0.log"), Ok(Sink::Log("/a/0.log".into())));
        assert_eq!(Sink::parse("binary:///a").expect_err("refused").code, code::UNIMPLEMENTED);
        assert_eq!(Sink::parse("cri-log://a").expect_err("refused").code, code::INVALID_ARGUMENT);
    }

    #[test]
    fn ids_are_file_names() {
        assert_eq!(check_id("id", "a-1_b.c"), Ok(()));
        for bad in ["", "..", "a/b", "-a", "a b", &"x".repeat(201)] {
            assert_eq!(check_id("id", bad).expect_err(bad).code, code::INVALID_ARGUMENT);
        }
    }
}
