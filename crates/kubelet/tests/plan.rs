//! Golden plans: each case of `tests/plan/*.yaml` is a pod, what the runtime holds, probe results, back-off and a
//! time; the plan is compared with the text that the file expects. The expectations were read off upstream's
//! `computePodActions` (v1.37) and its tests' cases.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kubelet::BackOff;
use kubelet::model::{Container, PodRuntime, RunState, Sandbox, container_hash, container_spec};
use kubelet::plan::{plan, restart_key};
use kubelet::probe::{Kind, Outcome, Results};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    pod: Value,
    #[serde(default)]
    deleted: bool,
    #[serde(default)]
    sandboxes: Vec<SandboxCase>,
    #[serde(default)]
    containers: Vec<ContainerCase>,
    #[serde(default)]
    probes: Vec<(String, String, String)>,
    /// (container, how often it crashed already at this second).
    #[serde(default)]
    backoff: Vec<(String, usize, i64)>,
    #[serde(default)]
    now: i64,
    expect: String,
}

#[derive(Deserialize)]
struct SandboxCase {
    id: String,
    #[serde(default)]
    attempt: u32,
    #[serde(default = "yes")]
    ready: bool,
    #[serde(default)]
    host_network: bool,
    #[serde(default = "ips")]
    ips: Vec<String>,
}

#[derive(Deserialize)]
struct ContainerCase {
    id: String,
    name: String,
    state: String,
    #[serde(default)]
    exit: i32,
    #[serde(default = "sandbox")]
    sandbox: String,
    #[serde(default)]
    finished: i64,
    #[serde(default)]
    changed: bool,
}

fn yes() -> bool {
    true
}

fn ips() -> Vec<String> {
    vec!["10.0.0.2".to_owned()]
}

fn sandbox() -> String {
    "s0".to_owned()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("small seconds are valid")
}

fn pod_of(case: &Case) -> Pod {
    let mut pod = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": case.pod});
    if case.deleted {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    serde_json::from_value(pod).unwrap_or_else(|e| panic!("{}: the pod does not parse: {e}", case.name))
}

/// The files list the newest first.
fn runtime_of(case: &Case, pod: &Pod) -> PodRuntime {
    let count = i64::try_from(case.containers.len()).expect("few");
    let sandboxes = case.sandboxes.iter().map(|s| Sandbox {
        id: s.id.clone(),
        attempt: s.attempt,
        ready: s.ready,
        created_at_ns: i64::from(s.attempt) + 1,
        host_network: s.host_network,
        has_network_status: true,
        ips: s.ips.clone(),
    });
    let containers = case.containers.iter().zip(0i64..).map(|(c, index)| Container {
        id: c.id.clone(),
        name: c.name.clone(),
        sandbox_id: c.sandbox.clone(),
        state: match c.state.as_str() {
            "created" => RunState::Created,
            "running" => RunState::Running,
            "exited" => RunState::Exited,
            "unknown" => RunState::Unknown,
            other => panic!("{}: state {other}", case.name),
        },
        restart_count: 0,
        hash: container_spec(pod, &c.name).map(|spec| container_hash(spec) + u64::from(c.changed)),
        created_at_ns: count - index,
        started_at: None,
        finished_at: (c.finished > 0).then(|| at(c.finished)),
        exit_code: c.exit,
        reason: String::new(),
        message: String::new(),
        image: String::new(),
        image_ref: String::new(),
        user: None,
        log_path: String::new(),
        termination_file: None,
        fallback_to_logs: false,
    });
    let mut runtime = PodRuntime { sandboxes: sandboxes.collect(), containers: containers.collect() };
    runtime.sort();
    runtime
}

fn probes_of(case: &Case) -> Results {
    let mut results = Results::default();
    for (id, kind, outcome) in &case.probes {
        let kind = match kind.as_str() {
            "startup" => Kind::Startup,
            "liveness" => Kind::Liveness,
            _ => Kind::Readiness,
        };
        let outcome = match outcome.as_str() {
            "success" => Outcome::Success,
            "failure" => Outcome::Failure,
            _ => Outcome::Unknown,
        };
        results.set(id, kind, outcome);
    }
    results
}

#[test]
fn golden() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plan");
    let mut count = 0;
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(directory).expect("the directory of cases") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let cases: Vec<Case> = serde_yaml_ng::from_str(&text).unwrap_or_else(|e| panic!("{} does not parse: {e}", path.display()));
        for case in cases {
            let pod = pod_of(&case);
            let mut backoff = BackOff::default();
            for (container, crashes, second) in &case.backoff {
                for _ in 0..*crashes {
                    backoff.next(&restart_key(&pod, container), at(*second), at(*second));
                }
            }
            let got = plan(&pod, &runtime_of(&case, &pod), &probes_of(&case), &backoff, at(case.now)).to_string();
            if got.trim() != case.expect.trim() {
                wrong.push(format!("== {}\nexpected:\n{}\ngot:\n{got}", case.name, case.expect));
            }
            count += 1;
        }
    }
    assert!(count >= 30, "only {count} cases were found");
    assert!(wrong.is_empty(), "{} of {count} cases differ:\n{}", wrong.len(), wrong.join("\n"));
}
