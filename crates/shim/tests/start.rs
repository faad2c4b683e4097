//! The commands `start`, `delete` and `-info` as containerd of each version runs them.

mod common;

use common::{Host, Shim, cannot_run, until};
use prost::Message;
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::v3 as task;
use protocols::shim::types::RuntimeInfo;
use std::process::{Command, Stdio};

#[test]
fn containers_of_a_pod_share_a_shim_under_older_containerds() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: containers_of_a_pod_share_a_shim_under_older_containerds: {reason}");
        return;
    }
    let host = Host::new("group");
    // The default directory of sockets lies below /run: a new one, in this mount namespace.
    assert!(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status().expect("mount").success());
    let start = |id: &str, version: Option<&str>| {
        let bundle = host.bundle(id, "true", |config| {
            config["annotations"] = serde_json::json!({ "io.kubernetes.cri.sandbox-id": "pod" });
        });
        let mut command = host.command("start", id, &bundle);
        match version {
            Some(version) => command.env("MAX_SHIM_VERSION", version),
            None => command.env_remove("MAX_SHIM_VERSION"),
        };
        let output = command.stdin(Stdio::null()).output().expect("start");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let kept = std::fs::read_to_string(bundle.join("address")).expect("address");
        (String::from_utf8(output.stdout).expect("text"), kept, bundle)
    };
    let (plain, kept, bundle) = start("pod", None);
    assert!(plain.starts_with("unix:///run/containerd/s/"), "{plain}");
    assert_eq!(plain, kept);
    let (json, kept, _) = start("c1", Some("2"));
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json, serde_json::json!({ "version": 2, "address": plain, "protocol": "ttrpc" }));
    assert_eq!(plain, kept);

    let socket = plain.trim_start_matches("unix://").into();
    let shim = Shim { socket, id: "pod".into(), bundle };
    let pid = shim.pid();
    let shutdown = task::ShutdownRequest { id: "pod".into(), now: false };
    let v2 = protocols::shim::task::v2::SERVICE;
    let _: () = shim.send(v2, "Shutdown", &shutdown).answer().expect("answered");
    until("it has ended", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(!shim.socket.exists());

    // Nothing is left to delete, which is no error; nobody knows the exit.
    let output = host.command("delete", "c1", &host.dir.join("tasks/c1")).output().expect("delete");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let response = task::DeleteResponse::decode(output.stdout.as_slice()).expect("DeleteResponse");
    assert_eq!((response.pid, response.exit_status), (0, 137));
    linux::mount::unmount_all(std::path::Path::new("/run"), true).expect("unmounted");
}

/// The daemons of a sandbox.
fn daemons(id: &str) -> Vec<u32> {
    testkit::host::pids_with(&[id])
}

#[test]
fn starts_at_one_time_find_one_shim_and_it_ends_when_told_though_it_serves_nothing() {
    let name = "starts_at_one_time_find_one_shim_and_it_ends_when_told_though_it_serves_nothing";
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: {name}: {reason}");
        return;
    }
    let host = Host::new("race");
    for round in 0..10 {
        let id = format!("race-{}-{round}", std::process::id());
        let shim = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..3).map(|_| scope.spawn(|| host.start(&id))).collect();
            starts.into_iter().map(|start| start.join().expect("started")).next_back().expect("three")
        });
        // In the midst of its execve a process has no command line.
        until("the daemon runs", || !daemons(&id).is_empty());
        let shims = daemons(&id);
        assert_eq!(shims.len(), 1, "round {round}: {shims:?}");
        let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: id.clone() };
        let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
        until("it has ended", || daemons(&id).is_empty());
        assert!(!shim.socket.exists());
    }
}

#[test]
fn a_shim_that_nobody_knows_ends_by_itself() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: a_shim_that_nobody_knows_ends_by_itself: {reason}");
        return;
    }
    let host = Host::new("unknown");
    let id = format!("unknown-{}", std::process::id());
    let shim = host.start(&id);
    let pid = shim.pid();
    // In the midst of its execve a process has no command line.
    until("the daemon runs", || daemons(&id) == [pid]);
    std::fs::remove_dir_all(&shim.bundle).expect("removed");
    until("it has ended", || daemons(&id).is_empty());
}

#[test]
fn info_tells_the_runtimes_features() {
    let output = Command::new(common::shim()).arg("-info").stdin(Stdio::null()).output().expect("info");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let info = RuntimeInfo::decode(output.stdout.as_slice()).expect("RuntimeInfo");
    assert_eq!(info.name, "io.containerd.coracle.v2");
    assert_eq!(info.version.expect("a version").version, env!("CARGO_PKG_VERSION"));
    let features = info.features.expect("features");
    assert_eq!(features.type_url, protocols::shim::OCI_FEATURES_TYPE_URL);
    let features: serde_json::Value = serde_json::from_slice(&features.value).expect("JSON");
    assert!(features["ociVersionMax"].is_string(), "{features}");
}

#[test]
fn wrong_command_lines_are_errors() {
    for (words, says) in [
        (vec!["-id", "x", "start"], "-namespace is required"),
        (vec!["-namespace", "n", "-id", "x"], "descriptor 3"),
        (vec!["--frob"], "unknown flag --frob"),
        (vec!["keeper"], "--state is required"),
    ] {
        let output = Command::new(common::shim()).args(&words).stdin(Stdio::null()).output().expect("run");
        assert!(!output.status.success(), "{words:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(says), "{words:?}: {text}");
    }
}
