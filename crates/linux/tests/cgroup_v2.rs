//! Cgroup v2 on hosts that have it beside v1 (hybrid) as well: groups, freezer, kill, device programs.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use linux::cgroup::devices::{Access, Kind, Rules};
use linux::cgroup::{Cgroup, Cpu, Host, Memory, Resources};
use testkit::poll::until;

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

/// What a file of the group says.
fn file(group: &Group, name: &str) -> String {
    std::fs::read_to_string(group.1.join(name)).unwrap_or_default().trim().to_owned()
}

/// Whether controllers are handed down to the group: on hybrid hosts they are on v1.
fn has_controllers(group: &Group, test: &str) -> bool {
    let enabled = file(group, "cgroup.controllers");
    let all = ["cpu", "memory", "pids"].iter().all(|name| enabled.split_whitespace().any(|word| word == *name));
    if !all {
        eprintln!("SKIPPED: {test}: cpu, memory and pids are on cgroup v1");
    }
    all
}

#[test]
fn limits_stand_in_the_files() {
    let Some(group) = Group::new("limits") else { return };
    if !has_controllers(&group, "limits_stand_in_the_files") {
        return;
    }
    const MIB: i64 = 1 << 20;
    let cpu = |quota, burst| Cpu { shares: Some(512), quota: Some(quota), period: Some(100_000), burst: Some(burst), ..Cpu::default() };
    let memory = Memory { limit: Some(64 * MIB), swap: Some(80 * MIB), reservation: Some(16 * MIB), ..Memory::default() };
    let unified = [("memory.high".to_owned(), "50331648".to_owned())].into();
    let resources = Resources { cpu: cpu(50_000, 40_000), memory, pids_limit: Some(9), unified, ..Resources::default() };
    group.0.apply(&resources).expect("applied");
    let found = ["cpu.weight", "cpu.max", "cpu.max.burst", "memory.max", "memory.swap.max", "memory.low", "memory.high", "pids.max"];
    assert_eq!(found.map(|name| file(&group, name)), ["59", "50000 100000", "40000", "67108864", "16777216", "16777216", "50331648", "9"]);
    // A burst is never above its quota: down and up again.
    for (quota, burst) in [(20_000, 10_000), (90_000, 80_000)] {
        group.0.apply(&Resources { cpu: cpu(quota, burst), ..Resources::default() }).expect("applied");
        assert_eq!([file(&group, "cpu.max"), file(&group, "cpu.max.burst")], [format!("{quota} 100000"), burst.to_string()]);
    }
    let memory = Memory { limit: Some(-1), ..Memory::default() };
    let cpu = Cpu { quota: Some(-1), ..Cpu::default() };
    group.0.apply(&Resources { cpu, memory, pids_limit: Some(-1), ..Resources::default() }).expect("applied");
    assert_eq!(["memory.max", "memory.swap.max", "pids.max"].map(|name| file(&group, name)), ["max"; 3]);
    assert_eq!(file(&group, "cpu.max"), "max 100000");
}

#[test]
fn usage_is_told() {
    let Some(group) = Group::new("usage") else { return };
    if !has_controllers(&group, "usage_is_told") {
        return;
    }
    let memory = Memory { limit: Some(32 << 20), swap: Some(32 << 20), ..Memory::default() };
    group.0.apply(&Resources { memory, pids_limit: Some(20), ..Resources::default() }).expect("applied");
    let script = format!("echo 0 > {}; tail /dev/zero; true", group.1.join("cgroup.procs").display());
    let mut child = Command::new("sh").arg("-c").arg(script).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("sh");
    assert!(child.wait().expect("ended").success(), "only the process that filled the memory was killed");
    let stats = group.0.stats().expect("stats");
    assert_eq!((stats.memory.oom_kills, stats.memory.limit_bytes, stats.pids.limit), (1, 32 << 20, 20));
    assert!(stats.memory.peak_bytes > 24 << 20 && stats.memory.limit_hits > 0 && stats.cpu.usage_ns > 0, "{stats:?}");
    assert_eq!((stats.memory.swap_limit_bytes, stats.pids.current), (0, 0));
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
    until("the rules hold", || !read_by("/dev/zero") && read_by("/dev/full"));
}
