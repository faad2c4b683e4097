//! Port forwarding: any number of connections to a pod's ports over one SPDY/3.1 connection, `portforward.k8s.io`.
//!
//! For each connection that its user accepts a client opens two streams with the same `requestid`: `error`, which it ends at once
//! and on which the server writes why forwarding failed, and `data` (kubernetes `k8s.io/cri-streaming/pkg/streaming/portforward`,
//! v0.37). The server dials the stream's `port` and copies both ways; each side's end ends one direction.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::negotiate::{NegotiateError, negotiate_spdy};
use crate::spdy::frame::{FrameReader, FrameWriter, SpdyFrame};
use crate::{CHUNK_BYTES_MAX, QUEUE_CHUNKS_MAX, StreamError};

/// The only version of the protocol.
pub(crate) const V1: &str = "portforward.k8s.io";

/// Streams at one time, at most; more are refused.
const STREAMS_MAX: usize = 2048;

/// How long the second stream of a pair may take (`streamCreationTimeout` of upstream's streaming server).
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);

/// The headers of the 101 answer to a client that asks to forward ports over SPDY/3.1; nothing is sent.
///
/// # Errors
/// Which header is at fault.
pub fn negotiate_port_forward(headers: &HeaderMap) -> Result<HeaderMap, NegotiateError> {
    negotiate_spdy(headers, V1)
}

/// Serves an upgraded connection until the client has gone. `dial` connects to a port of the pod; its error goes to the user.
///
/// # Errors
/// The connection failed or the client broke the framing's rules.
pub async fn serve_port_forward<T, C, F>(io: T, dial: impl Fn(u16) -> F) -> Result<(), StreamError>
where
    T: AsyncRead + AsyncWrite + Unpin,
    C: AsyncRead + AsyncWrite,
    F: Future<Output = Result<C, String>>,
{
    let (read_half, write_half) = tokio::io::split(io);
    let (out, outgoing) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let (pairs_tx, pairs) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let streams = Streams::default();
    let reader = Reader { frames: FrameReader::new(read_half), streams: &streams, out: out.clone(), pairs: pairs_tx, waiting: Vec::new() };
    let forwarding = forward_all(pairs, &streams, &out, dial);
    // The connection ends with its reader; what was being forwarded ends with it.
    tokio::select! {
        result = reader.run() => result,
        result = write(FrameWriter::new(write_half), outgoing) => result,
        () = forwarding => Ok(()),
    }
}

/// What goes to the client.
enum Outgoing {
    /// The stream is accepted.
    Accept(u32),
    /// The stream is refused.
    Refuse(u32),
    /// The stream is broken off.
    Reset(u32),
    /// A ping's echo.
    Pong(u32),
    /// Bytes of a stream, and whether they are its last.
    Data(u32, Bytes, bool),
}

async fn write<W: AsyncWrite + Unpin>(mut frames: FrameWriter<W>, mut outgoing: mpsc::Receiver<Outgoing>) -> Result<(), StreamError> {
    while let Some(item) = outgoing.recv().await {
        match item {
            Outgoing::Accept(id) => frames.syn_reply(id).await?,
            Outgoing::Refuse(id) => frames.refuse(id).await?,
            Outgoing::Reset(id) => frames.reset(id).await?,
            Outgoing::Pong(id) => frames.ping(id).await?,
            Outgoing::Data(id, bytes, fin) => frames.data(id, &bytes, fin).await?,
        }
    }
    Ok(())
}

/// The client's open streams: where the bytes of each go. An `error` stream takes none.
#[derive(Default)]
struct Streams(Mutex<HashMap<u32, Option<mpsc::Sender<Bytes>>>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Option<mpsc::Sender<Bytes>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to be forwarded.
struct Pair {
    port: u16,
    error: u32,
    data: u32,
    from_client: mpsc::Receiver<Bytes>,
}

/// A pair of which only one stream is there.
struct Half {
    request: String,
    since: Instant,
    error: Option<u32>,
    data: Option<(u32, u16, mpsc::Receiver<Bytes>)>,
}

struct Reader<'a, R> {
    frames: FrameReader<R>,
    streams: &'a Streams,
    out: mpsc::Sender<Outgoing>,
    pairs: mpsc::Sender<Pair>,
    waiting: Vec<Half>,
}

impl<R: AsyncRead + Unpin> Reader<'_, R> {
    async fn run(mut self) -> Result<(), StreamError> {
        while let Some(frame) = self.frames.next().await? {
            match frame {
                SpdyFrame::SynStream { id, fin, headers } => {
                    self.opened(id, &headers).await;
                    if fin {
                        self.ended(id);
                    }
                }
                SpdyFrame::Data { id, fin, bytes } => {
                    let queue = self.streams.lock().get(&id).cloned().flatten();
                    if let Some(queue) = queue.filter(|_| !bytes.is_empty()) {
                        // Whoever does not take it any more has closed the connection to the pod.
                        let _ = queue.send(bytes).await;
                    }
                    if fin {
                        self.ended(id);
                    }
                }
                SpdyFrame::Reset { id } => self.ended(id),
                SpdyFrame::Ping { id } => self.send(Outgoing::Pong(id)).await,
                SpdyFrame::GoAway => return Ok(()),
                SpdyFrame::Other => {}
            }
        }
        Ok(())
    }

    /// The client sends no more on a stream: its queue ends after what is in it.
    fn ended(&self, id: u32) {
        if let Some(queue) = self.streams.lock().get_mut(&id) {
            *queue = None;
        }
    }

    async fn send(&mut self, item: Outgoing) {
        // The writer being gone means that the connection is ending.
        let _ = self.out.send(item).await;
    }

    async fn opened(&mut self, id: u32, headers: &[(String, String)]) {
        self.expire(Instant::now()).await;
        let value = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let port = value("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port != 0);
        let is_error = match value("streamtype") {
            Some("error") => true,
            Some("data") => false,
            _ => return self.send(Outgoing::Refuse(id)).await,
        };
        let full = self.streams.lock().len() >= STREAMS_MAX;
        let Some(port) = port.filter(|_| !full) else { return self.send(Outgoing::Refuse(id)).await };
        // Clients of long ago name no request: their streams come one after the other, the error stream first.
        let first = if is_error { id } else { id.saturating_sub(2) };
        let request = value("requestid").filter(|request| !request.is_empty()).map_or_else(|| first.to_string(), str::to_owned);
        let at = self.waiting.iter().position(|half| half.request == request);
        let mut half =
            at.map(|at| self.waiting.swap_remove(at)).unwrap_or(Half { request, since: Instant::now(), error: None, data: None });
        if (is_error && half.error.is_some()) || (!is_error && half.data.is_some()) {
            self.waiting.push(half);
            return self.send(Outgoing::Refuse(id)).await;
        }
        if is_error {
            half.error = Some(id);
            self.streams.lock().insert(id, None);
        } else {
            let (queue, from_client) = mpsc::channel(QUEUE_CHUNKS_MAX);
            half.data = Some((id, port, from_client));
            self.streams.lock().insert(id, Some(queue));
        }
        self.send(Outgoing::Accept(id)).await;
        match half {
            Half { error: Some(error), data: Some((data, port, from_client)), .. } => {
                let _ = self.pairs.send(Pair { port, error, data, from_client }).await;
            }
            half => self.waiting.push(half),
        }
    }

    /// Breaks off streams whose other half has not come in time.
    async fn expire(&mut self, now: Instant) {
        while let Some(at) = self.waiting.iter().position(|half| now.duration_since(half.since) > PAIR_TIMEOUT) {
            let half = self.waiting.swap_remove(at);
            for id in half.error.into_iter().chain(half.data.map(|(id, ..)| id)) {
                self.streams.lock().remove(&id);
                self.send(Outgoing::Reset(id)).await;
            }
        }
    }
}

/// Forwards every pair that comes, all at one time, until the reader has gone.
async fn forward_all<C, F>(mut pairs: mpsc::Receiver<Pair>, streams: &Streams, out: &mpsc::Sender<Outgoing>, dial: impl Fn(u16) -> F)
where
    C: AsyncRead + AsyncWrite,
    F: Future<Output = Result<C, String>>,
{
    let mut running = FuturesUnordered::new();
    loop {
        tokio::select! {
            pair = pairs.recv() => match pair {
                Some(pair) => running.push(forward(pair, streams, out, &dial)),
                None => return,
            },
            Some(()) = running.next(), if !running.is_empty() => {}
        }
    }
}

async fn forward<C, F>(pair: Pair, streams: &Streams, out: &mpsc::Sender<Outgoing>, dial: impl Fn(u16) -> F)
where
    C: AsyncRead + AsyncWrite,
    F: Future<Output = Result<C, String>>,
{
    let Pair { port, error, data, from_client } = pair;
    let last = match dial(port).await {
        Ok(connection) => {
            copy(connection, from_client, data, out).await;
            [Outgoing::Data(data, Bytes::new(), true), Outgoing::Data(error, Bytes::new(), true)].into_iter().collect()
        }
        Err(why) => {
            let text = format!("error forwarding port {port} to pod: {why}");
            vec![Outgoing::Data(error, text.into(), true), Outgoing::Reset(data)]
        }
    };
    for item in last {
        // The connection may be ending.
        let _ = out.send(item).await;
    }
    for id in [error, data] {
        streams.lock().remove(&id);
    }
}

/// Copies until the pod has sent its last byte. That the client has, is passed on to the pod.
async fn copy<C>(connection: C, mut from_client: mpsc::Receiver<Bytes>, data: u32, out: &mpsc::Sender<Outgoing>)
where
    C: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = tokio::io::split(connection);
    let to_pod = async {
        while let Some(bytes) = from_client.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // It may have closed already.
        let _ = writer.shutdown().await;
    };
    let to_client = async {
        let mut buffer = vec![0; CHUNK_BYTES_MAX];
        // A connection that is reset has ended.
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            if out.send(Outgoing::Data(data, Bytes::copy_from_slice(&buffer[..count]), false)).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(to_client);
    tokio::select! {
        () = &mut to_client => {}
        () = to_pod => to_client.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, ReadHalf, WriteHalf};

    type Client = (FrameWriter<WriteHalf<DuplexStream>>, FrameReader<ReadHalf<DuplexStream>>);

    fn client(io: DuplexStream) -> Client {
        let (reader, writer) = tokio::io::split(io);
        (FrameWriter::new(writer), FrameReader::new(reader))
    }

    async fn open(client: &mut Client, first: u32, request: &str, port: &str) {
        for (id, kind) in [(first, "error"), (first + 2, "data")] {
            client.0.syn_stream(id, &[("streamtype", kind), ("port", port), ("requestid", request)]).await.unwrap();
        }
        client.0.data(first, &[], true).await.unwrap();
    }

    /// What comes on each stream until this one ends.
    async fn until_end(client: &mut Client, last: u32) -> HashMap<u32, Vec<u8>> {
        let mut seen: HashMap<u32, Vec<u8>> = HashMap::new();
        loop {
            match client.1.next().await.unwrap().expect("connection") {
                SpdyFrame::Data { id, fin, bytes } => {
                    seen.entry(id).or_default().extend_from_slice(&bytes);
                    if fin && id == last {
                        return seen;
                    }
                }
                SpdyFrame::Reset { id } if id == last => return seen,
                _ => {}
            }
        }
    }

    /// A pod whose port 7 echoes and which has no other.
    async fn dial(port: u16) -> Result<DuplexStream, String> {
        if port != 7 {
            return Err("connection refused".to_owned());
        }
        let (near, far) = tokio::io::duplex(64);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(far);
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        Ok(near)
    }

    #[tokio::test]
    async fn connections_are_forwarded_side_by_side() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let served = tokio::spawn(async move { serve_port_forward(far, dial).await });
        let mut client = client(near);
        open(&mut client, 1, "0", "7").await;
        open(&mut client, 5, "1", "7").await;
        client.0.data(3, b"first", false).await.unwrap();
        client.0.data(7, b"second", true).await.unwrap();
        let seen = until_end(&mut client, 7).await;
        assert_eq!(seen.get(&7).map(Vec::as_slice), Some(&b"second"[..]));
        client.0.data(3, b" goes on", true).await.unwrap();
        let rest = until_end(&mut client, 3).await;
        let all = [seen.get(&3).cloned().unwrap_or_default(), rest[&3].clone()].concat();
        assert_eq!(all, b"first goes on");
        drop(client);
        served.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_forwarded_says_why() {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move { serve_port_forward(far, dial).await });
        let mut client = client(near);
        open(&mut client, 1, "0", "8").await;
        let seen = until_end(&mut client, 1).await;
        let text = String::from_utf8(seen[&1].clone()).unwrap();
        assert_eq!(text, "error forwarding port 8 to pod: connection refused");
        for (id, headers) in [
            (11, [("streamtype", "data"), ("port", "0")]),
            (13, [("streamtype", "data"), ("port", "65536")]),
            (15, [("streamtype", "stdin"), ("port", "7")]),
        ] {
            client.0.syn_stream(id, &headers).await.unwrap();
            loop {
                match client.1.next().await.unwrap().expect("connection") {
                    SpdyFrame::Reset { id: refused } if refused == id => break,
                    SpdyFrame::Data { .. } | SpdyFrame::Other | SpdyFrame::Reset { id: 3 } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        // The connection still serves, also a client that names no request.
        for (id, kind) in [(21, "error"), (23, "data")] {
            client.0.syn_stream(id, &[("streamtype", kind), ("port", "7")]).await.unwrap();
        }
        client.0.data(23, b"x", true).await.unwrap();
        assert_eq!(until_end(&mut client, 23).await[&23], b"x");
    }
}
