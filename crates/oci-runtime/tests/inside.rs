//! What a process finds inside: who it is, what it may, what is mounted, and what it cannot reach.

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use support::{Bundle, available, eventually, read};

const ALL_CAPS: [&str; 6] = ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN"];

fn privileged(bundle: &mut Bundle) {
    bundle.config["process"]["noNewPrivileges"] = json!(false);
    bundle.config["process"]["capabilities"] = json!({ "bounding": ALL_CAPS, "effective": ALL_CAPS, "permitted": ALL_CAPS });
}

fn add_mount(bundle: &mut Bundle, mount: Value) {
    bundle.config["mounts"].as_array_mut().expect("mounts").push(mount);
}

#[test]
fn who_it_is() {
    if !available("who_it_is") {
        return;
    }
    let mut bundle = Bundle::new("who");
    let caps = json!(["CAP_NET_BIND_SERVICE", "CAP_SYS_RESOURCE"]);
    bundle.config["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o077 });
    bundle.config["process"]["capabilities"] =
        json!({ "bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps });
    bundle.config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    bundle.config["process"]["cwd"] = json!("/etc");
    bundle.config["process"]["oomScoreAdj"] = json!(500);
    bundle.config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel.shmmni": "1234" });
    bundle.config["hostname"] = json!("inside");
    bundle.shell("id -u; id -g; id -G; umask; pwd; echo $HOME; hostname; ulimit -n; cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni; grep -E 'Cap|NoNew' /proc/self/status; ls /proc/self/fd | wc -l; echo err >/dev/stderr");
    let answer = bundle.run(&["run", "--bundle", ".", "c"]);
    assert_eq!((answer.code, answer.err.as_str()), (0, "err\n"), "{answer:?}");
    let caps_line = |name: &str, value: u64| format!("{name}:\t{value:016x}");
    // CAP_SYS_RESOURCE is given only where the daemon has it.
    let own = linux::caps::permitted().expect("capabilities");
    let given = (1 << 10) | (own.0 & (1 << 24));
    let mut expected: Vec<String> =
        ["1000", "1001", "1001 5 6", "0077", "/etc", "/home/user", "inside", "100", "500", "1", "1234"].map(str::to_owned).into();
    expected.extend(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| caps_line(name, given)));
    expected.extend(["NoNewPrivs:\t1".to_owned(), "4".to_owned()]);
    assert_eq!(answer.out.lines().collect::<Vec<_>>(), expected);
    bundle.assert_nothing_left();
}

#[test]
fn descriptors_of_the_caller_stay_outside() {
    if !available("descriptors_of_the_caller_stay_outside") {
        return;
    }
    let mut bundle = Bundle::new("fds");
    bundle.shell("ls /proc/self/fd").write();
    // Descriptor 9 of the caller is on the host's root.
    let line = |extra: &str| {
        format!(
            "exec 9</ {}/bin/true; exec \"$0\" --root {} run {extra} --bundle {} c 9</",
            "",
            bundle.path("state").display(),
            bundle.dir.display()
        )
    };
    let run = |extra: &str| {
        let output = std::process::Command::new("/bin/bash")
            .arg("-c")
            .arg(line(extra).replace(" /bin/true", ""))
            .arg(env!("CARGO_BIN_EXE_coracle-oci"))
            .output()
            .expect("bash");
        support::text(&output).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(run(""), ["0", "1", "2", "3"], "3 is the directory that ls reads");
    assert_eq!(run("--preserve-fds 7"), ["0", "1", "2", "3", "9"]);
    bundle.assert_nothing_left();
}

#[test]
fn what_is_mounted() {
    if !available("what_is_mounted") {
        return;
    }
    let mut bundle = Bundle::new("mounts");
    let source = bundle.path("source");
    fs::create_dir_all(source.join("below")).expect("a source");
    fs::write(source.join("file"), "hello\n").expect("a file");
    add_mount(
        &mut bundle,
        json!({ "destination": "/data", "type": "bind", "source": source, "options": ["rbind", "ro", "nosuid", "nodev"] }),
    );
    add_mount(&mut bundle, json!({ "destination": "/new/dir/file", "type": "bind", "source": source.join("file"), "options": ["bind"] }));
    add_mount(
        &mut bundle,
        json!({ "destination": "/relative", "type": "none", "source": "source", "options": ["rbind", "rro", "rslave"] }),
    );
    add_mount(
        &mut bundle,
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["noexec", "size=1m", "mode=1777", "ro"] }),
    );
    bundle.config["root"]["readonly"] = json!(true);
    bundle.shell(
        "cat /data/file /new/dir/file; for f in /data/x /x /tmp/x /proc/sys/x /relative/x; do touch $f 2>&1; done; cat /proc/keys /proc/kcore | wc -c; \
         ls /sys/firmware | wc -l; grep -E ' /(data|relative|tmp) ' /proc/mounts; \
         stat -c %F /dev/null; echo x > /dev/null && echo written; test -e /proc/1/root/bin/sh && echo root",
    );
    let out = bundle.output();
    assert!(out.starts_with("hello\nhello\n"), "{out}");
    assert_eq!(out.matches("Read-only file system").count(), 4, "{out}");
    assert!(out.contains("\n0\n0\n") && out.contains("written"), "{out}");
    assert!(out.contains("/data ext4 ro,nosuid,nodev") || out.contains(" /data ") && out.contains("ro,nosuid,nodev"), "{out}");
    assert!(out.contains("tmpfs /tmp tmpfs ro,noexec"), "{out}");
    assert_eq!(read(&source.join("file")), "hello\n");
    bundle.assert_nothing_left();
}

#[test]
fn the_root_can_be_moved_to() {
    if !available("the_root_can_be_moved_to") {
        return;
    }
    let mut bundle = Bundle::new("move");
    bundle.shell("ls /; ls /proc/1/exe; wc -c < /proc/keys; pwd");
    let answer = bundle.run(&["run", "--no-pivot", "--bundle", ".", "c"]);
    assert!(answer.code == 0 && !answer.out.contains("home") && answer.out.ends_with("0\n/\n"), "{answer:?}");
    bundle.assert_nothing_left();
}

#[test]
fn links_of_the_image_lead_nowhere_outside() {
    if !available("links_of_the_image_lead_nowhere_outside") {
        return;
    }
    let mut bundle = Bundle::new("links");
    let outside = bundle.path("outside");
    fs::create_dir_all(&outside).expect("a directory");
    let root = bundle.path("rootfs");
    symlink(&outside, root.join("absolute")).expect("link");
    symlink(format!("../../../../../../..{}", outside.display()), root.join("dots")).expect("link");
    symlink("/etc", root.join("masked")).expect("link");
    for name in ["absolute", "dots"] {
        add_mount(&mut bundle, json!({ "destination": format!("/{name}/made"), "type": "tmpfs", "source": "tmpfs" }));
    }
    bundle.config["linux"]["maskedPaths"] = json!(["/masked/passwd", "/proc/keys"]);
    bundle.shell("mount | grep -c made; cat /etc/passwd | wc -c");
    assert_eq!(bundle.output(), "2\n0\n");
    assert!(fs::read_dir(&outside).expect("outside").next().is_none(), "nothing was made outside");
    assert!(!read(std::path::Path::new("/etc/passwd")).is_empty());
    // A procfs that would be somewhere else than where it is masked is refused.
    fs::remove_dir(root.join("proc")).expect("made by the run before");
    symlink("/etc", root.join("proc")).expect("link");
    bundle.run(&["run", "--bundle", ".", "c"]).failed("error mounting \"proc\" to rootfs at \"/proc\"");
    bundle.assert_nothing_left();
}

#[test]
fn devices_are_limited() {
    if !available("devices_are_limited") {
        return;
    }
    let mut bundle = Bundle::new("devices");
    privileged(&mut bundle);
    bundle.config["linux"]["devices"] =
        json!([{ "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4 }]);
    bundle.shell("stat -c '%a %u %g %t:%T' /dev/mine; mknod /kmsg c 1 11; cat /kmsg; mknod /zero c 1 5; head -c 3 /zero | wc -c");
    let answer = bundle.run(&["run", "--bundle", ".", "c"]);
    assert_eq!(answer.out, "640 3 4 1:5\n3\n", "{answer:?}");
    assert!(answer.err.contains("Operation not permitted"), "{answer:?}");
    bundle.config["linux"]["resources"]["devices"] =
        json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "r" }]);
    bundle.shell("mknod /fuse c 10 229; : < /fuse && echo read; : > /fuse");
    let answer = bundle.run(&["run", "--bundle", ".", "c"]);
    assert!(answer.out.contains("read") && answer.err.contains("Operation not permitted"), "{answer:?}");
    bundle.assert_nothing_left();
}

#[test]
fn namespaces_are_joined() {
    if !available("namespaces_are_joined") {
        return;
    }
    let mut bundle = Bundle::new("join");
    bundle.config["hostname"] = json!("first");
    bundle.run(&["run", "--detach", "--bundle", ".", "--pid-file", "init.pid", "c"]).ok();
    let pid = read(&bundle.path("init.pid"));
    let names = [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid")];
    let joined = names.map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }));
    let mut namespaces = joined.to_vec();
    namespaces.push(json!({ "type": "mount" }));
    bundle.config["linux"]["namespaces"] = json!(namespaces);
    bundle.config["linux"]["cgroupsPath"] = json!(bundle.cgroup("d"));
    bundle.config["hostname"] = json!("");
    bundle.shell("hostname; for n in net ipc uts pid; do readlink /proc/self/ns/$n; done; cat /proc/1/comm; sleep 1000");
    bundle.run(&["create", "--bundle", ".", "d"]).ok();
    let out = bundle.path("stdout");
    let copy = bundle.path("stdout.kept");
    fs::rename(&out, &copy).expect("kept");
    bundle.run(&["start", "d"]).ok();
    eventually("it has said all", || read(&copy).lines().count() == 6);
    let found = read(&copy);
    let found: Vec<&str> = found.lines().collect();
    let expected: Vec<String> =
        names.iter().map(|(_, file)| fs::read_link(format!("/proc/{pid}/ns/{file}")).expect("ns").display().to_string()).collect();
    assert_eq!((found[0], &found[1..5], found[5]), ("first", expected.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), "sleep"));
    // Its death alone would not take its children along, for it is not the first of the PID namespace.
    bundle.run(&["kill", "d", "9"]).ok();
    bundle.await_status("d", "stopped");
    eventually("all are gone", || bundle.run(&["ps", "--format", "json", "d"]).ok() == "null");
    bundle.run(&["delete", "d"]).ok();
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_user_namespace_maps_ids() {
    if !available("a_user_namespace_maps_ids") {
        return;
    }
    let mut bundle = Bundle::new("userns");
    bundle.config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({ "type": "user" }));
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    bundle.config["linux"]["uidMappings"] = map.clone();
    bundle.config["linux"]["gidMappings"] = map;
    // Mount points are made by the root of the user namespace.
    std::os::unix::fs::chown(bundle.path("rootfs"), Some(100_000), Some(100_000)).expect("chown");
    bundle.shell("id -u; cat /proc/self/uid_map; cat /proc/self/cgroup | grep -c ':/$'; echo x > /dev/null && echo null; ls -ld /etc | grep -c 65534; sleep 1000");
    bundle.run(&["create", "--bundle", ".", "--pid-file", "init.pid", "c"]).ok();
    let copy = bundle.path("stdout.kept");
    fs::rename(bundle.path("stdout"), &copy).expect("kept");
    bundle.run(&["start", "c"]).ok();
    eventually("it has said all", || read(&copy).lines().count() >= 5);
    let out = read(&copy);
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words[..4], ["0", "0", "100000", "65536"], "{out}");
    assert!(out.contains("null\n1\n"), "{out}");
    let pid = read(&bundle.path("init.pid"));
    let status = read(std::path::Path::new(&format!("/proc/{pid}/status")));
    assert!(status.contains("Uid:\t100000"), "{status}");
    assert_eq!(bundle.run(&["exec", "c", "sh", "-c", "id -u; cat /proc/self/uid_map | wc -l"]).ok(), "0\n1\n");
    // Another container in the same user namespace, by path.
    let paths =
        [("user", "user"), ("network", "net")].map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }));
    let mut namespaces = paths.to_vec();
    namespaces.extend([
        json!({ "type": "mount" }),
        json!({ "type": "pid" }),
        json!({ "type": "ipc" }),
        json!({ "type": "uts" }),
        json!({ "type": "cgroup" }),
    ]);
    bundle.config["linux"]["namespaces"] = json!(namespaces);
    bundle.config["linux"]["cgroupsPath"] = json!(bundle.cgroup("d"));
    bundle.shell("cat /proc/self/uid_map; readlink /proc/self/ns/net; echo $$");
    let answer = bundle.run(&["run", "--bundle", ".", "d"]);
    let net = fs::read_link(format!("/proc/{pid}/ns/net")).expect("ns").display().to_string();
    assert!(answer.code == 0 && answer.out.contains("100000") && answer.out.contains(&net) && answer.out.ends_with("\n1\n"), "{answer:?}");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn limits_are_found_without_a_cgroup_namespace() {
    if !available("limits_are_found_without_a_cgroup_namespace") {
        return;
    }
    let mut bundle = Bundle::new("no-cgroupns");
    bundle.config["linux"]["namespaces"].as_array_mut().expect("namespaces").retain(|namespace| namespace["type"] != "cgroup");
    bundle.config["linux"]["resources"]["pids"] = json!({ "limit": 77 });
    // On v1 a hierarchy begins at the container's group; on v2 it is the host's, in which /proc/self/cgroup names the group.
    bundle.shell(
        "if [ -e /sys/fs/cgroup/cgroup.controllers ]; then IFS=: read -r id controllers path < /proc/self/cgroup; cat /sys/fs/cgroup$path/pids.max; \
         else cat /sys/fs/cgroup/pids/pids.max; fi",
    );
    assert_eq!(bundle.output(), "77\n");
    // Nor does a user namespace keep it from finding them, though it may not mount the hierarchy.
    bundle.config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({ "type": "user" }));
    for list in ["uidMappings", "gidMappings"] {
        bundle.config["linux"][list] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    }
    std::os::unix::fs::chown(bundle.path("rootfs"), Some(100_000), Some(100_000)).expect("chown");
    assert_eq!(bundle.output(), "77\n");
    bundle.assert_nothing_left();
}

#[test]
fn a_terminal_is_handed_over() {
    if !available("a_terminal_is_handed_over") {
        return;
    }
    let mut bundle = Bundle::new("terminal");
    bundle.config["process"]["terminal"] = json!(true);
    bundle.config["process"]["consoleSize"] = json!({ "height": 33, "width": 77 });
    bundle.shell("tty; stty size; test -c /dev/console && echo console; sleep 1000");
    let take = |name: &str, run: &dyn Fn(&str)| {
        let path = bundle.path(name);
        let listener = linux::unix::listen(linux::unix::Kind::Stream, &path, 1).expect("a socket");
        run(&path.display().to_string());
        let connection = linux::unix::accept(listener.as_fd()).expect("a connection");
        let (_, mut fds) = linux::unix::receive(connection.as_fd(), 64).expect("a message");
        fs::File::from(fds.pop().expect("the master"))
    };
    let mut master = take("init.sock", &|path| {
        bundle.run(&["create", "--bundle", ".", "--console-socket", path, "c"]).ok();
    });
    bundle.run(&["start", "c"]).ok();
    assert_eq!(read_until(&mut master, "console"), "/dev/pts/0\r\n33 77\r\nconsole");
    let process = json!({ "args": ["sh", "-c", "tty; test -t 0 && echo done"], "cwd": "/", "env": ["PATH=/bin"], "terminal": true });
    fs::write(bundle.path("process.json"), process.to_string()).expect("process.json");
    let mut second = take("exec.sock", &|path| {
        bundle.run(&["exec", "--process", "process.json", "--detach", "--console-socket", path, "c"]).ok();
    });
    assert_eq!(read_until(&mut second, "done"), "/dev/pts/1\r\ndone");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.run(&["create", "--bundle", ".", "c"]).failed("console socket");
    bundle.assert_nothing_left();
}

fn read_until(master: &mut fs::File, end: &str) -> String {
    use std::io::Read;
    let mut text = String::new();
    let mut buffer = [0u8; 256];
    while !text.contains(end) {
        let length = master.read(&mut buffer).expect("the terminal is open");
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    text.trim_end().to_owned()
}
