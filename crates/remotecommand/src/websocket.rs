//! The WebSocket framing: binary messages that open with a channel number.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role as WsRole, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message, Utf8Bytes};

use crate::{CHUNK_BYTES_MAX, Channel, FRAME_BYTES_MAX, Frame, LINGER_SECONDS, Role, StreamError};

/// The pseudo channel of v5 whose one-byte payload names the channel that ends.
const CLOSE_CHANNEL: u8 = 255;

pub(crate) async fn run<T>(
    io: T,
    role: Role,
    closes_channels: bool,
    inbound: mpsc::Sender<Frame>,
    outbound: mpsc::Receiver<Frame>,
) -> Result<(), StreamError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
    let ws_role = match role {
        Role::Client => WsRole::Client,
        Role::Server => WsRole::Server,
    };
    let (sink, stream) = WebSocketStream::from_raw_socket(io, ws_role, Some(config)).await.split();
    let mut reader = std::pin::pin!(read(stream, closes_channels, inbound));
    let mut writer = std::pin::pin!(write(sink, role, closes_channels, outbound));
    tokio::select! {
        result = &mut reader => return result,
        result = &mut writer => result?,
    }
    // All was sent: the peer reads it and closes.
    tokio::time::timeout(Duration::from_secs(LINGER_SECONDS), reader).await.unwrap_or(Ok(()))
}

async fn read(
    mut stream: impl futures::Stream<Item = Result<Message, WsError>> + Unpin,
    closes_channels: bool,
    inbound: mpsc::Sender<Frame>,
) -> Result<(), StreamError> {
    while let Some(message) = stream.next().await {
        let payload = match message {
            Ok(Message::Binary(payload)) => payload,
            Ok(Message::Text(text)) => Bytes::copy_from_slice(text.as_bytes()),
            Ok(Message::Close(_)) => return Ok(()),
            Ok(_) => continue,
            Err(WsError::ConnectionClosed | WsError::AlreadyClosed | WsError::Protocol(_)) => return Ok(()),
            Err(source) => return Err(StreamError::WebSocket(Box::new(source))),
        };
        let Some(frame) = decode(payload, closes_channels)? else { continue };
        // Nobody listens any more: what comes is read and dropped, so that pings and the close still work.
        let _ = inbound.send(frame).await;
    }
    Ok(())
}

fn decode(payload: Bytes, closes_channels: bool) -> Result<Option<Frame>, StreamError> {
    let unknown = |number: u8| StreamError::Protocol { protocol: "WebSocket", detail: format!("message on unknown channel {number}") };
    let Some(&number) = payload.first() else { return Ok(None) };
    if number == CLOSE_CHANNEL && closes_channels {
        let number = payload.get(1).copied().unwrap_or(CLOSE_CHANNEL);
        return Channel::from_number(number).map(|channel| Some(Frame::Close(channel))).ok_or_else(|| unknown(number));
    }
    let channel = Channel::from_number(number).ok_or_else(|| unknown(number))?;
    // An empty message opens the conversation and carries nothing.
    Ok((payload.len() > 1).then(|| Frame::Data(channel, payload.slice(1..))))
}

async fn write<S>(mut sink: S, role: Role, closes_channels: bool, mut outbound: mpsc::Receiver<Frame>) -> Result<(), StreamError>
where
    S: futures::Sink<Message, Error = WsError> + Unpin,
{
    let failed = |source| StreamError::WebSocket(Box::new(source));
    if role == Role::Server {
        // Tells the client that the channels are open (kubernetes `wsstream`).
        sink.send(Message::Binary(Bytes::from_static(&[Channel::Stdout as u8]))).await.map_err(failed)?;
    }
    while let Some(frame) = outbound.recv().await {
        match frame {
            Frame::Data(channel, bytes) => {
                for chunk in bytes.chunks(CHUNK_BYTES_MAX) {
                    let mut message = Vec::with_capacity(chunk.len() + 1);
                    message.push(channel as u8);
                    message.extend_from_slice(chunk);
                    sink.send(Message::Binary(message.into())).await.map_err(failed)?;
                }
            }
            Frame::Close(channel) if closes_channels && role == Role::Client => {
                sink.send(Message::Binary(vec![CLOSE_CHANNEL, channel as u8].into())).await.map_err(failed)?;
            }
            Frame::Close(_) => {}
        }
    }
    // client-go takes any other close, also one without a code, for a broken connection.
    let end = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() };
    match sink.send(Message::Close(Some(end))).await {
        Ok(()) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed) => Ok(()),
        Err(source) => Err(failed(source)),
    }
}
