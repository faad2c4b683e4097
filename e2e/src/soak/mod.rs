//! Random death during pod churn: every process of ours may be killed at any moment, and so may containers. After each round the
//! state must converge, and nothing that was acknowledged, printed or told as an exit code may be lost; at the end nothing may be
//! left behind.
//!
//! ```text
//! cluster -> warm-up -> what is there -> (round: changes, deaths -> converge -> judge)* -> all removed -> the same is there
//! ```
//!
//! The actions follow from the seed alone. What they meet follows from the machine's timing, so a replay does the same, but need
//! not see the same.

mod inventory;
pub mod plan;
mod pods;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::api::{Api, eventually_within};
use crate::cluster::Cluster;
use crate::ledger;
use inventory::Inventory;
use plan::{Action, Random, There};
use pods::{Pods, Victim};

/// How long the state may take to converge after a round. The longest grace period is 30 s, the longest back-off of one crash 10 s.
const CONVERGE: Duration = Duration::from_secs(180);
/// Pods that write all the time.
const WRITERS: usize = 2;
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// How long, and from which seed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// No round begins after this.
    pub duration: Duration,
    /// Nor after so many rounds.
    pub rounds: usize,
    /// The seed.
    pub seed: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Rounds that were begun.
    pub rounds: usize,
    /// How often each process was killed.
    pub kills: BTreeMap<&'static str, usize>,
    /// What was acknowledged, printed or told, and is not there.
    pub lost: Vec<String>,
    /// What is there and should not be.
    pub leaked: Vec<String>,
    /// What did not converge.
    pub stuck: Vec<String>,
    /// Exit codes that nobody could see, for keeper and shim were both dead.
    pub unseen_exits: usize,
}

impl Summary {
    /// Nothing was lost, leaked or stuck.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.leaked.is_empty() && self.stuck.is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, list) in [("lost", &self.lost), ("leaked", &self.leaked), ("stuck", &self.stuck)] {
            for item in list {
                writeln!(f, "{kind}: {item}")?;
            }
        }
        let kills: Vec<String> = self.kills.iter().map(|(what, count)| format!("{count} of {what}")).collect();
        writeln!(f, "{} rounds, kills: {}; {} exits unseen", self.rounds, kills.join(", "), self.unseen_exits)?;
        write!(f, "{} lost, {} leaked, {} stuck", self.lost.len(), self.leaked.len(), self.stuck.len())
    }
}

/// Runs a soak on a cluster of its own. The first round that is not clean ends it.
pub fn run(name: &str, options: Options) -> Result<Summary> {
    let mut cluster = Cluster::start(name)?;
    cluster.serve("tools", "v1", &crate::images::busybox("v1")?);
    let gates = cluster.folder().join("gates");
    std::fs::create_dir(&gates).with_context(|| format!("failed to create {}", gates.display()))?;
    let api = cluster.api();
    warm_up(&api)?;
    let before = Inventory::take(&cluster)?;

    let over = AtomicBool::new(false);
    let mut summary = Summary::default();
    let soaked = std::thread::scope(|scope| {
        let client = scope.spawn(|| ledger::write_until(&api, &over));
        let mut soak = Soak {
            api: &api,
            pods: Pods::new(&api, &gates),
            cluster: &mut cluster,
            summary: &mut summary,
            random: Random::new(options.seed),
        };
        let soaked = soak.rounds(options).and_then(|()| soak.remove_all());
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
    api.create_pod(&pods::manifest("warm-up", "sleep 1000000", "Always", None))?;
    api.wait_ready("warm-up")?;
    api.delete_pod("warm-up")
}

struct Soak<'a> {
    api: &'a Api,
    cluster: &'a mut Cluster,
    pods: Pods<'a>,
    summary: &'a mut Summary,
    random: Random,
}

impl Soak<'_> {
    fn rounds(&mut self, options: Options) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < options.duration && self.summary.rounds < options.rounds && self.summary.is_clean() {
            self.pods.fill_up(WRITERS)?;
            self.converge()?;
            let there = There { deployments: self.deployments()?.len(), tasks: self.pods.tasks() };
            let actions = plan::round(&mut self.random, &there);
            let told: Vec<String> = actions.iter().map(ToString::to_string).collect();
            println!("round {} at {:.0} s: {}", self.summary.rounds, start.elapsed().as_secs_f64(), told.join("; "));
            self.summary.rounds += 1;
            let alive = actions.iter().try_for_each(|action| self.apply(*action));
            let failed = alive.with_context(|| format!("in round {}", self.summary.rounds - 1));
            if self.cluster.pid().is_none() {
                self.cluster.up()?;
            }
            failed?;
            let began = Instant::now();
            self.converge()?;
            println!("    converged in {:.1} s", began.elapsed().as_secs_f64());
            self.pods.judge(self.summary)?;
        }
        Ok(())
    }

    /// Waits until all that is wanted is there, and nothing else.
    fn converge(&mut self) -> Result<()> {
        let mut why = Vec::new();
        let converged = eventually_within(CONVERGE, "the state has converged", || {
            why = self.differences()?;
            Ok(why.is_empty())
        });
        if let Err(error) = converged {
            ensure!(!why.is_empty(), error);
            self.summary.stuck.append(&mut why);
        }
        Ok(())
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
        match action {
            Action::Pause { milliseconds } => std::thread::sleep(Duration::from_millis(milliseconds as u64)),
            Action::CreateDeployment { replicas } => {
                let name = format!("churn-{}-{}", self.summary.rounds, self.random.below(1 << 20));
                self.ask("POST", DEPLOYMENTS, "application/json", &deployment(&name, replicas).to_string())?;
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
            Action::KillUp => {
                if self.cluster.pid().is_some() {
                    self.cluster.kill()?;
                    self.count("up");
                }
            }
            Action::KillKeeper => {
                if let Some(keeper) = self.cluster.table()?.keeper() {
                    self.pods.keeper_dies();
                    self.kill("keeper", keeper)?;
                }
            }
            Action::KillShim { victim } => {
                let table = self.cluster.table()?;
                let shims: Vec<u32> = table.all_shims().iter().map(|shim| shim.pid).collect();
                if let Some(shim) = choose(&shims, victim) {
                    self.pods.shim_dies();
                    self.kill("shim", *shim)?;
                }
            }
            Action::KillContainer { victim } => {
                let table = self.cluster.table()?;
                if let Some(Victim { pid }) = self.pods.victim(&table, victim) {
                    self.kill("container", pid)?;
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, what: &'static str) {
        *self.summary.kills.entry(what).or_default() += 1;
    }

    fn kill(&mut self, what: &'static str, pid: u32) -> Result<()> {
        self.count(what);
        // It may have ended since it was seen.
        let _ = linux::process::kill(i32::try_from(pid)?, 9);
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

fn deployment(name: &str, replicas: usize) -> Value {
    let mut template = pods::manifest(name, "trap 'exit 0' TERM; while :; do sleep 0.2; done", "Always", None);
    template["metadata"] = json!({"labels": {"app": name}});
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": {"metadata": template["metadata"], "spec": template["spec"]}},
    })
}
