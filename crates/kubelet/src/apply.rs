//! Carries out a plan: sandbox, images, containers. Decides nothing; what went wrong is recorded for the status.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;
use protocols::cri::v1 as cri;

use crate::backoff::BackOff;
use crate::credentials::Credentials;
use crate::cri::{container as container_config, dns, hosts, log_directory, sandbox};
use crate::env;
use crate::events::Target;
use crate::images::{self, Pulls};
use crate::kill;
use crate::kubelet::Kubelet;
use crate::model::{self, PodRuntime};
use crate::objects::{self, Names};
use crate::plan::{ListKind, Plan, Start};
use crate::runtime;
use crate::status::Waiting;
use crate::volume::{Volumes, subpath};

/// A hook that never ends must not hold its pod for ever.
const POST_START_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What the worker keeps between syncs and an application changes.
#[derive(Default)]
pub struct State {
    /// Back-off of restarts.
    pub backoff: BackOff,
    /// Back-off of pulls.
    pub pulls: Pulls,
    /// What went wrong, by container.
    pub waiting: BTreeMap<String, Waiting>,
}

/// Applies plans for one pod.
pub struct Apply<'a> {
    /// What all share.
    pub kubelet: &'a Arc<Kubelet>,
    /// The pod.
    pub pod: &'a Pod,
    /// What the runtime was seen to hold.
    pub seen: &'a PodRuntime,
    /// The pod's volumes.
    pub volumes: &'a Volumes,
    /// Changed by it.
    pub state: &'a mut State,
}

/// The pod's sandbox, ready for containers.
struct SandboxInUse {
    id: String,
    config: cri::PodSandboxConfig,
    ips: Vec<String>,
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Something was changed in the runtime: look again at once.
    pub changed: bool,
    /// Something failed: try again after the back-off period.
    pub failed: bool,
}

impl Apply<'_> {
    /// Carries the plan out. `give_up` resolves when the pod is to end: a pull is then abandoned.
    pub async fn run(&mut self, plan: &Plan, give_up: impl Future<Output = ()>) -> Outcome {
        let mut outcome = Outcome::default();
        self.hold_back(plan);
        if let Err(error) = self.end_unwanted(plan, &mut outcome).await {
            let text = format!("error killing pod: {}", runtime::go_error(&error));
            self.kubelet.recorder.warning(&Target::pod(self.pod), "FailedKillPod", text);
            outcome.failed = true;
            return outcome;
        }
        if plan.create_sandbox.is_none() && plan.start.is_empty() {
            return outcome;
        }
        let Some(sandbox) = self.sandbox(plan, &mut outcome).await else {
            outcome.failed = true;
            return outcome;
        };
        tokio::pin!(give_up);
        for start in &plan.start {
            let started = tokio::select! {
                biased;
                () = &mut give_up => return outcome,
                image = self.image(start, &sandbox) => image,
            };
            let started = match started {
                Ok(image) => self.start(start, &sandbox, image).await,
                Err(waiting) => Err(waiting),
            };
            match started {
                Ok(()) => {
                    outcome.changed = true;
                    self.state.waiting.remove(&start.name);
                }
                Err(waiting) => {
                    outcome.failed = true;
                    self.state.waiting.insert(start.name.clone(), waiting);
                    if start.required {
                        return outcome;
                    }
                }
            }
        }
        outcome
    }

    fn hold_back(&mut self, plan: &Plan) {
        for held in &plan.backing_off {
            let waiting = Waiting { reason: "CrashLoopBackOff".to_owned(), message: held.message.clone() };
            if self.state.waiting.get(&held.name) != Some(&waiting)
                && let Some(spec) = model::container_spec(self.pod, &held.name)
            {
                let text = format!("Back-off restarting failed container {} in pod {}", held.name, model::format_pod(self.pod));
                let target = Target::container(self.pod, spec);
                self.kubelet.recorder.warning(&target, "BackOff", text);
            }
            self.state.waiting.insert(held.name.clone(), waiting);
        }
    }

    async fn end_unwanted(&mut self, plan: &Plan, outcome: &mut Outcome) -> Result<(), runtime::Error> {
        let ips = self.seen.ips();
        let context = kill::Context {
            runtime: &self.kubelet.runtime,
            recorder: &self.kubelet.recorder,
            pod: self.pod,
            pod_ip: ips.first().map_or("", String::as_str),
        };
        if plan.create_sandbox.as_ref().is_some_and(|c| c.replaces) {
            let text = "Pod sandbox changed, it will be killed and re-created.";
            self.kubelet.recorder.normal(&Target::pod(self.pod), "SandboxChanged", text);
        }
        if plan.stop_pod {
            let ready = self.seen.sandboxes.iter().any(|s| s.ready);
            outcome.changed |= ready || self.seen.running().next().is_some();
            kill::stop_pod(&context, self.seen, None).await?;
        }
        for kill in &plan.kill {
            outcome.changed = true;
            kill::kill(&context, kill).await?;
        }
        for id in &plan.remove {
            outcome.changed = true;
            self.kubelet.runtime.remove_container(id).await?;
        }
        Ok(())
    }

    /// The sandbox that serves, made when the plan says so; `None` after an event about the failure.
    async fn sandbox(&mut self, plan: &Plan, outcome: &mut Outcome) -> Option<SandboxInUse> {
        let pod_target = Target::pod(self.pod);
        let recorder = &self.kubelet.recorder;
        let attempt = match (&plan.create_sandbox, self.seen.active_sandbox()) {
            (Some(create), _) => create.attempt,
            (None, Some(active)) => active.attempt,
            (None, None) => return None,
        };
        let config = match self.sandbox_config(attempt).await {
            Ok(config) => config,
            Err(text) => {
                let text = format!("Failed to create pod sandbox: {text}");
                recorder.warning(&pod_target, "FailedCreatePodSandBox", text);
                return None;
            }
        };
        if plan.create_sandbox.is_none() {
            let active = self.seen.active_sandbox()?;
            let ips = self.pod_ips(active.ips.clone());
            return Some(SandboxInUse { id: active.id.clone(), config, ips });
        }
        let handler = match self.runtime_handler().await {
            Ok(handler) => handler,
            Err(text) => {
                let text = format!("Failed to create pod sandbox: {text}");
                recorder.warning(&pod_target, "FailedCreatePodSandBox", text);
                return None;
            }
        };
        let directory = config.log_directory.clone();
        if let Err(error) = tokio::fs::create_dir_all(&directory).await {
            let text = format!("Failed to create pod sandbox: failed to make log directory {directory}: {error}");
            recorder.warning(&pod_target, "FailedCreatePodSandBox", text);
            return None;
        }
        let id = match self.kubelet.runtime.run_sandbox(config.clone(), &handler).await {
            Ok(id) => id,
            Err(error) => {
                let text = format!("Failed to create pod sandbox: {}", runtime::go_error(&error));
                recorder.warning(&pod_target, "FailedCreatePodSandBox", text);
                return None;
            }
        };
        outcome.changed = true;
        match self.kubelet.runtime.sandbox_status(&id).await {
            Ok(status) => {
                let ips = self.pod_ips(model::Sandbox::from_cri(&status).ips);
                Some(SandboxInUse { id, config, ips })
            }
            Err(error) => {
                let text = format!("Unable to get pod sandbox status: {}", runtime::go_error(&error));
                recorder.warning(&pod_target, "FailedPodSandBoxStatus", text);
                None
            }
        }
    }

    /// The handler of the pod's RuntimeClass; empty is the runtime's default.
    async fn runtime_handler(&self) -> Result<String, String> {
        let class = self.pod.spec.as_ref().and_then(|s| s.runtime_class_name.as_deref()).filter(|n| !n.is_empty());
        let Some(name) = class else {
            return Ok(String::new());
        };
        let api: kube::Api<RuntimeClass> = kube::Api::all(self.kubelet.client.clone());
        let found = api.get_opt(name).await.map_err(|e| format!("failed to get sandbox runtime: {e}"))?;
        found.map(|c| c.handler).ok_or_else(|| format!("failed to get sandbox runtime: RuntimeClass \"{name}\" not found"))
    }

    fn pod_ips(&self, sandbox_ips: Vec<String>) -> Vec<String> {
        if model::is_host_network(self.pod) { self.kubelet.live().host_ips } else { sandbox_ips }
    }

    async fn sandbox_config(&self, attempt: u32) -> Result<cri::PodSandboxConfig, String> {
        let path = &self.kubelet.config.resolv_conf;
        // A node without the file resolves nothing, which is for its pods to find out.
        let text = tokio::fs::read_to_string(path).await.unwrap_or_default();
        let host = dns::parse_resolv_conf(&text);
        let decision = dns::decide(self.pod, &host, &self.kubelet.cluster_dns());
        if decision.missing_cluster_dns && self.seen.active_sandbox().is_none() {
            let text = format!(
                "pod: \"{}\". kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. Falling back to \"Default\" policy.",
                model::format_pod(self.pod)
            );
            self.kubelet.recorder.warning(&Target::pod(self.pod), "MissingClusterDNS", text);
        }
        let seen_at = self.kubelet.started.to_string();
        sandbox::config(self.pod, attempt, decision.config, &self.kubelet.facts, &seen_at)
    }

    fn spec(&self, start: &Start) -> Option<Container> {
        match start.list {
            ListKind::Init => model::init_containers(self.pod).get(start.index).cloned(),
            ListKind::Regular => model::containers(self.pod).get(start.index).cloned(),
            ListKind::Ephemeral => crate::ephemeral::containers(self.pod).get(start.index).cloned(),
        }
    }

    async fn image(&mut self, start: &Start, sandbox: &SandboxInUse) -> Result<images::Ready, Waiting> {
        let spec = self.spec(start).ok_or_else(|| gone(start))?;
        let names = Names::of_pull_secrets(self.pod);
        let lookup = objects::fetch(&self.kubelet.client, self.pod, &names).await;
        let credentials = Credentials::of_pod(self.pod, &lookup);
        let context = images::Context {
            runtime: &self.kubelet.runtime,
            recorder: &self.kubelet.recorder,
            pod: self.pod,
            sandbox_config: &sandbox.config,
            credentials: &credentials,
        };
        let result = images::ensure(&context, &mut self.state.pulls, &spec).await;
        if let Err(waiting) = &result {
            if waiting.reason == "ErrImagePull" && !credentials.missing.is_empty() {
                let text = format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                    credentials.missing.join(", ")
                );
                let target = Target::pod(self.pod);
                self.kubelet.recorder.warning(&target, "FailedToRetrieveImagePullSecret", text);
            }
            let text = format!("Error: {}", waiting.reason);
            self.kubelet.recorder.warning(&Target::container(self.pod, &spec), "Failed", text);
        }
        result
    }

    async fn start(&mut self, start: &Start, sandbox: &SandboxInUse, image: images::Ready) -> Result<(), Waiting> {
        let spec = self.spec(start).ok_or_else(|| gone(start))?;
        let target = Target::container(self.pod, &spec);
        let restart_count = self.restart_count(&spec).await;
        if let Some(at) = start.after_exit_at {
            let key = crate::plan::restart_key(self.pod, &start.name);
            self.state.backoff.next(&key, at, Timestamp::now());
        }
        let kubelet = self.kubelet.clone();
        let failed = |event: &str, reason: &str, message: String| {
            kubelet.recorder.warning(&target, event, format!("Error: {message}"));
            Waiting { reason: reason.to_owned(), message }
        };
        let config = self
            .container_config(&spec, sandbox, &image, restart_count)
            .await
            .map_err(|message| failed("Failed", "CreateContainerConfigError", message))?;
        let id = kubelet
            .runtime
            .create_container(&sandbox.id, config, sandbox.config.clone())
            .await
            .map_err(|e| failed("Failed", "CreateContainerError", runtime::message(&e)))?;
        kubelet.recorder.normal(&target, "Created", "Container created");
        kubelet
            .runtime
            .start_container(model::uid(self.pod), &id)
            .await
            .map_err(|e| failed("Failed", "RunContainerError", runtime::message(&e)))?;
        kubelet.recorder.normal(&target, "Started", "Container started");
        self.post_start(&spec, &id, sandbox).await
    }

    async fn post_start(&self, spec: &Container, id: &str, sandbox: &SandboxInUse) -> Result<(), Waiting> {
        let Some(hook) = spec.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else {
            return Ok(());
        };
        let context = kill::Context {
            runtime: &self.kubelet.runtime,
            recorder: &self.kubelet.recorder,
            pod: self.pod,
            pod_ip: sandbox.ips.first().map_or("", String::as_str),
        };
        let Err(message) = kill::run_hook(&context, id, spec, hook, POST_START_LIMIT).await else {
            return Ok(());
        };
        tracing::warn!(pod = %model::format_pod(self.pod), container = %spec.name, message, "postStart hook failed");
        let target = Target::container(self.pod, spec);
        self.kubelet.recorder.warning(&target, "FailedPostStartHook", "PostStartHook failed");
        let kill = crate::plan::Kill {
            id: id.to_owned(),
            name: spec.name.clone(),
            message: "FailedPostStartHook".to_owned(),
            reason: crate::plan::KillReason::Other,
        };
        if let Err(error) = kill::kill(&context, &kill).await {
            tracing::warn!(pod = %model::format_pod(self.pod), %error, "failed to end container after its hook failed");
        }
        Err(Waiting { reason: "PostStartHookError".to_owned(), message })
    }

    /// One more than the last run's; after the runtime forgot it, one more than the newest log file's.
    async fn restart_count(&self, spec: &Container) -> u32 {
        if let Some(last) = self.seen.find(&spec.name) {
            return u32::try_from(last.restart_count + 1).unwrap_or(0);
        }
        let directory = log_directory(&self.kubelet.facts.log_root, self.pod);
        let directory = Path::new(&directory).join(&spec.name);
        let Ok(mut entries) = tokio::fs::read_dir(directory).await else {
            return 0;
        };
        let mut next = 0;
        while let Ok(Some(entry)) = entries.next_entry().await {
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.split_once('.')).map(|(n, _)| n);
            if let Some(number) = number.and_then(|n| n.parse::<u32>().ok()) {
                next = next.max(number + 1);
            }
        }
        next
    }

    async fn container_config(
        &self,
        spec: &Container,
        sandbox: &SandboxInUse,
        image: &images::Ready,
        restart_count: u32,
    ) -> Result<cri::ContainerConfig, String> {
        let names = Names::of_environment(spec);
        let lookup = objects::fetch(&self.kubelet.client, self.pod, &names).await;
        let facts = self.kubelet.downward_facts(sandbox.ips.clone());
        let services = self.kubelet.services();
        let sources = env::Sources { pod: self.pod, facts: &facts, lookup: &lookup, services: &services };
        let environment = env::environment(spec, &sources).map_err(|e| e.to_string())?;
        let mounts = self.mounts(spec, sandbox, &environment).await?;
        let target_id =
            crate::ephemeral::target_name(self.pod, &spec.name).and_then(|name| self.seen.find_active(name)).map(|c| c.id.as_str());
        let inputs = container_config::Inputs {
            pod: self.pod,
            restart_count,
            image_ref: &image.image_ref,
            image_user: &image.user,
            environment: &environment,
            mounts,
            target_id,
            node: &self.kubelet.facts,
        };
        container_config::config(spec, inputs)
    }

    async fn mounts(&self, spec: &Container, sandbox: &SandboxInUse, environment: &[(String, String)]) -> Result<Vec<cri::Mount>, String> {
        let mut mounts = Vec::new();
        let directory = self.kubelet.pod_directory(model::uid(self.pod));
        for (index, mount) in spec.volume_mounts.iter().flatten().enumerate() {
            let volume = self
                .volumes
                .get(&mount.name)
                .ok_or_else(|| format!("cannot find volume \"{}\" to mount into container \"{}\"", mount.name, spec.name))?;
            if mount.recursive_read_only.as_deref() == Some("Enabled") {
                return Err(format!("volume mount {}: recursiveReadOnly Enabled is not supported by this kubelet", mount.name));
            }
            let sub_path = match mount.sub_path_expr.as_deref().filter(|s| !s.is_empty()) {
                Some(expression) => sub_path_expr(expression, environment)?,
                None => mount.sub_path.clone().unwrap_or_default(),
            };
            let path = if sub_path.is_empty() {
                volume.path.clone()
            } else {
                let (directory, name, container) = (directory.clone(), mount.name.clone(), spec.name.clone());
                let root = volume.path.clone();
                blocking(move || subpath::prepare(&directory, &name, &root, &container, index, &sub_path)).await?
            };
            mounts.push(container_config::mount(mount, &path.to_string_lossy(), volume.readonly));
        }
        mounts.extend(self.own_files(spec, sandbox, &directory).await?);
        Ok(mounts)
    }

    /// /etc/hosts and the termination log, unless the pod mounts something there itself.
    async fn own_files(&self, spec: &Container, sandbox: &SandboxInUse, directory: &Path) -> Result<Vec<cri::Mount>, String> {
        let mut mounts = Vec::new();
        let failed = |act: &str, path: &Path, e: std::io::Error| format!("failed to {act} {}: {e}", path.display());
        let own = spec.volume_mounts.iter().flatten().any(|m| m.mount_path == "/etc/hosts");
        if !own && !sandbox.ips.is_empty() {
            let host_file = tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default();
            let domain = &self.kubelet.config.cluster_domain;
            let text = hosts::hosts_file(self.pod, &sandbox.ips, domain, &host_file);
            let path = directory.join("etc-hosts");
            // Containers that run have it mounted: on a full disk it must not be emptied.
            if tokio::fs::read(&path).await.ok().as_deref() != Some(text.as_bytes()) {
                tokio::fs::write(&path, text).await.map_err(|e| failed("write", &path, e))?;
            }
            mounts.push(cri::Mount {
                container_path: "/etc/hosts".to_owned(),
                host_path: path.to_string_lossy().into_owned(),
                ..Default::default()
            });
        }
        let termination = spec.termination_message_path.as_deref().unwrap_or("");
        if !termination.is_empty() {
            let parent = directory.join("containers").join(&spec.name);
            tokio::fs::create_dir_all(&parent).await.map_err(|e| failed("make container directory", &parent, e))?;
            let nanoseconds = Timestamp::now().subsec_nanosecond();
            let path = parent.join(format!("{nanoseconds:08x}"));
            tokio::fs::write(&path, b"").await.map_err(|e| failed("make termination log", &path, e))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
            tokio::fs::set_permissions(&path, mode).await.map_err(|e| failed("open up termination log", &path, e))?;
            mounts.push(cri::Mount {
                container_path: termination.to_owned(),
                host_path: path.to_string_lossy().into_owned(),
                ..Default::default()
            });
        }
        Ok(mounts)
    }
}

fn sub_path_expr(expression: &str, environment: &[(String, String)]) -> Result<String, String> {
    let expanded = env::expand_with(expression, environment);
    if expanded.contains("$(") {
        return Err(format!("failed to expand subPath expression {expression:?}"));
    }
    Ok(expanded)
}

fn gone(start: &Start) -> Waiting {
    Waiting { reason: "CreateContainerConfigError".to_owned(), message: format!("container {} is no longer in the pod's spec", start.name) }
}

/// Runs what blocks on disk off the async threads.
pub async fn blocking<T, F>(work: F) -> Result<T, String>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, String> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(format!("a task ended early: {e}")))
}
