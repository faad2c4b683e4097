//! The API server's part of `cargo xtask bench`: `coracle apiserver` and kube-apiserver with etcd, one after another, under the same client.
//!
//! `api-bench OBJECTS`: one JSON object a line on stdout for each side. CPU and memory are those of the servers' processes, from `/proc`;
//! what the client costs is on neither side's account.

#![forbid(unsafe_code)]

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use e2e::servers::{Server, make_keys, start_ours, start_real};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Clients that write and read at the same time.
const CLIENTS: usize = 16;
/// Bytes of each object's data.
const DATA_BYTES: usize = 1000;
/// Timed lists of each kind.
const LISTS: usize = 11;
/// Watchers of one resource.
const WATCHERS: usize = 100;
/// Timed events that all watchers see.
const EVENTS: usize = 50;
/// How long the last watcher may need.
const PATIENCE: Duration = Duration::from_secs(30);
const COLLECTION: &str = "/api/v1/namespaces/default/configmaps";
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

fn main() -> ExitCode {
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
        .and_then(|runtime| runtime.block_on(run()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("api-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let objects = std::env::args().nth(1).and_then(|count| count.parse().ok()).context("api-bench OBJECTS: a number is wanted")?;
    let folder = tempfile::tempdir().context("failed to make a folder")?;
    make_keys(folder.path())?;
    let began = Instant::now();
    let ours = start_ours(folder.path())?;
    measure("coracle", "with its own store, on disk", &ours, began, objects).await?;
    drop(ours);
    let began = Instant::now();
    match start_real(folder.path())? {
        Some(real) => {
            let version = ["kube-apiserver", "etcd"].map(|name| format!("{name} {}", version(name))).join(", ");
            measure("kube-apiserver + etcd", &version, &real, began, objects).await
        }
        None => {
            eprintln!("there is no kube-apiserver and etcd to measure beside: ours alone");
            Ok(())
        }
    }
}

/// The version under which a peer was built.
fn version(name: &str) -> String {
    let stamp = e2e::peer(name).and_then(|program| fs::read_to_string(program.with_extension("version")).ok());
    stamp.map_or_else(|| "of unknown version".to_owned(), |text| text.trim().to_owned())
}

async fn measure(side: &str, version: &str, server: &Server, began: Instant, objects: usize) -> Result<()> {
    let ready_seconds = began.elapsed().as_secs_f64();
    eprintln!("==> {objects} objects of {side}");
    let idle_pss_kib = pss_kib(server)?;
    let target = Arc::new(Target::new(server)?);
    let creates = load(server, &target, objects, create).await?;
    let full_pss_kib = pss_kib(server)?;
    let gets = load(server, &target, objects, get).await?;
    let mut lists = serde_json::Map::new();
    for (name, accept) in [("json", "application/json"), ("table", TABLE), ("protobuf", PROTOBUF)] {
        lists.insert(name.to_owned(), list(server, &target, accept).await?);
    }
    let listed_pss_kib = pss_kib(server)?;
    let delays = watch(server, &target).await?;
    let line = json!({
        "bench": "apiserver", "side": side, "version": version, "objects": objects, "clients": CLIENTS, "ready_s": ready_seconds,
        "idle_pss_kib": idle_pss_kib, "full_pss_kib": full_pss_kib, "listed_pss_kib": listed_pss_kib, "create": creates, "get": gets, "list": lists,
        "watchers": WATCHERS, "watch": delays,
    });
    println!("{line}");
    Ok(())
}

/// Where requests go: connections to one server, each with the client's certificate.
struct Target {
    address: std::net::SocketAddr,
    tls: TlsConnector,
}

type Connection = SendRequest<Full<Bytes>>;

impl Target {
    fn new(server: &Server) -> Result<Target> {
        let file = |name: &str| server.keys().join(name);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(file("ca.crt")).context("failed to read ca.crt")?)?;
        let certificate = CertificateDer::from_pem_file(file("client.crt")).context("failed to read client.crt")?;
        let key = PrivateKeyDer::from_pem_file(file("client.key")).context("failed to read client.key")?;
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Target { address: server.address(), tls: TlsConnector::from(Arc::new(config)) })
    }

    async fn connect(&self) -> Result<Connection> {
        let tcp = TcpStream::connect(self.address).await.context("failed to connect")?;
        tcp.set_nodelay(true)?;
        let stream = self.tls.connect(ServerName::from(self.address.ip()), tcp).await.context("failed to set up TLS")?;
        let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        // It ends with the last sender of requests.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(&self, method: &str, path: &str, accept: &str, body: String) -> Result<Request<Full<Bytes>>> {
        let request = Request::builder().method(method).uri(format!("https://{}{path}", self.address)).header("accept", accept);
        Ok(request.header("content-type", "application/json").body(Full::new(Bytes::from(body)))?)
    }
}

async fn send(connection: &mut Connection, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
    connection.ready().await?;
    let answer = connection.send_request(request).await?;
    if !answer.status().is_success() {
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        bail!("answered {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(answer)
}

fn create(target: &Target, number: usize) -> Result<Request<Full<Bytes>>> {
    target.request("POST", COLLECTION, "application/json", object(&format!("bench-{number}")))
}

fn get(target: &Target, number: usize) -> Result<Request<Full<Bytes>>> {
    target.request("GET", &format!("{COLLECTION}/bench-{number}"), "application/json", String::new())
}

fn object(name: &str) -> String {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": { "text": "x".repeat(DATA_BYTES) } }).to_string()
}

/// Sends `count` requests by all clients: rate, CPU of the server for each, latency.
async fn load(
    server: &Server,
    target: &Arc<Target>,
    count: usize,
    make: fn(&Target, usize) -> Result<Request<Full<Bytes>>>,
) -> Result<Value> {
    let (cpu, began) = (cpu_seconds(server)?, Instant::now());
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let target = Arc::clone(target);
        clients.spawn(async move {
            let mut connection = target.connect().await?;
            let mut taken = Vec::new();
            for number in (client..count).step_by(CLIENTS) {
                let sent = Instant::now();
                send(&mut connection, make(&target, number)?).await?.into_body().collect().await?;
                taken.push(milliseconds(sent.elapsed()));
            }
            Ok::<_, anyhow::Error>(taken)
        });
    }
    let mut taken = Vec::new();
    while let Some(client) = clients.join_next().await {
        taken.extend(client.context("a client ended")??);
    }
    let seconds = began.elapsed().as_secs_f64();
    let cpu_us = (cpu_seconds(server)? - cpu) * 1e6 / count as f64;
    Ok(json!({ "per_second": count as f64 / seconds, "cpu_us": cpu_us, "latency_ms": spread(taken) }))
}

async fn list(server: &Server, target: &Target, accept: &str) -> Result<Value> {
    let mut connection = target.connect().await?;
    let (mut taken, mut bytes) = (Vec::new(), 0);
    let cpu = cpu_seconds(server)?;
    for _ in 0..LISTS {
        let sent = Instant::now();
        let answer = send(&mut connection, target.request("GET", COLLECTION, accept, String::new())?).await?;
        bytes = answer.into_body().collect().await?.to_bytes().len();
        taken.push(milliseconds(sent.elapsed()));
    }
    let cpu_ms = (cpu_seconds(server)? - cpu) * 1e3 / LISTS as f64;
    Ok(json!({ "bytes": bytes, "cpu_ms": cpu_ms, "latency_ms": spread(taken) }))
}

/// From before a create is sent until the last of all watchers has its event.
async fn watch(server: &Server, target: &Arc<Target>) -> Result<Value> {
    let mut connection = target.connect().await?;
    let listed = send(&mut connection, target.request("GET", &format!("{COLLECTION}?limit=1"), "application/json", String::new())?).await?;
    let listed: Value = serde_json::from_slice(&listed.into_body().collect().await?.to_bytes())?;
    let version = listed.pointer("/metadata/resourceVersion").and_then(Value::as_str).context("the list has no version")?;
    let path = format!("{COLLECTION}?watch=true&resourceVersion={version}");
    let (seen, mut sights) = mpsc::channel(WATCHERS * 2);
    let mut watchers = JoinSet::new();
    for _ in 0..WATCHERS {
        let mut connection = target.connect().await?;
        let mut body = send(&mut connection, target.request("GET", &path, "application/json", String::new())?).await?.into_body();
        let seen = seen.clone();
        watchers.spawn(async move {
            let _connection = connection;
            while let Some(Ok(frame)) = body.frame().await {
                let lines = frame.data_ref().map_or(0, |data| data.iter().filter(|byte| **byte == b'\n').count());
                for _ in 0..lines {
                    if seen.send(Instant::now()).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
    let cpu = cpu_seconds(server)?;
    let mut taken = Vec::new();
    for number in 0..EVENTS {
        let sent = Instant::now();
        let request = target.request("POST", COLLECTION, "application/json", object(&format!("watched-{number}")))?;
        send(&mut connection, request).await?.into_body().collect().await?;
        let mut last = sent;
        for _ in 0..WATCHERS {
            last = tokio::time::timeout(PATIENCE, sights.recv())
                .await
                .context("a watcher did not see an event")?
                .context("no watcher is left")?
                .max(last);
        }
        taken.push(milliseconds(last - sent));
    }
    watchers.shutdown().await;
    let cpu_us = (cpu_seconds(server)? - cpu) * 1e6 / EVENTS as f64;
    Ok(json!({ "cpu_us_per_event": cpu_us, "delay_ms": spread(taken) }))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get((values.len() * part / 100).min(values.len().saturating_sub(1)));
    json!({ "min": at(0), "median": at(50), "p99": at(99) })
}

/// CPU seconds of the server's processes since they began: user and system time of `/proc/PID/stat`, in ticks of 10 ms.
fn cpu_seconds(server: &Server) -> Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut ticks = 0.0;
    for pid in server.pids() {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("failed to read the times of process {pid}"))?;
        // The name is in parentheses and may hold anything; utime and stime are the 12th and 13th word after it.
        let words = stat.rsplit_once(')').context("a process has no name")?.1.split_whitespace();
        ticks += words.skip(11).take(2).filter_map(|word| word.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(ticks / TICKS_PER_SECOND)
}

fn pss_kib(server: &Server) -> Result<u64> {
    let of = |pid| testkit::process::pss_kib(pid).with_context(|| format!("failed to read the memory of process {pid}"));
    server.pids().map(of).sum()
}
