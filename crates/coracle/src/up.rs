//! `coracle up`: every part in this process, started in the order in which they need each other.
//!
//! ```text
//! lock -> keys -> cri + apiserver -> (ready) -> controllers + scheduler + kube-proxy + kubelet -> (node Ready) -> serving
//!                                                                                         |
//!                         a part fails, or SIGINT/SIGTERM: all are cancelled, drained <---+
//! ```
//!
//! **Invariant**: stopping ends no pod. Pods belong to their shims; the next `up` finds them again.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::progress::Progress;
use crate::settings::{self, LockOutcome, Settings};
use crate::{components, pki};

/// How long the API server may take to become ready, and the node after it.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often readiness is asked for while starting.
const POLL: Duration = Duration::from_millis(20);
/// How long the parts may take to drain.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs until `cancel`, or until a part fails.
pub async fn run(settings: Settings, cancel: CancellationToken) -> Result<()> {
    check_host()?;
    let _lock = lock(&settings)?;
    let progress = Progress::new();
    progress.working("keys and certificates");
    settings.save()?;
    pki::ensure(&settings)?;
    progress.done("keys and certificates");

    let mut parts = JoinSet::new();
    let stop = cancel.child_token();
    let started = tokio::select! {
        result = start(&settings, &progress, &mut parts, &stop) => result,
        () = cancel.cancelled() => Ok(()),
    };
    progress.finish();
    let result = match started {
        Ok(()) => serve(&settings, &mut parts, &cancel).await,
        Err(error) => Err(error),
    };
    stop.cancel();
    drain(parts).await;
    result
}

fn lock(settings: &Settings) -> Result<settings::Lock> {
    match settings::lock(&settings.data_dir)? {
        LockOutcome::Taken(lock) => Ok(lock),
        LockOutcome::HeldBy(pid) => bail!("--data-dir: {} is in use by process {pid}; stop it first, or choose another", settings.data_dir),
    }
}

/// Does what `up` does before it starts the parts, and prints their command lines instead.
pub fn print_parts(settings: &Settings) -> Result<()> {
    let _lock = lock(settings)?;
    settings.save()?;
    pki::ensure(settings)?;
    for line in components::command_lines(settings)? {
        println!("{line}");
    }
    Ok(())
}

/// What `up` cannot do without: said before anything is made.
fn check_host() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("failed to read /proc/self/status")?;
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")).and_then(|uids| uids.split_whitespace().nth(1));
    if uid != Some("0") {
        bail!("coracle up must run as root (it makes namespaces, mounts and cgroups); try sudo");
    }
    Ok(())
}

type Parts = JoinSet<(&'static str, Result<()>)>;

fn spawn<E>(parts: &mut Parts, name: &'static str, part: impl Future<Output = Result<(), E>> + Send + 'static)
where
    E: std::error::Error + Send + Sync + 'static,
{
    parts.spawn(async move { (name, part.await.map_err(|error| anyhow!(error))) });
}

async fn start(settings: &Settings, progress: &Progress, parts: &mut Parts, stop: &CancellationToken) -> Result<()> {
    // All flags are parsed before anything runs.
    let (apiserver, cri, kubelet) = (components::apiserver(settings)?, components::cri(settings)?, components::kubelet(settings)?);
    let (controllers, scheduler) = (components::controller_manager(settings)?, components::scheduler(settings)?);
    let proxy = components::kube_proxy(settings)?;

    spawn(parts, "apiserver", apiserver::run(apiserver, stop.child_token()));
    if settings.container_runtime_endpoint.is_none() {
        spawn(parts, "cri", cri_server::run(cri, stop.child_token()));
    }
    progress.working("API server");
    let client = client::connect(settings.admin_kubeconfig().as_std_path(), crate::USER_AGENT).await.context("failed to make a client")?;
    while_running(parts, "the API server to be ready", || async { ready(&client).await }).await?;
    progress.done("API server ready");

    spawn(parts, "controller-manager", controller_manager::run(controllers, stop.child_token()));
    spawn(parts, "scheduler", scheduler::run(scheduler, stop.child_token()));
    spawn(parts, "kube-proxy", kube_proxy::run(proxy, stop.child_token()));
    progress.working("container runtime");
    let endpoint = settings.runtime_endpoint();
    let socket = endpoint.strip_prefix("unix://").unwrap_or(&endpoint);
    while_running(parts, "the CRI socket", || async { std::os::unix::net::UnixStream::connect(socket).is_ok() }).await?;
    progress.done("container runtime ready");

    spawn(parts, "kubelet", kubelet::run(kubelet, stop.child_token()));
    progress.working("node");
    let nodes: Api<Node> = Api::all(client);
    let name = settings.node()?;
    // The store may still say Ready of the node's last life: what serves logs and exec must be there, too.
    let kubelet = SocketAddr::new(settings.reachable_address(), settings.kubelet_port);
    while_running(parts, "the kubelet's port", || async { tokio::net::TcpStream::connect(kubelet).await.is_ok() }).await?;
    while_running(parts, "the node to be Ready", || async { node_ready(&nodes, &name).await }).await?;
    progress.done(&format!("node {name} Ready"));
    Ok(())
}

async fn ready(client: &kube::Client) -> bool {
    let Ok(request) = http::Request::get("/readyz").body(Vec::new()) else { return false };
    client.request_text(request).await.is_ok_and(|text| text == "ok")
}

async fn node_ready(nodes: &Api<Node>, name: &str) -> bool {
    let Ok(Some(node)) = nodes.get_opt(name).await else { return false };
    let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Polls until `condition` holds. A part that ends meanwhile is the error.
async fn while_running<F: Future<Output = bool>>(parts: &mut Parts, what: &str, condition: impl Fn() -> F) -> Result<()> {
    let poll = async {
        while !condition().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::select! {
        result = tokio::time::timeout(READY_TIMEOUT, poll) => {
            result.with_context(|| format!("waited {} s for {what}", READY_TIMEOUT.as_secs()))
        }
        error = first_end(parts) => Err(error),
    }
}

/// Waits until any part ends, which none does unasked.
async fn first_end(parts: &mut Parts) -> anyhow::Error {
    match parts.join_next().await {
        Some(Ok((name, Ok(())))) => anyhow!("{name} ended"),
        Some(Ok((name, Err(error)))) => error.context(format!("{name} failed")),
        Some(Err(error)) => anyhow!(error).context("a part panicked"),
        None => std::future::pending().await,
    }
}

async fn serve(settings: &Settings, parts: &mut Parts, cancel: &CancellationToken) -> Result<()> {
    if !cancel.is_cancelled() {
        eprintln!();
        eprintln!("Coracle is up. In another terminal:");
        eprintln!("  export KUBECONFIG={}", settings.admin_kubeconfig());
        eprintln!("  kubectl get nodes");
        eprintln!("Ctrl-C stops it and leaves pods running; `coracle down --data-dir {}` removes everything.", settings.data_dir);
    }
    tokio::select! {
        () = cancel.cancelled() => Ok(()),
        error = first_end(parts) => Err(error),
    }
}

async fn drain(mut parts: Parts) {
    let all = async {
        while let Some(end) = parts.join_next().await {
            match end {
                Ok((_, Ok(()))) => {}
                Ok((name, Err(error))) => tracing::warn!(part = name, "failed while stopping: {error:#}"),
                Err(error) => tracing::warn!("a part panicked while stopping: {error}"),
            }
        }
    };
    if tokio::time::timeout(DRAIN_TIMEOUT, all).await.is_err() {
        tracing::warn!(seconds = DRAIN_TIMEOUT.as_secs(), "not every part drained in time");
    }
}
