//! `create` (and the first half of `run`): a bundle to a process that waits at the gate.
//!
//! Whatever fails, everything that was made is taken away again: the process, its groups, the state directory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::cgroup::{Cgroup, Host, Mode};
use linux::namespace::{self, Kind};
use linux::process::{CloneOptions, Cloned};

use crate::cli::{Arguments, Global};
use crate::error::{Context, Error, Result, line, refuse};
use crate::init::{Init, Message};
use crate::rootfs::{self, Surroundings};
use crate::seccomp::Filter;
use crate::spec::{self, IdMapping, Linux, Process, Spec};
use crate::state::{Container, Lock, Record, write_whole};
use crate::{limits, validate};

/// What the command line says of a new container.
pub struct Options {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Where the pid goes.
    pub pid_file: Option<PathBuf>,
    /// Who takes the terminal.
    pub console_socket: Option<PathBuf>,
    /// See runc.
    pub no_pivot: bool,
    /// See runc.
    pub no_new_keyring: bool,
    /// See runc.
    pub preserve_fds: u32,
}

impl Options {
    /// Reads the flags of `create` and `run`.
    ///
    /// # Errors
    /// When one is malformed, or not implemented.
    pub fn read(arguments: &Arguments) -> Result<Self> {
        for flag in ["pidfd-socket"] {
            if arguments.value(flag).is_some() {
                return refuse(format!("--{flag} is not implemented"));
            }
        }
        let bundle = PathBuf::from(arguments.value("bundle").unwrap_or("."));
        Ok(Self {
            id: arguments.positional[0].clone(),
            bundle: std::fs::canonicalize(&bundle).during(|| format!("open bundle {}", bundle.display()))?,
            pid_file: arguments.value("pid-file").map(PathBuf::from),
            console_socket: arguments.value("console-socket").map(PathBuf::from),
            no_pivot: arguments.has("no-pivot"),
            no_new_keyring: arguments.has("no-new-keyring"),
            preserve_fds: arguments.number("preserve-fds")?.unwrap_or(0),
        })
    }
}

/// A container that waits at the gate.
pub struct Created {
    /// Its state.
    pub container: Container,
    /// Its process.
    pub pidfd: OwnedFd,
}

/// Makes the container. With `terminal` the console socket is a connected one of the caller's own.
///
/// # Errors
/// Names what failed; nothing is left behind.
pub fn create(global: &Global, options: &Options, terminal: Option<OwnedFd>) -> Result<Created> {
    if !linux::exe::is_protected() {
        return refuse("the runtime's executable is in reach of containers: linux::exe::protect() must come first");
    }
    let (spec, text) = load_spec(&options.bundle)?;
    validate::container(&spec)?;
    let (Some(process), Some(linux)) = (&spec.process, &spec.linux) else { return refuse("process and linux must not be empty") };
    let filter = linux.seccomp.as_ref().map(Filter::compile).transpose().during(|| "unable to compile seccomp profile".to_owned())?;
    check_terminal(process, options, terminal.is_some())?;
    let host = Host::detect()?;
    let cgroup_path = cgroup_path(&linux.cgroups_path, &options.id, &host)?;
    let record = Record {
        id: options.id.clone(),
        boot_id: linux::process::boot_id()?,
        oci_version: spec.oci_version.clone(),
        bundle: options.bundle.display().to_string(),
        rootfs: spec.root.as_ref().map(|r| options.bundle.join(&r.path).display().to_string()).unwrap_or_default(),
        created: crate::time::now_rfc3339(),
        owner: "root".to_owned(),
        annotations: spec.annotations.clone(),
        cgroup: cgroup_path.clone(),
        keyring: !options.no_new_keyring,
        own_pid_namespace: validate::find(linux, Kind::Pid).is_some_and(|ns| ns.path.is_empty()),
        ..Record::default()
    };
    let cgroup = Cgroup::new(&host, &cgroup_path);
    let container = Container::create(&global.root, record)?;
    let mut making = Making { global, options, spec: &spec, process, linux, filter, host, cgroup, container, terminal };
    let lock = making.container.lock()?;
    let result = write_whole(&making.container.dir.join("config.json"), text.as_bytes()).and_then(|()| making.make(lock));
    match result {
        Ok(pidfd) => Ok(Created { container: making.container, pidfd }),
        Err(error) => {
            making.undo();
            Err(error).during(|| "unable to start container process".to_owned())
        }
    }
}

fn load_spec(bundle: &Path) -> Result<(Spec, String)> {
    let path = bundle.join("config.json");
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return refuse(format!("JSON specification file {} not found", path.display()));
        }
        other => other.during(|| format!("read {}", path.display()))?,
    };
    let spec = spec::parse(&text).during(|| format!("read {}", path.display()))?;
    Ok((spec, text))
}

fn check_terminal(process: &Process, options: &Options, own: bool) -> Result<()> {
    if process.terminal && options.console_socket.is_none() && !own {
        return refuse("cannot allocate tty if runc will detach without setting console socket");
    }
    if !process.terminal && options.console_socket.is_some() {
        return refuse("cannot use console socket if runc will not detach or allocate tty");
    }
    Ok(())
}

/// The group's path: as the configuration has it when it begins with a slash, else below this process' own; on v2 beside it, for a group
/// with processes hands no controllers down.
fn cgroup_path(configured: &str, id: &str, host: &Host) -> Result<PathBuf> {
    if configured.starts_with('/') {
        let path = Cgroup::new(host, Path::new(configured)).path().to_path_buf();
        return if path.as_os_str().is_empty() { refuse("linux.cgroupsPath must not be the root") } else { Ok(path) };
    }
    if configured.contains(':') && configured.split(':').count() == 3 {
        return refuse("linux.cgroupsPath is for the systemd driver, which is not implemented");
    }
    // One path for all hierarchies: that of the own group in the memory hierarchy, where daemons are kept.
    let own = match host.mode() {
        Mode::V2 => linux::cgroup::path_of(0, None)?.parent().map(Path::to_path_buf).unwrap_or_default(),
        _ => linux::cgroup::path_of(0, Some("memory")).or_else(|_| linux::cgroup::path_of(0, Some("pids")))?,
    };
    let name = if configured.is_empty() { id } else { configured };
    Ok(Cgroup::new(host, &own.join(name)).path().to_path_buf())
}

/// A container that is being made.
struct Making<'a> {
    global: &'a Global,
    options: &'a Options,
    spec: &'a Spec,
    process: &'a Process,
    linux: &'a Linux,
    filter: Option<Filter>,
    host: Host,
    cgroup: Cgroup,
    container: Container,
    terminal: Option<OwnedFd>,
}

impl Making<'_> {
    fn make(&mut self, lock: Lock) -> Result<OwnedFd> {
        self.make_cgroup()?;
        let dir = linux::fs::open_directory(&self.container.dir)?;
        let gate_path = linux::fs::descriptor_path(dir.as_fd()).join("gate");
        let gate = linux::unix::listen(linux::unix::Kind::Packet, &gate_path, 1)?;
        // The process shares this lock until its execve closes it.
        let gate_lock = std::fs::File::create(self.container.dir.join("gate.lock")).during(|| "create gate.lock".to_owned())?;
        linux::fs::lock_exclusive(gate_lock.as_fd(), true)?;
        let console = self.connect_console()?;
        let has = |kind| validate::find(self.linux, kind).is_some();
        let around = Surroundings {
            bundle: &self.options.bundle,
            cgroups: &self.host,
            cgroup: &self.cgroup,
            cgroup_namespace: has(Kind::Cgroup),
            user_namespace: has(Kind::User),
        };
        let root = rootfs::Plan::open(self.spec, &around)?;
        let birth = Birth::plan(self.linux, &self.cgroup)?;
        let (ours, theirs) = linux::unix::packet_pair()?;
        let (pid, pidfd) = match birth.clone()? {
            Cloned::Child => {
                drop((ours, lock, dir));
                self.become_container(root, birth, theirs, gate, gate_lock, console);
            }
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop((theirs, gate, gate_lock, console, root));
        self.terminal = None;
        let result = self.attend(pid, ours.as_fd());
        if result.is_err() {
            let _ = linux::pidfd::send_signal(pidfd.as_fd(), SIGKILL);
            let _ = linux::pidfd::wait(pidfd.as_fd(), true, false);
        }
        drop(lock);
        result.map(|()| pidfd)
    }

    fn become_container(
        &self,
        root: rootfs::Plan,
        birth: Birth,
        socket: OwnedFd,
        gate: OwnedFd,
        gate_lock: std::fs::File,
        console: Option<OwnedFd>,
    ) -> ! {
        let state = |status: &str| {
            let pid = linux::process::pid();
            let record = &self.container.record;
            let state = spec::State {
                oci_version: &record.oci_version,
                id: &record.id,
                status,
                pid,
                bundle: &record.bundle,
                annotations: &record.annotations,
            };
            serde_json::to_string(&state).unwrap_or_default()
        };
        let init = Init {
            spec: self.spec,
            process: self.process,
            root: &root,
            cgroup_entries: &birth.cgroup_entries,
            join: &birth.join_after,
            user_namespace: birth.user_namespace,
            socket,
            gate,
            gate_lock: gate_lock.into(),
            console,
            filter: self.filter.as_ref(),
            state: &state,
            keyring: (!self.options.no_new_keyring).then(|| format!("_ses.{}", self.options.id)),
            no_pivot: self.options.no_pivot,
            preserve_fds: self.options.preserve_fds,
        };
        let error = init.run();
        // Whoever waits at the gate has been told; this is for the container's log.
        // It may be a file on a full disk, where `eprintln!` would panic.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{}\n", line(&error)).as_bytes());
        linux::child::exit_now(1)
    }

    fn make_cgroup(&self) -> Result<()> {
        let act = || format!("unable to apply cgroup configuration {}", self.cgroup.path().display());
        if self.cgroup.exists() {
            if self.cgroup.is_frozen()? {
                return refuse("container's cgroup unexpectedly frozen");
            }
            let pids = self.cgroup.pids()?;
            if !pids.is_empty() {
                return refuse(format!("container's cgroup is not empty: {} process(es) found", pids.len()));
            }
        }
        self.cgroup.create().during(act)?;
        let resources = self.linux.resources.clone().unwrap_or_default();
        self.cgroup.apply(&limits::resources(&resources)?).during(act)?;
        self.cgroup.apply_devices(&limits::device_rules(&resources.devices)?).during(act)
    }

    fn connect_console(&self) -> Result<Option<OwnedFd>> {
        if let Some(own) = &self.terminal {
            return Ok(Some(own.try_clone().during(|| "copy console socket".to_owned())?));
        }
        let connect = |path: &PathBuf| linux::unix::connect(linux::unix::Kind::Stream, path);
        self.options.console_socket.as_ref().map(connect).transpose().during(|| "connect to console socket".to_owned())
    }

    /// The runtime's side of the process' way to the gate.
    fn attend(&mut self, pid: i32, socket: std::os::fd::BorrowedFd<'_>) -> Result<()> {
        if let Some(adj) = self.process.oom_score_adj {
            crate::process::set_oom_score_adj(self.global, pid, adj)?;
        }
        if validate::find(self.linux, Kind::User).is_some_and(|ns| ns.path.is_empty()) {
            write_mappings(pid, "uid_map", &self.linux.uid_mappings)?;
            write_mappings(pid, "gid_map", &self.linux.gid_mappings)?;
        }
        self.container.record.pid = pid;
        self.container.record.start_time = linux::process::stat(pid)?.start_time;
        self.container.save()?;
        Message::Go.send(socket, "")?;
        let failed = |text: String| Err(Error::Refused(text)).during(|| "error during container init".to_owned());
        loop {
            match Message::receive(socket)? {
                Some((Message::Hooks, _)) => {
                    let state = self.container.state_json(crate::state::Status::Creating);
                    crate::hooks::run("prestart", &self.spec.hooks.prestart, &state)?;
                    crate::hooks::run("createRuntime", &self.spec.hooks.create_runtime, &state)?;
                    Message::Go.send(socket, "")?;
                }
                Some((Message::Listener, number)) => {
                    crate::seccomp::pass_listener(self.linux.seccomp.as_ref(), pid, &number, &self.container)?;
                    Message::Go.send(socket, "")?;
                }
                Some((Message::Limits, _)) => {
                    crate::process::set_rlimits(pid, self.process)?;
                    Message::Go.send(socket, "")?;
                }
                Some((Message::Ready, _)) => break,
                Some((Message::Failed, text)) => return failed(text),
                Some((Message::Go, _)) => return failed("it said what it should be told".to_owned()),
                None => return failed("the process died before it was ready".to_owned()),
            }
        }
        if let Some(path) = &self.options.pid_file {
            write_whole(path, pid.to_string().as_bytes())?;
        }
        self.container.record.complete = true;
        self.container.save()?;
        Message::Go.send(socket, "")
    }

    fn undo(&self) {
        if let Some(path) = &self.options.pid_file {
            // Only what was written for this container: a pid file of this name with another pid is somebody else's.
            if std::fs::read_to_string(path).is_ok_and(|text| text == self.container.record.pid.to_string()) {
                let _ = std::fs::remove_file(path);
            }
        }
        let _ = self.cgroup.signal_all(SIGKILL);
        let _ = self.cgroup.remove(CGROUP_PATIENCE);
        let _ = self.container.remove_directory();
    }
}

const SIGKILL: i32 = 9;

/// How long a group is waited for whose processes were just killed.
pub const CGROUP_PATIENCE: Duration = Duration::from_secs(5);

fn write_mappings(pid: i32, file: &str, mappings: &[IdMapping]) -> Result<()> {
    let text: String = mappings.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect();
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, text).during(|| format!("write {path}"))
}

/// How the process comes into its namespaces.
///
/// New ones it is born in. Those given by path it joins itself, but for the PID namespace, which only children enter:
/// the runtime enters it before, and goes back. Where there is a user namespace, a helper process enters everything that
/// has a path, the user namespace last, and gives birth there, for inside there is no right to enter the others, and a
/// namespace made there must belong to it.
struct Birth {
    flags: u64,
    /// For the helper; empty without one.
    join_before: Vec<(Kind, OwnedFd)>,
    /// For the process itself.
    join_after: Vec<(Kind, OwnedFd)>,
    pid_namespace: Option<OwnedFd>,
    cgroup_directory: Option<OwnedFd>,
    cgroup_entries: Vec<OwnedFd>,
    user_namespace: bool,
}

impl Birth {
    fn plan(linux: &Linux, cgroup: &Cgroup) -> Result<Self> {
        let mut flags = 0;
        let mut paths = Vec::new();
        for ns in &linux.namespaces {
            // Checked by validate::container.
            let Some(kind) = validate::namespace_kind(&ns.kind) else { continue };
            if !ns.path.is_empty() {
                paths.push((kind, namespace::open(Path::new(&ns.path), kind)?));
            } else if kind != Kind::Cgroup {
                flags |= kind.flag();
            }
        }
        // The user namespace comes last.
        paths.sort_by_key(|(kind, _)| *kind == Kind::User);
        let user_namespace = validate::find(linux, Kind::User).is_some();
        let helper = user_namespace && !paths.is_empty();
        let mut birth = Self {
            flags,
            join_before: Vec::new(),
            join_after: Vec::new(),
            pid_namespace: None,
            cgroup_directory: None,
            cgroup_entries: Vec::new(),
            user_namespace,
        };
        for (kind, fd) in paths {
            match kind {
                _ if helper => birth.join_before.push((kind, fd)),
                Kind::Pid => birth.pid_namespace = Some(fd),
                _ => birth.join_after.push((kind, fd)),
            }
        }
        // A helper is in the user namespace already, and may have no right to a host's group that is not the container's alone.
        let birthplace = if helper { cgroup.v2_directory() } else { cgroup.birthplace() };
        birth.cgroup_directory = birthplace.map(|dir| linux::fs::open_directory(&dir)).transpose()?;
        birth.cgroup_entries = cgroup.entries(birth.cgroup_directory.is_some())?;
        Ok(birth)
    }

    fn clone(&self) -> Result<Cloned> {
        let options = CloneOptions { namespaces: self.flags, cgroup: self.cgroup_directory.as_ref().map(|d| d.as_fd()), sibling: false };
        if !self.join_before.is_empty() {
            return self.clone_by_helper(options);
        }
        let Some(target) = &self.pid_namespace else { return Ok(linux::process::clone(&options)?) };
        let own = namespace::open(Path::new("/proc/self/ns/pid"), Kind::Pid)?;
        namespace::join(target.as_fd(), Kind::Pid)?;
        let cloned = linux::process::clone(&options)?;
        if matches!(cloned, Cloned::Parent { .. }) {
            // Hooks are the host's processes.
            namespace::join(own.as_fd(), Kind::Pid)?;
        }
        Ok(cloned)
    }

    fn clone_by_helper(&self, options: CloneOptions<'_>) -> Result<Cloned> {
        let (ours, theirs) = linux::unix::packet_pair()?;
        let helper = match linux::process::fork()? {
            Cloned::Child => {
                drop(ours);
                return self.give_birth(options, theirs);
            }
            Cloned::Parent { pidfd, .. } => pidfd,
        };
        drop(theirs);
        let received = linux::unix::receive(ours.as_fd(), 4096)?;
        linux::pidfd::wait(helper.as_fd(), true, false)?;
        let (bytes, mut fds) = received;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match (text.parse::<i32>(), fds.pop()) {
            (Ok(pid), Some(pidfd)) => Ok(Cloned::Parent { pid, pidfd }),
            _ => refuse(format!("join namespaces: {text}")),
        }
    }

    /// In the helper: answers in the new process, never in the helper itself.
    fn give_birth(&self, options: CloneOptions<'_>, socket: OwnedFd) -> Result<Cloned> {
        let born = || -> Result<Cloned> {
            for (kind, fd) in &self.join_before {
                namespace::join(fd.as_fd(), *kind)?;
            }
            Ok(linux::process::clone(&CloneOptions { sibling: true, ..options })?)
        };
        let (text, pidfd) = match born() {
            Ok(Cloned::Child) => return Ok(Cloned::Child),
            Ok(Cloned::Parent { pid, pidfd }) => (pid.to_string(), Some(pidfd)),
            Err(error) => (line(&error), None),
        };
        let fds: Vec<_> = pidfd.iter().map(|fd| fd.as_fd()).collect();
        let _ = linux::unix::send(socket.as_fd(), text.as_bytes(), &fds);
        linux::child::exit_now(0)
    }
}
