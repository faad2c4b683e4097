//! What client-go is: kube-rs plus informers, a keyed work queue with back-off, leader election, events.
//!
//! A controller is: informers whose changes add keys to a [`WorkQueue`], and [`run_workers`] over it. Nothing here
//! decides anything; deciding is the caller's pure plan.
#![forbid(unsafe_code)]

mod backoff;
mod connect;
mod events;
mod informer;
mod leader;
pub mod placement;
mod queue;
mod workers;

pub use backoff::WatchBackoff;
pub use connect::{ConnectError, Token, connect, connect_with_config, connect_with_token, load_config};
pub use events::{EventRecorder, EventType, run_events};
pub use informer::{Delta, Informer, ObjectKey};
pub use leader::{LeaderConfig, identity, run_as_leader};
pub use queue::{RateLimits, WorkQueue};
pub use workers::{Requeue, run_workers};

pub use k8s_openapi;
pub use kube;
