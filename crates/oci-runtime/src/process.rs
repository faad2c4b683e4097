//! What a process becomes before it executes its program: who it is, what it may, where it is, what it finds.
//!
//! Shared by a container's first process ([`crate::init`]) and by those that `exec` adds ([`crate::exec`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux::caps::{Capabilities, Set};
use linux::process::ExecStrings;

use crate::cli::Global;
use crate::error::{Context, Result, refuse};
use crate::log;
use crate::spec::{self, Process};

/// A container's `/etc/passwd` that is larger is not read, in bytes.
const PASSWD_BYTES_MAX: u64 = 16 << 20;

/// The capabilities asked for, within what this daemon has (DESIGN.md's closed list): none of any set that the
/// configuration leaves out.
///
/// # Errors
/// When a name is unknown.
pub fn capabilities(process: &Process, own: Set) -> Result<Capabilities> {
    let Some(asked) = &process.capabilities else { return Ok(Capabilities::default()) };
    let set = |names: &[String]| {
        let mut set = Set::default();
        for name in names {
            // One that this kernel (or a newer specification) does not share with us cannot be given: runc warns of it,
            // and goes on without.
            if !set.add(name) && !name.starts_with("CAP_") {
                return refuse(format!("process.capabilities: unknown capability {name:?}"));
            }
        }
        Ok(set.and(own))
    };
    let permitted = set(&asked.permitted)?;
    let inheritable = set(&asked.inheritable)?;
    Ok(Capabilities {
        bounding: set(&asked.bounding)?,
        effective: set(&asked.effective)?.and(permitted),
        inheritable,
        permitted,
        ambient: set(&asked.ambient)?.and(permitted).and(inheritable),
    })
}

/// A scheduling policy by the specification's words.
///
/// # Errors
/// When a word is unknown.
pub fn scheduling(from: &spec::Scheduler) -> Result<linux::sched::Attributes> {
    let policies = [
        ("SCHED_OTHER", 0),
        ("SCHED_FIFO", 1),
        ("SCHED_RR", 2),
        ("SCHED_BATCH", 3),
        ("SCHED_ISO", 4),
        ("SCHED_IDLE", 5),
        ("SCHED_DEADLINE", 6),
    ];
    let flags = [
        ("SCHED_FLAG_RESET_ON_FORK", 1),
        ("SCHED_FLAG_RECLAIM", 2),
        ("SCHED_FLAG_DL_OVERRUN", 4),
        ("SCHED_FLAG_KEEP_POLICY", 8),
        ("SCHED_FLAG_KEEP_PARAMS", 16),
        ("SCHED_FLAG_UTIL_CLAMP_MIN", 32),
        ("SCHED_FLAG_UTIL_CLAMP_MAX", 64),
    ];
    let Some((_, policy)) = policies.iter().find(|(name, _)| *name == from.policy) else {
        return refuse(format!("process.scheduler: unknown policy {:?}", from.policy));
    };
    let mut bits = 0;
    for flag in &from.flags {
        match flags.iter().find(|(name, _)| name == flag) {
            Some((_, bit)) => bits |= bit,
            None => return refuse(format!("process.scheduler: unknown flag {flag:?}")),
        }
    }
    let Ok(priority) = u32::try_from(from.priority) else {
        return refuse(format!("process.scheduler: priority {} is negative", from.priority));
    };
    Ok(linux::sched::Attributes {
        policy: *policy,
        flags: bits,
        nice: from.nice,
        priority,
        runtime_ns: from.runtime,
        deadline_ns: from.deadline,
        period_ns: from.period,
    })
}

/// An I/O priority class by the specification's word.
///
/// # Errors
/// When it is unknown.
pub fn io_priority_class(word: &str) -> Result<u32> {
    match word {
        "IOPRIO_CLASS_RT" => Ok(1),
        "IOPRIO_CLASS_BE" => Ok(2),
        "IOPRIO_CLASS_IDLE" => Ok(3),
        other => refuse(format!("process.ioPriority: unknown class {other:?}")),
    }
}

/// An execution domain by the specification's word.
///
/// # Errors
/// When it is unknown.
pub fn persona(from: &spec::Personality) -> Result<u64> {
    if !from.flags.is_empty() {
        return refuse("linux.personality.flags are not defined by the specification");
    }
    match from.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        other => refuse(format!("linux.personality: unknown domain {other:?}")),
    }
}

/// Sets scheduling, I/O priority and the AppArmor profile for the coming execve.
///
/// # Errors
/// When the kernel refuses one.
pub fn set_attributes(process: &Process, procfs: BorrowedFd<'_>) -> Result<()> {
    if let Some(scheduler) = &process.scheduler {
        linux::sched::set(&scheduling(scheduler)?).during(|| "error setting scheduler".to_owned())?;
    }
    if let Some(priority) = &process.io_priority {
        let class = io_priority_class(&priority.class)?;
        linux::sched::set_io_priority(class, priority.priority as u32).during(|| "error setting io priority".to_owned())?;
    }
    if process.apparmor_profile.is_empty() {
        return Ok(());
    }
    let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"));
    if !enabled {
        // What stands in for no profile is no request for one.
        if process.apparmor_profile == "unconfined" {
            return Ok(());
        }
        return refuse(format!("apparmor: config provided but apparmor not supported (profile {:?})", process.apparmor_profile));
    }
    let file = linux::fs::open_in_root(procfs, Path::new("self/attr/apparmor/exec"), O_WRONLY)?;
    use std::io::Write;
    let mut file = std::fs::File::from(file);
    file.write_all(format!("exec {}", process.apparmor_profile).as_bytes())
        .during(|| format!("apply apparmor profile {}", process.apparmor_profile))
}

const O_WRONLY: i32 = 1;

/// Sets the `oom_score_adj` of process `pid`, within what this daemon may: a value that it may not set is raised to the
/// process' present one, and that is logged (DESIGN.md's closed list).
///
/// # Errors
/// When the kernel refuses it for another reason.
pub fn set_oom_score_adj(global: &Global, pid: i32, wanted: i32) -> Result<()> {
    let holds = linux::process::set_oom_score_adj(pid, wanted)?;
    if holds != wanted {
        log::write(global, "warning", &format!("oom_score_adj {wanted} is not permitted, {holds} holds"));
    }
    Ok(())
}

/// Applies the resource limits to process `pid` (0: this one).
///
/// # Errors
/// When one is above what this daemon may give.
pub fn set_rlimits(pid: i32, process: &Process) -> Result<()> {
    for limit in &process.rlimits {
        // Checked by validate::process.
        let Some(number) = linux::rlimit::number(&limit.kind) else { continue };
        let value = linux::rlimit::Limit { soft: limit.soft, hard: limit.hard };
        linux::rlimit::set(pid, number, value)
            .map_err(|e| e.source)
            .during(|| format!("error setting rlimits: error setting rlimit type {number}"))?;
    }
    Ok(())
}

/// Applies the resource limits to this process. In a user namespace there is no right to raise one: then `ask` has the
/// runtime do it.
///
/// # Errors
/// When one is above what this daemon may give.
pub fn set_own_rlimits(process: &Process, user_namespace: bool, ask: &dyn Fn() -> Result<()>) -> Result<()> {
    match set_rlimits(0, process) {
        Err(_) if user_namespace => ask(),
        other => other,
    }
}

/// The process as far as it can go before its seccomp filter and its last capabilities.
pub struct Prepared {
    capabilities: Capabilities,
    program: PathBuf,
    args: ExecStrings,
    env: ExecStrings,
    no_new_privileges: bool,
}

/// Becomes the process' user, with the capabilities still held that the last steps need, enters its directory, and
/// finds its program. Descriptors are closed but for those in `keep` (and those to preserve); `limits` sets the resource
/// limits, after everything that needs a descriptor or memory.
///
/// # Errors
/// When a step is refused, or there is no such program.
pub fn prepare(process: &Process, preserve_fds: u32, keep: &[BorrowedFd<'_>], limits: &dyn Fn() -> Result<()>) -> Result<Prepared> {
    let own = linux::caps::permitted()?;
    let capabilities = capabilities(process, own)?;
    own_standard_streams(process.user.uid)?;
    linux::caps::limit_bounding(capabilities.bounding).during(|| "apply bounding set".to_owned())?;
    // The directory may be one that only the old user, or only the new one, can enter.
    let early = enter_directory(&process.cwd);
    let mut env: Vec<String> = process.env.clone();
    if !env.iter().any(|pair| pair.starts_with("HOME=")) {
        env.push(format!("HOME={}", home_of(process.user.uid)));
    }
    if preserve_fds > 0 && env.iter().any(|pair| pair.starts_with("LISTEN_FDS=")) {
        env.retain(|pair| !pair.starts_with("LISTEN_PID="));
        env.push(format!("LISTEN_PID={}", linux::process::pid()));
    }
    linux::process::close_all_but(3 + preserve_fds, keep)?;
    limits()?;
    linux::process::set_keep_capabilities(true)?;
    linux::process::set_ids(process.user.uid, process.user.gid, &process.user.additional_gids)?;
    linux::caps::set(own, own, capabilities.inheritable).during(|| "keep capabilities".to_owned())?;
    if early.is_err() {
        enter_directory(&process.cwd)?;
    }
    check_directory(&process.cwd)?;
    linux::process::set_umask(process.user.umask.unwrap_or(0o022));
    let program = find_program(&process.args[0], &env)?;
    Ok(Prepared {
        capabilities,
        program,
        args: ExecStrings::new(process.args.iter().map(String::as_str))?,
        env: ExecStrings::new(env.iter().map(String::as_str))?,
        no_new_privileges: process.no_new_privileges,
    })
}

impl Prepared {
    /// Forbids the gain of privileges, if that is asked for. To be done before a seccomp filter is loaded without
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn restrict(&self) -> Result<()> {
        if self.no_new_privileges {
            linux::process::set_no_new_privileges()?;
        }
        Ok(())
    }

    /// Takes the last capabilities.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn drop_capabilities(&self) -> Result<()> {
        let caps = &self.capabilities;
        linux::caps::set(caps.effective, caps.permitted, caps.inheritable).during(|| "apply capabilities".to_owned())?;
        linux::caps::set_ambient(caps.ambient).during(|| "apply ambient capabilities".to_owned())
    }

    /// Becomes the program. Returns only to say why it could not.
    pub fn exec(&self) -> crate::Error {
        let error = linux::process::exec(&self.program, &self.args, &self.env);
        crate::Error::Act { act: format!("exec {}", self.program.display()), source: Box::new(error.source) }
    }

    /// Runs hooks as the process would run: its user, its capabilities, its directory.
    ///
    /// # Errors
    /// When one fails.
    pub fn run_hooks(&self, point: &str, hooks: &[spec::Hook], state: &str) -> Result<()> {
        if hooks.is_empty() {
            return Ok(());
        }
        let (ours, theirs) = linux::unix::packet_pair()?;
        match linux::process::fork()? {
            linux::process::Cloned::Child => {
                let result = self.drop_capabilities().and_then(|()| crate::hooks::run(point, hooks, state));
                if let Err(error) = result {
                    let _ = linux::unix::send(theirs.as_fd(), crate::error::line(&error).as_bytes(), &[]);
                    linux::child::exit_now(1);
                }
                linux::child::exit_now(0)
            }
            linux::process::Cloned::Parent { pidfd, .. } => {
                drop(theirs);
                let (words, _) = linux::unix::receive(ours.as_fd(), MESSAGE_BYTES_MAX)?;
                let exit = linux::pidfd::wait(pidfd.as_fd(), true, false)?;
                match exit.map(linux::pidfd::Exit::status) {
                    Some(0) => Ok(()),
                    _ => refuse(String::from_utf8_lossy(&words).into_owned()),
                }
            }
        }
    }
}

/// The longest message between the processes of this runtime, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024;

fn enter_directory(cwd: &Path) -> Result<()> {
    linux::fs::chdir(cwd)
        .map_err(|e| e.source)
        .during(|| format!("chdir to cwd ({:?}) set in config.json failed", cwd.display().to_string()))
}

/// The directory must be within the container's root (CVE-2024-21626).
fn check_directory(cwd: &Path) -> Result<()> {
    let present = linux::fs::present_directory()?;
    if !present.is_absolute() {
        return refuse(format!("current working directory is outside of container mount namespace root (cwd {})", cwd.display()));
    }
    Ok(())
}

/// Gives pipes and files that are the standard streams to the process' user, so that it can open them again by
/// `/dev/stderr`; terminals and `/dev/null` stay as they are.
fn own_standard_streams(uid: u32) -> Result<()> {
    let streams = [
        std::io::stdin().as_fd().try_clone_to_owned(),
        std::io::stdout().as_fd().try_clone_to_owned(),
        std::io::stderr().as_fd().try_clone_to_owned(),
    ];
    for stream in streams.into_iter().flatten() {
        let stat = linux::fs::stat_fd(stream.as_fd())?;
        if stat.uid == uid || stat.is_char_device(1, 3) {
            continue;
        }
        match linux::fs::chown_fd(stream.as_fd(), uid, stat.gid) {
            // Not mapped into the user namespace, on a read-only file system, not ours to give, or not a thing that has an
            // owner: the stream works all the same.
            Err(e) if matches!(e.errno(), Some(1 | 22 | 30 | 13)) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The home directory of a user by the container's own `/etc/passwd`; "/" when it is not there, or not a file that can be read to its end.
fn home_of(uid: u32) -> String {
    let Ok(bytes) = linux::fs::read_regular(Path::new("/etc/passwd"), PASSWD_BYTES_MAX) else { return "/".to_owned() };
    let text = String::from_utf8_lossy(&bytes);
    let of = |line: &str| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse::<u32>().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then(|| home.to_owned())
    };
    text.lines().find_map(of).unwrap_or_else(|| "/".to_owned())
}

/// Finds the program by the PATH of the process, as execvp does, with the errors of Go's exec.LookPath.
fn find_program(name: &str, env: &[String]) -> Result<PathBuf> {
    let act = || format!("exec: {name:?}");
    if name.contains('/') {
        executable(Path::new(name)).during(act)?;
        return Ok(PathBuf::from(name));
    }
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or("");
    let mut refused = None;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = Path::new(dir).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(crate::Error::Act { source, .. }) if source.to_string().contains("No such file") => {}
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) => Err(error).during(act),
        None => refuse("executable file not found in $PATH").during(act),
    }
}

fn executable(path: &Path) -> Result<()> {
    let meta = std::fs::metadata(path).during(|| format!("stat {}", path.display()))?;
    if meta.is_dir() {
        return refuse("is a directory");
    }
    match linux::fs::is_executable(path) {
        Ok(true) => Ok(()),
        Ok(false) => refuse("permission denied"),
        Err(error) => Err(error.into()),
    }
}

/// Opens this host's procfs, which is trusted: the process is not in the container's root yet.
///
/// # Errors
/// When `/proc` is no procfs.
pub fn host_procfs() -> Result<OwnedFd> {
    Ok(linux::fs::open_procfs(Path::new("/proc"))?)
}
