//! Exec and attach streams: WebSocket (v4, v5) and SPDY/3.1, server and client; the server of forwarded ports.
//!
//! A remote command is up to five channels over one upgraded HTTP/1.1 connection: stdin, stdout, stderr, a
//! channel of terminal sizes, and an error channel that carries one [`Status`] at the end. Two framings carry
//! them (kubernetes `k8s.io/streaming`, v0.37):
//!
//! - **WebSocket**, subprotocol `v5.channel.k8s.io` or `v4.channel.k8s.io`: binary messages whose first byte is the
//!   channel; v5 adds a message that closes one channel, so that stdin can end.
//! - **SPDY/3.1**, `X-Stream-Protocol-Version: v4.channel.k8s.io`: a SPDY stream per channel, named by its
//!   `streamtype` header.
//!
//! Both become the same pair of bounded queues: [`Input`] goes from client to server, [`Output`] from server to client, and a
//! driver future, which its owner polls until the connection has ended. Nothing buffers more than [`QUEUE_CHUNKS_MAX`]
//! chunks a direction: a reader that stalls stalls its peer, not this process. Whoever stands in the middle (a kubelet whose
//! runtime speaks another framing) joins a server session and a client session queue by queue.
//!
//! ```text
//! request headers --negotiate--> Upgrade { protocol, response headers }
//! upgraded io --------server::accept--> (ServerSession, driver)
//! connected io -------client::attach--> (ClientSession, driver)
//! ```
//!
//! Port forwarding is a protocol of its own over SPDY/3.1, which [`serve_port_forward`] serves, and which newer clients carry inside
//! a WebSocket: [`Tunnel`] unwraps that.
//!
//! **Invariant**: no process is started and no file is opened here. Who calls wires the queues to a process.

#![forbid(unsafe_code)]

mod client;
mod negotiate;
mod portforward;
mod server;
mod spdy;
mod status;
mod tunnel;
mod websocket;

pub use client::{ClientSession, agreed, attach, request_headers};
pub use negotiate::{NegotiateError, Protocol, Upgrade, negotiate};
pub use portforward::{negotiate_port_forward, serve_port_forward};
pub use server::{ServerSession, accept};
pub use status::Status;
pub use tunnel::{Tunnel, tunnel};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// Chunks that wait in any queue between a connection and a session, at most. A chunk is at most
/// [`CHUNK_BYTES_MAX`] when this side made it.
pub const QUEUE_CHUNKS_MAX: usize = 16;

/// The largest chunk that is sent in one frame, in bytes.
pub const CHUNK_BYTES_MAX: usize = 32 * 1024;

/// The largest frame that is taken from a peer, in bytes. client-go sends at most 32 KiB; `kubectl cp` likewise.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Which channels a remote command has (`stdin`, `stdout`, `stderr`, `tty` of the CRI and kubelet requests).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Channels {
    /// The client sends standard input.
    pub stdin: bool,
    /// The server sends standard output.
    pub stdout: bool,
    /// The server sends standard error; never together with `tty`.
    pub stderr: bool,
    /// The command has a terminal: the client sends its sizes.
    pub tty: bool,
}

/// A terminal's size in character cells, as the resize channel carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width")]
    pub width: u16,
    /// Rows.
    #[serde(rename = "Height")]
    pub height: u16,
}

/// A channel of the session, with its number in the WebSocket protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Error = 3,
    Resize = 4,
}

impl Channel {
    pub(crate) const ALL: [Channel; 5] = [Channel::Stdin, Channel::Stdout, Channel::Stderr, Channel::Error, Channel::Resize];

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The value of the `streamtype` header in SPDY.
    pub(crate) fn stream_type(self) -> &'static str {
        match self {
            Channel::Stdin => "stdin",
            Channel::Stdout => "stdout",
            Channel::Stderr => "stderr",
            Channel::Error => "error",
            Channel::Resize => "resize",
        }
    }
}

/// What a client sends to a remote command.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// Bytes for standard input.
    Stdin(Bytes),
    /// Standard input ends.
    StdinClosed,
    /// The terminal has this size now.
    Resize(TerminalSize),
}

/// What a remote command sends to its client.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Bytes of standard output.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// How it ended: the last message of a session.
    Status(Status),
}

/// One step on a channel, in either direction, independent of the framing.
#[derive(Debug)]
pub(crate) enum Frame {
    /// Bytes of a channel.
    Data(Channel, Bytes),
    /// Nothing more comes on this channel.
    Close(Channel),
}

/// Which end of the connection this side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Why a streaming connection failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The transport failed.
    #[error("failed to {act} the streaming connection")]
    Io {
        /// `read` or `write`.
        act: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The WebSocket layer failed.
    #[error("websocket connection failed")]
    WebSocket(#[source] Box<tokio_tungstenite::tungstenite::Error>),
    /// The peer broke the framing's rules.
    #[error("peer broke the {protocol} protocol: {detail}")]
    Protocol {
        /// `SPDY/3.1` or `WebSocket`.
        protocol: &'static str,
        /// What it did.
        detail: String,
    },
    /// The peer answered the upgrade request with something else.
    #[error("upgrade refused: {0}")]
    Refused(String),
    /// The peer did not open all its streams in time.
    #[error("peer did not open the {missing} stream within {seconds} s")]
    StreamsMissing {
        /// The first stream that is missing.
        missing: &'static str,
        /// How long it had.
        seconds: u64,
    },
}

/// Runs a connection in its framing until it has ended: what the peer sends goes to `inbound`, what `outbound` yields goes to
/// the peer; when `outbound` ends the connection is closed in order.
pub(crate) async fn run<T>(
    io: T,
    protocol: Protocol,
    role: Role,
    channels: Channels,
    inbound: mpsc::Sender<Frame>,
    outbound: mpsc::Receiver<Frame>,
) -> Result<(), StreamError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send,
{
    match protocol {
        Protocol::SpdyV4 => spdy::run(io, role, channels, inbound, outbound).await,
        Protocol::WebSocketV5 => websocket::run(io, role, true, inbound, outbound).await,
        Protocol::WebSocketV4 => websocket::run(io, role, false, inbound, outbound).await,
    }
}

/// How long a peer has to close its half after this side has closed its own, in seconds. What it still sends is dropped; an
/// abrupt close would make the kernel drop what it has not read yet.
pub(crate) const LINGER_SECONDS: u64 = 5;
