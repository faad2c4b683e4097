//! The container's first process, from its birth to its program.
//!
//! ```text
//! born -> (told: ids are mapped) -> cgroups, namespaces -> file system -> [asks for hooks] -> root changed
//!      -> user, capabilities, directory, program found -> (says: ready) -> waits at the gate -> program
//! ```
//!
//! It talks with the runtime over a packet socket ([`Message`]), and later, at the gate, with `start`. It never
//! executes this runtime again; what it holds of the host (descriptors) is closed by its execve at the latest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use linux::namespace::Kind;

use crate::error::{Context, Result, line, refuse};
use crate::process::{self, MESSAGE_BYTES_MAX, Prepared};
use crate::rootfs;
use crate::seccomp::Filter;
use crate::spec::{Hook, Process, Spec};

/// What the two sides say to each other; the first byte of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Runtime: go on.
    Go = b'g' as isize,
    /// Container: namespaces and mounts are made, run the hooks of the runtime.
    Hooks = b'h' as isize,
    /// Container: the seccomp listener is descriptor number N of mine.
    Listener = b'l' as isize,
    /// Container: set my resource limits, for I may not.
    Limits = b'i' as isize,
    /// Container: ready for the gate (or, for `exec`, for the program).
    Ready = b'r' as isize,
    /// Container: it failed, because.
    Failed = b'e' as isize,
}

impl Message {
    /// Sends it, with its text.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn send(self, socket: BorrowedFd<'_>, text: &str) -> Result<()> {
        let mut bytes = vec![self as u8];
        bytes.extend_from_slice(text.as_bytes());
        bytes.truncate(MESSAGE_BYTES_MAX);
        Ok(linux::unix::send(socket, &bytes, &[])?)
    }

    /// Receives one with its text; `None` when the other side is gone.
    ///
    /// # Errors
    /// When it is no such message.
    pub fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Self, String)>> {
        let (bytes, _) = match linux::unix::receive(socket, MESSAGE_BYTES_MAX) {
            // The other side ended with something of ours unread.
            Err(e) if e.is(ECONNRESET) => return Ok(None),
            other => other?,
        };
        let Some((first, text)) = bytes.split_first() else { return Ok(None) };
        let known = [Self::Go, Self::Hooks, Self::Listener, Self::Limits, Self::Ready, Self::Failed];
        let Some(message) = known.into_iter().find(|m| *m as u8 == *first) else {
            return refuse("a message that is none from the container's process");
        };
        Ok(Some((message, String::from_utf8_lossy(text).into_owned())))
    }

    /// Waits for leave to go on.
    ///
    /// # Errors
    /// When the runtime is gone.
    pub fn await_go(socket: BorrowedFd<'_>) -> Result<()> {
        match Self::receive(socket)? {
            Some((Self::Go, _)) => Ok(()),
            _ => refuse("the runtime is gone"),
        }
    }
}

const ECONNRESET: i32 = 104;

/// All that the process takes with it from the runtime.
pub struct Init<'a> {
    /// The configuration.
    pub spec: &'a Spec,
    /// Its process.
    pub process: &'a Process,
    /// Its file system.
    pub root: &'a rootfs::Plan,
    /// Groups to enter; none when it is born in its group.
    pub cgroup_entries: &'a [OwnedFd],
    /// Namespaces to join, in order.
    pub join: &'a [(Kind, OwnedFd)],
    /// Whether it has a new user namespace, or joined one.
    pub user_namespace: bool,
    /// To the runtime.
    pub socket: OwnedFd,
    /// Where `start` comes to.
    pub gate: OwnedFd,
    /// Held locked until the program is executed.
    pub gate_lock: OwnedFd,
    /// Connected to whoever takes the terminal's master.
    pub console: Option<OwnedFd>,
    /// The compiled filter.
    pub filter: Option<&'a Filter>,
    /// What hooks read, with the pid as this process cannot know it filled in by the runtime.
    pub state: &'a dyn Fn(&str) -> String,
    /// Name of the session keyring to begin; none to stay in the caller's.
    pub keyring: Option<String>,
    /// Do not pivot: move the root.
    pub no_pivot: bool,
    /// How many descriptors from 3 on the program gets.
    pub preserve_fds: u32,
}

impl Init<'_> {
    /// Lives the life of the process; returns only to say why that failed.
    pub fn run(self) -> crate::Error {
        match self.live() {
            Ok(error) => error,
            Err(error) => {
                let _ = Message::Failed.send(self.socket.as_fd(), &line(&error));
                error
            }
        }
    }

    /// Up to the program. `Ok` is a failure that `start` has been told.
    fn live(&self) -> Result<crate::Error> {
        linux::process::set_dumpable(false)?;
        Message::await_go(self.socket.as_fd())?;
        linux::cgroup::enter(self.cgroup_entries)?;
        self.enter_namespaces()?;
        linux::signal::reset_all()?;
        linux::process::setsid()?;
        if let Some(name) = &self.keyring {
            match linux::process::join_session_keyring(name) {
                // Without keyrings in the kernel there is none to leave to others either.
                Err(e) if e.is(ENOSYS) => {}
                other => other.during(|| "unable to join session keyring".to_owned())?,
            }
        }
        let procfs = process::host_procfs()?;
        self.root.build()?;
        let terminal = self.open_terminal()?;
        self.root.protect()?;
        self.set_sysctls(procfs.as_fd())?;
        self.run_hooks()?;
        process::set_attributes(self.process, procfs.as_fd())?;
        drop(procfs);
        self.change_root()?;
        if let Some(slave) = terminal {
            use_terminal(&slave)?;
        }
        let linux = self.spec.linux.as_ref();
        if let Some(personality) = linux.and_then(|l| l.personality.as_ref()) {
            linux::process::set_personality(process::persona(personality)?)?;
        }
        let keep = [self.socket.as_fd(), self.gate.as_fd(), self.gate_lock.as_fd()];
        let limits = || process::set_own_rlimits(self.process, self.user_namespace, &|| ask_for_limits(self.socket.as_fd()));
        let prepared = process::prepare(self.process, self.preserve_fds, &keep, &limits)?;
        self.load_notifying_filter(&prepared)?;
        Message::Ready.send(self.socket.as_fd(), "")?;
        Message::await_go(self.socket.as_fd())?;
        self.pass_gate(&prepared)
    }

    fn enter_namespaces(&self) -> Result<()> {
        for (kind, fd) in self.join {
            linux::namespace::join(fd.as_fd(), *kind)?;
        }
        if self.user_namespace {
            linux::process::set_ids(0, 0, &[]).during(|| "become root of the user namespace".to_owned())?;
            // A change of ids takes the flag back.
            linux::process::set_dumpable(false)?;
        }
        let linux = self.spec.linux.as_ref();
        let made = |kind| linux.and_then(|l| crate::validate::find(l, kind)).is_some_and(|ns| ns.path.is_empty());
        if made(Kind::Cgroup) {
            // Only now: its root is the group that one is in.
            linux::namespace::unshare(&[Kind::Cgroup])?;
        }
        if made(Kind::Net) {
            linux::namespace::bring_loopback_up()?;
        }
        if !self.spec.hostname.is_empty() {
            linux::namespace::set_hostname(&self.spec.hostname)?;
        }
        if !self.spec.domainname.is_empty() {
            linux::namespace::set_domainname(&self.spec.domainname)?;
        }
        Ok(())
    }

    fn open_terminal(&self) -> Result<Option<OwnedFd>> {
        if !self.process.terminal {
            return Ok(None);
        }
        let pts = linux::fs::open_in_root(self.root.root(), Path::new("/dev/pts/ptmx"), O_PATH).during(|| "open terminal".to_owned())?;
        let slave = open_terminal(pts.as_fd(), self.process, self.console.as_ref())?;
        self.root.mount_console(slave.as_fd()).during(|| "mount /dev/console".to_owned())?;
        Ok(Some(slave))
    }

    fn set_sysctls(&self, procfs: BorrowedFd<'_>) -> Result<()> {
        for (name, value) in self.spec.linux.iter().flat_map(|l| &l.sysctl) {
            linux::sysctl::set(procfs, name, value).during(|| format!("set sysctl {name}"))?;
        }
        Ok(())
    }

    fn run_hooks(&self) -> Result<()> {
        let hooks = &self.spec.hooks;
        if !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty() {
            Message::Hooks.send(self.socket.as_fd(), "")?;
            Message::await_go(self.socket.as_fd())?;
        }
        if hooks.create_container.is_empty() {
            return Ok(());
        }
        crate::hooks::run("createContainer", &hooks.create_container, &(self.state)("creating"))
    }

    fn change_root(&self) -> Result<()> {
        let root = self.root.root();
        if self.no_pivot {
            linux::mount::move_root(root)?;
        } else {
            linux::mount::pivot_root(root).during(|| "error jailing process inside rootfs".to_owned())?;
        }
        if let Some(propagation) = self.root.root_propagation() {
            linux::mount::set_propagation(Path::new("/"), propagation)?;
        }
        Ok(())
    }

    /// A filter with a listener is loaded while the runtime is there to pass the listener on.
    fn load_notifying_filter(&self, prepared: &Prepared) -> Result<()> {
        prepared.restrict()?;
        if let Some(filter) = self.filter.filter(|filter| filter.notifies()) {
            load_with_listener(filter, self.socket.as_fd())?;
        }
        Ok(())
    }

    fn pass_gate(&self, prepared: &Prepared) -> Result<crate::Error> {
        let visitor = linux::unix::accept(self.gate.as_fd())?;
        let last = || -> Result<crate::Error> {
            let hooks: &[Hook] = &self.spec.hooks.start_container;
            prepared.run_hooks("startContainer", hooks, &(self.state)("created"))?;
            if let Some(filter) = self.filter.filter(|filter| !filter.notifies()) {
                filter.load()?;
            }
            prepared.drop_capabilities()?;
            Ok(prepared.exec())
        };
        let error = last().unwrap_or_else(|error| error);
        let _ = Message::Failed.send(visitor.as_fd(), &line(&error));
        Ok(error)
    }
}

const ENOSYS: i32 = 38;
const O_PATH: i32 = 0o10_000_000;

/// Loads a filter and has the runtime fetch the listener. The filter is in force from here on: it must let sendmsg and
/// recvmsg pass, or this process waits for ever (as it does under runc for write).
///
/// # Errors
/// When the filter is refused, or the runtime cannot pass the listener on.
pub fn load_with_listener(filter: &Filter, socket: BorrowedFd<'_>) -> Result<()> {
    use std::os::fd::AsRawFd;
    let Some(listener) = filter.load()? else { return refuse("the kernel gave no seccomp listener") };
    Message::Listener.send(socket, &listener.as_raw_fd().to_string())?;
    Message::await_go(socket)
}

/// Has the runtime set the resource limits.
///
/// # Errors
/// When it is gone.
pub fn ask_for_limits(socket: BorrowedFd<'_>) -> Result<()> {
    Message::Limits.send(socket, "")?;
    Message::await_go(socket)
}

/// Makes a terminal from this `ptmx`, hands its master to whoever waits for it, answers its slave.
///
/// # Errors
/// When it cannot be made, or nobody takes it.
pub fn open_terminal(ptmx: BorrowedFd<'_>, process: &Process, console: Option<&OwnedFd>) -> Result<OwnedFd> {
    let Some(console) = console else { return refuse("a terminal needs --console-socket") };
    let master = linux::pty::open_master(ptmx)?;
    let slave = linux::pty::open_slave(master.as_fd())?;
    if let Some(size) = process.console_size {
        linux::pty::set_size(slave.as_fd(), size.height, size.width)?;
    }
    let stat = linux::fs::stat_fd(slave.as_fd())?;
    match linux::fs::chown_fd(slave.as_fd(), process.user.uid, stat.gid) {
        Err(e) if !matches!(e.errno(), Some(1 | 22)) => return Err(e.into()),
        _ => {}
    }
    linux::unix::send(console.as_fd(), b"/dev/ptmx", &[master.as_fd()]).during(|| "send the terminal to the console socket".to_owned())?;
    Ok(slave)
}

/// Makes the terminal this process' standard streams and controlling terminal.
///
/// # Errors
/// The kernel's answer.
pub fn use_terminal(slave: &OwnedFd) -> Result<()> {
    for number in 0..3 {
        linux::child::dup_to(slave.as_fd(), number).map_err(|e| linux::Error::new("dup2", number.to_string(), e))?;
    }
    Ok(linux::pty::set_controlling(slave.as_fd())?)
}
