//! `run` and `exec` without `--detach`: this process stands for the container's until that ends. Signals are passed on;
//! with a terminal, bytes and sizes too.

use linux::pty;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::{Context, Result, refuse};

const SIGCHLD: i32 = 17;
const BUFFER_BYTES: usize = 16 * 1024;
const SIGWINCH: i32 = 28;

/// The signals that are held back, to be passed on.
pub struct Signals(linux::event::SignalFd);

impl Signals {
    /// Holds them back from now on; the container's process resets its own mask.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn hold() -> Result<Self> {
        // All that can be caught, but for those that a fault of this process raises, and those of job control.
        let numbers: Vec<i32> = (1..=31).filter(|n| ![4, 5, 7, 8, 9, 11, 13, 19, 20, 21, 22, 23].contains(n)).collect();
        linux::signal::block(&numbers)?;
        Ok(Self(linux::event::SignalFd::new(&numbers).during(|| "open signalfd".to_owned())?))
    }
}

/// Waits for the process to end; answers its exit status. `terminal` is where its terminal's master comes from.
///
/// # Errors
/// When it cannot be waited for, or the terminal's master does not come.
pub fn attend(pidfd: BorrowedFd<'_>, signals: Signals, terminal: Option<OwnedFd>) -> Result<u8> {
    let master = terminal.map(|socket| take_master(&socket)).transpose()?;
    let stdin = std::io::stdin();
    let settings = match &master {
        Some(master) if pty::is_terminal(stdin.as_fd()) => {
            copy_size(master.as_fd());
            Some(pty::make_raw(stdin.as_fd())?)
        }
        _ => None,
    };
    let result = attend_raw(pidfd, &signals, master.as_ref());
    if let Some(settings) = settings {
        let _ = pty::restore(stdin.as_fd(), &settings);
    }
    result
}

fn take_master(socket: &OwnedFd) -> Result<OwnedFd> {
    match linux::unix::receive(socket.as_fd(), 64)?.1.pop() {
        Some(master) => Ok(master),
        None => refuse("the container's process sent no terminal"),
    }
}

fn copy_size(master: BorrowedFd<'_>) {
    // Without a size of its own there is none to copy.
    if let Ok((rows, columns)) = pty::size(std::io::stdin().as_fd()) {
        let _ = pty::set_size(master, rows, columns);
    }
}

fn attend_raw(pidfd: BorrowedFd<'_>, signals: &Signals, master: Option<&OwnedFd>) -> Result<u8> {
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let pid = linux::pidfd::pid_of(pidfd)?;
    let mut input = master.is_some();
    let mut output = master;
    loop {
        let fds = [Some(pidfd), Some(signals.0.as_fd()), input.then(|| stdin.as_fd()), output.map(|m| m.as_fd())];
        let ready = linux::fs::wait_readable(&fds)?;
        if ready[3] {
            // The end of a terminal is an error (EIO): all slaves are closed.
            if let Some(terminal) = output.filter(|m| !copy(m.as_fd(), stdout.as_fd())) {
                let _ = terminal;
                output = None;
            }
            continue;
        }
        if ready[2] && !master.is_some_and(|m| copy(stdin.as_fd(), m.as_fd())) {
            input = false;
        }
        while let Some(signal) = signals.0.read().during(|| "read signals".to_owned())? {
            match signal {
                SIGCHLD => reap_orphans(pid),
                SIGWINCH if master.is_some() => copy_size(master.map_or(pidfd, |m| m.as_fd())),
                // One that has ended meanwhile needs none.
                _ => drop(linux::pidfd::send_signal(pidfd, signal)),
            }
        }
        if ready[0] {
            let exit = linux::pidfd::wait(pidfd, true, false)?;
            return Ok(exit.map_or(255, |exit| u8::try_from(exit.status()).unwrap_or(255)));
        }
    }
}

/// Reaps what was given to this process as a subreaper; `own`, the container's process, is waited for by its descriptor.
fn reap_orphans(own: i32) {
    // One that ends behind `own` is left to whoever reaps this process.
    while let Ok(Some(ended)) = linux::child::ended_child(None) {
        if i32::try_from(ended.pid).is_ok_and(|pid| pid == own) || linux::child::reap(ended.pid).is_err() {
            break;
        }
    }
}

/// Copies what is there now; `false` at the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0u8; BUFFER_BYTES];
    let Ok(length @ 1..) = linux::pipes::read(from, &mut buffer) else { return false };
    let mut rest = &buffer[..length];
    while !rest.is_empty() {
        match linux::pipes::write(to, rest) {
            Ok(written) => rest = &rest[written..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}
