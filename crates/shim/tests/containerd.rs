//! The real containerd (of `CORACLE_PEERS`) drives the shim: run, exec, pause, its own death, the shim's death.

mod common;

use common::{Host, cannot_run, until};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use testkit::containerd::{Config, ConfigVersion};
use testkit::host::pids_with;

struct Containerd {
    host: Host,
    peers: PathBuf,
    process: Child,
}

impl Containerd {
    fn start(host: Host, peers: PathBuf) -> Self {
        // What is fixed in containerd and our shim's defaults lies below /run: a new one, in this mount namespace.
        assert!(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status().expect("mount").success());
        Config::within(&host.dir, ConfigVersion::Three, None).write().expect("config");
        let process = Self::run(&host.dir, &peers);
        Self { host, peers, process }
    }

    fn run(dir: &Path, peers: &Path) -> Child {
        let log = std::fs::File::options().append(true).create(true).open(dir.join("containerd.log")).expect("log");
        let mut command = Command::new(peers.join("containerd"));
        command.arg("-c").arg(dir.join("config.toml"));
        let child = command.stdout(log.try_clone().expect("log")).stderr(log).spawn().expect("containerd");
        until("containerd answers", || ctr(dir, peers, &["version"]).status.success());
        child
    }

    fn kill_and_restart(&mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("reaped");
        self.process = Self::run(&self.host.dir, &self.peers);
    }

    fn ctr(&self, words: &[&str]) -> Output {
        ctr(&self.host.dir, &self.peers, words)
    }

    /// `ctr run` of a shell script.
    fn container(&self, flag: &str, id: &str, script: &str) -> Output {
        let (shim, image) = (common::shim().display().to_string(), self.host.dir.join("image").display().to_string());
        let cgroup = format!("{}/{id}", self.host.cgroup);
        let usr = "type=bind,src=/usr,dst=/usr,options=rbind:ro";
        self.ctr(&["run", flag, "--runtime", &shim, "--cgroup", &cgroup, "--mount", usr, "--rootfs", &image, id, "/bin/sh", "-c", script])
    }

    fn status(&self, id: &str) -> String {
        let list = text(&self.ctr(&["task", "ls"]).stdout);
        let line = list.lines().find(|line| line.starts_with(id)).unwrap_or_default().to_owned();
        line.split_whitespace().last().unwrap_or_default().to_owned()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = linux::mount::unmount_all(Path::new("/run"), true);
    }
}

fn ctr(dir: &Path, peers: &Path, words: &[&str]) -> Output {
    Command::new(peers.join("ctr")).arg("-a").arg(dir.join("c.sock")).args(words).output().expect("ctr")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn containerd_drives_the_shim() {
    if let Some(reason) = cannot_run() {
        eprintln!("SKIPPED: containerd_drives_the_shim: {reason}");
        return;
    }
    let Some(peers) = std::env::var_os("CORACLE_PEERS").map(PathBuf::from).filter(|dir| dir.join("containerd").exists()) else {
        eprintln!("SKIPPED: containerd_drives_the_shim: CORACLE_PEERS has no containerd");
        return;
    };
    let host = Host::new("containerd");
    host.bundle("image-only", "", |_| {});
    let mut containerd = Containerd::start(host, peers);

    let output = containerd.container("--rm", "c1", "echo out; echo err >&2; exit 3");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "out\n");
    assert!(text(&output.stderr).contains("err\n"));
    let output = containerd.container("--rm", "c2", "exec /nonexistent");
    assert_eq!(output.status.code(), Some(127));

    let output = containerd.container("-d", "c3", "exec sleep 1000");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let exec = |words: &[&str]| {
        let mut line = vec!["task", "exec", "--exec-id", words[0], "c3"];
        line.extend(&words[1..]);
        containerd.ctr(&line)
    };
    let output = exec(&["e1", "/bin/sh", "-c", "echo in; exit 4"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(4), "in\n"));
    assert!(containerd.ctr(&["task", "pause", "c3"]).status.success());
    assert_eq!(containerd.status("c3"), "PAUSED");
    assert!(containerd.ctr(&["task", "resume", "c3"]).status.success());
    assert!(text(&containerd.ctr(&["task", "metrics", "c3"]).stdout).contains("memory"));

    containerd.kill_and_restart();
    assert_eq!(containerd.status("c3"), "RUNNING", "its task outlives containerd");
    assert!(containerd.ctr(&["task", "kill", "-s", "SIGKILL", "c3"]).status.success());
    until("it has stopped", || containerd.status("c3") == "STOPPED");
    containerd.ctr(&["task", "delete", "c3"]);
    assert!(containerd.ctr(&["container", "delete", "c3"]).status.success());

    // Under containerd a shim's death is its container's: `delete` sees to it.
    assert!(containerd.container("-d", "c4", "exec sleep 1000").status.success());
    let shims = pids_with(&["containerd-shim-coracle", "-id c4 -address"]);
    assert_eq!(shims.len(), 1, "one shim: {shims:?}");
    linux::child::send_signal(shims[0], 9).expect("killed");
    until("its container is gone", || containerd.status("c4").is_empty());
    assert!(containerd.ctr(&["container", "delete", "c4"]).status.success());
    until("nothing is left", || containerd.host.left().is_empty());
    until("its socket is gone", || std::fs::read_dir("/run/containerd/s").map_or(0, Iterator::count) == 0);
}
