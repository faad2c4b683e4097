//! An asynchronous ttrpc client: one connection, many calls at a time, answers in any order.
//!
//! Source: containerd/ttrpc v1.2.9, `PROTOCOL.md`; the frames are `protocols::ttrpc`'s.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use protocols::ttrpc::{self, FrameType, Header, Request, Response, RpcError, code};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Frames that may wait for the socket.
const WRITES_MAX: usize = 64;

/// A call that has no answer, or an error as its answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The other side answered with a status, which is the error's own text and no cause of it.
    #[error("{method}: {status}")]
    Rpc { method: &'static str, status: RpcError },
    /// The connection ended before the answer.
    #[error("{method}: the connection to the shim is closed")]
    Closed { method: &'static str },
    /// The time was up.
    #[error("{method}: no answer within {seconds} s")]
    Deadline { method: &'static str, seconds: u64 },
    /// The answer is not the message that it should be, or the request is too long.
    #[error("{method}: {reason}")]
    Protocol { method: &'static str, reason: String },
}

impl CallError {
    /// The gRPC code.
    pub fn code(&self) -> tonic::Code {
        match self {
            Self::Rpc { status, .. } => tonic::Code::from_i32(status.code),
            Self::Closed { .. } => tonic::Code::Unavailable,
            Self::Deadline { .. } => tonic::Code::DeadlineExceeded,
            Self::Protocol { .. } => tonic::Code::Internal,
        }
    }

    /// Whether the other side knows no such process.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Rpc { status, .. } if status.code == code::NOT_FOUND)
    }

    /// Whether the other side has no such method.
    pub fn is_unimplemented(&self) -> bool {
        matches!(self, Self::Rpc { status, .. } if status.code == code::UNIMPLEMENTED)
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }
}

type Payload = Result<Vec<u8>, RpcError>;
type Answer = oneshot::Sender<Payload>;

/// Calls that wait for an answer; `None` when the connection has ended.
type Pending = Arc<Mutex<Option<HashMap<u32, Answer>>>>;

/// A connection. Its two tasks end when it is dropped or the peer hangs up.
#[derive(Debug)]
pub struct Client {
    writes: mpsc::Sender<Vec<u8>>,
    pending: Pending,
    next_stream: Mutex<u32>,
    namespace: String,
    closed: CancellationToken,
    _end: DropGuard,
}

impl Client {
    /// Takes over a connected socket. Every request carries `namespace`.
    pub fn new(stream: UnixStream, namespace: &str) -> Self {
        let (read, write) = stream.into_split();
        let (writes, frames) = mpsc::channel(WRITES_MAX);
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let closed = CancellationToken::new();
        tokio::spawn(write_frames(write, frames, closed.clone()));
        tokio::spawn(read_frames(read, Arc::clone(&pending), closed.clone()));
        Self {
            writes,
            pending,
            next_stream: Mutex::new(1),
            namespace: namespace.to_owned(),
            closed: closed.clone(),
            _end: closed.drop_guard(),
        }
    }

    /// Ends when the connection has ended.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// One call; without a timeout it waits until the connection ends.
    ///
    /// # Errors
    /// [`CallError`]; after a deadline the call may still take effect.
    pub async fn call<Q: Message, A: Message + Default>(
        &self,
        service: &str,
        method: &'static str,
        request: &Q,
        timeout: Option<Duration>,
    ) -> Result<A, CallError> {
        let nanos = timeout.map_or(0, |timeout| i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX));
        let request = Request::unary(service, method, request).with_namespace(&self.namespace).with_timeout_nanos(nanos);
        let (stream, answer) = self.register(method)?;
        // A caller that gives up leaves no entry behind.
        let _forget = Forget { pending: &self.pending, stream };
        let mut frame = Vec::new();
        ttrpc::encode_frame(&mut frame, FrameType::Request, stream, &request)
            .map_err(|error| CallError::Protocol { method, reason: error.to_string() })?;
        let exchange = async {
            self.writes.send(frame).await.map_err(|_| CallError::Closed { method })?;
            answer.await.map_err(|_| CallError::Closed { method })
        };
        let payload = match timeout {
            None => exchange.await?,
            Some(timeout) => {
                tokio::time::timeout(timeout, exchange).await.map_err(|_| CallError::Deadline { method, seconds: timeout.as_secs() })??
            }
        };
        let payload = payload.map_err(|status| CallError::Rpc { method, status })?;
        A::decode(payload.as_slice()).map_err(|error| CallError::Protocol { method, reason: error.to_string() })
    }

    fn register(&self, method: &'static str) -> Result<(u32, oneshot::Receiver<Payload>), CallError> {
        let stream = {
            let mut next = self.next_stream.lock().unwrap_or_else(PoisonError::into_inner);
            let stream = *next;
            // Client streams are odd; after the last one the numbers begin again.
            *next = next.checked_add(2).unwrap_or(1);
            stream
        };
        let (sender, receiver) = oneshot::channel();
        match self.pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(pending) => pending.insert(stream, sender),
            None => return Err(CallError::Closed { method }),
        };
        Ok((stream, receiver))
    }
}

struct Forget<'a> {
    pending: &'a Pending,
    stream: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            pending.remove(&self.stream);
        }
    }
}

async fn write_frames(mut socket: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>, closed: CancellationToken) {
    loop {
        let frame = tokio::select! {
            () = closed.cancelled() => break,
            frame = frames.recv() => frame,
        };
        let Some(frame) = frame else { break };
        if socket.write_all(&frame).await.is_err() {
            break;
        }
    }
    closed.cancel();
}

async fn read_frames(mut socket: OwnedReadHalf, pending: Pending, closed: CancellationToken) {
    loop {
        let frame = tokio::select! {
            () = closed.cancelled() => break,
            frame = read_frame(&mut socket) => frame,
        };
        let Some((header, data)) = frame else { break };
        if header.kind != FrameType::Response as u8 {
            continue;
        }
        let answer = match Response::decode(data.as_slice()) {
            Ok(response) => response.into_result(),
            Err(error) => Err(RpcError::new(code::INTERNAL, error.to_string())),
        };
        let waiter = pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|pending| pending.remove(&header.stream));
        if let Some(waiter) = waiter {
            // The caller may have given up meanwhile.
            let _ = waiter.send(answer);
        }
    }
    // Dropping the senders ends all that wait.
    pending.lock().unwrap_or_else(PoisonError::into_inner).take();
    closed.cancel();
}

/// The next frame; `None` at the end, or when what follows cannot be one.
pub(super) async fn read_frame(socket: &mut OwnedReadHalf) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; ttrpc::HEADER_BYTES];
    socket.read_exact(&mut head).await.ok()?;
    let header = Header::decode(&head).ok()?;
    let mut data = vec![0; header.length];
    socket.read_exact(&mut data).await.ok()?;
    Some((header, data))
}

#[cfg(test)]
mod tests {
    use protocols::shim::task::v3::{WaitRequest, WaitResponse};

    use super::*;

    async fn serve(socket: UnixStream, answers: usize) {
        let (mut read, mut write) = socket.into_split();
        let mut requests = Vec::new();
        for _ in 0..answers {
            requests.push(read_frame(&mut read).await.expect("a request"));
        }
        // In reverse order: a client must not take the first answer for the first request.
        for (header, data) in requests.into_iter().rev() {
            let request = Request::decode(data.as_slice()).expect("a request");
            assert_eq!(request.metadata(ttrpc::NAMESPACE_KEY), Some("k8s.io"));
            let wait = WaitRequest::decode(request.payload.as_slice()).expect("wait");
            let answer = match wait.id.parse() {
                Ok(exit_status) => Ok(WaitResponse { exit_status, exited_at: None }.encode_to_vec()),
                Err(_) => Err(RpcError::new(code::NOT_FOUND, "no such task")),
            };
            let mut frame = Vec::new();
            ttrpc::encode_frame(&mut frame, FrameType::Response, header.stream, &Response::of(answer)).expect("short");
            write.write_all(&frame).await.expect("written");
        }
    }

    async fn wait(client: &Client, id: &str, timeout: Option<Duration>) -> Result<WaitResponse, CallError> {
        client.call("s", "Wait", &WaitRequest { id: id.to_owned(), exec_id: String::new() }, timeout).await
    }

    #[tokio::test]
    async fn answers_find_their_calls() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let client = Client::new(ours, "k8s.io");
        let (a, b, c, ()) = tokio::join!(wait(&client, "1", None), wait(&client, "2", None), wait(&client, "x", None), serve(theirs, 3));
        assert_eq!((a.expect("an answer").exit_status, b.expect("an answer").exit_status), (1, 2));
        assert!(c.expect_err("an error").is_not_found());
        client.closed().await;
        assert!(wait(&client, "3", None).await.expect_err("closed").is_closed());
    }

    #[tokio::test]
    async fn a_deadline_ends_the_wait_and_forgets_the_call() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let client = Client::new(ours, "k8s.io");
        let error = wait(&client, "1", Some(Duration::from_millis(10))).await.expect_err("no answer");
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        assert!(client.pending.lock().expect("not poisoned").as_ref().expect("open").is_empty());
    }

    #[tokio::test]
    async fn a_peer_that_talks_rubbish_ends_the_connection() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let client = Client::new(ours, "k8s.io");
        theirs.write_all(&[255; 32]).await.expect("written");
        assert!(wait(&client, "1", None).await.expect_err("closed").is_closed());
    }
}
