//! What the tests do with the real kubectl: every command, its output checked. A cluster of any form can be put under it.

mod sessions;
mod streams;

pub use sessions::over_a_restart;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cluster::Cluster;
use crate::script::{Step, play, step};

/// Every kubectl that there is: 1.37 built by Go, and the machine's own (an older minor version).
pub fn clients() -> Vec<PathBuf> {
    let own = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|folder| folder.join("kubectl")).find(|path| path.is_file()));
    let mut all: Vec<PathBuf> = Vec::new();
    match crate::peer("kubectl") {
        Some(kubectl) => all.push(kubectl),
        None => crate::skip("kubectl_1_37", "there is no kubectl 1.37: it is built by Go"),
    }
    match own {
        Some(kubectl) => all.push(kubectl),
        None => crate::skip("kubectl_of_the_machine", "there is no kubectl on PATH"),
    }
    all
}

/// Serves the images that [`commands`] uses.
///
/// # Errors
/// Debian's busybox-static is missing.
pub fn serve_images(cluster: &Cluster) -> Result<()> {
    for tag in ["v1", "v2"] {
        cluster.serve("tools", tag, &crate::images::busybox(tag)?);
    }
    Ok(())
}

/// Plays all commands with one kubectl. The cluster must serve the image `tools`, tags `v1` and `v2` ([`serve_images`]).
///
/// # Errors
/// What every step that failed printed.
pub fn commands(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let file = |name: &str, text: &str| -> Result<String> {
        let path = cluster.folder().join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let deployment = file("web.yaml", include_str!("../data/web.yaml"))?;
    let pod = file("pod.yaml", include_str!("../data/pod.yaml"))?;
    play(cluster, kubectl, &discovery(cluster.runtime()))?;
    play(cluster, kubectl, &workloads(&deployment, cluster.pod_prefix()))?;
    play(cluster, kubectl, &pods(&pod))?;
    sessions::check(cluster, kubectl)?;
    play(cluster, kubectl, &pods_end())?;
    play(cluster, kubectl, &objects())?;
    play(cluster, kubectl, &edits(cluster.folder())?)?;
    streams::check(cluster, kubectl)
}

fn discovery(runtime: &str) -> Vec<Step> {
    vec![
        step("version").prints("Server Version: v1.37"),
        step("cluster-info").prints("is running at"),
        step("api-resources").prints("deployments").prints("apps/v1").prints("clusterrolebindings"),
        step("get nodes -o wide").prints("Ready").prints("INTERNAL-IP").prints(runtime),
        step("describe node").prints("MemoryPressure").prints("Allocatable"),
        step("explain pod.spec.containers").prints("FIELDS:").prints("imagePullPolicy"),
        step("auth whoami").prints("kubernetes-admin"),
        step("auth can-i create pods").prints("yes"),
        step("auth can-i create pods --as system:anonymous").fails(),
        step("get namespaces").prints("kube-system").prints("kube-node-lease").prints("Active"),
    ]
}

fn workloads(deployment: &str, pod_prefix: &str) -> Vec<Step> {
    vec![
        step(&format!("apply -f {deployment}")).prints("deployment.apps/web created").prints("service/web created"),
        step("rollout status deployment/web --timeout=60s").prints("successfully rolled out"),
        step(&format!("apply -f {deployment}")).prints("deployment.apps/web unchanged"),
        step("get deployments").prints("2/2"),
        step("get deployment web -o yaml").prints("availableReplicas: 2").prints("progressDeadlineSeconds: 600"),
        step("get pods -l app=web -o json").prints("\"phase\": \"Running\""),
        step("get pods -o wide").prints(pod_prefix).prints("NOMINATED NODE"),
        step("describe deployment web").prints("RollingUpdateStrategy").prints("ScalingReplicaSet"),
        step("scale deployment web --replicas=3").prints("scaled"),
        step("wait --for=jsonpath={.status.readyReplicas}=3 deployment/web --timeout=60s").prints("condition met"),
        step("set image deployment/web web=localhost:5000/tools:v2").prints("image updated"),
        step("rollout status deployment/web --timeout=90s").prints("successfully rolled out"),
        step("rollout history deployment/web").prints("REVISION"),
        step("rollout undo deployment/web").prints("rolled back"),
        step("rollout status deployment/web --timeout=90s").prints("successfully rolled out"),
        step("get deployment web -o jsonpath={.spec.template.spec.containers[0].image}").prints("tools:v1"),
        step("rollout restart deployment/web").prints("restarted"),
        step("rollout status deployment/web --timeout=90s").prints("successfully rolled out"),
        step("label deployment web tier=front").prints("labeled"),
        step("annotate deployment web note=x").prints("annotated"),
        step("patch deployment web -p '{\"metadata\":{\"labels\":{\"a\":\"b\"}}}'").prints("patched"),
        step("patch deployment web --type=merge -p '{\"spec\":{\"revisionHistoryLimit\":5}}'").prints("patched"),
        step("patch deployment web --type=json -p '[{\"op\":\"add\",\"path\":\"/metadata/labels/z\",\"value\":\"1\"}]'").prints("patched"),
        step("get deployment web --show-labels").prints("a=b").prints("tier=front").prints("z=1"),
        step("expose deployment web --name=exposed --port=80").prints("service/exposed exposed"),
        step("get service exposed").prints("ClusterIP").prints("80/TCP"),
        step("delete service exposed web").prints("deleted"),
        step("delete deployment web --cascade=foreground --timeout=60s").prints("deleted"),
        step("get replicasets").prints("No resources found"),
        step("get pods -l app=web").eventually().prints("No resources found"),
    ]
}

fn pods(pod: &str) -> Vec<Step> {
    vec![
        step(&format!("create -f {pod}")).prints("pod/tools created").prints("pod/once created"),
        step("wait --for=condition=Ready pod/tools --timeout=60s").prints("condition met"),
        step("describe pod tools").prints("Started").prints("Successfully assigned"),
        step("logs tools -c one").prints("hello from one"),
        step("logs tools -c two --tail=1").prints("two"),
        step("exec tools -c one -- echo inside").prints("inside"),
        step("exec -i tools -c one -- cat").input("x").prints("x"),
        step("exec tools -c one -- sh -c 'exit 3'").fails().prints("exit code 3"),
        step("exec tools -c two -- id -u").prints("1000"),
        step("exec tools -c two -- sh -c 'echo to-stderr > /dev/stderr'").prints("to-stderr"),
    ]
}

fn pods_end() -> Vec<Step> {
    vec![
        // The container's end ends the command too: it has to be gone by then.
        step("exec tools -c one -- sh -c '(sleep 0.5; kill 1) > /dev/null 2>&1 &'"),
        step("get pod tools").eventually().prints("1 ("),
        step("logs tools -c one --previous").prints("hello from one"),
        step("logs -f once").eventually().prints("line 1").prints("the end"),
        step("get pod once -o jsonpath={.status.phase}-{.status.containerStatuses[0].state.terminated.exitCode}")
            .eventually()
            .prints("Failed-7"),
        step("delete pod once").prints("deleted"),
        step("get events").prints("Pulled").prints("Created").prints("Started").prints("Scheduled"),
        step("delete pod tools --grace-period=1").prints("deleted"),
        step("get pod tools").fails().prints("NotFound"),
    ]
}

fn objects() -> Vec<Step> {
    vec![
        step("create configmap cm --from-literal=a=b").prints("configmap/cm created"),
        step("get configmap cm -o yaml").prints("a: b"),
        step("create secret generic s --from-literal=k=v").prints("secret/s created"),
        step("get secret s -o jsonpath={.data.k}").prints("dg=="),
        step("create token default").prints("ey"),
        step("create serviceaccount sa").prints("serviceaccount/sa created"),
        step("create namespace extra").prints("namespace/extra created"),
        step("get serviceaccount default -n extra").eventually().prints("default"),
        step("get configmap kube-root-ca.crt -n extra").eventually().prints("kube-root-ca.crt"),
        step("delete namespace extra --timeout=60s").prints("deleted"),
        step("delete configmap cm").prints("deleted"),
        step("delete secret s").prints("deleted"),
        step("delete serviceaccount sa").prints("deleted"),
        step("apply -f -").input("kind: [").fails(),
        step("apply -f -")
            .input("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\nunknown: 1\n")
            .fails()
            .prints("unknown field \"unknown\""),
        step("create -f -")
            .input("apiVersion: v1\nkind: Pod\nmetadata:\n  name: X_\nspec:\n  containers: []\n")
            .fails()
            .prints("Invalid value"),
    ]
}

/// `edit` and `diff`: programs of the user's in between.
fn edits(folder: &Path) -> Result<Vec<Step>> {
    let manifest = |name: &str, value: &str| -> Result<String> {
        let path = folder.join(name);
        fs::write(&path, format!("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: edited\ndata:\n  key: {value}\n"))?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (first, second) = (manifest("first.yaml", "first")?, manifest("second.yaml", "second")?);
    Ok(vec![
        step(&format!("diff -f {first}")).fails().prints("+  key: first"),
        step(&format!("apply -f {first}")).prints("configmap/edited created"),
        step(&format!("diff -f {first}")).prints_not("key"),
        step(&format!("diff -f {second}")).fails().prints("-  key: first").prints("+  key: second"),
        step("get configmap edited -o jsonpath={.data.key}").prints("first"),
        step("edit configmap edited").environment("KUBE_EDITOR", "true").prints("Edit cancelled, no changes made"),
        step("edit configmap edited").environment("KUBE_EDITOR", "sed -i s/first/third/").prints("configmap/edited edited"),
        step("get configmap edited -o jsonpath={.data.key}").prints("third"),
        step(&format!("delete -f {first}")).prints("configmap \"edited\" deleted"),
    ])
}
