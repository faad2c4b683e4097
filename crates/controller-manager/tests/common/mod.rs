//! A real kube-apiserver on a real etcd, on loopback, in a directory of its own.
#![allow(dead_code)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const ADMIN_TOKEN: &str = "admin-token";

pub struct Upstream {
    processes: Vec<Child>,
    dir: tempfile::TempDir,
    pub kubeconfig: PathBuf,
    pub root_ca: PathBuf,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port()
}

impl Upstream {
    /// Starts both; `None`, and a word on stderr, where the peers are not there.
    pub async fn start(test: &str) -> Option<Self> {
        let Some(peers) = std::env::var_os("CORACLE_PEERS").map(PathBuf::from) else {
            eprintln!("SKIPPED: {test}: CORACLE_PEERS is not set");
            return None;
        };
        for peer in ["etcd", "kube-apiserver"] {
            if !peers.join(peer).exists() {
                eprintln!("SKIPPED: {test}: {} is not there", peers.join(peer).display());
                return None;
            }
        }
        let dir = tempfile::tempdir().expect("tempdir");
        let path = |name: &str| dir.path().join(name);
        let key = rcgen::KeyPair::generate().expect("key");
        std::fs::write(path("sa.key"), key.serialize_pem()).expect("write");
        std::fs::write(path("sa.pub"), key.public_key_pem()).expect("write");
        std::fs::write(path("tokens.csv"), format!("{ADMIN_TOKEN},admin,admin,system:masters\n")).expect("write");
        let (client, peer, api) = (free_port(), free_port(), free_port());
        let etcd_config = format!(
            "data-dir: {}\nlisten-client-urls: http://127.0.0.1:{client}\nadvertise-client-urls: http://127.0.0.1:{client}\n\
             listen-peer-urls: http://127.0.0.1:{peer}\ninitial-advertise-peer-urls: http://127.0.0.1:{peer}\n\
             initial-cluster: default=http://127.0.0.1:{peer}\nunsafe-no-fsync: true\nlog-level: error\n",
            path("etcd").display()
        );
        std::fs::write(path("etcd.yaml"), etcd_config).expect("write");
        let log = |name: &str| Stdio::from(std::fs::File::create(path(name)).expect("log"));
        let etcd = Command::new(peers.join("etcd"))
            .arg(format!("--config-file={}", path("etcd.yaml").display()))
            .stdout(Stdio::null())
            .stderr(log("etcd.log"))
            .spawn()
            .expect("start etcd");
        let file = |name: &str| path(name).display().to_string();
        let apiserver = Command::new(peers.join("kube-apiserver"))
            .args([
                format!("--etcd-servers=http://127.0.0.1:{client}"),
                format!("--secure-port={api}"),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
                format!("--cert-dir={}", file("certs")),
                format!("--token-auth-file={}", file("tokens.csv")),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={}", file("sa.pub")),
                format!("--service-account-signing-key-file={}", file("sa.key")),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            ])
            .stdout(Stdio::null())
            .stderr(log("apiserver.log"))
            .spawn()
            .expect("start kube-apiserver");
        let kubeconfig = path("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster:\n    server: https://127.0.0.1:{api}\n    \
             insecure-skip-tls-verify: true\nusers:\n- name: u\n  user:\n    token: {ADMIN_TOKEN}\ncontexts:\n- name: c\n  context:\n    \
             cluster: c\n    user: u\n"
        );
        std::fs::write(&kubeconfig, text).expect("write");
        let root_ca = path("certs").join("apiserver.crt");
        let upstream = Self { processes: vec![etcd, apiserver], kubeconfig, root_ca, dir };
        upstream.wait_ready().await;
        Some(upstream)
    }

    pub async fn client(&self) -> kube::Client {
        client::connect(&self.kubeconfig, "test").await.expect("client")
    }

    async fn wait_ready(&self) {
        let client = self.client().await;
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let request = http::Request::get("/readyz").body(Vec::new()).expect("request");
            if client.request_text(request).await.is_ok_and(|answer| answer == "ok") {
                return;
            }
            assert!(Instant::now() < deadline, "kube-apiserver is not ready:\n{}", self.log("apiserver.log"));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Asks again until the answer is there.
pub async fn eventually<T, F, Fut>(what: &str, seconds: u64, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
