//! Node-pressure eviction: measures, sets the node's conditions, wins back images, and takes pods away one by one
//! (upstream pkg/kubelet/eviction, v1.37).
//!
//! ```text
//!   observe -> plan::look -> conditions (node status, admission)
//!                         -> images, ended containers -> observe -> rank -> one pod: verdict to its worker
//! ```
//!
//! Memory that is available is the kernel's `MemAvailable`, where upstream counts the root cgroup's usage without inactive file
//! pages: page cache in use is no pressure here. The signals of containerfs follow nodefs or imagefs and are not kept apart.

mod observe;
pub use self::observe::image_root as observe_image_fs;
pub mod plan;
pub mod rank;
pub mod thresholds;

use std::sync::Arc;
use std::time::{Duration, Instant};

use client::Informer;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use self::thresholds::Pressure;
use crate::events::Target;
use crate::image_gc;
use crate::kubelet::Kubelet;
use crate::model;
use crate::status::Verdict;

/// How often it is measured (upstream's evictionMonitoringPeriod).
const PERIOD: Duration = Duration::from_secs(10);
/// How long an evicted pod is waited for before the next look, and how often it is looked after.
const CLEANUP: Duration = Duration::from_secs(30);
const CLEANUP_POLL: Duration = Duration::from_secs(1);
/// Grace of pods that go at once, seconds (upstream's immediateEvictionGracePeriodSeconds).
pub const IMMEDIATE_GRACE_SECONDS: i64 = 1;
/// Evictions that wait for the manager: it takes them as they come.
pub const QUEUE: usize = 16;

/// A pod's uid, and why it goes.
pub type Eviction = (String, Verdict);

/// An eviction for a reason that is the pod's own: it goes at once.
pub fn immediate(message: String) -> Verdict {
    Verdict { reason: "Evicted".to_owned(), message, grace_seconds: Some(IMMEDIATE_GRACE_SECONDS), disruption: false }
}

/// Measures until cancelled.
pub async fn run(kubelet: Arc<Kubelet>, pods: Informer<Pod>, sender: mpsc::Sender<Eviction>, cancel: CancellationToken) {
    let mut keeper = Keeper { kubelet, pods, sender, state: plan::State::default() };
    loop {
        let evicted = tokio::select! {
            () = cancel.cancelled() => return,
            evicted = keeper.pass() => evicted,
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = keeper.wait(evicted) => {}
        }
    }
}

struct Keeper {
    kubelet: Arc<Kubelet>,
    pods: Informer<Pod>,
    sender: mpsc::Sender<Eviction>,
    state: plan::State,
}

impl Keeper {
    /// Until the next look: when the pods are gone, else after the period.
    async fn wait(&self, evicted: Vec<String>) {
        if evicted.is_empty() {
            tokio::time::sleep(PERIOD).await;
            return;
        }
        let deadline = Instant::now() + CLEANUP;
        while Instant::now() < deadline {
            tokio::time::sleep(CLEANUP_POLL).await;
            let left = self.active().iter().any(|pod| evicted.iter().any(|uid| uid == model::uid(pod)));
            if !left {
                return;
            }
        }
    }

    /// Pods that may still use something.
    fn active(&self) -> Vec<Arc<Pod>> {
        let over = |pod: &Pod| model::is_terminal_phase(pod.status.as_ref().and_then(|s| s.phase.as_deref()));
        self.pods.list().into_iter().filter(|pod| !over(pod)).collect()
    }

    /// One look; the uids of pods that were told to go.
    async fn pass(&mut self) -> Vec<String> {
        let thresholds = self.kubelet.config.thresholds().unwrap_or_default();
        let node = observe::node(&self.kubelet).await;
        let transition = self.kubelet.config.eviction_pressure_transition_period;
        let decision = plan::look(&mut self.state, &thresholds, &node.seen, transition, Instant::now());
        self.kubelet.update_live(|live| live.pressures.clone_from(&decision.pressures));
        let active = self.active();
        // What pods use costs calls and a walk over their files: it is only measured when it may matter.
        let limited = active.iter().any(|pod| rank::has_ephemeral_limit(pod));
        if !limited && decision.thresholds.is_empty() {
            return Vec::new();
        }
        let mut candidates = observe::pods(&self.kubelet, active).await;
        let evicted = self.local_storage(&candidates, node.dedicated_image_fs).await;
        let Some(cause) = decision.thresholds.first().copied().filter(|_| evicted.is_empty()) else {
            return evicted;
        };
        let resource = cause.signal.resource();
        let target = Target::node(&self.kubelet.node_name);
        self.kubelet.recorder.warning(&target, "EvictionThresholdMet", format!("Attempting to reclaim {resource}"));
        if self.reclaim(&cause, &thresholds, &node).await {
            return Vec::new();
        }
        rank::rank(&mut candidates, cause.signal, node.dedicated_image_fs);
        for (pod, usage) in &candidates {
            let message = rank::message(pod, usage.as_ref(), &cause, &node.seen);
            let grace = self.grace_seconds(pod, &cause);
            let verdict = Verdict { reason: "Evicted".to_owned(), message, grace_seconds: Some(grace), disruption: true };
            if self.evict(pod, verdict).await {
                return vec![model::uid(pod).to_owned()];
            }
        }
        Vec::new()
    }

    fn grace_seconds(&self, pod: &Pod, cause: &thresholds::Threshold) -> i64 {
        if cause.is_hard() {
            return IMMEDIATE_GRACE_SECONDS;
        }
        let most = self.kubelet.config.eviction_max_pod_grace_period;
        let own = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        own.map_or(most, |own| own.min(most))
    }

    /// Pods over their own limits of the node's disk.
    async fn local_storage(&self, candidates: &[rank::Candidate], dedicated_image_fs: bool) -> Vec<String> {
        let mut evicted = Vec::new();
        for (pod, usage) in candidates {
            let Some(message) = usage.as_ref().and_then(|usage| rank::over_ephemeral_limit(pod, usage, dedicated_image_fs)) else {
                continue;
            };
            if self.evict(pod, immediate(message)).await {
                evicted.push(model::uid(pod).to_owned());
            }
        }
        evicted
    }

    /// Removes unused images and ended pods' containers when the disk is short; true when that was enough.
    async fn reclaim(&self, cause: &thresholds::Threshold, all: &[thresholds::Threshold], node: &observe::Node) -> bool {
        use thresholds::Signal::{ImageFsAvailable, ImageFsInodesFree, NodeFsAvailable, NodeFsInodesFree};
        let images_help = match cause.signal {
            ImageFsAvailable | ImageFsInodesFree => true,
            NodeFsAvailable | NodeFsInodesFree => !node.dedicated_image_fs,
            _ => false,
        };
        if !images_help {
            return false;
        }
        image_gc::remove_ended_containers(&self.kubelet, &self.pods).await;
        if let Err(error) = image_gc::remove_unused(&self.kubelet, i64::MAX).await {
            tracing::warn!(error, "failed to remove unused images");
        }
        let seen = observe::node(&self.kubelet).await.seen;
        plan::met(all, &seen, true).is_empty()
    }

    /// Tells the pod's worker; false when the pod must stay.
    async fn evict(&self, pod: &Arc<Pod>, verdict: Verdict) -> bool {
        if model::is_critical(pod) {
            tracing::warn!(pod = %model::format_pod(pod), "a critical pod is not evicted");
            return false;
        }
        tracing::info!(pod = %model::format_pod(pod), message = verdict.message, "evicting a pod");
        self.sender.send((model::uid(pod).to_owned(), verdict)).await.is_ok()
    }
}
