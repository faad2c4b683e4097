//! The OCI runtime as a command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    // Containers must not get hold of this executable; only the verbs that make processes need it.
    let makes_processes = std::env::args_os().any(|arg| arg == "create" || arg == "run" || arg == "exec");
    let protected = if makes_processes { linux::exe::protect() } else { Ok(()) };
    if let Err(error) = protected {
        eprintln!("coracle-oci: {}", oci_runtime::error::line(&error));
        return ExitCode::FAILURE;
    }
    ExitCode::from(oci_runtime::main(std::env::args_os()))
}
