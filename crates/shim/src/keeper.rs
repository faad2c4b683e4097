//! The node's keeper: subreaper of all shims, and holder of descriptors that are to outlive one.
//!
//! One per state directory (`STATE/keeper.sock`, guarded by a lock on `STATE/keeper.lock`). It does next to nothing, so that
//! it has no reason to end: it runs shims' `start`, keeps descriptors by name, and remembers how orphans ended. That it also writes
//! (`STATE/keeper.exits`), before it reaps them: should it be killed before their shim's successor has asked, the next keeper tells it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use linux::child;
use linux::event::{Epoll, Interest, Ready, SignalFd};
use linux::pipes;
use linux::rlimit::Limit;
use prost::Message;
use protocols::shim::coracle::{
    DropRequest, DropResponse, ExitRequest, ExitResponse, GetRequest, GetResponse, KEEPER_SERVICE, KeeperInfoResponse, ListRequest,
    ListResponse, PutRequest, PutResponse, StartShimRequest, StartShimResponse,
};
use protocols::ttrpc::{RpcError, code};
use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::disk;
use crate::keeping::KEEPER_ENV;
use crate::process::Exit;
use crate::server::{Call, Reply, Server};
use crate::task::read;

const KIND: u64 = 1 << 32;
const LISTENER: u64 = KIND;
const SIGNALS: u64 = 2 * KIND;
const CONNECTIONS: u64 = 3 * KIND;
const STARTS: u64 = 4 * KIND;

/// RLIMIT_NOFILE.
const NOFILE: u32 = 7;
/// Descriptors that are kept.
const DESCRIPTORS_MAX: usize = 8192;
/// Exits that are remembered; the oldest go first.
const EXITS_MAX: usize = 8192;
/// Their file in the state directory.
const EXITS: &str = "keeper.exits";
/// Shims that are being started.
const STARTS_MAX: usize = 256;
/// The most that `start` may be given on stdin, in bytes: what a pipe takes at once.
const STDIN_BYTES_MAX: usize = 60 * 1024;
/// The most that is kept of what `start` prints, in bytes.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug)]
struct Starting {
    reply: Reply,
    output: OwnedFd,
    text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Orphan {
    pid: u32,
    start_time: u64,
    exit: Exit,
}

#[derive(Debug)]
struct Keeper {
    epoll: Epoll,
    server: Server,
    signals: SignalFd,
    socket: PathBuf,
    kept: BTreeMap<String, OwnedFd>,
    orphans: VecDeque<Orphan>,
    exits: ExitsFile,
    starting: BTreeMap<u32, Starting>,
    /// The limit of open files that was inherited, and the keeper's own.
    files: Option<(Limit, Limit)>,
}

/// Runs the keeper until SIGTERM or SIGINT.
///
/// # Errors
/// The state directory cannot be used, or another keeper has it.
pub fn run(args: &Args) -> Result<(), String> {
    let state = std::path::absolute(&args.state).map_err(|error| format!("state directory {:?}: {error}", args.state))?;
    make_dir(&state).map_err(|error| format!("failed to make state directory {}: {error}", state.display()))?;
    let lock = state.join("keeper.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&lock);
    let file = file.map_err(|error| format!("failed to open {}: {error}", lock.display()))?;
    file.try_lock().map_err(|error| format!("another keeper serves {}: {error}", state.display()))?;
    // A session leader already is one.
    let _ = linux::process::setsid();
    let socket = state.join("keeper.sock");
    let exits = ExitsFile::open(&state).map_err(|error| format!("failed to open {}: {error}", state.join(EXITS).display()))?;
    let mut keeper = Keeper::new(&socket, exits).map_err(|error| format!("failed to serve on {}: {error}", socket.display()))?;
    let served = keeper.serve().map_err(|error| format!("the keeper's loop failed: {error}"));
    let _ = std::fs::remove_file(&socket);
    served
}

fn make_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

impl Keeper {
    fn new(socket: &Path, (exits, orphans): (ExitsFile, VecDeque<Orphan>)) -> io::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let epoll = Epoll::new()?;
        linux::process::set_child_subreaper(true)?;
        let signals = SignalFd::new(&[17, 15, 2])?;
        epoll.add(&signals, SIGNALS, Interest::READ)?;
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let server = Server::new(&epoll, listener, LISTENER, CONNECTIONS)?;
        Ok(Self {
            epoll,
            server,
            signals,
            socket: socket.to_owned(),
            kept: BTreeMap::new(),
            orphans,
            exits,
            starting: BTreeMap::new(),
            files: raise_files(),
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let (mut ready, mut calls) = (Vec::new(), Vec::new());
        loop {
            ready.clear();
            self.epoll.wait(None, &mut ready)?;
            for event in &ready {
                if !self.on_ready(*event, &mut calls) {
                    return Ok(());
                }
            }
            for call in calls.drain(..) {
                self.on_call(call);
            }
        }
    }

    /// `false`: the keeper was told to end.
    fn on_ready(&mut self, ready: Ready, calls: &mut Vec<Call>) -> bool {
        match ready.token & !(KIND - 1) {
            LISTENER | CONNECTIONS => self.server.on_ready(&self.epoll, ready, calls),
            SIGNALS => {
                while let Ok(Some(signal)) = self.signals.read() {
                    if signal != 17 {
                        return false;
                    }
                }
                self.reap();
            }
            STARTS => {
                let pid = u32::try_from(ready.token & (KIND - 1)).unwrap_or(0);
                if let Some(starting) = self.starting.get_mut(&pid) {
                    starting.read();
                }
            }
            _ => {}
        }
        true
    }

    fn on_call(&mut self, call: Call) {
        let reply = call.reply;
        match self.answer(call) {
            Ok(None) => {}
            Ok(Some((payload, descriptor))) => self.server.answer(reply, Ok(payload), descriptor),
            Err(error) => self.server.answer(reply, Err(error), None),
        }
    }

    #[allow(clippy::type_complexity)]
    fn answer(&mut self, call: Call) -> Result<Option<(Vec<u8>, Option<OwnedFd>)>, RpcError> {
        let request = call.request;
        if request.service != KEEPER_SERVICE {
            let text = format!("service {} is not implemented", request.service);
            return Err(RpcError::new(code::UNIMPLEMENTED, text));
        }
        let payload = request.payload.as_slice();
        let message = match request.method.as_str() {
            "Info" => KeeperInfoResponse { version: env!("CARGO_PKG_VERSION").to_owned(), pid: std::process::id() }.encode_to_vec(),
            "StartShim" => {
                self.start(read(payload)?, call.reply)?;
                return Ok(None);
            }
            "Put" => self.put(read(payload)?, call.descriptor)?.encode_to_vec(),
            "Get" => {
                let request: GetRequest = read(payload)?;
                let found = self.kept.get(&request.name).map(OwnedFd::try_clone).transpose();
                let found =
                    found.map_err(|error| RpcError::new(code::RESOURCE_EXHAUSTED, format!("failed to copy {}: {error}", request.name)))?;
                let Some(descriptor) = found else {
                    return Err(RpcError::new(code::NOT_FOUND, format!("nothing is kept as {}", request.name)));
                };
                return Ok(Some((GetResponse {}.encode_to_vec(), Some(descriptor))));
            }
            "List" => {
                let prefix = read::<ListRequest>(payload)?.prefix;
                let names = self.kept.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
                ListResponse { names }.encode_to_vec()
            }
            "Drop" => {
                let request: DropRequest = read(payload)?;
                self.kept.retain(|name, _| *name != request.name && !(request.prefix && name.starts_with(&request.name)));
                DropResponse {}.encode_to_vec()
            }
            "Exit" => self.exit_of(&read(payload)?)?.encode_to_vec(),
            method => {
                let text = format!("method {method} of the keeper is not implemented");
                return Err(RpcError::new(code::UNIMPLEMENTED, text));
            }
        };
        Ok(Some((message, None)))
    }

    fn put(&mut self, request: PutRequest, descriptor: Option<OwnedFd>) -> Result<PutResponse, RpcError> {
        let Some(descriptor) = descriptor else {
            let text = format!("no descriptor came with Put of {:?}", request.name);
            return Err(RpcError::new(code::INVALID_ARGUMENT, text));
        };
        if self.kept.len() >= DESCRIPTORS_MAX && !self.kept.contains_key(&request.name) {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{DESCRIPTORS_MAX} descriptors are kept")));
        }
        self.kept.insert(request.name, descriptor);
        Ok(PutResponse {})
    }

    fn exit_of(&mut self, request: &ExitRequest) -> Result<ExitResponse, RpcError> {
        // The caller may have heard of the exit before this loop has.
        self.reap();
        let found = self
            .orphans
            .iter()
            .rev()
            .find(|orphan| orphan.pid == request.pid && (request.start_time == 0 || orphan.start_time == request.start_time));
        match found {
            Some(orphan) => Ok(ExitResponse { exit_status: orphan.exit.status, exited_at: Some(orphan.exit.at()) }),
            None => Err(RpcError::new(code::NOT_FOUND, format!("no exit of process {} was seen", request.pid))),
        }
    }

    fn start(&mut self, request: StartShimRequest, reply: Reply) -> Result<(), RpcError> {
        if request.stdin.len() > STDIN_BYTES_MAX {
            let text = format!("stdin of {} bytes is longer than {STDIN_BYTES_MAX}", request.stdin.len());
            return Err(RpcError::new(code::INVALID_ARGUMENT, text));
        }
        if self.starting.len() >= STARTS_MAX {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{STARTS_MAX} shims are being started")));
        }
        let said = |error: io::Error| {
            let text = format!("failed to run the shim's start for {}: {error}", request.id);
            RpcError::new(code::UNKNOWN, text)
        };
        let (stdin, input) = pipes::pipe().map_err(said)?;
        pipes::write(&input, &request.stdin).map_err(said)?;
        drop(input);
        let (output, stdout) = pipes::pipe().map_err(said)?;
        for end in [&stdin, &stdout] {
            pipes::set_nonblocking(end, false).map_err(said)?;
        }
        let binary = match request.binary.as_str() {
            "" => std::env::current_exe().map_err(said)?,
            binary => PathBuf::from(binary),
        };
        let mut command = Command::new(binary);
        command.args(["-namespace", &request.namespace, "-address", &request.address, "-publish-binary"]);
        command.args([&request.publish_binary, "-id", &request.id]);
        if request.debug {
            command.arg("-debug");
        }
        command.arg("start").current_dir(&request.bundle).env_clear();
        command.envs(request.env.iter().filter_map(|pair| pair.split_once('=')));
        command.env(KEEPER_ENV, &self.socket);
        let errors = stdout.try_clone().map_err(said)?;
        let child = command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(errors));
        // A shim, and so a container, starts with the limit that the keeper was started with.
        let own = self.files.map(|(_, own)| own);
        let inherited = self.files.map(|(inherited, _)| inherited);
        set_files(inherited);
        let spawned = child.spawn();
        set_files(own);
        let pid = spawned.map_err(said)?.id();
        self.epoll.add(&output, STARTS | u64::from(pid), Interest::READ_EDGE).map_err(said)?;
        self.starting.insert(pid, Starting { reply, output, text: Vec::new() });
        Ok(())
    }

    fn reap(&mut self) {
        while let Ok(Some(exited)) = child::ended_child(None) {
            let start_time = disk::start_time(exited.pid);
            if let Some(mut starting) = self.starting.remove(&exited.pid) {
                starting.read();
                let status = i32::try_from(exited.status).unwrap_or(255);
                let response = StartShimResponse { status, output: std::mem::take(&mut starting.text) };
                self.server.answer(starting.reply, Ok(response.encode_to_vec()), None);
            } else {
                if self.orphans.len() >= EXITS_MAX {
                    self.orphans.pop_front();
                }
                let orphan = Orphan { pid: exited.pid, start_time, exit: Exit::now(exited.status) };
                self.orphans.push_back(orphan);
                if let Err(error) = self.exits.add(&orphan, &self.orphans) {
                    say!("failed to write the exit of process {}: {error}", exited.pid);
                }
            }
            if child::reap(exited.pid).is_err() {
                return;
            }
        }
    }
}

/// How orphans ended, a line each, for a keeper that comes after this one.
#[derive(Debug)]
struct ExitsFile {
    path: PathBuf,
    boot: String,
    file: File,
    lines: usize,
}

impl ExitsFile {
    /// Opens the file and reads what an earlier keeper of this boot has seen.
    fn open(state: &Path) -> io::Result<(Self, VecDeque<Orphan>)> {
        let path = state.join(EXITS);
        let boot = linux::process::boot_id().map_err(io::Error::other)?;
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            text => text.unwrap_or_default(),
        };
        let mut lines = text.lines();
        let mut orphans = VecDeque::new();
        if lines.next() == Some(head(&boot).as_str()) {
            // The last line may have been cut by a kill.
            orphans.extend(lines.filter_map(|line| serde_json::from_str::<Orphan>(line).ok()));
            orphans.drain(..orphans.len().saturating_sub(EXITS_MAX));
        }
        let file = Self::write(&path, &boot, &orphans)?;
        Ok((Self { path, boot, file, lines: orphans.len() }, orphans))
    }

    fn write(path: &Path, boot: &str, orphans: &VecDeque<Orphan>) -> io::Result<File> {
        let mut text = head(boot) + "\n";
        for orphan in orphans {
            text.push_str(&line(orphan)?);
        }
        disk::replace(path, text.as_bytes())?;
        File::options().append(true).open(path)
    }

    /// Adds an exit; `all` are those that are remembered, this one included.
    fn add(&mut self, orphan: &Orphan, all: &VecDeque<Orphan>) -> io::Result<()> {
        if self.lines >= 2 * EXITS_MAX {
            self.file = Self::write(&self.path, &self.boot, all)?;
            self.lines = all.len();
            return Ok(());
        }
        self.lines += 1;
        self.file.write_all(line(orphan)?.as_bytes())
    }
}

fn head(boot: &str) -> String {
    format!("version {} boot {boot}", disk::VERSION)
}

fn line(orphan: &Orphan) -> io::Result<String> {
    Ok(serde_json::to_string(orphan)? + "\n")
}

/// Raises the soft limit of open files to the hard one: a node has some thousand descriptors to keep.
fn raise_files() -> Option<(Limit, Limit)> {
    let inherited = linux::rlimit::get(NOFILE).ok()?;
    let own = Limit { soft: inherited.hard, hard: inherited.hard };
    linux::rlimit::set(0, NOFILE, own).ok()?;
    Some((inherited, own))
}

fn set_files(limit: Option<Limit>) {
    if let Some(limit) = limit
        && let Err(error) = linux::rlimit::set(0, NOFILE, limit)
    {
        say!("failed to set the limit of open files: {error}");
    }
}

impl Starting {
    fn read(&mut self) {
        let mut buffer = [0u8; 1024];
        while let Ok(bytes @ 1..) = pipes::read(&self.output, &mut buffer) {
            let room = OUTPUT_BYTES_MAX.saturating_sub(self.text.len());
            self.text.extend_from_slice(buffer.get(..bytes.min(room)).unwrap_or_default());
        }
    }
}
