//! A container's life by runc's verbs, each state and each error that callers tell apart by its words.

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use support::{Bundle, available, cgroup_v2, eventually, read};

fn exec_process(bundle: &Bundle, args: Value) -> String {
    let process = json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
    fs::write(bundle.path("process.json"), process.to_string()).expect("process.json");
    bundle.path("process.json").display().to_string()
}

#[test]
fn from_create_to_delete() {
    if !available("from_create_to_delete") {
        return;
    }
    let bundle = Bundle::new("life");
    bundle.run(&["create", "--bundle", ".", "--pid-file", "init.pid", "c"]).ok();
    let pid = read(&bundle.path("init.pid"));
    let pid: i32 = pid.parse().unwrap_or_else(|_| panic!("the pid file has digits only, not {pid:?}"));
    assert_eq!(bundle.status("c"), "created");
    bundle.run(&["create", "--bundle", ".", "c"]).failed("container with given ID already exists");
    bundle.run(&["start", "c"]).ok();
    assert_eq!(bundle.status("c"), "running");
    bundle.run(&["start", "c"]).failed("cannot start an already running container");
    bundle.run(&["delete", "c"]).failed("cannot delete container c that is not stopped: running");
    assert_eq!(bundle.run(&["ps", "--format", "json", "c"]).ok(), format!("[{pid}]"));
    let listed: Value = serde_json::from_str(&bundle.run(&["list", "--format", "json"]).ok()).expect("list is JSON");
    assert_eq!((listed[0]["id"].as_str(), listed[0]["pid"].as_i64()), (Some("c"), Some(pid.into())));
    bundle.run(&["pause", "c"]).ok();
    assert_eq!(bundle.status("c"), "paused");
    bundle.run(&["exec", "c", "true"]).failed("cannot exec in a paused container");
    bundle.run(&["resume", "c"]).ok();
    assert_eq!(bundle.status("c"), "running");
    bundle.run(&["kill", "c", "SIGKILL"]).ok();
    bundle.await_status("c", "stopped");
    bundle.run(&["kill", "c", "9"]).failed("container not running");
    bundle.run(&["kill", "--all", "c", "9"]).ok();
    assert_eq!(bundle.run(&["ps", "--format", "json", "c"]).ok(), "null");
    bundle.run(&["exec", "c", "true"]).failed("cannot exec in a stopped container");
    bundle.run(&["start", "c"]).failed("cannot start a container that has stopped");
    bundle.run(&["delete", "c"]).ok();
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.run(&["delete", "c"]).failed("container does not exist");
    bundle.run(&["kill", "c", "9"]).failed("container does not exist");
    bundle.run(&["state", "c"]).failed("container does not exist");
    bundle.assert_nothing_left();
}

#[test]
fn every_hierarchy_has_the_group() {
    if !available("every_hierarchy_has_the_group") {
        return;
    }
    let bundle = Bundle::new("hierarchies");
    let path = bundle.config["linux"]["cgroupsPath"].as_str().expect("a path").to_owned();
    // On a hybrid host also the one of v2, as runc has it. A process of `exec` is where the container's is.
    let in_all = |pid: &str| {
        let text = read(Path::new(&format!("/proc/{pid}/cgroup")));
        let elsewhere: Vec<&str> = text.lines().filter(|line| line.split(':').nth(2) != Some(path.as_str())).collect();
        assert!(!text.is_empty() && elsewhere.is_empty(), "{path}: {elsewhere:?}");
    };
    bundle.run(&["run", "--detach", "--bundle", ".", "--pid-file", "init.pid", "c"]).ok();
    in_all(&read(&bundle.path("init.pid")));
    let sleeper = exec_process(&bundle, json!(["sleep", "1000"]));
    bundle.run(&["exec", "--process", &sleeper, "--detach", "--pid-file", "exec.pid", "c"]).ok();
    in_all(&read(&bundle.path("exec.pid")));
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn run_is_the_subreaper_unless_told_otherwise() {
    if !available("run_is_the_subreaper_unless_told_otherwise") {
        return;
    }
    // Without a PID namespace of its own, what the container's process leaves behind goes to the nearest subreaper.
    let mut bundle = Bundle::new("subreaper");
    let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.retain(|namespace| namespace["type"] != "pid");
    let orphan = "parent() { while read key value; do [ \"$key\" = PPid: ] && echo $value; done < /proc/$$/status; }\n\
                  while [ \"$(parent)\" = \"$1\" ]; do sleep 0.05; done\n\
                  parent > /parent\n";
    fs::write(bundle.path("rootfs/orphan"), orphan).expect("a script");
    bundle.shell("sh -c 'sh /orphan $$ & exit 0'; until [ -s /parent ]; do sleep 0.05; done; cat /parent; rm /parent");
    bundle.write();
    let run = |flags: &[&str]| {
        let words = [&["run"], flags, &["--bundle", ".", "c"]].concat();
        let child = bundle.command(&words).stdout(Stdio::piped()).spawn().expect("the runtime runs");
        let pid = child.id();
        let output = child.wait_with_output().expect("ended");
        assert!(output.status.success(), "{output:?}");
        (pid, String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().expect("a pid"))
    };
    let (pid, parent) = run(&[]);
    assert_eq!(parent, pid);
    let (pid, parent) = run(&["--no-subreaper"]);
    assert_ne!(parent, pid);
    bundle.assert_nothing_left();
}

#[test]
fn exec_adds_processes() {
    if !available("exec_adds_processes") {
        return;
    }
    let bundle = Bundle::new("exec");
    bundle.run(&["run", "--detach", "--bundle", ".", "c"]).ok();
    let process = exec_process(&bundle, json!(["sh", "-c", "echo $$; readlink /proc/self/ns/pid; cat /proc/self/cgroup; exit 3"]));
    let answer = bundle.run(&["exec", "--process", &process, "c"]);
    assert_eq!(answer.code, 3, "{answer:?}");
    let lines: Vec<&str> = answer.out.lines().collect();
    let pids: Vec<i32> = serde_json::from_str(&bundle.run(&["ps", "--format", "json", "c"]).ok()).expect("pids");
    let namespace = fs::read_link(format!("/proc/{}/ns/pid", pids[0])).expect("ns");
    assert_eq!(lines[1], namespace.display().to_string(), "in the same PID namespace");
    assert!(lines.iter().any(|line| line.ends_with("memory:/") || line.ends_with("0::/")), "in the same group: {lines:?}");
    let sleeper = exec_process(&bundle, json!(["sleep", "1000"]));
    bundle.run(&["exec", "--process", &sleeper, "--detach", "--pid-file", "exec.pid", "c"]).ok();
    let pid = read(&bundle.path("exec.pid"));
    // As the host sees them, in every hierarchy, also in a v2 one beside v1.
    let groups = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("groups");
    assert_eq!(groups(pid.trim()), groups(&pids[0].to_string()));
    let unified = |text: &str| text.lines().find(|line| line.starts_with("0::")).map(str::to_owned);
    if let Some(own) = unified(&groups("self")) {
        assert_ne!(unified(&groups(pid.trim())), Some(own), "in the container's group");
    }
    let pids: Vec<i32> = serde_json::from_str(&bundle.run(&["ps", "--format", "json", "c"]).ok()).expect("pids");
    assert!(pids.len() == 2 && pids.contains(&pid.parse().expect("digits")), "{pids:?} {pid}");
    let missing = exec_process(&bundle, json!(["nope"]));
    bundle
        .run(&["exec", "--process", &missing, "c"])
        .failed("exec failed: unable to start container process: exec: \"nope\": executable file not found in $PATH");
    // Options after the container's name are the command's.
    assert_eq!(bundle.run(&["exec", "--env", "A=b", "--user", "1000:1000", "c", "sh", "-c", "echo $A; id -u"]).ok(), "b\n1000\n");
    bundle.run(&["delete", "--force", "c"]).ok();
    eventually("the other process is gone", || !Path::new(&format!("/proc/{pid}/cwd")).exists());
    bundle.assert_nothing_left();
}

#[test]
fn a_failed_create_leaves_nothing() {
    if !available("a_failed_create_leaves_nothing") {
        return;
    }
    let mut bundle = Bundle::new("failed");
    let before = bundle.config.clone();
    let mut check = |change: &dyn Fn(&mut Value), words: &str| {
        bundle.config = before.clone();
        change(&mut bundle.config);
        let answer = bundle.run(&["create", "--bundle", ".", "--pid-file", "init.pid", "c"]);
        assert_eq!((answer.code, answer.out.as_str()), (1, ""), "{answer:?}");
        answer.failed(words);
        assert!(!bundle.path("init.pid").exists());
        bundle.assert_nothing_left();
    };
    check(
        &|c| c["process"]["args"] = json!(["/x"]),
        "coracle-oci create failed: unable to start container process: error during container init: exec: \"/x\": stat /x: no such file or directory",
    );
    check(&|c| c["process"]["args"] = json!(["x"]), "exec: \"x\": executable file not found in $PATH");
    check(&|c| c["process"]["args"] = json!(["/etc/passwd"]), "exec: \"/etc/passwd\": permission denied");
    check(&|c| c["process"]["args"] = json!(["/etc"]), "exec: \"/etc\": is a directory");
    check(&|c| c["process"]["args"] = json!([]), "args must not be empty");
    check(&|c| c["process"]["cwd"] = json!("/etc/passwd"), "chdir to cwd");
    check(&|c| c["root"]["path"] = json!("nowhere"), "no such file or directory");
    check(&|c| c["linux"]["resources"]["memory"] = json!({ "limit": -5 }), "lower than -1");
    check(&|c| c["linux"]["resources"]["cpu"] = json!({ "cpus": "900-901" }), "cpuset.cpus");
    // Each version of cgroups has what the other lacks; hugetlb is on neither of a hybrid host's.
    if cgroup_v2() {
        check(&|c| c["linux"]["resources"]["memory"] = json!({ "swappiness": 10 }), "swappiness");
        check(&|c| c["linux"]["resources"]["unified"] = json!({ "no.such": "1" }), "no.such");
        check(&|c| c["linux"]["resources"]["unified"] = json!({ "../pids.max": "1" }), "not the name of a file");
    } else {
        check(&|c| c["linux"]["resources"]["unified"] = json!({ "memory.high": "1" }), "memory.high");
        check(&|c| c["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": "2MB", "limit": 2_097_152 }]), "hugetlb");
    }
    check(&|c| c["linux"]["sysctl"] = json!({ "kernel.panic": "1" }), "not in a separate kernel namespace");
    check(&|c| c["linux"]["sysctl"] = json!({ "net.no.such": "1" }), "net.no.such");
    check(&|c| c["linux"]["intelRdt"] = json!({}), "intelRdt is not implemented");
    check(
        &|c| c["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 9_999_999, "hard": 9_999_999 }]),
        "error setting rlimit type 7: operation not permitted",
    );
    check(&|c| c["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] }), "error running createRuntime hook #0: exit status 1");
    check(
        &|c| {
            c["mounts"]
                .as_array_mut()
                .expect("mounts")
                .push(json!({ "destination": "/m", "type": "bind", "source": "/nowhere", "options": ["bind"] }))
        },
        "error mounting \"/nowhere\" to rootfs at \"/m\": stat /nowhere: no such file or directory",
    );
    fs::write(bundle.path("config.json"), "{").expect("written");
}

#[test]
fn a_command_that_dies_leaves_what_delete_can_remove() {
    if !available("a_command_that_dies_leaves_what_delete_can_remove") {
        return;
    }
    let mut bundle = Bundle::new("crash");
    let ready = bundle.path("ready");
    let script = format!("#!/bin/sh\ntouch {}\nexec sleep 30\n", ready.display());
    fs::write(bundle.path("hook"), script).expect("hook");
    fs::set_permissions(bundle.path("hook"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    bundle.config["hooks"] = json!({ "createRuntime": [{ "path": bundle.path("hook"), "timeout": 25 }] });
    bundle.write();
    let mut create = bundle.command(&["create", "--bundle", ".", "c"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("create");
    eventually("the hook runs", || ready.exists());
    assert_eq!(bundle.status("c"), "creating");
    create.kill().expect("killed");
    create.wait().expect("reaped");
    eventually("the container's process ends with its runtime", || bundle.status("c") == "stopped");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
    // And the id can be used again.
    bundle.config["hooks"] = json!({});
    bundle.run(&["create", "--bundle", ".", "c"]).ok();
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn hooks_run_in_their_places() {
    if !available("hooks_run_in_their_places") {
        return;
    }
    let mut bundle = Bundle::new("hooks");
    // In the container a hook is a file of the container; outside it is one of the host: the same path, the same bytes.
    let log = bundle.path("hooks.log");
    let script = format!("#!/bin/sh\necho \"$1 $(cat)\" >> {}\n", log.display());
    let inside = bundle.dir.join("rootfs").join(bundle.dir.strip_prefix("/").expect("absolute"));
    fs::create_dir_all(&inside).expect("a directory");
    for dir in [&bundle.dir, &inside] {
        fs::write(dir.join("hook"), &script).expect("hook");
        fs::set_permissions(dir.join("hook"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    }
    let hook = |point: &str| json!([{ "path": bundle.path("hook"), "args": ["hook", point], "env": ["PATH=/bin:/usr/bin"] }]);
    let points = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    bundle.config["hooks"] = points.iter().map(|point| ((*point).to_owned(), hook(point))).collect::<serde_json::Map<_, _>>().into();
    bundle.run(&["create", "--bundle", ".", "c"]).ok();
    bundle.run(&["start", "c"]).ok();
    bundle.run(&["delete", "--force", "c"]).ok();
    let outside = read(&log);
    let found: Vec<(&str, Value)> = outside
        .lines()
        .map(|line| line.split_once(' ').expect("a point and a state"))
        .map(|(point, state)| (point, serde_json::from_str(state).expect("the state is JSON")))
        .collect();
    let statuses: Vec<(&str, &str)> = found.iter().map(|(point, state)| (*point, state["status"].as_str().expect("a status"))).collect();
    assert_eq!(
        statuses,
        [
            ("prestart", "creating"),
            ("createRuntime", "creating"),
            ("createContainer", "creating"),
            ("poststart", "running"),
            ("poststop", "stopped")
        ]
    );
    assert!(read(&inside.join("hooks.log")).starts_with("startContainer {"), "startContainer runs inside");
    bundle.assert_nothing_left();
}

#[test]
fn update_changes_limits() {
    if !available("update_changes_limits") {
        return;
    }
    let mut bundle = Bundle::new("update");
    bundle.config["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864, "swap": 67_108_864 });
    bundle.config["linux"]["resources"]["pids"] = json!({ "limit": 50 });
    bundle.config["linux"]["resources"]["cpu"] = json!({ "shares": 512, "quota": 50_000, "period": 100_000 });
    bundle.run(&["run", "--detach", "--bundle", ".", "c"]).ok();
    let host = linux::cgroup::Host::detect().expect("cgroups");
    let group = linux::cgroup::Cgroup::new(&host, Path::new(&bundle.cgroup("c")));
    assert_eq!(group.stats().expect("stats").memory.limit_bytes, 67_108_864);
    assert_eq!(group.stats().expect("stats").pids.limit, 50);
    let resources = br#"{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":134217728,"swap":134217728},"cpu":{}}"#;
    let mut update = bundle.command(&["update", "--resources=-", "c"]).stdin(Stdio::piped()).spawn().expect("update");
    update.stdin.take().expect("a pipe").write_all(resources).expect("written");
    assert!(update.wait().expect("ended").success());
    assert_eq!(group.stats().expect("stats").memory.limit_bytes, 134_217_728);
    bundle.run(&["update", "--memory", "32M", "--memory-swap", "32M", "--pids-limit", "-1", "c"]).ok();
    let stats = group.stats().expect("stats");
    assert_eq!((stats.memory.limit_bytes, stats.pids.limit), (33_554_432, 0));
    let stats: Value = serde_json::from_str(&bundle.run(&["events", "--stats", "c"]).ok()).expect("stats are JSON");
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 33_554_432);
    bundle.run(&["update", "--resources", "/nowhere", "c"]).failed("no such file");
    bundle.run(&["delete", "-f", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_group_without_a_path_stands_beside_the_callers() {
    const NAME: &str = "a_group_without_a_path_stands_beside_the_callers";
    if !available(NAME) {
        return;
    }
    if !cgroup_v2() {
        eprintln!("SKIPPED: {NAME}: only on cgroup v2 a group with processes hands no controllers down");
        return;
    }
    let mut bundle = Bundle::new("default");
    bundle.config["linux"]["cgroupsPath"] = json!("");
    bundle.run(&["run", "--detach", "--bundle", ".", "--pid-file", "init.pid", &bundle.name]).ok();
    let pid = read(&bundle.path("init.pid")).parse().expect("digits");
    let [own, found] = [0, pid].map(|pid| linux::cgroup::path_of(pid, None).expect("a group"));
    assert_eq!(Some(found), own.parent().map(|above| above.join(&bundle.name)));
    bundle.run(&["update", "--pids-limit", "7", &bundle.name]).ok();
    bundle.run(&["delete", "--force", &bundle.name]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn exec_follows_into_a_group_below() {
    const NAME: &str = "exec_follows_into_a_group_below";
    if !available(NAME) {
        return;
    }
    if !cgroup_v2() {
        eprintln!("SKIPPED: {NAME}: only on cgroup v2 a group that hands controllers down is closed to processes");
        return;
    }
    let mut bundle = Bundle::new("nested");
    let mounts = bundle.config["mounts"].as_array_mut().expect("mounts");
    let group = mounts.iter_mut().find(|mount| mount["type"] == "cgroup").expect("it is mounted");
    group["options"] = json!(["nosuid", "noexec", "nodev"]);
    bundle.shell(
        "cd /sys/fs/cgroup && mkdir below && echo 1 > below/cgroup.procs && echo +pids +memory > cgroup.subtree_control && echo ready; exec sleep 1000",
    );
    bundle.run(&["create", "--bundle", ".", "c"]).ok();
    let out = bundle.path("stdout.kept");
    fs::rename(bundle.path("stdout"), &out).expect("kept");
    bundle.run(&["start", "c"]).ok();
    eventually("controllers are handed down", || read(&out) == "ready\n");
    let process = exec_process(&bundle, json!(["cat", "/proc/self/cgroup"]));
    assert_eq!(bundle.run(&["exec", "--process", &process, "c"]).ok(), "0::/below\n");
    let pids: Vec<i32> = serde_json::from_str(&bundle.run(&["ps", "--format", "json", "c"]).ok()).expect("pids");
    assert_eq!(pids.len(), 1, "also what is below is the container's");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn ten_side_by_side() {
    if !available("ten_side_by_side") {
        return;
    }
    let bundle = Bundle::new("ten");
    bundle.write();
    let ids: Vec<String> = (0..10).map(|n| format!("c{n}")).collect();
    let configs: Vec<_> = ids
        .iter()
        .map(|id| {
            let mut config = bundle.config.clone();
            config["linux"]["cgroupsPath"] = json!(bundle.cgroup(id));
            config["root"]["path"] = json!(bundle.path("rootfs"));
            config["process"]["args"] = json!(["sh", "-c", format!("echo {id}")]);
            let dir = bundle.path(id);
            fs::create_dir_all(&dir).expect("a bundle");
            fs::write(dir.join("config.json"), config.to_string()).expect("config.json");
            dir
        })
        .collect();
    let running: Vec<_> = ids
        .iter()
        .zip(&configs)
        .map(|(id, dir)| bundle.command(&["run", "--bundle"]).arg(dir).arg(id).stdout(Stdio::piped()).spawn().expect("run"))
        .collect();
    for (child, id) in running.into_iter().zip(&ids) {
        let output = child.wait_with_output().expect("ended");
        assert_eq!((output.status.code(), support::text(&output)), (Some(0), format!("{id}\n")));
    }
    bundle.assert_nothing_left();
}
