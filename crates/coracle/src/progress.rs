//! What a person sees while `up` and `down` work: a line per step, on a terminal with a spinner, in a pipe plain and once.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The steps of one command, on stderr.
pub struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(80));
            bar
        });
        Progress { bar, start: Instant::now() }
    }

    /// What is being waited for now.
    pub fn working(&self, step: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(step.to_owned());
        }
    }

    /// A step is done.
    pub fn done(&self, step: &str) {
        let line = format!("{:>7.2} s  {step}", self.start.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            // A file on a full disk takes nothing; that is no reason to end.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// The last word.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
