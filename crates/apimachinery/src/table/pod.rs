//! The row of a pod: what READY, STATUS and RESTARTS show.

use serde_json::{Value, json};

use super::View;
use crate::tree::Tree;

/// Sums over container statuses.
#[derive(Default)]
struct Tally<'a> {
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: &'a str,
}

impl<'a> Tally<'a> {
    fn count(&mut self, status: &'a Tree<'a>) {
        self.restarts += status.get("restartCount").and_then(Tree::as_i64).unwrap_or(0);
        let finished = status.pointer("/lastState/terminated/finishedAt").and_then(Tree::as_str).unwrap_or("");
        // Canonical times compare as texts.
        if finished > self.last_restart {
            self.last_restart = finished;
        }
    }
}

fn is_true(value: &Tree<'_>, key: &str) -> bool {
    value.get(key) == Some(&Tree::Bool(true))
}

fn text<'a>(value: &'a Tree<'_>, path: &str) -> &'a str {
    value.pointer(path).and_then(Tree::as_str).unwrap_or("")
}

fn condition_is_true(pod: &View<'_>, kind: &str) -> bool {
    pod.list("/status/conditions").iter().any(|condition| condition["type"] == kind && condition["status"] == "True")
}

pub(super) fn cells(pod: &View<'_>) -> Vec<Value> {
    let phase = pod.text("/status/phase");
    let mut reason = match pod.text("/status/reason") {
        "" => phase.to_owned(),
        reason => reason.to_owned(),
    };
    let gated = |condition: &&Tree<'_>| condition["type"] == "PodScheduled" && condition["reason"] == "SchedulingGated";
    if pod.list("/status/conditions").iter().any(|condition| gated(&condition)) {
        "SchedulingGated".clone_into(&mut reason);
    }
    let mut tally = Tally { total: pod.list("/spec/containers").len(), ..Tally::default() };
    let mut sidecars = Tally::default();
    let initializing = init_containers(pod, &mut tally, &mut sidecars);
    if let Some(init) = &initializing {
        reason.clone_from(init);
    }
    if initializing.is_none() || condition_is_true(pod, "Initialized") {
        tally.restarts = sidecars.restarts;
        tally.last_restart = sidecars.last_restart;
        main_containers(pod, &mut tally, &mut reason);
    }
    let deleted = pod.get("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null());
    if deleted && pod.text("/status/reason") == "NodeLost" {
        "Unknown".clone_into(&mut reason);
    } else if deleted && !matches!(phase, "Succeeded" | "Failed") {
        "Terminating".clone_into(&mut reason);
    }
    let mut restarts = tally.restarts.to_string();
    if tally.restarts != 0 && !tally.last_restart.is_empty() {
        restarts = format!("{restarts} ({} ago)", pod.since(tally.last_restart));
    }
    vec![
        pod.name(),
        format!("{}/{}", tally.ready, tally.total).into(),
        reason.into(),
        restarts.into(),
        pod.age(),
        pod.cell_or("/status/podIPs/0/ip", "<none>"),
        pod.cell_or("/spec/nodeName", "<none>"),
        pod.cell_or("/status/nominatedNodeName", "<none>"),
        readiness_gates(pod).into(),
    ]
}

/// What a row says of a pod that has ended.
pub(super) fn conditions(pod: &View<'_>) -> Option<Value> {
    let (reason, message) = match pod.text("/status/phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]))
}

/// Counts init containers; the reason to show while one of them is not done.
fn init_containers<'a>(pod: &View<'a>, tally: &mut Tally<'a>, sidecars: &mut Tally<'a>) -> Option<String> {
    let specs = pod.list("/spec/initContainers");
    let is_sidecar = |name: &str| specs.iter().any(|spec| text(spec, "/name") == name && spec["restartPolicy"] == "Always");
    tally.total += specs.iter().filter(|spec| spec["restartPolicy"] == "Always").count();
    for (index, status) in pod.list("/status/initContainerStatuses").iter().enumerate() {
        tally.count(status);
        let sidecar = is_sidecar(text(status, "/name"));
        if sidecar {
            sidecars.count(status);
        }
        let terminated = status.pointer("/state/terminated");
        let waiting = text(status, "/state/waiting/reason");
        let exit_code = terminated.and_then(|state| state.get("exitCode")).and_then(Tree::as_i64).unwrap_or(0);
        return Some(match terminated {
            Some(_) if exit_code == 0 => continue,
            _ if sidecar && is_true(status, "started") => {
                tally.ready += usize::from(is_true(status, "ready"));
                continue;
            }
            Some(state) => match (text(state, "/reason"), state.get("signal").and_then(Tree::as_i64).unwrap_or(0)) {
                ("", 0) => format!("Init:ExitCode:{exit_code}"),
                ("", signal) => format!("Init:Signal:{signal}"),
                (reason, _) => format!("Init:{reason}"),
            },
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{index}/{}", specs.len()),
        });
    }
    None
}

fn main_containers<'a>(pod: &View<'a>, tally: &mut Tally<'a>, reason: &mut String) {
    let (mut running, mut error) = (false, String::new());
    for status in pod.list("/status/containerStatuses").iter().rev() {
        tally.count(status);
        let waiting = text(status, "/state/waiting/reason");
        if !waiting.is_empty() {
            waiting.clone_into(reason);
        } else if let Some(state) = status.pointer("/state/terminated") {
            let number = |key: &str| state.get(key).and_then(Tree::as_i64).unwrap_or(0);
            *reason = match (text(state, "/reason"), number("signal")) {
                ("", 0) => format!("ExitCode:{}", number("exitCode")),
                ("", signal) => format!("Signal:{signal}"),
                (found, _) => found.to_owned(),
            };
            if number("exitCode") != 0 {
                error.clone_from(reason);
            }
        } else if is_true(status, "ready") && status.pointer("/state/running").is_some() {
            running = true;
            tally.ready += 1;
        }
    }
    if reason == "Completed" {
        if running && condition_is_true(pod, "Ready") {
            "Running".clone_into(reason);
        } else if !error.is_empty() {
            *reason = error;
        } else if running {
            "NotReady".clone_into(reason);
        }
    }
}

fn readiness_gates(pod: &View<'_>) -> String {
    let gates = pod.list("/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let open = gates.iter().filter(|gate| condition_is_true(pod, text(gate, "/conditionType"))).count();
    format!("{open}/{}", gates.len())
}
