//! Leader election by a Lease, as client-go's `tools/leaderelection` does it.
//!
//! Nobody's clock is compared with another's: a candidate waits until it has itself seen the lease unchanged for the
//! whole lease duration.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Which lease, who asks for it, and how long things take; the defaults are upstream's flags' (`--leader-elect-*`).
#[derive(Debug, Clone)]
pub struct LeaderConfig {
    /// Namespace of the lease.
    pub namespace: String,
    /// Name of the lease.
    pub name: String,
    /// The candidate; different for each process.
    pub identity: String,
    /// How long others wait after the last renewal that they saw (15 s).
    pub lease_duration: Duration,
    /// How long the leader tries to renew before it gives up (10 s).
    pub renew_deadline: Duration,
    /// Time between tries (2 s).
    pub retry_period: Duration,
}

impl LeaderConfig {
    /// Upstream's times.
    pub fn new(name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self {
            namespace: "kube-system".to_owned(),
            name: name.into(),
            identity: identity.into(),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// A candidate's name that no other process has, on this host or another, now or after a restart.
pub fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let nonce = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{}_{}_{nonce:x}", host.trim(), std::process::id())
}

/// What was last seen of the lease, and when it last changed.
#[derive(Debug, Default)]
struct Observed {
    spec: Option<LeaseSpec>,
    at: Option<Instant>,
}

/// What to do about the lease. Pure.
#[derive(Debug, PartialEq)]
enum Plan {
    /// Another one holds it.
    Wait,
    /// Write this (and the name in it says who leads).
    Write(LeaseSpec),
}

fn plan(config: &LeaderConfig, seen: Option<&LeaseSpec>, unchanged_for: Duration, now: Timestamp) -> Plan {
    let holder = seen.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    let mine = holder == config.identity;
    let seconds = seen.and_then(|spec| spec.lease_duration_seconds).unwrap_or(0).max(0);
    let theirs = Duration::from_secs(seconds.unsigned_abs().into());
    if !mine && !holder.is_empty() && unchanged_for < theirs {
        return Plan::Wait;
    }
    let transitions = seen.and_then(|spec| spec.lease_transitions).unwrap_or(0);
    let acquired = seen.and_then(|spec| spec.acquire_time.clone()).filter(|_| mine);
    Plan::Write(LeaseSpec {
        holder_identity: Some(config.identity.clone()),
        lease_duration_seconds: Some(i32::try_from(config.lease_duration.as_secs()).unwrap_or(i32::MAX)),
        acquire_time: Some(acquired.unwrap_or(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(if mine || seen.is_none() { transitions } else { transitions + 1 }),
        ..LeaseSpec::default()
    })
}

struct Elector {
    api: Api<Lease>,
    config: LeaderConfig,
    observed: Observed,
}

impl Elector {
    /// One try to get or keep the lease.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let found = self.api.get_opt(&self.config.name).await?;
        let spec = found.as_ref().map(|lease| lease.spec.clone().unwrap_or_default());
        let now = Instant::now();
        if self.observed.spec != spec || self.observed.at.is_none() {
            self.observed = Observed { spec: spec.clone(), at: Some(now) };
        }
        let unchanged_for = self.observed.at.map_or(Duration::ZERO, |at| now - at);
        let Plan::Write(wanted) = plan(&self.config, spec.as_ref(), unchanged_for, Timestamp::now()) else {
            return Ok(false);
        };
        let lease = match found {
            Some(lease) => {
                let lease = Lease { spec: Some(wanted), ..lease };
                self.api.replace(&self.config.name, &PostParams::default(), &lease).await?
            }
            None => {
                let metadata = ObjectMeta {
                    name: Some(self.config.name.clone()),
                    namespace: Some(self.config.namespace.clone()),
                    ..ObjectMeta::default()
                };
                let lease = Lease { metadata, spec: Some(wanted) };
                self.api.create(&PostParams::default(), &lease).await?
            }
        };
        self.observed = Observed { spec: lease.spec, at: Some(Instant::now()) };
        Ok(true)
    }

    async fn attempt_in_time(&mut self, limit: Duration) -> bool {
        match tokio::time::timeout(limit, self.attempt()).await {
            Ok(Ok(leading)) => leading,
            Ok(Err(error)) => {
                let error = crate::workers::chain(&error);
                tracing::debug!(lease = self.config.name, error, "failed to get or renew the lease");
                false
            }
            Err(_) => false,
        }
    }

    /// Gives the lease up, so that the next one need not wait.
    async fn release(&mut self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.config.name).await? else { return Ok(()) };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&self.config.identity) {
            return Ok(());
        }
        let now = MicroTime(Timestamp::now());
        *spec = LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: spec.lease_transitions,
            ..LeaseSpec::default()
        };
        self.api.replace(&self.config.name, &PostParams::default(), &lease).await.map(drop)
    }
}

/// Waits for the lease, runs `lead` while it is held, and gives it up at the end. `lead` gets a token that is
/// cancelled with `cancel`, and when the lease is lost; the answer is false in that second case.
pub async fn run_as_leader<F, Fut>(client: Client, config: LeaderConfig, cancel: CancellationToken, lead: F) -> bool
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = ()>,
{
    let api = Api::namespaced(client, &config.namespace);
    let mut elector = Elector { api, config: config.clone(), observed: Observed::default() };
    while !elector.attempt_in_time(config.renew_deadline).await {
        tokio::select! {
            () = cancel.cancelled() => return true,
            () = tokio::time::sleep(config.retry_period) => {}
        }
    }
    tracing::info!(lease = config.name, identity = config.identity, "leading");
    let leading = cancel.child_token();
    let renew = async {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                () = leading.cancelled() => return true,
                () = tokio::time::sleep(config.retry_period) => {}
            }
            if elector.attempt_in_time(config.renew_deadline).await {
                renewed = Instant::now();
            } else if renewed.elapsed() >= config.renew_deadline {
                tracing::error!(lease = config.name, "lost the lease");
                leading.cancel();
                return false;
            }
        }
    };
    let lead = async {
        lead(leading.clone()).await;
        leading.cancel();
    };
    let (kept, ()) = futures::join!(renew, lead);
    if kept {
        let released = tokio::time::timeout(Duration::from_secs(2), elector.release()).await;
        if !matches!(released, Ok(Ok(()))) {
            tracing::debug!(lease = config.name, "failed to give the lease up; it runs out by itself");
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        Timestamp::from_second(1_000).expect("a time")
    }

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(3),
            acquire_time: Some(MicroTime(Timestamp::UNIX_EPOCH)),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn another_ones_lease_is_waited_for() {
        let config = LeaderConfig::new("l", "me");
        let theirs = held_by("you");
        let plan = |spec: Option<&LeaseSpec>, seconds| plan(&config, spec, Duration::from_secs(seconds), now());
        assert_eq!(plan(Some(&theirs), 14), Plan::Wait);
        let Plan::Write(taken) = plan(Some(&theirs), 15) else { panic!("it has run out") };
        assert_eq!((taken.holder_identity.as_deref(), taken.lease_transitions), (Some("me"), Some(4)));
        let Plan::Write(renewed) = plan(Some(&held_by("me")), 0) else { panic!("it is ours") };
        assert_eq!((renewed.lease_transitions, renewed.acquire_time), (Some(3), Some(MicroTime(Timestamp::UNIX_EPOCH))));
        let Plan::Write(free) = plan(Some(&held_by("")), 0) else { panic!("it was given up") };
        assert_eq!(free.lease_transitions, Some(4));
        let Plan::Write(first) = plan(None, 0) else { panic!("there is none") };
        assert_eq!((first.lease_transitions, first.lease_duration_seconds), (Some(0), Some(15)));
    }
}
