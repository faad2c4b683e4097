//! A server in this process on a host of its own, and crictl pointed at it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use testkit::host::{List, Lists, on_own_host};
use testkit::image::{Image, ImageSpec};
use testkit::poll::{PATIENCE, until};
use testkit::registry::Registry;
use testkit::tar::Entry;
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: cri_server::Config,
}

/// What a test cannot do without.
pub struct Needs {
    pub crictl: PathBuf,
    pub shim: Utf8PathBuf,
    pub busybox: Vec<u8>,
}

pub fn needs(test: &str) -> Option<Needs> {
    let skip = |reason: String| {
        eprintln!("SKIPPED: {test}: {reason}");
        None
    };
    let Some(peers) = std::env::var_os("CORACLE_PEERS") else { return skip("CORACLE_PEERS is not set".to_owned()) };
    let crictl = Path::new(&peers).join("crictl");
    if !crictl.is_file() {
        return skip(format!("no {}", crictl.display()));
    }
    let Ok(busybox) = std::fs::read("/bin/busybox") else { return skip("no /bin/busybox (Debian's busybox-static)".to_owned()) };
    let test_binary = std::env::current_exe().expect("the test is a file");
    let beside = test_binary.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned();
    let shim = std::env::var_os("CORACLE_TEST_SHIM")
        .map_or_else(|| std::env::var_os("CORACLE_BIN").map_or(beside, PathBuf::from).join(cri_server::SHIM_NAME), PathBuf::from);
    if !shim.is_file() {
        return skip(format!("no {}: cargo build -p shim", shim.display()));
    }
    Some(Needs { crictl, shim: Utf8PathBuf::from_path_buf(shim).expect("UTF-8"), busybox })
}

pub fn busybox_image(busybox: &[u8]) -> Image {
    busybox_spec(busybox).build()
}

pub fn busybox_spec(busybox: &[u8]) -> ImageSpec {
    let applets = [
        "sh", "cat", "echo", "sleep", "id", "hostname", "ls", "seq", "grep", "mkdir", "touch", "sync", "dd", "true", "ip", "readlink", "ps",
    ];
    let mut entries = vec![
        Entry::dir("bin"),
        Entry::dir("etc"),
        Entry::dir("tmp"),
        Entry::executable("bin/busybox", busybox),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
        Entry::file("etc/group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
    ];
    entries.extend(applets.iter().map(|applet| Entry::symlink(&format!("bin/{applet}"), "busybox")));
    ImageSpec::new().layer(entries).config("Cmd", vec!["sh"])
}

/// A server in this process, and crictl pointed at it.
pub struct Node {
    pub needs: Needs,
    pub dir: Utf8PathBuf,
    pub registry: Registry,
    pub cgroup: String,
    pub running: Option<(CancellationToken, std::thread::JoinHandle<Result<(), cri_server::Error>>)>,
}

impl Node {
    pub fn new(needs: Needs, dir: &Path, cgroup: &str) -> Self {
        let registry = Registry::start().expect("a registry");
        registry.add("busybox", "1", &busybox_image(&needs.busybox));
        let dir = Utf8Path::from_path(dir).expect("UTF-8").to_owned();
        std::fs::create_dir_all(dir.join("logs")).expect("made");
        Self { needs, dir, registry, cgroup: cgroup.to_owned(), running: None }
    }

    pub fn config(&self) -> cri_server::Config {
        let flags = [
            ("--root", self.dir.join("root").into_string()),
            ("--state", self.dir.join("state").into_string()),
            ("--address", self.address()),
            ("--bridge", "cri-test0".to_owned()),
            ("--nftables-table", "cri-test".to_owned()),
            ("--pod-cidr", "10.99.0.0/24".to_owned()),
            ("--cni-conf-dir", self.dir.join("cni").into_string()),
            ("--cgroup-root", self.cgroup.clone()),
            ("--shim", self.needs.shim.to_string()),
        ];
        let flags = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        Cli::parse_from(std::iter::once("cri".to_owned()).chain(flags)).config
    }

    pub fn address(&self) -> String {
        self.dir.join("cri.sock").into_string()
    }

    pub fn image(&self) -> String {
        format!("{}/busybox:1", self.registry.address())
    }

    /// Threads made here are in the namespaces of the test's host.
    pub fn start(&mut self) {
        let config = self.config();
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
            runtime.block_on(cri_server::run(config, token))
        });
        until("the server answers, or has ended", || thread.is_finished() || self.crictl(&["version"]).status.success());
        assert!(!thread.is_finished(), "the server ended: {:?}", thread.join());
        self.running = Some((cancel, thread));
    }

    pub fn stop(&mut self) {
        if let Some((cancel, thread)) = self.running.take() {
            cancel.cancel();
            thread.join().expect("no panic").expect("a clean end");
            // A process that another test has just forked shares the server's lock until it executes its program.
            let lock = std::fs::File::open(self.dir.join("state/lock")).expect("there");
            until("the server's lock is free", || lock.try_lock().is_ok());
        }
    }

    pub fn down(&mut self) {
        self.stop();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(cri_server::down(self.config())).expect("all is removed");
    }

    pub fn crictl(&self, args: &[&str]) -> Output {
        let endpoint = format!("unix://{}", self.address());
        Command::new(&self.needs.crictl)
            .args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint, "--timeout", "30s"])
            .args(args)
            .output()
            .expect("crictl runs")
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.crictl(args);
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(output.status.success(), "crictl {args:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.crictl(args);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success(), "crictl {args:?} succeeded: {text}");
        text
    }

    /// With this on its stdin.
    pub fn piped(&self, args: &[&str], input: &[u8]) -> Output {
        let endpoint = format!("unix://{}", self.address());
        let mut child = Command::new(&self.needs.crictl)
            .args(["--runtime-endpoint", &endpoint, "--timeout", "30s"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("crictl runs");
        // Dropping it ends crictl's stdin.
        let written = child.stdin.take().expect("piped").write_all(input);
        let output = child.wait_with_output().expect("crictl ends");
        written.expect("crictl reads");
        output
    }

    pub fn file(&self, name: &str, value: &serde_json::Value) -> String {
        let path = self.dir.join(name);
        std::fs::write(&path, value.to_string()).expect("written");
        path.into_string()
    }

    pub fn pod(&self, name: &str) -> (String, String) {
        self.pod_with(name, |_| {})
    }

    pub fn pod_with(&self, name: &str, change: impl FnOnce(&mut serde_json::Value)) -> (String, String) {
        let mut config = serde_json::json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0},
            "hostname": name,
            "log_directory": self.dir.join("logs"),
            "dns_config": {"servers": ["10.96.0.10"], "searches": ["local"]},
            "labels": {"app": name},
            // As a kubelet sends it; crictl's own default is a PID namespace for the whole pod.
            "linux": {"security_context": {"namespace_options": {"pid": 1}}},
        });
        change(&mut config);
        let file = self.file(&format!("pod-{name}.json"), &config);
        (self.ok(&["runp", &file]), file)
    }

    pub fn container(&self, pod: &(String, String), name: &str, command: &[&str], change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut config = serde_json::json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": self.image()},
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": {"security_context": {"namespace_options": {"pid": 1}}},
        });
        change(&mut config);
        let file = self.file(&format!("container-{name}.json"), &config);
        self.ok(&["create", &pod.0, &file, &pod.1])
    }

    pub fn inspect(&self, id: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["inspect", id])).expect("JSON")
    }

    pub fn wait_for_state(&self, id: &str, state: &str) -> serde_json::Value {
        let mut inspected = serde_json::Value::Null;
        until(&format!("{id} is {state}"), || {
            inspected = self.inspect(id);
            inspected["status"]["state"] == state
        });
        inspected
    }
}

/// Command lines that have `word` in them.
pub fn processes_with(word: &str) -> Vec<String> {
    let lines = testkit::host::processes().expect("processes").into_iter().map(|(_, line)| line);
    lines.filter(|line| line.contains(word)).collect()
}

pub fn on_node(test: &str, run: impl FnOnce(&mut Node) + Send) {
    let Some(needs) = needs(test) else { return };
    let done = on_own_host(test, |host| {
        let before = Lists::take(&[List::Mounts, List::Links, List::Tables]).expect("lists");
        let dir = tempfile::Builder::new().prefix("cri").tempdir_in("/tmp").expect("a directory");
        let mut node = Node::new(needs, dir.path(), &format!("{}/pods", host.cgroup));
        node.start();
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&mut node)));
        if tried.is_err() {
            let log = std::fs::read_to_string(node.dir.join("state/keeper.log")).unwrap_or_default();
            eprintln!("keeper.log: {log}");
        }
        node.down();
        if let Err(panic) = tried {
            std::panic::resume_unwind(panic);
        }
        assert!(!node.dir.join("state").exists(), "the state directory is gone");
        before.expect_same(&[], PATIENCE).expect("nothing is left behind");
        assert_eq!(processes_with(node.dir.as_str()), Vec::<String>::new());
    });
    done.expect("a host of its own");
}

/// Pids whose command line has both words.
pub fn kill_9(pids: &[u32]) {
    for pid in pids {
        let done = Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill runs");
        assert!(done.success(), "{pid}");
    }
}
