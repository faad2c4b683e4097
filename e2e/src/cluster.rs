//! A cluster of one node with network and mount namespaces and a cgroup root of its own.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use linux::namespace::Kind;
use testkit::host::checked;
use testkit::image::Image;
use testkit::registry::{Fault, Registry};

use crate::api::Api;
use crate::containerd::{self, Release};
use crate::ours;
use crate::parts::{self, Parts};
use crate::sockets::Sockets;
use crate::table::Table;

/// How long a cluster may take to be up or gone.
const TIMEOUT: Duration = Duration::from_secs(120);
const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;
/// How long one command of a client may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// Where the registry listens, in the cluster's namespace: images are `localhost:5000/NAME:TAG`.
const REGISTRY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5000);

/// Gives a network namespace an address and a default route, which lead nowhere.
const UPLINK: &str = "ip link add uplink type bridge && ip address add 192.0.2.10/24 dev uplink && ip link set uplink up && ip route add default via 192.0.2.1";

/// Where the cluster's etcd listens, in the cluster's namespace.
const ETCD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 2379);

/// How often a daemon that was told another time looks at it, in seconds.
const CLOCK_LOOK_SECONDS: &str = "1";

/// What a cluster has beside `coracle up`.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// A real etcd in place of the embedded store: its program.
    pub etcd: Option<PathBuf>,
    /// The preload library of libfaketime, by which the daemon's clock, and no other's, can be moved.
    pub clock: Option<PathBuf>,
}

/// A small disk.
#[derive(Clone, Copy, Debug)]
pub enum Disk {
    /// ext4 in a file, over a loop device.
    Ext4 { bytes: u64 },
    /// A tmpfs.
    Memory { bytes: u64 },
}

/// A running cluster. Dropping it removes everything, also when a test fails.
pub struct Cluster {
    folder: PathBuf,
    cgroup_root: String,
    /// Keeps the namespaces: `sleep` in them, so that `coracle up` may die and come back.
    holder: Child,
    up: Option<Child>,
    /// In place of `coracle up`: each part is a process of its own.
    parts: Option<Parts>,
    beside: Beside,
    /// The etcd, in the cluster's namespaces.
    etcd: Option<Child>,
    registry: Option<Registry>,
    /// `coracle down` has been run.
    removed: bool,
    /// The runtime below the kubelet, when it is not ours.
    containerd: Option<Child>,
}

impl Cluster {
    /// Starts a cluster; `name` tells its folder and cgroup from those of other tests.
    pub fn start(name: &str) -> Result<Cluster> {
        Self::start_over(name, "true", None)
    }

    /// As [`Cluster::start`], on a host with an uplink: an address (192.0.2.10) and a default route that lead nowhere.
    pub fn start_with_uplink(name: &str) -> Result<Cluster> {
        Self::start_over(name, UPLINK, None)
    }

    /// Starts a cluster whose kubelet runs its pods on upstream's containerd, on a host with an uplink: the bridge that gives a node
    /// without one its address is our own runtime's.
    pub fn start_on_containerd(name: &str, release: &Release) -> Result<Cluster> {
        Self::start_over(name, UPLINK, Some(release))
    }

    /// Starts a cluster whose parts are processes of their own.
    pub fn start_in_parts(name: &str) -> Result<Cluster> {
        let mut cluster = Cluster::prepare(name, "true")?;
        cluster.parts = Some(Parts::plan(&cluster)?);
        cluster.up()?;
        Ok(cluster)
    }

    /// Starts a cluster some of whose directories (paths below its folder: `data/store`) are small disks of their own.
    pub fn start_on_disks(name: &str, disks: &[(&str, Disk)]) -> Result<Cluster> {
        let mut cluster = Cluster::prepare(name, "true")?;
        for (path, disk) in disks {
            cluster.mount(path, *disk)?;
        }
        cluster.up()?;
        Ok(cluster)
    }

    /// Mounts a small disk in the cluster's mount namespace; it goes with it.
    pub fn mount(&self, path: &str, disk: Disk) -> Result<()> {
        let target = self.folder.join(path);
        fs::create_dir_all(&target).with_context(|| format!("failed to create {}", target.display()))?;
        let target = target.to_string_lossy().into_owned();
        let output = match disk {
            Disk::Memory { bytes } => {
                self.run(Path::new("mount"), &["-t", "tmpfs", "-o", &format!("size={bytes},mode=755"), "tmpfs", &target], "")?
            }
            Disk::Ext4 { bytes } => {
                let image = self.folder.join(format!("{}.img", path.replace('/', "-")));
                File::create(&image).and_then(|file| file.set_len(bytes)).with_context(|| format!("failed to make {}", image.display()))?;
                let image = image.to_string_lossy().into_owned();
                checked(self.run(Path::new("mkfs.ext4"), &["-q", "-F", "-m", "0", &image], "")?).context("failed to make a file system")?;
                self.run(Path::new("mount"), &["-o", "loop", &image, &target], "")?
            }
        };
        checked(output).map(drop).with_context(|| format!("failed to mount a disk on {target}"))
    }

    /// A path as the cluster's mount namespace shows it.
    pub fn path_inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        path.strip_prefix("/").map_or_else(|_| root.join(path), |path| root.join(path))
    }

    /// Starts a cluster whose store is a real etcd.
    pub fn start_on_etcd(name: &str, etcd: &Path) -> Result<Cluster> {
        Self::start_beside(name, Beside { etcd: Some(etcd.to_owned()), clock: None })
    }

    /// Starts a cluster that has more than `coracle up`.
    pub fn start_beside(name: &str, beside: Beside) -> Result<Cluster> {
        let mut cluster = Cluster::prepare(name, "true")?;
        cluster.beside = beside;
        if cluster.beside.clock.is_some() {
            // libfaketime keeps files there for each process, which one that is killed leaves.
            checked(cluster.run(Path::new("mount"), &["-t", "tmpfs", "tmpfs", "/dev/shm"], "")?).context("failed to mount /dev/shm")?;
        }
        cluster.start_etcd()?;
        if cluster.beside.clock.is_some() {
            cluster.step_clock(0)?;
            // The library leaves a semaphore there when its process is killed.
            let mounted = cluster.run(Path::new("mount"), &["-t", "tmpfs", "tmpfs", "/dev/shm"], "")?;
            checked(mounted).context("failed to mount a new /dev/shm")?;
        }
        cluster.up()?;
        Ok(cluster)
    }

    /// Starts the etcd, if there is to be one, and waits until it listens.
    fn start_etcd(&mut self) -> Result<()> {
        let Some(program) = &self.beside.etcd else { return Ok(()) };
        let config = self.folder.join("etcd.yaml");
        fs::write(&config, crate::servers::etcd_config(&self.folder, ETCD.port(), ETCD.port() + 1)).context("failed to write a file")?;
        let log = self.folder.join("etcd.log");
        let output = File::options().create(true).append(true).open(&log).context("failed to open etcd's log")?;
        let mut command = self.enter(program);
        command.arg(format!("--config-file={}", config.display())).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        self.etcd = Some(command.spawn().context("failed to run etcd")?);
        let deadline = Instant::now() + TIMEOUT;
        while !self.within(|| TcpStream::connect(ETCD).is_ok())? {
            if Instant::now() > deadline {
                bail!("etcd does not listen:\n{}", fs::read_to_string(log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Stops etcd's process for so long, as a machine that hangs does.
    pub fn hang_etcd(&self, time: Duration) -> Result<()> {
        let etcd = self.etcd.as_ref().context("there is no etcd")?;
        let pid = i32::try_from(etcd.id())?;
        linux::process::kill(pid, SIGSTOP).context("failed to stop etcd")?;
        std::thread::sleep(time);
        linux::process::kill(pid, SIGCONT).context("failed to continue etcd")
    }

    /// Kills etcd with SIGKILL, and starts it again after so long.
    pub fn kill_etcd(&mut self, time: Duration) -> Result<()> {
        let mut etcd = self.etcd.take().context("there is no etcd")?;
        etcd.kill().context("failed to kill etcd")?;
        etcd.wait().context("failed to wait for etcd")?;
        std::thread::sleep(time);
        self.start_etcd()
    }

    /// Puts the daemon's clock this far from the machine's: within a second, and in all its later lives.
    pub fn step_clock(&self, seconds: i64) -> Result<()> {
        if self.beside.clock.is_none() {
            return Ok(());
        }
        let (path, temporary) = (self.clock_file(), self.folder.join("clock.tmp"));
        fs::write(&temporary, format!("{seconds:+}\n"))
            .and_then(|()| fs::rename(&temporary, &path))
            .context("failed to write the clock's file")
    }

    fn clock_file(&self) -> PathBuf {
        self.folder.join("clock")
    }

    /// `network` is a shell command that prepares the network namespace.
    fn start_over(name: &str, network: &str, release: Option<&Release>) -> Result<Cluster> {
        let mut cluster = Cluster::prepare(name, network)?;
        if let Some(release) = release {
            cluster.start_containerd(release)?;
        }
        cluster.up()?;
        Ok(cluster)
    }

    /// Namespaces, cgroup and registry; nothing runs yet.
    fn prepare(name: &str, network: &str) -> Result<Cluster> {
        let folder = std::env::temp_dir().join(format!("coracle-e2e-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let mut holder = Command::new("unshare");
        let script = format!("ip link set lo up && {network} && echo ready && exec sleep infinity");
        holder.args(["--net", "--mount", "--propagation", "private", "sh", "-c", &script]);
        let mut holder = holder.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("failed to run unshare")?;
        let mut ready = [0; 6];
        std::io::Read::read_exact(&mut holder.stdout.take().context("unshare has no stdout")?, &mut ready)
            .context("failed to make namespaces")?;
        let registry = within(holder.id(), || Registry::start_on(REGISTRY).context("failed to start the registry"))??;
        let cgroup_root = format!("/coracle-e2e-{name}-{}", std::process::id());
        let beside = Beside::default();
        Ok(Cluster {
            folder,
            cgroup_root,
            holder,
            up: None,
            parts: None,
            beside,
            etcd: None,
            registry: Some(registry),
            removed: false,
            containerd: None,
        })
    }

    /// Starts containerd in the cluster's namespaces, and waits for its socket.
    fn start_containerd(&mut self, release: &Release) -> Result<()> {
        // What is fixed in containerd and its shims lies below /run: a new one, in this mount namespace.
        let mounted = self.run(Path::new("mount"), &["-t", "tmpfs", "tmpfs", "/run"], "")?;
        checked(mounted).context("failed to mount a new /run")?;
        self.serve("pause", "1", &crate::images::sleeper()?);
        let folder = self.containerd_folder();
        fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
        let config = containerd::config(&folder, release, "localhost:5000", "localhost:5000/pause:1")?;
        let config = config.write().context("failed to write containerd's configuration")?;
        let log = File::create(folder.join("log")).context("failed to create the log")?;
        let mut command = self.enter(&release.folder.join("containerd"));
        command.arg("--config").arg(config).env("PATH", release.path()?).env("TMPDIR", &folder);
        let daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().context("failed to run containerd")?;
        self.containerd = Some(daemon);
        let deadline = Instant::now() + TIMEOUT;
        while std::os::unix::net::UnixStream::connect(self.cri_socket()).is_err() {
            let ended = self.containerd.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                bail!("containerd did not come up ({ended:?}):\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn containerd_folder(&self) -> PathBuf {
        self.folder.join("ctd")
    }

    /// Runs `coracle up`, or all parts, and waits until the node is Ready.
    pub fn up(&mut self) -> Result<()> {
        if let Some(parts) = &self.parts {
            for name in parts.names() {
                self.start_part(&name)?;
            }
            return self.parts_ready();
        }
        // What an earlier life said stands before this.
        let said = usize::try_from(fs::metadata(self.log()).map_or(0, |log| log.len()))?;
        self.spawn_up()?;
        let deadline = Instant::now() + TIMEOUT;
        while !fs::read_to_string(self.log())?.get(said..).is_some_and(|text| text.contains("Coracle is up")) {
            let ended = self.up.as_mut().and_then(|up| up.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                bail!("coracle up did not come up ({ended:?}):\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Runs `coracle up`, and waits for nothing.
    pub fn spawn_up(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log()).context("failed to open the log")?;
        let mut variables = Vec::new();
        if let Some(library) = &self.beside.clock {
            // Steps are of the wall's clock alone.
            variables.extend(["FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1"].map(str::to_owned));
            variables.push(format!("FAKETIME_CACHE_DURATION={CLOCK_LOOK_SECONDS}"));
            variables.push(format!("FAKETIME_TIMESTAMP_FILE={}", self.clock_file().display()));
            // Last, and inside: what enters the namespaces has the machine's own /dev/shm.
            variables.push(format!("LD_PRELOAD={}", library.display()));
        }
        let mut command = self.enter(Path::new("env"));
        command.args(variables).arg(ours("coracle")?).args(self.up_arguments());
        self.up = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().context("failed to run coracle up")?);
        Ok(())
    }

    /// The arguments of `coracle up`, all names of the host given.
    pub fn up_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["up".to_owned(), format!("--data-dir={}", self.data().display())];
        let mut folders = vec![("--state-dir", "run"), ("--pod-log-dir", "logs")];
        if self.containerd.is_some() {
            arguments.push(format!("--container-runtime-endpoint=unix://{}", self.cri_socket().display()));
        } else {
            folders.extend([("--cni-conf-dir", "cni"), ("--cni-bin-dir", "cni")]);
        }
        for (flag, name) in folders {
            arguments.push(format!("{flag}={}", self.folder.join(name).display()));
        }
        arguments.push(format!("--cgroup-root={}", self.cgroup_root));
        // The disk of the machine that tests is none of their business.
        arguments.push("--eviction-hard=".to_owned());
        if self.etcd.is_some() {
            arguments.push(format!("--etcd-servers=http://{ETCD}"));
        }
        arguments.push("--log=info,kube_client=off,coracle::span=off".to_owned());
        arguments
    }

    /// A client of the API server with the admin's identity, which outlives deaths of the server.
    pub fn api(&self) -> Api {
        Api::new(self.holder.id(), &self.data())
    }

    /// Runs `work` on a thread in the cluster's network namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        within(self.holder.id(), work)
    }

    /// The sockets of the cluster's network namespace.
    pub fn sockets(&self) -> Result<Sockets> {
        Sockets::read(self.holder.id())
    }

    /// The socket of the container runtime.
    pub fn cri_socket(&self) -> PathBuf {
        if self.containerd.is_some() { self.containerd_folder().join("c.sock") } else { self.folder.join("run/cri.sock") }
    }

    /// How the node names its runtime.
    pub fn runtime(&self) -> &'static str {
        if self.containerd.is_some() { "containerd://" } else { "coracle://" }
    }

    /// What the addresses of pods begin with.
    pub fn pod_prefix(&self) -> &'static str {
        if self.containerd.is_some() { containerd::POD_PREFIX } else { "10.85." }
    }

    /// The processes of the cluster: its keeper and all below it.
    pub fn table(&self) -> Result<Table> {
        Table::read(&self.folder.join("run"))
    }

    /// Starts a part that does not run.
    pub fn start_part(&mut self, name: &str) -> Result<()> {
        let mut parts = self.parts.take().context("the cluster is not in parts")?;
        let started = parts.start(self, name);
        self.parts = Some(parts);
        started
    }

    /// Kills a part with SIGKILL, and reaps it.
    pub fn kill_part(&mut self, name: &str) -> Result<()> {
        self.parts.as_mut().context("the cluster is not in parts")?.end(name, 9)
    }

    /// Waits until everything serves; a part that has ended by itself is an error.
    pub fn parts_ready(&mut self) -> Result<()> {
        let ready = parts::wait_ready(self);
        let ended = self.parts.as_mut().map(Parts::ended).unwrap_or_default();
        if !ended.is_empty() {
            bail!("these have ended by themselves: {}\n{}", ended.join(", "), self.log_tail());
        }
        ready.with_context(|| self.log_tail())
    }

    /// Kills `coracle up` with SIGKILL, and reaps it.
    pub fn kill(&mut self) -> Result<()> {
        let mut up = self.up.take().context("coracle up is not running")?;
        up.kill().context("failed to kill coracle up")?;
        up.wait().map(drop).context("failed to wait for coracle up")
    }

    /// Stops `coracle up`, or all parts, with SIGTERM; pods go on.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(parts) = &mut self.parts {
            return parts.end_all(15);
        }
        let mut up = self.up.take().context("coracle up is not running")?;
        linux::process::kill(i32::try_from(up.id())?, 15)?;
        up.wait().map(drop).context("failed to wait for coracle up")
    }

    /// Runs `coracle down`. Dropping does so too, but tells failures to nobody.
    pub fn down(&mut self) -> Result<()> {
        if let Some(parts) = &mut self.parts {
            parts.end_all(15)?;
        }
        let data = self.data();
        let output = self.run(&ours("coracle")?, &["down", "--data-dir", &data.to_string_lossy()], "")?;
        if !output.status.success() {
            bail!("coracle down failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        if let Some(mut up) = self.up.take() {
            up.wait().context("failed to wait for coracle up")?;
        }
        self.removed = true;
        Ok(())
    }

    /// The process that holds the cluster's namespaces.
    pub fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// The cgroup below which everything of the cluster is.
    pub fn cgroup_root(&self) -> &str {
        &self.cgroup_root
    }

    /// Serves an image as `localhost:5000/NAME:TAG`.
    pub fn serve(&self, name: &str, tag: &str, image: &Image) {
        if let Some(registry) = &self.registry {
            registry.add(name, tag, image);
        }
    }

    /// Makes the registry's answers under a path fail.
    pub fn fault(&self, path_part: &str, fault: Fault, times: usize) {
        if let Some(registry) = &self.registry {
            registry.fault(path_part, fault, times);
        }
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The admin's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data().join("kubeconfig")
    }

    /// A folder for the files of the test.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The pid of `coracle up`.
    pub fn pid(&self) -> Option<u32> {
        self.up.as_ref().map(Child::id)
    }

    /// What `coracle up` logged, in all its lives.
    pub fn log(&self) -> PathBuf {
        self.folder.join("up.log")
    }

    /// The end of what `coracle up` or its parts logged, and containerd below it.
    pub fn log_tail(&self) -> String {
        let mut tail = Vec::new();
        let parts = self.parts.iter().flat_map(Parts::names).map(|name| parts::log(&self.folder, &name));
        for log in [self.log(), self.containerd_folder().join("log")].into_iter().chain(parts) {
            let log = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            tail.push(lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        tail.join("\n").trim_end().to_owned()
    }

    /// A command that runs in the cluster's namespaces.
    pub fn enter(&self, program: &Path) -> Command {
        self.enter_behind(&[], program)
    }

    /// The same behind other words (`timeout 5`), which are run outside.
    fn enter_behind(&self, words: &[&str], program: &Path) -> Command {
        let holder = self.holder.id().to_string();
        let words = [words, &["nsenter", "--net", "--mount", "--target", &holder, "--"]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(program).env("KUBECONFIG", self.kubeconfig()).env("HOME", &self.folder);
        command
    }

    /// Runs `work` on a thread in the cluster's network namespace, as a program of the host.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        within(self.holder.id(), work)
    }

    /// Runs a client to its end, with `input` on its stdin. A client that hangs is ended and is an error.
    pub fn run(&self, program: &Path, arguments: &[&str], input: &str) -> Result<Output> {
        self.run_with(program, arguments, &[], input)
    }

    /// As [`Cluster::run`], with more in the client's environment.
    pub fn run_with(&self, program: &Path, arguments: &[&str], environment: &[(String, String)], input: &str) -> Result<Output> {
        let shown = || format!("{} {}", program.file_name().unwrap_or_default().to_string_lossy(), arguments.join(" "));
        let mut command = self.enter_behind(&["timeout", &COMMAND_TIMEOUT.as_secs().to_string()], program);
        command.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to run {}", shown()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A client that does not read its stdin may have closed it.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output().with_context(|| format!("failed to wait for {}", shown()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = self.down()
        {
            eprintln!("{error:#}\n{}", self.log_tail());
        }
        if let Some(mut up) = self.up.take() {
            let _ = up.kill();
            let _ = up.wait();
        }
        if let Some(parts) = &mut self.parts {
            let _ = parts.end_all(9);
        }
        if let Some(mut containerd) = self.containerd.take() {
            let _ = containerd.kill();
            let _ = containerd.wait();
            // The mounts of its snapshots are in the cluster's namespace and go with it.
        }
        if let Some(mut etcd) = self.etcd.take() {
            let _ = etcd.kill();
            let _ = etcd.wait();
        }
        let registry = self.registry.take();
        // It ends by a connection to itself, which only its own namespace can make.
        let _ = within(self.holder.id(), || drop(registry));
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Runs `work` on a thread in the network namespace of a process. Sockets and threads that it makes stay in there.
fn within<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || -> Result<T> {
            let path = Kind::Net.path_of(i32::try_from(pid)?);
            let namespace = linux::namespace::open(&path, Kind::Net).context("failed to open the network namespace")?;
            linux::namespace::join(namespace.as_fd(), Kind::Net).context("failed to enter the network namespace")?;
            Ok(work())
        });
        thread.join().map_err(|_| anyhow::anyhow!("the thread in the cluster's namespace panicked"))?
    })
}
