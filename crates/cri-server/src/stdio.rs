//! Where a container's streams go: to a shim that writes logs itself (`cri-log://`, and `coracle.io.v1`), or through FIFOs that are
//! [pumped](crate::pump) here. Nothing else asks which it is.

use std::fs;
use std::sync::Arc;

use camino::Utf8Path;
use protocols::shim::coracle::AttachRequest;
use tokio::io::AsyncRead;
use tokio::net::unix::pipe;

use crate::error::{Error, Result};
use crate::exec::{Ends, Fifos, Reader, Streams};
use crate::host;
use crate::pump::{Pump, STREAMS};
use crate::server::Server;
use crate::shim::Shim;
use crate::state::{Container, lock};

/// The streams of Task.Create.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

fn log_of(container: &Container) -> &Utf8Path {
    Utf8Path::new(if container.log_path.is_empty() { "/dev/null" } else { &container.log_path })
}

impl Server {
    /// Makes what a container's streams need before it is created.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn open_stdio(&self, container: &Container, shim: &Shim) -> Result<Stdio> {
        let (log, io) = (log_of(container), container.dir.join("io"));
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent).map_err(Error::io("make directory", parent))?;
        }
        fs::create_dir_all(&io).map_err(Error::io("make directory", &io))?;
        let fifo = |name: &str| -> Result<String> {
            let path = io.join(name);
            linux::pipes::make_fifo(path.as_std_path(), 0o600).map_err(Error::io("make FIFO", &path))?;
            Ok(path.into_string())
        };
        let stdin = if container.config.stdin { fifo("stdin")? } else { String::new() };
        let streams = if container.config.tty { &STREAMS[..1] } else { &STREAMS[..] };
        let mut outputs = Vec::new();
        for name in streams {
            outputs.push(if shim.writes_logs() { format!("cri-log://{log}") } else { fifo(name)? });
        }
        if !shim.writes_logs() {
            self.start_pump(container).await?;
        }
        let mut outputs = outputs.into_iter();
        Ok(Stdio { stdin, stdout: outputs.next().unwrap_or_default(), stderr: outputs.next().unwrap_or_default() })
    }

    async fn start_pump(&self, container: &Container) -> Result<()> {
        let dir = container.dir.join("io");
        let (pump, ends) = Pump::start(&dir, log_of(container)).map_err(Error::io("read the output of a container from", &dir))?;
        *lock(&container.pump) = Some(Arc::new(pump));
        if let Err(error) = self.launcher.keep(&ends).await {
            tracing::warn!(container_id = container.id, %error, "the keeper does not hold a container's output");
        }
        Ok(())
    }

    /// Goes on with what a predecessor has pumped.
    pub async fn resume_output(&self, container: &Container) {
        if container.dir.join("io").join(STREAMS[0]).exists()
            && let Err(error) = self.start_pump(container).await
        {
            tracing::error!(container_id = container.id, error = error.chain(), "the output of a container is not read");
        }
    }

    /// Takes the rest of the output of a container that has ended, whose task is deleted: nobody writes to its streams any more.
    pub async fn finish_output(&self, container: &Container) {
        let Some(pump) = lock(&container.pump).take() else { return };
        pump.finish().await;
        let dir = container.dir.join("io");
        for name in STREAMS {
            let _ = fs::remove_file(dir.join(name));
        }
        self.launcher.let_go(&format!("{dir}/")).await;
    }

    /// Opens a container's log anew under its path, after a rotation.
    ///
    /// # Errors
    /// [`Error::State`] if it does not run; [`Error::Shim`], [`Error::Io`].
    pub async fn reopen_log(&self, container: &Container) -> Result<()> {
        let shim = self.running(container)?;
        let pump = lock(&container.pump).clone();
        match pump {
            Some(pump) => pump.reopen().await.map_err(Error::io("open", &container.log_path)),
            None => shim.reopen_log(&container.id).await.map_err(Error::shim("reopen the log of container", &container.id)),
        }
    }

    /// Our ends of a running container's streams, from now on.
    ///
    /// # Errors
    /// [`Error::Shim`], [`Error::Io`].
    pub async fn open_attach(&self, container: &Container, shim: &Shim, streams: Streams) -> Result<(Option<Fifos>, Ends)> {
        let pump = lock(&container.pump).clone();
        let Some(pump) = pump else {
            let (fifos, ends) = Fifos::make(container.dir.join("io").join(host::new_id()?), streams)?;
            let (id, stdin, stdout, stderr) = (container.id.clone(), fifos.stdin.clone(), fifos.stdout.clone(), fifos.stderr.clone());
            shim.attach(&AttachRequest { id, stdin, stdout, stderr }).await.map_err(Error::shim("attach to container", &container.id))?;
            return Ok((Some(fifos), ends));
        };
        let stdin = if streams.stdin {
            let path = container.dir.join("io/stdin");
            // Open for both, as the ends of an exec.
            Some(pipe::OpenOptions::new().read_write(true).open_sender(&path).map_err(Error::io("open", &path))?)
        } else {
            None
        };
        let [stdout, stderr] = pump.attach().await;
        let boxed = |reader: Option<tokio::io::DuplexStream>, wanted: bool| reader.filter(|_| wanted).map(box_reader);
        Ok((None, Ends { stdin, stdout: boxed(stdout, streams.stdout), stderr: boxed(stderr, streams.stderr) }))
    }
}

/// Any reader as a stream's end.
pub fn box_reader(reader: impl AsyncRead + Send + Unpin + 'static) -> Reader {
    Box::new(reader)
}
