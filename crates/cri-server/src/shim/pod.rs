//! A pod's sandbox: made by the shim's Sandbox API, or by a pause container that is the pod's first task.

use std::time::Duration;

use prost::Message;
use protocols::cri::v1::PodSandboxConfig;
use protocols::shim::pod;
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::{Status, v3};

use super::{ACT, ASK, CallError, Shim};
use crate::handler::Sandboxer;

/// SIGKILL: a pause process has nothing to put in order.
const SIGKILL: u32 = 9;

/// What a sandbox is made of.
#[derive(Clone, Debug)]
pub struct PodRequest<'a> {
    pub id: &'a str,
    /// The shim's bundle; for a pause container with its spec.
    pub bundle: &'a str,
    /// The network namespace's pin; empty on the host's network.
    pub netns: &'a str,
    pub config: &'a PodSandboxConfig,
    /// The shim's options.
    pub options: Option<prost_types::Any>,
}

/// What a shim says of its sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodStatus {
    pub ready: bool,
    /// A process in the pod's namespaces.
    pub pid: u32,
}

impl Shim {
    async fn sandbox<A: Message + Default>(
        &self,
        method: &'static str,
        request: &impl Message,
        timeout: Option<Duration>,
    ) -> Result<A, CallError> {
        self.client.call(sandbox::SERVICE, method, request, timeout).await
    }

    /// Makes and starts the sandbox; answers a pid that is in the pod's namespaces.
    pub async fn run_sandbox(&self, request: &PodRequest<'_>) -> Result<u32, CallError> {
        let id = request.id.to_owned();
        match self.sandboxer {
            Sandboxer::Shim => {
                let options = prost_types::Any { type_url: pod::TYPE_URL.to_owned(), value: request.config.encode_to_vec() };
                let create = sandbox::CreateSandboxRequest {
                    sandbox_id: id.clone(),
                    bundle_path: request.bundle.to_owned(),
                    options: Some(options),
                    netns_path: request.netns.to_owned(),
                    annotations: request.config.annotations.clone().into_iter().collect(),
                    ..sandbox::CreateSandboxRequest::default()
                };
                let _: sandbox::CreateSandboxResponse = self.sandbox("CreateSandbox", &create, Some(ACT)).await?;
                let start = sandbox::StartSandboxRequest { sandbox_id: id };
                let answer: sandbox::StartSandboxResponse = self.sandbox("StartSandbox", &start, Some(ACT)).await?;
                Ok(answer.pid)
            }
            Sandboxer::PodSandbox => {
                let create = v3::CreateTaskRequest {
                    id,
                    bundle: request.bundle.to_owned(),
                    options: request.options.clone(),
                    ..v3::CreateTaskRequest::default()
                };
                self.create(&create).await?;
                self.start(request.id, "").await
            }
        }
    }

    /// The sandbox' state and pid.
    pub async fn sandbox_status(&self, id: &str) -> Result<PodStatus, CallError> {
        match self.sandboxer {
            Sandboxer::Shim => {
                let request = sandbox::SandboxStatusRequest { sandbox_id: id.to_owned(), verbose: false };
                let status: sandbox::SandboxStatusResponse = self.sandbox("SandboxStatus", &request, Some(ASK)).await?;
                Ok(PodStatus { ready: status.state == sandbox::STATE_READY, pid: status.pid })
            }
            Sandboxer::PodSandbox => {
                let state = self.state(id, "").await?;
                Ok(PodStatus { ready: state.status() == Status::Running, pid: state.pid })
            }
        }
    }

    /// Waits for the sandbox' end.
    pub async fn wait_sandbox(&self, id: &str) -> Result<(), CallError> {
        match self.sandboxer {
            Sandboxer::Shim => {
                let request = sandbox::WaitSandboxRequest { sandbox_id: id.to_owned() };
                self.sandbox::<sandbox::WaitSandboxResponse>("WaitSandbox", &request, None).await.map(drop)
            }
            Sandboxer::PodSandbox => self.wait(id, "").await.map(drop),
        }
    }

    /// Ends the sandbox' own process, if it has one; a sandbox that is not known is as good.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), CallError> {
        let stopped = match self.sandboxer {
            Sandboxer::Shim => {
                let request = sandbox::StopSandboxRequest { sandbox_id: id.to_owned(), timeout_secs: 0 };
                self.sandbox::<sandbox::StopSandboxResponse>("StopSandbox", &request, Some(ACT)).await.map(drop)
            }
            Sandboxer::PodSandbox => self.end_pause(id).await,
        };
        stopped.or_else(|error| if error.is_not_found() { Ok(()) } else { Err(error) })
    }

    async fn end_pause(&self, id: &str) -> Result<(), CallError> {
        // NotFound of one that has ended, or was never made: what is left of it is deleted all the same.
        if let Err(error) = self.kill(id, "", SIGKILL, false).await
            && !error.is_not_found()
        {
            return Err(error);
        }
        let ended = tokio::time::timeout(ACT, self.wait(id, "")).await;
        ended.map_err(|_| CallError::Deadline { method: "Wait", seconds: ACT.as_secs() })??;
        self.delete(id, "").await.map(drop)
    }

    /// Ends the shim; a connection that closes before the answer is as good.
    pub async fn shutdown_sandbox(&self, id: &str) -> Result<(), CallError> {
        let ended = match self.sandboxer {
            Sandboxer::Shim => {
                let request = sandbox::ShutdownSandboxRequest { sandbox_id: id.to_owned() };
                self.sandbox::<sandbox::ShutdownSandboxResponse>("ShutdownSandbox", &request, Some(ASK)).await.map(drop)
            }
            Sandboxer::PodSandbox => {
                self.stop_sandbox(id).await?;
                self.task::<_, ()>("Shutdown", &v3::ShutdownRequest { id: id.to_owned(), now: false }, Some(ASK)).await
            }
        };
        ended.or_else(|error| if error.is_not_found() || error.is_closed() { Ok(()) } else { Err(error) })
    }
}
