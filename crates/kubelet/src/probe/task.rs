//! The probe tasks of one pod: one a running container, owned by the pod's worker
//! (upstream pkg/kubelet/prober/worker.go, v1.37).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, Probe};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::events::{Recorder, Target};
use crate::model::{self, PodRuntime, RunState};
use crate::probe::action::{self, Verdict};
use crate::probe::{Kind, Outcome, Shared};
use crate::runtime::Runtime;
use crate::status;

/// What every probe task of a pod needs.
#[derive(Clone)]
pub struct Context {
    /// The runtime, for exec.
    pub runtime: Runtime,
    /// Where failures are told.
    pub recorder: Recorder,
    /// Where results go.
    pub results: Shared,
    /// Wakes the pod's worker when a result changes.
    pub wake: Arc<Notify>,
    /// When this kubelet started: probes that it takes over begin at a random instant of their period.
    pub kubelet_started: Timestamp,
}

/// The running probe tasks of a pod. Dropping it ends them.
pub struct Set {
    context: Context,
    tasks: JoinSet<()>,
    /// By container id: (ends liveness and startup, ends all).
    running: HashMap<String, (CancellationToken, CancellationToken)>,
}

impl Set {
    /// No tasks yet.
    pub fn new(context: Context) -> Self {
        Self { context, tasks: JoinSet::new(), running: HashMap::new() }
    }

    /// Starts tasks for containers that run and have none, ends those of containers that do not run.
    pub fn sync(&mut self, pod: &Pod, runtime: &PodRuntime, pod_ip: &str, old: &[ContainerStatus]) {
        while self.tasks.try_join_next().is_some() {}
        let mut gone: Vec<String> = self.running.keys().cloned().collect();
        for container in &runtime.containers {
            if container.state != RunState::Running {
                continue;
            }
            gone.retain(|id| *id != container.id);
            let Some(spec) = model::container_spec(pod, &container.name) else {
                continue;
            };
            let sidecar_or_regular = model::is_sidecar(spec) || model::containers(pod).iter().any(|c| c.name == spec.name);
            let any = spec.startup_probe.is_some() || spec.liveness_probe.is_some() || spec.readiness_probe.is_some();
            if any && sidecar_or_regular && !self.running.contains_key(&container.id) {
                self.start(pod, spec, container, pod_ip, old);
            }
        }
        for id in gone {
            if let Some((_, all)) = self.running.remove(&id) {
                all.cancel();
            }
            self.context.results.forget(&id);
        }
    }

    /// Ends liveness and startup probes: the pod is being deleted.
    pub fn stop_liveness_and_startup(&mut self) {
        for (id, (some, _)) in &self.running {
            some.cancel();
            for kind in [Kind::Liveness, Kind::Startup] {
                if self.context.results.get(id, kind).is_some() {
                    self.context.results.set(id, kind, Outcome::Success);
                }
            }
        }
    }

    /// Ends all probes.
    pub fn stop(&mut self) {
        for (_, (some, all)) in self.running.drain() {
            some.cancel();
            all.cancel();
        }
        self.tasks.abort_all();
    }

    fn start(&mut self, pod: &Pod, spec: &Container, container: &model::Container, pod_ip: &str, old: &[ContainerStatus]) {
        let same = old.iter().find(|s| status::bare_id(s.container_id.as_deref().unwrap_or("")) == container.id);
        let taken_over = container.started_at.is_some_and(|at| at < self.context.kubelet_started);
        let was_started = taken_over && same.is_some_and(|s| s.started == Some(true));
        let was_ready = taken_over && same.is_some_and(|s| s.ready);
        let initial = |probe: &Option<Probe>, kind, outcome| {
            if probe.is_some() {
                self.context.results.set(&container.id, kind, outcome);
            }
        };
        let seeded = |yes: bool, other| if yes { Outcome::Success } else { other };
        initial(&spec.startup_probe, Kind::Startup, seeded(was_started, Outcome::Unknown));
        initial(&spec.liveness_probe, Kind::Liveness, Outcome::Success);
        initial(&spec.readiness_probe, Kind::Readiness, seeded(was_ready, Outcome::Failure));
        let quick = CancellationToken::new();
        let all = CancellationToken::new();
        let task = ContainerTask {
            context: self.context.clone(),
            target: Target::container(pod, spec),
            spec: spec.clone(),
            id: container.id.clone(),
            started_at: container.started_at.unwrap_or(self.context.kubelet_started),
            pod_ip: pod_ip.to_owned(),
            taken_over,
            started: was_started || spec.startup_probe.is_none(),
        };
        self.tasks.spawn(task.run(quick.clone(), all.clone()));
        self.running.insert(container.id.clone(), (quick, all));
    }
}

struct ContainerTask {
    context: Context,
    target: Target,
    spec: Container,
    id: String,
    started_at: Timestamp,
    pod_ip: String,
    taken_over: bool,
    started: bool,
}

impl ContainerTask {
    /// Startup first; then liveness and readiness side by side until cancelled.
    async fn run(self, quick: CancellationToken, all: CancellationToken) {
        if !self.started
            && let Some(probe) = &self.spec.startup_probe
        {
            tokio::select! {
                () = quick.cancelled() => return,
                () = all.cancelled() => return,
                outcome = self.until_decided(Kind::Startup, probe) => {
                    if outcome != Outcome::Success {
                        return;
                    }
                }
            }
        }
        let liveness = async {
            if let Some(probe) = &self.spec.liveness_probe {
                tokio::select! {
                    () = quick.cancelled() => {}
                    _ = self.until_decided(Kind::Liveness, probe) => {}
                }
            }
        };
        let readiness = async {
            if let Some(probe) = &self.spec.readiness_probe {
                self.until_decided(Kind::Readiness, probe).await;
            }
        };
        tokio::select! {
            () = all.cancelled() => {}
            ((), ()) = async { tokio::join!(liveness, readiness) } => {}
        }
    }

    /// Probes at the period. Returns when a startup probe is decided or a liveness probe has failed; a readiness
    /// probe never returns.
    async fn until_decided(&self, kind: Kind, probe: &Probe) -> Outcome {
        let period = Duration::from_secs(positive(probe.period_seconds, 10));
        self.initial_delay(probe, period).await;
        let mut ticker = tokio::time::interval(period);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut run = (Outcome::Unknown, 0u64);
        loop {
            ticker.tick().await;
            let outcome = match self.once(kind, probe).await {
                Some(outcome) => outcome,
                None => continue,
            };
            run = if run.0 == outcome { (outcome, run.1 + 1) } else { (outcome, 1) };
            let threshold = match outcome {
                Outcome::Failure => positive(probe.failure_threshold, 3),
                _ => positive(probe.success_threshold, 1),
            };
            if run.1 < threshold {
                continue;
            }
            if self.context.results.set(&self.id, kind, outcome) {
                self.context.wake.notify_one();
            }
            let decided = match kind {
                Kind::Startup => true,
                Kind::Liveness => outcome == Outcome::Failure,
                Kind::Readiness => false,
            };
            if decided {
                return outcome;
            }
        }
    }

    async fn initial_delay(&self, probe: &Probe, period: Duration) {
        let delay = i64::from(probe.initial_delay_seconds.unwrap_or(0));
        let age = Timestamp::now().duration_since(self.started_at).as_secs();
        let mut wait = Duration::from_secs(u64::try_from(delay - age).unwrap_or(0));
        if self.taken_over {
            // All probes of a node would run at once otherwise; the container's id spreads them.
            let spread = self.id.bytes().fold(0u64, |a, b| (a * 31 + u64::from(b)) % 1000);
            wait += period.mul_f64(spread as f64 / 1000.0);
        }
        tokio::time::sleep(wait).await;
    }

    /// One execution with upstream's three tries on an error; `None` counts for nothing.
    async fn once(&self, kind: Kind, probe: &Probe) -> Option<Outcome> {
        const TRIES: usize = 3;
        for left in (0..TRIES).rev() {
            let c = &self.context;
            match action::probe(&c.runtime, &self.id, &self.spec, probe, &self.pod_ip).await {
                Verdict::Success => return Some(Outcome::Success),
                Verdict::Warning(text) => {
                    let text = format!("{kind} probe warning: {text}");
                    c.recorder.warning(&self.target, "ProbeWarning", text);
                    return Some(Outcome::Success);
                }
                Verdict::Failure(text) => {
                    let text = format!("{kind} probe failed: {text}");
                    c.recorder.warning(&self.target, "Unhealthy", text);
                    return Some(Outcome::Failure);
                }
                Verdict::Error(text) if left == 0 => {
                    let text = format!("{kind} probe errored and resulted in unknown state: {text}");
                    c.recorder.warning(&self.target, "Unhealthy", text);
                }
                Verdict::Error(_) => {}
            }
        }
        None
    }
}

fn positive(value: Option<i32>, default: u64) -> u64 {
    value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)
}
