//! A shim is killed, and its successor takes its pod over: no line is missing or doubled, no exit is lost.

mod common;

use common::{Host, Shim, cannot_run, entries, process, until};
use protocols::shim::pod::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig};
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::v3 as task;
use std::path::Path;

fn pod(host: &Host, id: &str) -> (Shim, u32) {
    let shim = host.start_by_keeper(id);
    let options = NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let config = PodSandboxConfig { hostname: "adopted".into(), linux: Some(linux), ..Default::default() };
    shim.create_sandbox(host, &config).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: id.into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    (shim, started.pid)
}

fn join(pid: u32) -> impl FnOnce(&mut serde_json::Value) {
    move |config| {
        let list = config["linux"]["namespaces"].as_array_mut().expect("a list");
        for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
            list.push(serde_json::json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }));
        }
    }
}

fn log_to(log: &Path) -> impl FnOnce(&mut task::CreateTaskRequest) {
    let uri = format!("cri-log://{}", log.display());
    move |request| {
        request.stdout = uri.clone();
        request.stderr = uri;
    }
}

fn parent(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("a parent");
    line.trim().parse().expect("a pid")
}

fn gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

fn kill_9(shim: &Shim) {
    let pid = shim.pid();
    linux::child::send_signal(pid, 9).expect("killed");
    until("the shim is dead", || gone(pid));
}

/// All goes on under a successor: exec, stop, start, delete.
fn goes_on(host: &Host, shim: &Shim) {
    let out = host.dir.join("out");
    let read = common::read_fifo(&out);
    shim.exec("count", "e1", &process("hostname; exit 6"), |request| request.stdout = out.display().to_string()).expect("added");
    let wait = shim.wait("count", "e1");
    shim.start("count", "e1").expect("started");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 6);
    assert_eq!(read.join().expect("read"), "adopted\n");
    let wait = shim.wait("count", "");
    shim.kill("count", "", 15).expect("killed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 9);
    shim.start("waiting", "").expect("a created container starts under a successor");
    until("it has ended", || shim.state("waiting", "").is_ok_and(|state| state.status == 3));
    assert_eq!(entries(&host.dir.join("waiting.log"), "stdout"), ["never"]);
    for id in ["count", "brief", "waiting"] {
        shim.delete(id, "").expect("deleted");
    }
}

#[test]
fn five_deaths_lose_no_line_and_no_exit() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: five_deaths_lose_no_line_and_no_exit: {reason}");
        return;
    }
    let mut host = Host::new("adopt");
    host.start_keeper();
    let keeper = host.keeper_process.as_ref().expect("a keeper").id();
    let (shim, inside) = pod(&host, "pod1");
    assert_eq!(parent(shim.pid()), keeper, "the keeper is the subreaper of shims");

    let log = host.dir.join("count.log");
    let count = "i=0; trap 'echo end $i; exit 9' TERM; while :; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.002; done";
    let bundle = host.bundle("count", count, join(inside));
    let pid = shim.create(&host, "count", &bundle, log_to(&log)).expect("created");
    shim.start("count", "").expect("started");
    assert_eq!(parent(pid), shim.pid(), "the shim is the container's parent");
    let bundle = host.bundle("brief", "read line; exit 5", join(inside));
    shim.create(&host, "brief", &bundle, |request| request.stdin = "cri-log:///dev/null".into()).expect("created");
    let brief = shim.start("brief", "").expect("started");
    let bundle = host.bundle("waiting", "echo never", join(inside));
    shim.create(&host, "waiting", &bundle, log_to(&host.dir.join("waiting.log"))).expect("created");

    let mut shim = shim;
    for round in 0..5 {
        let before = entries(&log, "stdout").len();
        until("it writes", || entries(&log, "stdout").len() > before + 20);
        kill_9(&shim);
        if round == 2 {
            linux::child::send_signal(brief, 9).expect("killed without a shim");
            until("it is dead", || gone(brief));
        }
        shim = host.start_by_keeper("pod1");
        let status = sandbox::SandboxStatusRequest { sandbox_id: "pod1".into(), verbose: false };
        let status: sandbox::SandboxStatusResponse = shim.sandbox("SandboxStatus", &status).expect("status");
        assert_eq!((status.state.as_str(), status.pid), (sandbox::STATE_READY, shim.pid()));
        let state = shim.state("count", "").expect("adopted");
        assert_eq!((state.status, state.pid), (2, pid), "round {round}");
        assert_eq!(shim.state("waiting", "").expect("adopted").status, 1);
        let brief = shim.state("brief", "").expect("adopted");
        if round < 2 {
            assert_eq!(brief.status, 2, "its stdin did not end with the shim");
        } else {
            assert_eq!((brief.status, brief.exit_status), (3, 137), "round {round}");
        }
    }
    goes_on(&host, &shim);
    let out = entries(&log, "stdout");
    let last = out.len() - 1;
    assert_eq!(out[last], format!("end {last}"));
    // The end may come between the last number's two lines.
    let errors = entries(&log, "stderr").len();
    assert!(errors == last || errors + 1 == last, "{errors} of {last}");
    for (stream, prefix, last) in [("stdout", "", last), ("stderr", "e", errors)] {
        let lines: Vec<_> = entries(&log, stream).into_iter().take(last).collect();
        let expected: Vec<_> = (1..=last).map(|number| format!("{prefix}{number}")).collect();
        assert_eq!(lines, expected, "{stream}");
    }
    let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: "pod1".into() };
    let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
    until("nothing is left", || host.left().is_empty());
    let list = protocols::shim::coracle::ListRequest { prefix: String::new() };
    let keeper = host.keeper.as_deref().expect("a keeper");
    until("the keeper holds nothing", || {
        let (payload, _) = shim::keeping::call(keeper, "List", &list, std::time::Duration::from_secs(5)).expect("list");
        payload.is_empty()
    });
}

#[test]
fn a_terminal_outlives_its_shim() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: a_terminal_outlives_its_shim: {reason}");
        return;
    }
    let mut host = Host::new("tty");
    host.start_keeper();
    let (shim, inside) = pod(&host, "pod2");
    let log = host.dir.join("tty.log");
    let bundle = host.bundle("tty", "while :; do echo tick; sleep 0.01; done", |config| {
        config["process"]["terminal"] = true.into();
        join(inside)(config);
    });
    let pid = shim
        .create(&host, "tty", &bundle, |request| {
            request.terminal = true;
            request.stdout = format!("cri-log://{}", log.display());
        })
        .expect("created");
    shim.start("tty", "").expect("started");
    until("it writes", || entries(&log, "stdout").len() > 5);
    kill_9(&shim);
    let shim = host.start_by_keeper("pod2");
    let before = entries(&log, "stdout").len();
    until("it goes on writing", || entries(&log, "stdout").len() > before + 5);
    let state = shim.state("tty", "").expect("adopted");
    assert_eq!((state.status, state.pid), (2, pid));
    let wait = shim.wait("tty", "");
    shim.kill("tty", "", 9).expect("killed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 137);
    shim.delete("tty", "").expect("deleted");
    let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: "pod2".into() };
    let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
    until("nothing is left", || host.left().is_empty());
}

/// Whether the keeper holds a descriptor of that name.
fn is_kept(host: &Host, path: &Path) -> bool {
    shim::keeping::get(host.keeper.as_deref(), path).is_some()
}

#[test]
fn a_keeper_that_died_is_given_everything_again() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: a_keeper_that_died_is_given_everything_again: {reason}");
        return;
    }
    if !kernel_tells_exits() {
        eprintln!("SKIPPED: a_keeper_that_died_is_given_everything_again: PIDFD_GET_INFO tells no exits (before Linux 6.15)");
        return;
    }
    let mut host = Host::new("two");
    host.start_keeper();
    let (mut shim, inside) = pod(&host, "pod3");
    let reads = host.bundle("reads", "read line; exit 5", join(inside));
    shim.create(&host, "reads", &reads, |request| request.stdin = "cri-log:///dev/null".into()).expect("created");
    let pid = shim.start("reads", "").expect("started");
    let log = host.dir.join("tty.log");
    let tty = host.bundle("tty", "while :; do echo tick; sleep 0.01; done", |config| {
        config["process"]["terminal"] = true.into();
        join(inside)(config);
    });
    shim.create(&host, "tty", &tty, |request| {
        request.terminal = true;
        request.stdout = format!("cri-log://{}", log.display());
    })
    .expect("created");
    shim.start("tty", "").expect("started");
    let held = [reads.join("pidfd"), reads.join("stdin"), tty.join("pidfd"), tty.join("master")];
    // Twice: the second keeper is told by a shim that has taken the descriptors over from the first one's.
    for round in 0..2 {
        until("the keeper holds all", || held.iter().all(|path| is_kept(&host, path)));
        host.replace_keeper();
        until("the next keeper holds all", || held.iter().all(|path| is_kept(&host, path)));
        kill_9(&shim);
        if round == 1 {
            // Whoever reaps it now is no keeper of ours.
            linux::child::send_signal(pid, 9).expect("killed without a shim");
            until("it is reaped", || !Path::new(&format!("/proc/{pid}")).exists());
        }
        shim = host.start_by_keeper("pod3");
        let before = entries(&log, "stdout").len();
        until("the terminal goes on", || entries(&log, "stdout").len() > before + 5);
        let state = shim.state("reads", "").expect("adopted");
        let expected = if round == 0 { (2, 0) } else { (3, 137) };
        assert_eq!((state.status, state.exit_status), expected, "its stdin has not ended, its exit is known: round {round}");
    }
    ends(&host, &shim, &["reads", "tty"]);
    until("the keeper holds nothing", || held.iter().all(|path| !is_kept(&host, path)));
}

#[test]
fn an_exit_that_a_keeper_saw_outlives_it() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: an_exit_that_a_keeper_saw_outlives_it: {reason}");
        return;
    }
    let mut host = Host::new("exits");
    host.start_keeper();
    let (shim, inside) = pod(&host, "pod4");
    let bundle = host.bundle("sleeps", "sleep 1000000", join(inside));
    shim.create(&host, "sleeps", &bundle, |_| ()).expect("created");
    let pid = shim.start("sleeps", "").expect("started");
    kill_9(&shim);
    linux::child::send_signal(pid, 9).expect("killed without a shim");
    until("the keeper has reaped it", || !Path::new(&format!("/proc/{pid}")).exists());
    host.replace_keeper();
    let shim = host.start_by_keeper("pod4");
    let state = shim.state("sleeps", "").expect("adopted");
    assert_eq!((state.status, state.exit_status), (3, 137));
    ends(&host, &shim, &["sleeps"]);
}

/// Ends and deletes containers and their pod; nothing is left.
fn ends(host: &Host, shim: &Shim, containers: &[&str]) {
    for id in containers {
        // One that has ended already is not found.
        let _ = shim.kill(id, "", 9);
        until("it has ended", || shim.state(id, "").is_ok_and(|state| state.status == 3));
        shim.delete(id, "").expect("deleted");
    }
    let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: shim.id.clone() };
    let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
    until("nothing is left", || host.left().is_empty());
}

/// Whether the kernel tells how a process ended that is reaped.
fn kernel_tells_exits() -> bool {
    use std::os::fd::AsFd;
    let mut child = std::process::Command::new("true").spawn().expect("true");
    let pidfd = linux::pidfd::open(i32::try_from(child.id()).expect("a pid")).expect("a pidfd");
    child.wait().expect("waited for");
    linux::child::exit_status_of(pidfd.as_fd()) == Some(0)
}

#[test]
fn one_keeper_for_a_state_directory() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: one_keeper_for_a_state_directory: {reason}");
        return;
    }
    let mut host = Host::new("keeper");
    host.start_keeper();
    let second = std::process::Command::new(common::shim()).args(["keeper", "--state"]).arg(host.dir.join("keeper")).output();
    let second = second.expect("run");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another keeper"), "{second:?}");
}
