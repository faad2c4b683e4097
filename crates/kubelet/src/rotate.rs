//! Log rotation: a log over its size is renamed and the runtime told to open a new one
//! (upstream pkg/kubelet/logs/container_log_manager.go, v1.37; rotated files are not compressed here).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use protocols::cri::v1 as cri;
use tokio_util::sync::CancellationToken;

use crate::kubelet::Kubelet;
use crate::runtime;

/// How often logs are looked at.
const PERIOD: Duration = Duration::from_secs(10);

/// Rotates logs of running containers until cancelled.
pub async fn run(kubelet: Arc<Kubelet>, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
        if let Err(error) = pass(&kubelet).await {
            tracing::warn!(error, "failed to rotate logs");
        }
    }
}

async fn pass(kubelet: &Kubelet) -> Result<(), String> {
    let limit = kubelet.config.log_size_bytes().map_err(|e| e.to_string())?;
    let containers = kubelet.runtime.list_containers(None).await.map_err(|e| runtime::go_error(&e))?;
    for container in containers {
        if container.state != cri::ContainerState::ContainerRunning as i32 {
            continue;
        }
        let Ok(status) = kubelet.runtime.container_status(&container.id).await else {
            continue;
        };
        let path = PathBuf::from(&status.log_path);
        let size = tokio::fs::metadata(&path).await.map(|m| m.len()).unwrap_or(0);
        if size >= limit
            && let Err(error) = rotate(kubelet, &container.id, &path).await
        {
            tracing::warn!(container_id = container.id, error, "failed to rotate a container log");
        }
    }
    Ok(())
}

async fn rotate(kubelet: &Kubelet, id: &str, path: &Path) -> Result<(), String> {
    let failed = |act: &str, e: &dyn std::fmt::Display| format!("failed to {act} {}: {e}", path.display());
    remove_old(path, kubelet.config.container_log_max_files).await.map_err(|e| failed("clean up beside", &e))?;
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
    let rotated = PathBuf::from(format!("{}.{stamp}", path.display()));
    tokio::fs::rename(path, &rotated).await.map_err(|e| failed("rename", &e))?;
    if let Err(error) = kubelet.runtime.reopen_log(id).await {
        // The runtime still writes to the renamed file: its name is given back.
        tokio::fs::rename(&rotated, path).await.map_err(|e| failed("rename back", &e))?;
        return Err(failed("reopen", &runtime::message(&error)));
    }
    Ok(())
}

/// Removes the oldest rotated files so that with the new one at most `files - 1` are kept.
async fn remove_old(path: &Path, files: u32) -> std::io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut rotated = Vec::new();
    let mut entries = tokio::fs::read_dir(directory).await?;
    while let Some(entry) = entries.next_entry().await? {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            rotated.push(entry.path());
        }
    }
    rotated.sort();
    let kept = usize::try_from(files.saturating_sub(2)).unwrap_or(0);
    let excess = rotated.len().saturating_sub(kept);
    for old in rotated.into_iter().take(excess) {
        tokio::fs::remove_file(old).await?;
    }
    Ok(())
}
