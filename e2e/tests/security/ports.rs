//! Every port and unix socket, found by listing, and what it says to somebody without a credential.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use e2e::api::Credential;
use e2e::cluster::Cluster;

use crate::{Case, case, streams, together, token_of, try_all};

/// The registry of the tests, which is no part of the cluster.
const REGISTRY_PORT: u16 = 5000;
/// A user who is not root.
const NOBODY: &str = "65534";
/// The exit code of curl when a connection is refused.
const CURL_NO_CONNECTION: i32 = 7;
/// A token that nobody signed.
const FORGED: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6a3ViZS1zeXN0ZW06YWRtaW4ifQ.AAAA";

/// A row of the table: what listens where, and what it must say.
struct Row {
    name: &'static str,
    is: fn(&SocketAddr) -> bool,
    judge: fn(&Cluster, SocketAddr) -> Result<()>,
}

const ROWS: [Row; 5] = [
    Row { name: "apiserver", is: |address| address.port() == 6443, judge: apiserver },
    Row { name: "kubelet", is: |address| address.port() == 10250, judge: kubelet },
    Row { name: "kube-proxy's health", is: |address| address.port() == 10256, judge: proxy_health },
    Row {
        name: "registry of the test",
        is: |address| address.port() == REGISTRY_PORT && address.ip() == Ipv4Addr::LOCALHOST,
        judge: |_, _| Ok(()),
    },
    // Its port is the kernel's choice; no other server listens on such a port.
    Row { name: "CRI streams", is: |address| address.ip() == Ipv4Addr::LOCALHOST && address.port() >= 32768, judge: streams::closed },
];

/// Judges every TCP and UDP socket of the cluster's network namespace.
pub fn judge(cluster: &Cluster) -> Result<()> {
    let sockets = cluster.sockets()?;
    ensure!(sockets.udp.is_empty(), "UDP sockets without a row: {:?}", sockets.udp);
    let mut outcomes = Vec::new();
    let mut seen = Vec::new();
    for address in &sockets.tcp {
        let Some(row) = ROWS.iter().find(|row| (row.is)(address)) else {
            outcomes.push(Err(anyhow::anyhow!("{address} has no row")));
            continue;
        };
        println!("{address}: {}", row.name);
        seen.push(row.name);
        outcomes.push((row.judge)(cluster, *address).with_context(|| format!("{} at {address}", row.name)));
    }
    for row in &ROWS {
        let count = seen.iter().filter(|name| **name == row.name).count();
        outcomes.push(if count == 1 { Ok(()) } else { Err(anyhow::anyhow!("{} listens {count} times", row.name)) });
    }
    together(outcomes)
}

fn apiserver(cluster: &Cluster, _: SocketAddr) -> Result<()> {
    let closed = |status: u16| -> Vec<Case> {
        let mut cases: Vec<Case> = [
            "/",
            "/api",
            "/apis",
            "/api/v1",
            "/apis/apps/v1",
            "/openapi/v3",
            "/openapi/v2",
            "/metrics",
            "/logs",
            "/configz",
            "/debug/pprof",
            "/api/v1/namespaces",
            "/api/v1/secrets",
            "/api/v1/namespaces/default/secrets/used",
            "/api/v1/secrets?watch=true",
            "/api/v1/namespaces/default/pods/user/log",
            "/api/v1/namespaces/default/pods/user/exec?command=id&stdout=true",
            "/api/v1/nodes/elsewhere/proxy/pods",
            "/.well-known/openid-configuration",
            "/openid/v1/jwks",
            "/nowhere",
            // What must not be taken for one of the open paths.
            "/healthz/../api/v1/secrets",
            "/livez/%2e%2e/%2e%2e/api/v1/secrets",
            "//api/v1/secrets",
            "/healthzz",
            "/versions",
            "/api/v1/secrets?/healthz",
            "/api/v1/namespaces/healthz/secrets",
        ]
        .map(|path| case("GET", path, status))
        .to_vec();
        cases.push(Case { body: "{}".to_owned(), ..case("POST", "/api/v1/namespaces/default/pods", status) });
        cases.push(Case { body: "{}".to_owned(), ..case("PUT", "/api/v1/namespaces/default/secrets/used", status) });
        cases.push(Case { body: "{}".to_owned(), ..case("PATCH", "/api/v1/nodes/elsewhere", status) });
        cases.push(case("DELETE", "/api/v1/namespaces/default/secrets", status));
        cases
    };
    let open = ["/livez", "/readyz", "/healthz", "/livez/ping", "/readyz?verbose", "/version"].map(|path| case("GET", path, 200));
    // A path below an open one is open, and names no resource.
    let climbing = |cases: Vec<Case>| -> Vec<Case> { cases.into_iter().filter(|case| !below_an_open_path(&case.path)).collect() };
    let dots: Vec<Case> = closed(404).into_iter().filter(|case| below_an_open_path(&case.path)).collect();
    let api = cluster.api();
    let nobody = api.with(Credential::None);
    together([
        try_all("nobody", &nobody, &climbing(closed(401))),
        try_all("nobody, at open paths", &nobody, &open),
        try_all("nobody, climbing out of open paths", &nobody, &dots),
        try_all("a forged token", &api.with(Credential::Token(FORGED.to_owned())), &climbing(closed(401))),
        try_all("no token but a word", &api.with(Credential::Token("word".to_owned())), &climbing(closed(401))),
    ])
}

fn below_an_open_path(path: &str) -> bool {
    ["/healthz/", "/livez/"].iter().any(|open| path.starts_with(open))
}

/// Open as upstream's: whether the proxy is healthy, and nothing else.
fn proxy_health(cluster: &Cluster, _: SocketAddr) -> Result<()> {
    for (path, wanted) in [("/healthz", "200"), ("/livez", "200"), ("/metrics", "404"), ("/configz", "404"), ("/debug/pprof/", "404")] {
        let url = format!("http://127.0.0.1:10256{path}");
        let output = cluster.run(Path::new("curl"), &["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", &url], "")?;
        let status = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(status == wanted, "GET {path}: {status}, not {wanted}");
    }
    Ok(())
}

fn kubelet(cluster: &Cluster, _: SocketAddr) -> Result<()> {
    let cases = |status: u16| -> Vec<Case> {
        let mut cases: Vec<Case> = [
            "/",
            "/healthz",
            "/pods",
            "/runningpods/",
            "/stats/summary",
            "/metrics",
            "/metrics/cadvisor",
            "/metrics/resource",
            "/configz",
            "/logs/",
            "/containerLogs/default/user/main",
            "/exec/default/user/main?command=id&output=1",
            "/attach/default/user/main?output=1",
            "/portForward/default/user",
            "/debug/pprof/",
            "/checkpoint/default/user/main",
            "/nowhere",
        ]
        .map(|path| case("GET", path, status))
        .to_vec();
        cases.push(case("POST", "/exec/default/user/main?command=id&output=1", status));
        cases.push(case("POST", "/run/default/user/main?cmd=id", status));
        cases
    };
    let api = cluster.api();
    let port = api.at("https://127.0.0.1:10250");
    let pods_own = Credential::Token(token_of(&api, "default", "default")?);
    let client = port.as_component("apiserver-kubelet-client");
    together([
        try_all("nobody at the kubelet", &port.with(Credential::None), &cases(401)),
        try_all("a forged token at the kubelet", &port.with(Credential::Token(FORGED.to_owned())), &cases(401)),
        try_all("a server's certificate at the kubelet", &port.as_component("apiserver"), &cases(401)),
        try_all("a pod at the kubelet", &port.with(pods_own), &cases(403)),
        try_all("the scheduler at the kubelet", &port.as_component("kube-scheduler"), &cases(403)),
        try_all("the kubelet's own credential at the kubelet", &port.as_component("kubelet"), &cases(403)),
        try_all("the API server at the kubelet", &client, &["/healthz", "/pods", "/stats/summary"].map(|path| case("GET", path, 200))),
    ])
}

/// Judges every unix socket of the cluster's network namespace: none is abstract, each is root's alone.
pub fn judge_unix(cluster: &Cluster) -> Result<()> {
    let sockets = cluster.sockets()?.unix;
    // One at least of each sort, so that a listing that sees nothing does not pass.
    let sorts = ["cri.sock", "keeper.sock", "events", "/s/"];
    for sort in sorts {
        ensure!(sockets.iter().any(|name| name.contains(sort)), "no socket is called {sort}: {sockets:?}");
    }
    together(sockets.iter().map(|name| root_only(cluster, name, &sorts).with_context(|| format!("unix socket {name}"))))
}

fn root_only(cluster: &Cluster, name: &str, sorts: &[&str]) -> Result<()> {
    ensure!(!name.starts_with('@'), "is abstract: whoever shares the host's network namespace reaches it");
    ensure!(sorts.iter().any(|sort| name.contains(sort)), "has no row");
    let path = Path::new(name);
    let metadata = fs::metadata(path).context("cannot be seen")?;
    let mode = metadata.permissions().mode() & 0o777;
    ensure!(metadata.uid() == 0 && metadata.gid() == 0, "belongs to {}:{}", metadata.uid(), metadata.gid());
    ensure!(mode & 0o077 == 0, "is open to others: mode {mode:o}");
    println!("{name}: mode {mode:o}, root's");
    for (user, may) in [(NOBODY, false), ("0", true)] {
        let setpriv = cluster.enter(Path::new("setpriv"));
        let mut command = Command::new(setpriv.get_program());
        command.args(setpriv.get_args()).args(["--reuid", user, "--regid", user, "--clear-groups", "--"]);
        command.args(["curl", "--silent", "--http0.9", "--max-time", "2", "--unix-socket", name, "http://localhost/"]);
        let output = command.stdin(Stdio::null()).output().context("failed to run setpriv")?;
        let connected = output.status.code() != Some(CURL_NO_CONNECTION);
        if connected != may {
            bail!("user {user} could {}connect: {}", if connected { "" } else { "not " }, String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}
