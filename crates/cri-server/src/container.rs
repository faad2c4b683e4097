//! CreateContainer, StartContainer, StopContainer, RemoveContainer, UpdateContainerResources, and the watch over exits.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use camino::Utf8Path;
use protocols::cri::v1::{
    ContainerConfig, ContainerEventType, CreateContainerRequest, LinuxContainerResources, NamespaceMode, PodSandboxConfig,
};
use protocols::shim::task::v3::CreateTaskRequest;
use protocols::shim::types::Mount;

use crate::error::{Error, Result};
use crate::images::{self, SnapshotMount};
use crate::oci::Spec;
use crate::record::{ContainerRecord, Encoded, VERSION};
use crate::sandbox::{remove_dir, shm_path};
use crate::server::{KILL_WAIT, Server, Span, pod_uid};
use crate::shim::{Exit, Shim};
use crate::spec::user::{self, UserFiles};
use crate::spec::{self, ContainerFacts, PodFiles, seccomp, signal};
use crate::state::{Container, ContainerState, Ended, Link, Sandbox, lock};
use crate::{host, record, volumes};

/// The snapshot's mounts, kept beside the bundle for StartContainer.
const ROOTFS_FILE: &str = "rootfs.json";
/// Images whose user files are remembered, and how large these may be, in bytes: what an image brings must not fill the memory.
const USER_FILES_MAX: usize = 256;
const USER_FILES_BYTES_MAX: usize = 64 << 10;
/// When the end of a container that the disk refused is recorded again.
const RECORD_RETRY: Duration = Duration::from_secs(1);
/// The exit code of a container that could not be started, as containerd's.
const START_ERROR: i32 = 128;
/// The exit code of a container whose end nobody saw, as containerd's.
const UNKNOWN_EXIT: i32 = 255;

#[derive(serde::Serialize, serde::Deserialize)]
struct RootfsMount {
    #[serde(rename = "type")]
    kind: String,
    source: String,
    options: Vec<String>,
}

impl Server {
    /// Makes a container and answers its id, or makes nothing.
    ///
    /// # Errors
    /// [`Error`] of the step that failed.
    pub async fn create_container(self: &Arc<Self>, request: CreateContainerRequest) -> Result<String> {
        let config = request.config.ok_or_else(|| Error::Invalid("config is missing".to_owned()))?;
        if config.metadata.as_ref().is_none_or(|metadata| metadata.name.is_empty()) {
            return Err(Error::Invalid("config.metadata needs a name".to_owned()));
        }
        let sandbox = self.registry(|registry| registry.sandbox(&request.pod_sandbox_id))?;
        let pod = request.sandbox_config.unwrap_or_else(|| sandbox.config.clone());
        if pod.metadata.is_none() {
            return Err(Error::Invalid("sandbox_config.metadata is missing".to_owned()));
        }
        let id = host::new_id()?;
        let name = crate::state::container_name(&config, &pod);
        self.registry(|registry| registry.reserve(&name, &id))?;
        let server = Arc::clone(self);
        self.finish(async move {
            // The removal of the sandbox waits for this, and then finds the container.
            let _one = server.locks.acquire(&creation_key(&sandbox.id)).await;
            let made = server.make_container(&id, &sandbox, &pod, config).await;
            match made {
                Ok(container) => {
                    server.registry(|registry| registry.add_container(Arc::clone(&container)));
                    server.emit(ContainerEventType::ContainerCreatedEvent, &id, &sandbox.id);
                    Ok(id)
                }
                Err(error) => {
                    tracing::warn!(container_id = id, container = name, error = error.chain(), "failed to create a container");
                    if let Err(error) = server.unmake_container(&id).await {
                        tracing::error!(container_id = id, error = error.chain(), "failed to clean up after it");
                    }
                    server.registry(|registry| registry.release(&id));
                    Err(error)
                }
            }
        })
        .await
    }

    async fn make_container(
        self: &Arc<Self>,
        id: &str,
        sandbox: &Arc<Sandbox>,
        pod: &PodSandboxConfig,
        config: ContainerConfig,
    ) -> Result<Arc<Container>> {
        let span = Span::begin(pod_uid(pod), "cri.CreateContainer");
        if !sandbox.is_ready() {
            return Err(Error::State { kind: "sandbox", id: sandbox.id.clone(), state: "not ready" });
        }
        let reference = config.image.clone().unwrap_or_default();
        let image = self.images.get(&reference.image)?;
        let stop_signal = match signal::of_cri(config.stop_signal)? {
            None if image.config.stop_signal.is_empty() => None,
            None => Some(signal::parse(&image.config.stop_signal)?),
            requested => requested,
        };
        let dir = self.container_dir(id);
        let bundle = dir.join(id);
        fs::create_dir_all(bundle.join("rootfs")).map_err(Error::io("make directory", bundle.join("rootfs")))?;
        let mounts = self.images.prepare_snapshot(id, &image).await?;
        let users = self.user_files(&image.id, &mounts, &dir).await?;
        let with_volumes = self.with_volumes(id, &image.config.volumes, &mounts, &dir, &config).await?;
        let image_name = if reference.user_specified_image.is_empty() { &reference.image } else { &reference.user_specified_image };
        let (server, sandbox_copy, pod_copy, config_copy, name, own_id) =
            (Arc::clone(self), Arc::clone(sandbox), pod.clone(), with_volumes, image_name.clone(), id.to_owned());
        let defaults = images::defaults(&image);
        let spec =
            self.blocking(move || server.container_spec(&own_id, &sandbox_copy, &pod_copy, &config_copy, &defaults, &name, &users)).await?;
        let log_path = if pod.log_directory.is_empty() || config.log_path.is_empty() {
            String::new()
        } else {
            Utf8Path::new(&pod.log_directory).join(&config.log_path).into_string()
        };
        let record = ContainerRecord {
            version: VERSION,
            boot_id: self.boot_id.clone(),
            id: id.to_owned(),
            sandbox_id: sandbox.id.clone(),
            phase: record::ContainerPhase::Created,
            config: Encoded::of(&config),
            image_id: image.id.clone(),
            log_path,
            created_at: host::now(),
            user: spec.process.user.clone(),
            resources: spec.linux.resources.clone(),
            oom_score_adj: spec.process.oom_score_adj,
            stop_signal,
            cgroups_path: spec.linux.cgroups_path.clone(),
        };
        write_json(&bundle.join("config.json"), &spec)?;
        let mounts: Vec<RootfsMount> =
            mounts.into_iter().map(|mount| RootfsMount { kind: mount.kind, source: mount.source, options: mount.options }).collect();
        write_json(&dir.join(ROOTFS_FILE), &mounts)?;
        // The record is last: a directory without one is what a crash left, and is removed.
        record::write(&dir, &record)?;
        span.end();
        Ok(Arc::new(Container::new(&record, config, &sandbox.config, dir, ContainerState::Created)))
    }

    /// The config with a mount for each volume of the image. They are as old as the writable layer, and go with it.
    async fn with_volumes(
        self: &Arc<Self>,
        id: &str,
        declared: &[String],
        mounts: &[SnapshotMount],
        dir: &Utf8Path,
        config: &ContainerConfig,
    ) -> Result<ContainerConfig> {
        let mut config = config.clone();
        let places = volumes::wanted(declared, &config.mounts);
        if places.is_empty() {
            return Ok(config);
        }
        let mut made = Vec::new();
        for (number, place) in places.into_iter().enumerate() {
            made.push((place, self.images.snapshot_volume(id, number)?));
        }
        config.mounts.extend(made.iter().map(|(place, source)| volumes::mount(place, &source.to_string_lossy())));
        let (mounts, scratch) = (mounts.to_vec(), dir.join("users"));
        self.blocking(move || {
            made.iter().try_for_each(|(_, source)| volumes::make_directory(source))?;
            host::with_root(&mounts, &scratch, |root| made.iter().try_for_each(|(place, source)| volumes::fill(root, place, source)))
        })
        .await?;
        Ok(config)
    }

    async fn user_files(self: &Arc<Self>, image_id: &str, mounts: &[SnapshotMount], dir: &Utf8Path) -> Result<Arc<UserFiles>> {
        if let Some(files) = lock(&self.user_files).get(image_id) {
            return Ok(Arc::clone(files));
        }
        let (mounts, scratch) = (mounts.to_vec(), dir.join("users"));
        let files = Arc::new(self.blocking(move || host::user_files(&mounts, &scratch)).await?);
        if files.bytes() > USER_FILES_BYTES_MAX {
            return Ok(files);
        }
        let mut known = lock(&self.user_files);
        if known.len() >= USER_FILES_MAX {
            known.pop_first();
        }
        known.insert(image_id.to_owned(), Arc::clone(&files));
        Ok(files)
    }

    #[allow(clippy::too_many_arguments, reason = "all of them are facts of one spec")]
    fn container_spec(
        &self,
        id: &str,
        sandbox: &Sandbox,
        pod: &PodSandboxConfig,
        config: &ContainerConfig,
        image: &spec::ImageDefaults,
        image_name: &str,
        users: &UserFiles,
    ) -> Result<Spec> {
        let security = spec::security(config);
        let seccomp_file = match seccomp::request(security.seccomp.as_ref(), security.privileged)? {
            seccomp::Request::Localhost(path) => Some(host::seccomp_file(&path)?),
            _ => None,
        };
        let file = |name: &str| sandbox.dir.join(name).into_string();
        let files =
            PodFiles { hostname: file("hostname"), hosts: file("hosts"), resolv_conf: file("resolv.conf"), shm: shm_path(sandbox).into() };
        let facts = ContainerFacts {
            id,
            sandbox_id: &sandbox.id,
            sandbox_pid: sandbox.facts().pid,
            target_pid: self.target_pid(&sandbox.id, config),
            sandbox: pod,
            config,
            image,
            image_name,
            user: user::resolve(security, &image.user, users)?,
            seccomp_file,
            files: &files,
            sources: &host::mount_sources(&config.mounts)?,
            devices: &host::devices(config, security.privileged)?,
            host: &self.host,
            cgroup_root: &self.config.cgroup_root,
        };
        Ok(spec::container(&facts)?)
    }

    /// The pid of the container whose PID namespace is asked for, if it runs in the same sandbox.
    fn target_pid(&self, sandbox_id: &str, config: &ContainerConfig) -> Option<u32> {
        let options = spec::security(config).namespace_options.clone()?;
        if options.pid != NamespaceMode::Target as i32 {
            return None;
        }
        let target = self.registry(|registry| registry.container(&options.target_id)).ok()?;
        match target.state() {
            ContainerState::Running { pid, .. } if target.sandbox_id == sandbox_id => Some(pid),
            _ => None,
        }
    }

    /// Removes a container's snapshot and directory.
    ///
    /// # Errors
    /// [`Error`] of the step that failed; the rest stays for the next attempt.
    pub async fn unmake_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let dir = self.container_dir(id);
        let copy = dir.clone();
        self.blocking(move || {
            host::unmount(&copy.join("bundle/rootfs"))?;
            host::unmount(&copy.join("users"))
        })
        .await?;
        self.images.remove_snapshot(id).await?;
        self.blocking(move || remove_dir(&dir)).await
    }

    /// Starts a container that was created.
    ///
    /// # Errors
    /// [`Error::State`] if it was started before; [`Error::Shim`] if it cannot be, and then it has exited with 128 and StartError.
    pub async fn start_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.registry(|registry| registry.container(id))?;
        let server = Arc::clone(self);
        self.finish(async move {
            let _one = server.locks.acquire(&container.id).await;
            server.start(&container).await
        })
        .await
    }

    async fn start(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let sandbox = self.registry(|registry| registry.sandbox(&container.sandbox_id))?;
        let state = match container.state() {
            ContainerState::Created => None,
            ContainerState::Starting => Some("starting"),
            ContainerState::Running { .. } => Some("running"),
            ContainerState::Exited(_) => Some("exited"),
        };
        if let Some(state) = state {
            return Err(Error::State { kind: "container", id: container.id.clone(), state });
        }
        let shim = sandbox.shim().filter(|_| sandbox.is_ready());
        let Some(shim) = shim else {
            let error = Error::State { kind: "sandbox", id: sandbox.id.clone(), state: "not ready" };
            self.end(container, failed_start(&error));
            return Err(error);
        };
        let span = Span::begin(pod_uid(&sandbox.config), "cri.StartContainer");
        container.state.send_replace(ContainerState::Starting);
        if let Err(error) = self.start_task(container, &shim).await {
            tracing::warn!(container_id = container.id, container = container.name, error = error.chain(), "failed to start a container");
            self.delete_task(container).await;
            self.finish_output(container).await;
            self.end(container, failed_start(&error));
            return Err(error);
        }
        span.end();
        self.emit(ContainerEventType::ContainerStartedEvent, &container.id, &container.sandbox_id);
        tracing::info!(container_id = container.id, container = container.name, "container runs");
        Ok(())
    }

    async fn start_task(self: &Arc<Self>, container: &Arc<Container>, shim: &Arc<Shim>) -> Result<()> {
        let id = &container.id;
        self.save_container(container)?;
        let request = self.task_request(container, shim).await?;
        shim.create(&request).await.map_err(Error::shim("create container", id))?;
        let pid = shim.start(id, "").await.map_err(Error::shim("start container", id))?;
        container.state.send_replace(ContainerState::Running { pid, started_at: host::now() });
        if let Err(error) = self.save_container(container) {
            // It runs, and of one on record as starting the next server asks the shim.
            tracing::warn!(container_id = id, error = error.chain(), "failed to record a container's start");
        }
        self.watch_container(container);
        Ok(())
    }

    async fn task_request(&self, container: &Container, shim: &Shim) -> Result<CreateTaskRequest> {
        let path = container.dir.join(ROOTFS_FILE);
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let mounts: Vec<RootfsMount> =
            serde_json::from_slice(&text).map_err(|error| Error::Record { path: path.clone(), reason: error.to_string() })?;
        let rootfs =
            mounts.into_iter().map(|mount| Mount { r#type: mount.kind, source: mount.source, options: mount.options, ..Mount::default() });
        let handler = self.registry(|registry| registry.sandbox(&container.sandbox_id))?.handler.clone();
        let stdio = self.open_stdio(container, shim).await?;
        Ok(CreateTaskRequest {
            id: container.id.clone(),
            bundle: container.bundle().into_string(),
            rootfs: rootfs.collect(),
            terminal: container.config.tty,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            options: self.launcher.options(&handler),
            ..CreateTaskRequest::default()
        })
    }

    /// Waits for the container's exit, over shims that are replaced meanwhile.
    pub fn watch_container(self: &Arc<Self>, container: &Arc<Container>) {
        let (server, container) = (Arc::clone(self), Arc::clone(container));
        let cancel = self.cancel.clone();
        self.tasks.spawn(cancel.run_until_cancelled_owned(async move {
            let exit = server.wait_for_exit(&container).await;
            server.exited(&container, exit).await;
        }));
    }

    async fn wait_for_exit(&self, container: &Container) -> Option<Exit> {
        let sandbox = self.registry(|registry| registry.sandbox(&container.sandbox_id)).ok()?;
        let mut link = sandbox.link.subscribe();
        loop {
            // Pending while a successor of a dead shim is being started.
            let up = match &*link.wait_for(|link| !matches!(link, Link::Pending)).await.ok()? {
                Link::Up(shim) => Arc::clone(shim),
                _ => return None,
            };
            match up.wait(&container.id, "").await {
                Ok(exit) => return Some(exit),
                Err(error) if error.is_closed() => {
                    // Until the watch over the sandbox has seen it too.
                    link.wait_for(|link| !matches!(link, Link::Up(shim) if shim.is_closed())).await.ok()?;
                }
                Err(error) => {
                    tracing::warn!(container_id = container.id, %error, "failed to wait for a container");
                    return None;
                }
            }
        }
    }

    async fn exited(self: &Arc<Self>, container: &Arc<Container>, exit: Option<Exit>) {
        let started_at = match container.state() {
            ContainerState::Running { started_at, .. } => started_at,
            _ => 0,
        };
        let oom = container.oom.load(Ordering::Relaxed) || self.was_oom_killed(container).await;
        let exit_code = exit.map_or(UNKNOWN_EXIT, |exit| i32::try_from(exit.status).unwrap_or(UNKNOWN_EXIT));
        let reason = match exit {
            None => "Unknown",
            Some(_) if oom => "OOMKilled",
            Some(Exit { status: 0, .. }) => "Completed",
            Some(_) => "Error",
        };
        let finished_at = exit.and_then(|exit| exit.at).unwrap_or_else(host::now);
        let ended = Ended { started_at, finished_at, exit_code, reason: reason.to_owned(), message: String::new() };
        self.conclude(container, ended).await;
        tracing::info!(container_id = container.id, container = container.name, exit_code, reason, "container ended");
        self.emit(ContainerEventType::ContainerStoppedEvent, &container.id, &container.sandbox_id);
    }

    async fn was_oom_killed(&self, container: &Container) -> bool {
        let path = container.cgroups_path.clone();
        let counted = self.blocking(move || {
            let cgroups = linux::cgroup::Host::detect().map_err(host::kernel("find the cgroups"))?;
            let group = linux::cgroup::Cgroup::new(&cgroups, Path::new(&path));
            Ok(group.exists() && group.stats().is_ok_and(|stats| stats.memory.oom_kills > 0))
        });
        counted.await.unwrap_or(false)
    }

    /// Puts a container into its last state.
    pub fn end(&self, container: &Container, ended: Ended) {
        if let Err(error) = self.record_end(container, &ended) {
            tracing::error!(container_id = container.id, error = error.chain(), "failed to record a container's end");
        }
        container.state.send_replace(ContainerState::Exited(ended));
    }

    /// Puts a container whose process has ended into its last state, and has the shim forget it. The exit is forgotten with the task, so it is
    /// on record before; as long as the disk refuses that, the shim keeps it.
    pub async fn conclude(self: &Arc<Self>, container: &Arc<Container>, ended: Ended) {
        let Err(error) = self.record_end(container, &ended) else {
            self.delete_task(container).await;
            self.finish_output(container).await;
            container.state.send_replace(ContainerState::Exited(ended));
            return;
        };
        tracing::error!(container_id = container.id, error = error.chain(), "failed to record a container's end; trying again");
        container.has_task.store(true, Ordering::Relaxed);
        container.state.send_replace(ContainerState::Exited(ended.clone()));
        let (server, container) = (Arc::clone(self), Arc::clone(container));
        let cancel = self.cancel.clone();
        self.tasks.spawn(cancel.run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(RECORD_RETRY).await;
                let _one = server.locks.acquire(&container.id).await;
                // Whoever removed it has deleted the task as well.
                if !container.has_task.load(Ordering::Relaxed) {
                    return;
                }
                if server.record_end(&container, &ended).is_ok() {
                    server.delete_task(&container).await;
                    return server.finish_output(&container).await;
                }
            }
        }));
    }

    fn record_end(&self, container: &Container, ended: &Ended) -> Result<()> {
        let record = ContainerRecord { phase: ContainerState::Exited(ended.clone()).phase(), ..container.record(&self.boot_id) };
        record::write(&container.dir, &record)
    }

    /// Has the shim forget a container that does not run (any more). A shim that does not know it, or is gone, has nothing to forget.
    pub async fn delete_task(&self, container: &Container) {
        container.has_task.store(false, Ordering::Relaxed);
        let shim = self.registry(|registry| registry.sandbox(&container.sandbox_id)).ok().and_then(|sandbox| sandbox.shim());
        if let Some(shim) = shim
            && let Err(error) = shim.delete(&container.id, "").await
            && !error.is_not_found()
        {
            tracing::warn!(container_id = container.id, %error, "failed to delete a task");
        }
    }

    /// Stops a container: its stop signal, the grace, SIGKILL. One that does not run, or is not known, is stopped.
    ///
    /// # Errors
    /// [`Error`] if it cannot be killed.
    pub async fn stop_container(self: &Arc<Self>, id: &str, grace: Duration) -> Result<()> {
        let Some(container) = Error::if_found(self.registry(|registry| registry.container(id)))? else { return Ok(()) };
        let server = Arc::clone(self);
        self.finish(async move { server.stop(&container, grace).await }).await
    }

    /// As [`Server::stop_container`]. It takes no lock: a second stop with a shorter grace must overtake the first.
    pub async fn stop(self: &Arc<Self>, container: &Arc<Container>, grace: Duration) -> Result<()> {
        let id = &container.id;
        if container.state() == ContainerState::Starting {
            // The start holds the lock, and will be done soon.
            drop(self.locks.acquire(id).await);
        }
        if !matches!(container.state(), ContainerState::Running { .. }) {
            return Ok(());
        }
        let sandbox = self.registry(|registry| registry.sandbox(&container.sandbox_id))?;
        let kill = async |number: u32, all: bool| {
            let Some(shim) = sandbox.shim() else { return Ok(()) };
            match shim.kill(id, "", number, all).await {
                Err(error) if !error.is_not_found() => Err(Error::Shim { act: "signal container", id: id.clone(), source: error }),
                _ => Ok(()),
            }
        };
        if !grace.is_zero() {
            let number = container.stop_signal.unwrap_or(signal::SIGTERM);
            if !container.stop_signaled.swap(true, Ordering::Relaxed)
                && let Err(error) = kill(number, false).await
            {
                // It has not got it: the next stop tries again.
                container.stop_signaled.store(false, Ordering::Relaxed);
                return Err(error);
            }
            if tokio::time::timeout(grace, container.exited()).await.is_ok() {
                return Ok(());
            }
        }
        kill(signal::SIGKILL, false).await?;
        tokio::time::timeout(KILL_WAIT, container.exited()).await.map_err(|_| Error::Deadline {
            act: "the end",
            id: id.clone(),
            seconds: KILL_WAIT.as_secs(),
        })
    }

    /// Removes a container, ending it first. An id that is not known is as good as removed.
    ///
    /// # Errors
    /// [`Error`]; the call can be repeated.
    pub async fn remove_container(self: &Arc<Self>, id: &str) -> Result<()> {
        let Some(container) = Error::if_found(self.registry(|registry| registry.container(id)))? else { return Ok(()) };
        let server = Arc::clone(self);
        self.finish(async move { server.remove(&container).await }).await
    }

    /// As [`Server::remove_container`].
    pub async fn remove(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        self.stop(container, Duration::ZERO).await?;
        let _one = self.locks.acquire(&container.id).await;
        if self.registry(|registry| registry.container(&container.id)).is_err() {
            return Ok(());
        }
        if container.has_task.load(Ordering::Relaxed) {
            self.delete_task(container).await;
        }
        self.unmake_container(&container.id).await?;
        self.registry(|registry| registry.remove(&container.id));
        lock(&self.samples).forget(&container.id);
        self.emit(ContainerEventType::ContainerDeletedEvent, &container.id, &container.sandbox_id);
        Ok(())
    }

    /// Changes a container's limits, now if it runs, else for its start.
    ///
    /// # Errors
    /// [`Error::Spec`] for limits that the host cannot enforce, [`Error::State`] without its sandbox, [`Error::Shim`].
    pub async fn update_resources(self: &Arc<Self>, id: &str, request: LinuxContainerResources) -> Result<()> {
        let container = self.registry(|registry| registry.container(id))?;
        let server = Arc::clone(self);
        self.finish(async move {
            let _one = server.locks.acquire(&container.id).await;
            let (mut resources, oom_score_adj) = container.limits();
            spec::resources::merge(&mut resources, &request, &server.host)?;
            match container.state() {
                ContainerState::Running { .. } => {
                    let sandbox = server.registry(|registry| registry.sandbox(&container.sandbox_id))?;
                    let shim =
                        sandbox.shim().ok_or_else(|| Error::State { kind: "sandbox", id: sandbox.id.clone(), state: "not ready" })?;
                    // The rules of devices are not the request's to change.
                    let changed = crate::oci::Resources { devices: Vec::new(), ..resources.clone() };
                    let json = serde_json::to_vec(&changed).map_err(|error| Error::Invalid(error.to_string()))?;
                    shim.update(&container.id, json).await.map_err(Error::shim("update container", &container.id))?;
                }
                // It is told what it was given; there is nothing to enforce it on.
                ContainerState::Created | ContainerState::Starting | ContainerState::Exited(_) => {}
            }
            let path = container.bundle().join("config.json");
            let mut spec = read_spec(&path)?;
            spec.linux.resources = resources.clone();
            write_json(&path, &spec)?;
            *lock(&container.limits) = (resources, oom_score_adj);
            server.save_container(&container)
        })
        .await
    }
}

/// The end of a container that could not be started.
fn failed_start(error: &Error) -> Ended {
    let (reason, message) = ("StartError".to_owned(), error.chain());
    Ended { finished_at: host::now(), exit_code: START_ERROR, reason, message, ..Ended::default() }
}

/// The key of the lock under which containers of a sandbox are made.
pub fn creation_key(sandbox_id: &str) -> String {
    format!("create/{sandbox_id}")
}

/// Reads a bundle's `config.json`.
///
/// # Errors
/// [`Error::Io`], [`Error::Record`].
pub fn read_spec(path: &Utf8Path) -> Result<Spec> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Record { path: path.to_owned(), reason: error.to_string() })
}

/// Writes a file of JSON.
///
/// # Errors
/// [`Error::Io`].
pub fn write_json(path: &Utf8Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| Error::Record { path: path.to_owned(), reason: error.to_string() })?;
    fs::write(path, text).map_err(Error::io("write", path))
}
