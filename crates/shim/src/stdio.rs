//! The streams of a process: made before the runtime runs, joined to their other sides.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use linux::pipes::{self, Access};
use protocols::ttrpc::{RpcError, code};

use crate::daemon::Shim;
use crate::job::Ends;
use crate::process::{Console, Process, Sink};
use crate::stream::{LogId, StreamId};

fn failed(what: &str, path: &Path, error: &std::io::Error) -> RpcError {
    RpcError::new(code::UNKNOWN, format!("failed to {what} {}: {error}", path.display()))
}

impl Shim {
    /// Makes the container's side of a process' streams and begins to copy. With a terminal only its socket is made: the
    /// rest follows in [`Self::open_terminal`].
    pub(crate) fn open_streams(&mut self, bundle: &Path, process: &mut Process, log: &mut Option<LogId>) -> Result<Ends, RpcError> {
        let stdout = Sink::parse(&process.stdio.stdout)?;
        let stderr = Sink::parse(&process.stdio.stderr)?;
        if !process.exec_id.is_empty() && matches!((&stdout, &stderr), (Sink::Log(_), _) | (_, Sink::Log(_))) {
            return Err(RpcError::new(code::INVALID_ARGUMENT, "cri-log:// is for containers, not for execs"));
        }
        if process.stdio.terminal {
            process.console = Some(self.console()?);
            return Ok(Ends { terminal: true, ..Ends::default() });
        }
        let stdin = self.open_stdin(bundle, process)?;
        let mut ends = Ends { stdin, ..Ends::default() };
        if stdout != Sink::None {
            ends.stdout = Some(self.open_output(bundle, process, &stdout, "stdout", log)?);
        }
        if stderr != Sink::None {
            ends.stderr = Some(self.open_output(bundle, process, &stderr, "stderr", log)?);
        }
        Ok(ends)
    }

    /// A socket for the terminal's master, beside the shim's own: bundles' paths are too long for one.
    fn console(&mut self) -> Result<Console, RpcError> {
        let name = format!("p{}-{}", std::process::id(), self.next_socket);
        self.next_socket = self.next_socket.wrapping_add(1);
        let path = self.setting.socket.with_file_name(name);
        let listener = UnixListener::bind(&path).map_err(|error| failed("make console socket", &path, &error))?;
        listener.set_nonblocking(true).map_err(|error| failed("set up console socket", &path, &error))?;
        Ok(Console { listener, path })
    }

    fn open_stdin(&mut self, bundle: &Path, process: &mut Process) -> Result<Option<PathBuf>, RpcError> {
        if process.stdio.stdin.is_empty() {
            return Ok(None);
        }
        let path = bundle.join(process.file("stdin"));
        pipes::make_fifo(&path, 0o600).map_err(|error| failed("make", &path, &error))?;
        let said = |error: std::io::Error| failed("open", &path, &error);
        // A reader is held until the container has its own, so that the writing end can be opened.
        process.guards.push(pipes::open_fifo(&path, Access::Read).map_err(said)?);
        let writer = pipes::open_fifo(&path, Access::Write).map_err(said)?;
        if process.exec_id.is_empty() {
            self.keep(&path, &writer);
        }
        self.join_stdin(process, writer)?;
        Ok(Some(path))
    }

    /// Copies the client's stdin, if it names one, to `writer`, which stays open for readers that attach.
    pub(crate) fn join_stdin(&mut self, process: &mut Process, writer: OwnedFd) -> Result<(), RpcError> {
        if let Sink::Fifo(client) = Sink::parse(&process.stdio.stdin)? {
            let said = |error: std::io::Error| failed("open stdin", &client, &error);
            let reader = pipes::open_fifo(&client, Access::Read).map_err(said)?;
            // Without a writer of ours the input would end when a client goes away to come back later.
            let keep = pipes::open_fifo(&client, Access::Write).map_err(said)?;
            let copy = writer.try_clone().map_err(said)?;
            process.input = Some(self.streams.add_pump(&self.epoll, reader, copy, Some(keep)).map_err(said)?);
        }
        process.stdin = Some(writer);
        Ok(())
    }

    fn open_output(
        &mut self,
        bundle: &Path,
        process: &mut Process,
        sink: &Sink,
        name: &'static str,
        log: &mut Option<LogId>,
    ) -> Result<PathBuf, RpcError> {
        let path = bundle.join(process.file(name));
        pipes::make_fifo(&path, 0o600).map_err(|error| failed("make", &path, &error))?;
        let reader = pipes::open_fifo(&path, Access::Read).map_err(|error| failed("open", &path, &error))?;
        // The keeper's end keeps what is unread when shim and container end one after the other. (An exec's output goes to
        // a client's FIFO, and a client that outlives both is rare: its descriptors are not worth two calls for each exec.)
        if process.exec_id.is_empty() {
            self.keep(&path, &reader);
        }
        let id = self.join_output(reader, false, sink, name, log)?;
        process.outputs.extend(id);
        Ok(path)
    }

    /// Copies from the container's side to the sink.
    pub(crate) fn join_output(
        &mut self,
        source: OwnedFd,
        terminal: bool,
        sink: &Sink,
        name: &'static str,
        log: &mut Option<LogId>,
    ) -> Result<Option<StreamId>, RpcError> {
        let id = match sink {
            Sink::None => return Ok(None),
            Sink::Log(path) => {
                let said = |error: std::io::Error| failed("open log", path, &error);
                let id = match *log {
                    Some(id) => id,
                    None => *log.insert(self.streams.open_log(path).map_err(said)?),
                };
                self.streams.add_log_stream(&self.epoll, source, terminal, name, id).map_err(said)?
            }
            Sink::Fifo(path) => {
                let said = |error: std::io::Error| failed(&format!("open {name}"), path, &error);
                self.streams.add_client(&self.epoll, source, path).map_err(said)?
            }
            Sink::File(path) => {
                let said = |error: std::io::Error| failed(&format!("open {name}"), path, &error);
                let file = std::fs::File::options().append(true).create(true).open(path).map_err(said)?;
                self.streams.add_pump(&self.epoll, source, file.into(), None).map_err(said)?
            }
        };
        Ok(Some(id))
    }

    /// Takes the terminal's master that the runtime has brought, and joins it to the client's streams.
    pub(crate) fn open_terminal(&mut self, bundle: &Path, process: &mut Process, log: &mut Option<LogId>) -> Result<(), RpcError> {
        let Some(console) = process.console.take() else { return Ok(()) };
        let said = |error: std::io::Error| failed("take the terminal from", &console.path, &error);
        let (socket, _) = console.listener.accept().map_err(said)?;
        socket.set_nonblocking(true).map_err(said)?;
        let mut name = [0u8; 4096];
        let (_, mut descriptors) = linux::scm::receive(&socket, &mut name).map_err(said)?;
        let master = descriptors.pop().ok_or_else(|| said(std::io::ErrorKind::UnexpectedEof.into()))?;
        if process.exec_id.is_empty() {
            self.keep(&bundle.join(process.file("master")), &master);
        }
        self.join_terminal(process, master, log)
    }

    /// Joins a terminal's master to the client's streams.
    pub(crate) fn join_terminal(&mut self, process: &mut Process, master: OwnedFd, log: &mut Option<LogId>) -> Result<(), RpcError> {
        let said = |error: std::io::Error| RpcError::new(code::UNKNOWN, format!("failed to set up the terminal: {error}"));
        pipes::set_nonblocking(&master, true).map_err(said)?;
        let stdout = Sink::parse(&process.stdio.stdout)?;
        let source = master.try_clone().map_err(said)?;
        let id = self.join_output(source, true, &stdout, "stdout", log)?;
        process.outputs.extend(id);
        if !process.stdio.stdin.is_empty() {
            let writer = master.try_clone().map_err(said)?;
            self.join_stdin(process, writer)?;
        }
        process.master = Some(master);
        Ok(())
    }

    /// Closes what a process that did not come to be has open.
    pub(crate) fn close_process(&mut self, process: &Process) {
        for id in process.outputs.iter().chain(process.input.iter()).chain(process.attached_inputs.iter()) {
            self.streams.close(*id);
        }
    }
}
