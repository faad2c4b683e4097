//! Carries out the plan of a start: observe, decide ([`crate::plan`]), act.

use std::collections::HashSet;
use std::sync::Arc;

use protocols::cri::v1::{ContainerConfig, PodSandboxConfig};
use protocols::shim::task::Status;

use crate::error::{Error, Result};
use crate::handler::Sandboxer;
use crate::plan::{ContainerAction, Found, Plan, SandboxAction, ShimSeen, TaskSeen, plan};
use crate::record::{self, ContainerRecord, SandboxPhase, SandboxRecord};
use crate::sandbox::remove_dir;
use crate::server::Server;
use crate::shim::Shim;
use crate::state::{Container, ContainerState, Ended, Link, Sandbox};

impl Server {
    /// Takes over what a predecessor left.
    ///
    /// # Errors
    /// [`Error::Io`] if the state directory cannot be read. What cannot be cleaned up is logged, and stays for the next start.
    pub async fn reconcile(self: &Arc<Self>) -> Result<()> {
        let mut sandboxes = record::read_all::<SandboxRecord>(&self.config.state.join("sandboxes"))?;
        let mut containers = record::read_all::<ContainerRecord>(&self.config.state.join("containers"))?;
        let boot = self.config.state.join("boot");
        let rebooted = std::fs::read_to_string(&boot).unwrap_or_default() != self.boot_id;
        if rebooted {
            sandboxes.give_up_unreadable();
            containers.give_up_unreadable();
        }
        for (_, error) in sandboxes.unreadable.iter().chain(&containers.unreadable) {
            tracing::error!(error = error.chain(), "a record cannot be read; nothing of it is touched");
        }
        let mut found = Found {
            boot_id: self.boot_id.clone(),
            has_unreadable: !sandboxes.unreadable.is_empty() || !containers.unreadable.is_empty(),
            snapshots: self.images.snapshots(),
            bare_containers: containers.bare,
            bare_sandboxes: sandboxes.bare,
            ..Found::default()
        };
        for record in sandboxes.records {
            let sandbox = self.restore_sandbox(&record)?;
            let seen = self.look_at_sandbox(&sandbox, &record).await;
            found.sandboxes.push((record, seen));
        }
        for record in containers.records {
            let seen = self.look_at_task(&record).await;
            self.restore_container(&record)?;
            found.containers.push((record, seen));
        }
        let plan = plan(&found);
        self.carry_out(&plan).await;
        if rebooted {
            std::fs::write(&boot, &self.boot_id).map_err(Error::io("write", &boot))?;
        }
        Ok(())
    }

    fn restore_sandbox(&self, record: &SandboxRecord) -> Result<Arc<Sandbox>> {
        let dir = self.sandbox_dir(&record.id);
        let config: PodSandboxConfig =
            record.config.decode().ok_or_else(|| Error::Record { path: dir.clone(), reason: "its config is not CRI's".to_owned() })?;
        let handler = self.handlers.restored(&record.handler);
        let sandbox = Arc::new(Sandbox::new(record, config, handler, dir));
        self.registry(|registry| {
            registry.reserve(&sandbox.name, &sandbox.id)?;
            registry.add_sandbox(Arc::clone(&sandbox));
            Ok(sandbox)
        })
    }

    fn restore_container(&self, record: &ContainerRecord) -> Result<()> {
        let dir = self.container_dir(&record.id);
        let config: ContainerConfig =
            record.config.decode().ok_or_else(|| Error::Record { path: dir.clone(), reason: "its config is not CRI's".to_owned() })?;
        let state = ContainerState::of(&record.phase).unwrap_or(ContainerState::Created);
        self.registry(|registry| {
            // Without its sandbox it has no name to keep.
            let pod = registry.sandbox(&record.sandbox_id).map(|sandbox| sandbox.config.clone()).unwrap_or_default();
            let container = Arc::new(Container::new(record, config, &pod, dir, state));
            registry.reserve(&container.name, &container.id)?;
            registry.add_container(container);
            Ok(())
        })
    }

    async fn look_at_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>, record: &SandboxRecord) -> Option<ShimSeen> {
        if record.boot_id != self.boot_id {
            sandbox.link.send_replace(Link::Lost);
            return Some(ShimSeen::Gone);
        }
        if record.phase == SandboxPhase::Creating {
            self.find_unknown_shim(sandbox).await;
            return None;
        }
        let started = record.shim.clone()?;
        let sandboxer = sandbox.handler.sandboxer;
        match Shim::connect(&started, sandboxer).await {
            Ok(shim) => {
                sandbox.link.send_replace(Link::Up(shim));
            }
            Err(error) if record.phase == SandboxPhase::Ready && sandboxer == Sandboxer::Shim => {
                tracing::warn!(sandbox_id = record.id, %error, "the shim does not answer, another is started in its place");
                if let Err(error) = self.adopt(sandbox).await {
                    tracing::error!(sandbox_id = record.id, error = error.chain(), "no shim takes the sandbox over");
                    sandbox.link.send_replace(Link::Lost);
                    return Some(ShimSeen::Gone);
                }
            }
            Err(_) => {
                sandbox.link.send_replace(Link::Lost);
                return Some(ShimSeen::Gone);
            }
        }
        let shim = sandbox.shim()?;
        match shim.sandbox_status(&record.id).await {
            Ok(status) => Some(ShimSeen::Alive { ready: status.ready, pid: status.pid }),
            Err(error) => {
                tracing::warn!(sandbox_id = record.id, %error, "the shim does not know its sandbox");
                Some(ShimSeen::Alive { ready: false, pid: 0 })
            }
        }
    }

    /// A sandbox that was being made may have a shim that no record knows: `start` answers with that one's address.
    async fn find_unknown_shim(&self, sandbox: &Sandbox) {
        if !sandbox.bundle().is_dir() {
            return;
        }
        let found = match self.launcher.start(&sandbox.handler, &sandbox.id, &sandbox.bundle()).await {
            Ok(started) => {
                let shim = Shim::connect(&started, sandbox.handler.sandboxer).await;
                sandbox.change(|facts| facts.shim = Some(started));
                shim.map_err(Error::shim("connect to the shim of", &sandbox.id))
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(shim) => {
                sandbox.link.send_replace(Link::Up(shim));
            }
            Err(error) => tracing::warn!(sandbox_id = sandbox.id, error = error.chain(), "no shim of a half made sandbox"),
        }
    }

    async fn look_at_task(&self, record: &ContainerRecord) -> Option<TaskSeen> {
        let shim = self.registry(|registry| registry.sandbox(&record.sandbox_id)).ok()?.shim()?;
        let state = match shim.state(&record.id, "").await {
            Ok(state) => state,
            Err(error) if error.is_not_found() => return Some(TaskSeen::Missing),
            Err(error) => {
                tracing::warn!(container_id = record.id, %error, "the shim does not say how a container is");
                return Some(TaskSeen::Unknown);
            }
        };
        Some(match state.status() {
            Status::Created => TaskSeen::Created,
            Status::Running | Status::Paused | Status::Pausing => TaskSeen::Running { pid: state.pid },
            Status::Stopped => {
                let at = state.exited_at.map_or(0, |at| at.seconds.saturating_mul(1_000_000_000).saturating_add(at.nanos.into()));
                TaskSeen::Stopped { status: state.exit_status, at }
            }
            Status::Unknown => TaskSeen::Unknown,
        })
    }

    async fn carry_out(self: &Arc<Self>, plan: &Plan) {
        let mut failures = Vec::new();
        for (id, action) in &plan.containers {
            failures.extend(self.apply_container(id, *action).await.err());
        }
        for (id, action) in &plan.sandboxes {
            failures.extend(self.apply_sandbox(id, *action).await.err());
        }
        for key in &plan.remove_snapshots {
            failures.extend(self.images.remove_snapshot(key).await.err());
        }
        for id in &plan.remove_containers {
            failures.extend(self.unmake_container(id).await.err());
        }
        for id in &plan.remove_sandboxes {
            let dir = self.sandbox_dir(id);
            failures.extend(crate::host::unmount(&dir.join("shm")).and_then(|()| remove_dir(&dir)).err());
        }
        if let Some(live) = plan.networks.clone() {
            let network = Arc::clone(&self.network);
            let live: HashSet<String> = live.into_iter().collect();
            let done = self.blocking(move || {
                network.reconcile(&live).map_err(|source| Error::Network {
                    act: "reconcile the networks",
                    id: "all".to_owned(),
                    source: Box::new(source),
                })
            });
            failures.extend(done.await.err());
        }
        for error in failures {
            tracing::error!(error = error.chain(), "failed to clean up after the last run");
        }
    }

    async fn apply_sandbox(self: &Arc<Self>, id: &str, action: SandboxAction) -> Result<()> {
        let sandbox = self.registry(|registry| registry.sandbox(id))?;
        match action {
            SandboxAction::Keep { pid } => {
                sandbox.change(|facts| facts.pid = pid);
                self.watch_sandbox(&sandbox);
                Ok(())
            }
            SandboxAction::Rest => Ok(()),
            SandboxAction::Stop => self.stop_sandbox(&sandbox).await,
            SandboxAction::Unmake => {
                let unmade = self.unmake_sandbox(&sandbox).await;
                self.registry(|registry| registry.remove(id));
                unmade
            }
        }
    }

    async fn apply_container(self: &Arc<Self>, id: &str, action: ContainerAction) -> Result<()> {
        let container = self.registry(|registry| registry.container(id))?;
        let started_at = match container.state() {
            ContainerState::Running { started_at, .. } => started_at,
            _ => 0,
        };
        match action {
            ContainerAction::Keep => Ok(()),
            ContainerAction::DeleteTask => {
                self.resume_output(&container).await;
                self.delete_task(&container).await;
                self.finish_output(&container).await;
                Ok(())
            }
            ContainerAction::Watch { pid } => {
                container.state.send_replace(ContainerState::Running { pid, started_at });
                self.resume_output(&container).await;
                // Watched in any case: a full disk refuses the record.
                self.watch_container(&container);
                self.save_container(&container)
            }
            ContainerAction::Exited { exit } => {
                let (exit_code, finished_at) = match exit {
                    Some((status, at)) => (i32::try_from(status).unwrap_or(255), at),
                    None => (255, crate::host::now()),
                };
                let reason = match exit {
                    None => "Unknown",
                    Some((0, _)) => "Completed",
                    Some(_) => "Error",
                };
                self.resume_output(&container).await;
                let ended = Ended { started_at, finished_at, exit_code, reason: reason.to_owned(), message: String::new() };
                self.conclude(&container, ended).await;
                Ok(())
            }
            ContainerAction::NotStarted => {
                self.delete_task(&container).await;
                container.state.send_replace(ContainerState::Created);
                self.save_container(&container)
            }
            ContainerAction::StartFailed => {
                self.delete_task(&container).await;
                let message = "the runtime was ended while it started the container".to_owned();
                let ended = Ended { started_at, finished_at: crate::host::now(), exit_code: 128, reason: "StartError".to_owned(), message };
                self.end(&container, ended);
                Ok(())
            }
            ContainerAction::Unmake => {
                self.delete_task(&container).await;
                let unmade = self.unmake_container(id).await;
                self.registry(|registry| registry.remove(id));
                unmade
            }
        }
    }
}
