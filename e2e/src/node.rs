//! `coracle cri` alone on a host of its own: network, mount, IPC and UTS namespaces, a cgroup root, and a registry beside it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testkit::host::{Host, on_own_host};
use testkit::registry::Registry;

use crate::ours;

/// How long a server may take to listen.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A host for CRI servers, ours or upstream's.
pub struct Node<'a> {
    host: &'a Host,
    folder: &'a Path,
    /// Keeps the IPC and UTS namespaces.
    holder: Child,
    servers: Vec<Child>,
    /// Serves images on loopback.
    pub registry: Registry,
}

/// Runs `test` on a node. Every process of it is ended and all of it is removed, also when the test fails. `None`: skipped.
pub fn on_node<T: Send>(name: &str, test: impl FnOnce(&mut Node<'_>) -> Result<T> + Send) -> Result<Option<T>> {
    // Sockets are below it: a short name.
    let folder = tempfile::Builder::new().prefix("cri").tempdir().context("failed to make a folder")?;
    let path = folder.path();
    let done = on_own_host(name, |host| {
        let mut node = Node::new(host, path)?;
        let done = test(&mut node);
        if done.is_err() {
            eprintln!("{}", node.log_tail());
        }
        node.end();
        done
    })?;
    done.transpose()
}

impl<'a> Node<'a> {
    fn new(host: &'a Host, folder: &'a Path) -> Result<Self> {
        std::fs::create_dir(folder.join("tmp")).context("failed to make a folder")?;
        let mut holder = host.command("unshare");
        holder.args(["--ipc", "--uts", "sh", "-c", "echo ready && exec sleep infinity"]);
        let mut holder = holder.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("failed to run unshare")?;
        let mut ready = [0; 6];
        std::io::Read::read_exact(&mut holder.stdout.take().context("unshare has no stdout")?, &mut ready)
            .context("failed to make namespaces")?;
        let registry = Registry::start().context("failed to start the registry")?;
        Ok(Self { host, folder, holder, servers: Vec::new(), registry })
    }

    /// Starts `coracle cri`, with these flags besides, and waits until it listens.
    ///
    /// # Errors
    /// When it ends, or does not listen in time.
    pub fn start_ours(&mut self, flags: &[String]) -> Result<()> {
        let paths = [("root", "root"), ("state", "state"), ("cni-conf-dir", "cni"), ("cni-bin-dir", "cni")];
        let mut arguments = vec!["cri".to_owned(), format!("--address={}", self.socket().display())];
        arguments.extend(paths.iter().map(|(flag, name)| format!("--{flag}={}", self.folder.join(name).display())));
        arguments.push(format!("--cgroup-root={}/pods", self.host.cgroup));
        arguments.extend(flags.iter().cloned());
        let socket = self.socket();
        self.start(&ours("coracle")?, &arguments, &socket)
    }

    /// Starts a server, and waits until it listens on `socket`.
    ///
    /// # Errors
    /// When it ends, or does not listen in time.
    pub fn start(&mut self, program: &Path, arguments: &[String], socket: &Path) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log()).context("failed to open the log")?;
        let mut command = self.enter(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut server = command.spawn().with_context(|| format!("failed to run {}", program.display()))?;
        let deadline = Instant::now() + TIMEOUT;
        while UnixStream::connect(socket).is_err() {
            if let Some(ended) = server.try_wait()? {
                bail!("{} ended with {ended}:\n{}", program.display(), self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{} does not listen:\n{}", program.display(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.servers.push(server);
        Ok(())
    }

    /// Ends the server that was started last by SIGKILL.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_server(&mut self) -> Result<()> {
        let mut server = self.servers.pop().context("no server runs")?;
        server.kill().context("failed to kill a server")?;
        server.wait().map(drop).context("failed to wait for a server")
    }

    /// A command line of `crictl` on our server.
    ///
    /// # Errors
    /// When there is no crictl.
    pub fn crictl_command(&self, words: &[&str]) -> Result<Command> {
        let endpoint = format!("unix://{}", self.socket().display());
        let mut command = Command::new(crate::peer("crictl").context("CORACLE_PEERS has no crictl")?);
        command.args(["--config", "/dev/null", "--timeout", "120s", "-r", &endpoint, "-i", &endpoint]).args(words).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `crictl` on our server; a failure is an error with all that it said.
    ///
    /// # Errors
    /// When there is no crictl, or it fails.
    pub fn crictl(&self, words: &[&str]) -> Result<String> {
        let output = self.crictl_command(words)?.output().context("failed to run crictl")?;
        Ok(testkit::host::checked(output).with_context(|| format!("crictl {}", words.join(" ")))?.trim().to_owned())
    }

    /// A folder for the files of the test.
    pub fn folder(&self) -> &Path {
        self.folder
    }

    /// The socket of our server.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("cri.sock")
    }

    /// The cgroup of the node: "/coracle-test-PID-N".
    pub fn cgroup(&self) -> &str {
        &self.host.cgroup
    }

    fn log(&self) -> PathBuf {
        self.folder.join("servers.log")
    }

    /// The end of what the servers logged.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// A command that runs in the node's namespaces and cgroups, with its folder for temporary files.
    pub fn enter(&self, program: &Path) -> Command {
        let mut command = self.host.command("nsenter");
        command.args(["--ipc", "--uts", "--target", &self.holder.id().to_string(), "--"]).arg(program);
        command.env("HOME", self.folder).env("TMPDIR", self.folder.join("tmp"));
        command
    }

    fn end(&mut self) {
        for child in self.servers.iter_mut().rev().chain([&mut self.holder]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
