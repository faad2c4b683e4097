//! Wrong input: each a clear error in the right place (the client, an event, the exit code), nothing half made left, and the
//! cluster goes on. The requests are sent by our own client, so that nothing here needs kubectl.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::cluster::Cluster;
use e2e::script::{Step, play, step};
use serde_json::{Value, json};
use testkit::registry::Fault;

/// The image of the pods.
const IMAGE: &str = "localhost:5000/tools:v1";

#[test]
fn wrong_objects_are_refused_by_the_client_or_the_server() -> Result<()> {
    let cluster = start("wrong-objects")?;
    let coracle = e2e::ours("coracle")?;
    let cases = [
        ("bad-yaml", "kind: [", "bad-yaml.yaml: document 1"),
        ("no-object", "just text", "no object"),
        ("no-kind", "apiVersion: v1\nmetadata:\n  name: x\n", "kind"),
        ("unknown-kind", "apiVersion: v1\nkind: Pox\nmetadata:\n  name: x\n", "the server has no Pox in v1"),
        ("invalid-name", "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: X_\n", "metadata.name: Invalid value: \"X_\""),
        ("no-containers", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\nspec:\n  containers: []\n", "spec.containers: Required value"),
        ("unknown-field", "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\nunknown: 1\n", "unknown field \"unknown\""),
        ("requests-above-limits", include_str!("../data/requests_above_limits.yaml"), "must be less than or equal to memory limit of 32Mi"),
    ];
    for (name, text, error) in cases {
        let steps = [
            applies(&cluster, name, text)?.fails().prints(error),
            get(&cluster, "/api/v1/namespaces/default/pods").prints_not("\"name\":\"x\""),
        ];
        play(&cluster, &coracle, &steps).with_context(|| name.to_owned())?;
        goes_on(&cluster, &coracle)?;
    }
    let strict = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "unknown": 1}).to_string();
    let path = "/api/v1/namespaces/default/configmaps?fieldValidation=Strict";
    let (status, body) = cluster.api().ask("POST", path, "application/json", &strict)?;
    ensure!(status == 400 && body.contains("unknown field \\\"unknown\\\""), "an unknown field: {status}: {body}");
    goes_on(&cluster, &coracle)
}

#[test]
fn wrong_pods_tell_why_by_events() -> Result<()> {
    let cluster = start("wrong-pods")?;
    let coracle = e2e::ours("coracle")?;
    let profiles = cluster.data().join("kubelet/seccomp");
    fs::create_dir_all(&profiles).with_context(|| format!("failed to create {}", profiles.display()))?;
    fs::write(profiles.join("broken.json"), "{\"defaultAction\": \"SCMP_ACT_NON").context("failed to write a profile")?;
    for name in ["rubbish", "broken-off", "no-manifest"] {
        cluster.serve(name, "v1", &e2e::images::busybox(name)?);
    }
    cluster.fault("rubbish/blobs", Fault::Rubbish, usize::MAX);
    cluster.fault("broken-off/blobs", Fault::BreakOff(0), usize::MAX);
    cluster.fault("no-manifest/manifests", Fault::Body(b"<html>It works!</html>".to_vec()), usize::MAX);
    let seccomp = |file: &str| json!({"seccompProfile": {"type": "Localhost", "localhostProfile": file}});
    let cases: [(&str, Value, &[&str]); 7] = [
        (
            "no-image",
            json!({"image": "localhost:5000/missing:v1"}),
            &["Failed: Failed to pull image \"localhost:5000/missing:v1\"", "Error: ErrImagePull", "Error: ImagePullBackOff"],
        ),
        (
            "rubbish",
            json!({"image": "localhost:5000/rubbish:v1"}),
            &["Failed: Failed to pull image \"localhost:5000/rubbish:v1\"", "sha256:"],
        ),
        (
            "broken-off",
            json!({"image": "localhost:5000/broken-off:v1"}),
            &["Failed: Failed to pull image \"localhost:5000/broken-off:v1\"", "Error: ErrImagePull"],
        ),
        (
            "no-manifest",
            json!({"image": "localhost:5000/no-manifest:v1"}),
            &["Failed to pull image \"localhost:5000/no-manifest:v1\"", "manifest"],
        ),
        ("no-memory", json!({"image": IMAGE, "resources": {"limits": {"memory": "1Ki"}}}), &["Warning Failed: Error: ", "memory"]),
        ("broken-profile", json!({"image": IMAGE, "securityContext": seccomp("broken.json")}), &["Warning Failed: Error: ", "seccomp"]),
        ("no-profile", json!({"image": IMAGE, "securityContext": seccomp("missing.json")}), &["Warning Failed: Error: ", "seccomp"]),
    ];
    for (name, container, events) in cases {
        let pod = pod(name, container);
        play(&cluster, &coracle, &[applies(&cluster, name, &pod.to_string())?.prints("created")])?;
        let mut told = String::new();
        let waited = eventually(&format!("{name} tells {events:?}"), || {
            told = cluster.api().events(name)?;
            Ok(events.iter().all(|event| told.contains(event)))
        });
        println!("--- events of {name}\n{told}");
        waited.with_context(|| format!("its events: {told}\n--- coracle up\n{}", cluster.log_tail()))?;
        goes_on(&cluster, &coracle)?;
        cluster.api().delete_pod(name)?;
        ensure!(cluster.table()?.shims().is_empty(), "{name} left a shim: {:?}", cluster.table()?.shims());
    }
    Ok(())
}

#[test]
fn a_wrong_up_says_why() -> Result<()> {
    let cluster = start("wrong-up")?;
    let coracle = e2e::ours("coracle")?;
    let pid = cluster.pid().context("coracle up is not running")?;
    let arguments = cluster.up_arguments().join(" ");
    play(&cluster, &coracle, &[step(&arguments).fails().prints(&format!("in use by process {pid}"))])?;
    goes_on(&cluster, &coracle)?;

    // Where nobody may read it: the folder of the executables may be closed to others.
    let copy = cluster.folder().join("coracle");
    fs::copy(&coracle, &copy).context("failed to copy coracle")?;
    let data = cluster.folder().join("nobody");
    let setpriv = PathBuf::from("/usr/bin/setpriv");
    let line = format!("--reuid=65534 --regid=65534 --clear-groups -- {} up --data-dir={}", copy.display(), data.display());
    play(&cluster, &setpriv, &[step(&line).fails().prints("coracle up must run as root")])?;
    ensure!(!data.exists(), "{} was made by a user that may not", data.display());
    goes_on(&cluster, &coracle)
}

fn start(name: &str) -> Result<Cluster> {
    let cluster = Cluster::start(name)?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    Ok(cluster)
}

/// A new pod still becomes Ready.
fn goes_on(cluster: &Cluster, coracle: &Path) -> Result<()> {
    let good = pod("good", json!({"image": IMAGE}));
    let steps = [
        applies(cluster, "good", &good.to_string())?.prints("pods/good created"),
        get(cluster, "/api/v1/namespaces/default/pods/good").eventually().prints("\"ready\":true"),
    ];
    play(cluster, coracle, &steps).context("the cluster does not go on")?;
    cluster.api().delete_pod("good")
}

/// `coracle apply` of this text.
fn applies(cluster: &Cluster, name: &str, text: &str) -> Result<Step> {
    let file = cluster.folder().join(format!("{name}.yaml"));
    fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
    Ok(step(&format!("apply --data-dir {} -f {}", cluster.data().display(), file.display())))
}

fn get(cluster: &Cluster, path: &str) -> Step {
    step(&format!("get --data-dir {} {path}", cluster.data().display()))
}

fn pod(name: &str, mut container: Value) -> Value {
    container["name"] = json!("main");
    container["command"] = json!(["sleep", "1000000"]);
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
    })
}
