//! Power cuts while images come and go: what was acknowledged is there whole, or not at all and can be fetched again; nothing half made is left.
//!
//! A program of its own: strace writes down what the whole process does. `CORACLE_POWER_CUTS` is how many cuts are played.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use image_store::{ImageStore, Options};
use serde::{Deserialize, Serialize};
use testkit::image::{Compression, Image, ImageSpec};
use testkit::powercut::{Cut, Recorder, Tape, describe_below};
use testkit::registry::Registry;
use testkit::tar::Entry;
use tokio_util::sync::CancellationToken;

/// Cuts that are played by default.
const CUTS: usize = 700;
/// After each so many of them everything is pulled again.
const PULL_AGAIN: usize = 10;

/// What the store says of its images at a moment: tags by id; and its snapshots.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Seen {
    images: BTreeMap<String, BTreeSet<String>>,
    snapshots: BTreeSet<String>,
}

fn seen(store: &ImageStore) -> Seen {
    let images = store.list().into_iter().map(|image| (image.id, image.repo_tags.into_iter().collect())).collect();
    Seen { images, snapshots: store.snapshots().into_iter().collect() }
}

/// The trees of all layers, by chain id.
type Layers = BTreeMap<String, BTreeMap<PathBuf, String>>;

fn layers(root: &Path) -> Layers {
    let mut found = Layers::new();
    for entry in std::fs::read_dir(root.join("layers")).unwrap() {
        let path = entry.unwrap().path();
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path.join("layer.json")).unwrap()).unwrap();
        let twin = found.insert(record["chain_id"].as_str().unwrap().to_owned(), describe_below(&path.join("fs")).unwrap());
        assert!(twin.is_none(), "{} is there twice", record["chain_id"]);
    }
    found
}

fn base() -> ImageSpec {
    let files = (0..20).map(|n| Entry::file(&format!("usr/f{n}"), vec![b'a' + n; 700 * usize::from(n)]));
    let first =
        [Entry::dir("etc").mode(0o750).owner(7, 8), Entry::dir("usr"), Entry::file("etc/gone", "x"), Entry::symlink("l", "etc/gone")];
    ImageSpec::new().packed_layer(first.into_iter().chain(files), Compression::Gzip)
}

fn image(version: &str) -> Image {
    let second = [
        Entry::whiteout("etc/gone"),
        Entry::file("bin/su", version.repeat(3000)).mode(0o4755).xattr("user.v", version),
        Entry::hardlink("bin/same", "bin/su"),
        Entry::char_device("dev-null", 1, 3),
        Entry::opaque("usr"),
    ];
    base().packed_layer(second, Compression::Zstd).layer([Entry::file("version", version).owner(1000, 100)]).build()
}

fn options() -> Options {
    Options { retry_pause: std::time::Duration::from_millis(1), ..Options::default() }
}

/// A store lives, and says after each call what there is.
async fn live(root: &Path, registry: &Registry, recorder: &Recorder) -> Layers {
    let mut all = Layers::new();
    for life in 0..2 {
        let store = ImageStore::open(root, options()).await.unwrap();
        let mark = || recorder.mark(&serde_json::to_string(&seen(&store)).unwrap()).unwrap();
        let pull = async |name: &str| {
            let image = store.pull(&format!("{}/{name}", registry.address()), None, CancellationToken::new()).await.unwrap();
            mark();
            image
        };
        registry.add("a", "v", &image(&format!("first{life}")));
        let first = pull("a:v").await;
        let other = pull("other:v").await;
        store.prepare_snapshot("container", &first).await.unwrap();
        mark();
        // The name goes over to another image.
        registry.add("a", "v", &image(&format!("second{life}")));
        let second = pull("a:v").await;
        all.extend(layers(root));
        for id in [&first.id, &other.id] {
            store.remove(id).await.unwrap();
            mark();
        }
        store.remove_snapshot("container").await.unwrap();
        mark();
        pull("other:v").await;
        store.prepare_snapshot(&format!("kept{life}"), &second).await.unwrap();
        mark();
        all.extend(layers(root));
    }
    all
}

/// A directory whose syncs cost nothing, where there is one.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Opens the store after a cut; the error is what is wrong.
async fn judge(cut: &Cut, expected: &Layers, again: Option<&Registry>) -> Result<(), String> {
    let dir = directory();
    cut.write_to(dir.path()).map_err(|error| format!("{error}"))?;
    // This is another boot.
    if dir.path().join("boot").exists() {
        std::fs::write(dir.path().join("boot"), "another").unwrap();
    }
    let store = ImageStore::open(dir.path(), options()).await.map_err(|error| format!("it does not open: {error}"))?;
    let now = seen(&store);
    let parse = |text: &String| serde_json::from_str::<Seen>(text).unwrap();
    let before = cut.marks.last().map(parse).unwrap_or_default();
    let after = cut.next.as_ref().map_or_else(|| before.clone(), parse);
    for (id, tags) in &before.images {
        let Some(later) = after.images.get(id) else { continue };
        let Some(present) = now.images.get(id) else { return Err(format!("image {id} is gone")) };
        if !tags.intersection(later).all(|tag| present.contains(tag)) {
            return Err(format!("image {id} had the names {tags:?} and has {present:?}"));
        }
    }
    let known = |id: &&String| before.images.contains_key(*id) || after.images.contains_key(*id);
    if let Some(id) = now.images.keys().find(|id| !known(id)) {
        return Err(format!("image {id} is there again"));
    }
    let mut owned = BTreeSet::new();
    if let Some(tag) = now.images.values().flatten().find(|tag| !owned.insert((*tag).clone())) {
        return Err(format!("two images are {tag}"));
    }
    check_layers(&store, dir.path(), expected)?;
    check_leftovers(dir.path())?;
    let Some(registry) = again else { return Ok(()) };
    for name in ["a:v", "other:v"] {
        let pulled = store.pull(&format!("{}/{name}", registry.address()), None, CancellationToken::new()).await;
        pulled.map_err(|error| format!("{name} cannot be pulled again: {error}"))?;
    }
    check_layers(&store, dir.path(), expected)?;
    for key in store.snapshots() {
        store.remove_snapshot(&key).await.map_err(|error| format!("snapshot {key} cannot be removed: {error}"))?;
    }
    Ok(())
}

/// Each image's layers are what they were.
fn check_layers(store: &ImageStore, root: &Path, expected: &Layers) -> Result<(), String> {
    let found = layers(root);
    for image in store.list() {
        for chain in &image.layers {
            let Some(layer) = found.get(chain) else { return Err(format!("image {} lacks its layer {chain}", image.id)) };
            let wanted = expected.get(chain).ok_or_else(|| format!("layer {chain} is unknown"))?;
            if let Some((path, what)) = wanted.iter().find(|(path, what)| layer.get(*path) != Some(what)) {
                return Err(format!("{} of layer {chain} is {:?}, it was {what:?}", path.display(), layer.get(path)));
            }
            if layer.len() != wanted.len() {
                return Err(format!("layer {chain} has files that it had not"));
            }
        }
    }
    Ok(())
}

fn check_leftovers(root: &Path) -> Result<(), String> {
    let whole = |dir: &str, name: &str| match dir {
        "layers" => name.bytes().all(|byte| byte.is_ascii_digit()),
        "images" => name.ends_with(".json"),
        _ => !name.contains('.'),
    };
    for dir in ["layers", "images", "snapshots"] {
        for entry in std::fs::read_dir(root.join(dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !whole(dir, &name) {
                return Err(format!("{dir}/{name} is left"));
            }
        }
    }
    Ok(())
}

/// Plays cuts; the error is the first after which something is wrong.
async fn play(tape: &Tape, cuts: usize, expected: &Layers, registry: &Registry) -> Result<(), String> {
    for round in 0..cuts {
        // Each moment once, if there are as many cuts.
        let step = if cuts > tape.len() { round } else { round * tape.len() / cuts };
        let cut = tape.cut(step, round as u64);
        let again = (round % PULL_AGAIN == 0).then_some(registry);
        judge(&cut, expected, again)
            .await
            .map_err(|error| format!("power cut at step {} of {} (seed {round}): {error}", cut.step, tape.len()))?;
    }
    Ok(())
}

#[test]
fn a_power_cut_leaves_images_whole_or_absent() {
    let test = "a_power_cut_leaves_images_whole_or_absent";
    let cuts = std::env::var("CORACLE_POWER_CUTS").ok().map_or(CUTS, |text| text.parse().expect("CORACLE_POWER_CUTS is a number"));
    let ran = testkit::host::on_own_host(test, |_| {
        let (root, scratch) = (directory(), directory());
        let Some(recorder) = Recorder::attach(test, root.path(), scratch.path()).unwrap() else { return };
        let registry = Registry::start().unwrap();
        registry.add("other", "v", &base().layer([Entry::file("other", "other")]).build());
        let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        // Ended before the recording is: what threads of it still do belongs to it.
        let expected = runtime().block_on(live(root.path(), &registry, &recorder));
        let tape = recorder.finish().unwrap();
        let runtime = runtime();
        runtime.block_on(play(&tape, cuts, &expected, &registry)).unwrap();
        eprintln!("{cuts} power cuts over {} changes with {} syncs", tape.len(), tape.syncs());
        // The judge sees a loss where there is one.
        let lost = runtime.block_on(play(&tape.without_syncs(), cuts, &expected, &registry));
        eprintln!("without syncs: {}", lost.expect_err("something is lost"));
    });
    ran.unwrap();
}
