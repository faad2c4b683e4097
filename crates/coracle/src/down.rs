//! `coracle down`: ends what runs and removes everything that `up` made, in the reverse order. Each step is tried, whatever
//! became of the one before it, and every failure is told.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use linux::cgroup::{Cgroup, Host};

use crate::components;
use crate::progress::Progress;
use crate::settings::{self, Lock, LockOutcome, Settings};

/// The signal that asks an `up` to stop.
const SIGTERM: i32 = 15;
/// How long a running `up` may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a cgroup may stay busy after its last process ended.
const CGROUP_PATIENCE: Duration = Duration::from_secs(2);

/// Removes the Coracle whose data are in `data_dir`.
pub async fn run(data_dir: &Utf8Path) -> Result<()> {
    let Some(settings) = Settings::load(data_dir)? else {
        bail!("--data-dir: there is no Coracle in {data_dir}");
    };
    let progress = Progress::new();
    let _lock = stop(data_dir, &progress).await?;

    progress.working("pods, network and keeper");
    let mut failures = Vec::new();
    let removed = match settings.container_runtime_endpoint {
        None => cri_server::down(components::cri(&settings)?).await.map_err(anyhow::Error::from),
        Some(_) => kubelet::down(&components::kubelet(&settings)?).await.map_err(anyhow::Error::from),
    };
    if let Err(error) = removed {
        failures.push(error.context("failed to remove pods"));
    }
    match components::kube_proxy(&settings) {
        Ok(config) => failures.extend(
            kube_proxy::remove(&config).err().map(|error| anyhow::Error::from(error).context("failed to remove the ways to Services")),
        ),
        Err(error) => failures.push(error),
    }
    progress.done("pods, network and keeper removed");

    progress.working("volumes, cgroups and data");
    let steps = [
        unmount_below(&settings.data_dir),
        unmount_below(&settings.state_dir),
        remove_cgroups(&settings.cgroup_root),
        remove_logs(&settings),
    ];
    failures.extend(steps.into_iter().filter_map(Result::err));
    // The data go last, and only when nothing points into them any more: else a second `down` could not try again.
    if failures.is_empty() {
        failures.extend(remove_tree(&settings.state_dir).err());
        failures.extend(remove_tree(&settings.data_dir).err());
    }
    progress.finish();
    match failures.len() {
        0 => {
            progress.done("volumes, cgroups and data removed");
            Ok(())
        }
        count => {
            for failure in &failures {
                eprintln!("coracle: {failure:#}");
            }
            bail!("{count} steps failed; run `coracle down --data-dir {data_dir}` again when their causes are gone")
        }
    }
}

/// Takes the lock; an `up` that holds it is asked to stop.
async fn stop(data_dir: &Utf8Path, progress: &Progress) -> Result<Lock> {
    let deadline = Instant::now() + STOP_TIMEOUT;
    let mut asked = None;
    loop {
        match settings::lock(data_dir)? {
            LockOutcome::Taken(lock) => return Ok(lock),
            LockOutcome::HeldBy(pid) if asked != Some(pid) => {
                progress.working(&format!("process {pid} to stop"));
                linux::process::kill(i32::try_from(pid).unwrap_or(0), SIGTERM).with_context(|| format!("failed to stop process {pid}"))?;
                asked = Some(pid);
            }
            LockOutcome::HeldBy(pid) if Instant::now() > deadline => {
                bail!("process {pid} did not stop within {} s", STOP_TIMEOUT.as_secs())
            }
            LockOutcome::HeldBy(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Unmounts everything below a directory, the deepest first.
fn unmount_below(directory: &Utf8Path) -> Result<()> {
    let mounts = linux::mountinfo::read().context("failed to read the mounts")?;
    let mut points: Vec<PathBuf> = mounts.into_iter().map(|mount| mount.target).collect();
    points.retain(|point| point.starts_with(directory) && point != directory.as_std_path());
    for point in points.iter().rev() {
        linux::mount::unmount(point, true).with_context(|| format!("failed to unmount {}", point.display()))?;
    }
    Ok(())
}

/// Removes the kubelet's groups in every hierarchy; with a root of its own, the root too.
fn remove_cgroups(cgroup_root: &str) -> Result<()> {
    let root = cgroup_root.trim_matches('/');
    let group = if root.is_empty() { "kubepods" } else { root };
    let host = Host::detect().context("failed to look for cgroups")?;
    Cgroup::new(&host, Path::new(group)).remove(CGROUP_PATIENCE).with_context(|| format!("failed to remove the cgroup {group}"))
}

/// Removes the logs of this Coracle's pods: the directory may be another kubelet's as well, so only those that end in the UID
/// of a pod that our kubelet knew.
fn remove_logs(settings: &Settings) -> Result<()> {
    let names = |path: &Utf8Path| -> Result<Vec<String>> {
        match path.read_dir_utf8() {
            Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_owned())).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("failed to list {path}")),
        }
    };
    let uids = names(&settings.data_dir.join("kubelet").join("pods"))?;
    for log in names(&settings.pod_log_dir)? {
        if log.rsplit_once('_').is_some_and(|(_, uid)| uids.iter().any(|known| known == uid)) {
            remove_tree(&settings.pod_log_dir.join(log))?;
        }
    }
    Ok(())
}

/// Removes a directory with all in it. One that is a disk of its own is emptied, and stays mounted.
fn remove_tree(path: &Utf8Path) -> Result<()> {
    let failed = || format!("failed to remove {path}");
    match linux::tree::remove(path.as_std_path()) {
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
            path.read_dir_utf8().with_context(failed)?.try_for_each(|entry| {
                let entry = entry.with_context(failed)?;
                linux::tree::remove(entry.path().as_std_path()).with_context(failed)
            })
        }
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).with_context(failed),
        _ => Ok(()),
    }
}
