//! The runtime's server of exec and attach streams: its URLs are its only credential, so each works once and cannot be guessed.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::Cluster;
use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What the process prints.
const OUTPUT: &str = "the-output-of-exec";
/// URLs that are compared.
const URLS: usize = 8;
/// Least number of hexadecimal digits of a token: 128 bits.
const TOKEN_DIGITS_MIN: usize = 32;

/// Nothing is to be had without a URL that was given out.
pub fn closed(cluster: &Cluster, address: SocketAddr) -> Result<()> {
    let zeros = "0".repeat(64);
    for path in ["/", "/exec", "/exec/", "/attach/x", "/portforward/x", "/metrics", "/healthz", "/../exec/x", &format!("/exec/{zeros}")] {
        for upgrade in [false, true] {
            let head = ask(cluster, address, path, upgrade, None)?;
            ensure!([400, 404].contains(&head.status), "{path} (upgrade: {upgrade}) is answered with {}", head.status);
        }
    }
    Ok(())
}

/// A URL that was given out works once, for what it was given out for.
pub fn judge(cluster: &Cluster, pod: &Value) -> Result<()> {
    let id = pod.pointer("/status/containerStatuses/0/containerID").and_then(Value::as_str).context("the container has no id")?;
    let id = id.split_once("://").context("the container's id names no runtime")?.1;
    let urls = (0..URLS).map(|_| exec_url(cluster, id)).collect::<Result<Vec<_>>>()?;
    let mut tokens = BTreeSet::new();
    for url in &urls {
        let token = url.2.rsplit('/').next().unwrap_or_default();
        ensure!(token.len() >= TOKEN_DIGITS_MIN && token.bytes().all(|byte| byte.is_ascii_hexdigit()), "{token} can be guessed");
        tokens.insert(token.to_owned());
    }
    ensure!(tokens.len() == URLS, "two URLs have one token: {tokens:?}");
    // Every position differs somewhere: no part of a token is a counter, a time or a process' number.
    let constant = (0..TOKEN_DIGITS_MIN).filter(|at| tokens.iter().map(|token| token.as_bytes()[*at]).collect::<BTreeSet<_>>().len() == 1);
    ensure!(constant.count() <= 2, "the tokens are alike: {tokens:?}");

    let (_, address, path) = &urls[0];
    // Another use than the one that it was given out for.
    let attach = path.replace("/exec/", "/attach/");
    ensure!(ask(cluster, *address, &attach, true, None)?.status == 404, "{attach} attaches");
    let (_, address, path) = &urls[1];
    let first = ask(cluster, *address, path, true, Some(OUTPUT))?;
    ensure!(first.status == 101 && first.body.contains(OUTPUT), "a new URL gives {}: {}", first.status, first.body);
    let again = ask(cluster, *address, path, true, None)?;
    ensure!(again.status == 404, "a used URL gives {}", again.status);
    Ok(())
}

struct Head {
    status: u16,
    body: String,
}

/// Asks, with or without a WebSocket upgrade; reads on until `wanted` has come.
fn ask(cluster: &Cluster, address: SocketAddr, path: &str, upgrade: bool, wanted: Option<&str>) -> Result<Head> {
    let upgrade = if upgrade {
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n"
    } else {
        "Connection: close\r\n"
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{upgrade}\r\n");
    cluster.within(|| {
        let mut stream = TcpStream::connect(address).with_context(|| format!("failed to connect to {address}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(request.as_bytes()).context("failed to send a request")?;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n")
                && wanted.is_none_or(|wanted| body.contains(wanted) || !head.contains(" 101 "))
            {
                let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).context("no status")?;
                return Ok(Head { status, body: body.to_owned() });
            }
            let count = stream.read(&mut buffer).with_context(|| format!("no answer to GET {path}; so far {text:?}"))?;
            if count == 0 || Instant::now() > deadline {
                bail!("GET {path}: the answer is not whole: {text:?}");
            }
            bytes.extend_from_slice(&buffer[..count]);
        }
    })?
}

/// Asks the runtime for the URL of an exec: a gRPC call by curl, whose messages are small enough to be written by hand.
fn exec_url(cluster: &Cluster, container: &str) -> Result<(String, SocketAddr, String)> {
    let mut message = Vec::new();
    for (tag, text) in [(0x0a, container), (0x12, "echo"), (0x12, OUTPUT)] {
        message.extend([tag, u8::try_from(text.len())?]);
        message.extend(text.as_bytes());
    }
    // stdout: true.
    message.extend([0x28, 1]);
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len())?.to_be_bytes());
    frame.extend(message);
    let file = cluster.folder().join("exec-request");
    fs::write(&file, frame).context("failed to write a request")?;
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "20", "--http2-prior-knowledge", "--unix-socket"]).arg(cluster.cri_socket());
    curl.args(["--header", "Content-Type: application/grpc", "--header", "TE: trailers", "--data-binary"])
        .arg(format!("@{}", file.display()));
    let output = curl.arg("http://localhost/runtime.v1.RuntimeService/Exec").output().context("failed to run curl")?;
    ensure!(output.status.success(), "Exec: curl ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let url = text.find("http://").map(|at| text[at..].trim().to_owned()).with_context(|| format!("Exec gives no URL: {text:?}"))?;
    let rest = url.trim_start_matches("http://");
    let (address, path) = rest.split_once('/').with_context(|| format!("{url} has no path"))?;
    let address = address.parse().with_context(|| format!("{url} has no address"))?;
    let path = format!("/{path}");
    Ok((url, address, path))
}
