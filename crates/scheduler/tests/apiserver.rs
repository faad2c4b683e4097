//! The scheduler on an API server: the real kube-apiserver, or ours (see `common`).

#[path = "../../controller-manager/tests/common/mod.rs"]
mod common;

use std::time::Duration;

use clap::Parser;
use common::{ApiServer, Kind, available, eventually};
use k8s_openapi::api::core::v1::{Event, Node, Pod, ServiceAccount};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use scheduler::Config;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

fn typed<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("object")
}

async fn pods_get_their_nodes(kind: Kind) {
    let server = ApiServer::start(&kind).await;
    let client = server.client().await;
    let kubeconfig = server.kubeconfig("scheduler");
    let config = Cli::try_parse_from(["x", "--kubeconfig", &kubeconfig]).expect("flags").config;
    let cancel = CancellationToken::new();
    let task = tokio::spawn(scheduler::run(config, cancel.clone()));

    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let account = typed(json!({"metadata": {"name": "default"}}));
    // The namespace itself is made by the server's own start-up hooks.
    eventually("service account", 20, || async { accounts.create(&PostParams::default(), &account).await.ok() }).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let nodes: Api<Node> = Api::all(client.clone());
    let pod = |name: &str, cpu: &str| -> Pod {
        typed(json!({"metadata": {"name": name}, "spec": {"containers": [
            {"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}]}}))
    };
    pods.create(&PostParams::default(), &pod("first", "1")).await.expect("create");
    let told = |pod: &Pod, text: &str| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "PodScheduled" && c.status == "False" && c.message.as_deref() == Some(text))
    };
    eventually("no nodes", 20, || async {
        let pod = pods.get("first").await.expect("get");
        told(&pod, "no nodes available to schedule pods").then_some(())
    })
    .await;

    let node: Node = typed(json!({"metadata": {"name": "n1"}, "spec": {"taints": []}}));
    nodes.create(&PostParams::default(), &node).await.expect("create");
    let status = json!({"status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10"},
        "capacity": {"cpu": "2", "memory": "4Gi", "pods": "10"}, "conditions": [{"type": "Ready", "status": "True"}]}});
    nodes.patch_status("n1", &PatchParams::default(), &Patch::Strategic(status)).await.expect("patch");
    let untainted = json!({"spec": {"taints": null}});
    nodes.patch("n1", &PatchParams::default(), &Patch::Strategic(untainted)).await.expect("patch");
    let bound = |name: &'static str| {
        let pods = pods.clone();
        async move {
            eventually(&format!("{name} is bound"), 20, || async {
                pods.get(name).await.expect("get").spec.and_then(|spec| spec.node_name)
            })
            .await
        }
    };
    assert_eq!(bound("first").await, "n1");

    pods.create(&PostParams::default(), &pod("large", "1500m")).await.expect("create");
    eventually("insufficient cpu", 20, || async {
        told(&pods.get("large").await.expect("get"), "0/1 nodes are available: 1 Insufficient cpu.").then_some(())
    })
    .await;
    pods.delete("first", &kube::api::DeleteParams::default().grace_period(0)).await.expect("delete");
    assert_eq!(bound("large").await, "n1");
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    eventually("events", 20, || async {
        let all = events.list(&ListParams::default()).await.expect("list").items;
        let has = |reason: &str, message: &str| {
            all.iter().any(|event| event.reason.as_deref() == Some(reason) && event.message.as_deref() == Some(message))
        };
        (has("Scheduled", "Successfully assigned default/large to n1")
            && has("FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu."))
        .then_some(())
    })
    .await;
    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(10), task).await.expect("in time").expect("task").expect("run");
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

on_each_server!(pods_get_their_nodes);
