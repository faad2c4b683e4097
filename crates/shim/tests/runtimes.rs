//! The shim with another OCI runtime in the place of the built-in one: Debian's runc 1.1, runc 1.5 built by Go, Debian's crun 1.8.

mod common;

use common::{Host, cannot_run, entries, process, until};
use prost::Message;
use protocols::shim::options::{RUNC_TYPE_URL, runc};
use protocols::shim::pod::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig};
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::v3 as task;
use std::path::{Path, PathBuf};
use std::process::Command;

fn peer(name: &str) -> Option<PathBuf> {
    std::env::var_os("CORACLE_PEERS").map(|dir| Path::new(&dir).join(name)).filter(|path| path.exists())
}

fn config() -> PodSandboxConfig {
    let options = NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    PodSandboxConfig { hostname: "pod-host".into(), linux: Some(linux), ..Default::default() }
}

/// A container's life in a pod: made, executed into, paused, killed and deleted by this runtime.
fn life(test: &str, runtime: Option<PathBuf>) {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: {test}: {reason}");
        return;
    }
    let Some(runtime) = runtime else {
        eprintln!("SKIPPED: {test}: there is no such runtime here");
        return;
    };
    let version = Command::new(&runtime).arg("--version").output().expect("the runtime runs");
    println!("{test}: {}", String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default());
    let host = Host::new(test);
    // crun refuses hosts with controllers on both versions of cgroups: the v2 hierarchy is hidden from it, in this mount namespace.
    let unified = Path::new("/sys/fs/cgroup/unified");
    let hidden = test.contains("crun") && unified.exists();
    if hidden {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(unified).status().expect("mount");
        assert!(mounted.success());
    }
    let shim = host.start("pod1");
    shim.create_sandbox(&host, &config()).expect("created");
    let request = sandbox::StartSandboxRequest { sandbox_id: "pod1".into() };
    let pod = shim.sandbox::<sandbox::StartSandboxResponse>("StartSandbox", &request).expect("started").pid;
    let script = "hostname; echo oops >&2; trap 'exit 7' TERM; while :; do sleep 0.05; done";
    let bundle = host.bundle("c1", script, |config| {
        let list = config["linux"]["namespaces"].as_array_mut().expect("a list");
        for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
            list.push(serde_json::json!({ "type": kind, "path": format!("/proc/{pod}/ns/{file}") }));
        }
    });
    let log = host.dir.join("c1.log");
    let options = runc::Options {
        binary_name: runtime.display().to_string(),
        root: host.dir.join("oci").display().to_string(),
        ..Default::default()
    };
    let pid = shim
        .create(&host, "c1", &bundle, |request| {
            request.stdout = format!("cri-log://{}", log.display());
            request.stderr.clone_from(&request.stdout);
            request.options = Some(prost_types::Any { type_url: RUNC_TYPE_URL.into(), value: options.encode_to_vec() });
        })
        .expect("created");
    let wait = shim.wait("c1", "");
    assert_eq!(shim.start("c1", "").expect("started"), pid);
    until("the log has the output", || entries(&log, "stderr") == ["oops"] && entries(&log, "stdout") == ["pod-host"]);
    shim.exec("c1", "e1", &process("exit 4"), |_| {}).expect("added");
    let exec = shim.wait("c1", "e1");
    shim.start("c1", "e1").expect("started");
    assert_eq!(exec.answer::<task::WaitResponse>().expect("an exit").exit_status, 4);
    assert_eq!(shim.delete("c1", "e1").expect("deleted").exit_status, 4);
    let pids: task::PidsResponse = shim.task("Pids", &task::PidsRequest { id: "c1".into() }).expect("pids");
    assert!(pids.processes.iter().any(|process| process.pid == pid));
    let _: () = shim.task("Pause", &task::PauseRequest { id: "c1".into() }).expect("paused");
    assert_eq!(shim.state("c1", "").expect("state").status, 4);
    let _: () = shim.task("Resume", &task::ResumeRequest { id: "c1".into() }).expect("resumed");
    shim.kill("c1", "", 15).expect("killed");
    assert_eq!(wait.answer::<task::WaitResponse>().expect("an exit").exit_status, 7);
    assert_eq!(shim.delete("c1", "").expect("deleted").exit_status, 7);
    let stop = sandbox::StopSandboxRequest { sandbox_id: "pod1".into(), timeout_secs: 1 };
    let _: sandbox::StopSandboxResponse = shim.sandbox("StopSandbox", &stop).expect("stopped");
    let shutdown = sandbox::ShutdownSandboxRequest { sandbox_id: "pod1".into() };
    let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &shutdown).expect("shut down");
    if hidden {
        linux::mount::unmount_all(unified, true).expect("unmounted");
    }
    until("nothing is left", || host.left().is_empty());
}

#[test]
fn runc_of_debian() {
    life("runc_of_debian", peer("debian/runc/usr/sbin/runc"));
}

#[test]
fn runc_1_5() {
    life("runc_1_5", peer("runc"));
}

#[test]
fn crun_of_debian() {
    life("crun_of_debian", Some(PathBuf::from("/usr/bin/crun")).filter(|path| path.exists()));
}
