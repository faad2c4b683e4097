//! An image registry on loopback: OCI distribution's pull side, with the faults that real ones have.
//!
//! One thread accepts, one thread serves a connection with one request; all end with the [`Registry`]. Every request is written down.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::image::{Blob, Image};

const TOKEN: &str = "let-me-in";

/// Whom the registry serves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Access {
    /// Everybody.
    #[default]
    Open,
    /// Who sends user name and password with each request.
    Basic { username: String, password: String },
    /// Who brings a bearer token, which the token endpoint gives for user name and password (or anybody when they are empty).
    Token { username: String, password: String },
}

/// What goes wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Sends this many bytes of the body and then nothing, until the registry ends.
    Stall(usize),
    /// Sends this many bytes of the body and closes.
    BreakOff(usize),
    /// Sends other bytes of the same length.
    Rubbish,
    /// Answers with this status and no body.
    Status(u16),
    /// Passes over the Range header.
    NoRange,
    /// Redirects to the same content under another path.
    Redirect,
    /// Sends this body whatever was asked for.
    Body(Vec<u8>),
}

#[derive(Default)]
struct State {
    /// "NAME/manifests/REF" and "NAME/blobs/DIGEST".
    content: HashMap<String, Blob>,
    access: Access,
    /// Part of a path, the fault, and for how many requests.
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<String>,
}

struct Shared {
    state: Mutex<State>,
    ended: AtomicBool,
    /// Wakes stalled connections when the registry ends.
    end: Condvar,
    address: SocketAddr,
}

/// A running registry; dropping it ends it.
pub struct Registry {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Registry {
    /// Starts one on a free port of 127.0.0.1, in the calling thread's network namespace.
    ///
    /// # Errors
    /// When no port can be bound.
    pub fn start() -> std::io::Result<Self> {
        Self::start_on(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// Starts one on this address.
    ///
    /// # Errors
    /// When it can't be bound.
    pub fn start_on(address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            ended: AtomicBool::new(false),
            end: Condvar::new(),
            address: listener.local_addr()?,
        });
        let ours = shared.clone();
        let acceptor = std::thread::spawn(move || accept(&listener, &ours));
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// "127.0.0.1:PORT".
    pub fn address(&self) -> String {
        self.shared.address.to_string()
    }

    /// Serves an image as "NAME:TAG"; returns its full reference.
    pub fn add(&self, name: &str, tag: &str, image: &Image) -> String {
        let mut state = self.state();
        for blob in image.blobs() {
            let is_manifest = ["manifest", "index"].iter().any(|word| blob.media_type.contains(word));
            let kind = if is_manifest { "manifests" } else { "blobs" };
            state.content.insert(format!("{name}/{kind}/{}", blob.digest()), blob.clone());
        }
        state.content.insert(format!("{name}/manifests/{tag}"), image.top().clone());
        format!("{}/{name}:{tag}", self.shared.address)
    }

    /// Changes whom it serves.
    pub fn set_access(&self, access: Access) {
        self.state().access = access;
    }

    /// Makes the next `times` requests whose path contains `path_part` go wrong.
    pub fn fault(&self, path_part: &str, fault: Fault, times: usize) {
        self.state().faults.push((path_part.into(), fault, times));
    }

    /// All requests so far: "GET /v2/…", with " Range: …" behind those that had one.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    /// How many requests so far had `path_part` in them.
    pub fn count(&self, path_part: &str) -> usize {
        self.state().requests.iter().filter(|r| r.contains(path_part)).count()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.end.notify_all();
        let _ = TcpStream::connect(self.shared.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    for stream in listener.incoming() {
        if shared.ended.load(Ordering::SeqCst) {
            break;
        }
        let (Ok(stream), ours) = (stream, shared.clone()) else { continue };
        threads.push(std::thread::spawn(move || {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let _ = stream.set_write_timeout(Some(Duration::from_secs(10)));
            // A client that goes away in the middle is its own affair.
            let _ = serve(&stream, &ours);
            let _ = stream.shutdown(Shutdown::Both);
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    authorization: String,
    range_start: Option<usize>,
}

fn read_request(stream: &TcpStream) -> std::io::Result<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let mut request = Request { method, path: path.into(), query: query.into(), authorization: String::new(), range_start: None };
    let mut body_len = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("authorization", value) => request.authorization = value.into(),
            ("content-length", value) => body_len = value.parse().unwrap_or(0),
            ("range", value) => {
                request.range_start = value.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')).and_then(|n| n.parse().ok());
            }
            _ => {}
        }
    }
    let mut body = String::new();
    reader.take(body_len).read_to_string(&mut body)?;
    request.query = if request.query.is_empty() { body } else { request.query };
    Ok(request)
}

fn serve(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let request = read_request(stream)?;
    if request.method.is_empty() {
        return Ok(());
    }
    let (blob, fault) = {
        let mut state = lock(shared);
        let range = request.range_start.map_or(String::new(), |start| format!(" Range: {start}-"));
        state.requests.push(format!("{} {}{range}", request.method, request.path));
        if request.path == "/token" {
            return give_token(stream, &request, &state.access);
        }
        if let Some(challenge) = refuse(&request, &state.access, shared.address) {
            return respond(stream, "401 Unauthorized", &[("WWW-Authenticate", challenge)], br#"{"errors":[{"code":"UNAUTHORIZED"}]}"#);
        }
        let path = request.path.trim_start_matches("/elsewhere").trim_start_matches("/v2/");
        let fault = state.faults.iter_mut().find(|(part, _, times)| *times > 0 && request.path.contains(part.as_str()));
        let fault = fault.map(|(_, fault, times)| {
            *times -= 1;
            fault.clone()
        });
        (state.content.get(path).cloned(), fault)
    };
    match blob {
        _ if request.path == "/v2/" => respond(stream, "200 OK", &[], b"{}"),
        Some(blob) => send_blob(stream, shared, &request, &blob, fault),
        None => respond(stream, "404 Not Found", &[], br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not known"}]}"#),
    }
}

/// The challenge for a request that is not allowed, if it is not.
fn refuse(request: &Request, access: &Access, address: SocketAddr) -> Option<String> {
    match access {
        Access::Open => None,
        Access::Basic { username, password } => {
            (request.authorization != basic(username, password)).then(|| "Basic realm=\"testkit\"".to_owned())
        }
        Access::Token { .. } => {
            let name = request.path.trim_start_matches("/v2/");
            let name = name.split("/manifests/").next().and_then(|n| n.split("/blobs/").next()).unwrap_or_default();
            (request.authorization != format!("Bearer {TOKEN}"))
                .then(|| format!("Bearer realm=\"http://{address}/token\",service=\"testkit\",scope=\"repository:{name}:pull\""))
        }
    }
}

fn give_token(stream: &TcpStream, request: &Request, access: &Access) -> std::io::Result<()> {
    let Access::Token { username, password } = access else {
        return respond(stream, "404 Not Found", &[], b"");
    };
    let by_refresh = request.query.contains("grant_type=refresh_token") && request.query.contains(&format!("refresh_token={password}"));
    if username.is_empty() || by_refresh || request.authorization == basic(username, password) {
        return respond(stream, "200 OK", &[], format!("{{\"token\":\"{TOKEN}\",\"access_token\":\"{TOKEN}\"}}").as_bytes());
    }
    respond(stream, "401 Unauthorized", &[], br#"{"details":"incorrect username or password"}"#)
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64(format!("{username}:{password}").as_bytes()))
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for n in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * n) & 63) as usize] as char;
            out.push(if n <= chunk.len() { letter } else { '=' });
        }
    }
    out
}

fn send_blob(stream: &TcpStream, shared: &Shared, request: &Request, blob: &Blob, fault: Option<Fault>) -> std::io::Result<()> {
    let mut body = blob.bytes.clone();
    let mut start = request.range_start.filter(|start| *start < body.len());
    match &fault {
        Some(Fault::Status(status)) => return respond(stream, &format!("{status} Fault"), &[], b""),
        Some(Fault::Redirect) => {
            let location = format!("http://{}/elsewhere{}", shared.address, request.path);
            return respond(stream, "307 Temporary Redirect", &[("Location", location)], b"");
        }
        Some(Fault::Rubbish) => body.iter_mut().for_each(|b| *b ^= 0x55),
        Some(Fault::Body(other)) => body = other.clone(),
        Some(Fault::NoRange) => start = None,
        _ => {}
    }
    let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
    let mut headers = vec![("Content-Type", blob.media_type.clone()), ("Docker-Content-Digest", blob.digest())];
    if let Some(start) = start {
        headers.push(("Content-Range", format!("bytes {start}-{}/{}", body.len() - 1, body.len())));
        body.drain(..start);
    }
    write_head(stream, status, &headers, body.len())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::BreakOff(len)) => (&*stream).write_all(&body[..len.min(body.len())]),
        Some(Fault::Stall(len)) => {
            (&*stream).write_all(&body[..len.min(body.len())])?;
            let mut state = lock(shared);
            while !shared.ended.load(Ordering::SeqCst) {
                let (next, _) = shared.end.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner);
                state = next;
            }
            Ok(())
        }
        _ => (&*stream).write_all(&body),
    }
}

fn respond(stream: &TcpStream, status: &str, headers: &[(&str, String)], body: &[u8]) -> std::io::Result<()> {
    write_head(stream, status, headers, body.len())?;
    (&*stream).write_all(body)
}

fn write_head(mut stream: &TcpStream, status: &str, headers: &[(&str, String)], body_len: usize) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {body_len}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageSpec;
    use crate::tar::Entry;

    fn get(address: &str, path: &str, header: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n").unwrap();
        let mut text = Vec::new();
        stream.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn serves_manifests_blobs_and_ranges() {
        let registry = Registry::start().unwrap();
        let image = ImageSpec::new().layer([Entry::file("a", "hello")]).build();
        registry.add("x", "1", &image);
        assert!(get(&registry.address(), "/v2/x/manifests/1", "").contains(&image.config.digest()));
        let blob = format!("/v2/x/blobs/{}", image.config.digest());
        assert!(get(&registry.address(), &blob, "Range: bytes=3-\r\n").starts_with("HTTP/1.1 206"));
        assert!(get(&registry.address(), "/v2/x/manifests/2", "").starts_with("HTTP/1.1 404"));
        assert_eq!(registry.count("/manifests/"), 2);
    }

    #[test]
    fn asks_for_tokens() {
        let registry = Registry::start().unwrap();
        registry.set_access(Access::Token { username: "u".into(), password: "p".into() });
        assert!(get(&registry.address(), "/v2/x/manifests/1", "").contains("scope=\"repository:x:pull\""));
        assert!(get(&registry.address(), "/token?scope=x", "").starts_with("HTTP/1.1 401"));
        let authorization = format!("Authorization: {}\r\n", basic("u", "p"));
        assert!(get(&registry.address(), "/token?scope=x", &authorization).contains(TOKEN));
        assert_eq!(base64(b"u:p"), "dTpw");
    }
}
