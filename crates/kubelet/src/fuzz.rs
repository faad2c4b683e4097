//! Mutated queries and log lines: an answer or an error, never a panic.

use testkit::fuzz::Fuzz;

use crate::{logs, server};

#[test]
fn queries() {
    let seed = "command=sh&command=-c&command=echo+%24x&input=1&tty=true&follow=true&tailLines=10&sinceTime=2026-11-23T00%3A00%3A00Z";
    Fuzz::new("query").seed(seed).words(&["%", "%2", "%zz", "&", "=", "+", "sinceSeconds=", "limitBytes=", "stream="]).run(|input| {
        let text = String::from_utf8_lossy(input);
        let pairs = server::parameters(&text);
        assert!(pairs.len() <= text.split('&').count());
        let _ = server::log_options(&text).is_ok();
    });
}

#[test]
fn log_lines() {
    let fuzz = Fuzz::new("log-line").seed("2026-11-23T00:00:00.123456789Z stdout F hello\n").seed("2026-11-23T00:00:00Z stderr P:x \n");
    fuzz.words(&[" ", "stdout", "stderr", "F", "P", "+01:00", "Z"]).run(|input| {
        if let Some(line) = logs::parse(input) {
            assert!(line.text.len() <= input.len() && line.stamp.len() <= input.len());
        }
    });
}
