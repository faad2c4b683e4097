//! Places pods on nodes: kube-scheduler's framework of filters and scores, and its binding.
//!
//! ```text
//! informers --> queue (active | backing off | unschedulable) --pop--> plan: filter, score --> assume --> POST pods/binding
//!      |                                                                  ^
//!      +--> cache: nodes, pods on them (bound and assumed) ---------------+
//! ```
//!
//! Seam: the API server, with the identity `system:kube-scheduler` and no other right. Preemption and volumes are not carried out
//! yet: a pod that would need them stays pending with upstream's reason.

#![forbid(unsafe_code)]

mod apply;
mod cache;
mod config;
mod filter;
mod labels;
mod plan;
mod queue;
mod resources;
mod score;

pub use config::Config;

use client::{ConnectError, EventRecorder, LeaderConfig, run_as_leader, run_events};
use tokio_util::sync::CancellationToken;

/// How the scheduler signs its events, and names itself to the API server.
const COMPONENT: &str = "default-scheduler";

/// Why the scheduler cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("failed to read --kubeconfig")]
    Connect(#[source] ConnectError),
    /// Another process has taken the lease.
    #[error("lost the lease kube-system/kube-scheduler")]
    LeaseLost,
}

/// Schedules until `cancel`; then no new pod is begun, and those being bound are finished.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<(), Error> {
    let client =
        client::connect(&config.kubeconfig, concat!("coracle-scheduler/", env!("CARGO_PKG_VERSION"))).await.map_err(Error::Connect)?;
    let recorder = EventRecorder::new(COMPONENT, "");
    let events = run_events(client.clone(), recorder.clone(), cancel.child_token());
    let lead = |cancel: CancellationToken| apply::schedule(client.clone(), config.scheduler_name.clone(), recorder.clone(), cancel);
    let work = async {
        if !config.leader_elect {
            lead(cancel.child_token()).await;
            return Ok(());
        }
        let leader = LeaderConfig::new("kube-scheduler", client::identity());
        run_as_leader(client.clone(), leader, cancel.clone(), lead).await;
        if cancel.is_cancelled() { Ok(()) } else { Err(Error::LeaseLost) }
    };
    let (result, ()) = tokio::join!(work, events);
    result
}
