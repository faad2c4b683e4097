//! What broke other runtimes, by number: each test carries the attack out against ours.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::{Value, json};
use support::{Bundle, available, eventually, mounts, read};

const ALL_CAPS: [&str; 6] = ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN"];
/// What a file of the host says that no container may change or hide.
const UNTOUCHED: &str = "untouched";
/// How often a race is run.
const RACES: usize = 25;

fn privileged(bundle: &mut Bundle) {
    bundle.config["process"]["noNewPrivileges"] = json!(false);
    bundle.config["process"]["capabilities"] = json!({ "bounding": ALL_CAPS, "effective": ALL_CAPS, "permitted": ALL_CAPS });
}

fn add_mount(bundle: &mut Bundle, mount: Value) {
    bundle.config["mounts"].as_array_mut().expect("mounts").push(mount);
}

/// The image's own `/dev` instead of a new one.
fn drop_mounts(bundle: &mut Bundle, below: &str) {
    let kept = |mount: &&Value| !Path::new(mount["destination"].as_str().unwrap_or_default()).starts_with(below);
    let mounts: Vec<Value> = bundle.config["mounts"].as_array().expect("mounts").iter().filter(kept).cloned().collect();
    bundle.config["mounts"] = json!(mounts);
}

/// A file of the host.
fn mark(bundle: &Bundle) -> std::path::PathBuf {
    let path = bundle.path("mark");
    fs::write(&path, UNTOUCHED).expect("a mark");
    path
}

/// The container opened the runtime's executable through `/proc/1/exe` (or `/proc/self/exe` of an exec'd process) and wrote to it as
/// soon as nobody executed it any more; the next container then ran what was written, on the host.
#[test]
fn cve_2019_5736_writing_to_the_runtimes_executable() {
    if !available("cve_2019_5736_writing_to_the_runtimes_executable") {
        return;
    }
    let mut bundle = Bundle::new("exe");
    privileged(&mut bundle);
    // The process that waits at the gate still executes the runtime; another one in the container opens it, keeps it
    // open until nobody executes it, and then writes (CVE-2019-5736).
    bundle.shell("exec sleep 1000");
    bundle.run(&["create", "--bundle", ".", "c"]).ok();
    let process = json!({ "args": ["sh", "-c", "exec 3</proc/1/exe && echo open; touch /go; while grep -q coracle /proc/1/comm; do sleep 0.01; done; echo x > /proc/self/fd/3"],
        "cwd": "/", "env": ["PATH=/bin"], "capabilities": { "bounding": ALL_CAPS, "effective": ALL_CAPS, "permitted": ALL_CAPS } });
    fs::write(bundle.path("process.json"), process.to_string()).expect("process.json");
    let attack = bundle
        .command(&["exec", "--process", "process.json", "c"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("exec");
    eventually("the attacker is ready", || bundle.path("rootfs/go").exists());
    bundle.run(&["start", "c"]).ok();
    let output = attack.wait_with_output().expect("ended");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(support::text(&output).contains("open") && errors.contains("Read-only file system"), "{output:?}");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

/// Two containers share a volume; while the runtime of the second mounts something below it, the first swaps the directory and a
/// link to a directory of the host: the mount, or the directory that is made for it, landed on the host.
#[test]
fn cve_2021_30465_a_mount_target_that_becomes_a_link() {
    if !available("cve_2021_30465_a_mount_target_that_becomes_a_link") {
        return;
    }
    let mut bundle = Bundle::new("swap");
    let (volume, outside) = (bundle.path("volume"), bundle.path("outside"));
    fs::create_dir_all(volume.join("real")).expect("a volume");
    fs::create_dir_all(&outside).expect("a directory of the host");
    symlink(&outside, volume.join("link")).expect("link");
    add_mount(&mut bundle, json!({ "destination": "/volume", "type": "bind", "source": volume, "options": ["rbind", "rw"] }));
    add_mount(&mut bundle, json!({ "destination": "/volume/real/made", "type": "tmpfs", "source": "tmpfs" }));
    let etc = bundle.path("rootfs/etc");
    add_mount(&mut bundle, json!({ "destination": "/volume/real/bound", "type": "bind", "source": etc, "options": ["rbind"] }));
    bundle.shell("true");
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                renameat_with(CWD, volume.join("real"), CWD, volume.join("link"), RenameFlags::EXCHANGE).expect("exchange");
            }
        });
        for _ in 0..RACES {
            let answer = bundle.run(&["run", "--bundle", ".", "c"]);
            let seen = fs::read_dir(&outside).map(|dir| dir.flatten().map(|entry| entry.path()).collect::<Vec<_>>());
            if !seen.as_ref().is_ok_and(Vec::is_empty) || !(answer.code == 0 || answer.logged.is_some()) {
                ended.store(true, Ordering::Relaxed);
                panic!("{seen:?}: {answer:?}");
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert!(!mounts().iter().any(|line| line.contains("outside")), "something is mounted outside");
    bundle.assert_nothing_left();
}

/// CRI-O joined sysctls by `+` and did not look into the values: one allowed name smuggled `kernel.core_pattern` in, which the host
/// executes. Here a value is a value; and no spelling of a name leads to a setting of the whole host.
#[test]
fn cve_2022_0811_a_sysctl_within_a_sysctl() {
    if !available("cve_2022_0811_a_sysctl_within_a_sysctl") {
        return;
    }
    let before = read(Path::new("/proc/sys/kernel/core_pattern"));
    let mut bundle = Bundle::new("sysctl");
    bundle.shell("true");
    let values = ["1+kernel.core_pattern=|/bin/evil", "1\nkernel.core_pattern=|/bin/evil", "1 kernel.core_pattern=|/bin/evil"];
    for value in values {
        bundle.config["linux"]["sysctl"] = json!({ "kernel.shm_rmid_forced": value });
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        // The kernel reads a number up to a blank and leaves the rest.
        assert!(
            value.contains([' ', '\n']) || answer.logged.as_ref().is_some_and(|why| why.contains("kernel.shm_rmid_forced")),
            "{answer:?}"
        );
        assert_eq!(read(Path::new("/proc/sys/kernel/core_pattern")), before);
        bundle.assert_nothing_left();
    }
    let names = [
        "kernel.core_pattern",
        "kernel/core_pattern",
        "kernel.shm_rmid_forced+kernel.core_pattern",
        "net/../kernel/core_pattern",
        "net.../.kernel.core_pattern",
        "kernel/shm_rmid_forced/../core_pattern",
        "net//../../kernel/core_pattern",
        "./kernel/core_pattern",
        "user/../kernel/core_pattern",
        "fs.mqueue.msg_max/../../../kernel/core_pattern",
        "kernel.core_pattern\0net.ipv4.ip_forward",
    ];
    for name in names {
        bundle.config["linux"]["sysctl"] = json!({ name: "|/bin/evil" });
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        assert!(answer.code != 0 && answer.logged.is_some(), "{name}: {answer:?}");
        bundle.assert_nothing_left();
    }
    assert_eq!(read(Path::new("/proc/sys/kernel/core_pattern")), before);
}

/// runc leaked a descriptor of a directory of the host into the container's first process; an image with the working directory
/// `/proc/self/fd/N` began there, above its root. Tried with every number, for the first process and for exec.
#[test]
fn cve_2024_21626_a_directory_of_the_host_as_working_directory() {
    if !available("cve_2024_21626_a_directory_of_the_host_as_working_directory") {
        return;
    }
    let mut bundle = Bundle::new("cwd");
    fs::write(bundle.path("rootfs/etc/mark"), "").expect("a mark");
    bundle.shell("readlink /proc/self/cwd");
    for number in 3..40 {
        bundle.config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        if answer.code == 0 {
            let inside = bundle.path("rootfs").join(answer.out.trim().trim_start_matches('/'));
            assert!(inside.is_dir() || answer.out.starts_with("/proc") || answer.out.starts_with("/sys"), "{number}: {answer:?}");
        }
        bundle.assert_nothing_left();
    }
    bundle.shell("exec sleep 1000");
    bundle.config["process"]["cwd"] = json!("/");
    bundle.run(&["run", "--detach", "--bundle", ".", "c"]).ok();
    for number in 3..40 {
        let process = json!({ "args": ["sh", "-c", "ls -d ../../../../../../../etc/passwd ../../../../../../../etc/mark"], "cwd": format!("/proc/self/fd/{number}"), "env": ["PATH=/bin"] });
        fs::write(bundle.path("process.json"), process.to_string()).expect("process.json");
        let answer = bundle.run(&["exec", "--process", "process.json", "c"]);
        // Every root has a passwd, only the image's has the mark.
        assert!(!answer.out.contains("passwd") || answer.out.contains("mark"), "{number}: {answer:?}");
    }
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

/// runc masked files by binding the container's `/dev/null`, which an image could have replaced by a link to a file of procfs: that
/// was then writable where a mask should have been, or not masked at all.
#[test]
fn cve_2025_31133_a_dev_null_that_is_none() {
    if !available("cve_2025_31133_a_dev_null_that_is_none") {
        return;
    }
    let mut bundle = Bundle::new("null");
    let mark = mark(&bundle);
    drop_mounts(&mut bundle, "/dev");
    let dev = bundle.path("rootfs/dev");
    fs::create_dir_all(&dev).expect("dev");
    fs::write(bundle.path("rootfs/etc/secret"), "secret").expect("a file to mask");
    bundle.config["linux"]["maskedPaths"] = json!(["/etc/secret", "/proc/keys"]);
    bundle.config["linux"]["readonlyPaths"] = json!([]);
    bundle.shell("cat /etc/secret /proc/keys; stat -c %t:%T /etc/secret /proc/keys; grep -c core_pattern /proc/self/mountinfo");
    for target in ["/proc/sys/kernel/core_pattern", "../../../../../../proc/sysrq-trigger", &mark.display().to_string(), "/etc/passwd"] {
        let _ = fs::remove_file(dev.join("null"));
        symlink(target, dev.join("null")).expect("link");
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        assert_eq!(answer.out, "1:3\n1:3\n0\n", "{target}: {answer:?}");
    }
    assert_eq!(read(&mark), UNTOUCHED);
    bundle.assert_nothing_left();
}

/// runc bound the terminal to `/dev/console` without looking what that was: a link of the image's led it over a file of procfs,
/// before those were masked, so that the container could write there.
#[test]
fn cve_2025_52565_a_console_that_is_a_link() {
    if !available("cve_2025_52565_a_console_that_is_a_link") {
        return;
    }
    let mut bundle = Bundle::new("console");
    let mark = mark(&bundle);
    let dev = bundle.path("rootfs/dev");
    fs::create_dir_all(dev.join("pts")).expect("dev");
    let own: Vec<Value> = bundle.config["mounts"].as_array().expect("mounts").clone();
    let pts: Vec<Value> = own.into_iter().filter(|mount| mount["destination"] == "/dev/pts").collect();
    drop_mounts(&mut bundle, "/dev");
    pts.into_iter().for_each(|mount| add_mount(&mut bundle, mount));
    bundle.config["process"]["terminal"] = json!(true);
    bundle.shell("sleep 1000");
    let socket = bundle.path("console.sock");
    let _listener = linux::unix::listen(linux::unix::Kind::Stream, &socket, 64).expect("a socket");
    for target in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", &mark.display().to_string(), "../etc/passwd"] {
        let _ = fs::remove_file(dev.join("console"));
        symlink(target, dev.join("console")).expect("link");
        let answer = bundle.run(&["create", "--bundle", ".", "--console-socket", &socket.display().to_string(), "c"]);
        assert!(answer.code != 0 && answer.logged.is_some(), "{target}: {answer:?}");
        bundle.assert_nothing_left();
    }
    // What blocks whoever opens it must not block the runtime.
    fs::remove_file(dev.join("console")).expect("the link");
    rustix::fs::mknodat(CWD, dev.join("console"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR, 0)
        .expect("a fifo");
    let answer = bundle.run(&["create", "--bundle", ".", "--console-socket", &socket.display().to_string(), "c"]);
    if answer.code == 0 {
        bundle.run(&["delete", "--force", "c"]).ok();
    }
    assert_eq!(read(&mark), UNTOUCHED);
    assert_eq!(read(&bundle.path("rootfs/etc/passwd")).lines().count(), 2);
    bundle.assert_nothing_left();
}

/// runc wrote sysctls, labels and the like to paths of the container's procfs: what was mounted over them took the write, or led it
/// to another file of procfs.
#[test]
fn cve_2025_52881_writes_to_proc_that_land_elsewhere() {
    if !available("cve_2025_52881_writes_to_proc_that_land_elsewhere") {
        return;
    }
    let mut bundle = Bundle::new("redirect");
    let mark = mark(&bundle);
    let fake = bundle.path("fake");
    fs::create_dir_all(fake.join("sys/net/ipv4")).expect("a false procfs");
    fs::create_dir_all(fake.join("self/attr")).expect("a false procfs");
    for name in ["sys/net/ipv4/ip_forward", "self/oom_score_adj", "self/attr/exec"] {
        fs::write(fake.join(name), UNTOUCHED).expect("a false file");
    }
    bundle.config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
    bundle.config["linux"]["maskedPaths"] = json!([]);
    bundle.config["linux"]["readonlyPaths"] = json!([]);
    bundle.config["process"]["oomScoreAdj"] = json!(777);
    privileged(&mut bundle);
    let mounts = bundle.config["mounts"].clone();
    // Over the file, and over the whole of it; the true values are read from a second procfs.
    let over_file = json!({ "destination": "/proc/sys/net/ipv4/ip_forward", "type": "bind", "source": mark, "options": ["bind"] });
    let over_all = json!({ "destination": "/proc", "type": "bind", "source": fake, "options": ["rbind"] });
    for over in [over_file, over_all] {
        bundle.config["mounts"] = mounts.clone();
        add_mount(&mut bundle, over.clone());
        add_mount(&mut bundle, json!({ "destination": "/true", "type": "proc", "source": "proc" }));
        bundle.shell("cat /true/sys/net/ipv4/ip_forward /true/self/oom_score_adj");
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        assert!(answer.out == "1\n777\n" || (answer.code != 0 && answer.logged.is_some()), "{over}: {answer:?}");
        bundle.assert_nothing_left();
    }
    // The container covers its procfs itself; exec has a score to write, too.
    bundle.config["mounts"] = mounts;
    add_mount(&mut bundle, json!({ "destination": "/fake", "type": "bind", "source": fake, "options": ["rbind"] }));
    bundle.shell("mount -o bind /fake /proc && echo > /covered; exec sleep 1000");
    bundle.run(&["run", "--detach", "--bundle", ".", "c"]).ok();
    eventually("the container has covered its procfs", || bundle.path("rootfs/covered").exists());
    let process = json!({ "args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "oomScoreAdj": 555 });
    fs::write(bundle.path("process.json"), process.to_string()).expect("process.json");
    let answer = bundle.run(&["exec", "--process", "process.json", "c"]);
    assert!(answer.code == 0 || answer.logged.is_some(), "{answer:?}");
    for path in [mark, fake.join("sys/net/ipv4/ip_forward"), fake.join("self/oom_score_adj"), fake.join("self/attr/exec")] {
        assert_eq!(read(&path), UNTOUCHED, "{}", path.display());
    }
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.assert_nothing_left();
}

/// containerd took a user id beyond 31 bits over into one that the kernel reads as -1, "leave it": the process stayed root.
#[test]
fn cve_2024_40635_a_user_id_that_leaves_root() {
    if !available("cve_2024_40635_a_user_id_that_leaves_root") {
        return;
    }
    let mut bundle = Bundle::new("uid");
    bundle.shell("id -u");
    for user in [json!({ "uid": u32::MAX, "gid": 1000 }), json!({ "uid": 1000, "gid": u32::MAX })] {
        bundle.config["process"]["user"] = user;
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        assert!(answer.code != 0 && answer.logged.as_ref().is_some_and(|why| why.contains("no id")), "{answer:?}");
        bundle.assert_nothing_left();
    }
}

/// What an image puts in the place of `/etc/passwd`, in which the home directory is looked up, is neither waited for nor read without end.
#[test]
fn a_passwd_without_end() {
    if !available("a_passwd_without_end") {
        return;
    }
    let mut bundle = Bundle::new("passwd");
    bundle.shell("echo $HOME");
    let path = bundle.path("rootfs/etc/passwd");
    let _ = fs::remove_file(&path);
    symlink("/dev/zero", &path).expect("a link");
    assert_eq!(bundle.output(), "/\n");
    fs::remove_file(&path).expect("removed");
    rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o644), 0).expect("a FIFO");
    assert_eq!(bundle.output(), "/\n");
}
