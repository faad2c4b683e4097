//! Termination messages (upstream pkg/kubelet/kuberuntime `getTerminationMessage`, v1.37).

use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;

use crate::logs;
use crate::model::{Container, PodRuntime, RunState};

/// Bytes of a message from the file.
const FILE_BYTES_MAX: u64 = 4096;
/// Bytes and lines of a message from the log.
const LOG_BYTES_MAX: usize = 2048;
const LOG_LINES_MAX: usize = 80;

/// Adds the termination messages of ended containers to what was observed. Blocks on disk.
pub fn read_messages(mut seen: PodRuntime) -> PodRuntime {
    for container in &mut seen.containers {
        if container.state != RunState::Exited {
            continue;
        }
        if let Some(message) = message(container) {
            container.message = if container.message.is_empty() { message } else { format!("{}: {message}", container.message) };
        }
    }
    seen
}

fn message(container: &Container) -> Option<String> {
    let path = container.termination_file.as_ref();
    let from_file = path.and_then(|path| {
        // What a container put in place of the file is not to be followed or waited for.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let file = std::fs::File::options().read(true).custom_flags(flags.bits() as i32).open(path).ok()?;
        let mut data = Vec::new();
        file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        file.take(FILE_BYTES_MAX).read_to_end(&mut data).ok()?;
        Some(String::from_utf8_lossy(&data).into_owned())
    });
    let from_file = from_file.filter(|m| !m.is_empty());
    if from_file.is_some() || !container.fallback_to_logs || container.exit_code == 0 {
        return from_file;
    }
    let tail = logs::tail_text(std::path::Path::new(&container.log_path), LOG_LINES_MAX, LOG_BYTES_MAX).ok()?;
    let start = tail.len().saturating_sub(LOG_BYTES_MAX);
    let start = (start..=tail.len()).find(|i| tail.is_char_boundary(*i))?;
    Some(tail[start..].to_owned()).filter(|t| !t.is_empty())
}
