//! One execution of a plugin: environment, stdin, bounded answer, deadline.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;

use super::Error;

/// How long a plugin may take. The kubelet gives RunPodSandbox four minutes (twice its runtime request timeout).
const DEADLINE: Duration = Duration::from_secs(120);
const OUTPUT_BYTES_MAX: u64 = 1024 * 1024;

/// The environment of a plugin's execution; empty fields are for commands that have none (STATUS, GC).
#[derive(Debug, Clone, Default)]
pub(crate) struct Invocation<'a> {
    pub bin_dirs: &'a [Utf8PathBuf],
    pub container_id: &'a str,
    /// Empty when the namespace is gone (DEL).
    pub netns: &'a str,
    pub interface: &'a str,
    pub args: &'a str,
}

impl Invocation<'_> {
    /// The plugin's path: the first directory that has it.
    pub fn find(&self, plugin: &str) -> Result<Utf8PathBuf, Error> {
        let found = self.bin_dirs.iter().map(|dir| dir.join(plugin)).find(|path| path.is_file());
        found.ok_or_else(|| Error::PluginMissing { plugin: plugin.to_owned(), dirs: self.bin_dirs.to_vec() })
    }

    /// Executes `command` of the plugin and returns what it printed, if anything.
    ///
    /// # Errors
    /// [`Error::Plugin`] with the plugin's own error, [`Error::Execute`] when it does not start or does not end.
    pub fn run(&self, command: &'static str, plugin: &str, conf: &Value) -> Result<Option<Value>, Error> {
        let path = self.find(plugin)?;
        let execute = |act| move |source| Error::Execute { act, plugin: plugin.to_owned(), source };
        let mut child = self.command(command, &path).spawn().map_err(execute("start"))?;
        let output = exchange(&mut child, conf.to_string().into_bytes(), Instant::now() + DEADLINE);
        if output.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().map_err(execute("wait for"))?;
        let (stdout, stderr) = output.map_err(execute("talk to"))?;
        let printed = String::from_utf8_lossy(&stdout);
        if !status.success() {
            return Err(failure(plugin, command, &printed, &String::from_utf8_lossy(&stderr), &status.to_string()));
        }
        if printed.trim().is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&stdout).map(Some).map_err(|e| Error::Result { plugin: plugin.to_owned(), what: e.to_string() })
    }

    fn command(&self, command: &str, path: &Utf8Path) -> Command {
        let dirs: Vec<&str> = self.bin_dirs.iter().map(|dir| dir.as_str()).collect();
        let mut process = Command::new(path);
        process
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", dirs.join(":"))
            .env("CNI_CONTAINERID", self.container_id)
            .env("CNI_NETNS", self.netns)
            .env("CNI_IFNAME", self.interface)
            .env("CNI_ARGS", self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        process
    }
}

/// The plugin's own error object, or what can be said without one.
fn failure(plugin: &str, command: &'static str, stdout: &str, stderr: &str, status: &str) -> Error {
    let parsed: Value = serde_json::from_str(stdout).unwrap_or(Value::Null);
    let text = |key: &str| parsed[key].as_str().unwrap_or_default().to_owned();
    let message = match text("msg") {
        message if message.is_empty() => format!("{status}: {}", if stderr.trim().is_empty() { stdout.trim() } else { stderr.trim() }),
        message => message,
    };
    Error::Plugin { plugin: plugin.to_owned(), command, code: parsed["code"].as_u64().unwrap_or(0), message, details: text("details") }
}

/// Writes stdin and reads both outputs at once, so that no pipe can fill up and block; each on a thread, for a plugin may do neither.
fn exchange(child: &mut Child, input: Vec<u8>, deadline: Instant) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let stdin = child.stdin.take();
    std::thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            // A plugin that does not read its configuration is no error of ours: its exit status says what it thinks.
            let _ = stdin.write_all(&input);
        }
    });
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let receive = |channel: mpsc::Receiver<std::io::Result<Vec<u8>>>| {
        channel
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it did not end in time")))
    };
    Ok((receive(stdout)?, receive(stderr)?))
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<std::io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = match pipe {
            Some(pipe) => pipe.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).map(|_| bytes),
            None => Ok(bytes),
        };
        let _ = sender.send(read);
    });
    receiver
}
