//! Actions over the network, against servers in this process.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::action::{self, Verdict};
use super::http;
use crate::runtime::Runtime;

/// A probe's verdict on a container whose port `web` is the given one.
async fn verdict(probe: Value, port: u16, pod_ip: &str) -> Verdict {
    let container: Container =
        serde_json::from_value(json!({"name": "c", "ports": [{"name": "web", "containerPort": port}]})).expect("a container");
    let mut probe: Probe = serde_json::from_value(probe).expect("a probe");
    probe.timeout_seconds = Some(60);
    let runtime = Runtime::new("/nowhere", None).expect("an endpoint that is not asked");
    action::probe(&runtime, "id", &container, &probe, pod_ip).await
}

/// Answers one connection after another with `answer`, and hands over what each was asked.
async fn server(answer: &'static str, tls: Option<tokio_rustls::TlsAcceptor>) -> (u16, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let asked = match &tls {
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => exchange(stream, answer).await,
                    Err(_) => continue,
                },
                None => exchange(stream, answer).await,
            };
            let _ = sender.send(asked).await;
        }
    });
    (port, receiver)
}

async fn exchange<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut stream: S, answer: &str) -> String {
    let mut asked = Vec::new();
    let mut buffer = [0; 1024];
    while !asked.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => asked.extend_from_slice(&buffer[..count]),
        }
    }
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
    String::from_utf8_lossy(&asked).into_owned()
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

fn acceptor() -> tokio_rustls::TlsAcceptor {
    let made = rcgen::generate_simple_self_signed(vec!["other.example".to_owned()]).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let config = config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).expect("a pair");
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn http_actions_go_where_they_say() {
    let (port, mut asked) = server(OK, None).await;
    let get = json!({"httpGet": {"port": "web", "path": "/p?q=1", "httpHeaders": [{"name": "X-A", "value": "b"}]}});
    assert_eq!(verdict(get, port, "127.0.0.1").await, Verdict::Success);
    let asked = asked.recv().await.expect("a request");
    assert!(asked.starts_with("GET /p?q=1 HTTP/1.1\r\n") && asked.to_lowercase().contains("\r\nx-a: b\r\n"), "{asked}");
    assert!(asked.contains("kube-probe/"), "{asked}");
    // Another host than the pod's, which answers nothing.
    let get = json!({"httpGet": {"port": port, "host": "127.0.0.1"}});
    assert_eq!(verdict(get.clone(), port, "192.0.2.1").await, Verdict::Success);
    assert!(matches!(verdict(json!({"httpGet": {"port": "other"}}), port, "127.0.0.1").await, Verdict::Error(_)), "no port of that name");
    // Over TLS whoever the certificate is for; in the clear a TLS server is no HTTP server.
    let (port, _asked) = server(OK, Some(acceptor())).await;
    assert_eq!(verdict(json!({"httpGet": {"port": port, "scheme": "HTTPS"}}), port, "127.0.0.1").await, Verdict::Success);
    assert!(matches!(verdict(json!({"httpGet": {"port": port, "scheme": "HTTP"}}), port, "127.0.0.1").await, Verdict::Failure(_)));
    let (port, _asked) = server("HTTP/1.1 500 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", None).await;
    let failed = verdict(json!({"httpGet": {"port": port}}), port, "127.0.0.1").await;
    assert_eq!(failed, Verdict::Failure("HTTP probe failed with statuscode: 500".to_owned()));
}

#[tokio::test]
async fn tcp_actions_go_where_they_say() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    assert_eq!(verdict(json!({"tcpSocket": {"port": "web"}}), port, "127.0.0.1").await, Verdict::Success);
    assert_eq!(verdict(json!({"tcpSocket": {"port": port, "host": "127.0.0.1"}}), port, "192.0.2.1").await, Verdict::Success);
    drop(listener);
    assert!(matches!(verdict(json!({"tcpSocket": {"port": port}}), port, "127.0.0.1").await, Verdict::Failure(_)));
}

/// A server that answers with these codes in order, the last one for ever, and counts.
async fn scripted(codes: &'static [u16]) -> (u16, Arc<std::sync::Mutex<Vec<std::time::Instant>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noted = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let at = noted.lock().map(|list| list.len()).unwrap_or(0);
            let code = codes.get(at).or(codes.last()).copied().unwrap_or(200);
            // Counted before the answer: who has seen an answer sees its count.
            noted.lock().expect("no panic").push(std::time::Instant::now());
            exchange(stream, &format!("HTTP/1.1 {code} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")).await;
        }
    });
    (port, seen)
}

#[tokio::test]
async fn probes_obey_their_numbers() {
    use super::{Kind, Outcome, Set, Shared};
    use crate::model::{Container as Seen, PodRuntime, Sandbox};
    let (port, asked) = scripted(&[500, 200, 500, 200, 200, 500, 500, 200, 500, 500, 500]).await;
    let started = std::time::Instant::now();
    let pod: k8s_openapi::api::core::v1::Pod =
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [
        {"name": "c", "readinessProbe": {"httpGet": {"port": port}, "initialDelaySeconds": 3, "periodSeconds": 1, "timeoutSeconds": 60,
            "successThreshold": 2, "failureThreshold": 3}}]}}))
        .expect("a pod");
    let status = protocols::cri::v1::ContainerStatus {
        id: "id".to_owned(),
        metadata: Some(protocols::cri::v1::ContainerMetadata { name: "c".to_owned(), attempt: 0 }),
        state: protocols::cri::v1::ContainerState::ContainerRunning as i32,
        started_at: i64::try_from(jiff::Timestamp::now().as_nanosecond()).expect("before 2262"),
        ..Default::default()
    };
    let runtime = PodRuntime { sandboxes: vec![Sandbox::default()], containers: vec![Seen::from_cri(&status, "")] };
    let results = Shared::default();
    let mut set = Set::new(super::Context {
        runtime: Runtime::new("/nowhere", None).expect("an endpoint that is not asked"),
        recorder: crate::events::Recorder::new(client::EventRecorder::new("kubelet", "node")),
        results: results.clone(),
        wake: Arc::default(),
        kubelet_started: jiff::Timestamp::UNIX_EPOCH,
    });
    set.sync(&pod, &runtime, "127.0.0.1", &[]);
    let count = || asked.lock().expect("no panic").len();
    let until = |wanted: Outcome| {
        let results = results.clone();
        async move {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(90);
            while results.snapshot().get("id", Kind::Readiness) != Some(wanted) {
                assert!(tokio::time::Instant::now() < deadline, "not {wanted:?} in time");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    assert_eq!(results.snapshot().get("id", Kind::Readiness), Some(Outcome::Failure), "not ready before it is asked");
    until(Outcome::Success).await;
    assert!(count() >= 5, "two successes in a row come with the fifth answer, not with {}", count());
    until(Outcome::Failure).await;
    assert!(count() >= 11, "three failures in a row come with the eleventh answer, not with {}", count());
    let times = asked.lock().expect("no panic").clone();
    assert!(times[0].duration_since(started) >= Duration::from_secs(2), "initialDelaySeconds");
    assert!(times[10].duration_since(times[0]) >= Duration::from_secs(9), "periodSeconds");
    // A server that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = silent.local_addr().expect("an address").port();
    let container: Container = serde_json::from_value(json!({"name": "c"})).expect("a container");
    let probe: Probe = serde_json::from_value(json!({"httpGet": {"port": port}, "timeoutSeconds": 1})).expect("a probe");
    let unasked = Runtime::new("/nowhere", None).expect("an endpoint that is not asked");
    let late = action::probe(&unasked, "id", &container, &probe, "127.0.0.1").await;
    assert!(matches!(&late, Verdict::Failure(text) if text.contains("deadline exceeded")), "{late:?}");
}

/// A health service: the service `good` serves, all others do not.
#[derive(Clone)]
struct Health;

impl tower::Service<::http::Request<tonic::body::Body>> for Health {
    type Response = ::http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: ::http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::<http::HealthCheckResponse, http::HealthCheckRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(Check, request).await)
        })
    }
}

struct Check;

impl tonic::server::UnaryService<http::HealthCheckRequest> for Check {
    type Response = http::HealthCheckResponse;
    type Future = std::future::Ready<Result<tonic::Response<Self::Response>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<http::HealthCheckRequest>) -> Self::Future {
        let status = if request.into_inner().service == "good" { 1 } else { 2 };
        std::future::ready(Ok(tonic::Response::new(http::HealthCheckResponse { status })))
    }
}

impl tonic::server::NamedService for Health {
    const NAME: &'static str = "grpc.health.v1.Health";
}

#[tokio::test]
async fn grpc_health_is_asked() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().serve_with_incoming(Health, incoming));
    let ask = |service: &'static str| verdict(json!({"grpc": {"port": port, "service": service}}), port, "127.0.0.1");
    assert_eq!(ask("good").await, Verdict::Success);
    assert_eq!(ask("bad").await, Verdict::Failure("service unhealthy (responded with \"NOT_SERVING\")".to_owned()));
    let gone = http::grpc_health("127.0.0.1", 1, "", Duration::from_secs(60)).await;
    assert!(matches!(gone, Verdict::Failure(_)), "{gone:?}");
}
