//! exec, attach and port-forward: the client's session here, a session of our own at the runtime's streaming server,
//! joined queue by queue (port-forward: byte by byte). Upstream pkg/kubelet/server, k8s.io/streaming, v1.37.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use protocols::cri::v1 as cri;
use remotecommand::{Channels, ClientSession, Output, Protocol, ServerSession, Status};
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use crate::model;
use crate::runtime;
use crate::server::{Refusal, Reply, State, parameters};

const CONNECT: Duration = Duration::from_secs(10);

/// `/exec/NS/POD/CONTAINER`.
pub async fn exec(state: &Arc<State>, namespace: &str, pod: &str, container: &str, request: Request<Incoming>) -> Result<Reply, Refusal> {
    let channels = channels(request.uri().query().unwrap_or(""))?;
    let command: Vec<String> =
        parameters(request.uri().query().unwrap_or("")).into_iter().filter(|(key, _)| key == "command").map(|(_, value)| value).collect();
    if command.is_empty() {
        return Err(Refusal::bad_request("you must specify at least 1 command for the container"));
    }
    let container_id = state.container_id(namespace, pod, container).await?;
    let url = state.kubelet.runtime.exec(cri::ExecRequest {
        container_id,
        cmd: command,
        tty: channels.tty,
        stdin: channels.stdin,
        stdout: channels.stdout,
        stderr: channels.stderr,
    });
    relay(state, request, channels, url.await).await
}

/// `/attach/NS/POD/CONTAINER`.
pub async fn attach(state: &Arc<State>, namespace: &str, pod: &str, container: &str, request: Request<Incoming>) -> Result<Reply, Refusal> {
    let mut channels = channels(request.uri().query().unwrap_or(""))?;
    let spec = state.pod(namespace, pod)?;
    // The container has a terminal or has none, whatever the client believes.
    if let Some(spec) = model::container_spec(&spec, container) {
        channels.tty = spec.tty.unwrap_or(false);
        channels.stderr &= !channels.tty;
    }
    let container_id = state.container_id(namespace, pod, container).await?;
    let url = state.kubelet.runtime.attach(cri::AttachRequest {
        container_id,
        stdin: channels.stdin,
        tty: channels.tty,
        stdout: channels.stdout,
        stderr: channels.stderr,
    });
    relay(state, request, channels, url.await).await
}

/// `/portForward/NS/POD`: the client's own upgrade goes through to the runtime.
pub async fn port_forward(state: &Arc<State>, namespace: &str, pod: &str, request: Request<Incoming>) -> Result<Reply, Refusal> {
    let pod = state.pod(namespace, pod)?;
    let seen = state.kubelet.runtime.observe(model::uid(&pod)).await;
    let seen = seen.map_err(|e| Refusal::internal(runtime::go_error(&e)))?;
    let sandbox = seen.active_sandbox().map(|s| s.id.clone());
    let pod_sandbox_id = sandbox.ok_or_else(|| Refusal::not_found("the pod has no running sandbox"))?;
    let url = state.kubelet.runtime.port_forward(cri::PortForwardRequest { pod_sandbox_id, port: Vec::new() });
    let url = url.await.map_err(|e| Refusal::internal(runtime::message(&e)))?;
    let mut headers = request.headers().clone();
    headers.remove(http::header::AUTHORIZATION);
    headers.remove(http::header::HOST);
    let (upstream, answer) = upgrade(&state.tasks, &url, request.method().clone(), headers).await?;
    let client = hyper::upgrade::on(request);
    let cancel = state.cancel.clone();
    state.tasks.spawn(cancel.run_until_cancelled_owned(async move {
        let Ok(client) = client.await else { return };
        let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
        // Either end may break off at any time; that ends the session.
        let _ = tokio::io::copy_bidirectional(&mut client, &mut upstream).await;
    }));
    Ok(switching(answer))
}

fn channels(query: &str) -> Result<Channels, Refusal> {
    let parameters = parameters(query);
    let has = |names: [&str; 2]| {
        let mut found = parameters.iter().filter(|(key, _)| names.contains(&key.as_str()));
        found.any(|(_, value)| matches!(value.as_str(), "1" | "true"))
    };
    let tty = has(["tty", "tty"]);
    let channels =
        Channels { stdin: has(["input", "stdin"]), stdout: has(["output", "stdout"]), stderr: has(["error", "stderr"]) && !tty, tty };
    if !(channels.stdin || channels.stdout || channels.stderr) {
        return Err(Refusal::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    Ok(channels)
}

async fn relay(
    state: &Arc<State>,
    request: Request<Incoming>,
    channels: Channels,
    url: Result<String, runtime::Error>,
) -> Result<Reply, Refusal> {
    let agreed = remotecommand::negotiate(request.headers()).map_err(|e| Refusal::bad_request(e.to_string()))?;
    let url = url.map_err(|error| match error.code() {
        Some(tonic::Code::NotFound) => Refusal::not_found(runtime::message(&error)),
        _ => Refusal::internal(runtime::go_error(&error)),
    })?;
    let (upstream, upstream_protocol) = connect(&state.tasks, &url).await?;
    let client = hyper::upgrade::on(request);
    let protocol = agreed.protocol;
    let cancel = state.cancel.clone();
    state.tasks.spawn(cancel.run_until_cancelled_owned(async move {
        let client = match client.await {
            Ok(client) => TokioIo::new(client),
            Err(error) => {
                tracing::debug!(%error, "a stream was not upgraded");
                return;
            }
        };
        let (server, server_driver) = remotecommand::accept(client, protocol, channels);
        let (remote, remote_driver) = remotecommand::attach(TokioIo::new(upstream), upstream_protocol, channels);
        let (_, driven, remote_driven) = tokio::join!(join(server, remote), server_driver, remote_driver);
        for result in [driven, remote_driven] {
            if let Err(error) = result {
                tracing::debug!(%error, "a stream broke off");
            }
        }
    }));
    Ok(switching(agreed.response_headers))
}

/// Passes everything on in both directions until the command's status has come or one side is gone.
async fn join(mut server: ServerSession, mut remote: ClientSession) {
    let (output, input) = (server.output, remote.input);
    let forward = async move {
        while let Some(message) = server.input.recv().await {
            if input.send(message).await.is_err() {
                break;
            }
        }
    };
    let back = async move {
        let mut ended = false;
        while let Some(message) = remote.output.recv().await {
            ended = matches!(message, Output::Status(_));
            if output.send(message).await.is_err() || ended {
                break;
            }
        }
        if !ended {
            let status = Status::failed("the runtime closed the stream without a status");
            // The client may be gone.
            let _ = output.send(Output::Status(status)).await;
        }
    };
    tokio::select! {
        () = back => {}
        // The client is gone: dropping the session closes it at the runtime.
        () = forward => {}
    }
}

/// A session's connection at the runtime: SPDY, which every runtime speaks, else WebSocket.
async fn connect(tasks: &TaskTracker, url: &str) -> Result<(Upgraded, Protocol), Refusal> {
    let spdy = upgrade(tasks, url, Method::POST, remotecommand::request_headers(Protocol::SpdyV4)).await;
    let (upstream, answer) = match spdy {
        Ok(done) => done,
        Err(refused) => {
            tracing::debug!(?refused, "the runtime refused SPDY; trying WebSocket");
            let headers = remotecommand::request_headers(Protocol::WebSocketV5);
            upgrade(tasks, url, Method::GET, headers).await?
        }
    };
    let protocol = remotecommand::agreed(&answer).map_err(|e| Refusal::internal(e.to_string()))?;
    Ok((upstream, protocol))
}

/// Sends an upgrade request to a URL of the runtime; the upgraded connection and the answer's headers.
async fn upgrade(tasks: &TaskTracker, url: &str, method: Method, headers: HeaderMap) -> Result<(Upgraded, HeaderMap), Refusal> {
    let internal =
        |what: &str, e: &dyn std::fmt::Display| Refusal::internal(format!("failed to {what} the runtime's streaming server: {e}"));
    let uri: Uri = url.parse().map_err(|e| internal("parse the address of", &e))?;
    let host = uri.host().unwrap_or("127.0.0.1").trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(80);
    if uri.scheme_str() != Some("http") {
        return Err(internal("reach", &"only http URLs are supported"));
    }
    let address = crate::probe::http::join_host_port(host, port);
    let connected = tokio::time::timeout(CONNECT, TcpStream::connect(&address)).await;
    let stream = connected.map_err(|_| internal("reach", &"timed out"))?.map_err(|e| internal("reach", &e))?;
    let _ = stream.set_nodelay(true);
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| internal("speak to", &e))?;
    // The connection's task ends with the upgraded stream or when either side closes.
    tasks.spawn(async move {
        let _ = connection.with_upgrades().await;
    });
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::builder().method(method).uri(path).header("Host", &address);
    if let Some(map) = request.headers_mut() {
        map.extend(headers);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| internal("ask", &e))?;
    let answer = sender.send_request(request).await.map_err(|e| internal("ask", &e))?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(internal("upgrade at", &answer.status()));
    }
    let headers = answer.headers().clone();
    let upgraded = hyper::upgrade::on(answer).await.map_err(|e| internal("upgrade at", &e))?;
    Ok((upgraded, headers))
}

fn switching(headers: HeaderMap) -> Reply {
    let mut reply = Response::new(Empty::new().boxed());
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *reply.headers_mut() = headers;
    reply
}
