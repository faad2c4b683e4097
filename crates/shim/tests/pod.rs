//! The shim driven as containerd drives it: a pod of three containers, execs, logs, and nothing left at the end.

mod common;

use common::{Host, cannot_run, entries, process, read_fifo, until};
use prost::Message;
use protocols::shim::coracle::{self, AttachRequest, AttachResponse, InfoResponse, ReopenLogRequest, ReopenLogResponse};
use protocols::shim::pod::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig};
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::v3 as task;
use protocols::ttrpc::code;
use std::io::Write;
use std::path::Path;

macro_rules! need_root {
    ($name:literal) => {
        if let Some(reason) = cannot_run() {
            eprintln!("SKIPPED: {}: {reason}", $name);
            return;
        }
    };
}

fn config() -> PodSandboxConfig {
    let sysctls = [("net.ipv4.ip_unprivileged_port_start".to_owned(), "7".to_owned())];
    let options = NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxPodSandboxConfig { sysctls: sysctls.into_iter().collect(), security_context: Some(context), ..Default::default() };
    PodSandboxConfig { hostname: "pod-host".into(), linux: Some(linux), ..Default::default() }
}

/// Joins the pod's namespaces, as cri-server writes it.
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

#[test]
fn a_pod_lives_and_leaves_nothing() {
    need_root!("a_pod_lives_and_leaves_nothing");
    let host = Host::new("life");
    let shim = host.start("pod1");
    shim.create_sandbox(&host, &config()).expect("created");
    let started: sandbox::StartSandboxResponse =
        shim.sandbox("StartSandbox", &sandbox::StartSandboxRequest { sandbox_id: "pod1".into() }).expect("started");
    assert_eq!(started.pid, shim.pid(), "without a shared PID namespace the shim itself is in the pod's namespaces");
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", started.pid)).expect("fds").count();
    let (before, mut waits) = (descriptors(), Vec::new());
    for id in ["c1", "c2", "c3"] {
        let script = "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo oops >&2; printf end; \
                      trap 'exit 7' TERM; while :; do sleep 0.05; done";
        let bundle = host.bundle(id, script, join(started.pid));
        let log = host.dir.join(format!("{id}.log"));
        let pid = shim.create(&host, id, &bundle, log_to(&log)).expect("created");
        waits.push(shim.wait(id, ""));
        assert_eq!(shim.state(id, "").expect("state").status, 1);
        assert_eq!(shim.start(id, "").expect("started"), pid);
        assert_eq!(shim.state(id, "").expect("state").status, 2);
        until("the log has the output", || entries(&log, "stderr") == ["oops"]);
        until("the log has the output", || entries(&log, "stdout") == ["pod-host", "7"]);
        let pids: task::PidsResponse = shim.task("Pids", &task::PidsRequest { id: id.into() }).expect("pids");
        assert!(pids.processes.iter().any(|process| process.pid == pid));
        let stats: task::StatsResponse = shim.task("Stats", &task::StatsRequest { id: id.into() }).expect("stats");
        assert!(stats.stats.is_some_and(|any| any.type_url.starts_with("io.containerd.cgroups.v")));
    }
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", started.pid)).expect("smaps");
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss").trim();
    eprintln!("shim of three containers: PSS {pss}");
    assert_eq!(shim.delete("c1", "").expect_err("it runs").code, code::FAILED_PRECONDITION);
    for (id, wait) in ["c1", "c2", "c3"].into_iter().zip(waits) {
        shim.kill(id, "", 15).expect("killed");
        assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 7);
        assert_eq!(shim.kill(id, "", 9).expect_err("finished").code, code::NOT_FOUND);
        assert_eq!(shim.state(id, "").expect("state").status, 3);
        let log = host.dir.join(format!("{id}.log"));
        assert_eq!(entries(&log, "stdout"), ["pod-host", "7", "end"]);
        assert!(std::fs::read_to_string(&log).expect("log").contains(" stdout P end\n"));
        let _: () = shim.task("Shutdown", &task::ShutdownRequest { id: id.into(), now: false }).expect("it stays");
        assert_eq!(shim.delete(id, "").expect("deleted").exit_status, 7);
        assert_eq!(shim.delete(id, "").expect_err("gone").code, code::NOT_FOUND);
    }
    // One more than before: the connection for events.
    until("no descriptor is left of the containers", || descriptors() <= before + 1);
    end(&host, &shim);
    let topics = host.topics();
    for topic in ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"] {
        assert_eq!(topics.iter().filter(|other| *other == topic).count(), 3, "{topics:?}");
    }
    let place = |topic: &str| topics.iter().position(|other| other == topic);
    assert!(place("/tasks/create") < place("/tasks/start") && place("/tasks/exit") < place("/tasks/delete"));
}

/// Stops and removes the sandbox as containerd does, and looks for what is left.
fn end(host: &Host, shim: &common::Shim) {
    let id = &shim.id;
    let waits = shim.send(sandbox::SERVICE, "WaitSandbox", &sandbox::WaitSandboxRequest { sandbox_id: id.clone() });
    let status = sandbox::SandboxStatusRequest { sandbox_id: id.clone(), verbose: true };
    let ready: sandbox::SandboxStatusResponse = shim.sandbox("SandboxStatus", &status).expect("status");
    assert_eq!(ready.state, sandbox::STATE_READY);
    let stop = sandbox::StopSandboxRequest { sandbox_id: id.clone(), timeout_secs: 0 };
    let _: sandbox::StopSandboxResponse = shim.sandbox("StopSandbox", &stop).expect("stopped");
    let _: sandbox::WaitSandboxResponse = waits.answer().expect("an exit");
    let stopped: sandbox::SandboxStatusResponse = shim.sandbox("SandboxStatus", &status).expect("status");
    assert_eq!(stopped.state, sandbox::STATE_NOTREADY);
    let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: id.clone() };
    let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
    until("the shim has ended and left nothing", || host.left().is_empty());
    let output = host.command("delete", id, &shim.bundle).output().expect("delete");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = std::fs::read_dir(&shim.bundle).expect("bundle").flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| name == "shim.log"), "{left:?}");
}

/// Execs end with the container, and their exits come before its own.
fn execs_end_with_their_container(shim: &common::Shim) {
    shim.exec("c1", "e4", &process("exec sleep 1000"), |_| {}).expect("added");
    shim.start("c1", "e4").expect("started");
    let (exec, init) = (shim.wait("c1", "e4"), shim.wait("c1", ""));
    shim.kill("c1", "", 9).expect("killed");
    assert_eq!(exec.answer::<task::WaitResponse>().expect("an exit").exit_status, 137);
    assert_eq!(init.answer::<task::WaitResponse>().expect("an exit").exit_status, 137);
    shim.delete("c1", "").expect("deleted");
}

/// A program that is not there is an error of Start, and leaves the container alone.
fn a_missing_program_is_an_error(shim: &common::Shim) {
    let missing = serde_json::json!({ "args": ["/none"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
    shim.exec("c1", "e3", &missing, |_| {}).expect("added");
    let error = shim.start("c1", "e3").expect_err("no such program");
    assert!(error.message.contains("exec failed") && error.message.contains("/none"), "{}", error.message);
    shim.delete("c1", "e3").expect("deleted");
}

#[test]
fn execs_with_and_without_a_terminal() {
    need_root!("execs_with_and_without_a_terminal");
    let host = Host::new("exec");
    let shim = host.start("pod2");
    shim.create_sandbox(&host, &config()).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod2".into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    let bundle = host.bundle("c1", "exec sleep 1000", join(started.pid));
    shim.create(&host, "c1", &bundle, log_to(&host.dir.join("c1.log"))).expect("created");
    shim.start("c1", "").expect("started");

    let (stdin, stdout, stderr) = (host.dir.join("in"), host.dir.join("out"), host.dir.join("err"));
    linux::pipes::make_fifo(&stdin, 0o600).expect("fifo");
    let (out, err) = (read_fifo(&stdout), read_fifo(&stderr));
    let name = |path: &Path| path.display().to_string();
    shim.exec("c1", "e1", &process("cat; echo bad >&2; exit 3"), |request| {
        request.stdin = name(&stdin);
        request.stdout = name(&stdout);
        request.stderr = name(&stderr);
    })
    .expect("added");
    assert_eq!(shim.state("c1", "e1").expect("state").status, 1);
    let wait = shim.wait("c1", "e1");
    shim.start("c1", "e1").expect("started");
    let mut writer = std::fs::File::options().write(true).open(&stdin).expect("stdin");
    writer.write_all(&b"0123456789".repeat(20_000)).expect("written");
    drop(writer);
    let close = task::CloseIoRequest { id: "c1".into(), exec_id: "e1".into(), stdin: true };
    let _: () = shim.task("CloseIO", &close).expect("closed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 3);
    assert_eq!(shim.delete("c1", "e1").expect("deleted").exit_status, 3);
    assert_eq!(out.join().expect("read").len(), 200_000);
    assert_eq!(err.join().expect("read"), "bad\n");

    let out = read_fifo(&stdout);
    shim.exec(
        "c1",
        "e2",
        &{
            let mut process = process("read line; stty size; echo got $line; tty; exit 4");
            process["terminal"] = true.into();
            process
        },
        |request| {
            request.terminal = true;
            request.stdin = name(&stdin);
            request.stdout = name(&stdout);
        },
    )
    .expect("added");
    let wait = shim.wait("c1", "e2");
    shim.start("c1", "e2").expect("started");
    let resize = task::ResizePtyRequest { id: "c1".into(), exec_id: "e2".into(), width: 101, height: 42 };
    let _: () = shim.task("ResizePty", &resize).expect("resized");
    std::fs::File::options().write(true).open(&stdin).expect("stdin").write_all(b"hello\n").expect("written");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 4);
    let text = out.join().expect("read");
    assert!(text.contains("42 101") && text.contains("got hello") && text.contains("/dev/pts/"), "{text:?}");
    shim.delete("c1", "e2").expect("deleted");

    a_missing_program_is_an_error(&shim);

    execs_end_with_their_container(&shim);
    end(&host, &shim);
}

#[test]
fn logs_are_reopened_and_readers_attach() {
    need_root!("logs_are_reopened_and_readers_attach");
    let host = Host::new("log");
    let shim = host.start("pod3");
    shim.create_sandbox(&host, &config()).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod3".into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    let info: InfoResponse = shim.send(coracle::SHIM_SERVICE, "Info", &coracle::InfoRequest {}).answer().expect("our shim");
    assert!(info.capabilities.iter().any(|capability| capability == "attach"));

    let script = "printf 'name? '; while read line; do echo \"<$line>\" >/dev/stdout; echo \"!$line\" >/dev/stderr; done";
    let bundle = host.bundle("c1", script, |config| {
        config["process"]["user"] = serde_json::json!({ "uid": 1000, "gid": 1000 });
        join(started.pid)(config);
    });
    let log = host.dir.join("logs/c1.log");
    shim.create(&host, "c1", &bundle, |request| {
        log_to(&log)(request);
        request.stdin = format!("cri-log://{}", log.display());
    })
    .expect("created");
    shim.start("c1", "").expect("started");

    let attach = |number: u32| {
        let (stdin, stdout) = (host.dir.join(format!("in{number}")), host.dir.join(format!("out{number}")));
        for path in [&stdin, &stdout] {
            linux::pipes::make_fifo(path, 0o600).expect("fifo");
        }
        let reader = linux::pipes::open_fifo(&stdout, linux::pipes::Access::Read).expect("reader");
        let request = AttachRequest {
            id: "c1".into(),
            stdin: stdin.display().to_string(),
            stdout: stdout.display().to_string(),
            stderr: String::new(),
        };
        let _: AttachResponse = shim.send(coracle::SHIM_SERVICE, "Attach", &request).answer().expect("attached");
        let writer = std::fs::File::options().write(true).open(&stdin).expect("writer");
        linux::pipes::set_nonblocking(&reader, false).expect("blocking");
        (writer, std::fs::File::from(reader))
    };
    let (mut writer, mut reader) = attach(1);
    writer.write_all(b"one\n").expect("written");
    until("the log has both streams", || entries(&log, "stdout") == ["name? <one>"] && entries(&log, "stderr") == ["!one"]);
    drop(writer);
    let mut text = [0; 64];
    let got = std::io::Read::read(&mut reader, &mut text).expect("output");
    assert!(String::from_utf8_lossy(&text[..got]).contains("<one>"));
    drop(reader);

    let rotated = host.dir.join("logs/c1.log.1");
    std::fs::rename(&log, &rotated).expect("rotated");
    let (mut writer, reader) = attach(2);
    writer.write_all(b"two\n").expect("written");
    until("before the reopening lines go to the old file", || entries(&rotated, "stderr") == ["!one", "!two"]);
    let reopen = ReopenLogRequest { id: "c1".into() };
    let _: ReopenLogResponse = shim.send(coracle::SHIM_SERVICE, "ReopenLog", &reopen).answer().expect("reopened");
    writer.write_all(b"three\n").expect("written");
    until("after it to the new one", || entries(&log, "stdout") == ["<three>"] && entries(&log, "stderr") == ["!three"]);
    drop(writer);

    // stdin ends when it is closed, and the session with the container.
    let wait = shim.wait("c1", "");
    let close = task::CloseIoRequest { id: "c1".into(), exec_id: String::new(), stdin: true };
    let _: () = shim.task("CloseIO", &close).expect("closed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 0);
    let rest = std::io::read_to_string(reader).expect("to its end");
    assert!(rest.contains("<two>") && rest.contains("<three>"), "{rest:?}");
    shim.delete("c1", "").expect("deleted");
    end(&host, &shim);
}

#[test]
fn a_shared_pid_namespace_has_a_confined_pause_process() {
    need_root!("a_shared_pid_namespace_has_a_confined_pause_process");
    if !common::is_static() {
        eprintln!("SKIPPED: a_shared_pid_namespace_has_a_confined_pause_process: the shim is not static");
        return;
    }
    let host = Host::new("pause");
    let shim = host.start("pod4");
    let mut config = config();
    config.linux.get_or_insert_default().security_context = None;
    shim.create_sandbox(&host, &config).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod4".into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    assert_ne!(started.pid, shim.pid());
    let proc = |file: &str| format!("/proc/{}/{file}", started.pid);
    let status = std::fs::read_to_string(proc("status")).expect("status");
    assert!(status.contains("NSpid:") && status.contains("CapEff:\t0000000000000000") && status.contains("Uid:\t65535"));
    let root: Vec<_> = std::fs::read_dir(proc("root")).expect("root").flatten().map(|entry| entry.file_name()).collect();
    assert!(root.is_empty(), "{root:?}");
    let name = std::fs::read_link(proc("ns/ipc")).expect("ipc");
    assert_eq!(name, std::fs::read_link(format!("/proc/{}/ns/ipc", shim.pid())).expect("ipc"));

    // A container in it is not process 1, and all it started ends with its first process.
    let bundle = host.bundle("c1", "echo pid $$; sleep 1000 & exec sleep 1000", |config| {
        join(started.pid)(config);
        config["linux"]["namespaces"][0]["path"] = proc("ns/pid").into();
    });
    let log = host.dir.join("c1.log");
    shim.create(&host, "c1", &bundle, log_to(&log)).expect("created");
    shim.start("c1", "").expect("started");
    until("it has spoken", || !entries(&log, "stdout").is_empty());
    assert_ne!(entries(&log, "stdout"), ["pid 1"]);
    let wait = shim.wait("c1", "");
    shim.kill("c1", "", 15).expect("killed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 143);
    shim.delete("c1", "").expect("deleted");
    end(&host, &shim);
}

#[test]
fn wrong_requests_change_nothing() {
    need_root!("wrong_requests_change_nothing");
    let host = Host::new("wrong");
    let shim = host.start("pod5");
    let mut bad = config();
    bad.linux.get_or_insert_default().sysctls.insert("kernel.panic".into(), "1".into());
    let error = shim.create_sandbox(&host, &bad).expect_err("not the pod's to set");
    assert!(error.code == code::INVALID_ARGUMENT && error.message.contains("kernel.panic"), "{error:?}");
    shim.create_sandbox(&host, &config()).expect("created after all");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod5".into() };
    let _: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    for (method, service, expected) in [
        ("Checkpoint", task::SERVICE, code::UNIMPLEMENTED),
        ("Nothing", task::SERVICE, code::UNIMPLEMENTED),
        ("State", "no.such.Service", code::UNIMPLEMENTED),
        ("State", protocols::shim::task::v2::SERVICE, code::NOT_FOUND),
    ] {
        let error = shim.send(service, method, &task::StateRequest::default()).answer::<()>().expect_err(method);
        assert_eq!(error.code, expected, "{method}");
    }
    let bundle = host.bundle("c1", "true", |config| config["process"]["args"] = serde_json::json!(["/none"]));
    let error = shim.create(&host, "c1", &bundle, |_| {}).and_then(|_| shim.start("c1", "")).expect_err("no program");
    assert!(error.message.contains("OCI runtime") && error.message.contains("/none"), "{}", error.message);
    if shim.state("c1", "").is_ok() {
        let _ = shim.kill("c1", "", 9);
        shim.delete("c1", "").expect("deleted");
    }
    let error = shim.create(&host, "c2", &bundle, |request| request.stdout = "binary:///x".into()).expect_err("refused");
    assert_eq!(error.code, code::UNIMPLEMENTED);
    let error = shim.create(&host, "../c2", &bundle, |_| {}).expect_err("refused");
    assert_eq!(error.code, code::INVALID_ARGUMENT);
    end(&host, &shim);
}

#[test]
fn a_slow_hook_delays_no_neighbour_and_long_lines_are_split() {
    need_root!("a_slow_hook_delays_no_neighbour_and_long_lines_are_split");
    let host = Host::new("slow");
    let shim = host.start("pod6");
    shim.create_sandbox(&host, &config()).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod6".into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    assert!(started.spec.is_some_and(|spec| spec.type_url.ends_with("/Spec")));
    let go_on = host.dir.join("go-on");
    let hook = format!("until [ -e {} ]; do sleep 0.05; done", go_on.display());
    let slow = host.bundle("slow", "exec sleep 1000", |config| {
        join(started.pid)(config);
        let env = ["PATH=/usr/bin:/bin"];
        config["hooks"] = serde_json::json!({ "poststart": [{ "path": "/bin/sh", "args": ["sh", "-c", hook], "env": env }] });
    });
    shim.create(&host, "slow", &slow, |_| {}).expect("created");
    let request = task::StartRequest { id: "slow".into(), exec_id: String::new() };
    let starting = shim.send(task::SERVICE, "Start", &request);
    // One byte at a time and no end of line: nothing is told before an entry is full, and nothing gets stuck.
    let script = "dd if=/dev/zero bs=1 count=40000 status=none; exec sleep 1000";
    let bundle = host.bundle("quick", script, join(started.pid));
    let log = host.dir.join("quick.log");
    shim.create(&host, "quick", &bundle, log_to(&log)).expect("created");
    shim.start("quick", "").expect("started");
    until("two entries are full", || entries(&log, "stdout").len() == 2);
    assert!(entries(&log, "stdout").iter().all(|entry| entry.len() == 16384));
    shim.exec("quick", "e1", &process("exit 2"), |_| {}).expect("added");
    let wait = shim.wait("quick", "e1");
    shim.start("quick", "e1").expect("started");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 2);
    // All that was done before the hook ended.
    std::fs::write(&go_on, "").expect("written");
    starting.answer::<task::StartResponse>().expect("started");
    for id in ["slow", "quick"] {
        let wait = shim.wait(id, "");
        shim.kill(id, "", 9).expect("killed");
        wait.answer::<task::WaitResponse>().expect("an exit");
        shim.delete(id, "").expect("deleted");
    }
    assert_eq!(entries(&log, "stdout").iter().map(String::len).sum::<usize>(), 40000);
    end(&host, &shim);
}

#[test]
fn limits_change_and_running_out_of_memory_is_told() {
    need_root!("limits_change_and_running_out_of_memory_is_told");
    let host = Host::new("oom");
    let shim = host.start("pod7");
    shim.create_sandbox(&host, &config()).expect("created");
    let start = sandbox::StartSandboxRequest { sandbox_id: "pod7".into() };
    let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &start).expect("started");
    const MIB: u64 = 1 << 20;
    let bundle = host.bundle("c1", "read go; tail /dev/zero; echo survived; exec sleep 1000", |config| {
        join(started.pid)(config);
        config["linux"]["resources"]["memory"] = serde_json::json!({ "limit": 64 * MIB });
    });
    let log = host.dir.join("c1.log");
    shim.create(&host, "c1", &bundle, |request| {
        log_to(&log)(request);
        request.stdin = "cri-log:///dev/null".into();
    })
    .expect("created");
    shim.start("c1", "").expect("started");
    let limit = || {
        let stats: task::StatsResponse = shim.task("Stats", &task::StatsRequest { id: "c1".into() }).expect("stats");
        let any = stats.stats.expect("stats");
        if any.type_url == protocols::shim::cgroups::v1::TYPE_URL {
            let metrics = protocols::shim::cgroups::v1::Metrics::decode(any.value.as_slice()).expect("metrics");
            metrics.memory.expect("memory").usage.expect("usage").limit
        } else {
            let metrics = protocols::shim::cgroups::v2::Metrics::decode(any.value.as_slice()).expect("metrics");
            metrics.memory.expect("memory").usage_limit
        }
    };
    assert_eq!(limit(), 64 * MIB);
    let resources = serde_json::json!({ "memory": { "limit": 24 * MIB } }).to_string().into_bytes();
    let type_url = protocols::shim::OCI_RESOURCES_TYPE_URL.to_owned();
    let update =
        task::UpdateTaskRequest { id: "c1".into(), resources: Some(prost_types::Any { type_url, value: resources }), ..Default::default() };
    let _: () = shim.task("Update", &update).expect("updated");
    assert_eq!(limit(), 24 * MIB);
    let close = task::CloseIoRequest { id: "c1".into(), exec_id: String::new(), stdin: true };
    let _: () = shim.task("CloseIO", &close).expect("closed");
    until("it is told", || host.topics().iter().any(|topic| topic == "/tasks/oom"));
    until("only the one process was killed", || entries(&log, "stdout") == ["survived"]);
    let wait = shim.wait("c1", "");
    shim.kill("c1", "", 9).expect("killed");
    wait.answer::<task::WaitResponse>().expect("an exit");
    shim.delete("c1", "").expect("deleted");
    end(&host, &shim);
}
