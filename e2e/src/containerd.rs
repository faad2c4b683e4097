//! Upstream's containerd on a host of a test's own, with our shim or our OCI runtime in the place of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testkit::host::{Host, on_own_host};
use testkit::registry::Registry;

use crate::{images, ours};

/// How long anything that is waited for may take.
const TIMEOUT: Duration = Duration::from_secs(90);
/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);
/// Debian's CNI plugins (package containernetworking-plugins).
const CNI_PLUGINS: &str = "/usr/lib/cni";

/// What the addresses of pods begin with on its network.
pub const POD_PREFIX: &str = "10.89.";

/// One release of containerd: its daemon, its client and its shim, with a runc of the same time.
#[derive(Clone, Debug)]
pub struct Release {
    /// `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub folder: PathBuf,
    /// The OCI runtime beside it.
    pub runc: PathBuf,
    /// As the configuration has it: 2 up to containerd 1.7, then 3.
    config_version: u32,
}

impl Release {
    /// Debian 12's containerd 1.6 with its runc 1.1, from the unpacked packages.
    pub fn debian() -> Option<Release> {
        let folder = crate::peer("debian/containerd/usr/bin/containerd")?;
        let runc = crate::peer("debian/runc/usr/sbin/runc")?;
        Some(Release { folder: folder.parent()?.to_owned(), runc, config_version: 2 })
    }

    /// containerd 2.x with its runc, built by Go.
    pub fn v2() -> Option<Release> {
        let (containerd, runc) = (crate::peer("containerd")?, crate::peer("runc")?);
        Some(Release { folder: containerd.parent()?.to_owned(), runc, config_version: 3 })
    }

    /// `PATH` of the daemon, which looks there for shims and runtimes: ours, then its own.
    ///
    /// # Errors
    /// When ours are not built.
    pub fn path(&self) -> Result<std::ffi::OsString> {
        let mut path = vec![ours("coracle-oci")?.parent().map(Path::to_owned).unwrap_or_default(), self.folder.clone()];
        path.extend(self.runc.parent().map(Path::to_owned));
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        std::env::join_paths(path).context("PATH has a folder with a colon")
    }

    /// What `containerd --version` and `runc --version` print of themselves, in one line.
    ///
    /// # Errors
    /// When they cannot be run.
    pub fn version(&self) -> Result<String> {
        Ok(format!("{}, {}", version(&self.folder.join("containerd"))?, version(&self.runc)?))
    }
}

/// The first line of what `PROGRAM --version` prints.
///
/// # Errors
/// When it cannot be run, or fails.
pub fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output().with_context(|| format!("failed to run {}", program.display()))?;
    let text = testkit::host::checked(output).with_context(|| format!("{} --version", program.display()))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// A running containerd.
pub struct Containerd<'a> {
    /// The host of its own.
    pub host: &'a Host,
    /// For all files.
    pub folder: &'a Path,
    release: Release,
    daemon: Child,
    /// The image's name.
    pub image: String,
    /// Serves it.
    _registry: Registry,
}

/// Runs `test` with a containerd of this release. All is removed, also when the test fails; nothing may be left before. `None`: skipped.
///
/// # Errors
/// The test's, or what it left behind.
pub fn with_containerd<T: Send>(
    name: &str,
    release: &Release,
    test: impl FnOnce(&Containerd<'_>) -> Result<T> + Send,
) -> Result<Option<T>> {
    // Sockets are below it: a short name.
    let folder = tempfile::Builder::new().prefix("ctd").tempdir().context("failed to make a folder")?;
    let path = folder.path();
    let done = on_own_host(name, |host| {
        let mut containerd = Containerd::start(host, path, release.clone())?;
        let done = test(&containerd).and_then(|done| containerd.expect_nothing_left().map(|()| done));
        let done = done.with_context(|| format!("the end of containerd's log:\n{}", containerd.log_tail()));
        containerd.daemon.kill().context("failed to kill containerd")?;
        containerd.daemon.wait().context("failed to wait for containerd")?;
        done
    })?;
    done.transpose()
}

/// Writes the configuration of a containerd whose files are all in `folder`; `registry` (its address) speaks plain HTTP. Its socket is
/// [`socket`].
///
/// # Errors
/// When a file cannot be written.
pub fn configure(folder: &Path, release: &Release, registry: &str, sandbox_image: &str) -> Result<PathBuf> {
    write_cni(folder)?;
    write_hosts(folder, registry)?;
    let path = folder.join("config.toml");
    fs::write(&path, config_toml(folder, release, sandbox_image)?).context("failed to write config.toml")?;
    Ok(path)
}

/// The socket of all services of a containerd whose files are in `folder`, CRI among them.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("c.sock")
}

impl<'a> Containerd<'a> {
    fn start(host: &'a Host, folder: &'a Path, release: Release) -> Result<Self> {
        // What is fixed in containerd and its shims lies below /run: a new one, in this mount namespace.
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status().context("failed to run mount")?;
        anyhow::ensure!(mounted.success(), "failed to mount a new /run");
        let registry = Registry::start().context("failed to start the registry")?;
        let image = registry.add("busybox", "1", &images::busybox("1")?);
        let sandbox_image = registry.add("pause", "1", &images::sleeper()?);
        let config = configure(folder, &release, &registry.address(), &sandbox_image)?;
        let log = File::create(folder.join("containerd.log")).context("failed to create the log")?;
        let mut command = host.command(&release.folder.join("containerd").display().to_string());
        command.arg("--config").arg(config).env("PATH", release.path()?);
        command.env("TMPDIR", folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let daemon = command.spawn().context("failed to run containerd")?;
        let mut containerd = Containerd { host, folder, release, daemon, image, _registry: registry };
        let up = containerd.await_up().and_then(|()| containerd.ctr(&["images", "pull", "--plain-http", &containerd.image]));
        match up {
            Ok(output) if output.status.success() => Ok(containerd),
            other => {
                let _ = (containerd.daemon.kill(), containerd.daemon.wait());
                bail!("containerd did not come up: {other:?}\n{}", containerd.log_tail())
            }
        }
    }

    fn await_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while !self.ctr(&["version"])?.status.success() {
            let ended = self.daemon.try_wait().context("failed to look at containerd")?;
            anyhow::ensure!(ended.is_none() && Instant::now() < deadline, "it does not answer ({ended:?})");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The socket of all its services, CRI among them.
    pub fn socket(&self) -> PathBuf {
        socket(self.folder)
    }

    /// Runs `crictl` on containerd's CRI; a failure is an error with all that it said.
    ///
    /// # Errors
    /// When there is no crictl, or it fails.
    pub fn crictl(&self, words: &[&str]) -> Result<String> {
        let endpoint = format!("unix://{}", self.socket().display());
        let mut command = Command::new(crate::peer("crictl").context("CORACLE_PEERS has no crictl")?);
        command.args(["--config", "/dev/null", "--timeout", "120s", "-r", &endpoint, "-i", &endpoint]).args(words).stdin(Stdio::null());
        let output = command.output().context("failed to run crictl")?;
        Ok(testkit::host::checked(output).with_context(|| format!("crictl {}", words.join(" ")))?.trim().to_owned())
    }

    /// The pids of the processes of the host but containerd, with their command lines.
    ///
    /// # Errors
    /// When cgroups cannot be found.
    pub fn processes(&self) -> Result<Vec<(String, String)>> {
        let mut found = std::collections::BTreeMap::new();
        for (_, group) in self.groups()? {
            let mut below = vec![group];
            while let Some(group) = below.pop() {
                let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                found.extend(processes.lines().map(|pid| (pid.to_owned(), command_line(pid))));
                let entries = fs::read_dir(&group).into_iter().flatten().flatten();
                below.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
            }
        }
        found.remove(&self.daemon.id().to_string());
        Ok(found.into_iter().collect())
    }

    /// A command line of this release's `ctr`.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.release.folder.join("ctr"));
        command.arg("--address").arg(self.socket()).stdin(Stdio::null());
        command
    }

    /// Runs `ctr`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn ctr(&self, words: &[&str]) -> Result<Output> {
        self.ctr_command().args(words).output().context("failed to run ctr")
    }

    /// Runs `ctr` on a terminal; answers what that showed, and the exit code.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn ctr_on_terminal(&self, words: &[&str]) -> Result<(String, Option<i32>)> {
        let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let line = format!("'{}' --address '{}' {}", self.release.folder.join("ctr").display(), self.socket().display(), quoted.join(" "));
        // Its stdin stays open until the end: a terminal's end would be typed.
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).stdin(Stdio::piped());
        let mut child = script.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("failed to run script")?;
        let stdin = child.stdin.take();
        let output = child.wait_with_output().context("failed to wait for script")?;
        drop(stdin);
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code()))
    }

    /// Polls until it is so.
    ///
    /// # Errors
    /// After a generous time, and those of `reached`.
    pub fn until(&self, what: &str, mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while !reached()? {
            anyhow::ensure!(Instant::now() < deadline, "not reached: {what}");
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Where our and upstream's OCI runtimes keep their containers in these tests.
    pub fn runtime_root(&self) -> PathBuf {
        self.folder.join("oci")
    }

    /// What is left of containers: bundles, states of the OCI runtime, sockets of shims, mounts, processes, cgroups.
    fn left(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect()
        };
        for tree in ["io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"] {
            names(&self.folder.join("state").join(tree)).iter().for_each(|namespace| left.extend(names(Path::new(namespace))));
        }
        names(&self.runtime_root()).iter().for_each(|namespace| left.extend(names(Path::new(namespace))));
        left.extend(names(Path::new("/run/containerd/s")));
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("failed to read mountinfo")?;
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        left.extend(points.filter(|point| point.starts_with(&self.folder.display().to_string())).map(str::to_owned));
        for (_, group) in self.groups()? {
            let below = fs::read_dir(&group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
            left.extend(below.map(|entry| entry.path().display().to_string()));
            let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            let others = processes.lines().filter(|pid| *pid != self.daemon.id().to_string());
            left.extend(others.map(|pid| format!("{pid} {}", command_line(pid))));
        }
        Ok(left)
    }

    fn groups(&self) -> Result<Vec<(Vec<String>, PathBuf)>> {
        let host = linux::cgroup::Host::detect().context("failed to look for cgroups")?;
        Ok(linux::cgroup::Cgroup::new(&host, Path::new(&self.host.cgroup)).directories())
    }

    fn expect_nothing_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = self.until("nothing is left", || {
            left = self.left()?;
            Ok(left.is_empty())
        });
        gone.map_err(|_| anyhow::anyhow!("this is left of the containers:\n{}", left.join("\n")))
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.folder.join("containerd.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// The handlers of containerd's CRI in which a part is ours.
    pub fn handlers(&self) -> &'static [&'static str] {
        if self.release.config_version > 2 { &["coracle-oci", "coracle", "coracle-sandbox"] } else { &["coracle-oci", "coracle"] }
    }
}

/// A process's command line, its words parted by spaces.
pub fn command_line(pid: &str) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim().to_owned()
}

/// A bridge network of the pods.
fn write_cni(folder: &Path) -> Result<()> {
    let cni = folder.join("cni");
    fs::create_dir_all(&cni).context("failed to make a folder")?;
    let ipam = serde_json::json!({ "type": "host-local", "dataDir": folder.join("ipam"), "ranges": [[{ "subnet": format!("{POD_PREFIX}0.0/24") }]] });
    let bridge = serde_json::json!({ "type": "bridge", "bridge": "e2e0", "isGateway": true, "ipMasq": false, "ipam": ipam });
    let list = serde_json::json!({ "cniVersion": "1.0.0", "name": "e2e", "plugins": [bridge] });
    fs::write(cni.join("10-e2e.conflist"), list.to_string()).context("failed to write the network's configuration")
}

/// The registry speaks plain HTTP, which containerd's CRI is told by a file.
fn write_hosts(folder: &Path, registry: &str) -> Result<()> {
    let hosts = folder.join("hosts").join(registry);
    fs::create_dir_all(&hosts).context("failed to make a folder")?;
    fs::write(hosts.join("hosts.toml"), format!("server = \"http://{registry}\"\n")).context("failed to write hosts.toml")
}

/// The configuration, with a runtime handler for each way of putting our parts in: `runc` (all upstream's), `coracle-oci` (its shim, our
/// OCI runtime), `coracle` (our shim and OCI runtime), and with 2.x
/// `coracle-sandbox` (the same, with the sandbox API).
fn config_toml(folder: &Path, release: &Release, sandbox_image: &str) -> Result<String> {
    let (cni, hosts) = (folder.join("cni"), folder.join("hosts"));
    let head = format!(
        "version = {}\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
        release.config_version,
        folder.join("root"),
        folder.join("state"),
        socket(folder),
        folder.join("c.sock.ttrpc"),
        folder.join("opt"),
    );
    let cri = if release.config_version == 2 {
        let section = "plugins.\"io.containerd.grpc.v1.cri\"";
        format!(
            "[{section}]\nsandbox_image = {sandbox_image:?}\nrestrict_oom_score_adj = true\n\
             [{section}.registry]\nconfig_path = {hosts:?}\n\
             [{section}.cni]\nbin_dir = {CNI_PLUGINS:?}\nconf_dir = {cni:?}\n[{section}.containerd]\nsnapshotter = \"overlayfs\"\n"
        )
    } else {
        let (images, runtime) = ("plugins.\"io.containerd.cri.v1.images\"", "plugins.\"io.containerd.cri.v1.runtime\"");
        format!(
            "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n[{images}]\nsnapshotter = \"overlayfs\"\n\
             [{images}.pinned_images]\nsandbox = {sandbox_image:?}\n[{images}.registry]\nconfig_path = {hosts:?}\n\
             [{runtime}]\nrestrict_oom_score_adj = true\n[{runtime}.cni]\nbin_dirs = [{CNI_PLUGINS:?}]\nconf_dir = {cni:?}\n"
        )
    };
    let runtimes = match release.config_version {
        2 => "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes",
        _ => "plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes",
    };
    let handler = |name: &str, kind: &str, binary: &Path| {
        let root = folder.join("oci");
        let options = format!("[{runtimes}.{name}.options]\nBinaryName = {binary:?}\nRoot = {root:?}\n");
        format!("[{runtimes}.{name}]\nruntime_type = {kind:?}\n{}", if binary.as_os_str().is_empty() { "" } else { &options })
    };
    let mut handlers = vec![
        handler("runc", "io.containerd.runc.v2", &release.runc),
        handler("coracle-oci", "io.containerd.runc.v2", &ours("coracle-oci")?),
        handler("coracle", "io.containerd.coracle.v2", Path::new("")),
    ];
    if release.config_version > 2 {
        let sandbox = handler("coracle-sandbox", "io.containerd.coracle.v2", Path::new(""));
        handlers.push(format!("{sandbox}sandboxer = \"shim\"\n"));
    }
    Ok(head + &cri + &handlers.concat())
}
