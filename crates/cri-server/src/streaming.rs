//! The server of exec, attach and port-forward streams: one-time URLs, SPDY/3.1 and WebSocket, relayed to FIFOs of the shim
//! or connected to ports of the pod.
//!
//! Source: kubernetes `k8s.io/streaming` v0.37 (paths `/exec/TOKEN`, `/attach/TOKEN`, `/portforward/TOKEN`; tokens live a minute and are used once).

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use remotecommand::{Channels, Input, Output, ServerSession, Status, Upgrade};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::exec::{DRAIN, Ends, Reader, Streams};
use crate::host;
use crate::portforward;
use crate::server::Server;
use crate::shim::Shim;
use crate::state::{Container, Sandbox, lock};

/// How long a URL may wait for its client, as upstream's.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// URLs that may wait at one time, as upstream's.
const TOKENS_MAX: usize = 1000;
const HEADERS: Duration = Duration::from_secs(30);
/// Connections at one time.
const CONNECTIONS_MAX: usize = 1024;

/// What a URL is for.
#[derive(Clone, Debug)]
pub enum Session {
    /// A new process.
    Exec { container: Arc<Container>, cmd: Vec<String>, streams: Streams },
    /// The container's own process.
    Attach { container: Arc<Container>, streams: Streams },
    /// Connections to ports of a pod.
    PortForward { sandbox: Arc<Sandbox> },
}

/// URLs that were given out and not used yet.
#[derive(Debug, Default)]
pub struct Tokens(Mutex<HashMap<String, (Instant, Session)>>);

impl Tokens {
    /// A token for a session.
    ///
    /// # Errors
    /// [`Error::State`] if too many wait already.
    pub fn insert(&self, session: Session, now: Instant) -> Result<String> {
        let token = host::new_id()?;
        let mut map = lock(&self.0);
        map.retain(|_, (born, _)| now.saturating_duration_since(*born) < TOKEN_LIFE);
        if map.len() >= TOKENS_MAX {
            return Err(Error::State { kind: "stream server", id: String::new(), state: "waiting for too many clients" });
        }
        map.insert(token.clone(), (now, session));
        Ok(token)
    }

    /// The session of a token, once.
    pub fn take(&self, token: &str, now: Instant) -> Option<Session> {
        let (born, session) = lock(&self.0).remove(token)?;
        (now.saturating_duration_since(born) < TOKEN_LIFE).then_some(session)
    }
}

impl Server {
    /// The URL for a session.
    ///
    /// # Errors
    /// As [`Tokens::insert`].
    pub fn stream_url(&self, session: Session) -> Result<String> {
        let kind = match &session {
            Session::Exec { .. } => "exec",
            Session::Attach { .. } => "attach",
            Session::PortForward { .. } => "portforward",
        };
        let token = self.tokens.insert(session, Instant::now())?;
        Ok(format!("{}/{kind}/{token}", self.stream_url))
    }
}

/// Serves until cancelled.
pub async fn serve(server: Arc<Server>, listener: TcpListener) {
    let room = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = server.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "failed to accept a stream connection");
                // Descriptors are used up: others must get the chance to close some.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Keystrokes are small.
        let _ = stream.set_nodelay(true);
        let (server, cancel) = (Arc::clone(&server), server.cancel.clone());
        let tasks = server.tasks.clone();
        tasks.spawn(cancel.run_until_cancelled_owned(async move {
            let _permit = permit;
            let service = hyper::service::service_fn(|request| {
                let server = Arc::clone(&server);
                async move { Ok::<_, Infallible>(answer(&server, request)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(hyper_util::rt::TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a stream connection failed");
            }
        }));
    }
}

fn refuse(status: StatusCode, reason: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{reason}\n"))));
    *response.status_mut() = status;
    response
}

/// `/KIND/TOKEN`.
pub(crate) fn route(path: &str) -> Option<(&str, &str)> {
    let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
    (!token.contains('/')).then_some((kind, token))
}

fn answer(server: &Arc<Server>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::POST && request.method() != Method::GET {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST");
    }
    let path = request.uri().path().to_owned();
    let Some((kind, token)) = route(&path) else { return refuse(StatusCode::NOT_FOUND, "not found") };
    if kind == "portforward" {
        return forward_ports(server, token, request);
    }
    // A client that cannot upgrade does not use the token up.
    let upgrade = match remotecommand::negotiate(request.headers()) {
        Ok(upgrade) => upgrade,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let session = match (kind, server.tokens.take(token, Instant::now())) {
        ("exec", Some(session @ Session::Exec { .. })) | ("attach", Some(session @ Session::Attach { .. })) => session,
        _ => return refuse(StatusCode::NOT_FOUND, "not found"),
    };
    let (container, streams, cmd) = match session {
        Session::Exec { container, cmd, streams } => (container, streams, Some(cmd)),
        Session::Attach { container, streams } => (container, streams, None),
        Session::PortForward { .. } => return refuse(StatusCode::NOT_FOUND, "not found"),
    };
    let Upgrade { protocol, response_headers } = upgrade;
    let (server, cancel) = (Arc::clone(server), server.cancel.clone());
    let tasks = server.tasks.clone();
    tasks.spawn(cancel.run_until_cancelled_owned(async move {
        let io = match hyper::upgrade::on(request).await {
            Ok(io) => TokioIo::new(io),
            Err(error) => {
                tracing::debug!(%error, "a stream was not upgraded");
                return;
            }
        };
        let channels = Channels { stdin: streams.stdin, stdout: streams.stdout, stderr: streams.stderr && !streams.tty, tty: streams.tty };
        let (remote, driver) = remotecommand::accept(io, protocol, channels);
        let ((), driven) = tokio::join!(run(&server, &container, cmd, streams, remote), driver);
        if let Err(error) = driven {
            tracing::debug!(%error, "a stream broke off");
        }
    }));
    switching(response_headers)
}

fn switching(headers: HeaderMap) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers;
    response
}

fn forward_ports(server: &Arc<Server>, token: &str, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let response_headers = match remotecommand::negotiate_port_forward(request.headers()) {
        Ok(headers) => headers,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let Some(Session::PortForward { sandbox }) = server.tokens.take(token, Instant::now()) else {
        return refuse(StatusCode::NOT_FOUND, "not found");
    };
    server.tasks.spawn(server.cancel.clone().run_until_cancelled_owned(async move {
        let served = match hyper::upgrade::on(request).await {
            Ok(io) => remotecommand::serve_port_forward(TokioIo::new(io), |port| portforward::dial(Arc::clone(&sandbox), port)).await,
            Err(error) => return tracing::debug!(%error, "a stream was not upgraded"),
        };
        if let Err(error) = served {
            tracing::debug!(sandbox_id = sandbox.id, %error, "port forwarding broke off");
        }
    }));
    switching(response_headers)
}

/// A new process with a command, the container's own without.
async fn run(server: &Arc<Server>, container: &Arc<Container>, cmd: Option<Vec<String>>, streams: Streams, remote: ServerSession) {
    let ServerSession { input, output } = remote;
    let status = match cmd {
        Some(cmd) => exec(server, container, cmd, streams, input, &output).await,
        None => attach(server, container, streams, input, &output).await,
    };
    let status = status.unwrap_or_else(|error| Status::failed(error.chain()));
    // The client may be gone.
    let _ = output.send(Output::Status(status)).await;
}

async fn exec(
    server: &Arc<Server>,
    container: &Arc<Container>,
    cmd: Vec<String>,
    streams: Streams,
    input: mpsc::Receiver<Input>,
    output: &mpsc::Sender<Output>,
) -> Result<Status> {
    let (mut exec, Ends { stdin, stdout, stderr }) = server.start_exec(container, cmd, streams).await?;
    let target = Target { shim: Arc::clone(&exec.shim), container_id: container.id.clone(), exec_id: exec.id.clone(), ends_stdin: true };
    let outputs = async { tokio::join!(copy_out(stdout, output, Output::Stdout), copy_out(stderr, output, Output::Stderr)) };
    let inputs = copy_in(input, stdin, &target);
    tokio::pin!(outputs, inputs);
    let mut reading = true;
    let ended = loop {
        tokio::select! {
            status = exec.wait() => break Some(status),
            _ = &mut outputs, if reading => reading = false,
            // The client went away: nobody will see what the process does.
            () = &mut inputs => break None,
        }
    };
    let Some(status) = ended else {
        exec.kill().await;
        let _ = tokio::time::timeout(DRAIN, exec.wait()).await;
        exec.finish().await;
        return Ok(Status::failed("the client went away"));
    };
    let finish = async {
        // Once it is deleted the shim has closed its ends of the FIFOs.
        exec.finish().await;
    };
    let drain = async {
        if reading {
            let _ = tokio::time::timeout(DRAIN, &mut outputs).await;
        }
    };
    tokio::join!(finish, drain);
    Ok(Status::exited(i32::try_from(status?).unwrap_or(i32::MAX)))
}

async fn attach(
    server: &Arc<Server>,
    container: &Arc<Container>,
    streams: Streams,
    input: mpsc::Receiver<Input>,
    output: &mpsc::Sender<Output>,
) -> Result<Status> {
    let shim = server.running(container)?;
    let streams = Streams { stdin: streams.stdin && container.config.stdin, tty: container.config.tty, ..streams };
    let (fifos, Ends { stdin, stdout, stderr }) = server.open_attach(container, &shim, streams).await?;
    let target = Target { shim, container_id: container.id.clone(), exec_id: String::new(), ends_stdin: container.config.stdin_once };
    let outputs = async { tokio::join!(copy_out(stdout, output, Output::Stdout), copy_out(stderr, output, Output::Stderr)) };
    let inputs = copy_in(input, stdin, &target);
    tokio::pin!(outputs, inputs);
    let has_output = streams.stdout || streams.stderr;
    tokio::select! {
        _ = &mut outputs, if has_output => {}
        () = &mut inputs => {}
        () = container.exited() => {
            let _ = tokio::time::timeout(DRAIN, &mut outputs).await;
        }
    }
    drop(fifos);
    Ok(Status::exited(0))
}

/// The process that input goes to.
struct Target {
    shim: Arc<Shim>,
    container_id: String,
    exec_id: String,
    /// The end of the client's stdin is the end of the process'.
    ends_stdin: bool,
}

/// Copies the client's input until the client is gone.
async fn copy_in(mut input: mpsc::Receiver<Input>, mut stdin: Option<pipe::Sender>, target: &Target) {
    while let Some(event) = input.recv().await {
        match event {
            Input::Stdin(bytes) => {
                if let Some(pipe) = &mut stdin
                    && let Err(error) = pipe.write_all(&bytes).await
                {
                    tracing::debug!(container_id = target.container_id, %error, "stdin is closed");
                    stdin = None;
                }
            }
            Input::StdinClosed => {
                let was_open = stdin.take().is_some();
                if was_open
                    && target.ends_stdin
                    && let Err(error) = target.shim.close_stdin(&target.container_id, &target.exec_id).await
                    && !error.is_not_found()
                {
                    tracing::warn!(container_id = target.container_id, %error, "failed to close stdin");
                }
            }
            Input::Resize(size) => {
                if let Err(error) = target.shim.resize(&target.container_id, &target.exec_id, size.width, size.height).await {
                    tracing::debug!(container_id = target.container_id, %error, "failed to resize a terminal");
                }
            }
        }
    }
}

/// Copies output until its end, or until the client is gone.
async fn copy_out(pipe: Option<Reader>, output: &mpsc::Sender<Output>, wrap: fn(Bytes) -> Output) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = vec![0; remotecommand::CHUNK_BYTES_MAX];
    while let Ok(count) = pipe.read(&mut buffer).await {
        if count == 0 || output.send(wrap(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
            return;
        }
    }
}
