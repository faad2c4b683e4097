//! Wrong surroundings: ports that are taken, links where directories should be, configurations, certificates and clocks that are wrong.
//! Each is a clear error in the right place, and nothing half made is left.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::cluster::Cluster;
use e2e::script::{play, step};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use testkit::image::ImageSpec;
use testkit::tar::Entry;

/// The image of the pods.
const IMAGE: &str = "localhost:5000/tools:v1";
/// The same with links where volumes are mounted.
const LINKS: &str = "localhost:5000/links:v1";

#[test]
fn the_host_is_not_as_it_should_be() -> Result<()> {
    let cluster = Cluster::start("wrong-host")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    a_host_port_that_is_taken(&cluster)?;
    mount_targets_that_are_links(&cluster)?;
    ports_of_the_cluster_that_are_taken(&cluster)?;
    configurations(&cluster)?;
    certificates_and_clocks(&cluster)
}

/// Two pods want one port of the host: the second waits and says why, and gets it when the first is gone.
fn a_host_port_that_is_taken(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    let with_port = |name: &str| pod(name, IMAGE, json!({"ports": [{"containerPort": 80, "hostPort": 8080}]}), json!([]));
    api.create_pod(&with_port("first"))?;
    api.wait_ready("first")?;
    api.create_pod(&with_port("second"))?;
    tells(cluster, "second", "FailedScheduling", "didn't have free ports for the requested pod ports")?;
    ensure!(api.pod("second")?["spec"].get("nodeName").is_none(), "the second pod was bound");
    api.delete_pod("first")?;
    api.wait_ready("second")?;
    api.delete_pod("second")
}

/// Links of an image lead to places of the image; a procfs behind a link is refused. Nothing is made on the host.
fn mount_targets_that_are_links(cluster: &Cluster) -> Result<()> {
    let outside = cluster.folder().join("outside");
    fs::create_dir(&outside).context("failed to make a directory")?;
    let up = format!("../../../../../../../../..{}", outside.display());
    let layer =
        vec![Entry::symlink("absolute", &outside.display().to_string()), Entry::symlink("dots", &up), Entry::symlink("proc", "/etc")];
    let inner = |layer: Vec<Entry>| -> Result<testkit::image::Image> {
        let tools =
            vec![Entry::dir("bin"), Entry::dir("etc"), Entry::executable("bin/sleep", fs::read("/bin/busybox").context("no busybox")?)];
        Ok(ImageSpec::new().layer(tools).layer(layer).config("Env", json!(["PATH=/bin"])).build())
    };
    cluster.serve("links", "v1", &inner(layer[..2].to_vec())?);
    cluster.serve("links", "proc", &inner(layer)?);
    let api = cluster.api();
    let mounts = json!([{"name": "v", "mountPath": "/absolute/made"}, {"name": "v", "mountPath": "/dots"}]);
    api.create_pod(&pod("links", LINKS, json!({}), mounts.clone()))?;
    api.wait_ready("links")?;
    ensure!(fs::read_dir(&outside)?.next().is_none(), "something was made in {}", outside.display());
    api.delete_pod("links")?;
    api.create_pod(&pod("proc", "localhost:5000/links:proc", json!({}), mounts))?;
    tells(cluster, "proc", "Failed", "error mounting \"proc\" to rootfs at \"/proc\"")?;
    ensure!(fs::read_dir(&outside)?.next().is_none(), "something was made in {}", outside.display());
    api.delete_pod("proc")
}

/// A second `up`, all of whose names are its own but for one port.
fn ports_of_the_cluster_that_are_taken(cluster: &Cluster) -> Result<()> {
    let coracle = e2e::ours("coracle")?;
    let taken = cluster.within(|| TcpListener::bind("127.0.0.1:0").context("failed to take a port"))??;
    let port = taken.local_addr()?.port();
    for (flag, what) in [("--secure-port", "apiserver"), ("--kubelet-port", "kubelet")] {
        let second = second(cluster, flag.trim_start_matches('-'))?;
        let given = if flag == "--secure-port" { "--secure-port=16443" } else { "--kubelet-port=11250" };
        let line = second.arguments.replace(given, &format!("{flag}={port}"));
        let run = play(cluster, &coracle, &[step(&line).fails().prints(what).prints(&format!(":{port}")).prints("Address already in use")]);
        let down = play(cluster, &coracle, &[step(&format!("down --data-dir {}", second.data.display()))]);
        run.and(down).with_context(|| flag.to_owned())?;
    }
    Ok(())
}

/// Keys that no version knows, in flags and in files.
fn configurations(cluster: &Cluster) -> Result<()> {
    let coracle = e2e::ours("coracle")?;
    let second = second(cluster, "config")?;
    let settings = second.data.join("settings.json");
    let steps = [
        step(&format!("{} --no-such-flag=1", second.arguments)).fails().prints("unexpected argument '--no-such-flag'"),
        step(&format!("{} --pod-cidr=10.1.0.0/99", second.arguments)).fails().prints("--pod-cidr"),
        step(&format!("{} --service-cluster-ip-range=x", second.arguments)).fails().prints("service-cluster-ip-range"),
    ];
    play(cluster, &coracle, &steps)?;
    fs::create_dir_all(&second.data).context("failed to make a data directory")?;
    fs::copy(cluster.data().join("settings.json"), &settings).context("failed to copy settings")?;
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&settings)?)?;
    json["settings"]["secure_prot"] = json!(6443);
    fs::write(&settings, json.to_string()).context("failed to write settings")?;
    let down = format!("down --data-dir {}", second.data.display());
    play(cluster, &coracle, &[step(&down).fails().prints("settings.json").prints("unknown field `secure_prot`")])
}

/// Keys that are another's, or of another time.
fn certificates_and_clocks(cluster: &Cluster) -> Result<()> {
    let coracle = e2e::ours("coracle")?;
    let second = second(cluster, "keys")?;
    let pki = second.data.join("pki");
    fs::create_dir_all(&pki).context("failed to make a directory")?;
    let key = KeyPair::generate()?;
    // An authority of a machine whose clock was an hour (and a day, which is allowed for) ahead is this one's with a clock behind.
    for (from, to, why) in [(-20, -1, "has expired on"), (1, 20, "is the clock right?")] {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "coracle-ca");
        let now = time::OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now + time::Duration::hours(from), now + time::Duration::hours(to));
        fs::write(pki.join("ca.crt"), params.self_signed(&key)?.pem()).context("failed to write ca.crt")?;
        fs::write(pki.join("ca.key"), key.serialize_pem()).context("failed to write ca.key")?;
        play(cluster, &coracle, &[step(&second.arguments).fails().prints("pki/ca.crt").prints(why)])?;
    }
    fs::write(pki.join("ca.key"), KeyPair::generate()?.serialize_pem()).context("failed to write ca.key")?;
    fs::copy(cluster.data().join("pki/ca.crt"), pki.join("ca.crt")).context("failed to copy ca.crt")?;
    play(cluster, &coracle, &[step(&second.arguments).fails().prints("is not the key of").prints("pki/ca.crt")])?;
    let left: Vec<_> = fs::read_dir(&pki)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.len() == 2, "something was made with a wrong authority: {left:?}");
    ensure!(!second.data.join("store").exists(), "a store was made with a wrong authority");
    Ok(())
}

/// Names of another cluster in the same namespaces.
struct Second {
    arguments: String,
    data: PathBuf,
}

fn second(cluster: &Cluster, name: &str) -> Result<Second> {
    let folder = cluster.folder().join(format!("second-{name}"));
    fs::create_dir_all(&folder).context("failed to make a directory")?;
    let data = folder.join("data");
    let at = |name: &str| folder.join(name).display().to_string();
    let arguments = format!(
        "up --data-dir={} --state-dir={} --pod-log-dir={} --cni-conf-dir={} --secure-port=16443 --kubelet-port=11250 --proxy-healthz-port=11256 --bridge=second0 \
         --nftables-table=second --pod-cidr=10.86.0.0/16 --service-cluster-ip-range=10.112.0.0/16 --cgroup-root=/coracle-e2e-second-{}",
        data.display(),
        at("run"),
        at("logs"),
        at("cni"),
        std::process::id()
    );
    Ok(Second { arguments, data })
}

/// Waits until an event of a pod says this.
fn tells(cluster: &Cluster, pod: &str, reason: &str, words: &str) -> Result<()> {
    let mut told = String::new();
    let waited = eventually(&format!("{pod} tells {words:?}"), || {
        told = cluster.api().events(pod)?;
        Ok(told.lines().any(|line| line.contains(reason) && line.contains(words)))
    });
    waited.with_context(|| format!("its events: {told}\n--- coracle up\n{}", cluster.log_tail()))
}

fn pod(name: &str, image: &str, more: Value, mounts: Value) -> Value {
    let mut container = json!({"name": "main", "image": image, "command": ["sleep", "1000000"], "volumeMounts": mounts});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"terminationGracePeriodSeconds": 1, "volumes": [{"name": "v", "emptyDir": {}}], "containers": [container]},
    })
}
