//! The shim's loop: one thread, one epoll instance, children for everything that may take time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use linux::child::{self, Fork};
use linux::event::{Epoll, Interest, Ready, SignalFd};
use linux::pipes;
use prost::Message;
use protocols::shim::{coracle, sandbox, task};
use protocols::ttrpc::{RpcError, code};

use crate::events::Forwarder;
use crate::keeping::Keeping;
use crate::process::{Container, Exit};
use crate::sandbox::Sandbox;
use crate::server::{Answer, Call, Reply, Server};
use crate::stream::{StreamId, Streams};

const KIND: u64 = 1 << 32;
const LISTENER: u64 = KIND;
const SIGNALS: u64 = 2 * KIND;
const CONNECTIONS: u64 = 3 * KIND;
const STREAMS: u64 = 4 * KIND;
const JOBS: u64 = 5 * KIND;
const EVENTS: u64 = 6 * KIND;
pub(crate) const OOM: u64 = 7 * KIND;
pub(crate) const ADOPTED: u64 = 8 * KIND;
pub(crate) const KEEPER: u64 = 9 * KIND;

/// Text of a child that is kept, in bytes.
const REPORT_BYTES_MAX: usize = 64 * 1024;
/// Children at one time.
const JOBS_MAX: usize = 256;
/// Exits kept for children whose pid is not known yet.
const EARLY_EXITS_MAX: usize = 1024;
/// How often a shim that serves nothing looks whether its bundle is still there.
const BUNDLE_LOOK: Duration = Duration::from_secs(10);
/// How long the shim stays at its end for events that are still to be sent.
const LINGER: Duration = Duration::from_secs(2);

/// What the shim was started with.
#[derive(Clone, Debug)]
pub struct Setting {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox' or first container's id.
    pub id: String,
    /// The listening socket's path, removed at the end.
    pub socket: PathBuf,
    /// The keeper's socket, if there is a keeper.
    pub keeper: Option<PathBuf>,
    /// The daemon's socket for events.
    pub events: Option<PathBuf>,
}

/// What is done when a child has ended.
#[derive(Debug)]
pub(crate) enum Then {
    Created { id: String, reply: Reply, mark: u64 },
    Undone { reply: Reply, error: RpcError },
    Started { id: String, reply: Reply, mark: u64 },
    ExecStarted { id: String, exec_id: String, reply: Reply, mark: u64 },
    Operated { id: String, reply: Reply, mark: u64, what: &'static str },
    KilledAll { id: String },
    Deleted { id: String, reply: Reply, mark: u64 },
    SandboxMade { reply: Reply },
    SandboxGone { reply: Reply },
    Swept { bundle: PathBuf },
}

#[derive(Debug)]
struct Job {
    pipe: OwnedFd,
    text: Vec<u8>,
    then: Then,
}

/// What is done at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// Streams that outlived their container's removal are closed.
    CloseStreams(Vec<StreamId>),
    /// An exit is told though execs have not ended.
    ReleaseExit(String),
    /// The sandbox' containers are killed.
    KillSandbox,
    /// An adopted process has ended, and whoever is to reap it has not.
    AdoptedEnded(u32),
    /// A shim that serves nothing, and whose bundle is gone, ends.
    LookForBundle,
}

/// The shim.
#[derive(Debug)]
pub struct Shim {
    pub(crate) setting: Setting,
    pub(crate) epoll: Epoll,
    pub(crate) streams: Streams,
    pub(crate) events: Forwarder,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) sandbox: Option<Sandbox>,
    pub(crate) timers: Vec<(Instant, Timer)>,
    /// Exits of children that a command under way may yet turn out to have started.
    pub(crate) early: BTreeMap<u32, Exit>,
    pub(crate) keeping: Option<Keeping>,
    /// Processes of a predecessor's: when they began, and their pidfds.
    pub(crate) adopted: BTreeMap<u32, (u64, OwnedFd)>,
    pub(crate) next_socket: u32,
    /// The pod's network namespace, as it was given.
    pub(crate) netns: String,
    /// Set when the shim is to end as soon as its answers have left.
    pub(crate) ending: bool,
    server: Server,
    signals: SignalFd,
    jobs: BTreeMap<u32, Job>,
}

impl Shim {
    /// A shim without containers that serves on `listener`.
    ///
    /// # Errors
    /// Those of epoll, signalfd, prctl and pipes.
    pub fn new(setting: Setting, listener: UnixListener) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        linux::process::set_child_subreaper(true)?;
        let signals = SignalFd::new(&[17, 15, 2])?;
        epoll.add(&signals, SIGNALS, Interest::READ)?;
        let server = Server::new(&epoll, listener, LISTENER, CONNECTIONS)?;
        let events = Forwarder::new(setting.events.clone(), &setting.namespace, EVENTS);
        Ok(Self {
            streams: Streams::new(STREAMS)?,
            events,
            containers: BTreeMap::new(),
            sandbox: None,
            timers: vec![(Instant::now() + BUNDLE_LOOK, Timer::LookForBundle)],
            early: BTreeMap::new(),
            keeping: setting.keeper.clone().map(Keeping::new),
            adopted: BTreeMap::new(),
            next_socket: 0,
            netns: String::new(),
            ending: false,
            server,
            signals,
            jobs: BTreeMap::new(),
            setting,
            epoll,
        })
    }

    /// Serves until it is told to end. SIGTERM ends it at once, as it does containerd's.
    ///
    /// # Errors
    /// `epoll_wait(2)`'s.
    pub fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        let mut calls = Vec::new();
        let mut linger: Option<Instant> = None;
        loop {
            ready.clear();
            self.epoll.wait(self.wait_time(linger), &mut ready)?;
            for event in &ready {
                if !self.on_ready(*event, &mut calls) {
                    let _ = std::fs::remove_file(&self.setting.socket);
                    return Ok(());
                }
            }
            for call in calls.drain(..) {
                self.on_call(call);
            }
            self.streams.run_again(&self.epoll);
            self.on_time(Instant::now());
            if self.ending {
                let until = *linger.get_or_insert_with(|| Instant::now() + LINGER);
                let told = self.server.flushed() && self.events.idle();
                if told || Instant::now() >= until {
                    return Ok(());
                }
            }
        }
    }

    fn wait_time(&self, linger: Option<Instant>) -> Option<Duration> {
        if self.streams.has_more() {
            return Some(Duration::ZERO);
        }
        let timers = self.timers.iter().map(|(due, _)| *due);
        let first = timers
            .chain(self.events.due())
            .chain(self.streams.due())
            .chain(self.keeping.as_ref().and_then(Keeping::due))
            .chain(linger)
            .min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    /// `false`: the shim is to end at once.
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
            STREAMS => {
                self.streams.on_ready(&self.epoll, ready);
            }
            JOBS => self.on_report(ready),
            EVENTS => self.events.on_ready(&self.epoll),
            OOM => self.on_oom(ready),
            ADOPTED => self.on_adopted(ready),
            KEEPER => self.keeping.iter_mut().for_each(|keeping| keeping.on_hangup(Instant::now())),
            _ => {}
        }
        true
    }

    fn on_time(&mut self, now: Instant) {
        self.events.on_time(&self.epoll, now);
        self.streams.on_time(now);
        if let Some(keeping) = &mut self.keeping {
            keeping.on_time(&self.epoll, now);
        }
        let (due, later) = std::mem::take(&mut self.timers).into_iter().partition(|(at, _)| *at <= now);
        self.timers = later;
        let due: Vec<(Instant, Timer)> = due;
        for (_, timer) in due {
            match timer {
                Timer::CloseStreams(streams) => streams.into_iter().for_each(|id| self.streams.close(id)),
                Timer::ReleaseExit(id) => self.release_exit(&id, true),
                Timer::KillSandbox => self.signal_sandbox(9),
                Timer::AdoptedEnded(pid) => self.adopted_ended(pid, true),
                Timer::LookForBundle => self.look_for_bundle(now),
            }
        }
    }

    /// Whether nothing was made here yet, or nothing is left of it.
    pub(crate) fn serves_nothing(&self) -> bool {
        self.sandbox.is_none() && self.containers.is_empty() && self.jobs.is_empty()
    }

    /// Whoever started this shim may have been killed before it asked for anything, and what it had made been removed: then
    /// nobody knows of the shim. (The working directory is the bundle; one that was removed has no name.)
    fn look_for_bundle(&mut self, now: Instant) {
        if !self.serves_nothing() {
            return;
        }
        match std::env::current_dir() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.end(),
            _ => self.timers.push((now + BUNDLE_LOOK, Timer::LookForBundle)),
        }
    }

    fn on_call(&mut self, call: Call) {
        let request = call.request;
        let payload = request.payload.as_slice();
        let answer = match request.service.as_str() {
            task::v3::SERVICE | task::v2::SERVICE => self.task_call(&request.method, payload, call.reply),
            sandbox::v1::SERVICE => self.sandbox_call(&request.method, payload, call.reply),
            coracle::SHIM_SERVICE => self.extension_call(&request.method, payload),
            service => Err(RpcError::new(code::UNIMPLEMENTED, format!("service {service} is not implemented"))),
        };
        match answer {
            Ok(None) => {}
            Ok(Some(payload)) => self.answer(call.reply, Ok(payload)),
            Err(error) => self.answer(call.reply, Err(error)),
        }
    }

    /// Answers a call.
    pub(crate) fn answer(&mut self, reply: Reply, answer: Answer) {
        self.server.answer(reply, answer, None);
    }

    /// Answers a call with a message.
    pub(crate) fn answer_with(&mut self, reply: Reply, message: &impl Message) {
        self.answer(reply, Ok(message.encode_to_vec()));
    }

    /// Takes no more connections: the shim is about to end.
    pub(crate) fn end(&mut self) {
        if !self.ending {
            self.ending = true;
            self.server.stop_listening(&self.epoll);
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.setting.socket);
        }
    }

    /// Runs `body` in a child; its status and text are given to `then`.
    pub(crate) fn spawn(&mut self, then: Then, body: impl FnOnce(OwnedFd) -> u8) -> Result<(), RpcError> {
        let said = |error: io::Error| RpcError::new(code::INTERNAL, format!("failed to start a child of the shim: {error}"));
        if self.jobs.len() >= JOBS_MAX {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{JOBS_MAX} operations are under way")));
        }
        let (reader, writer) = pipes::pipe().map_err(said)?;
        match child::fork().map_err(said)? {
            Fork::Child => child::exit_now(body(writer)),
            Fork::Parent(pid) => {
                drop(writer);
                self.epoll.add(&reader, JOBS | u64::from(pid), Interest::READ_EDGE).map_err(said)?;
                self.jobs.insert(pid, Job { pipe: reader, text: Vec::new(), then });
                Ok(())
            }
        }
    }

    fn on_report(&mut self, ready: Ready) {
        if let Some(job) = u32::try_from(ready.token & (KIND - 1)).ok().and_then(|pid| self.jobs.get_mut(&pid)) {
            job.read();
        }
    }

    /// Takes every child that has ended: first it is dealt with, and only then reaped.
    pub(crate) fn reap(&mut self) {
        while let Ok(Some(exited)) = child::ended_child(None) {
            let exit = Exit::now(exited.status);
            if let Some(mut job) = self.jobs.remove(&exited.pid) {
                job.read();
                // ECHILD cannot be: it has just been seen.
                let _ = child::reap(exited.pid);
                let text = String::from_utf8_lossy(&job.text).into_owned();
                self.job_done(job.then, exited.status, &text);
                continue;
            }
            let owner = self.owner_of(exited.pid);
            if let Some((id, exec_id)) = &owner {
                self.record_exit(id, exec_id, exit);
            }
            let _ = child::reap(exited.pid);
            match owner {
                Some((id, exec_id)) => self.process_exited(&id, &exec_id, exit),
                None if self.sandbox_process_ended(exited.pid, exit) => {}
                None if self.jobs.is_empty() => {}
                None => {
                    if self.early.len() >= EARLY_EXITS_MAX {
                        self.early.pop_first();
                    }
                    self.early.insert(exited.pid, exit);
                }
            }
        }
        if self.jobs.is_empty() {
            self.early.clear();
        }
    }

    /// The process of a container that has this pid.
    pub(crate) fn owner_of(&self, pid: u32) -> Option<(String, String)> {
        self.containers.iter().find_map(|(id, container)| {
            std::iter::once(&container.init)
                .chain(container.execs.values())
                .filter(|process| process.early_exit.is_none())
                .filter(|process| !(process.exec_id.is_empty() && container.held_exit.is_some()))
                .find(|process| process.pid == pid && process.state.exit().is_none())
                .map(|process| (id.clone(), process.exec_id.clone()))
        })
    }

    fn job_done(&mut self, then: Then, status: u32, text: &str) {
        match then {
            Then::Created { id, reply, mark } => self.created(&id, reply, mark, status, text),
            Then::Undone { reply, error } => self.answer(reply, Err(error)),
            Then::Started { id, reply, mark } => self.started(&id, reply, mark, status, text),
            Then::ExecStarted { id, exec_id, reply, mark } => {
                self.exec_started(&id, &exec_id, reply, mark, status, text);
            }
            Then::Operated { id, reply, mark, what } => self.operated(&id, reply, mark, status, text, what),
            Then::KilledAll { id } => self.killed_all(&id, status, text),
            Then::Deleted { id, reply, mark } => self.deleted(&id, reply, mark, status, text),
            Then::SandboxMade { reply } => self.sandbox_made(reply, status, text),
            Then::SandboxGone { reply } => self.sandbox_gone(reply, status, text),
            Then::Swept { bundle } => {
                if status != 0 {
                    say!("failed to remove what is left in {}: {}", bundle.display(), text.trim());
                }
            }
        }
    }
}

impl Job {
    fn read(&mut self) {
        let mut buffer = [0u8; 1024];
        while let Ok(bytes @ 1..) = pipes::read(&self.pipe, &mut buffer) {
            let room = REPORT_BYTES_MAX.saturating_sub(self.text.len());
            self.text.extend_from_slice(buffer.get(..bytes.min(room)).unwrap_or_default());
        }
    }
}
