//! `/containerLogs/NS/POD/CONTAINER`: a container's CRI log as text, followed when asked
//! (upstream k8s.io/cri-client/pkg/logs `ReadLogs`, pkg/kubelet/server, v1.37).

use std::io::SeekFrom;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::Response;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, BufReader};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::logs;
use crate::model::{self, Container, PodRuntime, RunState};
use crate::runtime::Runtime;
use crate::server::{Refusal, Reply, State, parameters};

/// Chunks that wait for a slow client.
const CHUNKS_MAX: usize = 16;
/// Bytes gathered into a chunk.
const CHUNK_BYTES: usize = 32 * 1024;
/// Bytes read at once: each reading is a way to another thread and back.
const READ_BYTES: usize = 64 * 1024;
/// How often the end of a followed file is looked at, and the container's state.
const POLL: Duration = Duration::from_millis(100);
const STATE_POLL: Duration = Duration::from_secs(1);
/// Block read while looking for the last lines.
const BLOCK_BYTES: u64 = 64 * 1024;

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    follow: bool,
    previous: bool,
    timestamps: bool,
    since: Option<Timestamp>,
    tail_lines: Option<usize>,
    limit_bytes: Option<usize>,
    /// `Some(true)` only stderr, `Some(false)` only stdout.
    stderr: Option<bool>,
}

/// Answers with the log.
pub async fn serve(state: &Arc<State>, namespace: &str, pod: &str, container: &str, query: &str) -> Result<Reply, Refusal> {
    let options = options(query)?;
    let spec = state.pod(namespace, pod)?;
    let known =
        model::container_spec(&spec, container).is_some() || crate::ephemeral::containers(&spec).iter().any(|c| c.name == container);
    if !known {
        let text = format!("container \"{container}\" not found in pod \"{pod}\"\n");
        return Err(Refusal::not_found(text));
    }
    let seen = state.kubelet.runtime.observe(model::uid(&spec)).await;
    let seen = seen.map_err(|e| Refusal::internal(crate::runtime::go_error(&e)))?;
    let found = find(&spec, &seen, container, options.previous)?;
    let path = PathBuf::from(&found.log_path);
    if found.log_path.is_empty() {
        return Err(Refusal::internal(format!("the runtime tells no log path of container \"{container}\"")));
    }
    let file = open(&path)
        .await
        .map_err(|e| Refusal::internal(format!("failed to try resolving symlinks in path \"{}\": {e}", path.display())))?;
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    let reader = Reader {
        runtime: state.kubelet.runtime.clone(),
        container_id: found.id.clone(),
        ended: found.state != RunState::Running,
        path,
        options,
        sender,
        out: BytesMut::new(),
        sent: 0,
    };
    let cancel = state.cancel.clone();
    state.tasks.spawn(cancel.run_until_cancelled_owned(reader.run(file)));
    let body = StreamBody::new(ReceiverStream::new(receiver).map(|chunk: Bytes| Ok(Frame::data(chunk))));
    let mut reply = Response::new(BodyExt::boxed(body));
    let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
    reply.headers_mut().insert(http::header::CONTENT_TYPE, plain);
    Ok(reply)
}

fn find<'a>(pod: &Pod, seen: &'a PodRuntime, name: &str, previous: bool) -> Result<&'a Container, Refusal> {
    let mut own = seen.containers.iter().filter(|c| c.name == name);
    let newest = own.next();
    let pod_name = model::name(pod);
    if previous {
        let text = format!("previous terminated container \"{name}\" in pod \"{pod_name}\" not found");
        // A container that waits for its restart has had its previous run just now.
        let waiting = statuses(pod).any(|s| s.name == name && s.state.as_ref().is_some_and(|s| s.waiting.is_some()));
        let last = newest.filter(|c| waiting && c.state == RunState::Exited);
        return last.or_else(|| own.find(|c| c.state == RunState::Exited)).ok_or_else(|| Refusal::bad_request(text));
    }
    match newest {
        Some(container) if container.state != RunState::Created => Ok(container),
        Some(_) if seen.containers.iter().any(|c| c.name == name && c.state == RunState::Exited) => {
            own.next().ok_or_else(|| Refusal::not_found("no log"))
        }
        _ => {
            let waiting = statuses(pod).filter(|s| s.name == name).find_map(|s| s.state.as_ref()?.waiting.as_ref()?.reason.clone());
            let reason = waiting.unwrap_or_else(|| "ContainerCreating".to_owned());
            let text = match reason.as_str() {
                "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" => {
                    let why = if reason == "ErrImagePull" { "image can't be pulled" } else { "trying and failing to pull image" };
                    format!("container \"{name}\" in pod \"{pod_name}\" is waiting to start: {why}")
                }
                _ => format!("container \"{name}\" in pod \"{pod_name}\" is waiting to start: {reason}"),
            };
            Err(Refusal::bad_request(text))
        }
    }
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    pod.status.iter().flat_map(|s| {
        let init = s.init_container_statuses.iter().flatten();
        s.container_statuses.iter().flatten().chain(init)
    })
}

pub(crate) fn options(query: &str) -> Result<Options, Refusal> {
    let mut options = Options::default();
    let now = Timestamp::now();
    for (key, value) in parameters(query) {
        let invalid = || Refusal::bad_request(format!("invalid value {value:?} of parameter {key}"));
        let flag = || matches!(value.as_str(), "true" | "1");
        match key.as_str() {
            "follow" => options.follow = flag(),
            "previous" => options.previous = flag(),
            "timestamps" => options.timestamps = flag(),
            "tailLines" => options.tail_lines = Some(value.parse().map_err(|_| invalid())?),
            "limitBytes" => options.limit_bytes = Some(value.parse().map_err(|_| invalid())?),
            "sinceSeconds" => {
                let seconds: i64 = value.parse().map_err(|_| invalid())?;
                options.since = now.checked_sub(jiff::SignedDuration::from_secs(seconds)).ok();
            }
            "sinceTime" => options.since = Some(value.parse().map_err(|_| invalid())?),
            "stream" => {
                options.stderr = match value.as_str() {
                    "All" | "" => None,
                    "Stdout" => Some(false),
                    "Stderr" => Some(true),
                    _ => return Err(invalid()),
                };
            }
            _ => {}
        }
    }
    Ok(options)
}

async fn open(path: &Path) -> std::io::Result<File> {
    File::open(path).await
}

struct Reader {
    runtime: Runtime,
    container_id: String,
    ended: bool,
    path: PathBuf,
    options: Options,
    sender: mpsc::Sender<Bytes>,
    out: BytesMut,
    sent: usize,
}

/// The client has all it wants, or is gone.
struct Enough;

impl Reader {
    async fn run(mut self, file: File) {
        let path = self.path.clone();
        if let Err(error) = self.read(file).await {
            tracing::warn!(path = %path.display(), %error, "failed to read a container log");
        }
    }

    async fn read(&mut self, mut file: File) -> std::io::Result<()> {
        let start = match self.options.tail_lines {
            Some(lines) => tail_start(&mut file, lines).await?,
            None => 0,
        };
        file.seek(SeekFrom::Start(start)).await?;
        let mut inode = file.metadata().await?.ino();
        let mut reader = BufReader::with_capacity(READ_BYTES, file);
        let mut entry = Vec::new();
        let mut rotated: Option<File> = None;
        let mut state_due = tokio::time::Instant::now();
        loop {
            let read = reader.read_until(b'\n', &mut entry).await?;
            if read > 0 && entry.ends_with(b"\n") {
                if self.emit(&entry).await.is_err() {
                    return Ok(());
                }
                entry.clear();
                continue;
            }
            if let Some(fresh) = rotated.take() {
                // The old file has been read to its end since the writer has the new one.
                inode = fresh.metadata().await?.ino();
                reader = BufReader::with_capacity(READ_BYTES, fresh);
                entry.clear();
                continue;
            }
            // The end for now: `entry` may hold the first part of a line that is being written.
            if self.flush().await.is_err() || !self.options.follow {
                return Ok(());
            }
            if let Ok(fresh) = File::open(&self.path).await
                && fresh.metadata().await?.ino() != inode
            {
                rotated = Some(fresh);
                continue;
            }
            if self.ended {
                return Ok(());
            }
            if state_due <= tokio::time::Instant::now() {
                state_due = tokio::time::Instant::now() + STATE_POLL;
                // One more round after the end: lines may have come meanwhile.
                self.ended = self.has_ended().await;
            }
            tokio::select! {
                () = self.sender.closed() => return Ok(()),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    async fn has_ended(&self) -> bool {
        match self.runtime.container_status(&self.container_id).await {
            Ok(status) => Container::from_cri(&status, "").state != RunState::Running,
            Err(error) => error.is_not_found(),
        }
    }

    async fn emit(&mut self, entry: &[u8]) -> Result<(), Enough> {
        let Some(line) = logs::parse(entry) else {
            return Ok(());
        };
        let unwanted =
            self.options.stderr.is_some_and(|stderr| stderr != line.stderr) || self.options.since.is_some_and(|since| line.at < since);
        if unwanted {
            return Ok(());
        }
        if self.options.timestamps {
            self.out.extend_from_slice(line.stamp);
            self.out.extend_from_slice(b" ");
        }
        self.out.extend_from_slice(line.text);
        if !line.partial {
            self.out.extend_from_slice(b"\n");
        }
        let full = self.options.limit_bytes.is_some_and(|limit| self.sent + self.out.len() >= limit);
        if full || self.out.len() >= CHUNK_BYTES {
            self.flush().await?;
        }
        if full { Err(Enough) } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Enough> {
        if let Some(limit) = self.options.limit_bytes {
            self.out.truncate(limit.saturating_sub(self.sent));
        }
        if self.out.is_empty() {
            return Ok(());
        }
        let chunk = self.out.split().freeze();
        self.sent += chunk.len();
        self.sender.send(chunk).await.map_err(|_| Enough)
    }
}

/// Where the last `lines` lines begin.
async fn tail_start(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let size = file.metadata().await?.len();
    if lines == 0 {
        return Ok(size);
    }
    let mut end = size;
    let mut left = lines;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        file.seek(SeekFrom::Start(start)).await?;
        block.clear();
        file.take(end - start).read_to_end(&mut block).await?;
        for (offset, byte) in block.iter().enumerate().rev() {
            let position = start + offset as u64;
            // The last line's own newline ends it and begins none.
            if *byte == b'\n' && position + 1 != size {
                left -= 1;
                if left == 0 {
                    return Ok(position + 1);
                }
            }
        }
        end = start;
    }
    Ok(0)
}
