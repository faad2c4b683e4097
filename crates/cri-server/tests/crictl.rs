//! The whole server on a host of its own, driven by the real crictl.
//!
//! Needs root, crictl in `$CORACLE_PEERS`, Debian's static busybox, and the shim: `$CORACLE_TEST_SHIM`, or in `$CORACLE_BIN`, or beside
//! this test (`cargo build -p shim`).

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use camino::Utf8Path;
use common::{kill_9, on_node};
use testkit::host::pids_with;
use testkit::poll::until;
use testkit::tar::Entry;

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
        until("its output is in the log", || node.ok(&["logs", &id]).starts_with("out"));
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
        until("its own stderr is in the log", || std::fs::read_to_string(&log).unwrap_or_default().contains("stderr F mine"));
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

#[test]
fn a_killed_shim_is_adopted() {
    on_node("a_killed_shim_is_adopted", |node| {
        node.ok(&["pull", &node.image()]);
        let pod = node.pod("a");
        let counts = ["sh", "-c", "i=0; while test $i -lt 30; do echo $i; i=$((i+1)); sleep 0.1; done; exit 6"];
        let id = node.container(&pod, "counts", &counts, |_| {});
        node.ok(&["start", &id]);
        let before = node.inspect(&id);
        let shims = pids_with(&[&pod.0, "-id"]);
        assert_eq!(shims.len(), 1, "one shim for a pod");
        kill_9(&shims);
        until("there is a shim in place of the killed one", || pids_with(&[&pod.0, "-id"]).iter().any(|pid| !shims.contains(pid)));
        until("it execs", || node.crictl(&["exec", "--sync", &id, "true"]).status.success());
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
        let mut all = pids_with(&["keeper", node.dir.as_str()]);
        all.extend(pids_with(&[&pod.0, "-id"]));
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

#[test]
fn a_sandbox_that_was_half_made() {
    on_node("a_sandbox_that_was_half_made", |node| {
        let pod = node.pod("a");
        assert_eq!(pids_with(&[&pod.0, "-id"]).len(), 1);
        node.stop();
        // As if the server had died between the shim's start and its own answer.
        let path = node.dir.join("state/sandboxes").join(&pod.0).join("record.json");
        let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        record["phase"] = "creating".into();
        record["shim"] = serde_json::Value::Null;
        std::fs::write(&path, record.to_string()).expect("written");
        node.start();
        assert_eq!(node.ok(&["pods", "-q"]), "");
        assert_eq!(pids_with(&[&pod.0, "-id"]), Vec::<u32>::new());
        assert!(!node.dir.join("state/sandboxes").join(&pod.0).exists());
        // Its name is free again.
        node.ok(&["runp", &pod.1]);
    });
}

/// Whether an ELF executable names no interpreter (PT_INTERP).
fn is_static(path: &Utf8Path) -> bool {
    let bytes = std::fs::read(path).expect("read");
    let number = |at: usize, length: usize| bytes[at..at + length].iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte));
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).all(|index| number(table + index * size, 4) != 3)
}

#[test]
fn one_pid_namespace_for_the_pod() {
    on_node("one_pid_namespace_for_the_pod", |node| {
        if !is_static(&node.needs.shim) {
            eprintln!("SKIPPED: one_pid_namespace_for_the_pod: {} is not static, and the pause process is made of it", node.needs.shim);
            return;
        }
        node.ok(&["pull", &node.image()]);
        let shared = |config: &mut serde_json::Value| config["linux"]["security_context"]["namespace_options"]["pid"] = 0.into();
        let pod = node.pod_with("a", shared);
        let first = node.container(&pod, "first", &["sleep", "1234"], shared);
        let second = node.container(&pod, "second", &["sleep", "1000"], shared);
        node.ok(&["start", &first]);
        node.ok(&["start", &second]);
        assert!(node.ok(&["exec", "--sync", &second, "ps"]).contains("sleep 1234"));
        node.ok(&["stop", "-t", "0", &first]);
        node.ok(&["exec", "--sync", &second, "true"]);
    });
}

#[test]
fn wrong_input_is_refused_and_leaves_nothing() {
    on_node("wrong_input_is_refused_and_leaves_nothing", |node| {
        node.ok(&["pull", &node.image()]);
        let error = node.fails(&["pull", &node.image().replace("busybox", "nothing")]);
        assert!(error.contains("nothing"), "{error}");
        let pod = node.pod("a");
        let refused = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let mut config = serde_json::json!({
                "metadata": {"name": name},
                "image": {"image": node.image()},
                "command": ["sleep", "1000"],
                "linux": {"security_context": {"namespace_options": {"pid": 1}}},
            });
            change(&mut config);
            let file = node.file("container-bad.json", &config);
            node.fails(&["create", &pod.0, &file, &pod.1])
        };
        let profile = node.dir.join("broken.json");
        std::fs::write(&profile, "{\"defaultAction\": \"SCMP_ACT_NONSENSE\"}").expect("written");
        let seccomp = serde_json::json!({"profile_type": 2, "localhost_ref": profile});
        let error = refused("seccomp", &|config| config["linux"]["security_context"]["seccomp"] = seccomp.clone());
        assert!(error.contains("broken.json") && error.contains("SCMP_ACT_NONSENSE"), "{error}");
        let error = refused("image", &|config| config["image"]["image"] = "nowhere/none:1".into());
        assert!(error.contains("NotFound") && error.contains("nowhere/none:1"), "{error}");
        let error = refused("user", &|config| config["linux"]["security_context"]["run_as_username"] = "nobody-here".into());
        assert!(error.contains("nobody-here"), "{error}");
        let error = refused("capability", &|config| {
            config["linux"]["security_context"]["capabilities"] = serde_json::json!({"add_capabilities": ["CAP_NONSENSE"]});
        });
        assert!(error.contains("CAP_NONSENSE"), "{error}");
        // A limit that the kernel refuses is known only when the cgroup is made.
        let id = node.container(&pod, "memory", &["sleep", "1000"], |config| {
            config["linux"]["resources"] = serde_json::json!({"memory_limit_in_bytes": 1});
        });
        let error = node.fails(&["start", &id]);
        assert!(error.contains("failed to"), "{error}");
        let status = node.wait_for_state(&id, "CONTAINER_EXITED")["status"].clone();
        assert_eq!(status["reason"], "StartError");
        let message = status["message"].as_str().unwrap_or_default();
        assert_eq!(message.matches("OCI runtime create failed").count(), 1, "{message}");
        node.ok(&["rm", &id]);
        let left = node.dir.join("state/containers").read_dir_utf8().expect("listed").count();
        assert_eq!(left, 0);
    });
}

#[test]
fn volumes_of_the_image() {
    on_node("volumes_of_the_image", |node| {
        let volumes = serde_json::json!({"/data": {}, "/cache": {}, "/given": {}});
        let image = common::busybox_spec(&node.needs.busybox)
            .layer([Entry::dir("data"), Entry::file("data/of-the-image", "hello\n").owner(1000, 1000).mode(0o600)])
            .config("Volumes", volumes);
        node.registry.add("volumes", "1", &image.build());
        let reference = node.image().replace("busybox:1", "volumes:1");
        node.ok(&["pull", &reference]);
        std::fs::create_dir(node.dir.join("given")).expect("made");
        let pod = node.pod("a");
        let made = |name: &str| {
            node.container(&pod, name, &["sleep", "1000"], |config| {
                config["image"]["image"] = reference.clone().into();
                config["mounts"] = serde_json::json!([{"container_path": "/given", "host_path": node.dir.join("given")}]);
                config["linux"]["security_context"]["readonly_rootfs"] = true.into();
            })
        };
        let ids = [made("one"), made("two")];
        for id in &ids {
            node.ok(&["start", id]);
            let exec = |script: &str| node.ok(&["exec", "--sync", id, "sh", "-c", script]);
            assert_eq!(exec("cat /data/of-the-image; ls /data /cache /given"), "hello\n/cache:\n\n/data:\nof-the-image\n\n/given:");
            // The root is read-only, the volumes are not, and each container has its own.
            exec("echo x > /data/new; echo y > /cache/new");
            exec("! echo x > /new");
        }
        let volumes = node.dir.join("root/snapshots").join(&ids[0]).join("volumes");
        assert_eq!(volumes.read_dir_utf8().expect("listed").count(), 2, "the given one is none");
        for id in &ids {
            node.ok(&["rm", "-f", id]);
        }
        assert!(!volumes.exists());
    });
}
