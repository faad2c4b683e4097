//! The CRI client: one connection for both services, a deadline on every call, and spans.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use protocols::cri::v1 as cri;
use protocols::cri::v1::image_service_client::ImageServiceClient;
use protocols::cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::model::{Container, PodRuntime, Sandbox, labels};

/// Deadline of an ordinary call (upstream's runtimeRequestTimeout).
pub const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A call that failed, or an endpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint is not `unix:///PATH` or a path.
    #[error("container runtime endpoint {0:?} is not a unix socket")]
    Endpoint(String),
    /// The channel could not be made.
    #[error("failed to use container runtime endpoint {endpoint}")]
    Connect {
        /// The endpoint.
        endpoint: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The runtime answered with an error.
    #[error("{call} failed")]
    Call {
        /// The RPC.
        call: &'static str,
        /// The gRPC status.
        source: Box<tonic::Status>,
    },
    /// The answer lacks a field that the protocol requires.
    #[error("{call} answered without {field}")]
    Missing {
        /// The RPC.
        call: &'static str,
        /// The field.
        field: &'static str,
    },
}

impl Error {
    /// The gRPC code, when the runtime answered one.
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            Self::Call { source, .. } => Some(source.code()),
            _ => None,
        }
    }

    /// True when what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(tonic::Code::NotFound)
    }
}

/// The runtime's own words, without the RPC's name: what events and waiting messages show.
pub fn message(error: &Error) -> String {
    match error {
        Error::Call { source, .. } => source.message().to_owned(),
        other => other.to_string(),
    }
}

/// As Go prints a gRPC error: what upstream's events show where they print the whole error.
pub fn go_error(error: &Error) -> String {
    match error {
        Error::Call { source, .. } => format!("rpc error: code = {:?} desc = {}", source.code(), source.message()),
        other => other.to_string(),
    }
}

/// A CRI runtime. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

macro_rules! call {
    ($client:expr, $method:ident, $request:expr, $timeout:expr) => {{
        let mut request = tonic::Request::new($request);
        request.set_timeout($timeout);
        let mut client = $client;
        let call = client.$method(request);
        match tokio::time::timeout($timeout + Duration::from_secs(2), call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(Error::Call { call: stringify!($method), source: Box::new(status) }),
            Err(_) => Err(Error::Call {
                call: stringify!($method),
                source: Box::new(tonic::Status::deadline_exceeded("no answer within the deadline")),
            }),
        }
    }};
}

impl Runtime {
    /// Makes lazily connecting clients; the image endpoint defaults to the runtime's.
    pub fn new(endpoint: &str, image_endpoint: Option<&str>) -> Result<Self, Error> {
        let channel = channel(endpoint)?;
        let images = match image_endpoint.filter(|e| !e.is_empty() && *e != endpoint) {
            Some(endpoint) => self::channel(endpoint)?,
            None => channel.clone(),
        };
        let limit = cri::MESSAGE_BYTES_MAX;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel).max_decoding_message_size(limit).max_encoding_message_size(limit),
            images: ImageServiceClient::new(images).max_decoding_message_size(limit).max_encoding_message_size(limit),
        })
    }

    /// `Version`.
    pub async fn version(&self) -> Result<cri::VersionResponse, Error> {
        let request = cri::VersionRequest { version: String::new() };
        call!(self.runtime.clone(), version, request, CALL_TIMEOUT)
    }

    /// `Status`, not verbose.
    pub async fn status(&self) -> Result<cri::StatusResponse, Error> {
        call!(self.runtime.clone(), status, cri::StatusRequest { verbose: false }, CALL_TIMEOUT)
    }

    /// `UpdateRuntimeConfig` with the node's pod CIDR.
    pub async fn update_pod_cidr(&self, pod_cidr: &str) -> Result<(), Error> {
        let request = cri::UpdateRuntimeConfigRequest {
            runtime_config: Some(cri::RuntimeConfig { network_config: Some(cri::NetworkConfig { pod_cidr: pod_cidr.to_owned() }) }),
        };
        call!(self.runtime.clone(), update_runtime_config, request, CALL_TIMEOUT).map(|_| ())
    }

    /// All sandboxes, or those of one pod.
    pub async fn list_sandboxes(&self, uid: Option<&str>) -> Result<Vec<cri::PodSandbox>, Error> {
        let filter = cri::PodSandboxFilter { label_selector: uid_selector(uid), ..Default::default() };
        let request = cri::ListPodSandboxRequest { filter: Some(filter) };
        let answer = call!(self.runtime.clone(), list_pod_sandbox, request, CALL_TIMEOUT)?;
        Ok(answer.items)
    }

    /// All containers, or those of one pod.
    pub async fn list_containers(&self, uid: Option<&str>) -> Result<Vec<cri::Container>, Error> {
        let filter = cri::ContainerFilter { label_selector: uid_selector(uid), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let answer = call!(self.runtime.clone(), list_containers, request, CALL_TIMEOUT)?;
        Ok(answer.containers)
    }

    /// `PodSandboxStatus`.
    pub async fn sandbox_status(&self, id: &str) -> Result<cri::PodSandboxStatus, Error> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = call!(self.runtime.clone(), pod_sandbox_status, request, CALL_TIMEOUT)?;
        answer.status.ok_or(Error::Missing { call: "pod_sandbox_status", field: "status" })
    }

    /// `ContainerStatus`.
    pub async fn container_status(&self, id: &str) -> Result<cri::ContainerStatus, Error> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = call!(self.runtime.clone(), container_status, request, CALL_TIMEOUT)?;
        answer.status.ok_or(Error::Missing { call: "container_status", field: "status" })
    }

    /// Everything of one pod, newest first; what vanishes meanwhile is left out.
    pub async fn observe(&self, uid: &str) -> Result<PodRuntime, Error> {
        let (sandboxes, containers) = tokio::try_join!(self.list_sandboxes(Some(uid)), self.list_containers(Some(uid)))?;
        let mut pod = PodRuntime::default();
        for sandbox in sandboxes {
            match self.sandbox_status(&sandbox.id).await {
                Ok(status) => pod.sandboxes.push(Sandbox::from_cri(&status)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        for container in containers {
            match self.container_status(&container.id).await {
                Ok(status) => {
                    let container = Container::from_cri(&status, &container.pod_sandbox_id);
                    pod.containers.push(container);
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        pod.sort();
        Ok(pod)
    }

    /// `RunPodSandbox`, deadline 240 s.
    pub async fn run_sandbox(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<String, Error> {
        let uid = config.metadata.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let span = Span::start(&uid, "kubelet.RunPodSandbox");
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let answer = call!(self.runtime.clone(), run_pod_sandbox, request, CALL_TIMEOUT * 2)?;
        span.end();
        Ok(answer.pod_sandbox_id)
    }

    /// `StopPodSandbox`; an absent one is stopped.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_done(call!(self.runtime.clone(), stop_pod_sandbox, request, CALL_TIMEOUT).map(|_| ()))
    }

    /// `RemovePodSandbox`; an absent one is removed.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_done(call!(self.runtime.clone(), remove_pod_sandbox, request, CALL_TIMEOUT).map(|_| ()))
    }

    /// `CreateContainer`: the new id.
    pub async fn create_container(
        &self,
        sandbox_id: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, Error> {
        let uid = sandbox_config.metadata.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
        let span = Span::start(&uid, "kubelet.CreateContainer");
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer = call!(self.runtime.clone(), create_container, request, CALL_TIMEOUT)?;
        span.end();
        Ok(answer.container_id)
    }

    /// `StartContainer`.
    pub async fn start_container(&self, uid: &str, id: &str) -> Result<(), Error> {
        let span = Span::start(uid, "kubelet.StartContainer");
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        call!(self.runtime.clone(), start_container, request, CALL_TIMEOUT)?;
        span.end();
        Ok(())
    }

    /// `StopContainer` with a grace period in seconds; an absent one is stopped.
    pub async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), Error> {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: grace_seconds };
        let grace = Duration::from_secs(u64::try_from(grace_seconds).unwrap_or(0));
        gone_is_done(call!(self.runtime.clone(), stop_container, request, CALL_TIMEOUT + grace).map(|_| ()))
    }

    /// `RemoveContainer`; an absent one is removed.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        gone_is_done(call!(self.runtime.clone(), remove_container, request, CALL_TIMEOUT).map(|_| ()))
    }

    /// `ExecSync`.
    pub async fn exec_sync(&self, id: &str, command: &[String], timeout: Duration) -> Result<cri::ExecSyncResponse, Error> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            timeout: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        };
        call!(self.runtime.clone(), exec_sync, request, CALL_TIMEOUT + timeout)
    }

    /// `Exec`: the URL of the stream.
    pub async fn exec(&self, request: cri::ExecRequest) -> Result<String, Error> {
        call!(self.runtime.clone(), exec, request, CALL_TIMEOUT).map(|a| a.url)
    }

    /// `Attach`: the URL of the stream.
    pub async fn attach(&self, request: cri::AttachRequest) -> Result<String, Error> {
        call!(self.runtime.clone(), attach, request, CALL_TIMEOUT).map(|a| a.url)
    }

    /// `PortForward`: the URL of the stream.
    pub async fn port_forward(&self, request: cri::PortForwardRequest) -> Result<String, Error> {
        call!(self.runtime.clone(), port_forward, request, CALL_TIMEOUT).map(|a| a.url)
    }

    /// `ReopenContainerLog`.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Error> {
        let request = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        call!(self.runtime.clone(), reopen_container_log, request, CALL_TIMEOUT).map(|_| ())
    }

    /// `ListContainerStats` of all containers.
    pub async fn container_stats(&self) -> Result<Vec<cri::ContainerStats>, Error> {
        let request = cri::ListContainerStatsRequest { filter: None };
        call!(self.runtime.clone(), list_container_stats, request, CALL_TIMEOUT).map(|a| a.stats)
    }

    /// `ListPodSandboxStats` of all sandboxes.
    pub async fn sandbox_stats(&self) -> Result<Vec<cri::PodSandboxStats>, Error> {
        let request = cri::ListPodSandboxStatsRequest { filter: None };
        call!(self.runtime.clone(), list_pod_sandbox_stats, request, CALL_TIMEOUT).map(|a| a.stats)
    }

    /// `GetContainerEvents`: a stream without deadline.
    pub async fn events(&self) -> Result<tonic::Streaming<cri::ContainerEventResponse>, Error> {
        let answer = self.runtime.clone().get_container_events(cri::GetEventsRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| Error::Call { call: "get_container_events", source: Box::new(status) })
    }

    /// `ListImages`.
    pub async fn list_images(&self) -> Result<Vec<cri::Image>, Error> {
        let request = cri::ListImagesRequest { filter: None };
        call!(self.images.clone(), list_images, request, CALL_TIMEOUT).map(|a| a.images)
    }

    /// `ImageStatus`; `None` when the image is not there.
    pub async fn image_status(&self, image: cri::ImageSpec) -> Result<Option<cri::Image>, Error> {
        let request = cri::ImageStatusRequest { image: Some(image), verbose: false };
        call!(self.images.clone(), image_status, request, CALL_TIMEOUT).map(|a| a.image)
    }

    /// `PullImage`, without a deadline, as upstream: an image may be large.
    pub async fn pull_image(&self, uid: &str, request: cri::PullImageRequest) -> Result<String, Error> {
        let span = Span::start(uid, "kubelet.PullImage");
        let answer =
            self.images.clone().pull_image(request).await.map_err(|status| Error::Call { call: "pull_image", source: Box::new(status) })?;
        span.end();
        Ok(answer.into_inner().image_ref)
    }

    /// `RemoveImage`; an absent one is removed.
    pub async fn remove_image(&self, image: cri::ImageSpec) -> Result<(), Error> {
        let request = cri::RemoveImageRequest { image: Some(image) };
        gone_is_done(call!(self.images.clone(), remove_image, request, CALL_TIMEOUT).map(|_| ()))
    }

    /// `ImageFsInfo`.
    pub async fn image_fs_info(&self) -> Result<cri::ImageFsInfoResponse, Error> {
        call!(self.images.clone(), image_fs_info, cri::ImageFsInfoRequest {}, CALL_TIMEOUT)
    }
}

fn gone_is_done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

fn uid_selector(uid: Option<&str>) -> std::collections::HashMap<String, String> {
    uid.map(|uid| (labels::POD_UID.to_owned(), uid.to_owned())).into_iter().collect()
}

fn channel(endpoint: &str) -> Result<Channel, Error> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint).to_owned();
    if !path.starts_with('/') {
        return Err(Error::Endpoint(endpoint.to_owned()));
    }
    let source = |source| Error::Connect { endpoint: endpoint.to_owned(), source };
    // The authority is never resolved: the connector goes to the socket.
    let uri = Endpoint::try_from("http://localhost").map_err(source)?;
    Ok(uri.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    })))
}

/// A hop of `coracle trace`: told when it ends well.
pub struct Span {
    uid: String,
    hop: &'static str,
    start_us: u64,
    began: Instant,
}

impl Span {
    /// Begins a hop of the pod `uid`.
    pub fn start(uid: &str, hop: &'static str) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { uid: uid.to_owned(), hop, start_us: u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX), began: Instant::now() }
    }

    /// Ends the hop.
    pub fn end(self) {
        let duration_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(
            target: "coracle::span",
            pod_uid = %self.uid,
            hop = self.hop,
            start_us = self.start_us,
            duration_us = duration_us,
        );
    }
}
