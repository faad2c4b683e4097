//! CRI's ImageService over the image store.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use protocols::cri::v1::image_service_server::ImageService;
use protocols::cri::v1::*;
use tonic::{Request, Response, Status as RpcStatus};

use crate::server::{Server, Span, pod_uid};
use crate::{host, images};

/// The service; a share of the server.
#[derive(Clone, Debug)]
pub struct Images(pub Arc<Server>);

fn reference(spec: Option<ImageSpec>) -> Result<String, RpcStatus> {
    let image = spec.unwrap_or_default().image;
    if image.is_empty() { Err(RpcStatus::invalid_argument("image is missing")) } else { Ok(image) }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Result<Response<ListImagesResponse>, RpcStatus> {
        let wanted = request.into_inner().filter.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        let images = if wanted.is_empty() { self.0.images.list() } else { self.0.images.find(&wanted).into_iter().collect() };
        Ok(Response::new(ListImagesResponse { images: images.iter().map(images::to_cri).collect() }))
    }

    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<StreamImagesResponse, RpcStatus>> + Send>>;

    async fn stream_images(&self, _: Request<StreamImagesRequest>) -> Result<Response<Self::StreamImagesStream>, RpcStatus> {
        Err(RpcStatus::unimplemented("StreamImages is not implemented"))
    }

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Result<Response<ImageStatusResponse>, RpcStatus> {
        let request = request.into_inner();
        let Some(image) = self.0.images.find(&reference(request.image)?) else {
            // Not an error: an image that is not here has no status.
            return Ok(Response::new(ImageStatusResponse::default()));
        };
        let mut response = ImageStatusResponse { image: Some(images::to_cri(&image)), ..ImageStatusResponse::default() };
        if request.verbose {
            let text = format!("{{\"chainIDs\":{},\"imageSpec\":{}}}", serde_json::json!(image.layers), image.config_json);
            response.info.insert("info".to_owned(), text);
        }
        Ok(Response::new(response))
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Result<Response<PullImageResponse>, RpcStatus> {
        let request = request.into_inner();
        let name = reference(request.image)?;
        let uid = request.sandbox_config.as_ref().map_or_else(String::new, |config| pod_uid(config).to_owned());
        let span = Span::begin(&uid, "cri.PullImage");
        let pulled = self.0.images.pull(&name, request.auth, self.0.cancel.child_token()).await;
        let image = pulled.inspect_err(|error| tracing::warn!(image = name, error = error.chain(), "failed to pull an image"))?;
        span.end();
        Ok(Response::new(PullImageResponse { image_ref: image.id }))
    }

    async fn remove_image(&self, request: Request<RemoveImageRequest>) -> Result<Response<RemoveImageResponse>, RpcStatus> {
        let name = reference(request.into_inner().image)?;
        let server = Arc::clone(&self.0);
        self.0.finish(async move { server.images.remove(&name).await }).await?;
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Result<Response<ImageFsInfoResponse>, RpcStatus> {
        let usage = self.0.images.usage().await?;
        let filesystem = FilesystemUsage {
            timestamp: host::now(),
            fs_id: Some(FilesystemIdentifier { mountpoint: self.0.config.root.to_string() }),
            used_bytes: Some(UInt64Value { value: usage.bytes }),
            inodes_used: Some(UInt64Value { value: usage.inodes }),
        };
        Ok(Response::new(ImageFsInfoResponse { image_filesystems: vec![filesystem.clone()], container_filesystems: vec![filesystem] }))
    }
}
