//! A worker's life against a CRI runtime and an API server in this process: which calls, in which order.

mod mock;

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use client::{EventRecorder, Informer};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use self::mock::Mock;
use crate::cri::NodeFacts;
use crate::events::Recorder;
use crate::kubelet::{Kubelet, Live};
use crate::runtime::Runtime;
use crate::status::Verdict;
use crate::status_writer::{self, Wanted};
use crate::worker::{Desired, Worker};

const PATIENCE: Duration = Duration::from_secs(60);

/// What the fake server was told: the pod's status as patched, and whether it was deleted.
#[derive(Clone, Default)]
struct Api(Arc<Mutex<(Value, bool)>>);

impl Api {
    fn status(&self) -> Value {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn deleted(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn client(&self, pod: Value) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let (api, pod) = (api.clone(), pod.clone());
            async move { Ok::<_, std::convert::Infallible>(api.answer(request, pod).await) }
        });
        kube::Client::new(service, "default")
    }

    async fn answer(&self, request: http::Request<Body>, mut pod: Value) -> http::Response<Body> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let body = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = |code: u16, value: &Value| {
            let response = http::Response::builder().status(code);
            response.body(Body::from(value.to_string().into_bytes())).expect("a valid response")
        };
        if method == "PATCH" && path.ends_with("/pods/p/status") {
            let patch: Value = serde_json::from_slice(&body).expect("a JSON patch");
            assert_eq!(patch["metadata"]["uid"], "u", "the uid is the precondition");
            merge(&mut state.0, &patch["status"]);
            pod["status"] = state.0.clone();
            pod["metadata"]["resourceVersion"] = json!("1000");
            return reply(200, &pod);
        }
        if method == "DELETE" && path.ends_with("/pods/p") {
            state.1 = true;
            return reply(200, &pod);
        }
        let missing =
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404, "message": "not found"});
        reply(404, &missing)
    }
}

/// As the server merges a status: conditions by type, all else whole.
fn merge(status: &mut Value, patch: &Value) {
    if !status.is_object() {
        *status = json!({});
    }
    for (key, value) in patch.as_object().into_iter().flatten() {
        if key.starts_with('$') {
            continue;
        }
        if key != "conditions" {
            status[key] = value.clone();
            continue;
        }
        let mut list = status[key].as_array().cloned().unwrap_or_default();
        for condition in value.as_array().into_iter().flatten() {
            list.retain(|c| c["type"] != condition["type"]);
            list.push(condition.clone());
        }
        status[key] = Value::Array(list);
    }
}

struct Rig {
    mock: Mock,
    api: Api,
    desired: watch::Sender<Desired>,
    wake: Arc<Notify>,
    cancel: CancellationToken,
    worker: tokio::task::JoinHandle<()>,
    pod: Value,
    _root: tempfile::TempDir,
}

fn config(root: &std::path::Path) -> crate::Config {
    #[derive(clap::Parser)]
    struct Args {
        #[command(flatten)]
        config: crate::Config,
    }
    let root = root.display();
    let words = ["kubelet", "--kubeconfig=/none", "--port=0", "--cgroups-per-qos=false"].map(str::to_owned);
    let paths = [format!("--root-dir={root}/k"), format!("--pod-logs-dir={root}/logs")];
    let args: Args = clap::Parser::parse_from(words.into_iter().chain(paths));
    args.config
}

impl Rig {
    fn new(mock: Mock, spec: Value) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let socket = root.path().join("cri.sock");
        mock.serve(&socket);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": "1", "generation": 1},
            "spec": spec,
        });
        let api = Api::default();
        let client = api.client(pod.clone());
        let config = config(root.path());
        let log_root = config.pod_logs_dir.display().to_string();
        let kubelet = Arc::new(Kubelet {
            client: client.clone(),
            runtime: Runtime::new(&socket.display().to_string(), None).expect("a socket path"),
            recorder: Recorder::new(EventRecorder::new("kubelet", "node")),
            node_name: "node".into(),
            facts: NodeFacts { memory_bytes: 1 << 30, log_root, ..NodeFacts::default() },
            services: Informer::new(),
            node: Informer::new(),
            started: Timestamp::now(),
            images: Mutex::default(),
            live: RwLock::new(Live { host_ips: vec!["192.0.2.1".into()], runtime_name: "mock".into(), ..Live::default() }),
            config,
        });
        let typed: Pod = serde_json::from_value(pod.clone()).expect("a literal pod");
        let (desired, desired_rx) = watch::channel(Desired { pod: Arc::new(typed), removed: false, evicted: None });
        let (statuses, statuses_rx) = watch::channel(Wanted::default());
        let wake = Arc::new(Notify::new());
        tokio::spawn(status_writer::run(client, statuses_rx));
        let worker = Worker::new(kubelet, desired_rx, wake.clone(), statuses, None);
        let cancel = CancellationToken::new();
        let worker = tokio::spawn(worker.run(cancel.clone()));
        Self { mock, api, desired, wake, cancel, worker, pod, _root: root }
    }

    /// Polls until the condition holds.
    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !condition(self) {
            let late = tokio::time::Instant::now() > deadline;
            assert!(!late, "{what} did not come; calls {:#?}, status {}", self.mock.world().calls, self.api.status());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn exit(&self, name: &str, code: i32) {
        self.mock.exit(name, code);
        self.wake.notify_one();
    }

    fn calls(&self) -> Vec<String> {
        self.mock.world().calls.clone()
    }

    fn delete(&mut self, grace: i64) {
        self.pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        self.pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        let pod: Pod = serde_json::from_value(self.pod.clone()).expect("a literal pod");
        self.desired.send_modify(|d| d.pod = Arc::new(pod));
    }
}

fn condition(status: &Value, type_: &str) -> String {
    let conditions = status["conditions"].as_array();
    let found = conditions.into_iter().flatten().find(|c| c["type"] == type_);
    found.and_then(|c| c["status"].as_str()).unwrap_or("").to_owned()
}

#[tokio::test]
async fn init_then_containers_then_deletion_with_grace() {
    let spec = json!({
        "terminationGracePeriodSeconds": 30,
        "initContainers": [{"name": "i", "image": "x:1"}, {"name": "s", "image": "x:1", "restartPolicy": "Always"}],
        "containers": [{"name": "c", "image": "x:1"}],
    });
    let mut rig = Rig::new(Mock::default(), spec);
    rig.until("the init container", |r| r.calls().contains(&"StartContainer i0".to_owned())).await;
    rig.until("phase Pending", |r| r.api.status()["phase"] == "Pending").await;
    rig.exit("i", 0);
    rig.until("readiness", |r| condition(&r.api.status(), "Ready") == "True").await;
    let status = rig.api.status();
    assert_eq!(status["phase"], "Running");
    assert_eq!(status["podIP"], "10.1.2.3");
    assert_eq!(status["hostIP"], "192.0.2.1");
    assert_eq!(status["containerStatuses"][0]["containerID"], "mock://c0");
    rig.delete(5);
    rig.until("the deletion", |r| r.api.deleted()).await;
    let expected = [
        "RunPodSandbox attempt 0",
        "CreateContainer i0 log i/0.log",
        "StartContainer i0",
        "CreateContainer s0 log s/0.log",
        "StartContainer s0",
        "CreateContainer c0 log c/0.log",
        "StartContainer c0",
        "StopContainer c0 grace 5",
        "StopContainer s0 grace 5",
        "StopPodSandbox s0",
    ];
    let calls = rig.calls();
    assert_eq!(calls[..expected.len()], expected, "the sidecar ends last");
    assert!(rig.mock.world().containers.is_empty() && rig.mock.world().sandboxes.is_empty(), "nothing is left");
    rig.desired.send_modify(|d| d.removed = true);
    tokio::time::timeout(PATIENCE, rig.worker).await.expect("the worker ends").expect("without a panic");
}

#[tokio::test]
async fn a_crash_restarts_at_once_and_then_after_the_back_off() {
    let rig = Rig::new(Mock::default(), json!({"containers": [{"name": "c", "image": "x:1"}]}));
    rig.until("the start", |r| r.calls().contains(&"StartContainer c0".to_owned())).await;
    rig.exit("c", 1);
    rig.until("the restart", |r| r.calls().contains(&"StartContainer c1".to_owned())).await;
    rig.exit("c", 2);
    let reason = |r: &Rig| r.api.status()["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    rig.until("the back-off", |r| reason(r) == "CrashLoopBackOff").await;
    let status = rig.api.status();
    let container = &status["containerStatuses"][0];
    assert_eq!(container["state"]["waiting"]["message"], "back-off 10s restarting failed container=c pod=p_n(u)");
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 2);
    assert_eq!(container["restartCount"], 1);
    assert_eq!(status["phase"], "Running");
    rig.until("one dead container of a name is kept", |r| r.calls().contains(&"RemoveContainer c0".to_owned())).await;
    rig.cancel.cancel();
}

#[tokio::test]
async fn what_runs_is_taken_over() {
    let spec = json!({"containers": [{"name": "c", "image": "x:1"}]});
    let mock = Mock::default();
    let first = Rig::new(mock.clone(), spec.clone());
    first.until("readiness", |r| condition(&r.api.status(), "Ready") == "True").await;
    first.cancel.cancel();
    first.worker.await.expect("without a panic");
    let before = mock.world().calls.clone();
    let second = Rig::new(mock.clone(), spec);
    second.until("readiness", |r| condition(&r.api.status(), "Ready") == "True").await;
    assert_eq!(mock.world().calls, before, "nothing is made, stopped or removed");
    second.cancel.cancel();
}

#[tokio::test]
async fn a_pod_that_succeeds_is_over() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "x:1"}]});
    let rig = Rig::new(Mock::default(), spec);
    rig.until("the start", |r| r.calls().contains(&"StartContainer c0".to_owned())).await;
    rig.exit("c", 0);
    rig.until("phase Succeeded", |r| r.api.status()["phase"] == "Succeeded").await;
    assert_eq!(condition(&rig.api.status(), "Initialized"), "True");
    assert_eq!(condition(&rig.api.status(), "Ready"), "False");
    assert!(rig.calls().contains(&"StopPodSandbox s0".to_owned()));
    assert!(!rig.calls().iter().any(|c| c.starts_with("RemoveContainer")), "its log can still be read");
    rig.cancel.cancel();
}

#[tokio::test]
async fn images_that_cannot_be_had_are_told() {
    let spec = json!({"containers": [
        {"name": "a", "image": "UPPER"},
        {"name": "b", "image": "absent:1", "imagePullPolicy": "Never"},
        {"name": "c", "image": "absent:1"},
        {"name": "d", "image": "x:1", "env": [{"name": "E", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]},
    ]});
    let rig = Rig::new(Mock::default(), spec);
    let reasons = |r: &Rig| -> Vec<String> {
        let status = r.api.status();
        let list = status["containerStatuses"].as_array().cloned().unwrap_or_default();
        list.iter().map(|c| c["state"]["waiting"]["reason"].as_str().unwrap_or("").to_owned()).collect()
    };
    let expected = ["InvalidImageName", "ErrImageNeverPull", "ErrImagePull", "CreateContainerConfigError"];
    rig.until("the reasons", |r| reasons(r) == expected).await;
    let status = rig.api.status();
    assert_eq!(status["containerStatuses"][3]["state"]["waiting"]["message"], "configmap \"m\" not found");
    assert_eq!(status["phase"], "Pending");
    rig.cancel.cancel();
}

#[tokio::test]
async fn pull_policies_are_kept() {
    // The image is there, and pulling fails: who insists on pulling does not start.
    let spec = json!({"containers": [
        {"name": "a", "image": "x:1", "imagePullPolicy": "Always"},
        {"name": "i", "image": "x:1", "imagePullPolicy": "IfNotPresent"},
        {"name": "n", "image": "x:1", "imagePullPolicy": "Never"},
    ]});
    let rig = Rig::new(Mock::default(), spec);
    let state = |r: &Rig, at: usize| r.api.status()["containerStatuses"][at]["state"].clone();
    rig.until("the pull", |r| state(r, 0)["waiting"]["reason"] == "ErrImagePull").await;
    rig.until("the others", |r| state(r, 1)["running"].is_object() && state(r, 2)["running"].is_object()).await;
    rig.cancel.cancel();
}

#[tokio::test]
async fn an_evicted_pod_gets_little_time_and_says_why() {
    let spec = json!({"terminationGracePeriodSeconds": 30, "containers": [{"name": "c", "image": "x:1"}]});
    let rig = Rig::new(Mock::default(), spec);
    rig.until("readiness", |r| condition(&r.api.status(), "Ready") == "True").await;
    let verdict = Verdict { disruption: true, ..crate::eviction::immediate("The node was low on resource: memory. ".to_owned()) };
    rig.desired.send_modify(|d| d.evicted = Some(verdict));
    rig.until("phase Failed", |r| r.api.status()["phase"] == "Failed").await;
    let status = rig.api.status();
    assert_eq!((status["reason"].as_str(), status["message"].as_str()), (Some("Evicted"), Some("The node was low on resource: memory. ")));
    assert_eq!(condition(&status, "DisruptionTarget"), "True");
    assert!(rig.calls().contains(&"StopContainer c0 grace 2".to_owned()), "{:?}", rig.calls());
    rig.cancel.cancel();
}
