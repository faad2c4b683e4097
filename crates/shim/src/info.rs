//! `-info`: what this runtime is and can.

use std::io::{Read, Write};
use std::os::fd::AsFd;

use linux::child::{self, Fork};
use prost::Message;
use protocols::shim::OCI_FEATURES_TYPE_URL;
use protocols::shim::types::{RuntimeInfo, RuntimeVersion};

use crate::runtime::Runtime;
use crate::task::runc_options;

/// Reads options from stdin, prints RuntimeInfo; without the OCI runtime's features where it does not tell them.
///
/// # Errors
/// Unreadable options, or a failing stdout.
pub fn run() -> Result<(), String> {
    let mut stdin = Vec::new();
    std::io::stdin().read_to_end(&mut stdin).map_err(|error| format!("failed to read options from stdin: {error}"))?;
    let any = if stdin.is_empty() {
        None
    } else {
        Some(prost_types::Any::decode(stdin.as_slice()).map_err(|error| format!("options are not valid: {error}"))?)
    };
    let options = runc_options(any.as_ref()).map_err(|error| error.message)?;
    let features =
        features(&Runtime::new(&options, "")).map(|value| prost_types::Any { type_url: OCI_FEATURES_TYPE_URL.to_owned(), value });
    let info = RuntimeInfo {
        name: "io.containerd.coracle.v2".to_owned(),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), revision: String::new() }),
        options: any,
        features,
        annotations: Default::default(),
    };
    std::io::stdout().write_all(&info.encode_to_vec()).map_err(|error| format!("failed to print: {error}"))
}

fn features(runtime: &Runtime) -> Option<Vec<u8>> {
    let (reader, writer) = linux::pipes::pipe().ok()?;
    linux::pipes::set_nonblocking(&reader, false).ok()?;
    linux::pipes::set_nonblocking(&writer, false).ok()?;
    let line = runtime.features();
    match child::fork().ok()? {
        Fork::Child => {
            let ready = child::dup_to(writer.as_fd(), 1).and_then(|()| Ok(linux::process::close_from(3, true)?));
            child::exit_now(if ready.is_ok() { line.become_it() } else { 1 })
        }
        Fork::Parent(pid) => {
            drop(writer);
            let mut text = Vec::new();
            std::fs::File::from(reader).read_to_end(&mut text).ok()?;
            let exited = child::wait_for(pid).ok()?;
            (exited.status == 0 && text.starts_with(b"{")).then_some(text)
        }
    }
}
