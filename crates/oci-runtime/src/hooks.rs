//! Hooks: programs run at points in a container's life, with its state on their standard input (`config.md`,
//! "POSIX-platform Hooks").

use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result, refuse};
use crate::spec::Hook;

/// Runs the hooks one after the other, up to the first that fails.
///
/// # Errors
/// When one cannot be run, fails, or takes longer than it may.
pub fn run(point: &str, hooks: &[Hook], state: &str) -> Result<()> {
    for (index, hook) in hooks.iter().enumerate() {
        run_one(hook, state).during(|| format!("error running {point} hook #{index}"))?;
    }
    Ok(())
}

/// Runs all hooks, whatever becomes of them; answers the failures.
pub fn run_all(point: &str, hooks: &[Hook], state: &str) -> Vec<Error> {
    let run = |(index, hook)| run_one(hook, state).during(|| format!("error running {point} hook #{index}")).err();
    hooks.iter().enumerate().filter_map(run).collect()
}

fn run_one(hook: &Hook, state: &str) -> Result<()> {
    if !hook.path.is_absolute() {
        return refuse(format!("hook path {} is not absolute", hook.path.display()));
    }
    let mut command = Command::new(&hook.path);
    let (name, args) = hook.args.split_first().map_or((None, &[][..]), |(name, args)| (Some(name), args));
    if let Some(name) = name {
        command.arg0(name);
    }
    command.args(args).env_clear().envs(hook.env.iter().filter_map(|pair| pair.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let act = || format!("run {}", hook.path.display());
    let mut child = command.spawn().during(act)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its state.
        let _ = stdin.write_all(state.as_bytes());
    }
    let limit = hook.timeout.and_then(|seconds| u64::try_from(seconds).ok()).filter(|s| *s > 0).map(Duration::from_secs);
    let pidfd = linux::pidfd::open(child.id() as i32)?;
    // Its words are kept for the error: whatever fits a pipe, which is read when it has ended, or filled.
    let stderr = child.stderr.take();
    let begun = Instant::now();
    let reader = stderr.map(Words::new);
    let mut words = reader.unwrap_or_default();
    loop {
        words.read_available();
        let left = limit.map_or(Duration::from_millis(100), |limit| limit.saturating_sub(begun.elapsed()));
        use std::os::fd::AsFd;
        if linux::pidfd::wait_exit(pidfd.as_fd(), left.min(Duration::from_millis(100)))? {
            break;
        }
        if limit.is_some_and(|limit| begun.elapsed() >= limit) {
            let _ = child.kill();
            let _ = child.wait();
            return refuse(format!("hook ran past the specified timeout of {:.1}s", limit.unwrap_or_default().as_secs_f64()));
        }
    }
    let status = child.wait().during(act)?;
    words.read_available();
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    refuse(format!("{how}, stdout: , stderr: {}", words.text()))
}

/// What a hook said, up to a bound.
#[derive(Default)]
struct Words {
    pipe: Option<std::process::ChildStderr>,
    bytes: Vec<u8>,
}

impl Words {
    const BYTES_MAX: usize = 64 * 1024;

    fn new(pipe: std::process::ChildStderr) -> Self {
        let nonblocking = linux::pipes::set_nonblocking(&pipe, true).is_ok();
        Self { pipe: nonblocking.then_some(pipe), bytes: Vec::new() }
    }

    /// Takes what is there now; what exceeds the bound is dropped, so that the hook never waits.
    fn read_available(&mut self) {
        use std::io::Read;
        let Some(pipe) = &mut self.pipe else { return };
        let mut buffer = [0u8; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            let room = Self::BYTES_MAX.saturating_sub(self.bytes.len());
            self.bytes.extend_from_slice(&buffer[..length.min(room)]);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim_end().to_owned()
    }
}
