//! A client on a terminal of its own: what a person at the keyboard sees and types.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long anything that is waited for may take.
const TIMEOUT: Duration = Duration::from_secs(90);
/// How often the end of the process is looked for.
const PAUSE: Duration = Duration::from_millis(50);

/// What has been written to the terminal so far, and whether its other side is closed.
#[derive(Debug, Default)]
struct Screen {
    text: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

/// A process whose stdin, stdout and stderr are one terminal, which is its controlling one. Dropping it ends the process.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    screen: Arc<Screen>,
}

impl Terminal {
    /// Runs the command (its program, arguments and environment) on a new terminal of this size.
    ///
    /// # Errors
    /// No terminal can be had, or the program cannot be run.
    pub fn start(inner: &Command, rows: u16, columns: u16) -> Result<Terminal> {
        let ptmx = linux::fs::open_path(Path::new("/dev/ptmx")).context("failed to open /dev/ptmx")?;
        let master = linux::pty::open_master(ptmx.as_fd()).context("failed to make a terminal")?;
        linux::pty::set_size(master.as_fd(), rows, columns)?;
        let slave = linux::pty::open_slave(master.as_fd())?;
        // A session of its own, so that the terminal is the controlling one and changes of its size are signalled; and signals as a login
        // has them, for who runs the tests in the background has SIGINT ignored, which a shell cannot take back.
        let mut command = Command::new("env");
        command.args(["--default-signal", "setsid", "--ctty", "--wait"]).arg(inner.get_program()).args(inner.get_args());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        let child = command.spawn().context("failed to run setsid")?;
        // The command holds copies of the slave, without which the terminal would never end.
        drop(command);
        let master = File::from(master);
        let screen = Arc::new(Screen::default());
        let (mut reader, shown) = (master.try_clone()?, Arc::clone(&screen));
        // Ends with the terminal, when the last process that has it open ends.
        std::thread::spawn(move || shown.fill(&mut reader));
        Ok(Terminal { child, master, screen })
    }

    /// Types.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).with_context(|| format!("failed to type {text:?}"))
    }

    /// Changes the size of the window.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        linux::pty::set_size(self.master.as_fd(), rows, columns).context("failed to resize the terminal")
    }

    /// All that was shown so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.text.lock().unwrap_or_else(PoisonError::into_inner).0).into_owned()
    }

    /// Waits until this is shown.
    ///
    /// # Errors
    /// It is not shown in time, or the process ended without it.
    pub fn wait_for(&self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        let mut shown = self.screen.text.lock().unwrap_or_else(PoisonError::into_inner);
        while !String::from_utf8_lossy(&shown.0).contains(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            if shown.1 || left.is_zero() {
                bail!("{wanted:?} was not shown (ended: {}); shown was:\n{}", shown.1, String::from_utf8_lossy(&shown.0));
            }
            (shown, _) = self.screen.changed.wait_timeout(shown, left).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Waits until the process has ended: how, and all that it showed.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().context("failed to wait for the client")? {
                self.screen.wait_closed(deadline);
                return Ok((status, self.text()));
            }
            if Instant::now() > deadline {
                bail!("the client did not end; shown was:\n{}", self.text());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Stops it as Ctrl-C does, and waits for its end.
    ///
    /// # Errors
    /// As [`Terminal::wait`].
    pub fn interrupt(mut self) -> Result<(ExitStatus, String)> {
        self.send("\u{3}")?;
        self.wait()
    }
}

impl Screen {
    fn fill(&self, reader: &mut File) {
        let mut buffer = [0; 4096];
        loop {
            // A terminal whose last user is gone gives EIO.
            let count = reader.read(&mut buffer).unwrap_or(0);
            let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
            text.0.extend_from_slice(&buffer[..count]);
            text.1 = count == 0;
            self.changed.notify_all();
            if count == 0 {
                return;
            }
        }
    }

    fn wait_closed(&self, deadline: Instant) {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        while !text.1 && Instant::now() < deadline {
            (text, _) = self.changed.wait_timeout(text, PAUSE).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_sees_a_terminal_of_its_size() -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-c", "tty; stty size; read line; echo got $line; stty size; exit 3"]);
        let mut terminal = Terminal::start(&command, 31, 97)?;
        terminal.wait_for("31 97")?;
        terminal.resize(32, 98)?;
        terminal.send("hello\n")?;
        let (status, text) = terminal.wait()?;
        assert_eq!(status.code(), Some(3), "{text}");
        for wanted in ["/dev/pts/", "got hello", "32 98"] {
            assert!(text.contains(wanted), "{wanted} is missing:\n{text}");
        }
        Ok(())
    }

    #[test]
    fn ctrl_c_interrupts() -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-c", "trap 'echo stopped; exit 0' INT; echo ready; while true; do sleep 0.1; done"]);
        let terminal = Terminal::start(&command, 24, 80)?;
        terminal.wait_for("ready")?;
        let (status, text) = terminal.interrupt()?;
        assert!(status.success() && text.contains("stopped"), "{status}: {text}");
        Ok(())
    }
}
