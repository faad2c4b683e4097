//! The Sandbox service: the pod's namespaces, made, entered and pinned by the shim.
//!
//! ```text
//! CreateSandbox --> Creating --> Created --StartSandbox--> Ready --StopSandbox, pause's end--> Stopped
//!                      |                                                                         |
//!                    failed: none                                            ShutdownSandbox --> the shim ends
//! ```

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use linux::namespace::{self, Kind};
use protocols::shim::pod::{self, NamespaceMode, PodSandboxConfig};
use protocols::shim::sandbox::v1::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse, STATE_NOTREADY, STATE_READY,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use protocols::shim::types::{Metric, Platform};
use protocols::ttrpc::{RpcError, code};
use serde::{Deserialize, Serialize};

use crate::daemon::{Shim, Then, Timer};
use crate::disk::{self, VERSION};
use crate::process::{Exit, OPERATIONS_MAX, State, check_id, timestamp};
use crate::server::Reply;
use crate::task::{Now, now, read};
use crate::{job, pause, stats};

/// The file of the pause process' pid in the sandbox' bundle.
pub(crate) const PAUSE_PID: &str = "pause.pid";
/// The record in the sandbox' bundle.
pub(crate) const RECORD: &str = "sandbox.json";
/// The directory of the pins in the sandbox' bundle.
pub(crate) const PINS: &str = "ns";

/// What a pod asks of its sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) net: bool,
    pub(crate) ipc: bool,
    pub(crate) uts: bool,
    pub(crate) pause: bool,
    pub(crate) hostname: String,
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) cgroup_parent: String,
}

/// The sandbox' place in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    Creating,
    Created,
    Ready,
    Stopped(Exit),
}

/// The pod sandbox.
#[derive(Debug)]
pub struct Sandbox {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) plan: Plan,
    pub(crate) stage: Stage,
    pub(crate) created_at: prost_types::Timestamp,
    /// The pause process; 0: there is none.
    pub(crate) pause: u32,
    waiters: Vec<Reply>,
    stopping: Vec<Reply>,
    shutting_down: bool,
}

/// `sandbox.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) plan: Plan,
    pub(crate) pause: u32,
    pub(crate) pause_start_time: u64,
    pub(crate) stage: Stage,
    /// Where its containers' records are.
    pub(crate) bundles: Vec<String>,
    /// Where the sandbox' bundle is.
    pub(crate) bundle: PathBuf,
    pub(crate) netns: String,
    pub(crate) socket: PathBuf,
    pub(crate) created_seconds: i64,
    pub(crate) created_nanos: i32,
}

impl Record {
    /// Where the writing of logs is noted.
    pub(crate) fn cursor(&self) -> PathBuf {
        self.bundle.join("cursor")
    }
}

/// Decides what the sandbox is, from the pod's configuration.
///
/// # Errors
/// `InvalidArgument`: a sysctl that is not the pod's own to set, or a hostname that is too long.
pub(crate) fn plan(config: &PodSandboxConfig, netns: &str) -> Result<Plan, RpcError> {
    let linux = config.linux.clone().unwrap_or_default();
    let options = linux.security_context.unwrap_or_default().namespace_options.unwrap_or_default();
    let host_network = options.network() == NamespaceMode::Node;
    let plan = Plan {
        net: !netns.is_empty() && !host_network,
        ipc: options.ipc() != NamespaceMode::Node,
        uts: !host_network,
        pause: options.pid() == NamespaceMode::Pod,
        hostname: config.hostname.clone(),
        sysctls: linux.sysctls.into_iter().map(|(name, value)| (name.replace('/', "."), value)).collect(),
        cgroup_parent: linux.cgroup_parent,
    };
    if plan.hostname.len() > 64 {
        let text = format!("hostname {:?} is longer than 64 bytes", plan.hostname);
        return Err(RpcError::new(code::INVALID_ARGUMENT, text));
    }
    for name in plan.sysctls.keys() {
        check_sysctl(name, &plan)?;
    }
    Ok(plan)
}

/// Only what a namespace of the pod's own holds may be set (as runc's validation; the same names).
fn check_sysctl(name: &str, plan: &Plan) -> Result<(), RpcError> {
    const IPC: [&str; 9] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.shm_next_id",
    ];
    let refuse = |why: &str| Err(RpcError::new(code::INVALID_ARGUMENT, format!("sysctl {name:?} {why}")));
    if name.split('.').any(|part| part.is_empty() || part == "..") {
        return refuse("is not a name");
    }
    if name.starts_with("net.") {
        return if plan.net { Ok(()) } else { refuse("needs a network namespace of the pod's own") };
    }
    if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        return if plan.ipc { Ok(()) } else { refuse("needs an IPC namespace of the pod's own") };
    }
    refuse("is not of a namespace: it would change the host")
}

fn not_found(id: &str) -> RpcError {
    RpcError::new(code::NOT_FOUND, format!("sandbox {id} does not exist: not found"))
}

impl Shim {
    pub(crate) fn sandbox_call(&mut self, method: &str, payload: &[u8], reply: Reply) -> Now {
        match method {
            "CreateSandbox" => self.create_sandbox(read(payload)?, reply),
            "StartSandbox" => self.start_sandbox(&read::<StartSandboxRequest>(payload)?.sandbox_id),
            "Platform" => self.platform(&read(payload)?),
            "StopSandbox" => self.stop_sandbox(&read(payload)?, reply),
            "WaitSandbox" => self.wait_sandbox(&read::<WaitSandboxRequest>(payload)?.sandbox_id, reply),
            "SandboxStatus" => self.sandbox_status(&read(payload)?),
            "PingSandbox" => {
                self.sandbox(&read::<PingRequest>(payload)?.sandbox_id)?;
                now(&PingResponse {})
            }
            "ShutdownSandbox" => self.shutdown_sandbox(&read::<ShutdownSandboxRequest>(payload)?.sandbox_id, reply),
            "SandboxMetrics" => self.sandbox_metrics(&read::<SandboxMetricsRequest>(payload)?.sandbox_id),
            _ => Err(RpcError::new(code::UNIMPLEMENTED, format!("method {method} of the sandbox service is not implemented"))),
        }
    }

    fn sandbox(&self, id: &str) -> Result<&Sandbox, RpcError> {
        self.sandbox.as_ref().filter(|sandbox| sandbox.id == id).ok_or_else(|| not_found(id))
    }

    fn sandbox_mut(&mut self, id: &str) -> Result<&mut Sandbox, RpcError> {
        self.sandbox.as_mut().filter(|sandbox| sandbox.id == id).ok_or_else(|| not_found(id))
    }

    fn create_sandbox(&mut self, request: CreateSandboxRequest, reply: Reply) -> Now {
        check_id("sandbox id", &request.sandbox_id)?;
        if let Some(sandbox) = &self.sandbox {
            let text = format!("this shim serves sandbox {} already", sandbox.id);
            return Err(RpcError::new(code::ALREADY_EXISTS, text));
        }
        let config = match &request.options {
            None => PodSandboxConfig::default(),
            Some(any) if any.type_url.rsplit('/').next() == Some(pod::TYPE_URL) => read(&any.value)?,
            Some(any) => {
                let text = format!("sandbox options of type {:?} are not known", any.type_url);
                return Err(RpcError::new(code::INVALID_ARGUMENT, text));
            }
        };
        let plan = plan(&config, &request.netns_path)?;
        let bundle = PathBuf::from(&request.bundle_path);
        if !bundle.is_absolute() {
            let text = format!("bundle_path {:?} is not absolute", request.bundle_path);
            return Err(RpcError::new(code::INVALID_ARGUMENT, text));
        }
        self.enter(&plan, &request.netns_path)?;
        if let Ok(cursor) = cri_log::Cursor::open(&bundle.join("cursor")) {
            self.streams.set_cursor(cursor);
        }
        let sandbox = Sandbox {
            id: request.sandbox_id,
            bundle: bundle.clone(),
            plan: plan.clone(),
            stage: Stage::Creating,
            created_at: timestamp(),
            pause: 0,
            waiters: Vec::new(),
            stopping: Vec::new(),
            shutting_down: false,
        };
        self.netns = request.netns_path;
        self.sandbox = Some(sandbox);
        let spawned = self.spawn(Then::SandboxMade { reply }, |pipe| job::work(|| set_up(&plan, &bundle), &pipe));
        if spawned.is_err() {
            self.sandbox = None;
        }
        spawned.map(|()| None)
    }

    /// Moves the shim itself into the pod's namespaces: calls of microseconds, and of no child's.
    fn enter(&self, plan: &Plan, netns: &str) -> Result<(), RpcError> {
        let said =
            |what: &str, error: linux::Error| RpcError::new(code::UNKNOWN, format!("failed to {what}: {}", std::io::Error::from(error)));
        if plan.net {
            namespace::open(Path::new(netns), Kind::Net)
                .and_then(|namespace| namespace::join(namespace.as_fd(), Kind::Net))
                .map_err(|error| said(&format!("enter network namespace {netns}"), error))?;
        }
        if plan.ipc {
            namespace::unshare(&[Kind::Ipc]).map_err(|error| said("make the pod's IPC namespace", error))?;
        }
        if plan.uts {
            namespace::unshare(&[Kind::Uts]).map_err(|error| said("make the pod's UTS namespace", error))?;
            if !plan.hostname.is_empty() {
                namespace::set_hostname(&plan.hostname).map_err(|error| said(&format!("set hostname {:?}", plan.hostname), error))?;
            }
        }
        Ok(())
    }

    /// The sandbox' set-up has ended.
    pub(crate) fn sandbox_made(&mut self, reply: Reply, status: u32, text: &str) {
        let Some(sandbox) = self.sandbox.as_mut() else { return };
        if status == 0 {
            let pause = if sandbox.plan.pause { disk::read_pid(&sandbox.bundle.join(PAUSE_PID)) } else { Ok(0) };
            match pause {
                Ok(pid) => {
                    sandbox.pause = pid;
                    sandbox.stage = Stage::Created;
                    self.write_sandbox();
                    if let Some(exit) = self.early.remove(&pid) {
                        self.sandbox_process_ended(pid, exit);
                    }
                    self.answer_with(reply, &CreateSandboxResponse {});
                }
                Err(error) => self.sandbox_failed(reply, error),
            }
            return;
        }
        self.sandbox_failed(reply, RpcError::new(code::UNKNOWN, text.to_owned()));
    }

    /// A shim whose sandbox could not be made has entered namespaces and is of no other use: it ends when it is told to.
    fn sandbox_failed(&mut self, reply: Reply, error: RpcError) {
        let Some(sandbox) = self.sandbox.as_mut() else { return };
        sandbox.stage = Stage::Stopped(Exit::now(255));
        let bundle = sandbox.bundle.clone();
        let then = Then::Undone { reply, error: error.clone() };
        if self.spawn(then, |pipe| job::work(|| take_down(&bundle), &pipe)).is_err() {
            self.answer(reply, Err(error));
        }
    }

    pub(crate) fn write_sandbox(&self) {
        let Some(sandbox) = &self.sandbox else { return };
        let record = Record {
            version: VERSION,
            id: sandbox.id.clone(),
            plan: sandbox.plan.clone(),
            pause: sandbox.pause,
            pause_start_time: if sandbox.pause == 0 { 0 } else { disk::start_time(sandbox.pause) },
            stage: sandbox.stage,
            bundles: self.containers.values().map(|one| one.bundle.display().to_string()).collect(),
            bundle: sandbox.bundle.clone(),
            netns: self.netns.clone(),
            socket: self.setting.socket.clone(),
            created_seconds: sandbox.created_at.seconds,
            created_nanos: sandbox.created_at.nanos,
        };
        let path = sandbox.bundle.join(RECORD);
        if let Err(error) = disk::write(&path, &record) {
            say!("failed to write {}: {error}", path.display());
        }
    }

    fn start_sandbox(&mut self, id: &str) -> Now {
        let sandbox = self.sandbox_mut(id)?;
        if sandbox.stage != Stage::Created {
            let text = format!("sandbox {id} cannot be started: it is not in state created");
            return Err(RpcError::new(code::FAILED_PRECONDITION, text));
        }
        sandbox.stage = Stage::Ready;
        self.write_sandbox();
        let sandbox = self.sandbox(id)?;
        let spec = Some(sandbox.spec(&self.netns));
        now(&StartSandboxResponse { pid: sandbox.pid(), created_at: Some(sandbox.created_at), spec })
    }

    fn platform(&self, request: &PlatformRequest) -> Now {
        self.sandbox(&request.sandbox_id)?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = Platform { os: "linux".to_owned(), architecture: architecture.to_owned(), ..Platform::default() };
        now(&PlatformResponse { platform: Some(platform) })
    }

    fn sandbox_status(&self, request: &SandboxStatusRequest) -> Now {
        let sandbox = self.sandbox(&request.sandbox_id)?;
        let exited_at = match sandbox.stage {
            Stage::Stopped(exit) => Some(exit.at()),
            _ => None,
        };
        let info = if request.verbose {
            BTreeMap::from([
                ("shim_pid".to_owned(), std::process::id().to_string()),
                ("containers".to_owned(), self.containers.len().to_string()),
            ])
        } else {
            BTreeMap::new()
        };
        now(&SandboxStatusResponse {
            sandbox_id: sandbox.id.clone(),
            pid: sandbox.pid(),
            state: if sandbox.stage == Stage::Ready { STATE_READY } else { STATE_NOTREADY }.to_owned(),
            info: info.into_iter().collect(),
            created_at: Some(sandbox.created_at),
            exited_at,
            extra: None,
        })
    }

    fn sandbox_metrics(&self, id: &str) -> Now {
        let sandbox = self.sandbox(id)?;
        let mut cgroups = Vec::new();
        if !sandbox.plan.cgroup_parent.is_empty() {
            cgroups = stats::cgroups_at(&sandbox.plan.cgroup_parent);
        }
        if cgroups.is_empty() {
            // Without a cgroup of the pod's own: a container's, or none.
            cgroups = self.containers.values().next().map(|container| container.cgroups.clone()).unwrap_or_default();
        }
        let metric = Metric { timestamp: Some(timestamp()), id: id.to_owned(), data: Some(stats::metrics(&cgroups)) };
        now(&SandboxMetricsResponse { metrics: Some(metric) })
    }

    fn wait_sandbox(&mut self, id: &str, reply: Reply) -> Now {
        let sandbox = self.sandbox_mut(id)?;
        if let Stage::Stopped(exit) = sandbox.stage {
            return now(&WaitSandboxResponse { exit_status: exit.status, exited_at: Some(exit.at()) });
        }
        if sandbox.waiters.len() >= OPERATIONS_MAX {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{OPERATIONS_MAX} calls wait already")));
        }
        sandbox.waiters.push(reply);
        Ok(None)
    }

    fn stop_sandbox(&mut self, request: &StopSandboxRequest, reply: Reply) -> Now {
        let sandbox = self.sandbox_mut(&request.sandbox_id)?;
        if sandbox.stopping.len() >= OPERATIONS_MAX {
            return Err(RpcError::new(code::RESOURCE_EXHAUSTED, format!("{OPERATIONS_MAX} calls stop it already")));
        }
        sandbox.stopping.push(reply);
        if request.timeout_secs == 0 {
            self.signal_sandbox(9);
        } else {
            self.signal_sandbox(15);
            let due = Instant::now() + Duration::from_secs(u64::from(request.timeout_secs));
            self.timers.push((due, Timer::KillSandbox));
        }
        self.sandbox_container_ended();
        Ok(None)
    }

    /// Signals the first process of every container that runs.
    pub(crate) fn signal_sandbox(&mut self, signal: u32) {
        for container in self.containers.values() {
            let alive = container.init.state.exit().is_none() && container.held_exit.is_none();
            if alive && container.init.pid != 0 {
                // ESRCH: its exit is on its way.
                let _ = self.signal(container.init.pid, signal);
                if signal == 9 && container.init.state == State::Paused {
                    thaw(&container.cgroups);
                }
            }
        }
    }

    /// Whether all of the sandbox has ended, if it is being stopped: then its pause process goes, and it is told.
    pub(crate) fn sandbox_container_ended(&mut self) {
        let live = self.containers.values().any(|container| container.init.state.exit().is_none());
        let Some(sandbox) = self.sandbox.as_mut() else { return };
        if (sandbox.stopping.is_empty() && !sandbox.shutting_down) || live {
            return;
        }
        let pause = sandbox.pause;
        if pause != 0 {
            // Its exit brings this to its end.
            let _ = self.signal(pause, 9);
            return;
        }
        self.sandbox_stopped(Exit::now(0));
    }

    fn sandbox_stopped(&mut self, exit: Exit) {
        let Some(sandbox) = self.sandbox.as_mut() else { return };
        let exit = match sandbox.stage {
            Stage::Stopped(earlier) => earlier,
            _ => exit,
        };
        sandbox.stage = Stage::Stopped(exit);
        let (waiters, stopping) = (std::mem::take(&mut sandbox.waiters), std::mem::take(&mut sandbox.stopping));
        self.write_sandbox();
        for waiter in waiters {
            self.answer_with(waiter, &WaitSandboxResponse { exit_status: exit.status, exited_at: Some(exit.at()) });
        }
        for reply in stopping {
            self.answer_with(reply, &StopSandboxResponse {});
        }
    }

    /// A child has ended that is no container's; `true` if it was the pause process.
    pub(crate) fn sandbox_process_ended(&mut self, pid: u32, exit: Exit) -> bool {
        let Some(sandbox) = self.sandbox.as_mut() else { return false };
        if sandbox.pause == 0 || sandbox.pause != pid {
            return false;
        }
        sandbox.pause = 0;
        // With process 1 gone the kernel ends the whole PID namespace, and the sandbox with it.
        self.sandbox_stopped(exit);
        true
    }

    fn shutdown_sandbox(&mut self, id: &str, reply: Reply) -> Now {
        if id == self.setting.id && self.serves_nothing() {
            // Its daemon ended before it asked for a sandbox: nobody else will tell this shim to end.
            self.end();
            return now(&ShutdownSandboxResponse {});
        }
        let sandbox = self.sandbox_mut(id)?;
        sandbox.shutting_down = true;
        self.signal_sandbox(9);
        let Some(sandbox) = self.sandbox.as_ref() else { return Err(not_found(id)) };
        let pause = sandbox.pause;
        if pause != 0 {
            let _ = self.signal(pause, 9);
        }
        let bundle = sandbox.bundle.clone();
        let left: Vec<_> = self
            .containers
            .values()
            .map(|container| {
                let line = container.runtime.line(&container.bundle, &["delete", "--force", &container.id]);
                (line, container.bundle.clone(), container.mounted)
            })
            .collect();
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        let work = move || {
            let mut errors = Vec::new();
            for (line, bundle, mounted) in left {
                let code = line.run();
                if code != 0 {
                    errors.push(format!("the runtime's delete of {} ended with {code}", bundle.display()));
                }
                if mounted && let Err(error) = linux::mount::unmount_all(&bundle.join("rootfs"), true).map_err(std::io::Error::from) {
                    errors.push(format!("failed to unmount {}/rootfs: {error}", bundle.display()));
                }
                disk::remove_task(&bundle);
            }
            errors.extend(take_down(&bundle).err());
            if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
        };
        self.spawn(Then::SandboxGone { reply }, |pipe| job::work(work, &pipe))?;
        for id in ids {
            self.forget(&id);
        }
        Ok(None)
    }

    /// The sandbox' removal has ended: the shim ends if it succeeded.
    pub(crate) fn sandbox_gone(&mut self, reply: Reply, status: u32, text: &str) {
        if status != 0 {
            self.answer(reply, Err(RpcError::new(code::UNKNOWN, format!("failed to remove the sandbox: {text}"))));
            return;
        }
        self.sandbox_stopped(Exit::now(137));
        if let Some(sandbox) = self.sandbox.take() {
            self.drop_kept(&sandbox.bundle);
        }
        self.answer_with(reply, &ShutdownSandboxResponse {});
        self.end();
    }
}

impl Sandbox {
    /// The sandbox as its record has it.
    pub(crate) fn restored(record: &Record, bundle: &Path, stage: Stage) -> Self {
        Self {
            id: record.id.clone(),
            bundle: bundle.to_owned(),
            plan: record.plan.clone(),
            stage,
            created_at: prost_types::Timestamp { seconds: record.created_seconds, nanos: record.created_nanos },
            pause: record.pause,
            waiters: Vec::new(),
            stopping: Vec::new(),
            shutting_down: false,
        }
    }

    /// The sandbox as an OCI spec (containerd keeps it, and complains of a missing one at each event).
    fn spec(&self, netns: &str) -> prost_types::Any {
        let pin = |kind: Kind| self.bundle.join(PINS).join(kind.proc_name()).display().to_string();
        let namespaces: Vec<_> =
            [(self.plan.net, "network", netns.to_owned()), (self.plan.ipc, "ipc", pin(Kind::Ipc)), (self.plan.uts, "uts", pin(Kind::Uts))]
                .into_iter()
                .filter(|(own, _, _)| *own)
                .map(|(_, kind, path)| serde_json::json!({ "type": kind, "path": path }))
                .collect();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": self.plan.hostname,
            "linux": {
                "namespaces": namespaces,
                "sysctl": self.plan.sysctls,
                "cgroupsPath": self.plan.cgroup_parent,
            },
        });
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned();
        prost_types::Any { type_url, value: spec.to_string().into_bytes() }
    }

    /// A process inside the pod's namespaces.
    fn pid(&self) -> u32 {
        match self.stage {
            Stage::Stopped(_) => 0,
            _ if self.pause != 0 => self.pause,
            _ => std::process::id(),
        }
    }
}

/// Thaws a frozen cgroup, so that what was killed in it can end.
fn thaw(cgroups: &[(String, PathBuf)]) {
    for (controller, dir) in cgroups {
        let (file, word) = match controller.as_str() {
            "freezer" => ("freezer.state", "THAWED"),
            "" => ("cgroup.freeze", "0"),
            _ => continue,
        };
        // Where it is not frozen, or not there, nothing is to be done.
        let _ = std::fs::write(dir.join(file), word);
    }
}

/// In a child: pins, sysctls, and the pause process.
fn set_up(plan: &Plan, bundle: &Path) -> Result<(), String> {
    let pins = bundle.join(PINS);
    std::fs::create_dir_all(&pins).map_err(|error| format!("failed to make {}: {error}", pins.display()))?;
    for (wanted, kind) in [(plan.ipc, Kind::Ipc), (plan.uts, Kind::Uts)] {
        if wanted {
            let path = pins.join(kind.proc_name());
            namespace::pin(0, kind, &path).map_err(|error| format!("failed to pin {}: {}", path.display(), std::io::Error::from(error)))?;
        }
    }
    for (name, value) in &plan.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        std::fs::write(&path, value).map_err(|error| format!("failed to set sysctl {name} to {value:?}: {error}"))?;
    }
    if plan.pause { pause::make(bundle) } else { Ok(()) }
}

/// In a child: undoes [`set_up`], as far as it went.
pub(crate) fn take_down(bundle: &Path) -> Result<(), String> {
    let pins = bundle.join(PINS);
    let mut errors = Vec::new();
    for kind in [Kind::Ipc, Kind::Uts] {
        let path = pins.join(kind.proc_name());
        if let Err(error) = namespace::unpin(&path).map_err(std::io::Error::from) {
            errors.push(format!("failed to unpin {}: {error}", path.display()));
        }
    }
    // Not empty, or not there: then there is nothing of ours to remove.
    let _ = std::fs::remove_dir(&pins);
    let _ = std::fs::remove_dir(bundle.join(pause::WORKDIR));
    for name in [RECORD, PAUSE_PID, "cursor"] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocols::shim::pod::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    fn config(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode, sysctl: &str) -> PodSandboxConfig {
        let options = NamespaceOption { network: network as i32, pid: pid as i32, ipc: ipc as i32, ..Default::default() };
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let sysctls = if sysctl.is_empty() { Vec::new() } else { vec![(sysctl.to_owned(), "1".to_owned())] };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), sysctls: sysctls.into_iter().collect(), ..Default::default() };
        PodSandboxConfig { hostname: "h".into(), linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn namespaces_follow_the_options() {
        use NamespaceMode::{Container, Node, Pod};
        let own = plan(&config(Pod, Container, Pod, "net.core.somaxconn"), "/n").expect("valid");
        assert!(own.net && own.ipc && own.uts && !own.pause);
        let host = plan(&config(Node, Node, Node, ""), "").expect("valid");
        assert!(!host.net && !host.ipc && !host.uts && !host.pause);
        assert!(plan(&config(Pod, Pod, Pod, "kernel.shmmax"), "/n").expect("valid").pause);
    }

    #[test]
    fn sysctls_of_the_host_are_refused() {
        use NamespaceMode::{Node, Pod};
        for (network, ipc, name) in
            [(Pod, Pod, "kernel.panic"), (Node, Pod, "net.ipv4.ip_forward"), (Pod, Node, "kernel.shmmax"), (Pod, Pod, "net...x")]
        {
            let error = plan(&config(network, Pod, ipc, name), "/n").expect_err(name);
            assert_eq!(error.code, code::INVALID_ARGUMENT);
            assert!(error.message.contains(name), "{}", error.message);
        }
    }
}
