//! Two API servers side by side, ours and the real one, with one set of keys; and a client that asks either.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};

use crate::http::{Answer, Client, Request};
use crate::{ours, peer};

/// How long a server may take to be ready.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A running server; ended when dropped.
pub struct Server {
    name: &'static str,
    address: SocketAddr,
    client: Client,
    processes: Vec<Child>,
    keys: PathBuf,
    /// The URL of its etcd.
    etcd: Option<String>,
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Makes the keys of both servers in `folder`. The client is in `system:masters`, which both know.
pub fn make_keys(folder: &Path) -> Result<()> {
    let write = |name: &str, text: String| fs::write(folder.join(name), text).with_context(|| format!("failed to write {name}"));
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "ca");
    write("ca.crt", ca.self_signed(&ca_key)?.pem())?;
    let issuer = Issuer::new(ca, ca_key);
    for (name, organization) in [("server", None), ("client", Some("system:masters"))] {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        match organization {
            Some(organization) => params.distinguished_name.push(DnType::OrganizationName, organization),
            None => params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into())),
        }
        let usage = if organization.is_some() { ExtendedKeyUsagePurpose::ClientAuth } else { ExtendedKeyUsagePurpose::ServerAuth };
        params.extended_key_usages = vec![usage];
        write(&format!("{name}.crt"), params.signed_by(&key, &issuer)?.pem())?;
        write(&format!("{name}.key"), key.serialize_pem())?;
    }
    let account = KeyPair::generate()?;
    write("sa.key", account.serialize_pem())?;
    write("sa.pub", account.public_key_pem())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context("failed to find a free port")?.port())
}

fn spawn(folder: &Path, name: &str, program: &Path, arguments: &[String]) -> Result<Child> {
    let log = File::create(folder.join(format!("{name}.log"))).context("failed to create a log")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("failed to run {}", program.display()))
}

fn common_flags(folder: &Path, port: u16) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    vec![
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=192.0.2.1".to_owned(),
        format!("--secure-port={port}"),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        "--service-account-issuer=https://issuer.test".to_owned(),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
    ]
}

/// Starts `coracle apiserver`.
pub fn start_ours(folder: &Path) -> Result<Server> {
    let port = free_port()?;
    let mut flags = vec!["apiserver".to_owned(), format!("--data-dir={}", folder.join("store").display())];
    flags.extend(common_flags(folder, port));
    let process = spawn(folder, "coracle", &ours("coracle")?, &flags)?;
    Server::new("coracle", port, vec![process], folder)
}

/// Starts `coracle apiserver` on the etcd of another server, beside its keys.
pub fn start_ours_on_etcd(folder: &Path, other: &Server) -> Result<Server> {
    let etcd = other.etcd.as_ref().context("the other server has no etcd")?;
    start_ours_at(folder, "coracle-on-etcd", etcd, "/coracle")
}

/// Starts `coracle apiserver` on the etcd at a URL.
pub fn start_ours_at(folder: &Path, name: &'static str, etcd: &str, prefix: &str) -> Result<Server> {
    let port = free_port()?;
    let mut flags = vec!["apiserver".to_owned(), format!("--etcd-servers={etcd}"), format!("--etcd-prefix={prefix}")];
    flags.extend(common_flags(folder, port));
    let process = spawn(folder, name, &ours("coracle")?, &flags)?;
    Server::new(name, port, vec![process], folder)
}

/// A process that is ended when dropped.
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `coracle PART` as a client of a server, with the client's certificate.
pub fn start_part(folder: &Path, name: &str, server: &Server, arguments: &[&str]) -> Result<Running> {
    let file = |name: &str| folder.join(name).display().to_string();
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'https://{}', certificate-authority: {}}}}}]\n\
         users: [{{name: u, user: {{client-certificate: {}, client-key: {}}}}}]\n",
        server.address,
        file("ca.crt"),
        file("client.crt"),
        file("client.key")
    );
    let path = folder.join(format!("{name}.kubeconfig"));
    fs::write(&path, kubeconfig).context("failed to write a kubeconfig")?;
    let mut all: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    all.push(format!("--kubeconfig={}", path.display()));
    spawn(folder, name, &ours("coracle")?, &all).map(Running)
}

/// Starts etcd, and answers its URL; `None` where it could not be built.
pub fn start_etcd(folder: &Path) -> Result<Option<(Running, String)>> {
    let Some(etcd) = peer("etcd") else { return Ok(None) };
    let (client, internal) = (free_port()?, free_port()?);
    fs::write(folder.join("etcd.yaml"), etcd_config(folder, client, internal)).context("failed to write etcd's configuration")?;
    let process = spawn(folder, "etcd", &etcd, &["--config-file=etcd.yaml".to_owned()])?;
    let url = format!("http://127.0.0.1:{client}");
    Ok(Some((Running(process), url)))
}

/// The configuration of an etcd that is alone, with its data in `folder`.
pub fn etcd_config(folder: &Path, client: u16, internal: u16) -> String {
    format!(
        "name: default\ndata-dir: {}\nlisten-client-urls: http://127.0.0.1:{client}\nadvertise-client-urls: http://127.0.0.1:{client}\n\
         listen-peer-urls: http://127.0.0.1:{internal}\ninitial-advertise-peer-urls: http://127.0.0.1:{internal}\n\
         initial-cluster: default=http://127.0.0.1:{internal}\n",
        folder.join("etcd").display()
    )
}

/// Starts etcd and kube-apiserver; `None` where they could not be built.
pub fn start_real(folder: &Path) -> Result<Option<Server>> {
    let (Some(etcd), Some(apiserver)) = (peer("etcd"), peer("kube-apiserver")) else { return Ok(None) };
    let (client, internal, port) = (free_port()?, free_port()?, free_port()?);
    fs::write(folder.join("etcd.yaml"), etcd_config(folder, client, internal)).context("failed to write etcd's configuration")?;
    let mut processes = vec![spawn(folder, "etcd", &etcd, &["--config-file=etcd.yaml".to_owned()])?];
    let mut flags = common_flags(folder, port);
    flags.extend([
        format!("--etcd-servers=http://127.0.0.1:{client}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
        "--allow-privileged=true".to_owned(),
    ]);
    processes.push(spawn(folder, "kube-apiserver", &apiserver, &flags)?);
    let mut server = Server::new("kube-apiserver", port, processes, folder)?;
    server.etcd = Some(format!("http://127.0.0.1:{client}"));
    Ok(Some(server))
}

impl Server {
    fn new(name: &'static str, port: u16, processes: Vec<Child>, keys: &Path) -> Result<Server> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let client = Client::new(address, keys)?;
        Server { name, address, client, processes, keys: keys.to_owned(), etcd: None }.wait()
    }

    fn wait(mut self) -> Result<Server> {
        let deadline = Instant::now() + TIMEOUT;
        // The last objects that a server makes for itself come after it is ready.
        let paths = ["/readyz", "/api/v1/namespaces/kube-node-lease", "/api/v1/namespaces/default/services/kubernetes"];
        let requests = paths.map(|path| Request { method: "GET", path, ..Request::default() });
        loop {
            if requests.iter().all(|request| self.ask(request).is_ok_and(|answer| answer.status == 200)) {
                return Ok(self);
            }
            if self.has_ended() || Instant::now() > deadline {
                let log = fs::read_to_string(self.keys.join(format!("{}.log", self.name))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                bail!("{} did not become ready:\n{}", self.name, lines[lines.len().saturating_sub(30)..].join("\n"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The folder of `ca.crt`, `client.crt` and `client.key`.
    pub fn keys(&self) -> &Path {
        &self.keys
    }

    /// Its processes.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.processes.iter().map(Child::id)
    }

    /// Whether one of its processes has ended.
    pub fn has_ended(&mut self) -> bool {
        self.processes.iter_mut().any(|process| process.try_wait().is_ok_and(|status| status.is_some()))
    }

    /// Asks, with the client's certificate.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.client.ask(request).with_context(|| format!("{} did not answer", self.name))
    }
}
