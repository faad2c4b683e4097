//! The server's side: a command's output to a client, the client's input to the command.

use std::future::Future;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::{Channel, Channels, Frame, Input, Output, Protocol, QUEUE_CHUNKS_MAX, Role, StreamError, TerminalSize};

/// The queues of one client.
#[derive(Debug)]
pub struct ServerSession {
    /// What the client sends. Ends when the client is gone. [`Input::StdinClosed`] comes at most once.
    pub input: mpsc::Receiver<Input>,
    /// What goes to the client. [`Output::Status`] ends the session in order; dropping every sender without one ends it too. A
    /// failed send means that the client is gone.
    pub output: mpsc::Sender<Output>,
}

/// Takes over an upgraded connection that agreed on `protocol` ([`crate::negotiate`]).
///
/// The future drives the connection and ends with it: poll it beside whoever uses the session.
pub fn accept<T>(io: T, protocol: Protocol, channels: Channels) -> (ServerSession, impl Future<Output = Result<(), StreamError>>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (input_tx, input) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (output, output_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (inbound, inbound_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (outbound, outbound_rx) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let driver = async move {
        let connection = crate::run(io, protocol, Role::Server, channels, inbound, outbound_rx);
        let (result, (), ()) = tokio::join!(connection, deliver(inbound_rx, input_tx), collect(output_rx, outbound));
        result
    };
    (ServerSession { input, output }, driver)
}

/// From frames to input. Ends when the connection has ended or the session's user stopped listening.
async fn deliver(mut inbound: mpsc::Receiver<Frame>, input: mpsc::Sender<Input>) {
    let mut stdin_open = true;
    while let Some(frame) = inbound.recv().await {
        let item = match frame {
            Frame::Data(Channel::Stdin, bytes) if stdin_open => Input::Stdin(bytes),
            Frame::Close(Channel::Stdin) if stdin_open => {
                stdin_open = false;
                Input::StdinClosed
            }
            Frame::Data(Channel::Resize, bytes) => match parse_size(&bytes) {
                Some(size) => Input::Resize(size),
                None => continue,
            },
            _ => continue,
        };
        if input.send(item).await.is_err() {
            return;
        }
    }
}

/// A size that does not parse is passed over, as upstream does.
fn parse_size(bytes: &Bytes) -> Option<TerminalSize> {
    serde_json::from_slice(bytes).ok()
}

/// From output to frames. Ends after the status, or when the connection is gone.
async fn collect(mut output: mpsc::Receiver<Output>, outbound: mpsc::Sender<Frame>) {
    loop {
        let item = tokio::select! {
            item = output.recv() => item,
            () = outbound.closed() => return,
        };
        let (frames, last): (Vec<Frame>, bool) = match item {
            Some(Output::Stdout(bytes)) => (vec![Frame::Data(Channel::Stdout, bytes)], false),
            Some(Output::Stderr(bytes)) => (vec![Frame::Data(Channel::Stderr, bytes)], false),
            Some(Output::Status(status)) => (
                vec![
                    Frame::Close(Channel::Stdout),
                    Frame::Close(Channel::Stderr),
                    Frame::Data(Channel::Error, status.to_json().into()),
                    Frame::Close(Channel::Error),
                ],
                true,
            ),
            None => (Vec::new(), true),
        };
        for frame in frames {
            if outbound.send(frame).await.is_err() {
                return;
            }
        }
        if last {
            return;
        }
    }
}
