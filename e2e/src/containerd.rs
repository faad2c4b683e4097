//! Upstream's containerd on a host of a test's own, with our shim or our OCI runtime in the place of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use testkit::containerd::{Bridge, Config, ConfigVersion, Cri, Handler};
use testkit::host::{Host, command_line, on_own_host};
use testkit::registry::Registry;

use crate::api::eventually;
use crate::{images, ours};

/// What the addresses of pods begin with on its network.
pub const POD_PREFIX: &str = "10.89.";

/// One release of containerd: its daemon, its client and its shim, with a runc of the same time.
#[derive(Clone, Debug)]
pub struct Release {
    /// `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub folder: PathBuf,
    /// The OCI runtime beside it.
    pub runc: PathBuf,
    configuration: ConfigVersion,
}

impl Release {
    /// Debian 12's containerd 1.6 with its runc 1.1, from the unpacked packages.
    pub fn debian() -> Option<Release> {
        let folder = crate::peer("debian/containerd/usr/bin/containerd")?;
        let runc = crate::peer("debian/runc/usr/sbin/runc")?;
        Some(Release { folder: folder.parent()?.to_owned(), runc, configuration: ConfigVersion::Two })
    }

    /// containerd 1.7 with the runc of 2.x, built by Go.
    pub fn v1_7() -> Option<Release> {
        let (containerd, runc) = (crate::peer("containerd-1.7/containerd")?, crate::peer("runc")?);
        Some(Release { folder: containerd.parent()?.to_owned(), runc, configuration: ConfigVersion::Two })
    }

    /// containerd 2.x with its runc, built by Go.
    pub fn v2() -> Option<Release> {
        let (containerd, runc) = (crate::peer("containerd")?, crate::peer("runc")?);
        Some(Release { folder: containerd.parent()?.to_owned(), runc, configuration: ConfigVersion::Three })
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
    config: Config,
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

/// The configuration of a containerd whose files are all in `folder`, with a runtime handler for each way of putting our parts in: `runc`
/// (all upstream's), `coracle-oci` (its shim, our OCI runtime), `coracle` (our shim and OCI runtime), and with 2.x `coracle-sandbox` (the
/// same, with the sandbox API).
///
/// # Errors
/// When ours are not built.
pub fn config(folder: &Path, release: &Release, registry: &str, sandbox_image: &str) -> Result<Config> {
    let ours_alone = |name| Handler { name, kind: "io.containerd.coracle.v2", runtime: None, sandbox_by_shim: false };
    let mut handlers =
        vec![Handler::runc("runc", release.runc.clone()), Handler::runc("coracle-oci", ours("coracle-oci")?), ours_alone("coracle")];
    if release.configuration == ConfigVersion::Three {
        handlers.push(Handler { sandbox_by_shim: true, ..ours_alone("coracle-sandbox") });
    }
    let network = Some(Bridge { link: "e2e0", subnet: format!("{POD_PREFIX}0.0/24") });
    let cri = Cri { sandbox_image: sandbox_image.to_owned(), registry: registry.to_owned(), network, handlers };
    Ok(Config::within(folder, release.configuration, Some(cri)))
}

impl<'a> Containerd<'a> {
    fn start(host: &'a Host, folder: &'a Path, release: Release) -> Result<Self> {
        // What is fixed in containerd and its shims lies below /run: a new one, in this mount namespace.
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status().context("failed to run mount")?;
        anyhow::ensure!(mounted.success(), "failed to mount a new /run");
        let registry = Registry::start().context("failed to start the registry")?;
        let image = registry.add("busybox", "1", &images::busybox("1")?);
        let sandbox_image = registry.add("pause", "1", &images::sleeper()?);
        let config = config(folder, &release, &registry.address(), &sandbox_image)?;
        let file = config.write().context("failed to write containerd's configuration")?;
        let log = File::create(folder.join("containerd.log")).context("failed to create the log")?;
        let mut command = host.command(&release.folder.join("containerd").display().to_string());
        command.arg("--config").arg(file).env("PATH", release.path()?);
        command.env("TMPDIR", folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let daemon = command.spawn().context("failed to run containerd")?;
        let mut containerd = Containerd { host, folder, release, config, daemon, image, _registry: registry };
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
        eventually("it answers", || {
            let ended = self.daemon.try_wait().context("failed to look at containerd")?;
            anyhow::ensure!(ended.is_none(), "it has ended: {ended:?}");
            Ok(self.ctr(&["version"])?.status.success())
        })
    }

    /// The socket of all its services, CRI among them.
    pub fn socket(&self) -> PathBuf {
        self.config.socket.clone()
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
        let own = self.daemon.id().to_string();
        Ok(processes(&self.host.cgroup)?.into_iter().filter(|(pid, _)| *pid != own).collect())
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

    /// Where our and upstream's OCI runtimes keep their containers in these tests.
    pub fn runtime_root(&self) -> PathBuf {
        self.config.runtime_root()
    }

    /// What is left of containers: bundles, states of the OCI runtime, sockets of shims, mounts, processes, cgroups.
    fn left(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect()
        };
        for tree in ["io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"] {
            names(&self.config.state.join(tree)).iter().for_each(|namespace| left.extend(names(Path::new(namespace))));
        }
        names(&self.runtime_root()).iter().for_each(|namespace| left.extend(names(Path::new(namespace))));
        left.extend(names(Path::new("/run/containerd/s")));
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("failed to read mountinfo")?;
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        left.extend(points.filter(|point| point.starts_with(&self.folder.display().to_string())).map(str::to_owned));
        for group in groups(&self.host.cgroup)? {
            let below = fs::read_dir(&group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
            left.extend(below.map(|entry| entry.path().display().to_string()));
            let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            let others = processes.lines().filter(|pid| *pid != self.daemon.id().to_string());
            left.extend(others.map(|pid| format!("{pid} {}", pid.parse().map(command_line).unwrap_or_default())));
        }
        Ok(left)
    }

    fn expect_nothing_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = eventually("nothing is left", || {
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
    pub fn handlers(&self) -> impl Iterator<Item = &'static str> {
        let handlers = self.config.cri.iter().flat_map(|cri| &cri.handlers);
        handlers.map(|handler| handler.name).filter(|name| *name != "runc")
    }
}

/// The folders of a cgroup, in each hierarchy.
///
/// # Errors
/// When cgroups cannot be found.
pub fn groups(cgroup: &str) -> Result<Vec<PathBuf>> {
    let host = linux::cgroup::Host::detect().context("failed to look for cgroups")?;
    Ok(linux::cgroup::Cgroup::new(&host, Path::new(cgroup)).directories().into_iter().map(|(_, group)| group).collect())
}

/// The pids of the processes of a cgroup and those below, with their command lines.
///
/// # Errors
/// When cgroups cannot be found.
pub fn processes(cgroup: &str) -> Result<Vec<(String, String)>> {
    let mut found = std::collections::BTreeMap::new();
    let mut below = groups(cgroup)?;
    while let Some(group) = below.pop() {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(processes.lines().map(|pid| (pid.to_owned(), pid.parse().map(command_line).unwrap_or_default())));
        let entries = fs::read_dir(&group).into_iter().flatten().flatten();
        below.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    Ok(found.into_iter().collect())
}
