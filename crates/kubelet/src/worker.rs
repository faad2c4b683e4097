//! One pod's worker.
//!
//! ```text
//!   Running --deleted, removed, deadline, rejected, all ended--> Ending --containers and sandbox stopped-->
//!   Ended --deleted or removed--> Cleaned (volumes, cgroup, containers, logs gone; object deleted) --> task ends
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::apply::{Apply, State as ApplyState, blocking};
use crate::cgroups;
use crate::cri::log_directory;
use crate::events::Target;
use crate::eviction;
use crate::kill;
use crate::kubelet::Kubelet;
use crate::model::{self, PodRuntime};
use crate::objects::{self, Names};
use crate::plan::plan;
use crate::probe;
use crate::runtime::{self, Span};
use crate::status::{self, Verdict};
use crate::status_writer::Wanted;
use crate::termination;
use crate::volume::{self, Volumes, token::Tokens};

/// Wait after a failed sync (upstream's backOffPeriod).
const RETRY: Duration = Duration::from_secs(10);
/// First and longest wait after volumes could not be set up.
const VOLUME_RETRY_MIN: Duration = Duration::from_millis(500);
const VOLUME_RETRY_MAX: Duration = Duration::from_secs(122);
/// Wait after ending the pod failed.
const END_RETRY: Duration = Duration::from_secs(2);

/// What the API wants of the pod.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The newest object.
    pub pod: Arc<Pod>,
    /// It is no longer in the API.
    pub removed: bool,
    /// The node is short of something, and takes it away.
    pub evicted: Option<Verdict>,
}

/// How far the pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Running,
    Ending { verdict: Option<Verdict> },
    Ended { verdict: Option<Verdict> },
    Cleaned,
}

/// The worker.
pub struct Worker {
    kubelet: Arc<Kubelet>,
    desired: watch::Receiver<Desired>,
    wake: Arc<Notify>,
    statuses: watch::Sender<Wanted>,
    stage: Stage,
    apply: ApplyState,
    volumes: Volumes,
    tokens: Tokens,
    probes: probe::Set,
    results: probe::Shared,
    previous: PodStatus,
    volume_retry: Duration,
    admission: Option<Verdict>,
    /// An emptyDir over its limit, or a node that is short of something, ends the pod.
    evicted: Option<Verdict>,
    /// The pod that volumes were last set up for, and when.
    prepared: Option<(Instant, Arc<Pod>)>,
}

/// What a pass of the worker asks for.
enum Next {
    /// Look again at once.
    Now,
    /// Look again at the latest after this long.
    After(Duration),
    /// Nothing is left to do.
    Finished,
}

impl Worker {
    /// A worker for a pod; `rejected` is the admission's verdict.
    pub fn new(
        kubelet: Arc<Kubelet>,
        desired: watch::Receiver<Desired>,
        wake: Arc<Notify>,
        statuses: watch::Sender<Wanted>,
        rejected: Option<Verdict>,
    ) -> Self {
        let results = probe::Shared::default();
        let context = probe::Context {
            runtime: kubelet.runtime.clone(),
            recorder: kubelet.recorder.clone(),
            results: results.clone(),
            wake: wake.clone(),
            kubelet_started: kubelet.started,
        };
        let previous = desired.borrow().pod.status.clone().unwrap_or_default();
        Self {
            kubelet,
            desired,
            wake,
            statuses,
            stage: Stage::Running,
            apply: ApplyState::default(),
            volumes: Volumes::new(),
            tokens: Tokens::default(),
            probes: probe::Set::new(context),
            results,
            previous,
            volume_retry: VOLUME_RETRY_MIN,
            admission: rejected,
            evicted: None,
            prepared: None,
        }
    }

    /// Runs until the pod is cleaned up, or cancelled: then everything is left as it is.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            let desired = self.desired.borrow_and_update().clone();
            let next = tokio::select! {
                () = cancel.cancelled() => return,
                next = self.pass(&desired) => next,
            };
            let wait = match next {
                Next::Now => continue,
                Next::Finished => return,
                Next::After(wait) => wait,
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                () = self.wake.notified() => {}
                changed = self.desired.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn pass(&mut self, desired: &Desired) -> Next {
        let pod = &desired.pod;
        let leaving = desired.removed || pod.metadata.deletion_timestamp.is_some();
        if leaving && self.stage == Stage::Running {
            self.stage = Stage::Ending { verdict: None };
        }
        let span = Span::start(model::uid(pod), "kubelet.sync");
        let result = match self.stage.clone() {
            Stage::Running => self.sync(pod).await,
            Stage::Ending { verdict } => self.end(desired, verdict).await,
            Stage::Ended { verdict } if leaving => self.clean(desired, verdict).await,
            Stage::Ended { .. } => Ok(Next::After(self.kubelet.config.sync_frequency)),
            Stage::Cleaned if desired.removed => Ok(Next::Finished),
            Stage::Cleaned => Ok(Next::After(self.kubelet.config.sync_frequency)),
        };
        span.end();
        result.unwrap_or_else(|error| {
            tracing::warn!(pod = %model::format_pod(pod), error, "failed to sync pod");
            Next::After(END_RETRY)
        })
    }

    async fn observe(&self, pod: &Pod) -> Result<PodRuntime, String> {
        let seen = self.kubelet.runtime.observe(model::uid(pod)).await;
        let seen = seen.map_err(|e| format!("failed to observe the pod: {}", runtime::go_error(&e)))?;
        blocking(move || Ok(termination::read_messages(seen))).await
    }

    /// One sync of a pod that is to run.
    async fn sync(&mut self, pod: &Arc<Pod>) -> Result<Next, String> {
        let seen = self.observe(pod).await?;
        self.sync_probes(pod, &seen);
        let now = Timestamp::now();
        self.evicted = self.evicted.take().or_else(|| self.desired.borrow().evicted.clone());
        if let Some(verdict) = self.verdict(pod, now) {
            let target = Target::pod(pod);
            match verdict.reason.as_str() {
                "DeadlineExceeded" => self.kubelet.recorder.normal(&target, "DeadlineExceeded", &verdict.message),
                "Evicted" => self.kubelet.recorder.warning(&target, "Evicted", &verdict.message),
                _ => {}
            }
            self.stage = Stage::Ending { verdict: Some(verdict) };
            return Ok(Next::Now);
        }
        let status = self.status(pod, &seen, false, None);
        if model::is_terminal_phase(status.phase.as_deref()) {
            self.previous = status;
            self.stage = Stage::Ending { verdict: None };
            return Ok(Next::Now);
        }
        self.publish(pod, status, false);
        if let Some(error) = self.kubelet.live().network_error
            && !model::is_host_network(pod)
        {
            let text = format!("network is not ready: {error}");
            self.kubelet.recorder.warning(&Target::pod(pod), "NetworkNotReady", text);
            return Ok(Next::After(RETRY));
        }
        if let Err(wait) = self.prepare(pod, &seen).await {
            return Ok(Next::After(wait));
        }
        if self.evicted.is_some() {
            return Ok(Next::Now);
        }
        let plan = plan(pod, &seen, &self.results.snapshot(), &self.apply.backoff, now);
        let give_up = leaving(self.desired.clone());
        let mut apply = Apply { kubelet: &self.kubelet, pod, seen: &seen, volumes: &self.volumes, state: &mut self.apply };
        let outcome = apply.run(&plan, give_up).await;
        if outcome.changed && !outcome.failed {
            return Ok(Next::Now);
        }
        if outcome.changed || outcome.failed || !plan.backing_off.is_empty() {
            let seen = self.observe(pod).await?;
            self.sync_probes(pod, &seen);
            let status = self.status(pod, &seen, false, None);
            self.publish(pod, status, false);
        }
        self.remove_dead(pod, &seen).await;
        let held = plan.backing_off.iter().map(|b| b.until).min();
        Ok(Next::After(self.wait(pod, held, outcome.failed)))
    }

    /// How long nothing needs to be done.
    fn wait(&self, pod: &Pod, held: Option<Timestamp>, failed: bool) -> Duration {
        let now = Timestamp::now();
        let pulls = self.apply.pulls.next_try(now);
        let deadline = deadline(pod, &self.previous);
        let renewal = self.tokens.next_renewal(now);
        let earliest = [held, pulls, deadline, renewal].into_iter().flatten().min();
        let until = earliest.map(|at| {
            let wait = at.duration_since(now);
            // A little later than the instant, so that it has surely come.
            Duration::try_from(wait).unwrap_or(Duration::ZERO) + Duration::from_millis(20)
        });
        let frequency = self.kubelet.config.sync_frequency;
        let longest = match () {
            () if failed => RETRY,
            // Its volumes are measured as often as they may be looked at.
            () if volume::usage::is_limited(pod) => frequency / 2,
            () => frequency,
        };
        until.map_or(longest, |u| u.min(longest))
    }

    fn verdict(&self, pod: &Pod, now: Timestamp) -> Option<Verdict> {
        if let Some(verdict) = self.admission.as_ref().or(self.evicted.as_ref()) {
            return Some(verdict.clone());
        }
        deadline(pod, &self.previous).filter(|at| *at <= now).map(|_| Verdict {
            reason: "DeadlineExceeded".to_owned(),
            message: "Pod was active on the node longer than the specified deadline".to_owned(),
            ..Verdict::default()
        })
    }

    /// Cgroup, directories and volumes; the error is how long to wait.
    async fn prepare(&mut self, pod: &Arc<Pod>, seen: &PodRuntime) -> Result<(), Duration> {
        if self.is_prepared(pod) {
            return Ok(());
        }
        let target = Target::pod(pod);
        let recorder = self.kubelet.recorder.clone();
        let (kubelet, owned) = (self.kubelet.clone(), pod.clone());
        let directory = kubelet.pod_directory(model::uid(pod));
        let made = blocking(move || {
            cgroups::make_pod(&owned, &kubelet.facts).map_err(|e| format!("unable to ensure pod container exists: {e}"))?;
            let volumes = directory.join("volumes");
            std::fs::create_dir_all(&volumes).map_err(|e| format!("error making pod data directory {}: {e}", volumes.display()))
        });
        if let Err(error) = made.await {
            recorder.warning(&target, "FailedCreatePodContainer", error);
            return Err(RETRY);
        }
        let now = Timestamp::now();
        self.tokens.refresh(&self.kubelet.client, pod, now).await;
        let names = Names::of_volumes(pod);
        let lookup = objects::fetch(&self.kubelet.client, pod, &names).await;
        let facts = self.kubelet.downward_facts(seen.ips());
        let (kubelet, owned, tokens) = (self.kubelet.clone(), pod.clone(), self.tokens.clone());
        let result = tokio::task::spawn_blocking(move || {
            let mounted = volume::set_up(&volume::Inputs {
                root: &kubelet.config.root_dir,
                pod: &owned,
                lookup: &lookup,
                tokens: &tokens,
                facts: &facts,
                memory_bytes: kubelet.facts.memory_bytes,
            })?;
            Ok::<_, volume::Error>((mounted, volume::usage::over_limit(&kubelet.config.root_dir, &owned)))
        });
        match result.await {
            Ok(Ok((volumes, over_limit))) => {
                self.volumes = volumes;
                self.evicted = over_limit.map(eviction::immediate);
                self.volume_retry = VOLUME_RETRY_MIN;
                self.prepared = Some((Instant::now(), pod.clone()));
                Ok(())
            }
            // What is mounted stays in use when it cannot be refreshed: a server that is away ends no pod.
            Ok(Err(error)) if seen.running().next().is_some() && !self.volumes.is_empty() => {
                tracing::warn!(pod = %model::format_pod(pod), %error, "failed to refresh volumes");
                Ok(())
            }
            Ok(Err(error)) => {
                recorder.warning(&target, "FailedMount", error.to_string());
                let wait = self.volume_retry;
                self.volume_retry = (wait * 2).min(VOLUME_RETRY_MAX);
                Err(wait)
            }
            Err(error) => {
                tracing::error!(pod = %model::format_pod(pod), %error, "setting up volumes ended early");
                Err(RETRY)
            }
        }
    }

    /// True when volumes were set up a moment ago for this very pod: a pass that follows another at once need not
    /// fetch everything again.
    fn is_prepared(&self, pod: &Pod) -> bool {
        let fresh = self.kubelet.config.sync_frequency / 2;
        let now = Timestamp::now();
        let due = self.tokens.next_renewal(now).is_some_and(|at| at <= now);
        !due && self.prepared.as_ref().is_some_and(|(at, last)| {
            at.elapsed() < fresh
                && last.spec == pod.spec
                && last.metadata.labels == pod.metadata.labels
                && last.metadata.annotations == pod.metadata.annotations
        })
    }

    fn sync_probes(&mut self, pod: &Pod, seen: &PodRuntime) {
        let mut ips = seen.ips();
        if ips.is_empty() && model::is_host_network(pod) {
            ips = self.kubelet.live().host_ips;
        }
        let old: Vec<ContainerStatus> =
            self.previous.container_statuses.iter().chain(self.previous.init_container_statuses.iter()).flatten().cloned().collect();
        self.probes.sync(pod, seen, ips.first().map_or("", String::as_str), &old);
    }

    fn status(&self, pod: &Pod, seen: &PodRuntime, terminal: bool, verdict: Option<&Verdict>) -> PodStatus {
        let live = self.kubelet.live();
        let inputs = status::Inputs {
            previous: &self.previous,
            waiting: &self.apply.waiting,
            probes: &self.results.snapshot(),
            host_ips: &live.host_ips,
            runtime_name: &live.runtime_name,
            terminal,
            now: Timestamp::now(),
        };
        let mut status = status::generate(pod, seen, &inputs, verdict);
        let api = pod.status.as_ref();
        let was_rejected = api.is_some_and(|s| model::is_terminal_phase(s.phase.as_deref()) && s.container_statuses.is_none());
        if self.admission.is_some() || (was_rejected && seen.containers.is_empty()) {
            // No container of a rejected pod was ever to be made: the reason stands alone.
            status.container_statuses = None;
            status.init_container_statuses = None;
        }
        status
    }

    fn publish(&mut self, pod: &Arc<Pod>, status: PodStatus, delete: bool) {
        self.previous = status.clone();
        self.statuses.send_replace(Wanted { pod: Some(pod.clone()), status: Some(status), delete });
    }

    /// Keeps the newest dead container of each name; older ones and spent sandboxes go.
    async fn remove_dead(&self, pod: &Pod, seen: &PodRuntime) {
        for id in crate::gc::dead_containers(seen) {
            if let Err(error) = self.kubelet.runtime.remove_container(&id).await {
                tracing::warn!(pod = %model::format_pod(pod), container_id = id, %error, "failed to remove dead container");
            }
        }
        for id in crate::gc::dead_sandboxes(seen) {
            if let Err(error) = self.kubelet.runtime.remove_sandbox(&id).await {
                tracing::warn!(pod = %model::format_pod(pod), sandbox_id = id, %error, "failed to remove dead sandbox");
            }
        }
    }

    /// Ends all containers and the sandbox, then tells the final status.
    async fn end(&mut self, desired: &Desired, verdict: Option<Verdict>) -> Result<Next, String> {
        let pod = &desired.pod;
        let seen = self.observe(pod).await?;
        self.sync_probes(pod, &seen);
        if !desired.removed {
            let mut status = self.status(pod, &seen, false, None);
            let settled = pod.status.as_ref().and_then(|s| s.phase.as_deref());
            if model::is_terminal_phase(status.phase.as_deref()) && !model::is_terminal_phase(settled) {
                // Terminal only once nothing runs any more.
                status.phase = pod.status.as_ref().and_then(|s| s.phase.clone());
            }
            self.publish(pod, status, false);
        }
        self.probes.stop_liveness_and_startup();
        if let Err(error) = self.stop(&seen, verdict.as_ref().and_then(|v| v.grace_seconds)).await {
            let text = format!("error killing pod: {error}");
            self.kubelet.recorder.warning(&Target::pod(pod), "FailedKillPod", &text);
            return Err(text);
        }
        let stopped = self.observe(pod).await?;
        if stopped.running().next().is_some() {
            return Err("containers still run after they were stopped".to_owned());
        }
        self.probes.stop();
        let pod = self.desired.borrow().pod.clone();
        let status = self.status(&pod, &stopped, true, verdict.as_ref());
        self.publish(&pod, status, false);
        self.stage = Stage::Ended { verdict };
        self.release(&pod).await?;
        Ok(Next::Now)
    }

    /// Stops the pod, with `grace_override` seconds when the node decides; begins anew when the grace period is shortened
    /// meanwhile.
    async fn stop(&mut self, seen: &PodRuntime, grace_override: Option<i64>) -> Result<(), String> {
        let mut desired = self.desired.clone();
        loop {
            let now = desired.borrow_and_update().clone();
            let grace = match (now.pod.metadata.deletion_grace_period_seconds, grace_override) {
                (Some(asked), Some(own)) => Some(asked.min(own)),
                (asked, own) => asked.or(own),
            };
            // A pod that is deleted by force is given this still (upstream's `calculateEffectiveGracePeriod`).
            let given = grace.map(|seconds| seconds.max(1));
            let ips = seen.ips();
            let context = kill::Context {
                runtime: &self.kubelet.runtime,
                recorder: &self.kubelet.recorder,
                pod: &now.pod,
                pod_ip: ips.first().map_or("", String::as_str),
            };
            let shortened = async {
                let shorter = |d: &Desired| {
                    let new = d.pod.metadata.deletion_grace_period_seconds;
                    new.is_some() && (grace.is_none() || new < grace)
                };
                if desired.wait_for(shorter).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                result = kill::stop_pod(&context, seen, given) => {
                    return result.map_err(|e| runtime::go_error(&e));
                }
                () = shortened => {}
            }
        }
    }

    /// Gives volumes and cgroup back.
    async fn release(&mut self, pod: &Arc<Pod>) -> Result<(), String> {
        let (kubelet, owned) = (self.kubelet.clone(), pod.clone());
        self.volumes.clear();
        blocking(move || {
            let volumes = volume::tear_down(&kubelet.config.root_dir, model::uid(&owned));
            let cgroup = cgroups::remove_pod(&owned, &kubelet.facts).map_err(|e| e.to_string());
            volumes.and(cgroup)
        })
        .await
    }

    /// Removes all that is left of the pod, and at last its object.
    async fn clean(&mut self, desired: &Desired, verdict: Option<Verdict>) -> Result<Next, String> {
        let pod = &desired.pod;
        let seen = self.observe(pod).await?;
        let status = self.status(pod, &seen, true, verdict.as_ref());
        self.release(pod).await?;
        remove_all(&self.kubelet, &seen).await?;
        remove_logs(&self.kubelet, pod).await?;
        self.publish(pod, status, !desired.removed);
        self.stage = Stage::Cleaned;
        Ok(Next::Now)
    }
}

/// Removes every container and sandbox.
pub async fn remove_all(kubelet: &Kubelet, seen: &PodRuntime) -> Result<(), String> {
    for container in &seen.containers {
        let removed = kubelet.runtime.remove_container(&container.id).await;
        removed.map_err(|e| runtime::go_error(&e))?;
    }
    for sandbox in &seen.sandboxes {
        kubelet.runtime.stop_sandbox(&sandbox.id).await.map_err(|e| runtime::go_error(&e))?;
        kubelet.runtime.remove_sandbox(&sandbox.id).await.map_err(|e| runtime::go_error(&e))?;
    }
    Ok(())
}

async fn remove_logs(kubelet: &Kubelet, pod: &Pod) -> Result<(), String> {
    let directory = log_directory(&kubelet.facts.log_root, pod);
    match tokio::fs::remove_dir_all(&directory).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("failed to remove log directory {directory}: {e}")),
        _ => Ok(()),
    }
}

/// Resolves when the pod is being deleted or is gone from the API.
async fn leaving(mut desired: watch::Receiver<Desired>) {
    let gone = |d: &Desired| d.removed || d.pod.metadata.deletion_timestamp.is_some();
    if desired.wait_for(gone).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// When activeDeadlineSeconds is over.
fn deadline(pod: &Pod, status: &PodStatus) -> Option<Timestamp> {
    let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
    let start = status.start_time.as_ref()?.0;
    Timestamp::from_second(start.as_second() + seconds).ok()
}
