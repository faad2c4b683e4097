//! The socket that shims forward their events to (env `TTRPC_ADDRESS`). Exits are known from `Wait`; of the events only the
//! out-of-memory ones say something new.

use prost::Message;
use protocols::shim::events::{ForwardRequest, SERVICE, TaskOom};
use protocols::ttrpc::{self, FrameType, Request, Response, RpcError, code};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::read_frame;

const OOM_TOPIC: &str = "/tasks/oom";

/// Serves until cancelled. The id of each container that ran out of memory goes to `ooms`.
pub async fn serve(listener: UnixListener, ooms: mpsc::Sender<String>, tasks: TaskTracker, cancel: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let ooms = ooms.clone();
                tasks.spawn(cancel.clone().run_until_cancelled_owned(connection(stream, ooms)));
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a shim's event connection");
                // Descriptors are used up: others must get the chance to close some.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, ooms: mpsc::Sender<String>) {
    let (mut read, mut write) = stream.into_split();
    while let Some((header, data)) = read_frame(&mut read).await {
        if header.kind != FrameType::Request as u8 {
            continue;
        }
        let answer = match Request::decode(data.as_slice()) {
            Ok(request) => handle(&request, &ooms).await,
            Err(error) => Err(RpcError::new(code::INVALID_ARGUMENT, error.to_string())),
        };
        let mut frame = Vec::new();
        if ttrpc::encode_frame(&mut frame, FrameType::Response, header.stream, &Response::of(answer)).is_err()
            || write.write_all(&frame).await.is_err()
        {
            return;
        }
    }
}

async fn handle(request: &Request, ooms: &mpsc::Sender<String>) -> Result<Vec<u8>, RpcError> {
    if request.service != SERVICE || request.method != "Forward" {
        return Err(RpcError::new(code::UNIMPLEMENTED, format!("{}/{} is not served here", request.service, request.method)));
    }
    let invalid = |error: prost::DecodeError| RpcError::new(code::INVALID_ARGUMENT, error.to_string());
    let envelope = ForwardRequest::decode(request.payload.as_slice()).map_err(invalid)?.envelope.unwrap_or_default();
    if envelope.topic == OOM_TOPIC {
        let event = TaskOom::decode(envelope.event.unwrap_or_default().value.as_slice()).map_err(invalid)?;
        // Only a server that ends has no reader.
        let _ = ooms.send(event.container_id).await;
    }
    Ok(Vec::new())
}
