//! Cgroup v2 on hosts that have it beside v1 (hybrid) as well: groups, freezer, kill, device programs.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use linux::cgroup::devices::{Access, Kind, Rules};
use linux::cgroup::{Cgroup, Host, Resources};

/// A group of the test's own, removed when dropped.
struct Group(Cgroup, PathBuf);

impl Group {
    fn new(test: &str) -> Option<Self> {
        let mount = Host::detect().ok().and_then(|host| host.v2);
        let root = std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
        let Some(mount) = mount.filter(|_| root) else {
            eprintln!("SKIPPED: {test}: no cgroup v2 hierarchy is mounted, or not root");
            return None;
        };
        let host = Host { v1: Vec::new(), v2: Some(mount.clone()) };
        let path = format!("/coracle-test-v2-{}-{test}", std::process::id());
        let group = Cgroup::new(&host, Path::new(&path));
        group.create().expect("the group is made");
        Some(Self(group, mount.join(path.trim_start_matches('/'))))
    }

    /// A process that is born outside and put into the group.
    fn sleeper(&self) -> Child {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).process_group(0).spawn().expect("sleep");
        self.0.add(child.id() as i32).expect("it is put into the group");
        child
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.0.signal_all(9);
        let _ = self.0.remove(Duration::from_secs(5));
    }
}

fn eventually(mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !so() {
        assert!(Instant::now() < deadline, "it did not come true");
        std::thread::yield_now();
    }
}

#[test]
fn freeze_thaw_and_kill() {
    let Some(group) = Group::new("freeze") else { return };
    let mut children = [group.sleeper(), group.sleeper()];
    let mut expected: Vec<i32> = children.iter().map(|child| child.id() as i32).collect();
    expected.sort_unstable();
    assert_eq!(group.0.pids().expect("pids"), expected);
    assert!(!group.0.is_frozen().expect("state"));
    group.0.freeze().expect("frozen");
    assert!(group.0.is_frozen().expect("state"));
    group.0.thaw().expect("thawed");
    assert!(!group.0.is_frozen().expect("state"));
    group.0.freeze().expect("frozen");
    assert!(group.0.remove(Duration::ZERO).is_err(), "a group with processes stays");
    group.0.signal_all(9).expect("killed, though frozen");
    for child in &mut children {
        assert!(!child.wait().expect("reaped").success());
    }
    group.0.remove(Duration::from_secs(5)).expect("removed");
    assert!(!group.0.exists() && group.0.pids().expect("none").is_empty());
    group.0.remove(Duration::ZERO).expect("gone is fine");
}

#[test]
fn a_limit_without_its_controller_is_an_error() {
    let Some(group) = Group::new("limit") else { return };
    let enabled = std::fs::read_to_string(group.1.join("cgroup.controllers")).unwrap_or_default();
    let resources = Resources { pids_limit: Some(7), ..Resources::default() };
    match enabled.split_whitespace().any(|name| name == "pids") {
        true => {
            group.0.apply(&resources).expect("applied");
            assert_eq!(group.0.stats().expect("stats").pids.limit, 7);
        }
        false => assert!(group.0.apply(&resources).is_err(), "the controller is on v1"),
    }
    group
        .0
        .apply(&Resources { hugepages: vec![("9TB".to_owned(), 0)], ..Resources::default() })
        .expect("zero of what is missing is passed over");
}

#[test]
fn device_programs_decide() {
    let Some(group) = Group::new("devices") else { return };
    let read_by = |path: &str| {
        let entry = group.1.join("cgroup.procs");
        let script = format!("echo 0 > {}; exec head -c 1 {path} > /dev/null 2>&1", entry.display());
        Command::new("sh").arg("-c").arg(script).stdin(Stdio::null()).status().expect("sh").success()
    };
    let mut rules = Rules::default();
    rules.add(true, (Kind::Char, Some(1), Some(3)), Access::ALL).expect("a rule");
    rules.add(true, (Kind::Char, Some(1), Some(5)), Access::parse("r").expect("letters")).expect("a rule");
    assert!(read_by("/dev/zero") && read_by("/dev/full"), "no rules yet");
    group.0.apply_devices(&rules).expect("loaded: the kernel's verifier takes it");
    assert!(read_by("/dev/zero") && !read_by("/dev/full"), "1:5 is allowed, 1:7 is not");
    // Another set takes the place of the first.
    let mut rules = Rules::default();
    rules.add(true, (Kind::All, None, None), Access::ALL).expect("a rule");
    rules.add(false, (Kind::Char, Some(1), Some(5)), Access::parse("r").expect("letters")).expect("a rule");
    rules.add(false, (Kind::Block, None, None), Access::ALL).expect("a rule");
    group.0.apply_devices(&rules).expect("replaced");
    eventually(|| !read_by("/dev/zero") && read_by("/dev/full"));
}
