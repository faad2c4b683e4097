//! The real kubectl against the server: `$CORACLE_PEERS/kubectl`, and the `kubectl` of the PATH where there is one.

#[path = "common/client.rs"]
mod client;
mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use client::Server;
use tokio::io::AsyncWriteExt;

const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: d, labels: {app: d}}
spec:
  replicas: 2
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec: {containers: [{name: c, image: x}]}
---
apiVersion: v1
kind: Service
metadata: {name: d}
spec: {selector: {app: d}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec: {containers: [{name: c, image: x}]}
"#;

/// Runs kubectl: whether it succeeded, and all that it printed.
async fn kubectl(program: &Path, config: &Path, words: &str, stdin: &str) -> (bool, String) {
    let mut child = tokio::process::Command::new(program)
        .args(words.split_whitespace())
        .env_clear()
        .env("KUBECONFIG", config)
        .env("HOME", config.parent().expect("a directory"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("kubectl starts");
    let mut pipe = child.stdin.take().expect("piped");
    pipe.write_all(stdin.as_bytes()).await.ok();
    drop(pipe);
    let output = tokio::time::timeout(client::DEADLINE, child.wait_with_output()).await.expect("kubectl ends").expect("output");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn programs() -> Vec<PathBuf> {
    let peers = std::env::var_os("CORACLE_PEERS").map(|dir| PathBuf::from(dir).join("kubectl"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("kubectl")).find(|program| program.exists());
    peers.into_iter().chain(on_path).filter(|program| program.exists()).collect()
}

/// Command, standard input, whether it succeeds, and a part of what it prints.
const COMMANDS: &[(&str, &str, bool, &str)] = &[
    ("create serviceaccount default", "", true, "serviceaccount/default created"),
    ("api-resources", "", true, "deployments"),
    ("apply -f -", OBJECTS, true, "deployment.apps/d created"),
    ("apply -f -", OBJECTS, true, "deployment.apps/d unchanged"),
    ("get deploy d -o wide", "", true, "0/2"),
    ("get pods,svc", "", true, "pod/p"),
    ("get pod p -o jsonpath={.spec.serviceAccountName}", "", true, "default"),
    ("get deploy d -o yaml", "", true, "kubectl.kubernetes.io/last-applied-configuration"),
    ("patch deploy d -p {\"metadata\":{\"labels\":{\"x\":\"y\"}}}", "", true, "patched"),
    ("patch deploy d --type=merge -p {\"spec\":{\"minReadySeconds\":3}}", "", true, "patched"),
    ("patch deploy d --type=json -p [{\"op\":\"add\",\"path\":\"/metadata/labels/z\",\"value\":\"1\"}]", "", true, "patched"),
    ("scale deploy d --replicas=5", "", true, "scaled"),
    ("wait --for=jsonpath={.spec.replicas}=5 deploy/d --timeout=5s", "", true, "condition met"),
    ("wait --for=condition=Ready pod/p --timeout=1s", "", false, "timed out"),
    ("label pod p q=r", "", true, "labeled"),
    ("annotate pod p q=r", "", true, "annotated"),
    ("get pods -l q=r -o name", "", true, "pod/p"),
    ("set image deploy/d c=y", "", true, "image updated"),
    ("rollout restart deploy/d", "", true, "restarted"),
    ("explain pod.spec.containers", "", true, "<[]Container>"),
    ("auth can-i create pods", "", true, "yes"),
    ("auth can-i --list", "", true, "selfsubjectreviews"),
    ("auth whoami", "", true, "kubernetes-admin"),
    ("auth can-i create pods --as nobody", "", false, "no"),
    ("create configmap cm --from-literal=a=b", "", true, "created"),
    ("create secret generic s --from-literal=a=b", "", true, "created"),
    ("create token default", "", true, "ey"),
    ("run x --image=x --dry-run=server", "", true, "created (server dry run)"),
    ("expose deploy d --name e --port 80", "", true, "exposed"),
    ("describe deploy d", "", true, "RollingUpdate"),
    ("describe pod p", "", true, "QoS Class"),
    ("get events", "", true, "No resources found"),
    ("cluster-info", "", true, "control plane is running"),
    ("create -f -", "apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec: {bogus: 1}\n", false, "unknown field \"spec.bogus\""),
    ("create -f -", "apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec: {}\n", false, "spec.containers: Required value"),
    ("get pod missing", "", false, "Error from server (NotFound): pods \"missing\" not found"),
    ("apply --server-side -f -", OBJECTS, false, "Server-side apply not available on the server"),
    ("delete pod p --grace-period=0 --force", "", true, "deleted"),
    ("delete svc d e", "", true, "service \"d\" deleted"),
    ("delete deploy d --cascade=orphan --wait=false", "", true, "deleted"),
    ("delete ns default", "", false, "this namespace may not be deleted"),
];

#[tokio::test]
async fn kubectl_is_served() {
    let programs = programs();
    if programs.is_empty() {
        eprintln!("SKIPPED: kubectl_is_served: no kubectl in $CORACLE_PEERS or the PATH");
        return;
    }
    for program in programs {
        let server = Server::start().await;
        let config = server.pki.kubeconfig("kubectl", "kubernetes-admin", &["coracle:cluster-admins"]);
        for (words, stdin, succeeds, part) in COMMANDS {
            let (success, text) = kubectl(&program, &config, words, stdin).await;
            assert!(success == *succeeds && text.contains(part), "{} {words}: {success}, {text}", program.display());
        }
        server.stop().await;
    }
}
