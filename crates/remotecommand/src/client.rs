//! The client's side: towards a runtime's streaming server, or a kubelet.

use std::convert::Infallible;
use std::future::Future;

use http::header::{CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;

use crate::negotiate::{STREAM_PROTOCOL_VERSION, V4, V5};
use crate::{Channel, Channels, Frame, Input, Output, Protocol, QUEUE_CHUNKS_MAX, Role, Status, StreamError};

/// The queues of one remote command.
#[derive(Debug)]
pub struct ClientSession {
    /// What goes to the command. Dropping it sends nothing more; the session goes on.
    pub input: mpsc::Sender<Input>,
    /// What the command sends. Ends after [`Output::Status`], or without one when the connection broke. Dropping it closes
    /// the connection.
    pub output: mpsc::Receiver<Output>,
}

/// The headers that ask a server to upgrade to `protocol`.
pub fn request_headers(protocol: Protocol) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let version = match protocol {
        Protocol::SpdyV4 => {
            headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
            headers.insert(STREAM_PROTOCOL_VERSION, HeaderValue::from_static(V4));
            return headers;
        }
        Protocol::WebSocketV5 => V5,
        Protocol::WebSocketV4 => V4,
    };
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(version));
    if let Ok(key) = HeaderValue::from_str(&generate_key()) {
        headers.insert(SEC_WEBSOCKET_KEY, key);
    }
    headers
}

/// What a server's 101 response agreed to.
pub fn agreed(response: &HeaderMap) -> Result<Protocol, StreamError> {
    let text = |name: &http::HeaderName| response.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let upgrade = text(&UPGRADE);
    if upgrade.eq_ignore_ascii_case("SPDY/3.1") && text(&STREAM_PROTOCOL_VERSION) == V4 {
        return Ok(Protocol::SpdyV4);
    }
    match (upgrade.eq_ignore_ascii_case("websocket"), text(&SEC_WEBSOCKET_PROTOCOL)) {
        (true, V5) => Ok(Protocol::WebSocketV5),
        (true, V4) => Ok(Protocol::WebSocketV4),
        _ => Err(StreamError::Refused(format!(
            "server agreed to upgrade {upgrade:?}, protocol {:?}{:?}",
            text(&STREAM_PROTOCOL_VERSION),
            text(&SEC_WEBSOCKET_PROTOCOL)
        ))),
    }
}

/// Takes over a connection whose server answered 101 for `protocol`. The future drives it and ends with it.
pub fn attach<T>(io: T, protocol: Protocol, channels: Channels) -> (ClientSession, impl Future<Output = Result<(), StreamError>>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (input, input_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (output_tx, output) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (inbound, inbound_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (outbound, outbound_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let driver = async move {
        let connection = crate::run(io, protocol, Role::Client, channels, inbound, outbound_rx);
        let relay = async {
            // The session is over when all that the server said is delivered, whatever is still waiting to be sent.
            tokio::select! {
                () = deliver(inbound_rx, output_tx) => {}
                never = collect(input_rx, outbound) => match never {},
            }
        };
        let (result, ()) = tokio::join!(connection, relay);
        result
    };
    (ClientSession { input, output }, driver)
}

/// From frames to output: ends after the status.
async fn deliver(mut inbound: mpsc::Receiver<Frame>, output: mpsc::Sender<Output>) {
    let mut status = Vec::new();
    loop {
        let frame = tokio::select! {
            frame = inbound.recv() => frame,
            () = output.closed() => return,
        };
        let item = match frame {
            None | Some(Frame::Close(Channel::Error)) => break,
            Some(frame) => frame,
        };
        let item = match item {
            Frame::Data(Channel::Stdout, bytes) => Output::Stdout(bytes),
            Frame::Data(Channel::Stderr, bytes) => Output::Stderr(bytes),
            Frame::Data(Channel::Error, bytes) => {
                status.extend_from_slice(&bytes);
                continue;
            }
            _ => continue,
        };
        if output.send(item).await.is_err() {
            return;
        }
    }
    if !status.is_empty() {
        let _ = output.send(Output::Status(Status::from_bytes(&status))).await;
    }
}

/// From input to frames. Never ends by itself: the command may still write when nothing is left to send.
async fn collect(mut input: mpsc::Receiver<Input>, outbound: mpsc::Sender<Frame>) -> Infallible {
    while let Some(item) = input.recv().await {
        let frame = match item {
            Input::Stdin(bytes) => Frame::Data(Channel::Stdin, bytes),
            Input::StdinClosed => Frame::Close(Channel::Stdin),
            Input::Resize(size) => match serde_json::to_vec(&size) {
                Ok(json) => Frame::Data(Channel::Resize, json.into()),
                Err(_) => continue,
            },
        };
        if outbound.send(frame).await.is_err() {
            break;
        }
    }
    std::future::pending().await
}
