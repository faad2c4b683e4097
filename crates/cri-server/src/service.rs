//! CRI's RuntimeService over the server: requests in, answers and gRPC codes out.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use protocols::cri::v1::image_service_server::{self, ImageServiceServer};
use protocols::cri::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use protocols::cri::v1::*;
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status as RpcStatus};

use crate::exec::Streams;
use crate::image_service::Images;
use crate::server::Server;
use crate::state::{Container as OurContainer, ContainerState as OurState};
use crate::status::{self, ImageNames};
use crate::streaming::Session;
use crate::{error, host, info};

/// The name that becomes part of container ids in pod status: `coracle://ID`.
pub const RUNTIME_NAME: &str = "coracle";
/// The version of the CRI that is spoken.
const CRI_VERSION: &str = "v1";
/// What a kubelet sends as its own version of the interface, and expects back.
const KUBELET_API_VERSION: &str = "0.1.0";

/// The service; a share of the server.
#[derive(Clone, Debug)]
pub struct Runtime(pub Arc<Server>);

type Answer<T> = Result<Response<T>, RpcStatus>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, RpcStatus>> + Send>>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

fn unimplemented<T>(method: &'static str) -> Answer<T> {
    Err(RpcStatus::unimplemented(format!("{method} is not implemented")))
}

impl Runtime {
    fn container(&self, id: &str) -> error::Result<Arc<OurContainer>> {
        self.0.registry(|registry| registry.container(id))
    }

    fn image_names(&self, container: &OurContainer) -> ImageNames {
        let image = self.0.images.find(&container.image_id);
        image.map_or_else(ImageNames::default, |image| ImageNames {
            tag: image.repo_tags.first().cloned(),
            digest: image.repo_digests.first().cloned(),
        })
    }
}

/// Both services of CRI behind one socket, told apart by the path of a request.
pub fn both(
    server: &Arc<Server>,
) -> impl tower::Service<
    http::Request<tonic::body::Body>,
    Response = http::Response<tonic::body::Body>,
    Error = std::convert::Infallible,
    Future = impl Future<Output = Result<http::Response<tonic::body::Body>, std::convert::Infallible>> + Send + 'static,
> + Clone
+ Send
+ 'static {
    let runtime = RuntimeServiceServer::new(Runtime(Arc::clone(server)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let images = ImageServiceServer::new(Images(Arc::clone(server)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let (mut runtime, mut images) = (runtime.clone(), images.clone());
        async move {
            let service = request.uri().path().split('/').nth(1).unwrap_or("");
            if service == image_service_server::SERVICE_NAME {
                return tower::Service::call(&mut images, request).await;
            }
            // Of other services it answers Unimplemented, as it does of methods that it does not know.
            tower::Service::call(&mut runtime, request).await
        }
    })
}

fn grace(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// As upstream's ValidateExecRequest: a terminal has no stderr of its own, and some stream is wanted.
fn streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<Streams, RpcStatus> {
    if tty && stderr {
        return Err(RpcStatus::invalid_argument("tty and stderr cannot both be true"));
    }
    if !(stdin || stdout || stderr) {
        return Err(RpcStatus::invalid_argument("one of stdin, stdout, or stderr must be set"));
    }
    Ok(Streams { stdin, stdout, stderr, tty })
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        answer(VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: RUNTIME_NAME.to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: CRI_VERSION.to_owned(),
        })
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let pod_sandbox_id = self.0.run_pod_sandbox(request.into_inner()).await?;
        answer(RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(&self, request: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        self.0.stop_pod_sandbox(&request.into_inner().pod_sandbox_id).await?;
        answer(StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(&self, request: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        self.0.remove_pod_sandbox(&request.into_inner().pod_sandbox_id).await?;
        answer(RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(&self, request: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        let request = request.into_inner();
        let (sandbox, containers) = self.0.registry(|registry| {
            let sandbox = registry.sandbox(&request.pod_sandbox_id)?;
            let containers = registry.containers_of(&sandbox.id);
            Ok::<_, error::Error>((sandbox, containers))
        })?;
        answer(PodSandboxStatusResponse {
            status: Some(status::sandbox_status(&sandbox)),
            info: if request.verbose { info::sandbox(&sandbox) } else { Default::default() },
            containers_statuses: containers
                .iter()
                .map(|container| status::container_status(container, Some(&self.image_names(container))))
                .collect(),
            timestamp: host::now(),
        })
    }

    async fn list_pod_sandbox(&self, request: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        let filter = request.into_inner().filter;
        let all = self.0.registry(|registry| registry.sandboxes());
        let items =
            all.iter().map(|sandbox| status::sandbox_entry(sandbox)).filter(|entry| status::sandbox_matches(entry, filter.as_ref()));
        answer(ListPodSandboxResponse { items: items.collect() })
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let container_id = self.0.create_container(request.into_inner()).await?;
        answer(CreateContainerResponse { container_id })
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        self.0.start_container(&request.into_inner().container_id).await?;
        answer(StartContainerResponse {})
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let request = request.into_inner();
        self.0.stop_container(&request.container_id, grace(request.timeout)).await?;
        answer(StopContainerResponse {})
    }

    async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.0.remove_container(&request.into_inner().container_id).await?;
        answer(RemoveContainerResponse {})
    }

    async fn list_containers(&self, request: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        let filter = request.into_inner().filter;
        let all = self.0.registry(|registry| registry.containers());
        let containers = all
            .iter()
            .map(|container| status::container_entry(container))
            .filter(|entry| status::container_matches(entry, filter.as_ref()));
        answer(ListContainersResponse { containers: containers.collect() })
    }

    async fn container_status(&self, request: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        answer(ContainerStatusResponse {
            status: Some(status::container_status(&container, Some(&self.image_names(&container)))),
            info: if request.verbose { info::container(&container) } else { Default::default() },
        })
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        self.0.update_resources(&request.container_id, request.linux.unwrap_or_default()).await?;
        answer(UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(&self, request: Request<ReopenContainerLogRequest>) -> Answer<ReopenContainerLogResponse> {
        let container = self.container(&request.into_inner().container_id)?;
        self.0.reopen_log(&container).await?;
        answer(ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let given_up = CancellationToken::new();
        let _hang_up = given_up.clone().drop_guard();
        let server = Arc::clone(&self.0);
        let request = request.into_inner();
        let response = self.0.finish(async move { server.exec_sync(request, given_up).await }).await?;
        answer(response)
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let request = request.into_inner();
        let streams = streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.container(&request.container_id)?;
        self.0.running(&container)?;
        let url = self.0.stream_url(Session::Exec { container, cmd: request.cmd, streams })?;
        answer(ExecResponse { url })
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        let request = request.into_inner();
        let streams = streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.container(&request.container_id)?;
        self.0.running(&container)?;
        let url = self.0.stream_url(Session::Attach { container, streams })?;
        answer(AttachResponse { url })
    }

    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let sandbox = self.0.registry(|registry| registry.sandbox(&id))?;
        if !sandbox.is_ready() {
            return Err(error::Error::State { kind: "sandbox", id: sandbox.id.clone(), state: "not ready" }.into());
        }
        let url = self.0.stream_url(Session::PortForward { sandbox })?;
        answer(PortForwardResponse { url })
    }

    async fn container_stats(&self, request: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        let container = self.container(&request.into_inner().container_id)?;
        answer(ContainerStatsResponse { stats: Some(self.0.container_stats(&container).await?) })
    }

    async fn list_container_stats(&self, request: Request<ListContainerStatsRequest>) -> Answer<ListContainerStatsResponse> {
        let filter = request.into_inner().filter.map(|filter| ContainerFilter {
            id: filter.id,
            pod_sandbox_id: filter.pod_sandbox_id,
            label_selector: filter.label_selector,
            state: None,
        });
        let mut stats = Vec::new();
        for container in self.0.registry(|registry| registry.containers()) {
            let is_asked = status::container_matches(&status::container_entry(&container), filter.as_ref());
            if !is_asked || !matches!(container.state(), OurState::Running { .. }) {
                continue;
            }
            // One shim that hangs must not hide all others.
            match self.0.container_stats(&container).await {
                Ok(of_one) => stats.push(of_one),
                Err(error) => tracing::warn!(container_id = container.id, error = error.chain(), "no stats of a container"),
            }
        }
        answer(ListContainerStatsResponse { stats })
    }

    async fn pod_sandbox_stats(&self, request: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let sandbox = self.0.registry(|registry| registry.sandbox(&id))?;
        answer(PodSandboxStatsResponse { stats: Some(self.0.sandbox_stats(&sandbox).await?) })
    }

    async fn list_pod_sandbox_stats(&self, request: Request<ListPodSandboxStatsRequest>) -> Answer<ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter.map(|filter| PodSandboxFilter {
            id: filter.id,
            label_selector: filter.label_selector,
            state: None,
        });
        let mut stats = Vec::new();
        for sandbox in self.0.registry(|registry| registry.sandboxes()) {
            if !sandbox.is_ready() || !status::sandbox_matches(&status::sandbox_entry(&sandbox), filter.as_ref()) {
                continue;
            }
            match self.0.sandbox_stats(&sandbox).await {
                Ok(of_one) => stats.push(of_one),
                Err(error) => tracing::warn!(sandbox_id = sandbox.id, error = error.chain(), "no stats of a pod"),
            }
        }
        answer(ListPodSandboxStatsResponse { stats })
    }

    async fn update_runtime_config(&self, request: Request<UpdateRuntimeConfigRequest>) -> Answer<UpdateRuntimeConfigResponse> {
        // The pod CIDR of a node is a flag here; a kubelet that sends one wants what is so already, or what cannot be.
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config).unwrap_or_default();
        if network.pod_cidr.is_empty() || network.pod_cidr == self.0.config.pod_cidr {
            return answer(UpdateRuntimeConfigResponse {});
        }
        Err(RpcStatus::unimplemented(format!(
            "a pod CIDR {} other than --pod-cidr {} is not implemented",
            network.pod_cidr, self.0.config.pod_cidr
        )))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        let network = Arc::clone(&self.0.network);
        let network = tokio::task::spawn_blocking(move || network.status()).await;
        let network = network.map_err(|error| RpcStatus::internal(error.to_string()))?;
        let runtime_ready = self.0.launcher.ensure_keeper().await;
        answer(info::status(&self.0, request.into_inner().verbose, runtime_ready.err(), network))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        answer(RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: CgroupDriver::Cgroupfs as i32 }) })
    }

    type GetContainerEventsStream = Streamed<ContainerEventResponse>;

    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        let events = BroadcastStream::new(self.0.events.subscribe())
            .map(|event| event.map_err(|error| RpcStatus::resource_exhausted(format!("the subscriber is too slow: {error}"))));
        let cancel = self.0.cancel.clone();
        // A subscriber that missed an event is cut off: it must list anew.
        let mut has_failed = false;
        let events = events.take_while(move |event| {
            let go_on = !has_failed;
            has_failed = event.is_err();
            futures::future::ready(go_on)
        });
        answer(Box::pin(events.take_until(cancel.cancelled_owned())))
    }

    type StreamPodSandboxesStream = Streamed<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(&self, _: Request<StreamPodSandboxesRequest>) -> Answer<Self::StreamPodSandboxesStream> {
        unimplemented("StreamPodSandboxes")
    }

    type StreamContainersStream = Streamed<StreamContainersResponse>;

    async fn stream_containers(&self, _: Request<StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
        unimplemented("StreamContainers")
    }

    type StreamContainerStatsStream = Streamed<StreamContainerStatsResponse>;

    async fn stream_container_stats(&self, _: Request<StreamContainerStatsRequest>) -> Answer<Self::StreamContainerStatsStream> {
        unimplemented("StreamContainerStats")
    }

    type StreamPodSandboxStatsStream = Streamed<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(&self, _: Request<StreamPodSandboxStatsRequest>) -> Answer<Self::StreamPodSandboxStatsStream> {
        unimplemented("StreamPodSandboxStats")
    }

    type StreamPodSandboxMetricsStream = Streamed<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(&self, _: Request<StreamPodSandboxMetricsRequest>) -> Answer<Self::StreamPodSandboxMetricsStream> {
        unimplemented("StreamPodSandboxMetrics")
    }

    async fn checkpoint_container(&self, _: Request<CheckpointContainerRequest>) -> Answer<CheckpointContainerResponse> {
        unimplemented("CheckpointContainer")
    }

    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        unimplemented("CheckpointPod")
    }

    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        unimplemented("RestorePod")
    }

    async fn list_metric_descriptors(&self, _: Request<ListMetricDescriptorsRequest>) -> Answer<ListMetricDescriptorsResponse> {
        unimplemented("ListMetricDescriptors")
    }

    async fn list_pod_sandbox_metrics(&self, _: Request<ListPodSandboxMetricsRequest>) -> Answer<ListPodSandboxMetricsResponse> {
        unimplemented("ListPodSandboxMetrics")
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        unimplemented("UpdatePodSandboxResources")
    }
}
