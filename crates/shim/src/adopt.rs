//! Taking over the sandbox of a shim that was killed.
//!
//! `start` in the bundle of a sandbox that is there: the daemon enters the pinned namespaces, finds the containers in their
//! records, and their streams by path or with the keeper. The containers' parent is the keeper by now (or, if it died since, whoever
//! is above it), so their exits are seen by pidfd and told by the keeper; failing it by the kernel (`PIDFD_GET_INFO`, by the
//! pidfd that the keeper held, if the process was reaped before this); failing both they are 255.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cri_log::Cursor;
use linux::event::{Interest, Ready};
use linux::namespace::{self, Kind};
use linux::pipes::{self, Access};

use crate::daemon::{ADOPTED, Shim, Timer};
use crate::disk::{self, ExitRecord, Task, TaskProcess};
use crate::process::{Container, Exit, Process, Sink, State};
use crate::sandbox::{PINS, RECORD, Record, Sandbox, Stage};
use crate::stats;
use crate::stream::LogId;
use crate::{job, keeping};

/// What nobody saw.
const UNKNOWN: u32 = 255;
/// How long it is waited until a process that has ended is reaped: only then the kernel tells how it ended. (Linux 6.9 and later say
/// when.)
const REAPED: Duration = Duration::from_secs(5);

impl Shim {
    /// Takes over what the records in `bundle` tell of, if they do.
    ///
    /// # Errors
    /// Unreadable records, or namespaces that cannot be entered: then nothing is served.
    pub(crate) fn adopt(&mut self, bundle: &Path) -> Result<(), String> {
        let path = bundle.join(RECORD);
        let said = |error: std::io::Error| format!("failed to read {}: {error}", path.display());
        let Some(record) = disk::read::<Record>(&path).map_err(said)? else { return Ok(()) };
        if record.id != self.setting.id {
            return Ok(());
        }
        if record.version != disk::VERSION {
            return Err(format!("{} has version {}, not {}", path.display(), record.version, disk::VERSION));
        }
        enter_pinned(bundle, &record)?;
        let alive = record.pause != 0 && disk::start_time(record.pause) == record.pause_start_time;
        let stage = match record.stage {
            Stage::Ready if record.pause != 0 && !alive => Stage::Stopped(Exit::now(UNKNOWN)),
            stage => stage,
        };
        if alive {
            self.watch(record.pause, record.pause_start_time);
        }
        let mut sandbox = Sandbox::restored(&record, bundle, stage);
        if !alive {
            sandbox.pause = 0;
        }
        self.netns = record.netns.clone();
        self.sandbox = Some(sandbox);
        for bundle in &record.bundles {
            self.adopt_container(Path::new(bundle), &record);
        }
        if let Ok(cursor) = Cursor::open(&bundle.join("cursor")) {
            self.streams.set_cursor(cursor);
        }
        self.write_sandbox();
        Ok(())
    }

    fn adopt_container(&mut self, bundle: &Path, record: &Record) {
        let task: Option<Task> = disk::read(&bundle.join("task.json")).unwrap_or_default();
        let Some(task) = task else {
            say!("no record of a container in {}: left alone", bundle.display());
            return;
        };
        if task.init.pid == 0 {
            self.remove_half_made(bundle, &task);
            return;
        }
        let mut container = Container {
            id: task.id.clone(),
            bundle: bundle.to_owned(),
            runtime: task.runtime,
            init: Process::new("", task.init.stdio.clone(), Vec::new()),
            execs: BTreeMap::new(),
            busy: false,
            queue: VecDeque::new(),
            own_pid_namespace: task.own_pid_namespace,
            log: None,
            cgroups: stats::cgroups_of(task.init.pid),
            oom: None,
            held_exit: None,
            killing_all: false,
            mounted: task.mounted,
        };
        let mut log = None;
        let init_gone = self.adopt_process(bundle, &task.init, &mut container.init, &mut log, record);
        container.log = log;
        let mut gone = Vec::new();
        for exec in &task.execs {
            let mut process = Process::new(&exec.exec_id, exec.stdio.clone(), Vec::new());
            if let Some(exit) = self.adopt_process(bundle, exec, &mut process, &mut None, record) {
                gone.push((exec.exec_id.clone(), exit));
            }
            container.execs.insert(exec.exec_id.clone(), process);
        }
        if container.init.state == State::Created && started(&container) {
            container.init.state = State::Running;
        }
        let id = container.id.clone();
        self.containers.insert(id.clone(), container);
        self.watch_oom(&id);
        gone.extend(init_gone.map(|exit| (String::new(), exit)));
        for (exec_id, exit) in gone {
            self.record_exit(&id, &exec_id, exit);
            self.process_exited(&id, &exec_id, exit);
        }
    }

    /// Puts a process together again; answers its exit if it has ended since its last record.
    fn adopt_process(
        &mut self,
        bundle: &Path,
        record: &TaskProcess,
        process: &mut Process,
        log: &mut Option<LogId>,
        sandbox: &Record,
    ) -> Option<Exit> {
        process.pid = record.pid;
        process.state = match record.state.as_str() {
            "created" => State::Created,
            "paused" => State::Paused,
            _ => State::Running,
        };
        let told: Option<ExitRecord> = disk::read(&bundle.join(process.file("exit.json"))).unwrap_or_default();
        let told = told.filter(|told| told.pid == record.pid).map(|told| told.exit);
        let alive = told.is_none() && record.start_time != 0 && self.watch(record.pid, record.start_time);
        let pidfd = bundle.join(process.file("pidfd"));
        let kept =
            self.adopted.get(&record.pid).and_then(|(_, pidfd)| pidfd.try_clone().ok()).filter(|_| alive && record.exec_id.is_empty());
        if let Some(kept) = kept {
            self.keep(&pidfd, &kept);
        }
        if let Err(error) = self.adopt_streams(bundle, process, log, alive, sandbox) {
            say!("streams of {} {} are lost: {}", bundle.display(), process.exec_id, error.message);
        }
        match told {
            _ if alive => None,
            // It was told already; a second time does no harm, and a missing one would.
            Some(exit) => Some(exit),
            None => {
                let kept = keeping::get(self.setting.keeper.as_deref(), &pidfd);
                Some(self.exit_by_others(record.pid, record.start_time, kept.as_ref()).unwrap_or_else(|| Exit::now(UNKNOWN)))
            }
        }
    }

    fn adopt_streams(
        &mut self,
        bundle: &Path,
        process: &mut Process,
        log: &mut Option<LogId>,
        alive: bool,
        sandbox: &Record,
    ) -> Result<(), protocols::ttrpc::RpcError> {
        let keeper = self.setting.keeper.clone();
        let kept = |name: &str| keeping::get(keeper.as_deref(), &bundle.join(process.file(name)));
        if process.stdio.terminal {
            return match kept("master") {
                Some(master) => {
                    self.keep(&bundle.join(process.file("master")), &master);
                    self.join_terminal(process, master, log)
                }
                None => Ok(()),
            };
        }
        let outputs = [("stdout", process.stdio.stdout.clone()), ("stderr", process.stdio.stderr.clone())];
        let ends: Vec<_> = outputs.into_iter().map(|(name, sink)| (name, sink, kept(name))).collect();
        let stdin = kept("stdin");
        for (name, sink, end) in ends {
            let sink = Sink::parse(&sink)?;
            let path = bundle.join(process.file(name));
            // Of an ended process nothing is left but what the keeper holds.
            let end = end.or_else(|| if alive { pipes::open_fifo(&path, Access::Read).ok() } else { None });
            let Some(end) = end.filter(|_| sink != Sink::None) else { continue };
            if process.exec_id.is_empty() {
                self.keep(&path, &end);
            }
            if let Sink::Log(log) = &sink
                && let Err(error) = cri_log::reconcile(&sandbox.cursor(), log, name, &end)
            {
                say!("failed to compare log {} with its stream: {error}", log.display());
            }
            let id = self.join_output(end, false, &sink, name, log)?;
            if let Some(id) = id {
                process.outputs.push(id);
                // What is there was told to nobody yet.
                self.streams.nudge(id);
            }
        }
        match stdin {
            Some(writer) if alive => {
                self.keep(&bundle.join(process.file("stdin")), &writer);
                self.join_stdin(process, writer)
            }
            _ => Ok(()),
        }
    }

    /// A container that was being made has nobody who waits for it.
    fn remove_half_made(&mut self, bundle: &Path, task: &Task) {
        let line = task.runtime.line(bundle, &["delete", "--force", &task.id]);
        let (bundle, mounted) = (bundle.to_owned(), task.mounted);
        disk::remove_task(&bundle);
        let then = crate::daemon::Then::Swept { bundle: bundle.clone() };
        if let Err(error) = self.spawn(then, |pipe| job::remove(Some(line), &bundle, mounted, pipe)) {
            say!("failed to remove what is left in {}: {}", bundle.display(), error.message);
        }
    }

    /// Watches a process that is not this shim's child; `false` if it is not there any more.
    fn watch(&mut self, pid: u32, start_time: u64) -> bool {
        let Some(pidfd) = i32::try_from(pid).ok().and_then(|pid| linux::pidfd::open(pid).ok()) else { return false };
        // Only now is it certain that the descriptor is of that very process.
        if disk::start_time(pid) != start_time {
            return false;
        }
        if let Err(error) = self.epoll.add(&pidfd, ADOPTED | u64::from(pid), Interest::READ_EDGE) {
            say!("failed to watch process {pid}: {error}");
            return false;
        }
        self.adopted.insert(pid, (start_time, pidfd));
        true
    }

    /// An adopted process has ended, or (a hang-up) was reaped as well.
    pub(crate) fn on_adopted(&mut self, ready: Ready) {
        if let Ok(pid) = u32::try_from(ready.token & 0xffff_ffff) {
            self.adopted_ended(pid, ready.hangup);
        }
    }

    /// Deals with the exit of an adopted process: at once if somebody tells of it; `at_last` in any case.
    pub(crate) fn adopted_ended(&mut self, pid: u32, at_last: bool) {
        let Some((start_time, pidfd)) = self.adopted.get(&pid) else { return };
        let exit = match self.exit_by_others(pid, *start_time, Some(pidfd)) {
            Some(exit) => exit,
            None if at_last => Exit::now(UNKNOWN),
            None => {
                self.timers.push((Instant::now() + REAPED, Timer::AdoptedEnded(pid)));
                return;
            }
        };
        self.adopted.remove(&pid);
        match self.owner_of(pid) {
            Some((id, exec_id)) => {
                self.record_exit(&id, &exec_id, exit);
                self.process_exited(&id, &exec_id, exit);
            }
            None => {
                self.sandbox_process_ended(pid, exit);
            }
        }
    }

    fn exit_by_others(&self, pid: u32, start_time: u64, pidfd: Option<&OwnedFd>) -> Option<Exit> {
        if let Some(told) = keeping::exit_of(self.setting.keeper.as_deref(), pid, start_time) {
            let at = told.exited_at.unwrap_or_default();
            return Some(Exit { status: told.exit_status, seconds: at.seconds, nanos: at.nanos });
        }
        pidfd.and_then(|pidfd| linux::child::exit_status_of(pidfd.as_fd())).map(Exit::now)
    }

    /// Signals a process of a container, which may be another process' child.
    pub(crate) fn signal(&self, pid: u32, signal: u32) -> std::io::Result<()> {
        match self.adopted.get(&pid) {
            Some((_, pidfd)) => linux::child::send_signal_by(pidfd.as_fd(), signal),
            None => linux::child::send_signal(pid, signal),
        }
    }
}

fn enter_pinned(bundle: &Path, record: &Record) -> Result<(), String> {
    let pins = bundle.join(PINS);
    let places = [
        (record.plan.net, Kind::Net, PathBuf::from(&record.netns)),
        (record.plan.ipc, Kind::Ipc, pins.join(Kind::Ipc.proc_name())),
        (record.plan.uts, Kind::Uts, pins.join(Kind::Uts.proc_name())),
    ];
    for (_, kind, path) in places.into_iter().filter(|(wanted, _, _)| *wanted) {
        namespace::open(&path, kind)
            .and_then(|namespace| namespace::join(namespace.as_fd(), kind))
            .map_err(|error| format!("failed to enter the pod's namespace {}: {}", path.display(), std::io::Error::from(error)))?;
    }
    Ok(())
}

/// Whether a container that was last seen created has been started since: its first process executes something else than
/// the built-in runtime. (Of a foreign runtime the record is believed.)
fn started(container: &Container) -> bool {
    let file = |path: String| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let own = file("/proc/self/exe".to_owned());
    let its = file(format!("/proc/{}/exe", container.init.pid));
    container.runtime.binary.is_empty() && matches!((own, its), (Ok(own), Ok(its)) if own != its)
}
