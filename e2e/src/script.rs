//! Tests as data: a client's command lines, and what each must print.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cluster::Cluster;

/// How long a step that waits for a state may be repeated.
const EVENTUALLY: Duration = Duration::from_secs(60);
/// How often it is repeated.
const PAUSE: Duration = Duration::from_millis(200);

/// One command line and what is expected of it.
#[derive(Clone, Debug)]
pub struct Step {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    input: String,
    prints: Vec<String>,
    prints_not: Vec<String>,
    fails: bool,
    eventually: bool,
}

/// A command line: words are split at blanks; `'...'` keeps blanks together.
pub fn step(line: &str) -> Step {
    Step {
        arguments: words(line),
        environment: Vec::new(),
        input: String::new(),
        prints: Vec::new(),
        prints_not: Vec::new(),
        fails: false,
        eventually: false,
    }
}

impl Step {
    /// It prints this, on stdout or stderr.
    pub fn prints(mut self, text: &str) -> Step {
        self.prints.push(text.to_owned());
        self
    }

    /// It does not print this.
    pub fn prints_not(mut self, text: &str) -> Step {
        self.prints_not.push(text.to_owned());
        self
    }

    /// It is given this on stdin, which then ends.
    pub fn input(mut self, text: &str) -> Step {
        self.input = text.to_owned();
        self
    }

    /// It has this in its environment.
    pub fn environment(mut self, name: &str, value: &str) -> Step {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// It ends with another code than 0.
    pub fn fails(mut self) -> Step {
        self.fails = true;
        self
    }

    /// It is repeated until what it prints is right.
    pub fn eventually(mut self) -> Step {
        self.eventually = true;
        self
    }
}

fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, part) in line.split('\'').enumerate() {
        if number % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

/// Plays the steps in order. Every step is tried; the failures come together.
pub fn play(cluster: &Cluster, client: &Path, steps: &[Step]) -> Result<()> {
    let mut failures = Vec::new();
    for step in steps {
        let start = Instant::now();
        let result = play_step(cluster, client, step, start + EVENTUALLY);
        println!(
            "{} {:>6.2} s  {}",
            if result.is_ok() { "ok    " } else { "FAILED" },
            start.elapsed().as_secs_f64(),
            step.arguments.join(" ")
        );
        failures.extend(result.err().map(|error| format!("{}: {error:#}", step.arguments.join(" "))));
    }
    if !failures.is_empty() {
        bail!("{} of {} steps failed:\n{}\n--- coracle up\n{}", failures.len(), steps.len(), failures.join("\n"), cluster.log_tail());
    }
    Ok(())
}

fn play_step(cluster: &Cluster, client: &Path, step: &Step, deadline: Instant) -> Result<()> {
    let arguments: Vec<&str> = step.arguments.iter().map(String::as_str).collect();
    loop {
        let output = cluster.run_with(client, &arguments, &step.environment, &step.input)?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let wrong = judge(step, output.status.success(), &text);
        match wrong {
            None => return Ok(()),
            Some(_) if step.eventually && Instant::now() < deadline => std::thread::sleep(PAUSE),
            Some(wrong) => bail!("{wrong}; ended with {}; printed:\n{text}", output.status),
        }
    }
}

fn judge(step: &Step, success: bool, text: &str) -> Option<String> {
    if success == step.fails {
        return Some(if step.fails { "should fail".to_owned() } else { "should succeed".to_owned() });
    }
    if let Some(missing) = step.prints.iter().find(|wanted| !text.contains(wanted.as_str())) {
        return Some(format!("should print {missing:?}"));
    }
    step.prints_not.iter().find(|unwanted| text.contains(unwanted.as_str())).map(|unwanted| format!("should not print {unwanted:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_keep_blanks() {
        assert_eq!(words("exec p -- sh -c 'echo a  b'"), ["exec", "p", "--", "sh", "-c", "echo a  b"]);
    }

    #[test]
    fn a_step_is_judged_by_all_it_says() {
        let step = step("get pods").prints("Running").prints_not("Error");
        assert_eq!(judge(&step, true, "Running"), None);
        assert!(judge(&step, false, "Running").is_some());
        assert!(judge(&step, true, "Running Error").is_some());
        assert!(judge(&step.clone().fails(), true, "Running").is_some());
    }
}
