//! Random death during pod churn: every process of ours may be killed at any moment, and so may containers; the daemon's clock steps,
//! the registry misbehaves, etcd hangs and dies. After each round the state must converge, and nothing that was acknowledged, printed
//! or told as an exit code may be lost; at the end nothing may be left behind.
//!
//! ```text
//! cluster -> warm-up -> what is there -> (round: changes, deaths -> converge -> judge)* -> all removed -> the same is there
//! ```
//!
//! The actions follow from the seed alone. What they meet follows from the machine's timing, so a replay does the same, but need
//! not see the same.

mod inventory;
mod killed;
pub mod plan;
mod pods;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use testkit::registry::Fault;

use crate::api::{Api, eventually_within};
use crate::cluster::{Beside, Cluster};
use crate::cri::Cri;
use crate::ledger;
use inventory::Inventory;
use killed::Killed;
use plan::{Action, Kind, Random, Registry, There};
use pods::Pods;

/// How long the state may take to converge after a round, on a machine that has other work as well: what is not there by then does
/// not come. (The longest grace period is 30 s, the longest back-off of one crash or some pulls 40 s.)
const CONVERGE: Duration = Duration::from_secs(600);
/// Pods that write all the time.
const WRITERS: usize = 2;
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const PODS: &str = "/api/v1/namespaces/default/pods";
/// The preload library of Debian's libfaketime, among the peers.
const FAKETIME: &str = "debian/libfaketime/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// How long, and from which seed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// No round begins after this.
    pub duration: Duration,
    /// Nor after so many rounds.
    pub rounds: usize,
    /// Every round kills the whole `coracle up`; so many deaths are enough.
    pub deaths: Option<usize>,
    /// The store is a real etcd.
    pub etcd: bool,
    /// The seed.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Rounds that were begun.
    pub rounds: usize,
    /// What was done, by its kind.
    pub actions: BTreeMap<&'static str, usize>,
    /// How often `coracle up` was killed.
    pub deaths: usize,
    /// The UIDs of the pods that were seen at the end of a round.
    pub pods: BTreeSet<String>,
    /// Log lines that were accounted for.
    pub lines: usize,
    /// Exit codes that were accounted for.
    pub exits: usize,
    /// What was acknowledged, printed or told, and is not there.
    pub lost: Vec<String>,
    /// What is there and should not be.
    pub leaked: Vec<String>,
    /// What did not converge.
    pub stuck: Vec<String>,
    /// Exit codes that nobody could see, with the deaths that are to blame. (The other case of DESIGN.md, terminal output in flight,
    /// does not come up: no pod has a terminal.)
    pub excused: Vec<String>,
}

impl Summary {
    /// Nothing was lost, leaked or stuck.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.leaked.is_empty() && self.stuck.is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, list) in [("lost", &self.lost), ("leaked", &self.leaked), ("stuck", &self.stuck), ("excused", &self.excused)] {
            for item in list {
                writeln!(f, "{kind}: {item}")?;
            }
        }
        for (action, count) in &self.actions {
            writeln!(f, "{count:6} {action}")?;
        }
        let (rounds, pods) = (self.rounds, self.pods.len());
        writeln!(f, "{rounds} rounds, {pods} pods, {} lines, {} exit codes", self.lines, self.exits)?;
        let (lost, leaked, stuck, excused) = (self.lost.len(), self.leaked.len(), self.stuck.len(), self.excused.len());
        write!(f, "{lost} lost, {leaked} leaked, {stuck} stuck; {excused} exits excused by DESIGN.md (keeper and shim both dead)")
    }
}

/// Runs a soak on a cluster of its own. The first round that is not clean ends it.
pub fn run(name: &str, options: Options) -> Result<Summary> {
    let clock = crate::peer(FAKETIME);
    if clock.is_none() {
        println!("no steps of the clock: there is no {FAKETIME} among the peers");
    }
    let etcd = if options.etcd { Some(crate::peer("etcd").context("there is no etcd among the peers")?) } else { None };
    let mut cluster = Cluster::start_beside(name, Beside { etcd, clock: clock.clone() })?;
    cluster.serve(pods::REPOSITORY, "v1", &crate::images::busybox("v1")?);
    let gates = cluster.folder().join("gates");
    std::fs::create_dir(&gates).with_context(|| format!("failed to create {}", gates.display()))?;
    let api = cluster.api();
    warm_up(&api)?;
    let before = Inventory::take(&cluster)?;

    let over = AtomicBool::new(false);
    let mut summary = Summary::default();
    let soaked = std::thread::scope(|scope| {
        let client = scope.spawn(|| ledger::write_until(&api, &over));
        let soaked = Killed::new().and_then(|killed| {
            let mut soak = Soak {
                api: &api,
                pods: Pods::new(&api, &gates, &cluster.folder().join("run")),
                cluster: &mut cluster,
                summary: &mut summary,
                random: Random::new(options.seed),
                killed,
                has_clock: clock.is_some(),
            };
            soak.rounds(options).and_then(|()| soak.remove_all())
        });
        over.store(true, Ordering::Relaxed);
        let ledger = client.join().map_err(|_| anyhow::anyhow!("the client panicked"));
        soaked.and(ledger)
    });
    let ledger = soaked.with_context(|| format!("{summary}\n--- coracle up\n{}", cluster.log_tail()))?;
    if let Err(error) = ledger.check(&api) {
        summary.lost.push(format!("{error:#}"));
    }
    if summary.is_clean() {
        summary.leaked.extend(before.left(&cluster, CONVERGE)?);
    }
    if !summary.is_clean() {
        println!("--- coracle up\n{}", cluster.log_tail());
    }
    cluster.down()?;
    Ok(summary)
}

/// What is made once, with the first pod, stays.
fn warm_up(api: &Api) -> Result<()> {
    api.create_pod(&pods::manifest("warm-up", &pods::image(1), "sleep 1000000", "Always", None))?;
    api.wait_ready("warm-up")?;
    api.delete_pod("warm-up")
}

struct Soak<'a> {
    api: &'a Api,
    cluster: &'a mut Cluster,
    pods: Pods<'a>,
    summary: &'a mut Summary,
    random: Random,
    killed: Killed,
    has_clock: bool,
}

impl Soak<'_> {
    fn rounds(&mut self, options: Options) -> Result<()> {
        let start = Instant::now();
        let kind = if options.deaths.is_some() { Kind::Deaths } else { Kind::Mixed };
        while start.elapsed() < options.duration
            && self.summary.rounds < options.rounds
            && options.deaths.is_none_or(|deaths| self.summary.deaths < deaths)
            && self.summary.is_clean()
        {
            self.pods.fill_up(WRITERS)?;
            self.converge();
            let deployments = self.deployments()?.len();
            let there = There { deployments, tasks: self.pods.tasks(), clock: self.has_clock, etcd: options.etcd };
            let actions = plan::round(&mut self.random, kind, &there);
            let told: Vec<String> = actions.iter().map(ToString::to_string).collect();
            println!("round {} at {:.0} s: {}", self.summary.rounds, start.elapsed().as_secs_f64(), told.join("; "));
            self.summary.rounds += 1;
            self.killed.begin();
            let alive = actions.iter().try_for_each(|action| self.apply(*action));
            let failed = alive.with_context(|| format!("in round {}", self.summary.rounds - 1));
            if self.cluster.pid().is_none() {
                self.cluster.up()?;
            }
            failed?;
            let began = Instant::now();
            self.converge();
            println!("    converged in {:.1} s", began.elapsed().as_secs_f64());
            self.pods.judge(&self.killed, self.summary)?;
        }
        Ok(())
    }

    /// Waits until all that is wanted is there, and nothing else.
    fn converge(&mut self) {
        let mut why = Vec::new();
        let converged = eventually_within(CONVERGE, "the state has converged", || {
            // A server whose store has just come back may refuse for a while.
            why = self.differences().unwrap_or_else(|error| vec![format!("{error:#}")]);
            Ok(why.is_empty())
        });
        if converged.is_err() {
            self.summary.stuck.append(&mut why);
        }
    }

    fn differences(&self) -> Result<Vec<String>> {
        let pods = items(&self.api.object(PODS)?);
        let deployments = self.deployments()?;
        let mut why = Vec::new();
        let mut wanted = 0;
        for deployment in &deployments {
            let number = |path: &str| deployment.pointer(path).and_then(Value::as_u64).unwrap_or(0);
            let replicas = number("/spec/replicas");
            wanted += replicas;
            let counts = ["/status/replicas", "/status/updatedReplicas", "/status/readyReplicas", "/status/availableReplicas"];
            let seen = number("/status/observedGeneration") == number("/metadata/generation");
            if !seen || counts.iter().any(|count| number(count) != replicas) {
                why.push(format!("deployment {} wants {replicas}: {}", name_of(deployment), deployment["status"]));
            }
        }
        let of_deployments: Vec<&Value> = pods.iter().filter(|pod| pods::is_of_deployment(pod)).collect();
        if of_deployments.len() as u64 != wanted {
            why.push(format!("{} pods of deployments, {wanted} are wanted", of_deployments.len()));
        }
        why.extend(of_deployments.iter().filter(|pod| !pods::is_ready(pod)).map(|pod| pods::describe(pod)));
        why.extend(self.pods.differences(&pods));
        let shims = self.cluster.table()?.all_shims().len();
        if shims > pods.len() {
            why.push(format!("{shims} shims, {} pods", pods.len()));
        }
        Ok(why)
    }

    fn deployments(&self) -> Result<Vec<Value>> {
        Ok(items(&self.api.object(DEPLOYMENTS)?))
    }

    fn apply(&mut self, action: Action) -> Result<()> {
        *self.summary.actions.entry(action.kind()).or_default() += 1;
        let time = |milliseconds: usize| Duration::from_millis(milliseconds as u64);
        match action {
            Action::Pause { milliseconds } => std::thread::sleep(time(milliseconds)),
            Action::CreateDeployment { replicas } => {
                let name = format!("churn-{}-{}", self.summary.rounds, self.random.below(1 << 20));
                self.ask("POST", DEPLOYMENTS, "application/json", &deployment(&name, &self.pods.image(), replicas).to_string())?;
            }
            Action::Scale { victim, replicas } => self.patch(victim, &json!({"spec": {"replicas": replicas}}))?,
            Action::Restart { victim } => {
                let stamp = self.random.below(1 << 30).to_string();
                self.patch(victim, &json!({"spec": {"template": {"metadata": {"annotations": {"restarted": stamp}}}}}))?;
            }
            Action::DeleteDeployment { victim } => {
                if let Some(name) = choose(&self.deployments()?, victim).map(name_of) {
                    self.ask("DELETE", &format!("{DEPLOYMENTS}/{name}"), "", "")?;
                }
            }
            Action::DeletePod { victim, grace_seconds } => {
                let pods: Vec<Value> = items(&self.api.object(PODS)?).into_iter().filter(pods::is_of_deployment).collect();
                if let Some(name) = choose(&pods, victim).map(name_of) {
                    self.ask("DELETE", &format!("{PODS}/{name}?gracePeriodSeconds={grace_seconds}"), "", "")?;
                }
            }
            Action::CreateTask { lines, code } => self.pods.create_task(lines, code)?,
            Action::Image { registry, requests } => self.serve(registry, requests)?,
            Action::Clock { seconds } => self.cluster.step_clock(seconds)?,
            Action::HangEtcd { milliseconds } => self.cluster.hang_etcd(time(milliseconds))?,
            Action::KillEtcd { milliseconds } => self.cluster.kill_etcd(time(milliseconds))?,
            Action::KillUp => self.kill_up()?,
            Action::KillStarting { milliseconds } => {
                self.cluster.spawn_up()?;
                std::thread::sleep(time(milliseconds));
                self.kill_up()?;
            }
            Action::KillKeeper | Action::KillShim { .. } | Action::KillContainer { .. } => self.kill(action)?,
        }
        Ok(())
    }

    /// Serves one more image, from a registry that misbehaves at first.
    fn serve(&mut self, registry: Registry, requests: usize) -> Result<()> {
        self.pods.images += 1;
        let version = format!("v{}", self.pods.images);
        self.cluster.serve(pods::REPOSITORY, &version, &crate::images::busybox(&version)?);
        let fault = match registry {
            Registry::Stalls { bytes } => Fault::Stall(bytes),
            Registry::BreaksOff { bytes } => Fault::BreakOff(bytes),
            Registry::Lies => Fault::Rubbish,
            Registry::IsBusy => Fault::Status(503),
        };
        self.cluster.fault(&format!("{}/", pods::REPOSITORY), fault, requests);
        Ok(())
    }

    fn kill_up(&mut self) -> Result<()> {
        if self.cluster.pid().is_some() {
            self.cluster.kill()?;
            self.summary.deaths += 1;
        }
        Ok(())
    }

    /// Kills the keeper, a shim or a container, and notes whose it was.
    fn kill(&mut self, action: Action) -> Result<()> {
        let table = self.cluster.table()?;
        let pid = match action {
            Action::KillShim { victim } => choose(&table.all_shims(), victim).map(|shim| {
                self.killed.shim(shim.sandbox().unwrap_or_default());
                shim.pid
            }),
            Action::KillContainer { victim } => self.pods.victim(&table, victim).map(|victim| {
                let pid = victim.pid;
                self.killed.containers.push(victim);
                pid
            }),
            _ => table.keeper().inspect(|_| self.killed.keeper()),
        };
        if let Some(pid) = pid {
            // It may have ended since it was seen.
            let _ = linux::process::kill(i32::try_from(pid)?, 9);
        }
        Ok(())
    }

    fn patch(&self, victim: usize, patch: &Value) -> Result<()> {
        match choose(&self.deployments()?, victim).map(name_of) {
            Some(name) => self.ask("PATCH", &format!("{DEPLOYMENTS}/{name}"), "application/merge-patch+json", &patch.to_string()),
            None => Ok(()),
        }
    }

    /// A change that must be acknowledged; what is gone already is well.
    fn ask(&self, method: &str, path: &str, content_type: &str, body: &str) -> Result<()> {
        match self.api.ask(method, path, content_type, body)? {
            (200 | 201 | 202 | 404, _) => Ok(()),
            (status, answer) => bail!("{method} {path}: {status}: {answer}"),
        }
    }

    /// Removes all that the soak made, and waits until it is gone.
    fn remove_all(&mut self) -> Result<()> {
        if !self.summary.is_clean() {
            return Ok(());
        }
        self.cluster.step_clock(0)?;
        for deployment in self.deployments()? {
            self.ask("DELETE", &format!("{DEPLOYMENTS}/{}", name_of(&deployment)), "", "")?;
        }
        self.pods.remove_all()?;
        let mut left = Vec::new();
        let gone = eventually_within(CONVERGE, "all pods are gone", || {
            left = items(&self.api.object(PODS)?);
            Ok(left.is_empty())
        });
        if gone.is_err() {
            self.summary.stuck.extend(left.iter().map(pods::describe));
        }
        let cri = Cri::connect(&self.cluster.cri_socket())?;
        for image in (2..=self.pods.images).map(pods::image) {
            cri.call("RemoveImage", &json!({"image": {"image": image}}))?.with_context(|| format!("failed to remove {image}"))?;
        }
        Ok(())
    }
}

/// The items of a list.
fn items(list: &Value) -> Vec<Value> {
    list["items"].as_array().cloned().unwrap_or_default()
}

fn name_of(object: &Value) -> &str {
    object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default()
}

fn choose<T>(list: &[T], victim: usize) -> Option<&T> {
    list.get(victim.checked_rem(list.len())?)
}

fn deployment(name: &str, image: &str, replicas: usize) -> Value {
    let mut template = pods::manifest(name, image, "trap 'exit 0' TERM; while :; do sleep 0.2; done", "Always", None);
    template["metadata"] = json!({"labels": {"app": name}});
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": {"metadata": template["metadata"], "spec": template["spec"]}},
    })
}
