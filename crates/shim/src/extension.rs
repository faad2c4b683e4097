//! `coracle.io.v1.Shim`: what shim v2 has no word for.

use std::path::Path;

use linux::pipes::{self, Access};
use protocols::shim::coracle::{AttachRequest, AttachResponse, InfoResponse, ReopenLogRequest, ReopenLogResponse};
use protocols::ttrpc::{RpcError, code};

use crate::daemon::Shim;
use crate::task::{Now, now, read};

impl Shim {
    pub(crate) fn extension_call(&mut self, method: &str, payload: &[u8]) -> Now {
        match method {
            "Info" => now(&InfoResponse {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                capabilities: ["cri-log", "reopen-log", "attach", "adopt"].map(str::to_owned).to_vec(),
                pid: std::process::id(),
            }),
            "ReopenLog" => self.reopen_log(&read(payload)?),
            "Attach" => self.attach(&read(payload)?),
            _ => Err(RpcError::new(code::UNIMPLEMENTED, format!("method {method} of coracle.io.v1.Shim is not implemented"))),
        }
    }

    fn reopen_log(&mut self, request: &ReopenLogRequest) -> Now {
        let log = self.container(&request.id)?.log;
        let Some(log) = log else {
            let text = format!("container {} writes no log of the shim's", request.id);
            return Err(RpcError::new(code::FAILED_PRECONDITION, text));
        };
        self.streams
            .reopen_log(log)
            .map_err(|error| RpcError::new(code::UNKNOWN, format!("failed to reopen the log of container {}: {error}", request.id)))?;
        now(&ReopenLogResponse {})
    }

    fn attach(&mut self, request: &AttachRequest) -> Now {
        let container = self.container(&request.id)?;
        if container.init.state.exit().is_some() {
            let text = format!("container {} has ended: cannot attach", request.id);
            return Err(RpcError::new(code::FAILED_PRECONDITION, text));
        }
        if container.log.is_none() {
            let text = format!("container {} writes no log of the shim's: its streams are its client's", request.id);
            return Err(RpcError::new(code::FAILED_PRECONDITION, text));
        }
        let said = |what: &str, path: &str, error: std::io::Error| {
            RpcError::new(code::INVALID_ARGUMENT, format!("failed to open {what} {path:?}: {error}"))
        };
        // With a terminal, or with one of the two streams only, there is one output.
        let outputs = container.init.outputs.clone();
        let stdout_only = container.init.stdio.stdout.is_empty();
        let wanted = [("stdout", &request.stdout), ("stderr", &request.stderr)];
        let mut opened = Vec::new();
        for (index, (what, path)) in wanted.into_iter().enumerate().filter(|(_, (_, path))| !path.is_empty()) {
            let writer = pipes::open_fifo(Path::new(path), Access::Write).map_err(|error| said(what, path, error))?;
            let place = if stdout_only { index.saturating_sub(1) } else { index };
            opened.push((outputs.get(place).copied(), writer));
        }
        let input = if request.stdin.is_empty() {
            None
        } else {
            let writer = container.init.stdin.as_ref().map(|writer| writer.try_clone());
            let Some(writer) = writer.transpose().map_err(|error| said("stdin", &request.stdin, error))? else {
                let text = format!("container {} has no stdin, or it is closed", request.id);
                return Err(RpcError::new(code::FAILED_PRECONDITION, text));
            };
            let path = Path::new(&request.stdin);
            Some((pipes::open_fifo(path, Access::Read).map_err(|error| said("stdin", &request.stdin, error))?, writer))
        };
        for (output, writer) in opened {
            // An output that has ended leaves its reader at the end of file.
            if let Some(output) = output.filter(|output| self.streams.is_open(*output)) {
                self.streams
                    .attach(&self.epoll, output, writer)
                    .map_err(|error| RpcError::new(code::UNKNOWN, format!("failed to attach: {error}")))?;
            }
        }
        if let Some((reader, writer)) = input {
            let pump = self
                .streams
                .add_pump(&self.epoll, reader, writer, None)
                .map_err(|error| RpcError::new(code::UNKNOWN, format!("failed to attach stdin: {error}")))?;
            let streams = &self.streams;
            if let Some(container) = self.containers.get_mut(&request.id) {
                container.init.attached_inputs.retain(|id| streams.is_open(*id));
                container.init.attached_inputs.push(pump);
            }
        }
        now(&AttachResponse {})
    }
}
