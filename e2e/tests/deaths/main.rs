//! `coracle up` dies or stops while pods write and a client writes: nothing that was acknowledged or printed is lost. And what
//! becomes of pods that crash, fail their probes, hang in hooks or are deleted.
//!
//! The tests of this file run beside each other, each with a cluster of its own: one of them mostly waits.

mod life;
mod writers;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use e2e::{ledger, soak};
use serde_json::Value;

use crate::writers::Writers;

/// How many pods write.
const PODS: usize = 10;
/// How often `coracle up` is killed.
const DEATHS: usize = 5;
/// How long it is stopped: longer than the node lifecycle controller's grace period.
const STOPPED: Duration = Duration::from_secs(120);
/// How many lines each pod must write while it is stopped, at the least: one every 10 ms would be 12000.
const LINES_WHILE_STOPPED: usize = 1000;
/// How many lines each pod writes between two deaths, at the least.
const LINES_BETWEEN: usize = 50;
/// How many objects the client must have had acknowledged at the end, at the least.
const OBJECTS: usize = 20;
/// How many lines each pod writes after the stop before it is looked at.
const LINES_SETTLED: usize = 300;

#[test]
fn deaths_lose_nothing() -> Result<()> {
    let mut cluster = Cluster::start("deaths")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();
    let writers = Writers::create(&api, PODS)?;

    let over = AtomicBool::new(false);
    let (died, written) = std::thread::scope(|scope| {
        let client = scope.spawn(|| ledger::write_until(&api, &over));
        let died = die(&mut cluster, &api, &writers);
        over.store(true, Ordering::Relaxed);
        (died, client.join())
    });
    died.with_context(|| format!("--- coracle up\n{}", cluster.log_tail()))?;
    let answered = written.map_err(|_| anyhow::anyhow!("the client panicked"))?.check(&api)?;
    ensure!(answered >= OBJECTS, "only {answered} objects were written with every answer");
    let stopped = stop(&mut cluster, &api, &writers);
    stopped.with_context(|| format!("--- coracle up\n{}", cluster.log_tail()))
}

/// What `cargo xtask soak` does for minutes, for some rounds: here `up`, a shim and the keeper die while pods come and go.
#[test]
fn a_short_soak_is_clean() -> Result<()> {
    let options = soak::Options { duration: Duration::from_secs(600), rounds: 3, deaths: None, etcd: false, seed: 1 };
    let summary = soak::run("short-soak", options)?;
    println!("{summary}");
    ensure!(summary.is_clean(), "{summary}");
    Ok(())
}

/// Kills `coracle up` again and again; between two deaths every pod writes on.
fn die(cluster: &mut Cluster, api: &Api, writers: &Writers) -> Result<()> {
    for death in 0..DEATHS {
        let before = writers.lines(api)?;
        cluster.kill()?;
        cluster.up().with_context(|| format!("after death {death}"))?;
        writers.write_on(api, &before, LINES_BETWEEN)?;
        writers.check(api).with_context(|| format!("after death {death}"))?;
    }
    writers.check_processes(cluster)
}

/// Stops `coracle up` for a long time and starts it again.
fn stop(cluster: &mut Cluster, api: &Api, writers: &Writers) -> Result<()> {
    let before = writers.lines(api)?;
    let pid_before = cluster.pid();
    cluster.stop()?;
    let start = Instant::now();
    while start.elapsed() < STOPPED {
        std::thread::sleep(STOPPED.saturating_sub(start.elapsed()));
    }
    cluster.up()?;
    ensure!(cluster.pid() != pid_before, "coracle up was not started again");
    let after = writers.lines(api)?;
    for (number, (before, after)) in before.iter().zip(&after).enumerate() {
        ensure!(*after >= before + LINES_WHILE_STOPPED, "writer {number} wrote {before} lines, and {after} after the stop");
    }
    // The new kubelet has seen all pods by then, and would have ended what it does not know.
    writers.write_on(api, &after, LINES_SETTLED)?;
    eventually("the node has no taint", || {
        let nodes = api.object("/api/v1/nodes")?;
        Ok(nodes.pointer("/items/0/spec/taints").and_then(Value::as_array).is_none_or(Vec::is_empty))
    })?;
    writers.check(api)?;
    writers.check_processes(cluster)?;
    writers.lines(api).map(drop)
}
