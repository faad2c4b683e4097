//! Full disks, one after the other, each a small file system of its own: the error is told in the right place with path and cause, nothing half
//! made is left, what runs goes on, and once there is room again everything does, without a restart and with nothing lost.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::cluster::{Cluster, Disk};
use e2e::script::{play, step};
use serde_json::{Value, json};

/// The image of the pods.
const IMAGE: &str = "localhost:5000/tools:v1";
/// What a full disk says.
const FULL: &str = "No space left on device";
const MIB: u64 = 1 << 20;
/// The directories that become full, below the cluster's folder.
const DISKS: [(&str, Disk); 5] = [
    ("data/store", Disk::Ext4 { bytes: 24 * MIB }),
    ("data/cri", Disk::Ext4 { bytes: 32 * MIB }),
    ("data/kubelet", Disk::Ext4 { bytes: 16 * MIB }),
    ("logs", Disk::Ext4 { bytes: 16 * MIB }),
    ("run", Disk::Memory { bytes: 16 * MIB }),
];
const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";

#[test]
fn each_data_directory_is_full_once() -> Result<()> {
    let mut cluster = Cluster::start_on_disks("full-disk", &DISKS)?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let done = all(&mut cluster);
    done.with_context(|| format!("--- coracle up\n{}", cluster.log_tail()))
}

fn all(cluster: &mut Cluster) -> Result<()> {
    let outside = cluster.folder().join("outside");
    fs::create_dir(&outside).context("failed to make a directory")?;
    cluster.api().create_pod(&talker(&outside))?;
    cluster.api().wait_ready("talker")?;
    store(cluster)?;
    images(cluster)?;
    volumes(cluster)?;
    logs(cluster, &outside)?;
    state(cluster, &outside)?;
    restart(cluster, &outside)?;
    from_the_beginning(cluster)?;
    let status = &cluster.api().pod("talker")?["status"]["containerStatuses"][0];
    ensure!(status["restartCount"] == 0, "the pod that ran all the time was restarted: {status}");
    Ok(())
}

/// A disk without room. Dropping it makes room again.
struct Filled(PathBuf);

impl Filled {
    fn new(cluster: &Cluster, disk: &str) -> Result<Filled> {
        let filled = Filled(cluster.path_inside(&cluster.folder().join(disk)).join("filler"));
        let fill = || -> io::Result<()> {
            let mut file = File::create(&filled.0)?;
            loop {
                let before = file.metadata()?.len();
                for piece in [1 << 16, 1 << 9] {
                    while put(&mut file, &vec![0; piece])? {}
                }
                // What was set aside for metadata is given back with the data's own place.
                file.sync_all()?;
                if file.metadata()?.len() == before {
                    return Ok(());
                }
            }
        };
        fill().with_context(|| format!("failed to fill {disk}"))?;
        Ok(filled)
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        // A test that failed has its own error to tell.
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes, or tells that there is no room.
fn put(file: &mut File, bytes: &[u8]) -> io::Result<bool> {
    match file.write_all(bytes) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(false),
        written => written.map(|()| true),
    }
}

/// Writes are refused with the cause, reads and watches go on.
fn store(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    let object = |n: usize| {
        let data = "x".repeat(20_000);
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("n{n}")}, "data": {"k": data}}).to_string()
    };
    let write = |n: usize| api.ask("POST", CONFIG_MAPS, "application/json", &object(n));
    let mut there = BTreeSet::new();
    let full = Filled::new(cluster, "data/store")?;
    for n in 0..20 {
        match write(n)? {
            (201, _) => drop(there.insert(format!("n{n}"))),
            (status, body) => {
                ensure!(status == 500 && body.contains(FULL) && body.contains("data/store/"), "{status}: {body}");
            }
        }
    }
    ensure!(there.len() < 20, "a full disk took everything");
    let list: Value = api.object(CONFIG_MAPS)?;
    let version = list["metadata"]["resourceVersion"].as_str().context("a list has no version")?.to_owned();
    let watch = format!("{CONFIG_MAPS}?watch=true&resourceVersion={version}&timeoutSeconds=");
    api.get(&format!("{watch}1"))?;
    drop(full);
    eventually("the store takes writes again", || Ok(write(20)?.0 == 201))?;
    ensure!(api.get(&format!("{watch}1"))?.contains("\"n20\""), "the watch has not seen what was written after it");
    there.insert("n20".to_owned());
    let list = api.object(CONFIG_MAPS)?;
    let names = list["items"].as_array().into_iter().flatten().filter_map(|item| item["metadata"]["name"].as_str());
    let names: BTreeSet<String> = names.filter(|name| name.starts_with('n')).map(str::to_owned).collect();
    ensure!(names == there, "{names:?} is there, {there:?} was acknowledged");
    Ok(())
}

/// No room for an image, and none for a container's own layer.
fn images(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    cluster.serve("fresh", "v1", &e2e::images::busybox("fresh")?);
    let layers = || names(&cluster.path_inside(&cluster.data().join("cri/layers")));
    let before = layers()?;
    let full = Filled::new(cluster, "data/cri")?;
    api.create_pod(&pod("fresh", "localhost:5000/fresh:v1", json!([]), json!([])))?;
    tells(cluster, "fresh", "Failed", &["Failed to pull image", "data/cri/", FULL])?;
    tells(cluster, "fresh", "Failed", &["ErrImagePull"])?;
    api.create_pod(&pod("known", IMAGE, json!([]), json!([])))?;
    tells(cluster, "known", "Failed", &["data/cri/snapshots/", FULL])?;
    eventually("the layer that did not fit is gone", || Ok(layers()? == before))?;
    let left = names(&cluster.path_inside(&cluster.data().join("cri/images")))?;
    ensure!(left.iter().all(|name| name.ends_with(".json")), "{left:?}");
    drop(full);
    for name in ["fresh", "known"] {
        api.wait_ready(name)?;
        api.delete_pod(name)?;
    }
    let left = names(&cluster.path_inside(&cluster.data().join("cri/snapshots")))?;
    ensure!(left.iter().all(|name| !name.contains('.')), "{left:?}");
    Ok(())
}

/// No room for a pod's volumes.
fn volumes(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"k": "v"}});
    ensure!(api.ask("POST", CONFIG_MAPS, "application/json", &config.to_string())?.0 == 201, "no ConfigMap");
    let full = Filled::new(cluster, "data/kubelet")?;
    let volumes = json!([{"name": "settings", "configMap": {"name": "settings"}}]);
    let mounts = json!([{"name": "settings", "mountPath": "/settings"}]);
    api.create_pod(&pod("volumes", IMAGE, volumes, mounts))?;
    tells(cluster, "volumes", "Failed", &["data/kubelet/pods/", FULL])?;
    drop(full);
    let ready = api.wait_ready("volumes")?;
    let uid = ready["metadata"]["uid"].as_str().context("no UID")?;
    let volume = cluster.data().join("kubelet/pods").join(uid).join("volumes/kubernetes.io~configmap/settings");
    let left = names(&cluster.path_inside(&volume))?;
    ensure!(left.iter().filter(|name| name.starts_with("..2")).count() == 1, "failed attempts are left: {left:?}");
    api.delete_pod("volumes")
}

/// A container that writes more than a pipe holds goes on; what does not fit is lost, and no line is half there.
fn logs(cluster: &Cluster, outside: &Path) -> Result<()> {
    let api = cluster.api();
    let full = Filled::new(cluster, "logs")?;
    let begun = count(outside)?;
    eventually("the container has written its pipe full twice", || Ok(count(outside)? > begun + 300))?;
    drop(full);
    let freed = count(outside)?;
    eventually("the log goes on", || Ok(api.log("talker")?.lines().filter_map(number).any(|n| n > freed)))?;
    for line in api.log("talker")?.lines() {
        ensure!(number(line).is_some(), "a spoilt line: {line:?}");
    }
    Ok(())
}

/// No room for the records of pods and containers.
fn state(cluster: &Cluster, outside: &Path) -> Result<()> {
    let api = cluster.api();
    let sandboxes = || names(&cluster.path_inside(&cluster.folder().join("run/cri/sandboxes")));
    let before = sandboxes()?;
    api.create_pod(&ender(outside, "ender"))?;
    api.wait_ready("ender")?;
    let full = Filled::new(cluster, "run")?;
    api.create_pod(&pod("state", IMAGE, json!([]), json!([])))?;
    tells(cluster, "state", "FailedCreatePodSandBox", &["run/cri/sandboxes/", FULL])?;
    fs::write(outside.join("ender"), "").context("failed to write")?;
    exited(cluster, "ender")?;
    drop(full);
    api.wait_ready("state")?;
    api.delete_pod("state")?;
    api.delete_pod("ender")?;
    eventually("the sandboxes that could not be made are gone", || Ok(sandboxes()? == before))
}

/// Everything is full, a container ends, and `up` dies. With a store that takes nothing it does not come back, and says why; with one it does,
/// whatever else is full.
fn restart(cluster: &mut Cluster, outside: &Path) -> Result<()> {
    let api = cluster.api();
    api.create_pod(&ender(outside, "late"))?;
    api.wait_ready("late")?;
    let full: Result<Vec<Filled>> = DISKS.iter().map(|(disk, _)| Filled::new(cluster, disk)).collect();
    let mut full = full?;
    fill_last_block(cluster)?;
    fs::write(outside.join("late"), "").context("failed to write")?;
    cluster.kill()?;
    let refused = cluster.up().err().map(|error| format!("{error:#}")).context("up came up on a store that takes nothing")?;
    ensure!(refused.contains("data/store/store.log: No space left on device"), "{refused}");
    drop(full.remove(0));
    cluster.up()?;
    api.get("/api/v1/namespaces/default/pods/late")?;
    drop(full);
    exited(cluster, "late")?;
    api.create_pod(&pod("after", IMAGE, json!([]), json!([])))?;
    api.wait_ready("after")?;
    api.delete_pod("after")?;
    api.delete_pod("late")
}

/// A full disk still takes what fits into the last block of the store's log: objects that are ever smaller fill it, until the smallest is refused.
fn fill_last_block(cluster: &Cluster) -> Result<()> {
    for size in [2000, 500, 100, 0] {
        for n in 0.. {
            let metadata = json!({"name": format!("b{size}-{n}")});
            let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"k": "x".repeat(size)}});
            let (status, body) = cluster.api().ask("POST", CONFIG_MAPS, "application/json", &object.to_string())?;
            if status != 201 {
                ensure!(body.contains(FULL), "{status}: {body}");
                break;
            }
        }
    }
    Ok(())
}

/// A first start without room makes nothing.
fn from_the_beginning(cluster: &Cluster) -> Result<()> {
    cluster.mount("second", Disk::Ext4 { bytes: 8 * MIB })?;
    let _full = Filled::new(cluster, "second")?;
    let folder = cluster.folder().join("second");
    let line = format!(
        "up --data-dir={0}/data --state-dir={0}/run --pod-log-dir={0}/logs --secure-port=16443 --kubelet-port=11250 --proxy-healthz-port=11256 \
         --bridge=second0 --nftables-table=second --pod-cidr=10.86.0.0/16 --cgroup-root={1}-second",
        folder.display(),
        cluster.cgroup_root()
    );
    play(cluster, &e2e::ours("coracle")?, &[step(&line).fails().prints("second/data").prints(FULL)])?;
    let left = names(&cluster.path_inside(&folder))?;
    ensure!(left.iter().all(|name| name == "filler" || name == "lost+found"), "{left:?}");
    Ok(())
}

/// The names in a directory.
fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(directory).with_context(|| format!("failed to list {}", directory.display()))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// How often the talker has spoken.
fn count(outside: &Path) -> Result<u64> {
    let text = fs::read_to_string(outside.join("count")).context("the container counts nothing")?;
    // It may be about to write it anew.
    Ok(text.trim().parse().unwrap_or(0))
}

/// The number of a whole line of the talker's.
fn number(line: &str) -> Option<u64> {
    let (number, rest) = line.split_once(' ')?;
    (rest.len() == 1000 && rest.bytes().all(|byte| byte == b'x')).then(|| number.parse().ok())?
}

/// Waits until a pod's container has exited with 3.
fn exited(cluster: &Cluster, pod: &str) -> Result<()> {
    let mut status = Value::Null;
    let waited = eventually(&format!("{pod} has exited"), || {
        status = cluster.api().pod(pod)?["status"].take();
        Ok(status.pointer("/containerStatuses/0/state/terminated/exitCode") == Some(&json!(3)))
    });
    waited.with_context(|| format!("status of {pod}: {status}"))
}

/// Waits until an event of a pod says this.
fn tells(cluster: &Cluster, pod: &str, reason: &str, words: &[&str]) -> Result<()> {
    let mut told = String::new();
    let waited = eventually(&format!("{pod} tells {words:?}"), || {
        told = cluster.api().events(pod)?;
        Ok(told.lines().any(|line| line.contains(reason) && words.iter().all(|word| line.contains(word))))
    });
    waited.with_context(|| format!("its events: {told}"))
}

fn pod(name: &str, image: &str, volumes: Value, mounts: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "volumes": volumes,
            "containers": [{"name": "main", "image": image, "command": ["sleep", "1000000"], "volumeMounts": mounts}],
        },
    })
}

fn with_outside(name: &str, outside: &Path, script: &str) -> Value {
    let volumes = json!([{"name": "outside", "hostPath": {"path": outside}}]);
    let mut pod = pod(name, IMAGE, volumes, json!([{"name": "outside", "mountPath": "/outside"}]));
    pod["spec"]["containers"][0]["command"] = json!(["sh", "-c", script]);
    pod["spec"]["restartPolicy"] = json!("Never");
    pod
}

/// A pod that speaks and counts.
fn talker(outside: &Path) -> Value {
    let line = "x".repeat(1000);
    let script = format!("n=0; while true; do n=$((n+1)); echo $n {line}; echo $n > /outside/count; sleep 0.02; done");
    with_outside("talker", outside, &script)
}

/// A pod that ends with 3 when a file of its name is there.
fn ender(outside: &Path, name: &str) -> Value {
    with_outside(name, outside, &format!("while ! [ -e /outside/{name} ]; do sleep 0.05; done; exit 3"))
}
