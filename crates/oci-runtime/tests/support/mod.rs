//! Containers for tests: a bundle of Debian's static busybox, a group of its own, and the check that nothing is left.

#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

pub const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 30] = [
    "sh", "ls", "cat", "sleep", "id", "mount", "ps", "echo", "env", "hostname", "true", "false", "stat", "grep", "head", "touch", "mknod",
    "kill", "dd", "readlink", "umask", "test", "tty", "stty", "pwd", "wc", "mkdir", "umount", "seq", "ulimit",
];

/// Skips loudly: whoever counts skipped tests reads this line.
pub fn available(test: &str) -> bool {
    if !Path::new(BUSYBOX).exists() {
        eprintln!("SKIPPED: {test}: {BUSYBOX} (Debian's busybox-static) is missing");
        return false;
    }
    if !fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0) {
        eprintln!("SKIPPED: {test}: not root");
        return false;
    }
    true
}

/// A bundle, a state directory and a cgroup, removed when dropped.
pub struct Bundle {
    pub dir: PathBuf,
    pub name: String,
    pub config: Value,
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
    /// The last error in the log, if this command wrote one.
    pub logged: Option<String>,
}

impl Answer {
    pub fn ok(self) -> String {
        assert_eq!((self.code, self.logged.as_deref()), (0, None), "{self:?}");
        self.out
    }

    pub fn failed(self, words: &str) {
        assert_ne!(self.code, 0, "{self:?}");
        let logged = self.logged.clone().unwrap_or_default();
        assert!(logged.contains(words), "{words:?} is not in {logged:?}");
    }
}

impl Bundle {
    pub fn new(test: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("coracle-test-oci-{}-{}-{test}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(&name);
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).expect("a rootfs");
        fs::create_dir_all(dir.join("rootfs/etc")).expect("a rootfs");
        fs::write(dir.join("rootfs/etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n").expect("passwd");
        fs::copy(BUSYBOX, bin.join("busybox")).expect("busybox");
        for applet in APPLETS {
            symlink("busybox", bin.join(applet)).expect("applet");
        }
        let config = oci_runtime::features::example();
        let mut bundle = Self { dir, name, config };
        bundle.config["process"]["terminal"] = json!(false);
        bundle.config["process"]["env"] = json!(["PATH=/bin"]);
        bundle.config["process"]["args"] = json!(["sleep", "1000"]);
        bundle.config["root"]["readonly"] = json!(false);
        bundle.config["linux"]["cgroupsPath"] = json!(bundle.cgroup("c"));
        bundle
    }

    /// The path of a group of this test.
    pub fn cgroup(&self, id: &str) -> String {
        format!("/{}/{id}", self.name)
    }

    pub fn shell(&mut self, script: &str) -> &mut Self {
        self.config["process"]["args"] = json!(["sh", "-c", script]);
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn write(&self) -> &Self {
        fs::write(self.path("config.json"), self.config.to_string()).expect("config.json");
        self
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coracle-oci"));
        command.arg("--root").arg(self.path("state")).arg("--log").arg(self.path("log.json")).args(["--log-format", "json"]);
        command.args(args).current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end. The streams of `create` are files: a container would keep pipes open.
    pub fn run(&self, args: &[&str]) -> Answer {
        self.write();
        let _ = fs::remove_file(self.path("log.json"));
        let (out, err) = (self.path("stdout"), self.path("stderr"));
        let create = |path: &Path| fs::File::options().create(true).append(true).open(path).expect("a file");
        let _ = (fs::remove_file(&out), fs::remove_file(&err));
        let status = self.command(args).stdout(create(&out)).stderr(create(&err)).status().expect("the runtime runs");
        let log = fs::read_to_string(self.path("log.json")).unwrap_or_default();
        let logged = log.lines().rev().find_map(|line| {
            let value: Value = serde_json::from_str(line).expect("the log is JSON");
            (value["level"] == "error").then(|| value["msg"].as_str().unwrap_or_default().to_owned())
        });
        Answer { code: status.code().unwrap_or(-1), out: read(&out), err: read(&err), logged }
    }

    /// Runs the container in the foreground and answers its output.
    pub fn output(&self) -> String {
        let answer = self.run(&["run", "--bundle", ".", "c"]);
        assert_eq!(answer.code, 0, "{answer:?}");
        answer.out
    }

    pub fn status(&self, id: &str) -> String {
        let answer = self.run(&["state", id]).ok();
        serde_json::from_str::<Value>(&answer).expect("state is JSON")["status"].as_str().expect("a status").to_owned()
    }

    pub fn await_status(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || self.status(id) == status);
    }

    /// All directories of this test's groups.
    pub fn groups(&self) -> Vec<PathBuf> {
        let host = linux::cgroup::Host::detect().expect("cgroups");
        let group = linux::cgroup::Cgroup::new(&host, Path::new(&self.name));
        let mut found = Vec::new();
        for (_, dir) in group.directories() {
            collect(&dir, &mut found);
        }
        found
    }

    /// Nothing of this test may be left: mounts, groups below its own, states.
    pub fn assert_nothing_left(&self) {
        let mounts: Vec<String> = mounts().into_iter().filter(|line| line.contains(&self.name)).collect();
        assert!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let groups: Vec<PathBuf> = self.groups().into_iter().filter(|dir| !dir.ends_with(&self.name)).collect();
        assert!(groups.is_empty(), "groups are left: {groups:?}");
        let states: Vec<_> = fs::read_dir(self.path("state")).map(|dir| dir.flatten().collect()).unwrap_or_default();
        assert!(states.is_empty(), "states are left: {states:?}");
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let states = fs::read_dir(self.path("state")).map(|dir| dir.flatten().collect::<Vec<_>>()).unwrap_or_default();
        for state in states {
            let id = state.file_name();
            let _ = self.command(&["delete", "--force"]).arg(id).status();
        }
        let host = linux::cgroup::Host::detect().expect("cgroups");
        let group = linux::cgroup::Cgroup::new(&host, Path::new(&self.name));
        let _ = group.signal_all(9);
        let _ = group.remove(Duration::from_secs(5));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    if dir.is_dir() {
        found.push(dir.to_path_buf());
        for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
            collect(&entry.path(), found);
        }
    }
}

pub fn mounts() -> Vec<String> {
    fs::read_to_string("/proc/self/mountinfo").expect("mountinfo").lines().map(str::to_owned).collect()
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Whether this host has cgroup v2 alone.
pub fn cgroup_v2() -> bool {
    linux::cgroup::Host::detect().expect("cgroups").mode() == linux::cgroup::Mode::V2
}

pub use testkit::poll::until as eventually;

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}
