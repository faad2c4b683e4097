//! The other side of seam 5: starts shims, and speaks Task, Sandbox v1 and `coracle.io.v1` with them.
//!
//! Shims differ in two things, and each has its one place: who makes the sandbox ([`Sandboxer`], in `pod.rs`), and whether the shim writes
//! the logs ([`Shim::writes_logs`], in `crate::stdio`).

mod client;
pub mod events;
mod keep;
mod pod;
mod start;

pub use client::{CallError, Client};
pub use pod::PodRequest;
pub use start::{Launcher, StartedShim};

use std::sync::Arc;
use std::time::Duration;

use protocols::shim::coracle;
use protocols::shim::task::{v2, v3};
use protocols::shim::{OCI_PROCESS_TYPE_URL, OCI_RESOURCES_TYPE_URL};
use tokio::net::UnixStream;

use crate::handler::Sandboxer;

/// The namespace of all that this server makes, as CRI's in containerd.
pub const NAMESPACE: &str = "k8s.io";

/// State and other questions.
const ASK: Duration = Duration::from_secs(5);
/// What makes or ends a process: a hook of the container may run in it.
const ACT: Duration = Duration::from_secs(120);

/// A shim that answers on its socket.
#[derive(Debug)]
pub struct Shim {
    client: Client,
    task_service: &'static str,
    /// The extension's capabilities; none of a foreign shim.
    capabilities: Vec<String>,
    sandboxer: Sandboxer,
}

impl Shim {
    /// Connects to a shim's socket, and asks whether it has our extension.
    ///
    /// # Errors
    /// [`CallError::Closed`] if nobody listens.
    pub async fn connect(started: &StartedShim, sandboxer: Sandboxer) -> Result<Arc<Self>, CallError> {
        let method = "connect";
        let stream = tokio::time::timeout(ASK, UnixStream::connect(started.socket()))
            .await
            .map_err(|_| CallError::Deadline { method, seconds: ASK.as_secs() })?
            .map_err(|_| CallError::Closed { method })?;
        let client = Client::new(stream, NAMESPACE);
        let task_service = if started.version >= 3 { v3::SERVICE } else { v2::SERVICE };
        let info: Result<coracle::InfoResponse, _> = client.call(coracle::SHIM_SERVICE, "Info", &coracle::InfoRequest {}, Some(ASK)).await;
        let capabilities = match info {
            Ok(info) => info.capabilities,
            Err(CallError::Rpc { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Arc::new(Self { client, task_service, capabilities, sandboxer }))
    }

    /// Whether it writes logs itself, and serves those who attach.
    pub fn writes_logs(&self) -> bool {
        self.can("cri-log")
    }

    /// Whether a new one can take over what a dead one left.
    pub fn adopts(&self) -> bool {
        self.can("adopt")
    }

    fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|known| known == capability)
    }

    /// Ends when the connection has ended.
    pub async fn closed(&self) {
        self.client.closed().await;
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    async fn task<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &Q,
        timeout: Option<Duration>,
    ) -> Result<A, CallError> {
        self.client.call(self.task_service, method, request, timeout).await
    }

    /// Makes a container's first process; it does not run yet.
    pub async fn create(&self, request: &v3::CreateTaskRequest) -> Result<u32, CallError> {
        let answer: v3::CreateTaskResponse = self.task("Create", request, Some(ACT)).await?;
        Ok(answer.pid)
    }

    /// Runs what was created; `exec_id` is empty for the container's first process.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, CallError> {
        let request = v3::StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let answer: v3::StartResponse = self.task("Start", &request, Some(ACT)).await?;
        Ok(answer.pid)
    }

    /// Waits for a process' exit, without a deadline.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, CallError> {
        let request = v3::WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let answer: v3::WaitResponse = self.task("Wait", &request, None).await?;
        Ok(Exit { status: answer.exit_status, at: answer.exited_at.map(nanos) })
    }

    /// The state of a process.
    pub async fn state(&self, id: &str, exec_id: &str) -> Result<v3::StateResponse, CallError> {
        let request = v3::StateRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        self.task("State", &request, Some(ASK)).await
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), CallError> {
        let request = v3::KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal, all };
        self.task::<_, ()>("Kill", &request, Some(ACT)).await
    }

    /// Removes a process that has ended; one that is not known is as good.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<Option<Exit>, CallError> {
        let request = v3::DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let answer: Result<v3::DeleteResponse, _> = self.task("Delete", &request, Some(ACT)).await;
        match answer {
            Ok(answer) => Ok(Some(Exit { status: answer.exit_status, at: answer.exited_at.map(nanos) })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Prepares a further process in a container; `process` is the OCI process in JSON.
    pub async fn exec(&self, mut request: v3::ExecProcessRequest, process: Vec<u8>) -> Result<(), CallError> {
        request.spec = Some(prost_types::Any { type_url: OCI_PROCESS_TYPE_URL.to_owned(), value: process });
        self.task::<_, ()>("Exec", &request, Some(ACT)).await
    }

    /// Sets the size of a process' terminal, in characters.
    pub async fn resize(&self, id: &str, exec_id: &str, width: u16, height: u16) -> Result<(), CallError> {
        let request = v3::ResizePtyRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), width: width.into(), height: height.into() };
        self.task::<_, ()>("ResizePty", &request, Some(ASK)).await
    }

    /// Ends a process' standard input.
    pub async fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), CallError> {
        let request = v3::CloseIoRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), stdin: true };
        self.task::<_, ()>("CloseIO", &request, Some(ASK)).await
    }

    /// Changes a running container's limits; `resources` are the OCI resources in JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), CallError> {
        let resources = Some(prost_types::Any { type_url: OCI_RESOURCES_TYPE_URL.to_owned(), value: resources });
        let request = v3::UpdateTaskRequest { id: id.to_owned(), resources, ..v3::UpdateTaskRequest::default() };
        self.task::<_, ()>("Update", &request, Some(ACT)).await
    }

    /// What a container uses.
    pub async fn stats(&self, id: &str) -> Result<Option<prost_types::Any>, CallError> {
        let answer: v3::StatsResponse = self.task("Stats", &v3::StatsRequest { id: id.to_owned() }, Some(ASK)).await?;
        Ok(answer.stats)
    }

    /// Opens a container's log anew under its path.
    pub async fn reopen_log(&self, id: &str) -> Result<(), CallError> {
        let request = coracle::ReopenLogRequest { id: id.to_owned() };
        let _: coracle::ReopenLogResponse = self.client.call(coracle::SHIM_SERVICE, "ReopenLog", &request, Some(ASK)).await?;
        Ok(())
    }

    /// Begins to copy a container's streams from and to FIFOs.
    pub async fn attach(&self, request: &coracle::AttachRequest) -> Result<(), CallError> {
        let _: coracle::AttachResponse = self.client.call(coracle::SHIM_SERVICE, "Attach", request, Some(ASK)).await?;
        Ok(())
    }
}

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 and the signal.
    pub status: u32,
    /// Nanoseconds since 1970, where the shim said it.
    pub at: Option<i64>,
}

fn nanos(time: prost_types::Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanos))
}
