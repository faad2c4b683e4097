//! From the headers of an upgrade request to the protocol that both sides speak.

use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The header in which SPDY peers agree on the version of the remote command protocol.
pub(crate) const STREAM_PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");

pub(crate) const V5: &str = "v5.channel.k8s.io";
pub(crate) const V4: &str = "v4.channel.k8s.io";

/// A framing with its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// WebSocket, `v5.channel.k8s.io`: channels can be closed one by one.
    WebSocketV5,
    /// WebSocket, `v4.channel.k8s.io`: stdin ends only with the connection.
    WebSocketV4,
    /// SPDY/3.1, `v4.channel.k8s.io`.
    SpdyV4,
}

/// What to answer to an upgrade request: status 101 with these headers.
#[derive(Debug)]
pub struct Upgrade {
    /// What both sides speak afterwards.
    pub protocol: Protocol,
    /// The headers of the 101 response.
    pub response_headers: HeaderMap,
}

/// Why a request cannot be upgraded. Each says which header is at fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NegotiateError {
    /// No upgrade was asked for (upstream answers 400).
    #[error("unable to upgrade: missing upgrade headers in request")]
    NoUpgrade,
    /// An upgrade to something else.
    #[error("unable to upgrade: header Upgrade asks for {0:?}, wanted SPDY/3.1 or websocket")]
    UnknownUpgrade(String),
    /// No common version (upstream answers 403).
    #[error("unable to upgrade: unable to negotiate protocol: client supports [{client}], server accepts [{server}]")]
    NoCommonVersion {
        /// What the client offered.
        client: String,
        /// What this side speaks.
        server: String,
    },
    /// The WebSocket handshake is broken.
    #[error("unable to upgrade: header {0} is missing or wrong")]
    BadHandshake(&'static str),
}

/// Chooses the protocol for a request with these headers; nothing is sent.
pub fn negotiate(headers: &HeaderMap) -> Result<Upgrade, NegotiateError> {
    let target = upgrade_target(headers)?;
    if target.eq_ignore_ascii_case("websocket") {
        websocket(headers)
    } else if target.eq_ignore_ascii_case("spdy/3.1") {
        spdy(headers)
    } else {
        Err(NegotiateError::UnknownUpgrade(target.to_owned()))
    }
}

/// What a request asks to upgrade to.
fn upgrade_target(headers: &HeaderMap) -> Result<&str, NegotiateError> {
    let asks_upgrade = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).and_then(|value| value.to_str().ok()).filter(|_| asks_upgrade).ok_or(NegotiateError::NoUpgrade)
}

fn websocket(headers: &HeaderMap) -> Result<Upgrade, NegotiateError> {
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err(NegotiateError::BadHandshake("Sec-WebSocket-Version"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or(NegotiateError::BadHandshake("Sec-WebSocket-Key"))?;
    let (protocol, version) = choose(headers, &SEC_WEBSOCKET_PROTOCOL, &[(V5, Protocol::WebSocketV5), (V4, Protocol::WebSocketV4)])?;
    let mut response_headers = upgrade_headers("websocket");
    let accept =
        HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(|_| NegotiateError::BadHandshake("Sec-WebSocket-Key"))?;
    response_headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    response_headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(version));
    Ok(Upgrade { protocol, response_headers })
}

fn spdy(headers: &HeaderMap) -> Result<Upgrade, NegotiateError> {
    let (protocol, version) = choose(headers, &STREAM_PROTOCOL_VERSION, &[(V4, Protocol::SpdyV4)])?;
    Ok(Upgrade { protocol, response_headers: spdy_headers(version) })
}

fn spdy_headers(version: &'static str) -> HeaderMap {
    let mut response_headers = upgrade_headers("SPDY/3.1");
    response_headers.insert(STREAM_PROTOCOL_VERSION, HeaderValue::from_static(version));
    response_headers
}

/// The headers of the 101 answer, where only this version of a protocol over SPDY/3.1 is spoken.
pub(crate) fn negotiate_spdy(headers: &HeaderMap, version: &'static str) -> Result<HeaderMap, NegotiateError> {
    let target = upgrade_target(headers)?;
    if !target.eq_ignore_ascii_case("spdy/3.1") {
        return Err(NegotiateError::UnknownUpgrade(target.to_owned()));
    }
    let ((), version) = choose(headers, &STREAM_PROTOCOL_VERSION, &[(version, ())])?;
    Ok(spdy_headers(version))
}

/// The client's first offer that this side speaks.
fn choose<P: Copy>(headers: &HeaderMap, name: &HeaderName, spoken: &[(&'static str, P)]) -> Result<(P, &'static str), NegotiateError> {
    for offer in tokens(headers, name) {
        if let Some((version, protocol)) = spoken.iter().find(|(version, _)| *version == offer) {
            return Ok((*protocol, version));
        }
    }
    Err(NegotiateError::NoCommonVersion {
        client: tokens(headers, name).collect::<Vec<_>>().join(" "),
        server: spoken.iter().map(|(version, _)| *version).collect::<Vec<_>>().join(" "),
    })
}

fn upgrade_headers(target: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(target));
    headers
}

pub(crate) fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn kubectl_is_given_v5() {
        let upgrade = negotiate(&headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io"),
        ]))
        .unwrap();
        assert_eq!(upgrade.protocol, Protocol::WebSocketV5);
        assert_eq!(upgrade.response_headers[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn crictl_is_given_spdy_v4() {
        let upgrade = negotiate(&headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
        ]))
        .unwrap();
        assert_eq!(upgrade.protocol, Protocol::SpdyV4);
        assert_eq!(upgrade.response_headers[STREAM_PROTOCOL_VERSION], V4);
    }

    #[test]
    fn what_cannot_be_upgraded_says_why() {
        assert_eq!(negotiate(&HeaderMap::new()).unwrap_err(), NegotiateError::NoUpgrade);
        let h2c = headers(&[("connection", "Upgrade"), ("upgrade", "h2c")]);
        assert_eq!(negotiate(&h2c).unwrap_err(), NegotiateError::UnknownUpgrade("h2c".into()));
        let old = headers(&[("connection", "Upgrade"), ("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "channel.k8s.io")]);
        assert!(matches!(negotiate(&old).unwrap_err(), NegotiateError::NoCommonVersion { .. }));
    }
}
