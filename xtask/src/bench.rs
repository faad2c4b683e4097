//! `cargo xtask bench`: pods of our node runtime beside containerd and runc in one run, and the whole program. Nothing is judged: a table and
//! JSON lines on stdout, with the versions and settings of both sides.

mod group;
mod pull;
mod runtime;
mod server;
mod system;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::json;
use testkit::host::Lists;
use testkit::image::{Image, ImageSpec};
use testkit::registry::Registry;
use testkit::tar::Entry;

use crate::{build, setup, sh};
use group::Group;
use runtime::{Life, Runtime};
use system::System;

/// How often something that is waited for is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long what is idle is watched, after it has come to rest.
const IDLE: Duration = Duration::from_secs(30);
const SETTLE: Duration = Duration::from_secs(10);
/// Sequences of pods per side, taken in turn, so that a slower minute of the machine meets both.
const ROUNDS: u32 = 2;
/// Debian's static busybox: the container's and containerd's sandbox's executable.
const BUSYBOX: &str = "/bin/busybox";

/// The flags of `cargo xtask bench`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Pods per side, one after another.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pods: u32,
    /// Idle pods per side whose memory and CPU time are measured.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    idle: u32,
    /// Objects in the API servers.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    objects: u32,
    /// What is measured; everything if not given.
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Measure development builds: to try the command, not to compare.
    #[arg(long)]
    dev: bool,
    /// The folders and the cgroup: set by the command itself when it enters its namespaces.
    #[arg(long, hide = true, num_args = 4)]
    inside: Option<Vec<String>>,
    /// The folder of containerd and runc: likewise.
    #[arg(long, hide = true)]
    peers: Option<PathBuf>,
}

/// A part of the measurement.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Pods of our node runtime beside containerd and runc.
    Pods,
    /// Pulls of a large image by both.
    Pull,
    /// `coracle up`.
    System,
    /// `coracle apiserver` beside kube-apiserver and etcd.
    Apiserver,
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        self.part.is_empty() || self.part.contains(&part)
    }
}

/// Where things are.
struct Places {
    /// `coracle` and what stands beside it.
    executables: PathBuf,
    /// The CRI client; `api-bench` stands beside it.
    client: PathBuf,
    /// For everything that is written.
    folder: PathBuf,
    /// The group above all groups.
    cgroup: String,
}

/// Measures. Fails only if something did not work or was left behind.
pub fn run(args: Args) -> Result<()> {
    if let Some(inside) = &args.inside {
        let [executables, client, folder, cgroup] = inside.as_slice() else { bail!("--inside has four values") };
        let (executables, client, folder) = (executables.into(), client.into(), folder.into());
        return measure(&args, &Places { executables, client, folder, cgroup: cgroup.clone() });
    }
    let host = setup::prepare(setup::Need::Tests)?;
    for missing in &host.missing {
        eprintln!("missing: {missing}");
    }
    let profile = if args.dev { build::Profile::Dev } else { build::Profile::Release };
    let executables = build::all(profile)?.directory;
    let client = build_client(profile, "testkit", "cri-client")?;
    build_client(profile, "e2e", "api-bench")?;
    let name = format!("coracle-bench-{}", std::process::id());
    let places = Places { executables, client, folder: std::env::temp_dir().join(&name), cgroup: format!("/{name}") };
    let before = Lists::take(&testkit::host::ALL).context("failed to list what is on the machine")?;
    fs::create_dir_all(&places.folder).with_context(|| format!("failed to create {}", places.folder.display()))?;

    // Ctrl-C ends what is inside; only then is everything removed, from here, where its mounts are not seen.
    let signals: Vec<i32> = ["INT", "TERM"].into_iter().filter_map(linux::signal::parse).collect();
    let measured = enter(&args, &places, host.peers.as_deref(), &signals);
    let groups_removed = group::remove(&places.cgroup);
    let folder_removed = fs::remove_dir_all(&places.folder).with_context(|| format!("failed to remove {}", places.folder.display()));
    let left = before.expect_nothing_left(&["sccache", "/tmp/rustc"], Duration::from_secs(10));
    if let Err(left) = &left {
        eprintln!("left behind:\n{left}");
    }
    measured.and(groups_removed).and(folder_removed)?;
    if left.is_err() {
        bail!("something is left behind");
    }
    Ok(())
}

/// A client is built like what it measures, and is on neither side's account. Its feature has its name.
fn build_client(profile: build::Profile, package: &str, client: &str) -> Result<PathBuf> {
    let (name, folder) = profile.names();
    let arguments = ["build", "--locked", "--profile", name, "--package", package, "--features", client, "--bin", client];
    sh::run(&format!("build {client}"), &mut sh::cargo(arguments))?;
    Ok(build::target_directory().join(folder).join(client))
}

/// Runs this program again in network and mount namespaces of its own: nothing of the machine's is changed.
fn enter(args: &Args, places: &Places, peers: Option<&Path>, signals: &[i32]) -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--propagation", "private", "--"]);
    command.arg(std::env::current_exe().context("failed to find this executable")?);
    command.args(["bench", "--pods", &args.pods.to_string(), "--idle", &args.idle.to_string()]);
    command.args(["--objects", &args.objects.to_string()]);
    for part in &args.part {
        command.arg("--part").args(part.to_possible_value().map(|value| value.get_name().to_owned()));
    }
    if args.dev {
        command.arg("--dev");
    }
    if let Some(peers) = peers {
        command.arg("--peers").arg(peers);
    }
    command.arg("--inside").arg(&places.executables).arg(&places.client).arg(&places.folder).arg(&places.cgroup);
    let mut child = command.spawn().context("failed to run unshare")?;
    // Blocked after the child was made, which therefore takes the signal.
    linux::signal::block(signals).context("failed to block SIGINT")?;
    let status = child.wait().context("failed to wait for the measurement")?;
    if !status.success() {
        bail!("the measurement ended with {status}");
    }
    Ok(())
}

/// What runs in the namespaces.
fn measure(args: &Args, places: &Places) -> Result<()> {
    const LOOPBACK: u32 = 1;
    let mut route = linux::rtnl::Route::open().context("failed to open netlink")?;
    route.set_up(LOOPBACK).context("failed to bring up the loopback interface")?;
    // What both keep below /run is on a tmpfs, as on a machine, and on one of their own.
    sh::output(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]))?;
    let registry = Registry::start().context("failed to start the registry")?;
    let image = registry.add("bench", "1", &image()?);

    let (mut sides, mut pulls) = (Vec::new(), Vec::new());
    if args.wants(Part::Pods) || args.wants(Part::Pull) {
        let runtimes = runtimes(args, places, &image)?;
        if args.wants(Part::Pods) {
            sides = pods(args, &runtimes)?;
        }
        if args.wants(Part::Pull) {
            pulls = pull::measure(&registry, &runtimes)?;
        }
        for runtime in runtimes {
            runtime.end()?;
        }
    }
    let system = if args.wants(Part::System) { Some(system::measure(places, &image, args.idle)?) } else { None };
    let client = places.client.with_file_name("api-bench");
    let peers = args.peers.as_deref();
    let servers =
        if args.wants(Part::Apiserver) { server::measure(&client, &places.executables, peers, args.objects)? } else { Vec::new() };
    print(args, &sides, &pulls, system.as_ref());
    server::print(&servers);
    lines(args, &sides, &pulls, system.as_ref());
    for line in servers {
        println!("{line}");
    }
    Ok(())
}

/// Both sides, running.
fn runtimes(args: &Args, places: &Places, image: &str) -> Result<Vec<Runtime>> {
    let network = if testkit::containerd::has_cni_plugins() { "pod" } else { "node" };
    let mut runtimes = vec![Runtime::ours(places, image, network)?];
    let there = |peers: &&PathBuf| ["containerd", "containerd-shim-runc-v2", "runc"].iter().all(|name| peers.join(name).exists());
    match args.peers.as_ref().filter(there) {
        Some(peers) => runtimes.push(Runtime::theirs(places, peers, image, network)?),
        None => eprintln!("there is no containerd and runc to measure beside: ours alone"),
    }
    Ok(runtimes)
}

/// Pods of both sides in turn, then idle ones.
fn pods(args: &Args, runtimes: &[Runtime]) -> Result<Vec<Side>> {
    let mut sides = lives(args, runtimes)?;
    for (side, runtime) in sides.iter_mut().zip(runtimes) {
        eprintln!("==> {} idle pods of {}", args.idle, side.name);
        side.daemon_pss_kib = runtime.group.pss_kib()?;
        let processes = runtime.group.processes()?;
        runtime.up(args.idle)?;
        side.pod_pss_kib = runtime.group.pss_kib()?.saturating_sub(side.daemon_pss_kib) / u64::from(args.idle);
        side.pod_processes = runtime.group.processes()?.saturating_sub(processes) as f64 / f64::from(args.idle);
    }
    // Side by side, for neither does anything that the other could feel.
    let groups: Vec<&Group> = runtimes.iter().map(|runtime| &runtime.group).collect();
    for (side, idle) in sides.iter_mut().zip(idle_cpu(&groups)?) {
        side.idle_cpu_ms_per_s = idle;
    }
    for runtime in runtimes {
        runtime.clear()?;
    }
    Ok(sides)
}

/// CPU milliseconds per second of groups in which nothing happens.
fn idle_cpu(groups: &[&Group]) -> Result<Vec<f64>> {
    eprintln!("==> {} s of idleness", IDLE.as_secs());
    std::thread::sleep(SETTLE);
    let before = groups.iter().map(|group| group.cpu_seconds()).collect::<Result<Vec<f64>>>()?;
    let began = Instant::now();
    std::thread::sleep(IDLE);
    let used = |(group, before): (&&Group, f64)| Ok((group.cpu_seconds()? - before) * 1000.0 / began.elapsed().as_secs_f64());
    groups.iter().zip(before).map(used).collect()
}

/// An image of busybox: `sleep`, `true`, and by default a sandbox's endless sleep.
fn image() -> Result<Image> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("failed to read {BUSYBOX} (Debian's busybox-static)"))?;
    let applets = ["sh", "sleep", "true"].map(|applet| Entry::symlink(&format!("bin/{applet}"), "busybox"));
    let spec = ImageSpec::new().layer([Entry::dir("bin"), Entry::executable("bin/busybox", busybox)].into_iter().chain(applets));
    Ok(spec.config("Entrypoint", json!(["/bin/sleep", "1000000"])).build())
}

/// What was measured of one side.
struct Side {
    name: &'static str,
    version: String,
    settings: String,
    lives: Vec<Life>,
    cpu_seconds: f64,
    daemon_pss_kib: u64,
    pod_pss_kib: u64,
    pod_processes: f64,
    idle_cpu_ms_per_s: f64,
}

impl Side {
    fn cpu_per_pod(&self) -> f64 {
        self.cpu_seconds / self.lives.len() as f64
    }
}

/// The lives of all pods: the sides take turns.
fn lives(args: &Args, runtimes: &[Runtime]) -> Result<Vec<Side>> {
    let side = |runtime: &Runtime| Side {
        name: runtime.name,
        version: runtime.version.clone(),
        settings: runtime.settings.clone(),
        lives: Vec::new(),
        cpu_seconds: 0.0,
        daemon_pss_kib: 0,
        pod_pss_kib: 0,
        pod_processes: 0.0,
        idle_cpu_ms_per_s: 0.0,
    };
    let mut sides: Vec<Side> = runtimes.iter().map(side).collect();
    for runtime in runtimes {
        // Once before anything is counted: pages and caches are warm on both sides.
        runtime.lives(1)?;
    }
    for round in 0..ROUNDS {
        let pods = args.pods / ROUNDS + u32::from(round < args.pods % ROUNDS);
        for (side, runtime) in sides.iter_mut().zip(runtimes) {
            eprintln!("==> {pods} pods of {}", side.name);
            let before = runtime.group.cpu_seconds()?;
            side.lives.extend(runtime.lives(pods)?);
            side.cpu_seconds += runtime.group.cpu_seconds()? - before;
        }
    }
    Ok(sides)
}

/// A row of the table: what, and how it is taken from a life.
type Call = (&'static str, fn(&Life) -> f64);

const CALLS: [Call; 7] = [
    ("RunPodSandbox", |life| life.run),
    ("CreateContainer", |life| life.create),
    ("StartContainer", |life| life.start),
    ("all three", |life| life.run + life.create + life.start),
    ("ExecSync of true", |life| life.exec),
    ("StopPodSandbox", |life| life.stop),
    ("RemovePodSandbox", |life| life.remove),
];

fn print(args: &Args, sides: &[Side], pulls: &[pull::Side], system: Option<&System>) {
    let build = if args.dev { "development build: not to be compared" } else { "release build" };
    println!("{build}; the last column says how many times better ours is than theirs (below 1: worse)");
    if !sides.is_empty() {
        print_pods(args, sides);
    }
    pull::print(pulls);
    if let Some(system) = system {
        print_system(args, system);
    }
}

fn print_pods(args: &Args, sides: &[Side]) {
    println!("{} pods of one container in sequence per side, {} idle pods for memory and idle CPU", args.pods, args.idle);
    for side in sides {
        println!("{}: {}; {}", side.name, side.version, side.settings);
    }
    println!();
    table::head(&sides.iter().map(|side| side.name).collect::<Vec<_>>());
    for (what, of) in CALLS {
        table::spread(&format!("{what}, ms, min / median"), sides.iter().map(|side| min_median(side.lives.iter().map(of))));
    }
    let figure = |what: &str, digits: usize, of: fn(&Side) -> f64| table::figure(what, digits, sides.iter().map(of));
    figure("CPU per pod life, s", 3, Side::cpu_per_pod);
    figure("PSS of everything per pod, KiB", 0, |side| side.pod_pss_kib as f64);
    figure("PSS of the daemon without pods, KiB", 0, |side| side.daemon_pss_kib as f64);
    figure("idle CPU of everything with the idle pods, ms/s", 2, |side| side.idle_cpu_ms_per_s);
    println!();
}

fn print_system(args: &Args, system: &System) {
    let (min, median) = min_median(system.running.iter().copied());
    println!("coracle up to node Ready: {:.2} s", system.ready);
    println!("coracle apply of a Deployment to its pod Running: {min:.0} / {median:.0} ms (min / median of {})", system.running.len());
    println!(
        "the idle program: PSS {:.1} MiB in {} processes, {:.2} ms of CPU per second",
        system.pss_kib as f64 / 1024.0,
        system.processes,
        system.idle_cpu_ms_per_s
    );
    println!("the whole program (node part and server) with {} idle pods: {:.2} ms of CPU per second", args.idle, system.pods_cpu_ms_per_s);
    println!();
}

/// The same for programs.
fn lines(args: &Args, sides: &[Side], pulls: &[pull::Side], system: Option<&System>) {
    for side in sides {
        let calls: serde_json::Map<String, serde_json::Value> = CALLS
            .iter()
            .map(|(what, of)| {
                let (min, median) = min_median(side.lives.iter().map(of));
                ((*what).to_owned(), json!({ "min_ms": min, "median_ms": median }))
            })
            .collect();
        println!(
            "{}",
            json!({
                "bench": "pods", "side": side.name, "version": side.version, "settings": side.settings, "release": !args.dev,
                "pods": side.lives.len(), "calls": calls, "cpu_seconds_per_pod": side.cpu_per_pod(), "idle_pods": args.idle,
                "pod_pss_kib": side.pod_pss_kib, "daemon_pss_kib": side.daemon_pss_kib, "processes_per_idle_pod": side.pod_processes,
                "idle_cpu_ms_per_s": side.idle_cpu_ms_per_s,
            })
        );
    }
    for side in pulls {
        println!("{}", side.line());
    }
    let Some(system) = system else { return };
    println!(
        "{}",
        json!({
            "bench": "system", "release": !args.dev, "ready_s": system.ready, "apply_to_running_ms": system.running,
            "pss_kib": system.pss_kib, "processes": system.processes, "idle_cpu_ms_per_s": system.idle_cpu_ms_per_s,
            "pods": args.idle, "pods_cpu_ms_per_s": system.pods_cpu_ms_per_s,
        })
    );
}

/// The smallest and the middle one; of an even number the mean of the two in the middle.
fn min_median(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (Some(min), middle) = (values.first(), values.len() / 2) else { return (f64::NAN, f64::NAN) };
    let median = if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], values[middle]) } else { values[middle] };
    (*min, median)
}

/// Waits until `done`, or fails.
fn wait_until(patience: Duration, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !done()? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain for {what}", patience.as_secs());
        }
        std::thread::park_timeout(POLL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(min_median([3.0, 1.0, 2.0].into_iter()), (1.0, 2.0));
        assert_eq!(min_median([4.0, 1.0, 2.0, 3.0].into_iter()), (1.0, 2.5));
    }
}
