//! An OCI bundle to a process: runtime-spec 1.3 with runc's command line.
//!
//! The one way in is [`main`], which is what the command `coracle-oci` is, and what the shim calls in a forked child.
//! Everything is synchronous and single-threaded; there is no helper executable: the container's first process is a
//! child of this one that was cloned into its namespaces, and never executes anything but the container's program.
//!
//! - [`cli`], [`log`]: the command line and the log that callers parse
//! - [`spec`], [`validate`], [`mount_options`], [`limits`], [`seccomp`]: the configuration, decided purely
//! - [`create`], [`exec`], [`lifecycle`], [`foreground`]: the runtime's side of each verb
//! - [`init`], [`rootfs`], [`process`]: the container's side
//! - [`state`]: what is on disk, and the states a container goes through
//!
//! **Invariant**: what cannot be enforced is an error, before or after the fact, and never a warning; the exceptions
//! (`oom_score_adj`, capabilities of the daemon, zero limits of missing controllers) are DESIGN.md's.

#![forbid(unsafe_code)]

pub mod cli;
pub mod create;
pub mod error;
pub mod exec;
pub mod features;
pub mod foreground;
pub mod hooks;
pub mod init;
pub mod lifecycle;
pub mod limits;
pub mod log;
pub mod mount_options;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod spec;
pub mod state;
pub mod time;
pub mod validate;

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;

use cli::{Arguments, CommandLine, Request};
use error::{Context, Result, refuse};

pub use error::Error;

/// Where states are kept when `--root` does not say.
pub const DEFAULT_ROOT: &str = "/run/coracle-oci";

/// Runs one command line (`args[0]` is the program's name); answers the exit code.
///
/// The process must have one thread, and be expendable: descriptors from 3 on are closed (but for `--preserve-fds`) by
/// the verbs that make processes, so that nothing of the caller's reaches a container.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let mut args = args.into_iter();
    let _name = args.next();
    let command = match cli::parse(args, PathBuf::from(DEFAULT_ROOT)) {
        Ok(Request::Version) => return print(&version()),
        Ok(Request::Help) => return print(&cli::usage()),
        Ok(Request::Run(command)) => command,
        Err((global, error)) => {
            log::write(&global, "error", &error::line(&error));
            return 1;
        }
    };
    log::debug(&command.global, &format!("{} {}", command.verb, command.arguments.positional.join(" ")));
    match run(&command) {
        Ok(code) => code,
        Err(error) => {
            let line = error::line(&error);
            let prefixed = matches!(command.verb, "create" | "run").then(|| format!("coracle-oci {} failed: {line}", command.verb));
            let line = prefixed.unwrap_or(line);
            log::write(&command.global, "error", &line);
            // Without a terminal these are the container's own streams for create and exec: the log alone is told.
            if command.global.log.is_some() && !matches!(command.verb, "create" | "run" | "exec") {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
            if command.verb == "exec" { 255 } else { 1 }
        }
    }
}

fn run(command: &CommandLine) -> Result<u8> {
    let CommandLine { global, verb, arguments } = command;
    let id = arguments.positional.first().map_or("", String::as_str);
    if matches!(*verb, "create" | "run" | "exec") {
        let keep: u32 = arguments.number("preserve-fds")?.unwrap_or(0);
        linux::process::close_from(3 + keep, false)?;
        // Children are born out of the reach of what else runs in a container's PID namespace.
        linux::process::set_dumpable(false)?;
    }
    match *verb {
        "create" => {
            let options = create::Options::read(arguments)?;
            create::create(global, &options, None)?;
        }
        "start" => lifecycle::start(global, id)?,
        "run" => return run_container(global, arguments),
        "exec" => return exec::exec(global, arguments),
        "kill" => lifecycle::kill(global, arguments)?,
        "delete" => lifecycle::delete(global, arguments)?,
        "pause" => lifecycle::pause(global, id)?,
        "resume" => lifecycle::resume(global, id)?,
        "update" => lifecycle::update(global, arguments)?,
        "state" => return Ok(print(&lifecycle::state(global, id)?)),
        "list" => return Ok(print(&lifecycle::list(global, arguments)?)),
        "ps" => return Ok(print(&lifecycle::ps(global, arguments)?)),
        "events" => return Ok(print(&lifecycle::events(global, arguments)?)),
        "features" => return Ok(print(&format!("{:#}\n", features::document()))),
        "spec" => write_example(arguments)?,
        other => return refuse(format!("{other} is not implemented")),
    }
    Ok(0)
}

/// `run`: create, start, and unless detached stay until the end and delete.
fn run_container(global: &cli::Global, arguments: &Arguments) -> Result<u8> {
    let options = create::Options::read(arguments)?;
    let detach = arguments.has("detach");
    if detach {
        let created = create::create(global, &options, None)?;
        return start_or_undo(global, &options.id, &created.container).map(|()| 0);
    }
    if options.console_socket.is_some() {
        return refuse("cannot use console socket if runc will not detach or allocate tty");
    }
    let text = std::fs::read_to_string(options.bundle.join("config.json")).during(|| "read config.json".to_owned())?;
    let wants_terminal = spec::parse::<spec::Spec>(&text)?.process.is_some_and(|process| process.terminal);
    let (ours, theirs) = if wants_terminal { linux::unix::packet_pair().map(|(a, b)| (Some(a), Some(b)))? } else { (None, None) };
    let signals = foreground::Signals::hold()?;
    // As runc does: a process that the container's leaves behind, without a PID namespace of its own, comes here.
    linux::process::set_child_subreaper(!arguments.has("no-subreaper"))?;
    let created = create::create(global, &options, theirs)?;
    start_or_undo(global, &options.id, &created.container)?;
    let status = foreground::attend(created.pidfd.as_fd(), signals, ours);
    if !arguments.has("keep") {
        lifecycle::destroy(global, &created.container)?;
    }
    status
}

fn start_or_undo(global: &cli::Global, id: &str, container: &state::Container) -> Result<()> {
    lifecycle::start(global, id).inspect_err(|_| {
        if let Ok(pidfd) = container.pidfd() {
            let _ = linux::pidfd::send_signal(pidfd.as_fd(), 9);
            let _ = linux::pidfd::wait_exit(pidfd.as_fd(), create::CGROUP_PATIENCE);
        }
        let _ = lifecycle::destroy(global, container);
    })
}

fn write_example(arguments: &Arguments) -> Result<()> {
    if arguments.has("rootless") {
        return refuse("--rootless is not implemented");
    }
    let path = PathBuf::from(arguments.value("bundle").unwrap_or(".")).join("config.json");
    let act = || format!("write {}", path.display());
    let mut file = match std::fs::File::create_new(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return refuse(format!("File {} exists. Remove it first", path.display()));
        }
        other => other.during(act)?,
    };
    file.write_all(format!("{:#}\n", features::example()).as_bytes()).during(act)
}

fn version() -> String {
    format!("coracle-oci version {}\nspec: {}\n", env!("CARGO_PKG_VERSION"), spec::VERSION)
}

fn print(text: &str) -> u8 {
    let mut out = std::io::stdout();
    u8::from(out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err())
}
