//! An API server on loopback, in a directory of its own: the real kube-apiserver on a real etcd (from the folder
//! `CORACLE_PEERS`), and ours (from the folder `CORACLE_BIN`). Each program has its own certificate.
#![allow(dead_code)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// A running server with the files to reach it.
pub struct ApiServer {
    processes: Vec<Child>,
    dir: tempfile::TempDir,
    pub root_ca: PathBuf,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Which server, and the folder of its executables.
#[derive(Debug)]
pub enum Kind {
    Ours(PathBuf),
    Upstream(PathBuf),
}

/// The servers that are there; says on stderr which is not.
pub fn available(test: &str) -> Vec<Kind> {
    let folder = |name: &str, wanted: &[&str]| {
        let found = std::env::var_os(name).map(PathBuf::from);
        let found = found.filter(|folder| wanted.iter().all(|program| folder.join(program).is_file()));
        if found.is_none() {
            eprintln!("SKIPPED: {test}: {} not in the folder {name}", wanted.join(" and "));
        }
        found
    };
    let upstream = folder("CORACLE_PEERS", &["etcd", "kube-apiserver"]).map(Kind::Upstream);
    let ours = folder("CORACLE_BIN", &["coracle"]).map(Kind::Ours);
    upstream.into_iter().chain(ours).collect()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port()
}

/// Writes the authority, the keys of service accounts, a certificate and a kubeconfig for each program.
fn write_credentials(dir: &Path, api: u16, admin_group: &str) {
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).expect("write");
    let authority_key = KeyPair::generate().expect("key");
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca.crt", authority.self_signed(&authority_key).expect("certificate").pem());
    let authority = Issuer::new(authority, authority_key);
    let accounts = KeyPair::generate().expect("key");
    write("sa.key", accounts.serialize_pem());
    write("sa.pub", accounts.public_key_pem());
    let identities = [
        ("server", "kube-apiserver", None),
        ("admin", "kubernetes-admin", Some(admin_group)),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
    ];
    for (file, name, group) in identities {
        let key = KeyPair::generate().expect("key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("parameters");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        write(&format!("{file}.crt"), params.signed_by(&key, &authority).expect("certificate").pem());
        write(&format!("{file}.key"), key.serialize_pem());
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{api}"), "certificate-authority": dir.join("ca.crt")}}],
            "users": [{"name": "u", "user": {
                "client-certificate": dir.join(format!("{file}.crt")), "client-key": dir.join(format!("{file}.key"))}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        write(&format!("{file}.conf"), text.to_string());
    }
}

impl ApiServer {
    /// Starts one.
    pub async fn start(kind: &Kind) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let api = free_port();
        let processes = match kind {
            Kind::Ours(bin) => {
                write_credentials(dir.path(), api, "coracle:cluster-admins");
                vec![start_ours(&bin.join("coracle"), dir.path(), api)]
            }
            Kind::Upstream(peers) => {
                write_credentials(dir.path(), api, "system:masters");
                start_upstream(peers, dir.path(), api)
            }
        };
        let server = Self { processes, root_ca: dir.path().join("ca.crt"), dir };
        server.wait_ready().await;
        server
    }

    /// The kubeconfig of `admin`, `controller-manager` or `scheduler`.
    pub fn kubeconfig(&self, program: &str) -> String {
        self.dir.path().join(format!("{program}.conf")).display().to_string()
    }

    pub async fn client(&self) -> kube::Client {
        client::connect(Path::new(&self.kubeconfig("admin")), "test").await.expect("client")
    }

    async fn wait_ready(&self) {
        let client = self.client().await;
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let request = http::Request::get("/readyz").body(Vec::new()).expect("request");
            if client.request_text(request).await.is_ok_and(|answer| answer == "ok") {
                return;
            }
            let log = || std::fs::read_to_string(self.dir.path().join("apiserver.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the API server is not ready:\n{}", log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn shared_flags(dir: &Path, api: u16) -> Vec<String> {
    let file = |name: &str| dir.join(name).display().to_string();
    vec![
        format!("--secure-port={api}"),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
    ]
}

fn spawn(program: PathBuf, args: Vec<String>, log: PathBuf) -> Child {
    let log = std::fs::File::create(log).expect("log");
    Command::new(&program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", program.display()))
}

fn start_ours(coracle: &Path, dir: &Path, api: u16) -> Child {
    let mut args = vec!["apiserver".to_owned()];
    args.extend(shared_flags(dir, api));
    args.push(format!("--data-dir={}", dir.join("data").display()));
    spawn(coracle.to_owned(), args, dir.join("apiserver.log"))
}

fn start_upstream(peers: &Path, dir: &Path, api: u16) -> Vec<Child> {
    let (client, peer) = (free_port(), free_port());
    let etcd_config = serde_json::json!({
        "data-dir": dir.join("etcd"), "log-level": "error", "unsafe-no-fsync": true,
        "listen-client-urls": format!("http://127.0.0.1:{client}"),
        "advertise-client-urls": format!("http://127.0.0.1:{client}"),
        "listen-peer-urls": format!("http://127.0.0.1:{peer}"),
        "initial-advertise-peer-urls": format!("http://127.0.0.1:{peer}"),
        "initial-cluster": format!("default=http://127.0.0.1:{peer}"),
    });
    let config = dir.join("etcd.yaml");
    std::fs::write(&config, etcd_config.to_string()).expect("write");
    let etcd = spawn(peers.join("etcd"), vec![format!("--config-file={}", config.display())], dir.join("etcd.log"));
    let mut args = shared_flags(dir, api);
    args.extend([
        format!("--etcd-servers=http://127.0.0.1:{client}"),
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--cert-dir={}", dir.join("certs").display()),
        "--authorization-mode=Node,RBAC".to_owned(),
    ]);
    vec![etcd, spawn(peers.join("kube-apiserver"), args, dir.join("apiserver.log"))]
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
