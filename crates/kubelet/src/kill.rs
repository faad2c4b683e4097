//! Ending containers: preStop hook, grace period, sidecars last (upstream pkg/kubelet/kuberuntime
//! `killContainer`, `terminationOrdering`, pkg/kubelet/lifecycle/handlers.go, v1.37).

use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use tokio_util::sync::CancellationToken;

use crate::events::{Recorder, Target};
use crate::model::{self, PodRuntime};
use crate::plan::{Kill, KillReason};
use crate::probe::action;
use crate::probe::http;
use crate::runtime::{self, Runtime};

/// A container always gets this long between SIGTERM and SIGKILL, in seconds.
const GRACE_SECONDS_MIN: i64 = 2;

/// What ending needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The runtime.
    pub runtime: &'a Runtime,
    /// For Killing and FailedPreStopHook.
    pub recorder: &'a Recorder,
    /// The pod.
    pub pod: &'a Pod,
    /// Its address, for HTTP hooks.
    pub pod_ip: &'a str,
}

/// Seconds that a container has.
pub fn grace_seconds(pod: &Pod, container: Option<&Container>, reason: KillReason) -> i64 {
    if let Some(seconds) = pod.metadata.deletion_grace_period_seconds {
        return seconds;
    }
    let probe = container.and_then(|c| match reason {
        KillReason::StartupProbe => c.startup_probe.as_ref(),
        KillReason::LivenessProbe => c.liveness_probe.as_ref(),
        KillReason::Other => None,
    });
    probe
        .and_then(|p| p.termination_grace_period_seconds)
        .or_else(|| pod.spec.as_ref()?.termination_grace_period_seconds)
        .unwrap_or(GRACE_SECONDS_MIN)
}

/// Ends one container.
pub async fn kill(context: &Context<'_>, kill: &Kill) -> Result<(), runtime::Error> {
    let spec = model::container_spec(context.pod, &kill.name);
    let grace = grace_seconds(context.pod, spec, kill.reason);
    end(context, kill, spec, grace, &[]).await
}

/// Ends all running containers, then stops all sandboxes. Every container gets `grace` seconds, or its own.
/// Goes on past failures and returns the first.
pub async fn stop_pod(context: &Context<'_>, seen: &PodRuntime, grace: Option<i64>) -> Result<(), runtime::Error> {
    let sidecars: Vec<&str> =
        model::init_containers(context.pod).iter().filter(|c| model::is_sidecar(c)).map(|c| c.name.as_str()).collect();
    let rank = |name: &str| sidecars.iter().position(|s| *s == name);
    let running: Vec<(&model::Container, CancellationToken)> = seen.running().map(|c| (c, CancellationToken::new())).collect();
    let ends = running.iter().map(|(container, done)| {
        // A sidecar waits for all that is no sidecar and for the sidecars that were started after it.
        let own = rank(&container.name);
        let before: Vec<CancellationToken> = running
            .iter()
            .filter(|(other, _)| own.is_some_and(|own| rank(&other.name).is_none_or(|other| other > own)))
            .map(|(_, token)| token.clone())
            .collect();
        async move {
            let spec = model::container_spec(context.pod, &container.name);
            let seconds = grace.unwrap_or_else(|| grace_seconds(context.pod, spec, KillReason::Other));
            let kill = Kill {
                id: container.id.clone(),
                name: container.name.clone(),
                message: format!("Stopping container {}", container.name),
                reason: KillReason::Other,
            };
            let result = end(context, &kill, spec, seconds, &before).await;
            done.cancel();
            result
        }
    });
    let mut result: Result<(), runtime::Error> = join_all(ends).await.into_iter().collect();
    for sandbox in &seen.sandboxes {
        let stopped = context.runtime.stop_sandbox(&sandbox.id).await;
        result = result.and(stopped);
    }
    result
}

async fn end(
    context: &Context<'_>,
    kill: &Kill,
    spec: Option<&Container>,
    mut grace: i64,
    before: &[CancellationToken],
) -> Result<(), runtime::Error> {
    if let Some(spec) = spec {
        let target = Target::container(context.pod, spec);
        context.recorder.normal(&target, "Killing", &kill.message);
        let hook = spec.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref());
        if let Some(hook) = hook.filter(|_| grace > 0) {
            grace -= pre_stop(context, kill, spec, hook, grace).await;
        }
    }
    if !before.is_empty() && grace > 0 {
        let began = Instant::now();
        let wait = join_all(before.iter().map(CancellationToken::cancelled));
        // Out of turn when the time is over: the grace period is the pod's, not each container's.
        let _ = tokio::time::timeout(seconds(grace), wait).await;
        grace -= i64::try_from(began.elapsed().as_secs()).unwrap_or(grace);
    }
    context.runtime.stop_container(&kill.id, grace.max(GRACE_SECONDS_MIN)).await
}

/// Runs the hook; the seconds it took.
async fn pre_stop(context: &Context<'_>, kill: &Kill, spec: &Container, hook: &LifecycleHandler, grace: i64) -> i64 {
    let began = Instant::now();
    let limit = seconds(grace);
    let run = run_hook(context, &kill.id, spec, hook, limit);
    match tokio::time::timeout(limit, run).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            // The hook's output stays out of the event: it may hold secrets.
            tracing::warn!(pod = %model::format_pod(context.pod), container = %spec.name, error, "preStop hook failed");
            let target = Target::container(context.pod, spec);
            context.recorder.warning(&target, "FailedPreStopHook", "PreStopHook failed");
        }
        Err(_) => {
            tracing::warn!(pod = %model::format_pod(context.pod), container = %spec.name, "preStop hook not completed in grace period");
        }
    }
    i64::try_from(began.elapsed().as_secs()).unwrap_or(grace)
}

/// Runs a lifecycle hook once.
pub async fn run_hook(
    context: &Context<'_>,
    container_id: &str,
    spec: &Container,
    hook: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    if let Some(exec) = &hook.exec {
        let command = action::expand_static(exec.command.as_deref().unwrap_or_default(), spec);
        let answer = context.runtime.exec_sync(container_id, &command, limit).await.map_err(|e| runtime::message(&e))?;
        if answer.exit_code != 0 {
            let mut output = answer.stdout;
            output.extend_from_slice(&answer.stderr);
            return Err(format!("command '{}' exited with {}: {}", command.join(" "), answer.exit_code, String::from_utf8_lossy(&output)));
        }
        return Ok(());
    }
    if let Some(get) = &hook.http_get {
        let request = http::Request::from_action(get, spec, context.pod_ip, "kube-lifecycle/1.37")?;
        let answer = http::get(&request, limit).await?;
        if answer.status >= 400 {
            return Err(format!("HTTP probe failed with statuscode: {}", answer.status));
        }
        return Ok(());
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(seconds(sleep.seconds)).await;
        return Ok(());
    }
    Err("lifecycle handler has no action that can be run (exec, httpGet, sleep)".to_owned())
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_is_the_probes_or_the_pods() {
        let pod = |deletion: Option<i64>| -> Pod {
            let mut pod = serde_json::json!({"metadata": {}, "spec": {"terminationGracePeriodSeconds": 30, "containers": [{"name": "c",
                "livenessProbe": {"terminationGracePeriodSeconds": 7}, "startupProbe": {"terminationGracePeriodSeconds": 8}}]}});
            pod["metadata"]["deletionGracePeriodSeconds"] = serde_json::json!(deletion);
            serde_json::from_value(pod).expect("a pod")
        };
        let seconds = |reason, deletion| {
            let pod = pod(deletion);
            grace_seconds(&pod, model::container_spec(&pod, "c"), reason)
        };
        assert_eq!(seconds(KillReason::LivenessProbe, None), 7);
        assert_eq!(seconds(KillReason::StartupProbe, None), 8);
        assert_eq!(seconds(KillReason::Other, None), 30);
        assert_eq!(seconds(KillReason::LivenessProbe, Some(3)), 3);
        assert_eq!(grace_seconds(&Pod::default(), None, KillReason::Other), GRACE_SECONDS_MIN);
    }
}
