//! A client of HTTP/1.1 over TLS: one connection that is kept, streams on connections of their own, and every byte of an answer.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// How long an answer may take; far more than any does, for a machine may be busy with other things.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stream is listened to after the last event that was waited for: one that should not be there would come then.
const QUIET: Duration = Duration::from_millis(150);

/// A request, as data.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    /// The method.
    pub method: &'a str,
    /// Path and query, sent as they stand.
    pub path: &'a str,
    /// Further headers, `Name: value`.
    pub headers: Vec<String>,
    /// The body.
    pub body: Vec<u8>,
    /// For a watch that does not end by itself: after how many events the client has heard enough.
    pub events: Option<usize>,
}

/// An answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Names (in lower case) and values of the headers, in their order.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The values of a header, whose name is given in lower case.
    pub fn values(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
    }
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A client of one server.
pub struct Client {
    address: SocketAddr,
    config: Arc<ClientConfig>,
    kept: Option<Stream>,
}

impl Client {
    /// A client with the key and certificate `client` in `keys`, of a server whose authority is `ca.crt` there.
    pub fn new(address: SocketAddr, keys: &Path) -> Result<Client> {
        let read = |name: &str| fs::read(keys.join(name)).with_context(|| format!("failed to read {name}"));
        let certificates = |name: &str| -> Result<Vec<CertificateDer<'static>>> {
            CertificateDer::pem_slice_iter(&read(name)?).collect::<Result<_, _>>().with_context(|| format!("failed to parse {name}"))
        };
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates("ca.crt")?);
        let key = PrivateKeyDer::from_pem_slice(&read("client.key")?).context("failed to parse client.key")?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = builder.with_root_certificates(roots).with_client_auth_cert(certificates("client.crt")?, key)?;
        Ok(Client { address, config: Arc::new(config), kept: None })
    }

    fn connect(&self) -> Result<Stream> {
        let socket = TcpStream::connect_timeout(&self.address, TIMEOUT).context("failed to connect")?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        Ok(StreamOwned::new(ClientConnection::new(self.config.clone(), ServerName::IpAddress(self.address.ip().into()))?, socket))
    }

    /// Asks. An error means that no answer came, so what became of a write is not known.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        let act = || format!("{} {}", request.method, request.path);
        if let Some(mut stream) = self.kept.take()
            && request.events.is_none()
        {
            // A server may end an idle connection at any time; then not a byte of an answer comes.
            match send(&mut stream, request).and_then(|()| Reader::new(&mut stream).head(request.method)) {
                Ok((answer, body, rest)) => return self.finish(stream, request, answer, body, rest).with_context(act),
                Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut) => {
                    return Err(error).with_context(act);
                }
                Err(_) => {}
            }
        }
        let mut stream = self.connect().with_context(act)?;
        send(&mut stream, request).with_context(act)?;
        let (answer, body, rest) = Reader::new(&mut stream).head(request.method).with_context(act)?;
        self.finish(stream, request, answer, body, rest).with_context(act)
    }

    fn finish(&mut self, mut stream: Stream, request: &Request, mut answer: Answer, body: Framing, rest: Vec<u8>) -> Result<Answer> {
        let close = answer.values("connection").contains(&"close") || body == Framing::Close;
        let mut reader = Reader { stream: &mut stream, buffer: rest, deadline: Instant::now() + TIMEOUT };
        match body {
            Framing::Length(length) => answer.body = reader.take(length)?,
            Framing::Close => reader.read_rest(&mut answer.body)?,
            Framing::Chunked => {
                if !reader.chunks(&mut answer.body, request.events)? {
                    return Ok(answer);
                }
            }
        }
        if !close && request.events.is_none() {
            self.kept = Some(stream);
        }
        Ok(answer)
    }
}

fn send(stream: &mut Stream, request: &Request) -> Result<()> {
    let mut head = format!("{} {} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: e2e\r\n", request.method, request.path);
    for header in &request.headers {
        head += &format!("{header}\r\n");
    }
    if !request.body.is_empty() || request.method != "GET" {
        head += &format!("Content-Length: {}\r\n", request.body.len());
    }
    head += "\r\n";
    let mut bytes = head.into_bytes();
    bytes.extend(&request.body);
    stream.write_all(&bytes).and_then(|()| stream.flush()).context("failed to send")
}

/// Where an answer's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
    Close,
}

struct Reader<'a> {
    stream: &'a mut Stream,
    buffer: Vec<u8>,
    deadline: Instant,
}

impl<'a> Reader<'a> {
    fn new(stream: &'a mut Stream) -> Reader<'a> {
        Reader { stream, buffer: Vec::new(), deadline: Instant::now() + TIMEOUT }
    }

    /// Reads more into the buffer; `false` at the end, or when `wait` is over.
    fn more(&mut self, wait: Option<Duration>) -> Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = wait.unwrap_or(left).max(Duration::from_millis(1));
        self.stream.sock.set_read_timeout(Some(left)).context("failed to set a timeout")?;
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.buffer.extend(&bytes[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => match wait {
                Some(_) => Ok(false),
                None => Err(io::Error::from(io::ErrorKind::TimedOut)).with_context(|| format!("no end within {TIMEOUT:?}")),
            },
            Err(error) => Err(error).context("failed to read the answer"),
        }
    }

    fn until(&mut self, mark: &[u8]) -> Result<Vec<u8>> {
        loop {
            if let Some(at) = self.buffer.windows(mark.len()).position(|window| window == mark) {
                let taken = self.buffer.drain(..at + mark.len()).collect::<Vec<u8>>();
                return Ok(taken[..at].to_vec());
            }
            if !self.more(None)? {
                bail!("the connection ended within the answer");
            }
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < length {
            if !self.more(None)? {
                bail!("the connection ended within the answer");
            }
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn read_rest(&mut self, body: &mut Vec<u8>) -> Result<()> {
        while self.more(None)? {}
        body.append(&mut self.buffer);
        Ok(())
    }

    /// Status and headers, how the body ends, and what of it has come already.
    fn head(mut self, method: &str) -> Result<(Answer, Framing, Vec<u8>)> {
        loop {
            let head = String::from_utf8_lossy(&self.until(b"\r\n\r\n")?).into_owned();
            let status: u16 = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).context("the answer has no status")?;
            if status == 100 {
                continue;
            }
            let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
            let headers = fields.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
            let answer = Answer { status, headers, body: Vec::new() };
            let length = answer.values("content-length").first().and_then(|length| length.parse().ok());
            let framing = match length {
                _ if method == "HEAD" || status == 204 || status == 304 => Framing::Length(0),
                _ if answer.values("transfer-encoding").contains(&"chunked") => Framing::Chunked,
                Some(length) => Framing::Length(length),
                None => Framing::Close,
            };
            return Ok((answer, framing, self.buffer));
        }
    }

    /// Reads a chunked body to its end (`true`), or until so many events (lines or frames, each of them ends a chunk) are there and
    /// no further one comes.
    fn chunks(&mut self, body: &mut Vec<u8>, events: Option<usize>) -> Result<bool> {
        loop {
            let enough = events.is_some_and(|events| count(body) >= events);
            if enough && !self.buffer.windows(2).any(|window| window == b"\r\n") && !self.more(Some(QUIET))? {
                return Ok(false);
            }
            let size = String::from_utf8_lossy(&self.until(b"\r\n")?).trim().to_owned();
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default(), 16).context("a chunk has no size")?;
            let chunk = self.take(size)?;
            self.until(b"\r\n")?;
            if size == 0 {
                return Ok(true);
            }
            body.extend(chunk);
        }
    }
}

/// How many whole events a watch has brought: lines of JSON, or frames with their length before them.
fn count(body: &[u8]) -> usize {
    if body.first().is_none_or(|first| *first == b'{') {
        return body.iter().filter(|byte| **byte == b'\n').count();
    }
    frames(body).len()
}

/// The frames of a watch in protobuf: a length of four bytes before each.
pub fn frames(mut body: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    while let Some((length, rest)) = body.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((frame, rest)) = rest.split_at_checked(length) else { break };
        frames.push(frame);
        body = rest;
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_in_both_forms() {
        assert_eq!(count(b"{\"type\":\"ADDED\"}\n{\"type\":"), 1);
        assert_eq!(count(b"\0\0\0\x02ab\0\0\0\x01c\0\0"), 2);
        assert_eq!(count(b""), 0);
    }
}
