//! A CRI runtime in this process: it keeps what it is told to make, and a list of the calls.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocols::cri::v1 as cri;
use protocols::cri::v1::image_service_server::{ImageService, ImageServiceServer};
use protocols::cri::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};
use tower::Service as _;

type Answer<T> = Result<Response<T>, Status>;
type Never<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

#[derive(Default)]
pub struct World {
    pub calls: Vec<String>,
    pub sandboxes: Vec<cri::PodSandboxStatus>,
    /// With the sandbox of each.
    pub containers: Vec<(String, cri::ContainerStatus)>,
    clock: i64,
}

#[derive(Clone, Default)]
pub struct Mock(Arc<Mutex<World>>);

impl Mock {
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves on a socket until the test's runtime ends.
    pub fn serve(&self, path: &std::path::Path) {
        let listener = UnixListener::bind(path).expect("a free socket path");
        let (runtime, images) = (RuntimeServiceServer::new(self.clone()), ImageServiceServer::new(self.clone()));
        let both = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
            let (mut runtime, mut images) = (runtime.clone(), images.clone());
            async move { if request.uri().path().contains("ImageService") { images.call(request).await } else { runtime.call(request).await } }
        });
        let server = tonic::transport::Server::builder();
        tokio::spawn(server.serve_with_incoming(both, UnixListenerStream::new(listener)));
    }

    /// Ends the newest container of that name.
    pub fn exit(&self, name: &str, code: i32) {
        let mut world = self.world();
        let now = world.tick();
        let found = world.containers.iter_mut().rev().find(|(_, c)| c.metadata.as_ref().is_some_and(|m| m.name == name));
        let (_, container) = found.expect("a container of that name");
        container.state = cri::ContainerState::ContainerExited as i32;
        container.exit_code = code;
        container.reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
        container.finished_at = now;
    }
}

impl World {
    /// Nanoseconds since the epoch, strictly rising.
    fn tick(&mut self) -> i64 {
        let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).expect("before 2262");
        self.clock = now.max(self.clock + 1);
        self.clock
    }

    fn container(&mut self, id: &str) -> Result<&mut cri::ContainerStatus, Status> {
        let found = self.containers.iter_mut().find(|(_, c)| c.id == id);
        found.map(|(_, c)| c).ok_or_else(|| Status::not_found(format!("container {id}")))
    }

    fn sandbox(&mut self, id: &str) -> Result<&mut cri::PodSandboxStatus, Status> {
        self.sandboxes.iter_mut().find(|s| s.id == id).ok_or_else(|| Status::not_found(format!("sandbox {id}")))
    }
}

#[tonic::async_trait]
impl RuntimeService for Mock {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse { runtime_name: "mock".into(), ..Default::default() }))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Answer<cri::RunPodSandboxResponse> {
        let config = request.into_inner().config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        let mut world = self.world();
        let id = format!("s{}", world.sandboxes.len());
        world.calls.push(format!("RunPodSandbox attempt {}", metadata.attempt));
        let created_at = world.tick();
        world.sandboxes.push(cri::PodSandboxStatus {
            id: id.clone(),
            metadata: config.metadata,
            created_at,
            labels: config.labels,
            network: Some(cri::PodSandboxNetworkStatus { ip: "10.1.2.3".into(), ..Default::default() }),
            ..Default::default()
        });
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(&self, request: Request<cri::StopPodSandboxRequest>) -> Answer<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let mut world = self.world();
        world.calls.push(format!("StopPodSandbox {id}"));
        world.sandbox(&id)?.state = cri::PodSandboxState::SandboxNotready as i32;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, request: Request<cri::RemovePodSandboxRequest>) -> Answer<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let mut world = self.world();
        world.calls.push(format!("RemovePodSandbox {id}"));
        world.sandboxes.retain(|s| s.id != id);
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, request: Request<cri::PodSandboxStatusRequest>) -> Answer<cri::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let status = self.world().sandbox(&id)?.clone();
        Ok(Response::new(cri::PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn list_pod_sandbox(&self, _: Request<cri::ListPodSandboxRequest>) -> Answer<cri::ListPodSandboxResponse> {
        let world = self.world();
        let items = world.sandboxes.iter().map(|s| cri::PodSandbox {
            id: s.id.clone(),
            state: s.state,
            labels: s.labels.clone(),
            ..Default::default()
        });
        Ok(Response::new(cri::ListPodSandboxResponse { items: items.collect() }))
    }

    async fn create_container(&self, request: Request<cri::CreateContainerRequest>) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        let mut world = self.world();
        let id = format!("{}{}", metadata.name, metadata.attempt);
        world.calls.push(format!("CreateContainer {id} log {}", config.log_path));
        let created_at = world.tick();
        let status = cri::ContainerStatus {
            id: id.clone(),
            metadata: config.metadata,
            state: cri::ContainerState::ContainerCreated as i32,
            created_at,
            image: config.image,
            labels: config.labels,
            annotations: config.annotations,
            mounts: config.mounts,
            ..Default::default()
        };
        world.containers.push((request.pod_sandbox_id, status));
        Ok(Response::new(cri::CreateContainerResponse { container_id: id }))
    }

    async fn start_container(&self, request: Request<cri::StartContainerRequest>) -> Answer<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        let mut world = self.world();
        world.calls.push(format!("StartContainer {id}"));
        let now = world.tick();
        let container = world.container(&id)?;
        container.state = cri::ContainerState::ContainerRunning as i32;
        container.started_at = now;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let mut world = self.world();
        world.calls.push(format!("StopContainer {} grace {}", request.container_id, request.timeout));
        let now = world.tick();
        let container = world.container(&request.container_id)?;
        container.state = cri::ContainerState::ContainerExited as i32;
        container.exit_code = 143;
        container.finished_at = now;
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(&self, request: Request<cri::RemoveContainerRequest>) -> Answer<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        let mut world = self.world();
        world.calls.push(format!("RemoveContainer {id}"));
        world.containers.retain(|(_, c)| c.id != id);
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, _: Request<cri::ListContainersRequest>) -> Answer<cri::ListContainersResponse> {
        let world = self.world();
        let containers = world.containers.iter().map(|(sandbox, c)| cri::Container {
            id: c.id.clone(),
            pod_sandbox_id: sandbox.clone(),
            state: c.state,
            labels: c.labels.clone(),
            ..Default::default()
        });
        Ok(Response::new(cri::ListContainersResponse { containers: containers.collect() }))
    }

    async fn container_status(&self, request: Request<cri::ContainerStatusRequest>) -> Answer<cri::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let status = self.world().container(&id)?.clone();
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(status), ..Default::default() }))
    }

    type StreamPodSandboxesStream = Never<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = Never<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = Never<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Never<cri::StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Never<cri::ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Never<cri::StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandboxes(&self, _: Request<cri::StreamPodSandboxesRequest>) -> Answer<Self::StreamPodSandboxesStream> {
        Err(Status::unimplemented("stream_pod_sandboxes"))
    }
    async fn stream_containers(&self, _: Request<cri::StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
        Err(Status::unimplemented("stream_containers"))
    }
    async fn update_container_resources(
        &self,
        _: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        Err(Status::unimplemented("update_container_resources"))
    }
    async fn reopen_container_log(&self, _: Request<cri::ReopenContainerLogRequest>) -> Answer<cri::ReopenContainerLogResponse> {
        Err(Status::unimplemented("reopen_container_log"))
    }
    async fn exec_sync(&self, _: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        Err(Status::unimplemented("exec_sync"))
    }
    async fn exec(&self, _: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        Err(Status::unimplemented("exec"))
    }
    async fn attach(&self, _: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        Err(Status::unimplemented("attach"))
    }
    async fn port_forward(&self, _: Request<cri::PortForwardRequest>) -> Answer<cri::PortForwardResponse> {
        Err(Status::unimplemented("port_forward"))
    }
    async fn container_stats(&self, _: Request<cri::ContainerStatsRequest>) -> Answer<cri::ContainerStatsResponse> {
        Err(Status::unimplemented("container_stats"))
    }
    async fn list_container_stats(&self, _: Request<cri::ListContainerStatsRequest>) -> Answer<cri::ListContainerStatsResponse> {
        Err(Status::unimplemented("list_container_stats"))
    }
    async fn stream_container_stats(&self, _: Request<cri::StreamContainerStatsRequest>) -> Answer<Self::StreamContainerStatsStream> {
        Err(Status::unimplemented("stream_container_stats"))
    }
    async fn pod_sandbox_stats(&self, _: Request<cri::PodSandboxStatsRequest>) -> Answer<cri::PodSandboxStatsResponse> {
        Err(Status::unimplemented("pod_sandbox_stats"))
    }
    async fn list_pod_sandbox_stats(&self, _: Request<cri::ListPodSandboxStatsRequest>) -> Answer<cri::ListPodSandboxStatsResponse> {
        Err(Status::unimplemented("list_pod_sandbox_stats"))
    }
    async fn stream_pod_sandbox_stats(&self, _: Request<cri::StreamPodSandboxStatsRequest>) -> Answer<Self::StreamPodSandboxStatsStream> {
        Err(Status::unimplemented("stream_pod_sandbox_stats"))
    }
    async fn update_runtime_config(&self, _: Request<cri::UpdateRuntimeConfigRequest>) -> Answer<cri::UpdateRuntimeConfigResponse> {
        Err(Status::unimplemented("update_runtime_config"))
    }
    async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        Err(Status::unimplemented("status"))
    }
    async fn checkpoint_container(&self, _: Request<cri::CheckpointContainerRequest>) -> Answer<cri::CheckpointContainerResponse> {
        Err(Status::unimplemented("checkpoint_container"))
    }
    async fn checkpoint_pod(&self, _: Request<cri::CheckpointPodRequest>) -> Answer<cri::CheckpointPodResponse> {
        Err(Status::unimplemented("checkpoint_pod"))
    }
    async fn restore_pod(&self, _: Request<cri::RestorePodRequest>) -> Answer<cri::RestorePodResponse> {
        Err(Status::unimplemented("restore_pod"))
    }
    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        Err(Status::unimplemented("get_container_events"))
    }
    async fn list_metric_descriptors(&self, _: Request<cri::ListMetricDescriptorsRequest>) -> Answer<cri::ListMetricDescriptorsResponse> {
        Err(Status::unimplemented("list_metric_descriptors"))
    }
    async fn list_pod_sandbox_metrics(&self, _: Request<cri::ListPodSandboxMetricsRequest>) -> Answer<cri::ListPodSandboxMetricsResponse> {
        Err(Status::unimplemented("list_pod_sandbox_metrics"))
    }
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        Err(Status::unimplemented("stream_pod_sandbox_metrics"))
    }
    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Answer<cri::RuntimeConfigResponse> {
        Err(Status::unimplemented("runtime_config"))
    }
    async fn update_pod_sandbox_resources(
        &self,
        _: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        Err(Status::unimplemented("update_pod_sandbox_resources"))
    }
}

#[tonic::async_trait]
impl ImageService for Mock {
    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Answer<cri::ImageStatusResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        let image = (!name.contains("absent")).then(|| cri::Image { id: format!("sha256:{name}"), ..Default::default() });
        Ok(Response::new(cri::ImageStatusResponse { image, ..Default::default() }))
    }

    type StreamImagesStream = Never<cri::StreamImagesResponse>;
    async fn list_images(&self, _: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        Err(Status::unimplemented("list_images"))
    }
    async fn stream_images(&self, _: Request<cri::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        Err(Status::unimplemented("stream_images"))
    }
    async fn pull_image(&self, _: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        Err(Status::unimplemented("pull_image"))
    }
    async fn remove_image(&self, _: Request<cri::RemoveImageRequest>) -> Answer<cri::RemoveImageResponse> {
        Err(Status::unimplemented("remove_image"))
    }
    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        Err(Status::unimplemented("image_fs_info"))
    }
}
