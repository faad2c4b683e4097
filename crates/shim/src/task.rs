//! The Task service: calls in, answers out. What takes time goes on in `life.rs` when its child has ended.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use prost::Message;
use protocols::shim::events as event;
use protocols::shim::options::{self, runc::Options};
use protocols::shim::task::v3::{
    CloseIoRequest, ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse,
    StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protocols::shim::task::{ProcessInfo, Status};
use protocols::ttrpc::{RpcError, code};

use crate::daemon::{Shim, Then, Timer};
use crate::job::{self, Launch};
use crate::process::{Container, OPERATIONS_MAX, Operation, Process, State, Stdio, check_id, never};
use crate::runtime::{self, Runtime};
use crate::server::Reply;
use crate::stats;

/// The answer to give now, or `None` if it comes later.
pub(crate) type Now = Result<Option<Vec<u8>>, RpcError>;

/// How long streams may outlive their container's removal.
const STREAMS_OUTLIVE: Duration = Duration::from_secs(10);

pub(crate) fn read<T: Message + Default>(payload: &[u8]) -> Result<T, RpcError> {
    T::decode(payload).map_err(|error| RpcError::new(code::INVALID_ARGUMENT, format!("request is not valid: {error}")))
}

pub(crate) fn now(message: &impl Message) -> Now {
    Ok(Some(message.encode_to_vec()))
}

pub(crate) fn no_container(id: &str) -> RpcError {
    RpcError::new(code::NOT_FOUND, format!("container {id} does not exist: not found"))
}

fn precondition(text: String) -> RpcError {
    RpcError::new(code::FAILED_PRECONDITION, text)
}

impl Shim {
    pub(crate) fn task_call(&mut self, method: &str, payload: &[u8], reply: Reply) -> Now {
        match method {
            "Create" => self.create(read(payload)?, reply),
            "Start" => self.start(read(payload)?, reply),
            "State" => self.state(&read(payload)?),
            "Delete" => self.delete(&read(payload)?, reply),
            "Kill" => self.kill(&read(payload)?, reply),
            "Exec" => self.exec(read(payload)?),
            "CloseIO" => self.close_io(&read(payload)?),
            "ResizePty" => self.resize(&read(payload)?),
            "Pause" => self.operate(&read::<PauseRequest>(payload)?.id, Operation::Pause, reply),
            "Resume" => self.operate(&read::<ResumeRequest>(payload)?.id, Operation::Resume, reply),
            "Update" => self.update(read(payload)?, reply),
            "Pids" => self.pids(&read(payload)?),
            "Stats" => self.stats(&read(payload)?),
            "Wait" => self.wait(&read(payload)?, reply),
            "Connect" => self.connect(&read(payload)?),
            "Shutdown" => self.shutdown(&read(payload)?),
            _ => Err(RpcError::new(code::UNIMPLEMENTED, format!("method {method} of the task service is not implemented"))),
        }
    }

    pub(crate) fn container(&self, id: &str) -> Result<&Container, RpcError> {
        self.containers.get(id).ok_or_else(|| no_container(id))
    }

    pub(crate) fn container_mut(&mut self, id: &str) -> Result<&mut Container, RpcError> {
        self.containers.get_mut(id).ok_or_else(|| no_container(id))
    }

    fn create(&mut self, request: CreateTaskRequest, reply: Reply) -> Now {
        check_id("container id", &request.id)?;
        if self.ending {
            return Err(RpcError::new(code::UNAVAILABLE, "the shim is shutting down"));
        }
        if self.containers.contains_key(&request.id) {
            return Err(RpcError::new(code::ALREADY_EXISTS, format!("container {} already exists", request.id)));
        }
        if !request.checkpoint.is_empty() {
            return Err(RpcError::new(code::UNIMPLEMENTED, "restoring from a checkpoint is not implemented"));
        }
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(RpcError::new(code::INVALID_ARGUMENT, format!("bundle {:?} is not absolute", request.bundle)));
        }
        let options = runc_options(request.options.as_ref())?;
        let runtime = Runtime::new(&options, &self.setting.namespace);
        let stdio = Stdio { terminal: request.terminal, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
        let mut container = Container {
            id: request.id.clone(),
            bundle: bundle.clone(),
            runtime,
            init: Process::new("", stdio, Vec::new()),
            execs: BTreeMap::new(),
            busy: true,
            queue: VecDeque::new(),
            own_pid_namespace: false,
            log: None,
            cgroups: Vec::new(),
            oom: None,
            held_exit: None,
            killing_all: false,
            mounted: !request.rootfs.is_empty(),
        };
        let ends = self.open_streams(&bundle, &mut container.init, &mut container.log);
        let ends = match ends {
            Ok(ends) => ends,
            Err(error) => {
                self.close_process(&container.init);
                return Err(error);
            }
        };
        let console = container.init.console.as_ref().map(|console| console.path.clone());
        let line = container.runtime.create(&bundle, &request.id, console.as_deref());
        let mark = runtime::log_mark(&bundle);
        let launch = Launch { bundle, mounts: request.rootfs, ends, process: None, line };
        self.containers.insert(request.id.clone(), container);
        self.write_task(&request.id);
        self.write_sandbox();
        let then = Then::Created { id: request.id.clone(), reply, mark };
        if let Err(error) = self.spawn(then, |pipe| job::launch(launch, pipe)) {
            self.forget(&request.id);
            return Err(error);
        }
        Ok(None)
    }

    fn start(&mut self, request: StartRequest, reply: Reply) -> Now {
        if request.exec_id.is_empty() {
            return self.operate(&request.id, Operation::Start, reply);
        }
        let mut container = self.containers.remove(&request.id).ok_or_else(|| no_container(&request.id))?;
        let started = self.start_exec(&mut container, &request.exec_id, reply);
        self.containers.insert(request.id, container);
        started.map(|()| None)
    }

    fn start_exec(&mut self, container: &mut Container, exec_id: &str, reply: Reply) -> Result<(), RpcError> {
        if !matches!(container.init.state, State::Running | State::Created) {
            return Err(precondition(format!("container {} is not running: an exec cannot start", container.id)));
        }
        let (bundle, id) = (container.bundle.clone(), container.id.clone());
        container.process(exec_id)?;
        let Some(process) = container.execs.get_mut(exec_id) else { return Err(no_container(&id)) };
        if process.starting || process.state != State::Creating {
            return Err(precondition(format!("process {exec_id} of container {id} was started already")));
        }
        let opened = self.open_streams(&bundle, process, &mut None);
        let ends = match opened {
            Ok(ends) => ends,
            Err(error) => {
                self.close_process(process);
                return Err(error);
            }
        };
        let spec = bundle.join(format!("{exec_id}.process.json"));
        let console = process.console.as_ref().map(|console| console.path.clone());
        let line = container.runtime.exec(&bundle, &id, exec_id, &spec, console.as_deref());
        let mark = runtime::log_mark(&bundle);
        let launch = Launch { bundle, mounts: Vec::new(), ends, process: Some((spec, process.spec.clone())), line };
        process.starting = true;
        let then = Then::ExecStarted { id, exec_id: exec_id.to_owned(), reply, mark };
        self.spawn(then, |pipe| job::launch(launch, pipe)).inspect_err(|_| process.starting = false)
    }

    fn exec(&mut self, request: ExecProcessRequest) -> Now {
        check_id("exec id", &request.exec_id)?;
        let container = self.container_mut(&request.id)?;
        if container.execs.contains_key(&request.exec_id) {
            let text = format!("process {} already exists in container {}", request.exec_id, request.id);
            return Err(RpcError::new(code::ALREADY_EXISTS, text));
        }
        if !matches!(container.init.state, State::Running | State::Created) {
            return Err(precondition(format!("container {} is not running: cannot exec in it", request.id)));
        }
        let Some(spec) = request.spec else {
            return Err(RpcError::new(code::INVALID_ARGUMENT, "spec of the exec is missing"));
        };
        let stdio = Stdio { terminal: request.terminal, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
        container.execs.insert(request.exec_id.clone(), Process::new(&request.exec_id, stdio, spec.value));
        self.publish("/tasks/exec-added", "TaskExecAdded", &event::TaskExecAdded { container_id: request.id, exec_id: request.exec_id });
        now(&())
    }

    /// Queues an operation of the runtime on the container; those of one container go one after another.
    pub(crate) fn operate(&mut self, id: &str, operation: Operation, reply: Reply) -> Now {
        let container = self.container_mut(id)?;
        if container.queue.len() >= OPERATIONS_MAX {
            let text = format!("{OPERATIONS_MAX} operations wait for container {id}");
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, text));
        }
        container.queue.push_back((reply, operation));
        self.next_operation(id);
        Ok(None)
    }

    fn kill(&mut self, request: &KillRequest, reply: Reply) -> Now {
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            return self.operate(&request.id, Operation::Kill { signal: request.signal, all: request.all }, reply);
        }
        let process = container.process(&request.exec_id)?;
        let finished = || RpcError::new(code::NOT_FOUND, "process already finished: not found");
        match process.state {
            State::Running | State::Paused => match self.signal(process.pid, request.signal) {
                Ok(()) => now(&()),
                Err(error) if error.raw_os_error() == Some(3) => Err(finished()),
                Err(error) => Err(RpcError::new(
                    code::INVALID_ARGUMENT,
                    format!("failed to send signal {} to process {}: {error}", request.signal, request.exec_id),
                )),
            },
            State::Stopped(_) => Err(finished()),
            State::Creating | State::Created => Err(precondition(format!("process {} is not started", request.exec_id))),
        }
    }

    fn update(&mut self, request: UpdateTaskRequest, reply: Reply) -> Now {
        let Some(resources) = request.resources else {
            return Err(RpcError::new(code::INVALID_ARGUMENT, "resources are missing"));
        };
        self.operate(&request.id, Operation::Update(resources.value), reply)
    }

    fn state(&self, request: &StateRequest) -> Now {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.state.exit();
        now(&StateResponse {
            id: request.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: process.pid,
            status: process.state.status() as i32,
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: Some(exit.map_or_else(never, |exit| exit.at())),
            exec_id: request.exec_id.clone(),
        })
    }

    fn delete(&mut self, request: &DeleteRequest, reply: Reply) -> Now {
        if request.exec_id.is_empty() {
            return self.operate(&request.id, Operation::Delete, reply);
        }
        let container = self.container_mut(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.state.exit();
        if process.starting || (exit.is_none() && process.state != State::Creating) {
            return Err(precondition(format!("cannot delete process {} while it runs", request.exec_id)));
        }
        let answer = DeleteResponse {
            pid: process.pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: Some(exit.map_or_else(never, |exit| exit.at())),
        };
        let bundle = container.bundle.clone();
        if let Some(process) = container.execs.remove(&request.exec_id) {
            let rest = ["stdin", "stdout", "stderr", "pid", "process.json", "exit.json"];
            for name in rest {
                // Those that were never made are not there.
                let _ = std::fs::remove_file(bundle.join(process.file(name)));
            }
            self.leave_streams(&process);
        }
        self.write_task(&request.id);
        now(&answer)
    }

    /// Lets a removed process' output streams come to their end, and their readers come, by themselves, for a while.
    pub(crate) fn leave_streams(&mut self, process: &Process) {
        if let Some(input) = process.input {
            self.streams.close(input);
        }
        for id in &process.outputs {
            self.streams.drain(&self.epoll, *id);
        }
        let open: Vec<_> = process.outputs.iter().copied().filter(|id| self.streams.is_open(*id) || self.streams.is_awaited(*id)).collect();
        if !open.is_empty() {
            self.timers.push((Instant::now() + STREAMS_OUTLIVE, Timer::CloseStreams(open)));
        }
    }

    fn close_io(&mut self, request: &CloseIoRequest) -> Now {
        let container = self.container_mut(&request.id)?;
        let bundle = container.bundle.clone();
        let process = container.process_mut(&request.exec_id)?;
        if request.stdin {
            let path = (!process.stdio.terminal).then(|| bundle.join(process.file("stdin")));
            // The copy holds an end of its own and drops it when all that was written has gone through.
            process.stdin = None;
            let inputs: Vec<_> = process.input.into_iter().chain(process.attached_inputs.drain(..)).collect();
            for input in inputs {
                self.streams.end_input(input);
            }
            if let Some(path) = path {
                self.drop_kept(&path);
            }
        }
        now(&())
    }

    fn resize(&mut self, request: &ResizePtyRequest) -> Now {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let (Ok(columns), Ok(rows)) = (u16::try_from(request.width), u16::try_from(request.height)) else {
            let text = format!("terminal size {}x{} is beyond 65535", request.width, request.height);
            return Err(RpcError::new(code::INVALID_ARGUMENT, text));
        };
        match &process.master {
            Some(master) => linux::pipes::set_window(master, columns, rows)
                .map_err(|error| RpcError::new(code::UNKNOWN, format!("failed to resize the terminal: {error}")))?,
            // As containerd's: a stopped container's terminal may be resized, a process without one likewise.
            None if request.exec_id.is_empty() || process.state == State::Creating => {}
            None => return Err(RpcError::new(code::UNKNOWN, "the process has no terminal (any more)")),
        }
        now(&())
    }

    fn pids(&self, request: &PidsRequest) -> Now {
        let container = match self.containers.get(&request.id) {
            Some(container) => container,
            None => return Err(no_container(&request.id)),
        };
        let processes = stats::pids(&container.cgroups).into_iter().map(|pid| {
            let exec = container.execs.values().find(|process| process.pid == pid);
            let info = exec.map(|process| prost_types::Any {
                type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                value: options::runc::ProcessDetails { exec_id: process.exec_id.clone() }.encode_to_vec(),
            });
            ProcessInfo { pid, info }
        });
        now(&PidsResponse { processes: processes.collect() })
    }

    fn stats(&self, request: &StatsRequest) -> Now {
        let container = self.container(&request.id)?;
        if container.cgroups.is_empty() {
            return Err(RpcError::new(code::NOT_FOUND, format!("container {} has no cgroup: not found", request.id)));
        }
        now(&StatsResponse { stats: Some(stats::metrics(&container.cgroups)) })
    }

    fn wait(&mut self, request: &WaitRequest, reply: Reply) -> Now {
        let process = self.container_mut(&request.id)?.process_mut(&request.exec_id)?;
        if let Some(exit) = process.state.exit() {
            return now(&WaitResponse { exit_status: exit.status, exited_at: Some(exit.at()) });
        }
        if process.waiters.len() >= OPERATIONS_MAX {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{OPERATIONS_MAX} calls wait already")));
        }
        process.waiters.push(reply);
        Ok(None)
    }

    fn connect(&self, request: &ConnectRequest) -> Now {
        let task_pid = self.containers.get(&request.id).map_or(0, |container| container.init.pid);
        now(&ConnectResponse { shim_pid: std::process::id(), task_pid, version: String::new() })
    }

    fn shutdown(&mut self, _request: &ShutdownRequest) -> Now {
        if self.containers.is_empty() && self.sandbox.is_none() {
            self.end();
        }
        now(&())
    }

    pub(crate) fn publish(&mut self, topic: &str, kind: &str, event: &impl Message) {
        self.events.publish(&self.epoll, topic, kind, event);
    }

    /// What the wire calls the container's state, for messages.
    pub(crate) fn status_word(state: State) -> &'static str {
        match state.status() {
            Status::Created => "created",
            Status::Running => "running",
            Status::Stopped => "stopped",
            Status::Paused => "paused",
            _ => "unknown",
        }
    }
}

/// The options of containerd's runtime table: runc's, or none.
pub(crate) fn runc_options(options: Option<&prost_types::Any>) -> Result<Options, RpcError> {
    let Some(any) = options else { return Ok(Options::default()) };
    match any.type_url.rsplit('/').next().unwrap_or_default() {
        "" => Ok(Options::default()),
        options::RUNC_TYPE_URL => {
            let options: Options = read(&any.value)?;
            if !options.criu_image_path.is_empty() || !options.criu_work_path.is_empty() {
                return Err(RpcError::new(code::UNIMPLEMENTED, "runc options: checkpointing (criu) is not implemented"));
            }
            if options.io_uid != 0 || options.io_gid != 0 {
                let text = "runc options: IoUid and IoGid are not implemented: streams belong to the container's user";
                return Err(RpcError::new(code::UNIMPLEMENTED, text));
            }
            Ok(options)
        }
        options::GENERIC_TYPE_URL => Ok(Options::default()),
        other => Err(RpcError::new(code::INVALID_ARGUMENT, format!("runtime options of type {other:?} are not known"))),
    }
}
