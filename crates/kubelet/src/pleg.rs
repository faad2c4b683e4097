//! The runtime's events as a bounded stream of wake-ups (CRI GetContainerEvents).

use std::time::Duration;

use protocols::cri::v1::ContainerEventResponse;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::runtime::{Error, Runtime};

/// Signals waiting for the manager.
const SIGNALS_MAX: usize = 256;
/// An opened stream that is not refused within this time is taken to work: gRPC servers may send their headers only
/// with the first event.
const SETTLE: Duration = Duration::from_secs(1);
/// Wait before the stream is opened again, and when the runtime has no events at all.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_UNIMPLEMENTED: Duration = Duration::from_secs(60);

/// What the manager is told.
#[derive(Debug)]
pub enum Signal {
    /// Events come from now on: whatever happened before is to be listed.
    Up,
    /// No events come: the runtime is to be listed every second.
    Down,
    /// Something happened to the pod of this uid; `None` when the event does not say which.
    Pod(Option<String>),
}

/// The receiving end, and the future that feeds it until cancelled.
pub fn stream(runtime: Runtime, cancel: CancellationToken) -> (mpsc::Receiver<Signal>, impl Future<Output = ()>) {
    let (sender, receiver) = mpsc::channel(SIGNALS_MAX);
    let feed = async move {
        loop {
            let wait = tokio::select! {
                () = cancel.cancelled() => return,
                error = feed_once(&runtime, &sender) => match error {
                    Some(error) if error.code() == Some(tonic::Code::Unimplemented) => RETRY_UNIMPLEMENTED,
                    _ => RETRY,
                },
            };
            if sender.send(Signal::Down).await.is_err() {
                return;
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    };
    (receiver, feed)
}

/// Opens the stream and passes on until it ends; the error when it was refused.
async fn feed_once(runtime: &Runtime, sender: &mpsc::Sender<Signal>) -> Option<Error> {
    let open = runtime.events();
    tokio::pin!(open);
    let mut up = false;
    let opened = tokio::select! {
        opened = &mut open => opened,
        () = tokio::time::sleep(SETTLE) => {
            up = true;
            sender.send(Signal::Up).await.ok()?;
            open.await
        }
    };
    let mut events = match opened {
        Ok(events) => events,
        Err(error) => return Some(error),
    };
    if !up {
        sender.send(Signal::Up).await.ok()?;
    }
    while let Ok(Some(event)) = events.message().await {
        sender.send(Signal::Pod(uid(&event))).await.ok()?;
    }
    None
}

fn uid(event: &ContainerEventResponse) -> Option<String> {
    let metadata = event.pod_sandbox_status.as_ref()?.metadata.as_ref()?;
    Some(metadata.uid.clone())
}
