//! Starts shims: by the keeper, which thereby is the subreaper of all of them.
//!
//! Source: containerd v2.4.2, `core/runtime/v2/{binary,shim}.go`; `reference/seams/shim.md`.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::{Arc, Mutex as SyncMutex};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use prost::Message;
use protocols::shim::bootstrap::v1::{BootstrapParams, BootstrapResult, Extension};
use protocols::shim::coracle;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::{CallError, Client, NAMESPACE};
use crate::error::{Error, Result};
use crate::handler::{Handler, Sandboxer};
use crate::state::lock;

/// `start` and `delete` of any shim.
const COMMAND: Duration = Duration::from_secs(30);
/// How long a keeper that was just started may take to listen.
const KEEPER_START: Duration = Duration::from_secs(10);

/// Where a shim listens; kept on disk to find it again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedShim {
    /// Version of the Task service.
    pub version: i32,
    /// `unix://PATH`.
    pub address: String,
}

impl StartedShim {
    /// The path of its socket.
    pub fn socket(&self) -> &str {
        self.address.strip_prefix("unix://").unwrap_or(&self.address)
    }
}

/// How this server starts shims.
#[derive(Debug)]
pub struct Launcher {
    /// The executable of our own shim and of the keeper.
    pub shim: Utf8PathBuf,
    /// This server's CRI socket.
    pub address: Utf8PathBuf,
    /// Where shims send events.
    pub events: Utf8PathBuf,
    /// Where shims' sockets are put.
    pub sockets: Utf8PathBuf,
    /// Where the OCI runtime keeps its state.
    pub runtime_root: Utf8PathBuf,
    /// The keeper's directory.
    pub state: Utf8PathBuf,
    keeper: Mutex<Option<Arc<Client>>>,
    /// Shims whose `start` takes the runtime's options and no BootstrapParams.
    options_only: SyncMutex<BTreeSet<Utf8PathBuf>>,
}

impl Launcher {
    /// A launcher with our own `shim`, whose sockets and state lie below `state`.
    pub fn new(shim: Utf8PathBuf, address: &Utf8Path, state: &Utf8Path) -> Self {
        Self {
            shim,
            address: address.to_owned(),
            events: state.join("events.sock"),
            sockets: state.join("s"),
            runtime_root: state.join("oci"),
            state: state.to_owned(),
            keeper: Mutex::new(None),
            options_only: SyncMutex::default(),
        }
    }

    /// Starts a shim for the bundle, or finds the one that serves it already.
    ///
    /// # Errors
    /// [`Error::ShimStart`] with what the shim said.
    pub async fn start(&self, handler: &Handler, id: &str, bundle: &Utf8Path) -> Result<StartedShim> {
        let failed = |reason: String| Error::ShimStart { id: id.to_owned(), reason };
        let options = self.options(handler).map(|options| options.encode_to_vec()).unwrap_or_default();
        if lock(&self.options_only).contains(&handler.shim) {
            return self.run_start(handler, id, bundle, options).await.map_err(failed);
        }
        let first = match self.run_start(handler, id, bundle, self.bootstrap_params(handler, id).encode_to_vec()).await {
            Ok(started) => return Ok(started),
            Err(reason) if handler.sandboxer == Sandboxer::Shim => return Err(failed(reason)),
            Err(reason) => reason,
        };
        // containerd 1.6's cannot read BootstrapParams, and says so in no way that others do not. It has undone what it began.
        match self.run_start(handler, id, bundle, options).await {
            Ok(started) => {
                lock(&self.options_only).insert(handler.shim.clone());
                Ok(started)
            }
            Err(second) => Err(failed(format!("{first}; and with its options alone: {second}"))),
        }
    }

    async fn run_start(&self, handler: &Handler, id: &str, bundle: &Utf8Path, stdin: Vec<u8>) -> std::result::Result<StartedShim, String> {
        let keeper = self.ensure_keeper().await.map_err(|error| error.chain())?;
        let request = coracle::StartShimRequest {
            binary: handler.shim.to_string(),
            namespace: NAMESPACE.to_owned(),
            id: id.to_owned(),
            bundle: bundle.to_string(),
            address: self.address.to_string(),
            env: self.environment(),
            stdin,
            debug: false,
            publish_binary: self.publish_binary(),
        };
        let answer: coracle::StartShimResponse =
            keeper.call(coracle::KEEPER_SERVICE, "StartShim", &request, Some(COMMAND)).await.map_err(|error| error.to_string())?;
        if answer.status != 0 {
            return Err(String::from_utf8_lossy(&answer.output).trim().to_owned());
        }
        parse_result(&answer.output)
    }

    /// Runs the shim's `delete`, which ends and removes whatever of the container is left.
    ///
    /// # Errors
    /// [`Error::ShimStart`] if it cannot be run or fails.
    pub async fn delete(&self, handler: &Handler, id: &str, bundle: &Utf8Path) -> Result<()> {
        let failed = |reason: String| Error::ShimStart { id: id.to_owned(), reason };
        let mut command = Command::new(&handler.shim);
        command
            .args(["-namespace", NAMESPACE, "-address", self.address.as_str(), "-publish-binary", &self.publish_binary()])
            .args(["-id", id, "-bundle", bundle.as_str(), "delete"])
            .current_dir(bundle)
            .env_clear()
            .envs(self.environment().iter().filter_map(|pair| pair.split_once('=')))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let output = tokio::time::timeout(COMMAND, command.output())
            .await
            .map_err(|_| failed("delete took too long".to_owned()))?
            .map_err(|error| failed(format!("failed to run {}: {error}", handler.shim)))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(format!("delete: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
    }

    fn publish_binary(&self) -> String {
        std::env::current_exe().map_or_else(|_| self.shim.to_string(), |path| path.display().to_string())
    }

    fn environment(&self) -> Vec<String> {
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        vec![
            format!("PATH={path}"),
            format!("TTRPC_ADDRESS={}", self.events),
            format!("GRPC_ADDRESS={}", self.address),
            format!("NAMESPACE={NAMESPACE}"),
            "MAX_SHIM_VERSION=3".to_owned(),
            format!("CORACLE_KEEPER={}", self.keeper_socket()),
        ]
    }

    /// The options that a handler's shim is given at `start` and with each task.
    pub fn options(&self, handler: &Handler) -> Option<prost_types::Any> {
        handler.options(&self.runtime_root)
    }

    fn bootstrap_params(&self, handler: &Handler, id: &str) -> BootstrapParams {
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            containerd_ttrpc_address: self.events.to_string(),
            containerd_grpc_address: self.address.to_string(),
            containerd_binary: self.publish_binary(),
            extensions: self.options(handler).map(|options| Extension { value: Some(options) }).into_iter().collect(),
            socket_dir: Some(self.sockets.to_string()),
            ..BootstrapParams::default()
        }
    }

    /// Where the keeper listens.
    pub(super) fn keeper_socket(&self) -> Utf8PathBuf {
        self.state.join("keeper.sock")
    }

    /// Connects to the keeper, and starts it first if there is none.
    ///
    /// # Errors
    /// [`Error::ShimStart`] if it does not come up.
    pub async fn ensure_keeper(&self) -> Result<Arc<Client>> {
        let mut keeper = self.keeper.lock().await;
        if let Some(client) = keeper.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        if let Ok(stream) = UnixStream::connect(self.keeper_socket()).await {
            return Ok(Arc::clone(keeper.insert(Arc::new(Client::new(stream, NAMESPACE)))));
        }
        let failed = |reason: String| Error::ShimStart { id: "keeper".to_owned(), reason };
        let log = self.state.join("keeper.log");
        let log = std::fs::File::options().create(true).append(true).open(&log).map_err(Error::io("open", &log))?;
        let mut child = Command::new(&self.shim)
            .args(["keeper", "--state", self.state.as_str()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // A process group of its own: Ctrl-C in the server's terminal is not for it.
            .process_group(0)
            .spawn()
            .map_err(|error| failed(format!("failed to run {}: {error}", self.shim)))?;
        let deadline = tokio::time::Instant::now() + KEEPER_START;
        loop {
            if let Ok(stream) = UnixStream::connect(self.keeper_socket()).await {
                return Ok(Arc::clone(keeper.insert(Arc::new(Client::new(stream, NAMESPACE)))));
            }
            if let Ok(Some(status)) = child.try_wait()
                && !status.success()
            {
                return Err(failed(format!("the keeper ended with {status}; its words are in {}/keeper.log", self.state)));
            }
            if tokio::time::Instant::now() > deadline {
                return Err(failed(format!("the keeper does not listen on {}", self.keeper_socket())));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The keeper's pid, if one answers.
    pub async fn keeper_pid(&self) -> Option<u32> {
        let stream = UnixStream::connect(self.keeper_socket()).await.ok()?;
        let client = Client::new(stream, NAMESPACE);
        let info: Result<coracle::KeeperInfoResponse, CallError> =
            client.call(coracle::KEEPER_SERVICE, "Info", &coracle::KeeperInfoRequest {}, Some(Duration::from_secs(2))).await;
        info.ok().map(|info| info.pid)
    }
}

/// Reads what `start` printed: protobuf BootstrapResult, JSON, or a plain address.
fn parse_result(output: &[u8]) -> std::result::Result<StartedShim, String> {
    #[derive(Deserialize)]
    struct Json {
        version: i32,
        address: String,
        protocol: String,
    }
    if let Ok(text) = std::str::from_utf8(output) {
        let text = text.trim();
        if text.starts_with("unix://") || text.starts_with('/') {
            return Ok(StartedShim { version: 2, address: text.to_owned() });
        }
        if let Ok(json) = serde_json::from_str::<Json>(text) {
            return checked(json.version, json.address, &json.protocol);
        }
    }
    match BootstrapResult::decode(output) {
        Ok(result) => checked(result.version, result.address, &result.protocol),
        Err(_) => Err(format!("its answer is not an address: {:?}", String::from_utf8_lossy(output))),
    }
}

fn checked(version: i32, address: String, protocol: &str) -> std::result::Result<StartedShim, String> {
    if protocol != "ttrpc" && !protocol.is_empty() {
        return Err(format!("it speaks {protocol}, only ttrpc is implemented"));
    }
    if address.is_empty() {
        return Err("its answer has no address".to_owned());
    }
    Ok(StartedShim { version, address })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_answers_of_start_are_read() {
        let shim = |version| StartedShim { version, address: "unix:///s/1".to_owned() };
        assert_eq!(parse_result(b"unix:///s/1\n"), Ok(shim(2)));
        assert_eq!(parse_result(br#"{"version":3,"address":"unix:///s/1","protocol":"ttrpc"}"#), Ok(shim(3)));
        let result = BootstrapResult { version: 3, address: "unix:///s/1".into(), protocol: "ttrpc".into(), ..BootstrapResult::default() };
        assert_eq!(parse_result(&result.encode_to_vec()), Ok(shim(3)));
    }

    #[test]
    fn other_answers_are_refused() {
        for output in [&b""[..], b"panic: no", br#"{"version":3,"address":"vsock://1","protocol":"grpc"}"#] {
            assert!(parse_result(output).is_err(), "{:?}", String::from_utf8_lossy(output));
        }
    }
}
