//! The verbs on a container that there is: start, kill, delete, pause, resume, state, list, ps, update, events.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use crate::cli::{Arguments, Global};
use crate::create::CGROUP_PATIENCE;
use crate::error::{Context, Error, Result, line, refuse};
use crate::init::Message;
use crate::state::{Container, Status};
use crate::{hooks, limits, log, spec};

const SIGKILL: i32 = 9;

/// How long the death of a killed process is waited for.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Lets a created container's process go.
///
/// # Errors
/// When it was started before, or has stopped; or with the words of the process that could not become its program.
pub fn start(global: &Global, id: &str) -> Result<()> {
    let mut container = Container::load(&global.root, id)?;
    let lock = container.lock()?;
    container.reload()?;
    match container.status()? {
        Status::Created => {}
        Status::Stopped => return refuse("cannot start a container that has stopped"),
        Status::Running => return refuse("cannot start an already running container"),
        other => return refuse(format!("cannot start a container in the {} state", other.as_str())),
    }
    let dir = linux::fs::open_directory(&container.dir)?;
    let gate = linux::fs::descriptor_path(dir.as_fd()).join("gate");
    let socket = linux::unix::connect(linux::unix::Kind::Packet, &gate).during(|| "cannot start the container".to_owned())?;
    // The end comes when the process' execve closes its side, or with the process.
    let answer = Message::receive(socket.as_fd())?;
    let _ = std::fs::remove_file(container.dir.join("gate"));
    drop(lock);
    if let Some((_, text)) = answer {
        return Err(Error::Refused(text));
    }
    let spec = container.spec()?;
    if !spec.hooks.poststart.is_empty() {
        let state = container.state_json(Status::Running);
        // The container runs: a failure is logged and changes nothing (runtime.md, "Lifecycle").
        for error in hooks::run_all("poststart", &spec.hooks.poststart, &state) {
            log::write(global, "warning", &line(&error));
        }
    }
    Ok(())
}

/// Sends a signal to the container's process, or with `--all` to every process of its group.
///
/// # Errors
/// "container not running" when there is no process any more (not with `--all`).
pub fn kill(global: &Global, arguments: &Arguments) -> Result<()> {
    let container = Container::load(&global.root, &arguments.positional[0])?;
    let word = arguments.positional.get(1).map_or("SIGTERM", String::as_str);
    let Some(signal) = linux::signal::parse(word) else { return refuse(format!("unknown signal {word:?}")) };
    if arguments.has("all") {
        return Ok(container.cgroup()?.signal_all(signal)?);
    }
    let pidfd = container.pidfd()?;
    if signal == SIGKILL && !container.record.own_pid_namespace {
        // Where the first process is not the first of a PID namespace, its death leaves the others behind.
        return Ok(container.cgroup()?.signal_all(SIGKILL)?);
    }
    linux::pidfd::send_signal(pidfd.as_fd(), signal).map_err(|e| match e.errno() {
        Some(3) => Error::Refused("container not running".to_owned()),
        _ => e.into(),
    })?;
    if signal == SIGKILL {
        let cgroup = container.cgroup()?;
        // A frozen process dies when it is thawed (on v1).
        if cgroup.is_frozen()? {
            cgroup.thaw()?;
        }
    }
    Ok(())
}

/// Removes a container that has stopped, or was never started; with `--force` any, and none at all is fine too.
///
/// # Errors
/// When it runs, or something of it cannot be removed: the rest is removed all the same, and the state is kept, so that
/// it can be tried again.
pub fn delete(global: &Global, arguments: &Arguments) -> Result<()> {
    let force = arguments.has("force");
    let id = &arguments.positional[0];
    let mut container = match Container::load(&global.root, id) {
        Err(Error::Refused(text)) if force && text == "container does not exist" => return Ok(()),
        other => other?,
    };
    if force {
        // A create that hangs holds the lock: its process goes first.
        kill_and_wait(&container)?;
    }
    let _lock = match container.lock() {
        Err(Error::Refused(text)) if force && text == "container does not exist" => return Ok(()),
        other => other?,
    };
    container.reload()?;
    match container.status()? {
        Status::Stopped => {}
        Status::Created => kill_and_wait(&container)?,
        _ if force => kill_and_wait(&container)?,
        other => return refuse(format!("cannot delete container {id} that is not stopped: {}", other.as_str())),
    }
    destroy(global, &container)
}

fn kill_and_wait(container: &Container) -> Result<()> {
    let Ok(pidfd) = container.pidfd() else { return Ok(()) };
    let cgroup = container.cgroup()?;
    let _ = linux::pidfd::send_signal(pidfd.as_fd(), SIGKILL);
    if cgroup.is_frozen()? {
        cgroup.thaw()?;
    }
    if linux::pidfd::wait_exit(pidfd.as_fd(), KILL_PATIENCE)? {
        return Ok(());
    }
    refuse("container init still running")
}

/// Takes away what is left of a container whose process is gone.
///
/// # Errors
/// The first failure; everything is tried.
pub fn destroy(global: &Global, container: &Container) -> Result<()> {
    let mut result = Ok(());
    let had_group = !container.record.cgroup.as_os_str().is_empty();
    if had_group {
        let cgroup = container.cgroup()?;
        let removed = cgroup
            .pids()
            .and_then(|pids| if pids.is_empty() { Ok(()) } else { cgroup.signal_all(SIGKILL) })
            .and_then(|()| cgroup.remove(CGROUP_PATIENCE));
        result = removed.during(|| "unable to remove container's cgroup".to_owned());
    }
    if let Some(spec) = container.spec().ok().filter(|spec| !spec.hooks.poststop.is_empty()) {
        let state = container.state_json(Status::Stopped);
        for error in hooks::run_all("poststop", &spec.hooks.poststop, &state) {
            log::write(global, "warning", &line(&error));
        }
    }
    result?;
    container.remove_directory()
}

/// Freezes a container's processes.
///
/// # Errors
/// When it does not run.
pub fn pause(global: &Global, id: &str) -> Result<()> {
    let container = Container::load(&global.root, id)?;
    let _lock = container.lock()?;
    match container.status()? {
        Status::Running | Status::Created => Ok(container.cgroup()?.freeze()?),
        _ => refuse("container not running"),
    }
}

/// Thaws them.
///
/// # Errors
/// When they are not frozen.
pub fn resume(global: &Global, id: &str) -> Result<()> {
    let container = Container::load(&global.root, id)?;
    let _lock = container.lock()?;
    match container.status()? {
        Status::Paused => Ok(container.cgroup()?.thaw()?),
        _ => refuse("container not paused"),
    }
}

fn describe(container: &Container) -> Result<serde_json::Value> {
    let status = container.status()?;
    let record = &container.record;
    let mut value = serde_json::json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": if status == Status::Stopped { 0 } else { record.pid },
        "status": status.as_str(),
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "owner": record.owner,
    });
    if !record.annotations.is_empty() {
        value["annotations"] = serde_json::json!(record.annotations);
    }
    Ok(value)
}

/// Prints a container's state.
///
/// # Errors
/// When there is no such container.
pub fn state(global: &Global, id: &str) -> Result<String> {
    let container = Container::load(&global.root, id)?;
    let value = describe(&container)?;
    serde_json::to_string_pretty(&value).map(|text| text + "\n").during(|| "encode state".to_owned())
}

/// Prints all containers.
///
/// # Errors
/// When the directory cannot be read; a container that goes away meanwhile is left out.
pub fn list(global: &Global, arguments: &Arguments) -> Result<String> {
    let mut ids = Vec::new();
    match std::fs::read_dir(&global.root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).during(|| format!("read {}", global.root.display())),
        Ok(entries) => ids.extend(entries.flatten().filter(|e| e.path().is_dir()).map(|e| e.file_name().to_string_lossy().into_owned())),
    }
    ids.sort();
    let found: Vec<_> = ids.iter().filter_map(|id| Container::load(&global.root, id).and_then(|c| describe(&c)).ok()).collect();
    let text = |value: &serde_json::Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    if arguments.has("quiet") {
        return Ok(found.iter().map(|value| text(value, "id") + "\n").collect());
    }
    match arguments.value("format").unwrap_or("table") {
        "json" if found.is_empty() => Ok("null".to_owned()),
        "json" => serde_json::to_string(&found).during(|| "encode list".to_owned()),
        "table" => {
            let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
            rows.extend(found.iter().map(|value| {
                [
                    text(value, "id"),
                    value["pid"].to_string(),
                    text(value, "status"),
                    text(value, "bundle"),
                    text(value, "created"),
                    text(value, "owner"),
                ]
            }));
            Ok(table(&rows))
        }
        _ => refuse("invalid format option"),
    }
}

fn table(rows: &[[String; 6]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0).max(8);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let row = |row: &[String; 6]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("    ").trim_end())
    };
    rows.iter().map(row).collect()
}

/// Prints a container's processes: as JSON their pids, as a table what ps(1) says of them.
///
/// # Errors
/// When there is no such container, or no ps(1) for the table.
pub fn ps(global: &Global, arguments: &Arguments) -> Result<String> {
    let container = Container::load(&global.root, &arguments.positional[0])?;
    let pids = container.cgroup()?.pids()?;
    match arguments.value("format").unwrap_or("table") {
        "json" if pids.is_empty() => Ok("null".to_owned()),
        "json" => Ok(format!("[{}]", pids.iter().map(i32::to_string).collect::<Vec<_>>().join(","))),
        "table" => {
            let options = if arguments.positional.len() > 1 { &arguments.positional[1..] } else { &["-ef".to_owned()][..] };
            let output = std::process::Command::new("ps").args(options).output().during(|| "run ps".to_owned())?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let mut lines = text.lines();
            let Some(head) = lines.next() else { return refuse("ps printed nothing") };
            let Some(column) = head.split_whitespace().position(|name| name == "PID") else {
                return refuse("couldn't find PID field in ps output");
            };
            let ours = |line: &&str| {
                line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok()).is_some_and(|pid: i32| pids.contains(&pid))
            };
            Ok(std::iter::once(head).chain(lines.filter(ours)).map(|line| format!("{line}\n")).collect())
        }
        _ => refuse("invalid format option"),
    }
}

/// Changes a container's limits. Device rules in the document are passed over, as runc does: they cannot be changed on a
/// container that runs.
///
/// # Errors
/// When the container has stopped, or a limit cannot be set.
pub fn update(global: &Global, arguments: &Arguments) -> Result<()> {
    let container = Container::load(&global.root, &arguments.positional[0])?;
    let _lock = container.lock()?;
    if container.live_pid().is_none() {
        return refuse("container not running");
    }
    for flag in ["l3-cache-schema", "mem-bw-schema"] {
        if arguments.value(flag).is_some() {
            return refuse(format!("--{flag} is not implemented"));
        }
    }
    let mut resources: spec::Resources = match arguments.value("resources") {
        None => spec::Resources::default(),
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).during(|| "read resources from standard input".to_owned())?;
            spec::parse(&text)?
        }
        Some(path) => spec::parse(&std::fs::read_to_string(Path::new(path)).during(|| format!("read {path}"))?)?,
    };
    if arguments.value("resources").is_none() {
        from_flags(arguments, &mut resources)?;
    }
    container.cgroup()?.apply(&limits::resources(&resources)?).during(|| "update limits".to_owned())
}

fn from_flags(arguments: &Arguments, to: &mut spec::Resources) -> Result<()> {
    let cpu = spec::Cpu {
        shares: arguments.number("cpu-share")?,
        quota: arguments.number("cpu-quota")?,
        burst: arguments.number("cpu-burst")?,
        period: arguments.number("cpu-period")?,
        realtime_runtime: arguments.number("cpu-rt-runtime")?,
        realtime_period: arguments.number("cpu-rt-period")?,
        cpus: arguments.value("cpuset-cpus").map(str::to_owned),
        mems: arguments.value("cpuset-mems").map(str::to_owned),
        idle: arguments.number("cpu-idle")?,
    };
    let bytes = |flag: &str| arguments.value(flag).map(|text| parse_bytes(flag, text)).transpose();
    let memory = spec::Memory {
        limit: bytes("memory")?,
        reservation: bytes("memory-reservation")?,
        swap: bytes("memory-swap")?,
        kernel: bytes("kernel-memory")?,
        kernel_tcp: bytes("kernel-memory-tcp")?,
        check_before_update: arguments.has("memory-check-before-update").then_some(true),
        ..spec::Memory::default()
    };
    to.cpu = Some(cpu);
    to.memory = Some(memory);
    to.pids = Some(spec::Pids { limit: arguments.number("pids-limit")? });
    to.block_io = arguments.number("blkio-weight")?.map(|weight| spec::BlockIo { weight: Some(weight), ..spec::BlockIo::default() });
    Ok(())
}

/// Bytes with a binary suffix (`64M`, `1g`), or -1.
fn parse_bytes(flag: &str, text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let lower = lower.strip_suffix('i').unwrap_or(lower);
    let (digits, shift) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 10),
        Some('m') => (&lower[..lower.len() - 1], 20),
        Some('g') => (&lower[..lower.len() - 1], 30),
        Some('t') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    match digits.parse::<i64>().ok().and_then(|n| n.checked_mul(1 << shift)).filter(|n| *n >= -1) {
        Some(bytes) => Ok(bytes),
        None => refuse(format!("invalid value for --{flag}: {text:?}")),
    }
}

/// Prints what a container used so far, in the form of `runc events --stats`.
///
/// # Errors
/// Without `--stats`: the stream of events is not implemented.
pub fn events(global: &Global, arguments: &Arguments) -> Result<String> {
    if !arguments.has("stats") {
        return refuse("events without --stats is not implemented");
    }
    let container = Container::load(&global.root, &arguments.positional[0])?;
    let stats = container.cgroup()?.stats()?;
    let io = |counts: bool| -> Vec<serde_json::Value> {
        let entry =
            |e: &linux::cgroup::IoEntry| serde_json::json!({ "major": e.major, "minor": e.minor, "op": e.operation, "value": e.value });
        stats.io.iter().filter(|e| e.counts_operations == counts).map(entry).collect()
    };
    let value = serde_json::json!({ "type": "stats", "id": container.record.id, "data": {
        "cpu": {
            "usage": { "total": stats.cpu.usage_ns, "percpu": stats.cpu.per_cpu_ns, "kernel": stats.cpu.system_ns, "user": stats.cpu.user_ns },
            "throttling": { "periods": stats.cpu.periods, "throttledPeriods": stats.cpu.throttled_periods, "throttledTime": stats.cpu.throttled_ns },
        },
        "memory": {
            "usage": { "limit": stats.memory.limit_bytes, "usage": stats.memory.usage_bytes, "max": stats.memory.peak_bytes, "failcnt": stats.memory.limit_hits },
            "swap": { "limit": stats.memory.swap_limit_bytes, "usage": stats.memory.swap_usage_bytes },
            "raw": stats.memory.stat,
        },
        "pids": { "current": stats.pids.current, "limit": stats.pids.limit },
        "blkio": { "ioServiceBytesRecursive": io(false), "ioServicedRecursive": io(true) },
    }});
    Ok(value.to_string() + "\n")
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes() {
        for (text, bytes) in [("64M", 64 << 20), ("1gib", 1 << 30), ("12", 12), ("-1", -1), ("2kb", 2048)] {
            assert_eq!(parse_bytes("memory", text).expect(text), bytes);
        }
        for text in ["", "M", "x", "-2", "9999999999T"] {
            assert!(parse_bytes("memory", text).is_err(), "{text}");
        }
    }
}
