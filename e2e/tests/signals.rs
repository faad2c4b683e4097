//! A daemon that was started by a program which blocks the stopping signals, and so with them blocked, is stopped by them all the same.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::servers::{make_keys, start_ours};

/// How long a server may take to drain.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn sigterm_stops_what_was_started_with_it_blocked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    make_keys(folder.path())?;
    let terminate = linux::signal::parse("TERM").unwrap_or_default();
    linux::signal::block(&[terminate])?;
    let mut server = start_ours(folder.path())?;
    for pid in server.pids() {
        linux::child::send_signal(pid, u32::try_from(terminate)?)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while !server.has_ended() {
        ensure!(Instant::now() < deadline, "the server goes on after SIGTERM");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}
