//! How long a client may take to send a request's head, and to begin another one: hyper knows one time for both.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::{Sleep, Timer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How long a head may take from its first byte, and the first one from the connection's begin (upstream's `ReadHeaderTimeout`).
pub const HEAD: Duration = Duration::from_secs(32);
/// How long a connection may wait for its next request: longer than clients keep idle ones (Go and hyper: 90 s), so that none sends a
/// request into a connection that is just being closed.
pub const IDLE: Duration = Duration::from_secs(120);
/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE_BYTES: u64 = 24;

/// A connection whose incoming bytes are counted.
#[derive(Debug)]
pub struct Counted<S> {
    stream: S,
    bytes: Arc<AtomicU64>,
}

impl<S> Counted<S> {
    /// Counts what comes from now on.
    pub fn new(stream: S) -> Self {
        Self { stream, bytes: Arc::default() }
    }

    /// The timer for hyper's HTTP/1 connection over this stream; its `header_read_timeout` has to be set for the timer to be asked, and
    /// its value means nothing.
    pub fn timer(&self) -> HeadTimer {
        HeadTimer(self.bytes.clone())
    }

    /// Ends when the client of an HTTP/2 connection has not sent its preface in time, else never.
    pub fn preface_is_late(&self) -> impl Future<Output = ()> + use<S> {
        let bytes = self.bytes.clone();
        async move {
            tokio::time::sleep(HEAD).await;
            if bytes.load(Ordering::Relaxed) >= PREFACE_BYTES {
                std::future::pending().await
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.bytes.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }
}

/// Tells hyper when a client has been too slow.
#[derive(Clone, Debug)]
pub struct HeadTimer(Arc<AtomicU64>);

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        let before = self.0.load(Ordering::Relaxed);
        let has_begun = before == 0;
        let sleep = Box::pin(tokio::time::sleep(if has_begun { HEAD } else { IDLE }));
        Box::pin(HeadSleep { bytes: self.0.clone(), before, has_begun, sleep })
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn Sleep>> {
        self.sleep(IDLE)
    }
}

/// hyper makes one when it begins to wait for a head, polls it whenever bytes came that do not end the head, and drops it at its end.
#[derive(Debug)]
struct HeadSleep {
    bytes: Arc<AtomicU64>,
    /// Their number when the wait began.
    before: u64,
    has_begun: bool,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.has_begun && self.bytes.load(Ordering::Relaxed) != self.before {
            self.has_begun = true;
            self.sleep.as_mut().reset(tokio::time::Instant::now() + HEAD);
        }
        self.sleep.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    /// The client's end of a connection that is served, and the server's task.
    fn connection() -> (DuplexStream, Counted<DuplexStream>) {
        let (client, server) = tokio::io::duplex(4096);
        (client, Counted::new(server))
    }

    /// Reads the counted end until hyper's part would have the head's end, or gives up when the timer says so.
    async fn head(stream: &mut Counted<DuplexStream>) -> bool {
        let mut sleep = stream.timer().sleep(IDLE);
        let mut bytes = [0; 64];
        let mut seen = Vec::new();
        loop {
            tokio::select! {
                biased;
                read = stream.read(&mut bytes) => seen.extend_from_slice(&bytes[..read.expect("a read")]),
                () = &mut sleep => return false,
            }
            if seen.ends_with(b"\r\n\r\n") {
                return true;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_head_has_its_time_from_the_begin() {
        let (client, mut stream) = connection();
        let begun = tokio::time::Instant::now();
        assert!(!head(&mut stream).await);
        assert_eq!(begun.elapsed().as_secs(), HEAD.as_secs());
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_head_may_be_waited_for_but_not_trickle() {
        let (mut client, mut stream) = connection();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("written");
        assert!(head(&mut stream).await);
        let begun = tokio::time::Instant::now();
        let trickle = async {
            tokio::time::sleep(Duration::from_secs(100)).await;
            for _ in 0..20 {
                client.write_all(b"X").await.expect("written");
                tokio::time::sleep(Duration::from_secs(10)).await;
            }
        };
        tokio::select! {
            finished = head(&mut stream) => assert!(!finished),
            () = trickle => panic!("it was waited for"),
        }
        assert_eq!(begun.elapsed().as_secs(), 100 + HEAD.as_secs());
        let begun = tokio::time::Instant::now();
        assert!(!head(&mut stream).await);
        assert_eq!(begun.elapsed().as_secs(), IDLE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_preface_has_its_time() {
        let (mut client, mut stream) = connection();
        client.write_all(b"PRI * HTTP/2.0\r\n").await.expect("written");
        let mut bytes = [0; 64];
        let _ = stream.read(&mut bytes).await.expect("a read");
        stream.preface_is_late().await;
        client.write_all(b"\r\nSM\r\n\r\n").await.expect("written");
        let _ = stream.read(&mut bytes).await.expect("a read");
        assert!(tokio::time::timeout(IDLE, stream.preface_is_late()).await.is_err());
    }
}
