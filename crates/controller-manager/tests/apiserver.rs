//! The controllers on an API server: the real kube-apiserver, or ours (see `common`).

mod common;

use std::time::Duration;

use clap::Parser;
use common::{ApiServer, Kind, available, eventually};
use controller_manager::Config;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

struct Running {
    server: ApiServer,
    client: Client,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), controller_manager::Error>>,
}

impl Running {
    async fn start(kind: &Kind, flags: &[&str]) -> Self {
        let server = ApiServer::start(kind).await;
        let kubeconfig = server.kubeconfig("controller-manager");
        let root_ca = server.root_ca.display().to_string();
        let fixed = ["x", "--kubeconfig", &kubeconfig, "--root-ca-file", &root_ca, "--use-service-account-credentials=true"];
        let config = Cli::try_parse_from(fixed.iter().chain(flags)).expect("flags").config;
        let cancel = CancellationToken::new();
        let task = tokio::spawn(controller_manager::run(config, cancel.clone()));
        let client = server.client().await;
        Self { server, client, cancel, task }
    }

    async fn stop(self) {
        self.cancel.cancel();
        tokio::time::timeout(Duration::from_secs(10), self.task).await.expect("in time").expect("task").expect("run");
        drop(self.server);
    }
}

fn deployment(replicas: i32, image: &str) -> Deployment {
    serde_json::from_value(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}}
    }))
    .expect("deployment")
}

/// Plays kubelet: every pod runs and is ready.
async fn make_ready(pods: &Api<Pod>) {
    for pod in pods.list(&ListParams::default()).await.expect("list").items {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let ready = pod.status.as_ref().is_some_and(|s| s.conditions.iter().flatten().any(|c| c.type_ == "Ready"));
        if pod.metadata.deletion_timestamp.is_some() {
            let _ = pods.delete(&name, &DeleteParams::default().grace_period(0)).await;
        } else if !ready {
            let status = json!({"status": {"phase": "Running", "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
            let _ = pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await;
        }
    }
}

async fn rolled_out(client: &Client, seconds: u64, image: &str, replicas: i32) {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    eventually(&format!("{image} rolled out"), seconds, || async {
        make_ready(&pods).await;
        let d = deployments.get("web").await.expect("get");
        let status = d.status.clone().unwrap_or_default();
        let listed = pods.list(&ListParams::default()).await.expect("list").items;
        let images = listed.iter().flat_map(|pod| pod.spec.iter().flat_map(|spec| &spec.containers));
        let done = images.filter(|c| c.image.as_deref() == Some(image)).count() == replicas as usize
            && listed.len() == replicas as usize
            && status.available_replicas.unwrap_or(0) == replicas
            && status.observed_generation == d.metadata.generation;
        done.then_some(())
    })
    .await;
}

async fn a_deployment_lives_its_life(kind: Kind) {
    let running = Running::start(&kind, &[]).await;
    let client = running.client.clone();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "default");
    let replica_sets: Api<ReplicaSet> = Api::namespaced(client.clone(), "default");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    eventually("default service account", 30, || async { accounts.get_opt("default").await.expect("get") }).await;
    let ca = eventually("root CA", 30, || async { config_maps.get_opt("kube-root-ca.crt").await.expect("get") }).await;
    assert!(ca.data.expect("data")["ca.crt"].contains("BEGIN CERTIFICATE"));

    deployments.create(&PostParams::default(), &deployment(3, "a:1")).await.expect("create");
    rolled_out(&client, 30, "a:1", 3).await;
    let image = |image: &str| json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}});
    let patch = |body: serde_json::Value| {
        let deployments = deployments.clone();
        async move {
            deployments.patch("web", &PatchParams::default(), &Patch::Strategic(body)).await.expect("patch");
        }
    };
    patch(image("a:2")).await;
    rolled_out(&client, 60, "a:2", 3).await;
    let listed = replica_sets.list(&ListParams::default()).await.expect("list").items;
    assert_eq!(listed.len(), 2, "the old one stays for undo");
    let revision = |d: &Deployment| d.metadata.annotations.clone().unwrap_or_default()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision(&deployments.get("web").await.expect("get")), "2");

    // Undo is the old template again: the old ReplicaSet becomes revision 3.
    patch(image("a:1")).await;
    rolled_out(&client, 60, "a:1", 3).await;
    let d = deployments.get("web").await.expect("get");
    assert_eq!(revision(&d), "3");
    assert_eq!(replica_sets.list(&ListParams::default()).await.expect("list").items.len(), 2);
    let conditions = d.status.expect("status").conditions.expect("conditions");
    let reason = |kind: &str| conditions.iter().find(|c| c.type_.as_deref() == Some(kind)).and_then(|c| c.reason.clone());
    eventually("progress is told", 20, || async {
        let d = deployments.get("web").await.expect("get");
        let all = d.status.unwrap_or_default().conditions.unwrap_or_default();
        let done = all.iter().any(|c| c.reason.as_deref() == Some("NewReplicaSetAvailable"));
        done.then_some(())
    })
    .await;
    assert_eq!(reason("Available").as_deref(), Some("MinimumReplicasAvailable"));

    patch(json!({"spec": {"replicas": 1}})).await;
    rolled_out(&client, 30, "a:1", 1).await;
    patch(json!({"spec": {"strategy": {"type": "Recreate", "rollingUpdate": null}}})).await;
    patch(image("a:4")).await;
    rolled_out(&client, 60, "a:4", 1).await;
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    let told = events.list(&ListParams::default()).await.expect("list").items;
    assert!(told.iter().any(|event| event.reason.as_deref() == Some("ScalingReplicaSet")));
    assert!(told.iter().any(|event| event.reason.as_deref() == Some("SuccessfulCreate")));
    running.stop().await;
}

async fn a_namespace_goes_with_all_it_holds(kind: Kind) {
    let running = Running::start(&kind, &[]).await;
    let client = running.client.clone();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = serde_json::from_value(json!({"metadata": {"name": "goes"}})).expect("namespace");
    namespaces.create(&PostParams::default(), &namespace).await.expect("create");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "goes");
    eventually("default service account", 30, || async { accounts.get_opt("default").await.expect("get") }).await;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "goes");
    deployments.create(&PostParams::default(), &deployment(2, "a:1")).await.expect("create");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "goes");
    eventually("two pods", 30, || async { (pods.list(&ListParams::default()).await.expect("list").items.len() == 2).then_some(()) }).await;
    namespaces.delete("goes", &DeleteParams::default()).await.expect("delete");
    eventually("the namespace is gone", 60, || async {
        make_ready(&pods).await;
        namespaces.get_opt("goes").await.expect("get").is_none().then_some(())
    })
    .await;
    running.stop().await;
}

async fn garbage_is_collected_in_three_ways(kind: Kind) {
    let running = Running::start(&kind, &[]).await;
    let client = running.client.clone();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "default");
    let replica_sets: Api<ReplicaSet> = Api::namespaced(client.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    eventually("default service account", 30, || async { accounts.get_opt("default").await.expect("get") }).await;
    let counts = || async {
        let sets = replica_sets.list(&ListParams::default()).await.expect("list").items.len();
        (sets, pods.list(&ListParams::default()).await.expect("list").items.len())
    };
    for policy in [DeleteParams::background(), DeleteParams::foreground()] {
        deployments.create(&PostParams::default(), &deployment(2, "a:1")).await.expect("create");
        eventually("two pods", 30, || async { (counts().await == (1, 2)).then_some(()) }).await;
        deployments.delete("web", &policy).await.expect("delete");
        eventually(&format!("all gone with {policy:?}"), 60, || async {
            make_ready(&pods).await;
            (deployments.get_opt("web").await.expect("get").is_none() && counts().await == (0, 0)).then_some(())
        })
        .await;
    }
    deployments.create(&PostParams::default(), &deployment(2, "a:1")).await.expect("create");
    eventually("two pods", 30, || async { (counts().await == (1, 2)).then_some(()) }).await;
    deployments.delete("web", &DeleteParams::orphan()).await.expect("delete");
    eventually("the ReplicaSet is let go", 60, || async {
        let gone = deployments.get_opt("web").await.expect("get").is_none();
        let sets = replica_sets.list(&ListParams::default()).await.expect("list").items;
        let free = sets.iter().all(|rs| rs.metadata.owner_references.iter().flatten().next().is_none());
        (gone && free && sets.len() == 1).then_some(())
    })
    .await;
    assert_eq!(counts().await, (1, 2));
    running.stop().await;
}

async fn a_silent_node_is_tainted_and_left(kind: Kind) {
    let flags = ["--node-monitor-grace-period", "3s", "--node-monitor-period", "500ms"];
    let running = Running::start(&kind, &flags).await;
    let client = running.client.clone();
    let nodes: Api<Node> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    eventually("default service account", 30, || async { accounts.get_opt("default").await.expect("get") }).await;
    let beat = |name: &'static str, n: i64| {
        let nodes = nodes.clone();
        async move {
            let time = jiff::Timestamp::from_second(1_700_000_000 + n).expect("time").to_string();
            let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady",
                "message": "m", "lastHeartbeatTime": time, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
            nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await.expect("beat");
        }
    };
    for name in ["alive", "silent"] {
        let node = serde_json::from_value(json!({"metadata": {"name": name}})).expect("node");
        nodes.create(&PostParams::default(), &node).await.expect("create");
        beat(name, 0).await;
    }
    let taints = |name: &'static str| {
        let nodes = nodes.clone();
        async move {
            let spec = nodes.get(name).await.expect("get").spec.unwrap_or_default();
            spec.taints.iter().flatten().map(|t| format!("{}:{}", t.key, t.effect)).collect::<Vec<_>>()
        }
    };
    let pod = |name: &str, seconds: Option<i64>| -> Pod {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"nodeName": "silent",
            "containers": [{"name": "c", "image": "i"}],
            "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": seconds}]}}))
        .expect("pod")
    };
    pods.create(&PostParams::default(), &pod("leaves", Some(1))).await.expect("create");
    pods.create(&PostParams::default(), &pod("stays", None)).await.expect("create");
    make_ready(&pods).await;
    let mut n = 0;
    loop {
        n += 1;
        assert!(n < 300, "the silent node was not left: {:?}", taints("silent").await);
        beat("alive", n).await;
        let pod = pods.get_opt("leaves").await.expect("get");
        if pod.is_none_or(|pod| pod.metadata.deletion_timestamp.is_some()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(taints("silent").await, ["node.kubernetes.io/unreachable:NoSchedule", "node.kubernetes.io/unreachable:NoExecute"]);
    assert_eq!(taints("alive").await, Vec::<String>::new());
    let stays = pods.get("stays").await.expect("get");
    assert!(stays.metadata.deletion_timestamp.is_none());
    let conditions = stays.status.expect("status").conditions.expect("conditions");
    assert!(conditions.iter().any(|c| c.type_ == "Ready" && c.status == "False"), "{conditions:?}");
    beat("silent", n).await;
    eventually("it is back", 20, || async { taints("silent").await.is_empty().then_some(()) }).await;
    running.stop().await;
}

/// Addresses and conditions (ready, serving, terminating) in the slices of the Service `web`.
async fn endpoints(slices: &Api<EndpointSlice>) -> Vec<(String, [bool; 3])> {
    let listed = slices.list(&ListParams::default().labels("kubernetes.io/service-name=web")).await.expect("list").items;
    let all = listed.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    let mut found: Vec<_> = all
        .map(|endpoint| {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let set = [conditions.ready, conditions.serving, conditions.terminating].map(|condition| condition == Some(true));
            (endpoint.addresses.join(","), set)
        })
        .collect();
    found.sort();
    found
}

async fn a_service_has_its_slices(kind: Kind) {
    let running = Running::start(&kind, &[]).await;
    let client = running.client.clone();
    let (nodes, pods): (Api<Node>, Api<Pod>) = (Api::all(client.clone()), Api::namespaced(client.clone(), "default"));
    let (services, slices): (Api<Service>, Api<EndpointSlice>) =
        (Api::namespaced(client.clone(), "default"), Api::namespaced(client.clone(), "default"));
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    eventually("default service account", 30, || async { accounts.get_opt("default").await.expect("get") }).await;
    nodes.create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": "n"}})).expect("node")).await.expect("create");
    let service = serde_json::from_value(json!({"metadata": {"name": "web", "labels": {"team": "a"}},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}}))
    .expect("service");
    services.create(&PostParams::default(), &service).await.expect("create");
    eventually("the placeholder", 30, || async {
        let listed = slices.list(&ListParams::default().labels("kubernetes.io/service-name=web")).await.expect("list").items;
        let [slice] = listed.as_slice() else { return None };
        let labels = slice.metadata.labels.clone().unwrap_or_default();
        assert_eq!(labels.get("endpointslice.kubernetes.io/managed-by").map(String::as_str), Some("endpointslice-controller.k8s.io"));
        assert_eq!(labels.get("team").map(String::as_str), Some("a"));
        assert_eq!(slice.metadata.owner_references.iter().flatten().next().map(|owner| owner.kind.as_str()), Some("Service"));
        Some(())
    })
    .await;
    for (name, address) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        let pod = json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": {"nodeName": "n",
            "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}]}]}});
        pods.create(&PostParams::default(), &serde_json::from_value(pod).expect("pod")).await.expect("create");
        let status = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": if name == "a" { "True" } else { "False" }}]}});
        pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await.expect("status");
    }
    let at = |last: u8, conditions: [bool; 3]| (format!("10.0.0.{last}"), conditions);
    let become_so = |wanted: Vec<(String, [bool; 3])>| {
        let slices = slices.clone();
        async move {
            eventually(&format!("{wanted:?}"), 30, || async { (endpoints(&slices).await == wanted).then_some(()) }).await;
        }
    };
    become_so(vec![at(1, [true, true, false]), at(2, [false, false, false])]).await;
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    pods.patch_status("b", &PatchParams::default(), &Patch::Strategic(ready)).await.expect("status");
    become_so(vec![at(1, [true, true, false]), at(2, [true, true, false])]).await;
    pods.delete("a", &DeleteParams::default()).await.expect("delete");
    become_so(vec![at(1, [false, true, true]), at(2, [true, true, false])]).await;
    pods.delete("a", &DeleteParams::default().grace_period(0)).await.expect("delete");
    become_so(vec![at(2, [true, true, false])]).await;
    // Somebody else's change is undone, a slice that was deleted comes back, and all go with the Service.
    let name =
        slices.list(&ListParams::default().labels("kubernetes.io/service-name=web")).await.expect("list").items[0].metadata.name.clone();
    let name = name.expect("name");
    slices.patch(&name, &PatchParams::default(), &Patch::Merge(json!({"endpoints": []}))).await.expect("patch");
    become_so(vec![at(2, [true, true, false])]).await;
    slices.delete(&name, &DeleteParams::default()).await.expect("delete");
    become_so(vec![at(2, [true, true, false])]).await;
    services.delete("web", &DeleteParams::default()).await.expect("delete");
    eventually("no slice is left", 60, || async {
        let listed = slices.list(&ListParams::default().labels("kubernetes.io/service-name=web")).await.expect("list").items;
        listed.is_empty().then_some(())
    })
    .await;
    running.stop().await;
}

/// Makes a test of each case, on each server that is there.
macro_rules! on_each_server {
    ($($case:ident),+ $(,)?) => {
        mod on_each_server {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    for kind in super::available(stringify!($case)) {
                        eprintln!("on {kind:?}");
                        super::$case(kind).await;
                    }
                }
            )+
        }
    };
}

on_each_server!(
    a_deployment_lives_its_life,
    a_namespace_goes_with_all_it_holds,
    garbage_is_collected_in_three_ways,
    a_silent_node_is_tainted_and_left,
    a_service_has_its_slices
);
