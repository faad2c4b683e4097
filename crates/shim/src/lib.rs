//! The shim of one pod: tasks, logs, exec, exits. Seam 5 upwards, seam 6 downwards.
//!
//! One process per pod sandbox: static, single-threaded, no async runtime. ttrpc is served on an epoll loop in which nothing
//! waits: mounts, runtime commands and set-ups run in forked children that report through pipes. The shim is the pod's
//! subreaper; it writes container logs in CRI's format itself, so no daemon's death loses a line.
//!
//! ```text
//! containerd or cri-server --start--> [shim] --fork--> OCI runtime (built in, or runc's command line)
//!        `-- ttrpc: Task v2/v3, Sandbox v1, coracle.io.v1 --^  `-- events --> TTRPC_ADDRESS
//! ```
//!
//! **Invariant**: no call is answered before what it reports is on disk; no child is reaped before its exit is.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// Tells stderr, which may be a file on a full disk: `eprintln!` would end the program there.
macro_rules! say {
    ($($words:tt)*) => {
        // There is nobody else to tell.
        drop(std::io::Write::write_all(&mut std::io::stderr(), format!("{}\n", format_args!($($words)*)).as_bytes()))
    };
}

mod adopt;
pub mod args;
mod daemon;
mod delete;
pub mod disk;
mod events;
mod extension;
#[cfg(test)]
mod fuzz;
mod info;
mod job;
mod keeper;
pub mod keeping;
mod late;
mod life;
mod pause;
mod process;
mod runtime;
mod sandbox;
mod server;
mod start;
mod stats;
mod stdio;
mod stream;
mod task;

use args::{Action, Args};

/// Runs the executable: `args` without the program's name. Answers the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args = match Args::parse(args) {
        Ok(args) => args,
        Err(error) => {
            say!("containerd-shim-coracle-v2: {error}");
            return 2;
        }
    };
    let done = match args.action {
        Action::Serve => serve(&args),
        Action::Start => start::run(&args),
        Action::Delete => delete::run(&args),
        Action::Info => info::run(),
        Action::Keeper => keeper::run(&args),
        Action::Pause => return pause::run(),
        Action::Version => {
            println!("containerd-shim-coracle-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Help => {
            print!("{}", args::USAGE);
            Ok(())
        }
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            say!("containerd-shim-coracle-v2: {error}");
            1
        }
    }
}

fn serve(args: &Args) -> Result<(), String> {
    // Containers must not get hold of this executable; it executes itself once more (with descriptor 3) to see to that.
    linux::exe::protect().map_err(|error| format!("failed to protect the shim's executable: {error}"))?;
    linux::process::set_name("containerd-shim-coracle-v2")
        .map_err(|error| format!("failed to set the name: {}", io::Error::from(error)))?;
    let listener =
        linux::child::inherited(3).map_err(|error| format!("no listening socket as descriptor 3 ({error}): `start` starts the shim"))?;
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let setting = daemon::Setting {
        namespace: args.namespace.clone(),
        id: args.id.clone(),
        socket: PathBuf::from(&args.address),
        keeper: path(keeping::KEEPER_ENV),
        events: path("TTRPC_ADDRESS"),
    };
    let said = |error: io::Error| format!("the shim's loop failed: {error}");
    let mut shim = daemon::Shim::new(setting, UnixListener::from(listener)).map_err(said)?;
    let bundle = std::env::current_dir().map_err(|error| format!("failed to find the bundle: {error}"))?;
    shim.adopt(&bundle)?;
    shim.run().map_err(said)
}
