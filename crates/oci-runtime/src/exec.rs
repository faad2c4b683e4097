//! `exec`: another process in a container, in all its namespaces and its group.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux::cgroup::{Cgroup, Host};
use linux::namespace::{self, Kind};
use linux::process::{CloneOptions, Cloned};

use crate::cli::{Arguments, Global};
use crate::error::{Context, Error, Result, line, refuse};
use crate::init::{self, Message};
use crate::seccomp::Filter;
use crate::spec::{self, Process};
use crate::state::{Container, Status, write_whole};
use crate::{foreground, process, validate};

const SIGKILL: i32 = 9;
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Runs the process; answers its exit status, or 0 once it runs with `--detach`.
///
/// # Errors
/// When the container has stopped, or the process cannot be made: then no process is left.
pub fn exec(global: &Global, arguments: &Arguments) -> Result<u8> {
    if !linux::exe::is_protected() {
        return refuse("the runtime's executable is in reach of containers: linux::exe::protect() must come first");
    }
    for flag in ["pidfd-socket", "cgroup", "process-label"] {
        if arguments.value(flag).is_some_and(|value| !value.is_empty()) {
            return refuse(format!("--{flag} is not implemented"));
        }
    }
    let container = Container::load(&global.root, &arguments.positional[0])?;
    match container.status()? {
        Status::Stopped => return refuse("cannot exec in a stopped container"),
        Status::Paused if !arguments.has("ignore-paused") => {
            return refuse("cannot exec in a paused container (use --ignore-paused to override)");
        }
        Status::Creating => return refuse("cannot exec in a container that is being created"),
        _ => {}
    }
    let spec = container.spec()?;
    let process = read_process(arguments, &spec)?;
    validate::process(&process)?;
    let detach = arguments.has("detach");
    let seccomp = spec.linux.as_ref().and_then(|l| l.seccomp.as_ref());
    let filter = seccomp.map(Filter::compile).transpose().during(|| "unable to compile seccomp profile".to_owned())?;
    let console_path = arguments.value("console-socket").map(PathBuf::from);
    if process.terminal && detach && console_path.is_none() {
        return refuse("cannot allocate tty if runc will detach without setting console socket");
    }
    if console_path.is_some() && !(process.terminal && detach) {
        return refuse("cannot use console socket if runc will not detach or allocate tty");
    }
    let (terminal, console) = match (&console_path, process.terminal) {
        (Some(path), _) => {
            (None, Some(linux::unix::connect(linux::unix::Kind::Stream, path).during(|| "connect to console socket".to_owned())?))
        }
        (None, true) => {
            let (ours, theirs) = linux::unix::packet_pair()?;
            (Some(ours), Some(theirs))
        }
        (None, false) => (None, None),
    };
    let joining = Joining {
        global,
        container: &container,
        process: &process,
        seccomp,
        filter,
        console,
        preserve_fds: arguments.number("preserve-fds")?.unwrap_or(0),
        pid_file: arguments.value("pid-file").map(PathBuf::from),
    };
    let signals = if detach { None } else { Some(foreground::Signals::hold()?) };
    let pidfd = joining.join().during(|| "exec failed: unable to start container process".to_owned())?;
    match signals {
        None => Ok(0),
        Some(signals) => foreground::attend(pidfd.as_fd(), signals, terminal),
    }
}

fn read_process(arguments: &Arguments, spec: &spec::Spec) -> Result<Process> {
    let mut process = match arguments.value("process") {
        Some(path) => spec::parse(&std::fs::read_to_string(path).during(|| format!("read {path}"))?).during(|| format!("read {path}"))?,
        None => {
            let mut process = spec.process.clone().unwrap_or_default();
            process.args = arguments.positional[1..].to_vec();
            process.terminal = false;
            process
        }
    };
    if arguments.has("tty") {
        process.terminal = true;
    }
    if let Some(cwd) = arguments.value("cwd") {
        process.cwd = cwd.into();
    }
    process.env.extend(arguments.values("env").iter().cloned());
    process.no_new_privileges |= arguments.has("no-new-privs");
    if let Some(profile) = arguments.value("apparmor") {
        profile.clone_into(&mut process.apparmor_profile);
    }
    if let Some(user) = arguments.value("user") {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        let number = |text: &str| text.parse::<u32>().or_else(|_| refuse(format!("--user: {text:?} is not a number")));
        process.user.uid = number(uid)?;
        if !gid.is_empty() {
            process.user.gid = number(gid)?;
        }
    }
    for gid in arguments.values("additional-gids") {
        let Ok(gid) = gid.parse() else { return refuse(format!("--additional-gids: {gid:?} is not a number")) };
        process.user.additional_gids.push(gid);
    }
    for cap in arguments.values("cap") {
        let caps = process.capabilities.get_or_insert_default();
        for set in [&mut caps.bounding, &mut caps.effective, &mut caps.permitted] {
            set.push(cap.clone());
        }
    }
    Ok(process)
}

/// A process that is being put into a container.
struct Joining<'a> {
    global: &'a Global,
    container: &'a Container,
    process: &'a Process,
    seccomp: Option<&'a spec::Seccomp>,
    filter: Option<Filter>,
    console: Option<OwnedFd>,
    preserve_fds: u32,
    pid_file: Option<PathBuf>,
}

impl Joining<'_> {
    fn join(mut self) -> Result<OwnedFd> {
        let first = self.container.pidfd()?;
        let kinds = self.foreign_namespaces()?;
        let cgroup = self.container.cgroup()?;
        let entries = cgroup.entries(true)?;
        let (ours, theirs) = linux::unix::packet_pair()?;
        let own = namespace::open(Path::new("/proc/self/ns/pid"), Kind::Pid)?;
        let enters_pid = kinds.contains(&Kind::Pid);
        if enters_pid {
            namespace::join_process(first.as_fd(), &[Kind::Pid])?;
        }
        let (pid, pidfd) = match self.clone_in_group(&cgroup)? {
            Cloned::Child => {
                drop(ours);
                let others: Vec<Kind> = kinds.into_iter().filter(|kind| *kind != Kind::Pid).collect();
                self.become_process(first.as_fd(), &others, &entries, &theirs);
            }
            Cloned::Parent { pid, pidfd } => (pid, pidfd),
        };
        drop(theirs);
        self.console = None;
        if enters_pid {
            namespace::join(own.as_fd(), Kind::Pid)?;
        }
        let result = self.attend(pid, ours.as_fd());
        if result.is_err() {
            let _ = linux::pidfd::send_signal(pidfd.as_fd(), SIGKILL);
            let _ = linux::pidfd::wait(pidfd.as_fd(), true, false);
            if let Some(path) = &self.pid_file {
                let _ = std::fs::remove_file(path);
            }
        }
        result.map(|()| pidfd)
    }

    /// In the v2 hierarchy a process is born in the container's group. That can be closed to processes (the container handed controllers down to groups
    /// that it made), or gone (its first process moved out): then it is the first process' group, as with runc (v1.5.2,
    /// libcontainer/process_linux.go).
    fn clone_in_group(&self, cgroup: &Cgroup) -> Result<Cloned> {
        let Some(directory) = cgroup.birthplace() else { return Ok(linux::process::clone(&CloneOptions::default())?) };
        let born_in = |directory: &Path| {
            let directory = linux::fs::open_directory(directory)?;
            linux::process::clone(&CloneOptions { cgroup: Some(directory.as_fd()), ..CloneOptions::default() })
        };
        match born_in(&directory) {
            Err(e) if [EBUSY, ENOENT, ENODEV].iter().any(|errno| e.is(*errno)) => {
                let path = linux::cgroup::path_of(self.container.record.pid, None)?;
                let group = Cgroup::new(&Host::detect()?, &path);
                Ok(born_in(&group.birthplace().unwrap_or(directory))?)
            }
            other => Ok(other?),
        }
    }

    /// The kinds of which the container's process has another namespace than this one.
    fn foreign_namespaces(&self) -> Result<Vec<Kind>> {
        let pid = self.container.record.pid;
        let mut kinds = Vec::new();
        for kind in Kind::ALL {
            if kind != Kind::Time && namespace::id_of(pid, kind)? != namespace::id_of(0, kind)? {
                kinds.push(kind);
            }
        }
        Ok(kinds)
    }

    fn attend(&self, pid: i32, socket: BorrowedFd<'_>) -> Result<()> {
        if let Some(adj) = self.process.oom_score_adj {
            process::set_oom_score_adj(self.global, pid, adj)?;
        }
        Message::Go.send(socket, "")?;
        let failed = |text: String| Err(Error::Refused(text));
        loop {
            match Message::receive(socket)? {
                Some((Message::Listener, number)) => {
                    crate::seccomp::pass_listener(self.seccomp, pid, &number, self.container)?;
                    Message::Go.send(socket, "")?;
                }
                Some((Message::Limits, _)) => {
                    process::set_rlimits(pid, self.process)?;
                    Message::Go.send(socket, "")?;
                }
                Some((Message::Ready, _)) => break,
                Some((Message::Failed, text)) => return failed(text),
                Some(_) => return failed("it said what it should be told".to_owned()),
                None => return failed("the process died before it was ready".to_owned()),
            }
        }
        if let Some(path) = &self.pid_file {
            write_whole(path, pid.to_string().as_bytes())?;
        }
        Message::Go.send(socket, "")?;
        // Its execve closes the socket.
        match Message::receive(socket)? {
            None => Ok(()),
            Some((_, text)) => failed(text),
        }
    }

    fn become_process(&self, first: BorrowedFd<'_>, others: &[Kind], entries: &[OwnedFd], socket: &OwnedFd) -> ! {
        let error = self.live(first, others, entries, socket).unwrap_or_else(|error| error);
        let _ = Message::Failed.send(socket.as_fd(), &line(&error));
        linux::child::exit_now(255)
    }

    /// Up to the program; answers why that could not be executed.
    fn live(&self, first: BorrowedFd<'_>, others: &[Kind], entries: &[OwnedFd], socket: &OwnedFd) -> Result<Error> {
        linux::process::set_dumpable(false)?;
        Message::await_go(socket.as_fd())?;
        linux::cgroup::enter(entries)?;
        let procfs = process::host_procfs()?;
        process::set_attributes(self.process, procfs.as_fd())?;
        drop(procfs);
        if !others.is_empty() {
            namespace::join_process(first, others)?;
        }
        if others.contains(&Kind::User) {
            linux::process::set_ids(0, 0, &[]).during(|| "become root of the user namespace".to_owned())?;
            linux::process::set_dumpable(false)?;
        }
        linux::signal::reset_all()?;
        linux::process::setsid()?;
        if self.container.record.keyring {
            match linux::process::join_session_keyring(&format!("_ses.{}", self.container.record.id)) {
                Err(e) if e.is(ENOSYS) => {}
                other => other.during(|| "unable to join session keyring".to_owned())?,
            }
        }
        if self.process.terminal {
            let ptmx = linux::fs::open_path(Path::new("/dev/pts/ptmx")).during(|| "open terminal".to_owned())?;
            if linux::fs::filesystem_magic_fd(ptmx.as_fd())? != DEVPTS_MAGIC {
                return refuse("/dev/pts of the container is not a devpts");
            }
            let slave = init::open_terminal(ptmx.as_fd(), self.process, self.console.as_ref())?;
            init::use_terminal(&slave)?;
        }
        let user_namespace = others.contains(&Kind::User);
        let limits = || process::set_own_rlimits(self.process, user_namespace, &|| init::ask_for_limits(socket.as_fd()));
        let prepared = process::prepare(self.process, self.preserve_fds, &[socket.as_fd()], &limits)?;
        prepared.restrict()?;
        if let Some(filter) = self.filter.as_ref().filter(|filter| filter.notifies()) {
            init::load_with_listener(filter, socket.as_fd())?;
        }
        Message::Ready.send(socket.as_fd(), "")?;
        Message::await_go(socket.as_fd())?;
        if let Some(filter) = self.filter.as_ref().filter(|filter| !filter.notifies()) {
            filter.load()?;
        }
        prepared.drop_capabilities()?;
        Ok(prepared.exec())
    }
}

const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const ENOSYS: i32 = 38;
