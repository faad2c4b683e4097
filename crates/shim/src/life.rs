//! What follows when a child has ended: a container made, started, stopped, removed; and what an exit sets going.

use std::time::{Duration, Instant};

use protocols::shim::events as event;
use protocols::shim::task::v3::{CreateTaskResponse, DeleteResponse, StartResponse, WaitResponse};
use protocols::ttrpc::{RpcError, code};

use crate::daemon::{Shim, Then, Timer};
use crate::job;
use crate::process::{Exit, Operation, State, never};
use crate::runtime;
use crate::server::{Answer, Reply};
use crate::{disk, stats};

/// How long an init's exit waits for its execs' exits.
const EXECS_END: Duration = Duration::from_secs(10);

impl Shim {
    /// The container's `create` has ended.
    pub(crate) fn created(&mut self, id: &str, reply: Reply, mark: u64, status: u32, text: &str) {
        let Some(mut container) = self.containers.remove(id) else { return };
        let own_pid_namespace = text.starts_with(job::OWN_PID_NAMESPACE);
        let text = text.strip_prefix(job::OWN_PID_NAMESPACE).unwrap_or(text);
        container.init.guards.clear();
        container.busy = false;
        container.own_pid_namespace = own_pid_namespace;
        let made = if status == 0 {
            disk::read_pid(&container.bundle.join("init.pid")).and_then(|pid| {
                let mut log = container.log;
                self.open_terminal(&container.bundle, &mut container.init, &mut log)?;
                container.log = log;
                Ok(pid)
            })
        } else if status == u32::from(job::FAILED) {
            Err(RpcError::new(code::UNKNOWN, text.to_owned()))
        } else {
            let why = runtime::failure(&container.bundle, mark, text, status);
            Err(RpcError::new(code::UNKNOWN, format!("OCI runtime create failed: {why}")))
        };
        let pid = match made {
            Ok(pid) => pid,
            Err(error) => {
                self.containers.insert(id.to_owned(), container);
                self.undo_create(id, reply, error, status == 0);
                return;
            }
        };
        container.init.pid = pid;
        container.init.state = State::Created;
        container.cgroups = stats::cgroups_of(pid);
        // With it a successor learns from the kernel how the process ended, whoever has reaped it. (One that has ended by now is
        // in `early`.)
        if let Some(pidfd) = i32::try_from(pid).ok().and_then(|pid| linux::pidfd::open(pid).ok()) {
            self.keep(&container.bundle.join(container.init.file("pidfd")), &pidfd);
        }
        let (bundle, stdio) = (container.bundle.display().to_string(), container.init.stdio.clone());
        self.containers.insert(id.to_owned(), container);
        self.watch_oom(id);
        self.write_task(id);
        let io = event::TaskIo { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr, terminal: stdio.terminal };
        let created = event::TaskCreate { container_id: id.to_owned(), bundle, io: Some(io), pid, ..event::TaskCreate::default() };
        self.publish("/tasks/create", "TaskCreate", &created);
        self.answer_with(reply, &CreateTaskResponse { pid });
        self.take_early_exit(id, "", pid);
        self.next_operation(id);
    }

    /// Leaves nothing of a container whose creation failed.
    fn undo_create(&mut self, id: &str, reply: Reply, error: RpcError, made: bool) {
        let Some(container) = self.containers.get(id) else { return };
        let line = made.then(|| container.runtime.line(&container.bundle, &["delete", "--force", id]));
        let (bundle, mounted) = (container.bundle.clone(), container.mounted);
        self.forget(id);
        let then = Then::Undone { reply, error: error.clone() };
        if self.spawn(then, |pipe| job::remove(line, &bundle, mounted, pipe)).is_err() {
            self.answer(reply, Err(error));
        }
    }

    /// Drops a container from memory, answering what waits for it.
    pub(crate) fn forget(&mut self, id: &str) {
        let Some(container) = self.containers.remove(id) else { return };
        let gone = || RpcError::new(code::NOT_FOUND, format!("container {id} is gone: not found"));
        for (reply, _) in container.queue {
            self.answer(reply, Err(gone()));
        }
        for process in std::iter::once(&container.init).chain(container.execs.values()) {
            self.leave_streams(process);
            for waiter in &process.waiters {
                self.answer(*waiter, Err(gone()));
            }
        }
        self.drop_kept(&container.bundle);
        self.close_unused_logs();
        self.write_sandbox();
    }

    /// If the process has ended before its command told of it, its exit follows now.
    fn take_early_exit(&mut self, id: &str, exec_id: &str, pid: u32) {
        // A pid that is a living child again belongs to another process.
        if let Some(exit) = self.early.remove(&pid)
            && linux::child::ended_child(Some(pid)).is_err()
        {
            self.record_exit(id, exec_id, exit);
            self.process_exited(id, exec_id, exit);
        }
    }

    /// Begins the container's next operation, if none is under way.
    pub(crate) fn next_operation(&mut self, id: &str) {
        while let Some(container) = self.containers.get_mut(id) {
            if container.busy {
                return;
            }
            let Some((reply, operation)) = container.queue.pop_front() else { return };
            match self.begin(id, reply, &operation) {
                Ok(Begun::Done(answer)) => self.answer(reply, Ok(answer)),
                Ok(Begun::UnderWay) => {
                    if let Some(container) = self.containers.get_mut(id) {
                        container.busy = true;
                    }
                }
                Ok(Begun::Later) => {
                    if let Some(container) = self.containers.get_mut(id) {
                        container.queue.push_front((reply, operation));
                    }
                    return;
                }
                Err(error) => self.answer(reply, Err(error)),
            }
        }
    }

    fn begin(&mut self, id: &str, reply: Reply, operation: &Operation) -> Result<Begun, RpcError> {
        let container = self.container(id)?;
        let state = container.init.state;
        let wrong = |act: &str| {
            let text = format!("cannot {act} container {id}: it is {}", Self::status_word(state));
            Err(RpcError::new(code::FAILED_PRECONDITION, text))
        };
        let (words, what): (Vec<&str>, _) = match operation {
            Operation::Start => match state {
                State::Created => return self.begin_start(id, reply),
                _ => return wrong("start"),
            },
            Operation::Kill { signal, all } => return self.begin_kill(id, reply, *signal, *all),
            Operation::Pause if state == State::Running => (vec!["pause", id], "pause"),
            Operation::Pause => return wrong("pause"),
            Operation::Resume if state == State::Paused => (vec!["resume", id], "resume"),
            Operation::Resume => return wrong("resume"),
            Operation::Update(resources) => {
                if state.exit().is_some() {
                    return wrong("update");
                }
                let file = container.bundle.join("resources.json");
                let said = |error: std::io::Error| RpcError::new(code::UNKNOWN, format!("failed to write {}: {error}", file.display()));
                std::fs::write(&file, resources).map_err(said)?;
                (vec!["update", "--resources", "-", id], "update")
            }
            Operation::Delete => return self.begin_delete(id, reply),
        };
        let line = container.runtime.line(&container.bundle, &words);
        let stdin = matches!(operation, Operation::Update(_)).then(|| container.bundle.join("resources.json"));
        let mark = runtime::log_mark(&container.bundle);
        let then = Then::Operated { id: id.to_owned(), reply, mark, what };
        self.spawn(then, |pipe| job::command(line, stdin.as_deref(), pipe))?;
        Ok(Begun::UnderWay)
    }

    fn begin_start(&mut self, id: &str, reply: Reply) -> Result<Begun, RpcError> {
        let container = self.container_mut(id)?;
        container.init.starting = true;
        let line = container.runtime.line(&container.bundle, &["start", id]);
        let mark = runtime::log_mark(&container.bundle);
        let then = Then::Started { id: id.to_owned(), reply, mark };
        let spawned = self.spawn(then, |pipe| job::command(line, None, pipe));
        if spawned.is_err() {
            self.container_mut(id)?.init.starting = false;
        }
        spawned.map(|()| Begun::UnderWay)
    }

    fn begin_kill(&mut self, id: &str, reply: Reply, signal: u32, all: bool) -> Result<Begun, RpcError> {
        let container = self.container(id)?;
        let finished = RpcError::new(code::NOT_FOUND, "process already finished: not found");
        let stopped = container.init.state.exit().is_some() || container.held_exit.is_some();
        if stopped && !all {
            return Err(finished);
        }
        // The first process is a child of the shim that is not reaped yet, so its pid is its own. A frozen one is left to
        // the runtime, which thaws it for SIGKILL; and so are foreign runtimes, where the pid may be a sandbox.
        if !all && container.runtime.binary.is_empty() && container.init.state != State::Paused {
            return match self.signal(container.init.pid, signal) {
                Ok(()) => Ok(Begun::Done(Vec::new())),
                Err(error) if error.raw_os_error() == Some(3) => Err(finished),
                Err(error) => {
                    Err(RpcError::new(code::INVALID_ARGUMENT, format!("failed to send signal {signal} to container {id}: {error}")))
                }
            };
        }
        let number = signal.to_string();
        let mut words = vec!["kill"];
        if all {
            words.push("--all");
        }
        words.extend([id, number.as_str()]);
        let line = container.runtime.line(&container.bundle, &words);
        let mark = runtime::log_mark(&container.bundle);
        let then = Then::Operated { id: id.to_owned(), reply, mark, what: "kill" };
        self.spawn(then, |pipe| job::command(line, None, pipe))?;
        Ok(Begun::UnderWay)
    }

    fn begin_delete(&mut self, id: &str, reply: Reply) -> Result<Begun, RpcError> {
        let container = self.container(id)?;
        match container.init.state {
            State::Stopped(_) => {}
            State::Created => {
                // It goes on when the exit is there.
                let _ = self.signal(container.init.pid, 9);
                return Ok(Begun::Later);
            }
            state => {
                let text = format!("cannot delete container {id}: it is {}", Self::status_word(state));
                return Err(RpcError::new(code::FAILED_PRECONDITION, text));
            }
        }
        let line = container.runtime.line(&container.bundle, &["delete", id]);
        let (bundle, mounted) = (container.bundle.clone(), container.mounted);
        let mark = runtime::log_mark(&bundle);
        let then = Then::Deleted { id: id.to_owned(), reply, mark };
        self.spawn(then, |pipe| job::remove(Some(line), &bundle, mounted, pipe))?;
        Ok(Begun::UnderWay)
    }

    /// The container's `start` has ended.
    pub(crate) fn started(&mut self, id: &str, reply: Reply, mark: u64, status: u32, text: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.busy = false;
        container.init.starting = false;
        let (pid, early) = (container.init.pid, container.init.early_exit.take());
        if status == 0 {
            container.init.state = State::Running;
            self.write_task(id);
            self.publish("/tasks/start", "TaskStart", &event::TaskStart { container_id: id.to_owned(), pid });
            self.answer_with(reply, &StartResponse { pid });
        } else {
            let error = self.failed(id, mark, status, text, "start");
            self.answer(reply, Err(error));
        }
        if let Some(exit) = early {
            self.process_exited(id, "", exit);
        }
        self.next_operation(id);
    }

    /// An exec's `exec` has ended.
    pub(crate) fn exec_started(&mut self, id: &str, exec_id: &str, reply: Reply, mark: u64, status: u32, text: &str) {
        let Some(mut container) = self.containers.remove(id) else { return };
        let bundle = container.bundle.clone();
        // The runtime has read it; a left one goes with the bundle.
        let _ = std::fs::remove_file(bundle.join(format!("{exec_id}.process.json")));
        let Some(process) = container.execs.get_mut(exec_id) else {
            self.containers.insert(id.to_owned(), container);
            return;
        };
        process.starting = false;
        process.guards.clear();
        let pid = if status == 0 {
            disk::read_pid(&bundle.join(format!("{exec_id}.pid"))).and_then(|pid| {
                process.pid = pid;
                self.open_terminal(&bundle, process, &mut None)?;
                Ok(pid)
            })
        } else {
            let why = if status == u32::from(job::FAILED) {
                text.to_owned()
            } else {
                format!("OCI runtime exec failed: {}", runtime::failure(&bundle, mark, text, status))
            };
            Err(RpcError::new(code::UNKNOWN, why))
        };
        match pid {
            Ok(pid) => {
                process.state = State::Running;
                process.spec = Vec::new();
                self.containers.insert(id.to_owned(), container);
                let started = event::TaskExecStarted { container_id: id.to_owned(), exec_id: exec_id.to_owned(), pid };
                self.write_task(id);
                self.publish("/tasks/exec-started", "TaskExecStarted", &started);
                self.answer_with(reply, &StartResponse { pid });
                self.take_early_exit(id, exec_id, pid);
            }
            Err(error) => {
                if process.pid != 0 {
                    let _ = linux::child::send_signal(process.pid, 9);
                }
                process.console = None;
                // As containerd's: what was never started has ended with 255.
                let exit = Exit::now(255);
                process.state = State::Stopped(exit);
                let waiters = std::mem::take(&mut process.waiters);
                self.close_process(process);
                self.containers.insert(id.to_owned(), container);
                for waiter in waiters {
                    self.answer_with(waiter, &WaitResponse { exit_status: exit.status, exited_at: Some(exit.at()) });
                }
                self.answer(reply, Err(error));
            }
        }
        self.release_exit(id, false);
    }

    fn failed(&self, id: &str, mark: u64, status: u32, text: &str, what: &str) -> RpcError {
        let why = match self.containers.get(id) {
            Some(container) => runtime::failure(&container.bundle, mark, text, status),
            None => text.to_owned(),
        };
        let gone = ["process already finished", "container not running", "no such process", "does not exist"];
        if what == "kill" && gone.iter().any(|part| why.contains(part)) {
            return RpcError::new(code::NOT_FOUND, format!("process already finished: {why}: not found"));
        }
        RpcError::new(code::UNKNOWN, format!("OCI runtime {what} failed: {why}"))
    }

    /// A kill, pause, resume or update has ended.
    pub(crate) fn operated(&mut self, id: &str, reply: Reply, mark: u64, status: u32, text: &str, what: &'static str) {
        let answer: Answer = if status == 0 { Ok(Vec::new()) } else { Err(self.failed(id, mark, status, text, what)) };
        if let Some(container) = self.containers.get_mut(id) {
            container.busy = false;
            let done = answer.is_ok();
            let (state, topic, kind) = match (what, container.init.state) {
                ("pause", State::Running) if done => (State::Paused, "/tasks/paused", "TaskPaused"),
                ("resume", State::Paused) if done => (State::Running, "/tasks/resumed", "TaskResumed"),
                (_, state) => (state, "", ""),
            };
            container.init.state = state;
            self.write_task(id);
            if !topic.is_empty() {
                self.publish(topic, kind, &event::TaskPaused { container_id: id.to_owned() });
            }
        }
        self.answer(reply, answer);
        self.next_operation(id);
    }

    /// A process of a container has ended (and is on disk as such).
    pub(crate) fn process_exited(&mut self, id: &str, exec_id: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Ok(process) = container.process_mut(exec_id) else { return };
        if process.starting {
            process.early_exit = Some(exit);
            return;
        }
        let outputs = process.outputs.clone();
        for output in outputs {
            self.streams.drain(&self.epoll, output);
        }
        if exec_id.is_empty() {
            self.init_exited(id, exit);
        } else {
            self.tell_exit(id, exec_id, exit);
            self.release_exit(id, false);
        }
    }

    fn init_exited(&mut self, id: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.held_exit = Some(exit);
        if container.own_pid_namespace {
            self.release_exit(id, false);
            return;
        }
        // Nobody else ends what shares its PID namespace with others.
        container.killing_all = true;
        let line = container.runtime.line(&container.bundle, &["kill", "--all", id, "9"]);
        let spawned = self.spawn(Then::KilledAll { id: id.to_owned() }, |pipe| job::command(line, None, pipe));
        if let Err(error) = spawned {
            self.killed_all(id, 1, &error.message);
        }
    }

    /// All processes of a container whose first has ended were signalled.
    pub(crate) fn killed_all(&mut self, id: &str, status: u32, text: &str) {
        if status != 0 {
            say!("failed to kill what is left of container {id}: {}", text.trim());
        }
        if let Some(container) = self.containers.get_mut(id) {
            container.killing_all = false;
        }
        self.release_exit(id, false);
    }

    /// Tells the first process' exit, once all its execs' are told (or, `at_last`, in any case).
    pub(crate) fn release_exit(&mut self, id: &str, at_last: bool) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Some(exit) = container.held_exit else { return };
        let left = container.killing_all || container.execs.values().any(|process| process.starting || process.state == State::Running);
        if left && !at_last {
            let timer = Timer::ReleaseExit(id.to_owned());
            if !self.timers.iter().any(|(_, other)| *other == timer) {
                self.timers.push((Instant::now() + EXECS_END, timer));
            }
            return;
        }
        container.held_exit = None;
        self.tell_exit(id, "", exit);
        self.write_task(id);
        self.next_operation(id);
        self.sandbox_container_ended();
    }

    fn tell_exit(&mut self, id: &str, exec_id: &str, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let Ok(process) = container.process_mut(exec_id) else { return };
        process.state = State::Stopped(exit);
        let (pid, waiters) = (process.pid, std::mem::take(&mut process.waiters));
        let told = event::TaskExit {
            container_id: id.to_owned(),
            id: if exec_id.is_empty() { id } else { exec_id }.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(exit.at()),
        };
        for waiter in waiters {
            self.answer_with(waiter, &WaitResponse { exit_status: exit.status, exited_at: Some(exit.at()) });
        }
        self.publish("/tasks/exit", "TaskExit", &told);
    }

    /// The container's `delete` has ended.
    pub(crate) fn deleted(&mut self, id: &str, reply: Reply, mark: u64, status: u32, text: &str) {
        if status != 0 {
            let error = if status == u32::from(job::FAILED) {
                RpcError::new(code::UNKNOWN, text.to_owned())
            } else {
                self.failed(id, mark, status, text, "delete")
            };
            if let Some(container) = self.containers.get_mut(id) {
                container.busy = false;
            }
            self.answer(reply, Err(error));
            self.next_operation(id);
            return;
        }
        let Some(container) = self.containers.get(id) else { return };
        let exit = container.init.state.exit();
        let (pid, exit_status) = (container.init.pid, exit.map_or(0, |exit| exit.status));
        let exited_at = Some(exit.map_or_else(never, |exit| exit.at()));
        let deleted = event::TaskDelete { container_id: id.to_owned(), pid, exit_status, exited_at, ..event::TaskDelete::default() };
        disk::remove_task(&container.bundle);
        self.forget(id);
        self.publish("/tasks/delete", "TaskDelete", &deleted);
        self.answer_with(reply, &DeleteResponse { pid, exit_status, exited_at });
        self.sandbox_container_ended();
    }
}

/// How an operation began.
enum Begun {
    /// It is done; the answer.
    Done(Vec<u8>),
    /// Its child runs.
    UnderWay,
    /// It has to wait for something that is on its way.
    Later,
}

impl Shim {
    /// Closes the logs that no container and no stream uses any more.
    fn close_unused_logs(&mut self) {
        let used: Vec<_> = self.containers.values().filter_map(|container| container.log).collect();
        self.streams.close_logs_but(&used);
    }
}
