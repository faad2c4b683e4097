//! `containerd-shim-coracle-v2`: the shim of one pod, and the node's keeper. See the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(shim::main(std::env::args_os().skip(1)))
}
