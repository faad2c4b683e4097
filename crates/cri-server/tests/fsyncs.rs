//! How many fsyncs a started container costs. A program of its own: strace counts those of the whole process.
//!
//! Needs strace, and what `crictl.rs` needs.

mod common;

use std::process::Command;

use common::on_node;
use testkit::poll::until;

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
        let attached = format!("TracerPid:\t{}", strace.id());
        until("strace attaches", || std::fs::read_to_string("/proc/self/status").expect("a procfs").contains(&attached));
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
