//! The whole server on a host of its own, driven by the real crictl.
//!
//! Needs root, crictl in `$CORACLE_PEERS`, Debian's static busybox, and the shim beside this test (`cargo build -p shim`).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use testkit::host::{List, Lists, on_own_host};
use testkit::image::{Image, ImageSpec};
use testkit::registry::Registry;
use testkit::tar::Entry;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: cri_server::Config,
}

/// What a test cannot do without.
struct Needs {
    crictl: PathBuf,
    shim: Utf8PathBuf,
    busybox: Vec<u8>,
}

fn needs(test: &str) -> Option<Needs> {
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
    let shim = test_binary.ancestors().nth(2).expect("target/PROFILE/deps/TEST").join(cri_server::SHIM_NAME);
    if !shim.is_file() {
        return skip(format!("no {}: cargo build -p shim", shim.display()));
    }
    Some(Needs { crictl, shim: Utf8PathBuf::from_path_buf(shim).expect("UTF-8"), busybox })
}

fn busybox_image(busybox: &[u8]) -> Image {
    let applets = ["sh", "cat", "echo", "sleep", "id", "hostname", "ls", "seq", "grep", "mkdir", "touch", "sync", "dd", "true", "ip"];
    let mut entries = vec![
        Entry::dir("bin"),
        Entry::dir("etc"),
        Entry::dir("tmp"),
        Entry::executable("bin/busybox", busybox),
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
        Entry::file("etc/group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
    ];
    entries.extend(applets.iter().map(|applet| Entry::symlink(&format!("bin/{applet}"), "busybox")));
    ImageSpec::new().layer(entries).config("Cmd", vec!["sh"]).build()
}

/// A server in this process, and crictl pointed at it.
struct Node {
    needs: Needs,
    dir: Utf8PathBuf,
    registry: Registry,
    cgroup: String,
    running: Option<(CancellationToken, std::thread::JoinHandle<Result<(), cri_server::Error>>)>,
}

impl Node {
    fn new(needs: Needs, dir: &Path, cgroup: &str) -> Self {
        let registry = Registry::start().expect("a registry");
        registry.add("busybox", "1", &busybox_image(&needs.busybox));
        let dir = Utf8Path::from_path(dir).expect("UTF-8").to_owned();
        std::fs::create_dir_all(dir.join("logs")).expect("made");
        Self { needs, dir, registry, cgroup: cgroup.to_owned(), running: None }
    }

    fn config(&self) -> cri_server::Config {
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

    fn address(&self) -> String {
        self.dir.join("cri.sock").into_string()
    }

    fn image(&self) -> String {
        format!("{}/busybox:1", self.registry.address())
    }

    /// Threads made here are in the namespaces of the test's host.
    fn start(&mut self) {
        let config = self.config();
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
            runtime.block_on(cri_server::run(config, token))
        });
        let end = Instant::now() + PATIENCE;
        while !self.crictl(&["version"]).status.success() {
            assert!(!thread.is_finished(), "the server ended: {:?}", thread.join());
            assert!(Instant::now() < end, "the server does not answer: {:?}", self.crictl(&["version"]));
            std::thread::park_timeout(Duration::from_millis(20));
        }
        self.running = Some((cancel, thread));
    }

    fn stop(&mut self) {
        if let Some((cancel, thread)) = self.running.take() {
            cancel.cancel();
            thread.join().expect("no panic").expect("a clean end");
        }
    }

    fn down(&mut self) {
        self.stop();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(cri_server::down(self.config())).expect("all is removed");
    }

    fn crictl(&self, args: &[&str]) -> Output {
        let endpoint = format!("unix://{}", self.address());
        Command::new(&self.needs.crictl)
            .args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint, "--timeout", "30s"])
            .args(args)
            .output()
            .expect("crictl runs")
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.crictl(args);
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(output.status.success(), "crictl {args:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    fn fails(&self, args: &[&str]) -> String {
        let output = self.crictl(args);
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success(), "crictl {args:?} succeeded: {text}");
        text
    }

    /// With this on its stdin.
    fn piped(&self, args: &[&str], input: &[u8]) -> Output {
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

    fn file(&self, name: &str, value: &serde_json::Value) -> String {
        let path = self.dir.join(name);
        std::fs::write(&path, value.to_string()).expect("written");
        path.into_string()
    }

    fn pod(&self, name: &str) -> (String, String) {
        let config = serde_json::json!({
            "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0},
            "hostname": name,
            "log_directory": self.dir.join("logs"),
            "dns_config": {"servers": ["10.96.0.10"], "searches": ["local"]},
            "labels": {"app": name},
            // As a kubelet sends it; crictl's own default is a PID namespace for the whole pod.
            "linux": {"security_context": {"namespace_options": {"pid": 1}}},
        });
        let file = self.file(&format!("pod-{name}.json"), &config);
        (self.ok(&["runp", &file]), file)
    }

    fn container(&self, pod: &(String, String), name: &str, command: &[&str], change: impl FnOnce(&mut serde_json::Value)) -> String {
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

    fn inspect(&self, id: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["inspect", id])).expect("JSON")
    }

    fn wait_for_state(&self, id: &str, state: &str) -> serde_json::Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let inspected = self.inspect(id);
            if inspected["status"]["state"] == state {
                return inspected;
            }
            assert!(Instant::now() < end, "{id} is not {state}: {inspected}");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}

/// Command lines that have `word` in them.
fn processes_with(word: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("a procfs").flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(word)).collect()
}

fn on_node(test: &str, run: impl FnOnce(&mut Node) + Send) {
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

#[test]
fn the_life_of_a_pod() {
    on_node("the_life_of_a_pod", |node| {
        assert!(node.ok(&["version"]).contains("coracle"));
        assert!(node.ok(&["info"]).contains("NetworkReady"));
        node.ok(&["pull", &node.image()]);
        assert!(node.ok(&["images"]).contains("busybox"));
        let pod = node.pod("a");
        assert!(node.fails(&["runp", &pod.1]).contains("reserved"));
        let inspected: serde_json::Value = serde_json::from_str(&node.ok(&["inspectp", &pod.0])).expect("JSON");
        assert_eq!(inspected["status"]["state"], "SANDBOX_READY");
        assert!(inspected["status"]["network"]["ip"].as_str().expect("an address").starts_with("10.99.0."));

        let id = node.container(&pod, "c", &["sh", "-c", "echo out; echo err >&2; exec sleep 1000"], |_| {});
        assert_eq!(node.inspect(&id)["status"]["state"], "CONTAINER_CREATED");
        node.ok(&["start", &id]);
        assert_eq!(node.inspect(&id)["status"]["state"], "CONTAINER_RUNNING");
        assert!(node.fails(&["start", &id]).contains("running"));
        assert_eq!(node.ok(&["exec", "--sync", &id, "hostname"]), "a");
        assert_eq!(node.ok(&["exec", &id, "cat", "/etc/resolv.conf"]), "search local\nnameserver 10.96.0.10");
        let failed = node.crictl(&["exec", "--sync", &id, "sh", "-c", "echo no >&2; exit 7"]);
        assert!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains('7'), "{failed:?}");
        assert!(node.fails(&["exec", "--sync", "--timeout", "1", &id, "sleep", "100"]).contains("longer than 1 s"));
        let end = Instant::now() + PATIENCE;
        while node.ok(&["logs", &id]) != "out\nerr" && node.ok(&["logs", &id]) != "out" {
            assert!(Instant::now() < end, "{}", node.ok(&["logs", &id]));
            std::thread::park_timeout(Duration::from_millis(20));
        }
        assert!(node.ok(&["stats", "-a"]).contains(&id[..13]));
        assert!(node.ok(&["statsp"]).contains(&pod.0[..13]));
        assert!(node.ok(&["ps"]).contains(&id[..13]));
        assert!(node.ok(&["pods", "--label", "app=a"]).contains(&pod.0[..13]));
        assert!(!node.ok(&["pods", "--label", "app=b"]).contains(&pod.0[..13]));
        node.ok(&["update", "--memory", "67108864", &id]);
        node.ok(&["stop", "-t", "1", &id]);
        let ended = node.wait_for_state(&id, "CONTAINER_EXITED");
        assert_eq!(ended["status"]["exitCode"], 137, "sleep as pid 1 takes no SIGTERM");
        node.ok(&["rm", &id]);
        assert!(node.fails(&["inspect", &id]).contains("not found"));
        node.ok(&["stopp", &pod.0]);
        node.ok(&["stopp", &pod.0]);
        node.ok(&["rmp", &pod.0]);
        node.ok(&["rmi", &node.image()]);
        assert!(!node.ok(&["images"]).contains("busybox"));
    });
}

#[test]
fn exits_and_users() {
    on_node("exits_and_users", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let id = node.container(&pod, "fails", &["sh", "-c", "exit 3"], |_| {});
        node.ok(&["start", &id]);
        let ended = node.wait_for_state(&id, "CONTAINER_EXITED");
        assert_eq!((&ended["status"]["exitCode"], &ended["status"]["reason"]), (&3.into(), &"Error".into()));
        let id = node.container(&pod, "missing", &["/no/such/program"], |_| {});
        node.fails(&["start", &id]);
        let ended = node.wait_for_state(&id, "CONTAINER_EXITED");
        assert_eq!(ended["status"]["reason"], "StartError");
        let id = node.container(&pod, "user", &["sh", "-c", "id; echo mine >/dev/stderr; sleep 1000"], |config| {
            config["linux"]["security_context"]["run_as_username"] = "user".into();
        });
        node.ok(&["start", &id]);
        assert!(node.ok(&["exec", "--sync", &id, "id"]).contains("uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)"));
        let log = node.dir.join("logs/user.log");
        let end = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&log).unwrap_or_default().contains("stderr F mine") {
            assert!(Instant::now() < end, "{:?}", std::fs::read_to_string(&log));
            std::thread::park_timeout(Duration::from_millis(20));
        }
        // With a container that runs.
        node.ok(&["rmp", "-f", &pod.0]);
        assert_eq!(node.ok(&["pods", "-q"]), "");
        assert_eq!(node.ok(&["ps", "-a", "-q"]), "");
    });
}

#[test]
fn a_new_server_takes_over() {
    on_node("a_new_server_takes_over", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let stays = node.container(&pod, "stays", &["sh", "-c", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done"], |_| {});
        let ends = node.container(&pod, "ends", &["sh", "-c", "sleep 1; exit 5"], |_| {});
        node.ok(&["start", &stays]);
        node.ok(&["start", &ends]);
        let before = node.inspect(&stays);
        let pod_before: serde_json::Value = serde_json::from_str(&node.ok(&["inspectp", &pod.0])).expect("JSON");
        node.stop();
        std::thread::park_timeout(Duration::from_millis(1500));
        node.start();
        let after = node.inspect(&stays);
        for field in ["state", "startedAt", "createdAt", "id"] {
            assert_eq!(before["status"][field], after["status"][field], "{field}");
        }
        assert_eq!(before["info"]["pid"], after["info"]["pid"]);
        let pod_after: serde_json::Value = serde_json::from_str(&node.ok(&["inspectp", &pod.0])).expect("JSON");
        assert_eq!(pod_before["status"], pod_after["status"]);
        assert_eq!(node.wait_for_state(&ends, "CONTAINER_EXITED")["status"]["exitCode"], 5);
        assert!(node.ok(&["exec", "--sync", &stays, "hostname"]).contains('a'));
        node.ok(&["stop", "-t", "0", &stays]);
        let log = std::fs::read_to_string(node.dir.join("logs/stays.log")).expect("a log");
        for (number, line) in log.lines().enumerate() {
            assert!(line.ends_with(&format!("stdout F {number}")), "line {number} is {line:?}");
        }
    });
}

#[test]
fn streams() {
    on_node("streams", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let id = node.container(&pod, "c", &["sleep", "1000"], |_| {});
        node.ok(&["start", &id]);
        for transport in ["spdy", "websocket"] {
            let exec = |flags: &[&str], command: &[&str], input: &[u8]| {
                let args = [&["exec", "--transport", transport], flags, &[&id], command].concat();
                let output = node.piped(&args, input);
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                (output.status.code(), text(&output.stdout), text(&output.stderr))
            };
            let big: Vec<u8> = (0..300_000_u32).map(|i| b'a' + u8::try_from(i % 26).expect("small")).collect();
            let (code, stdout, stderr) = exec(&["-i"], &["cat"], &big);
            assert_eq!((code, stdout.len(), stdout.as_bytes() == big), (Some(0), big.len(), true), "{transport}: {stderr}");
            let (code, stdout, stderr) = exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 3"], b"");
            assert!(
                code != Some(0) && stdout == "out\n" && stderr.contains("err\n") && stderr.contains('3'),
                "{transport}: {stdout} {stderr}"
            );
            let line = format!(
                "{} --runtime-endpoint unix://{} exec --transport {transport} -it {id} sh -c 'test -t 1 && echo terminal'",
                node.needs.crictl.display(),
                node.address()
            );
            // script(1) gives crictl the terminal that it insists on.
            let output = Command::new("script").args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().expect("script runs");
            assert!(String::from_utf8_lossy(&output.stdout).contains("terminal\r\n"), "{transport}: {output:?}");
            let (code, _, stderr) = exec(&[], &["/no/such"], b"");
            assert!(code != Some(0), "{transport}: {stderr}");
        }
        let reads = node.container(&pod, "reads", &["sh", "-c", "read line; echo got $line; cat; echo end"], |config| {
            config["stdin"] = true.into();
            config["stdin_once"] = true.into();
        });
        node.ok(&["start", &reads]);
        let attached = node.piped(&["attach", "-i", &reads], b"hello\nmore\n");
        assert!(attached.status.success(), "{attached:?}");
        node.wait_for_state(&reads, "CONTAINER_EXITED");
        assert_eq!(node.ok(&["logs", &reads]), "got hello\nmore\nend");
    });
}
