//! The whole server on a host of its own, driven by the real crictl.
//!
//! Needs root, crictl in `$CORACLE_PEERS`, Debian's static busybox, and the shim: `$CORACLE_TEST_SHIM`, or in `$CORACLE_BIN`, or beside
//! this test (`cargo build -p shim`).

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
    let beside = test_binary.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned();
    let shim = std::env::var_os("CORACLE_TEST_SHIM")
        .map_or_else(|| std::env::var_os("CORACLE_BIN").map_or(beside, PathBuf::from).join(cri_server::SHIM_NAME), PathBuf::from);
    if !shim.is_file() {
        return skip(format!("no {}: cargo build -p shim", shim.display()));
    }
    Some(Needs { crictl, shim: Utf8PathBuf::from_path_buf(shim).expect("UTF-8"), busybox })
}

fn busybox_image(busybox: &[u8]) -> Image {
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
        self.pod_with(name, |_| {})
    }

    fn pod_with(&self, name: &str, change: impl FnOnce(&mut serde_json::Value)) -> (String, String) {
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

/// Pids whose command line has both words.
fn pids_with(words: [&str; 2]) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("a procfs").flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            words.iter().all(|word| line.contains(word))
        })
        .collect()
}

fn kill_9(pids: &[u32]) {
    for pid in pids {
        let done = Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill runs");
        assert!(done.success(), "{pid}");
    }
}

#[test]
fn a_killed_shim_is_adopted() {
    on_node("a_killed_shim_is_adopted", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let counts = ["sh", "-c", "i=0; while test $i -lt 30; do echo $i; i=$((i+1)); sleep 0.1; done; exit 6"];
        let id = node.container(&pod, "counts", &counts, |_| {});
        node.ok(&["start", &id]);
        let before = node.inspect(&id);
        let shims = pids_with([&pod.0, "-id"]);
        assert_eq!(shims.len(), 1, "one shim for a pod");
        kill_9(&shims);
        let end = Instant::now() + PATIENCE;
        while pids_with([&pod.0, "-id"]).iter().all(|pid| shims.contains(pid)) {
            assert!(Instant::now() < end, "no shim in place of the killed one");
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let end = Instant::now() + PATIENCE;
        while !node.crictl(&["exec", "--sync", &id, "true"]).status.success() {
            assert!(Instant::now() < end, "{:?}", node.crictl(&["exec", "--sync", &id, "true"]));
            std::thread::park_timeout(Duration::from_millis(50));
        }
        assert_eq!(before["info"]["pid"], node.inspect(&id)["info"]["pid"], "it is the same process");
        let ended = node.wait_for_state(&id, "CONTAINER_EXITED");
        assert_eq!(ended["status"]["exitCode"], 6);
        let log = std::fs::read_to_string(node.dir.join("logs/counts.log")).expect("a log");
        let lines: Vec<&str> = log.lines().filter_map(|line| line.rsplit(' ').next()).collect();
        assert_eq!(lines, (0..30).map(|number| number.to_string()).collect::<Vec<_>>());
    });
}

#[test]
fn what_was_killed_while_nobody_looked() {
    on_node("what_was_killed_while_nobody_looked", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let id = node.container(&pod, "c", &["sleep", "1000"], |_| {});
        let made = node.container(&pod, "made", &["sleep", "1000"], |_| {});
        node.ok(&["start", &id]);
        let pid = node.inspect(&id)["info"]["pid"].as_u64().expect("a pid");
        node.stop();
        // All at once, as a reboot does it; the records are of this boot all the same.
        let mut all = pids_with(["keeper", node.dir.as_str()]);
        all.extend(pids_with([&pod.0, "-id"]));
        all.push(u32::try_from(pid).expect("a pid"));
        kill_9(&all);
        for dir in ["sandboxes", "containers"] {
            for entry in node.dir.join("state").join(dir).read_dir_utf8().expect("listed").flatten() {
                let path = entry.path().join("record.json");
                let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
                record["boot_id"] = "another".into();
                std::fs::write(&path, record.to_string()).expect("written");
            }
        }
        node.start();
        let ended = node.inspect(&id);
        assert_eq!((&ended["status"]["state"], &ended["status"]["exitCode"]), (&"CONTAINER_EXITED".into(), &255.into()));
        assert_eq!(node.inspect(&made)["status"]["state"], "CONTAINER_CREATED");
        let inspected: serde_json::Value = serde_json::from_str(&node.ok(&["inspectp", &pod.0])).expect("JSON");
        assert_eq!(inspected["status"]["state"], "SANDBOX_NOTREADY");
        assert!(node.fails(&["start", &made]).contains("not ready"));
        node.ok(&["rm", &id]);
        node.ok(&["rmp", &pod.0]);
        assert_eq!(node.ok(&["ps", "-a", "-q"]), "");
    });
}

#[test]
fn a_started_container_costs_at_most_three_fsyncs() {
    let test = "a_started_container_costs_at_most_three_fsyncs";
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("SKIPPED: {test}: no strace");
        return;
    }
    on_node(test, |node| {
        node.ok(&["pull", &node.image()]);
        node.stop();
        // From its first thread on: what is attached to later is not followed.
        let trace = node.dir.join("trace");
        let calls = "trace=fsync,fdatasync,sync,syncfs,sync_file_range,msync";
        let pid = std::process::id().to_string();
        let mut strace =
            Command::new("strace").args(["-f", "-q", "-e", calls, "-o", trace.as_str(), "-p", &pid]).spawn().expect("strace runs");
        let end = Instant::now() + PATIENCE;
        while !std::fs::read_to_string("/proc/self/status").expect("a procfs").contains(&format!("TracerPid:\t{}", strace.id())) {
            assert!(Instant::now() < end, "strace does not attach");
            std::thread::park_timeout(Duration::from_millis(10));
        }
        let counted = || std::fs::read_to_string(&trace).unwrap_or_default().lines().filter(|line| line.contains("sync")).count();
        // One that is known, to see that the trace sees.
        std::fs::File::open(&node.dir).and_then(|dir| dir.sync_all()).expect("synced");
        node.start();
        let before = counted();
        assert!(before > 0, "the trace sees nothing");
        let pod = node.pod("a");
        let id = node.container(&pod, "c", &["sleep", "1000"], |_| {});
        node.ok(&["start", &id]);
        let after = counted();
        Command::new("kill").arg(strace.id().to_string()).status().expect("kill runs");
        strace.wait().expect("it ends");
        eprintln!("fsyncs from RunPodSandbox to a started container: {}", after - before);
        assert!(after - before <= 3, "{}", std::fs::read_to_string(&trace).unwrap_or_default());
    });
}

#[test]
fn namespaces_of_the_pod_and_of_the_host() {
    on_node("namespaces_of_the_pod_and_of_the_host", |node| {
        node.ok(&["pull", &node.image()]);
        let link = |id: &str, name: &str| node.ok(&["exec", "--sync", id, "readlink", &format!("/proc/self/ns/{name}")]);
        let host = |name: &str| std::fs::read_link(format!("/proc/thread-self/ns/{name}")).expect("a link").display().to_string();
        let on_host = node.pod_with("host", |config| {
            config["hostname"] = "".into();
            config["linux"]["security_context"]["namespace_options"] = serde_json::json!({"network": 2, "pid": 2, "ipc": 2});
        });
        let id = node.container(&on_host, "host", &["sleep", "1000"], |config| {
            config["linux"]["security_context"]["namespace_options"] = serde_json::json!({"network": 2, "pid": 2, "ipc": 2});
        });
        node.ok(&["start", &id]);
        for name in ["net", "uts", "ipc", "pid"] {
            assert_eq!(link(&id, name), host(name), "{name}");
        }
        let pod = node.pod("own");
        let first = node.container(&pod, "first", &["sleep", "1000"], |_| {});
        let second = node.container(&pod, "second", &["sleep", "1000"], |_| {});
        node.ok(&["start", &first]);
        node.ok(&["start", &second]);
        for name in ["net", "uts", "ipc"] {
            assert_eq!(link(&first, name), link(&second, name), "{name}");
            assert_ne!(link(&first, name), host(name), "{name}");
        }
        assert_ne!(link(&first, "pid"), link(&second, "pid"));
        node.ok(&["exec", "--sync", &first, "touch", "/dev/shm/shared"]);
        assert_eq!(node.ok(&["exec", "--sync", &second, "ls", "/dev/shm"]), "shared");
    });
}
