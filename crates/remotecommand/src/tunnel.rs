//! SPDY/3.1 inside a WebSocket, as kubectl forwards ports: the messages' payloads, one after the other, are the SPDY connection
//! (kubernetes `k8s.io/apiserver/pkg/util/proxy/streamtunnel.go`, `client-go/tools/portforward`, v0.37).

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message, Utf8Bytes};

use crate::negotiate::{STREAM_PROTOCOL_VERSION, tokens};
use crate::{CHUNK_BYTES_MAX, FRAME_BYTES_MAX, NegotiateError, StreamError};

/// What a WebSocket subprotocol begins with whose messages carry SPDY/3.1.
const PREFIX: &str = "SPDY/3.1+";

/// A client's wish to speak SPDY/3.1 inside a WebSocket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    protocols: Vec<String>,
    key: String,
}

impl Tunnel {
    /// Reads it from an upgrade request's headers; `None` where the client wants something else.
    ///
    /// # Errors
    /// The WebSocket handshake is broken.
    pub fn asked(headers: &HeaderMap) -> Result<Option<Tunnel>, NegotiateError> {
        let protocols = tokens(headers, &SEC_WEBSOCKET_PROTOCOL).filter_map(|token| token.strip_prefix(PREFIX));
        let protocols: Vec<String> = protocols.filter(|protocol| protocol.ends_with(".k8s.io")).map(str::to_owned).collect();
        if protocols.is_empty() || headers.get(UPGRADE).is_none_or(|target| !target.as_bytes().eq_ignore_ascii_case(b"websocket")) {
            return Ok(None);
        }
        if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return Err(NegotiateError::BadHandshake("Sec-WebSocket-Version"));
        }
        let key = headers.get(SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok());
        let key = key.ok_or(NegotiateError::BadHandshake("Sec-WebSocket-Key"))?.to_owned();
        Ok(Some(Tunnel { protocols, key }))
    }

    /// The headers that ask the server behind for the same protocols over plain SPDY/3.1, by POST.
    pub fn request_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
        for protocol in self.protocols.iter().filter_map(|protocol| HeaderValue::from_str(protocol).ok()) {
            headers.append(STREAM_PROTOCOL_VERSION, protocol);
        }
        headers
    }

    /// The headers of the 101 answer to the client, once the server behind has answered 101 with `answer`.
    ///
    /// # Errors
    /// That server switched to something else.
    pub fn response_headers(&self, answer: &HeaderMap) -> Result<HeaderMap, StreamError> {
        let text = |name: &http::HeaderName| answer.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !text(&UPGRADE).eq_ignore_ascii_case("SPDY/3.1") {
            return Err(StreamError::Refused(format!("server agreed to upgrade {:?}, wanted SPDY/3.1", text(&UPGRADE))));
        }
        let agreed = text(&STREAM_PROTOCOL_VERSION);
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        let accept = HeaderValue::from_str(&derive_accept_key(self.key.as_bytes()));
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept.map_err(|_| StreamError::Refused("no accept key".to_owned()))?);
        if self.protocols.iter().any(|protocol| protocol == agreed)
            && let Ok(protocol) = HeaderValue::from_str(&format!("{PREFIX}{agreed}"))
        {
            headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        Ok(headers)
    }
}

/// Copies between a client's WebSocket and the SPDY connection behind it until either ends.
///
/// # Errors
/// Either connection failed.
pub async fn tunnel<W, S>(websocket: W, spdy: S) -> Result<(), StreamError>
where
    W: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
    let (mut sink, mut stream) = WebSocketStream::from_raw_socket(websocket, Role::Server, Some(config)).await.split();
    let (mut reader, mut writer) = tokio::io::split(spdy);
    let failed = |source| StreamError::WebSocket(Box::new(source));
    let inward = async {
        while let Some(message) = stream.next().await {
            let payload = match message {
                Ok(Message::Binary(payload)) => payload,
                Ok(Message::Close(_)) | Err(WsError::ConnectionClosed | WsError::AlreadyClosed | WsError::Protocol(_)) => break,
                Ok(Message::Text(_)) => {
                    return Err(StreamError::Protocol { protocol: "WebSocket", detail: "a text message in a tunnel".to_owned() });
                }
                Ok(_) => continue,
                Err(source) => return Err(failed(source)),
            };
            writer.write_all(&payload).await.map_err(|source| StreamError::Io { act: "write", source })?;
        }
        Ok(())
    };
    let outward = async {
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        loop {
            let count = reader.read(&mut buffer).await.map_err(|source| StreamError::Io { act: "read", source })?;
            if count == 0 {
                break;
            }
            sink.send(Message::Binary(Bytes::copy_from_slice(&buffer[..count]))).await.map_err(failed)?;
        }
        let end = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() };
        // The client may have gone first.
        let _ = sink.send(Message::Close(Some(end))).await;
        Ok(())
    };
    tokio::select! {
        result = inward => result,
        result = outward => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kubectl 1.32 and 1.37 send.
    fn kubectls() -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (CONNECTION, "Upgrade"),
            (UPGRADE, "websocket"),
            (SEC_WEBSOCKET_VERSION, "13"),
            (SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
            (SEC_WEBSOCKET_PROTOCOL, "SPDY/3.1+portforward.k8s.io"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn the_handshake_is_made_anew_on_either_side() {
        let tunnel = Tunnel::asked(&kubectls()).unwrap().unwrap();
        let behind = tunnel.request_headers();
        assert_eq!(
            (&behind[UPGRADE], &behind[STREAM_PROTOCOL_VERSION]),
            (&"SPDY/3.1".parse().unwrap(), &"portforward.k8s.io".parse().unwrap())
        );
        let answer = tunnel.response_headers(&behind).unwrap();
        assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], "SPDY/3.1+portforward.k8s.io");
        assert_eq!(answer[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(matches!(tunnel.response_headers(&kubectls()), Err(StreamError::Refused(_))));
    }

    #[test]
    fn what_is_no_tunnel_is_left_alone() {
        let mut headers = kubectls();
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("v5.channel.k8s.io"));
        assert_eq!(Tunnel::asked(&headers), Ok(None));
        let mut headers = kubectls();
        headers.remove(SEC_WEBSOCKET_KEY);
        assert_eq!(Tunnel::asked(&headers), Err(NegotiateError::BadHandshake("Sec-WebSocket-Key")));
    }
}
