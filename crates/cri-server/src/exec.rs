//! ExecSync, and the process behind an exec stream: FIFOs of our own, and the shim's Task.Exec.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use camino::Utf8PathBuf;
use protocols::cri::v1::{ExecSyncRequest, ExecSyncResponse};
use protocols::shim::task::v3::ExecProcessRequest;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::container::read_spec;
use crate::error::{Error, Result};
use crate::host;
use crate::sandbox::remove_dir;
use crate::server::Server;
use crate::shim::Shim;
use crate::spec::signal::SIGKILL;
use crate::state::{Container, ContainerState, lock};
use crate::stdio::box_reader;

/// Output of ExecSync beyond this is thrown away, in bytes of each stream, as containerd's.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// How long output may follow a process' end (a child of it may hold the streams).
pub const DRAIN: Duration = Duration::from_secs(10);

/// Which streams a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// The end of an output stream that is read here.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// Our ends of a process' streams.
#[derive(Default)]
pub struct Ends {
    pub stdin: Option<pipe::Sender>,
    pub stdout: Option<Reader>,
    pub stderr: Option<Reader>,
}

/// FIFOs in a directory of their own, which is removed with them.
#[derive(Debug)]
pub struct Fifos {
    dir: Utf8PathBuf,
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

impl Fifos {
    /// Makes those that are asked for, and opens our ends.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left then.
    pub fn make(dir: Utf8PathBuf, streams: Streams) -> Result<(Self, Ends)> {
        fs::create_dir_all(&dir).map_err(Error::io("make directory", &dir))?;
        let mut fifos = Self { dir, stdin: String::new(), stdout: String::new(), stderr: String::new() };
        let make = |wanted: bool, name: &str| -> Result<String> {
            if !wanted {
                return Ok(String::new());
            }
            let path = fifos.dir.join(name);
            linux::pipes::make_fifo(path.as_std_path(), 0o600).map_err(Error::io("make FIFO", &path))?;
            Ok(path.into_string())
        };
        let stdin = make(streams.stdin, "stdin")?;
        let stdout = make(streams.stdout, "stdout")?;
        let stderr = make(streams.stderr && !streams.tty, "stderr")?;
        (fifos.stdin, fifos.stdout, fifos.stderr) = (stdin, stdout, stderr);
        let ends = fifos.open()?;
        Ok((fifos, ends))
    }

    fn open(&self) -> Result<Ends> {
        let reader = |path: &String| -> Result<Option<Reader>> {
            if path.is_empty() {
                return Ok(None);
            }
            let opened = pipe::OpenOptions::new().open_receiver(path).map_err(Error::io("open", path))?;
            Ok(Some(box_reader(opened)))
        };
        let stdin = if self.stdin.is_empty() {
            None
        } else {
            // Open for both, so that it does not matter who comes first.
            Some(pipe::OpenOptions::new().read_write(true).open_sender(&self.stdin).map_err(Error::io("open", &self.stdin))?)
        };
        Ok(Ends { stdin, stdout: reader(&self.stdout)?, stderr: reader(&self.stderr)? })
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if let Err(error) = remove_dir(&self.dir) {
            tracing::warn!(error = error.chain(), "failed to remove FIFOs");
        }
    }
}

/// A process that was put into a container. It must be [finished](Exec::finish).
#[derive(Debug)]
pub struct Exec {
    pub shim: Arc<Shim>,
    pub container_id: String,
    pub id: String,
    wait: JoinHandle<std::result::Result<crate::shim::Exit, crate::shim::CallError>>,
    _fifos: Fifos,
}

impl Exec {
    /// Waits for its end; cancel-safe.
    ///
    /// # Errors
    /// [`Error::Shim`] if the shim is gone.
    pub async fn wait(&mut self) -> Result<u32> {
        let exit = (&mut self.wait).await.map_err(|_| Error::ShuttingDown)?;
        exit.map(|exit| exit.status).map_err(Error::shim("wait for a process in container", &self.container_id))
    }

    /// Ends it.
    pub async fn kill(&self) {
        if let Err(error) = self.shim.kill(&self.container_id, &self.id, SIGKILL, false).await
            && !error.is_not_found()
        {
            tracing::warn!(container_id = self.container_id, %error, "failed to kill a process of an exec");
        }
    }

    /// Removes it from the shim, after its end.
    pub async fn finish(self) {
        self.wait.abort();
        if let Err(error) = self.shim.delete(&self.container_id, &self.id).await {
            tracing::warn!(container_id = self.container_id, %error, "failed to delete a process of an exec");
        }
    }
}

impl Server {
    /// The shim of a container that runs.
    ///
    /// # Errors
    /// [`Error::State`] if it does not run.
    pub fn running(&self, container: &Container) -> Result<Arc<Shim>> {
        let refuse = |state| Error::State { kind: "container", id: container.id.clone(), state };
        match container.state() {
            ContainerState::Running { .. } => {}
            ContainerState::Exited(_) => return Err(refuse("exited")),
            _ => return Err(refuse("not running")),
        }
        let sandbox = self.registry(|registry| registry.sandbox(&container.sandbox_id))?;
        sandbox.shim().ok_or_else(|| Error::State { kind: "sandbox", id: sandbox.id.clone(), state: "without its shim" })
    }

    /// Starts a process in a container.
    ///
    /// # Errors
    /// [`Error::State`] if the container does not run; [`Error::Shim`] if the process cannot be started.
    pub async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, cmd: Vec<String>, streams: Streams) -> Result<(Exec, Ends)> {
        if cmd.is_empty() {
            return Err(Error::Invalid("cmd is empty".to_owned()));
        }
        let shim = self.running(container)?;
        let id = host::new_id()?;
        let mut process = read_spec(&container.bundle().join("config.json"))?.process;
        process.args = cmd;
        process.terminal = streams.tty;
        if streams.tty && !process.env.iter().any(|pair| pair.starts_with("TERM=")) {
            process.env.push("TERM=xterm".to_owned());
        }
        let json = serde_json::to_vec(&process).map_err(|error| Error::Invalid(error.to_string()))?;
        let (fifos, ends) = Fifos::make(container.dir.join("io").join(&id), streams)?;
        let request = ExecProcessRequest {
            id: container.id.clone(),
            exec_id: id.clone(),
            terminal: streams.tty,
            stdin: fifos.stdin.clone(),
            stdout: fifos.stdout.clone(),
            stderr: fifos.stderr.clone(),
            spec: None,
        };
        shim.exec(request, json).await.map_err(Error::shim("prepare a process in container", &container.id))?;
        let waiter = {
            let (shim, container_id, id) = (Arc::clone(&shim), container.id.clone(), id.clone());
            tokio::spawn(async move { shim.wait(&container_id, &id).await })
        };
        let exec = Exec { shim, container_id: container.id.clone(), id, wait: waiter, _fifos: fifos };
        if let Err(source) = exec.shim.start(&container.id, &exec.id).await {
            exec.finish().await;
            return Err(Error::Shim { act: "start a process in container", id: container.id.clone(), source });
        }
        Ok((exec, ends))
    }

    /// Runs a command to its end; `given_up` is the caller hanging up.
    ///
    /// # Errors
    /// As [`Server::start_exec`]; [`Error::Deadline`] if it took too long, and then it was killed.
    pub async fn exec_sync(self: &Arc<Self>, request: ExecSyncRequest, given_up: CancellationToken) -> Result<ExecSyncResponse> {
        let container = self.registry(|registry| registry.container(&request.container_id))?;
        let streams = Streams { stdout: true, stderr: true, ..Streams::default() };
        let (mut exec, ends) = self.start_exec(&container, request.cmd, streams).await?;
        let (stdout, stderr) = (Collector::of(ends.stdout), Collector::of(ends.stderr));
        let limit = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0);
        let deadline = async {
            match limit {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            status = exec.wait() => Some(status),
            () = deadline => None,
            () = given_up.cancelled() => None,
        };
        let Some(status) = ended else {
            exec.kill().await;
            let _ = tokio::time::timeout(DRAIN, exec.wait()).await;
            exec.finish().await;
            return Err(Error::Deadline { act: "a command in container", id: container.id.clone(), seconds: limit.unwrap_or(0) });
        };
        // Once it is deleted the shim has closed its ends of the FIFOs.
        exec.finish().await;
        let exit_code = i32::try_from(status?).unwrap_or(i32::MAX);
        Ok(ExecSyncResponse { stdout: stdout.drained().await, stderr: stderr.drained().await, exit_code })
    }
}

/// Reads an output stream while the command runs. Dropped, it reads no further.
struct Collector {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Collector {
    fn of(pipe: Option<Reader>) -> Self {
        let kept = Arc::default();
        Self { reader: tokio::spawn(collect(pipe, Arc::clone(&kept))), kept }
    }

    /// What the command wrote. A child that it left may hold the stream open: that is not waited for.
    async fn drained(mut self) -> Vec<u8> {
        let _ = tokio::time::timeout(DRAIN, &mut self.reader).await;
        std::mem::take(&mut lock(&self.kept))
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn collect(pipe: Option<Reader>, kept: Arc<Mutex<Vec<u8>>>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(count) = pipe.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        let mut kept = lock(&kept);
        let room = OUTPUT_BYTES_MAX - kept.len();
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
}
