//! Pulls from a registry on loopback: what arrives, and what goes wrong.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use image_store::{Auth, Error, ErrorKind, Image, ImageStore, Options, Stage};
use testkit::image::{Compression, ImageSpec};
use testkit::registry::{Access, Fault, Registry};
use testkit::tar::Entry;
use tokio_util::sync::CancellationToken;

fn options() -> Options {
    Options { retry_pause: Duration::from_millis(1), ca_file: None, ..Options::default() }
}

async fn open(root: &Path) -> ImageStore {
    ImageStore::open(root, options()).await.unwrap()
}

async fn pull(store: &ImageStore, reference: &str) -> Result<Image, Error> {
    store.pull(reference, None, CancellationToken::new()).await
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Directories of layers, committed or not.
fn layer_dirs(root: &Path) -> BTreeSet<String> {
    std::fs::read_dir(root.join("layers")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// Runs in mount and network namespaces of its own, with a runtime of its own.
fn on_own_host<F: Future<Output = ()>>(name: &str, test: impl FnOnce(PathBuf) -> F + Send) {
    let ran = testkit::host::on_own_host(name, |_| {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(test(dir.path().to_owned()));
    });
    ran.unwrap();
}

/// Mounts a snapshot and runs `look` on it.
async fn mounted(store: &ImageStore, key: &str, image: &Image, at: &Path, look: impl FnOnce(&Path)) {
    let mounts = store.prepare_snapshot(key, image).await.unwrap();
    std::fs::create_dir_all(at).unwrap();
    let mount = &mounts[0];
    let done =
        std::process::Command::new("mount").args(["-t", &mount.r#type, &mount.source, "-o", &mount.options.join(",")]).arg(at).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    look(at);
    assert!(std::process::Command::new("umount").arg(at).status().unwrap().success());
}

/// Entries of every kind, in layers of every packing.
fn everything(long: &str) -> ImageSpec {
    ImageSpec::new()
        .packed_layer(
            [
                Entry::dir("./").mode(0o751),
                Entry::dir("etc").mode(0o750).owner(7, 8),
                Entry::file("etc/gone", "x"),
                Entry::file("etc/kept", "old").owner(1000, 100).mode(0o4711).mtime(1_234_567_890),
                Entry::dir("hidden"),
                Entry::file("hidden/a", "a"),
                Entry::file("target", "shared"),
            ],
            Compression::Gzip,
        )
        .packed_layer(
            [
                Entry::whiteout("etc/gone"),
                Entry::dir("hidden"),
                Entry::opaque("hidden"),
                Entry::file("hidden/b", "b"),
                Entry::executable("ping", "#!").xattr("security.capability", CAPABILITY.to_vec()).owner(0, 0),
                Entry::hardlink("ping2", "ping"),
                Entry::hardlink("from-below", "target"),
                Entry::char_device("null", 1, 3),
                Entry::symlink("abs", "/etc/kept"),
            ],
            Compression::Zstd,
        )
        .packed_layer([Entry::file(long, noise(5000)).xattr("user.note", b"hi".to_vec())], Compression::GzipMembers)
        .packed_layer([Entry::file("plain", "p"), Entry::file("plain", "second wins")], Compression::None)
        .config("Entrypoint", vec!["/ping"])
        .config("Env", vec!["A=b"])
        .config("User", "1000:100")
        .config("Volumes", serde_json::json!({"/data": {}}))
        .with_index()
}

/// `struct vfs_cap_data` of revision 2 with one capability, as setcap writes it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// What [`everything`] must look like when it is mounted.
fn check_everything(at: &Path, long: &str) {
    let stat = |path: &str| at.join(path).symlink_metadata().unwrap();
    let text = |path: &str| std::fs::read_to_string(at.join(path)).unwrap();
    assert_eq!(stat(".").mode() & 0o7777, 0o751);
    assert!(!at.join("etc/gone").exists());
    // The second layer names etc/.wh.gone but not etc: it must look as below.
    assert_eq!((stat("etc").mode() & 0o7777, stat("etc").uid(), stat("etc").gid()), (0o750, 7, 8));
    assert_eq!((stat("etc/kept").mode() & 0o7777, stat("etc/kept").uid(), stat("etc/kept").gid()), (0o4711, 1000, 100));
    assert_eq!(stat("etc/kept").mtime(), 1_234_567_890);
    assert!(!at.join("hidden/a").exists() && at.join("hidden/b").exists());
    assert_eq!(stat("ping").ino(), stat("ping2").ino());
    let mut value = [0; 32];
    let len = rustix::fs::getxattr(at.join("ping"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..len], CAPABILITY);
    assert_eq!(text("from-below"), "shared");
    assert!(stat("null").file_type().is_char_device());
    assert_eq!(stat("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(std::fs::read_link(at.join("abs")).unwrap(), Path::new("/etc/kept"));
    assert_eq!(std::fs::read(at.join(long)).unwrap(), noise(5000));
    assert_eq!(text("plain"), "second wins");
}

#[test]
fn an_image_arrives_as_it_was_built() {
    on_own_host("an_image_arrives_as_it_was_built", |root| async move {
        let registry = Registry::start().unwrap();
        let long = format!("deep/{}/file", "n".repeat(120));
        let spec = everything(&long);
        for (tag, spec) in [("oci", spec.clone()), ("docker", spec.docker())] {
            let built = spec.build();
            let reference = registry.add("a/b", tag, &built);
            let store = open(&root.join(tag)).await;
            let image = pull(&store, &reference).await.unwrap();
            assert_eq!(image.id, built.id());
            assert_eq!(image.repo_tags, std::slice::from_ref(&reference));
            assert_eq!(image.repo_digests, [format!("{}/a/b@{}", registry.address(), built.top().digest())]);
            assert_eq!((image.config.entrypoint.as_slice(), image.config.user.as_str()), (&["/ping".to_owned()][..], "1000:100"));
            assert_eq!(image.config.volumes, ["/data"]);
            mounted(&store, "c1", &image, &root.join("mnt"), |at| {
                check_everything(at, &long);
                std::fs::write(at.join("written"), vec![1; 8192]).unwrap();
            })
            .await;
            assert!(store.snapshot_usage("c1").await.unwrap().bytes >= 8192);
            store.remove_snapshot("c1").await.unwrap();
            store.remove_snapshot("c1").await.unwrap();
            assert!(matches!(store.snapshot_usage("c1").await, Err(Error::SnapshotMissing { .. })));
            for name in [&reference, &image.id, &image.id[7..19].to_owned(), &image.repo_digests[0]] {
                assert_eq!(store.get(name).map(|i| i.id), Some(built.id()), "{name}");
            }
            assert!(store.usage().await.unwrap().inodes > 10);
            store.remove(&image.id).await.unwrap();
            assert!(store.list().is_empty() && layer_dirs(&root.join(tag)).is_empty());
        }
    });
}

#[test]
fn links_of_lower_layers_are_written_through() {
    on_own_host("links_of_lower_layers_are_written_through", |root| async move {
        let registry = Registry::start().unwrap();
        let built = ImageSpec::new()
            .layer([
                Entry::dir("usr"),
                Entry::dir("usr/lib").mode(0o711),
                Entry::dir("usr/lib/sub").mode(0o700),
                Entry::file("usr/lib/below", "below"),
                Entry::file("usr/lib/sub/gone", "x"),
                Entry::symlink("lib", "usr/lib"),
                Entry::symlink("out", "../../../../../../usr/./lib/../lib"),
                Entry::symlink("loop", "loop"),
                Entry::symlink("new", "/not/there"),
            ])
            .layer([
                Entry::file("usr/lib/own", "own"),
                Entry::file("lib/a", "a"),
                Entry::file("lib/sub/b", "b"),
                Entry::whiteout("lib/sub/gone"),
                Entry::hardlink("lib/linked", "lib/a"),
                Entry::file("out/c", "c"),
                Entry::file("new/d", "d"),
            ])
            .build();
        let store = open(&root.join("store")).await;
        let image = pull(&store, &registry.add("x", "1", &built)).await.unwrap();
        mounted(&store, "c", &image, &root.join("mnt"), |at| {
            assert_eq!(std::fs::read_link(at.join("lib")).unwrap(), Path::new("usr/lib"));
            let text = |path: &str| std::fs::read_to_string(at.join("usr/lib").join(path)).unwrap();
            assert_eq!(
                [text("below"), text("own"), text("a"), text("sub/b"), text("linked"), text("c")],
                ["below", "own", "a", "b", "a", "c"]
            );
            assert!(!at.join("usr/lib/sub/gone").exists());
            assert_eq!(at.join("usr/lib").metadata().unwrap().mode() & 0o777, 0o711);
            assert_eq!(at.join("usr/lib/sub").metadata().unwrap().mode() & 0o777, 0o700);
            assert_eq!(std::fs::read_to_string(at.join("not/there/d")).unwrap(), "d");
        })
        .await;
        let looping = ImageSpec::new().layer([Entry::symlink("loop", "loop")]).layer([Entry::file("loop/x", "x")]).build();
        assert!(pull(&store, &registry.add("x", "2", &looping)).await.is_err());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_ever_written_outside_the_layer() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let out = outside.to_str().unwrap();
    let up = "../".repeat(30);
    let registry = Registry::start().unwrap();
    let refused: Vec<Vec<Entry>> = vec![
        vec![Entry::file("../evil", "x")],
        vec![Entry::file(&format!("a/../../{out}/evil"), "x")],
        vec![Entry::hardlink("h", &format!("{up}{out}/secret"))],
        vec![Entry::dir("d"), Entry::hardlink("d/h", "../../secret")],
        vec![Entry::file("f", "x").xattr("trusted.overlay.redirect", b"/".to_vec())],
    ];
    let contained: Vec<Vec<Entry>> = vec![
        vec![Entry::dir(out.trim_start_matches('/')), Entry::symlink("l", out), Entry::file("l/evil", "x")],
        vec![Entry::dir("x"), Entry::symlink("l", &format!("{up}x")), Entry::file("l/evil", "x")],
        vec![Entry::symlink("secret", &format!("{out}/secret")), Entry::file("secret", "changed")],
        vec![Entry::symlink("s", &format!("{out}/secret")), Entry::hardlink("h", "s"), Entry::file("h", "changed")],
        vec![Entry::dir(out), Entry::file(&format!("{out}/evil"), "x")],
        vec![Entry::dir(out.trim_start_matches('/')), Entry::symlink("l", out), Entry::whiteout("l/secret")],
        vec![Entry::dir("a"), Entry::symlink("a", out), Entry::dir("a").mode(0o777)],
    ];
    let store = open(&dir.path().join("store")).await;
    for (n, entries) in refused.iter().chain(&contained).enumerate() {
        let reference = registry.add("evil", &n.to_string(), &ImageSpec::new().layer(entries.clone()).build());
        let pulled = pull(&store, &reference).await;
        if n < refused.len() {
            assert_eq!(pulled.unwrap_err().kind(), ErrorKind::DataLoss, "{entries:?}");
        } else {
            assert!(pulled.is_ok(), "{entries:?}: {pulled:?}");
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "{entries:?}");
        assert_eq!(std::fs::read_to_string(outside.join("secret")).unwrap(), "secret", "{entries:?}");
    }
    // A link that leads nowhere within the layer is an error, not a way out.
    let dangling = ImageSpec::new().layer([Entry::symlink("l", out), Entry::file("l/evil", "x")]).build();
    assert!(pull(&store, &registry.add("evil", "dangling", &dangling)).await.is_err());
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_asked_for_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new().layer([Entry::file("a", "a")]).build();
    let reference = registry.add("private", "1", &image);
    let basic = |password: &str| Some(Auth::Basic { username: "u".into(), password: password.into() });
    let (username, password) = ("u".to_owned(), "p".to_owned());
    let cases = [
        (Access::Basic { username: username.clone(), password: password.clone() }, basic("p"), true),
        (Access::Basic { username: username.clone(), password: password.clone() }, basic("wrong"), false),
        (Access::Basic { username: username.clone(), password: password.clone() }, None, false),
        (Access::Token { username: username.clone(), password: password.clone() }, basic("p"), true),
        (Access::Token { username: username.clone(), password: password.clone() }, basic("wrong"), false),
        (Access::Token { username: username.clone(), password: password.clone() }, None, false),
        (Access::Token { username: String::new(), password: String::new() }, None, true),
        (Access::Token { username: username.clone(), password }, Some(Auth::IdentityToken("p".into())), true),
        (Access::Token { username, password: "x".into() }, Some(Auth::RegistryToken("let-me-in".into())), true),
    ];
    for (n, (access, auth, allowed)) in cases.into_iter().enumerate() {
        registry.set_access(access.clone());
        let store = open(&dir.path().join(n.to_string())).await;
        let pulled = store.pull(&reference, auth.clone(), CancellationToken::new()).await;
        match pulled {
            Ok(_) => assert!(allowed, "{access:?} {auth:?}"),
            Err(e) => assert!(!allowed && e.kind() == ErrorKind::PermissionDenied, "{access:?} {auth:?}: {e}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_transfers_go_on_where_they_stopped() {
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new().layer([Entry::file("big", noise(400_000))]).build();
    let reference = registry.add("big", "1", &image);
    let layer = image.layers[0].digest();
    let options = Options { stall_timeout: Duration::from_millis(300), ..options() };
    for (faults, resumed) in [
        (vec![Fault::BreakOff(100_000), Fault::BreakOff(100_000)], true),
        (vec![Fault::BreakOff(100_000), Fault::NoRange], true),
        (vec![Fault::Stall(50_000)], true),
        (vec![Fault::Status(503), Fault::Status(429)], false),
        (vec![Fault::Redirect], false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path(), options.clone()).await.unwrap();
        for fault in &faults {
            registry.fault(&layer, fault.clone(), 1);
        }
        let before = registry.count("Range");
        pull(&store, &reference).await.unwrap_or_else(|e| panic!("{faults:?}: {e}"));
        assert_eq!(registry.count("Range") > before, resumed, "{faults:?}");
    }
    // What never comes is an error in the end.
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), Options { retries_max: 2, ..options }).await.unwrap();
    registry.fault(&layer, Fault::Status(500), 100);
    let error = pull(&store, &reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(layer_dirs(dir.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_lies_is_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new().layer([Entry::file("a", noise(9000))]).build();
    let reference = registry.add("x", "1", &image);
    let layer = image.layers[0].digest();
    let config = image.config.digest();
    for (part, fault, kind) in [
        (layer.as_str(), Fault::Rubbish, ErrorKind::DataLoss),
        (&layer, Fault::Body(vec![0; 20_000]), ErrorKind::DataLoss),
        (&config, Fault::Rubbish, ErrorKind::DataLoss),
        ("manifests/1", Fault::Rubbish, ErrorKind::DataLoss),
        ("manifests/1", Fault::Body(b"{}".to_vec()), ErrorKind::DataLoss),
        ("manifests/1", Fault::Body(vec![b' '; 9 << 20]), ErrorKind::DataLoss),
        ("manifests/1", Fault::Status(404), ErrorKind::NotFound),
    ] {
        registry.fault(part, fault.clone(), 1);
        let error = pull(&store, &reference).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{part} {fault:?}: {error}");
        assert!(layer_dirs(dir.path()).is_empty(), "{part}");
        assert!(store.list().is_empty());
    }
    // A layer whose archive is not what the configuration says.
    let other = ImageSpec::new().layer([Entry::file("a", "other")]).build();
    let mut lying = image.clone();
    lying.layers[0] = other.layers[0].clone();
    let text = String::from_utf8(lying.manifest.bytes.clone()).unwrap().replace(&layer, &other.layers[0].digest());
    let sizes = (image.layers[0].bytes.len(), other.layers[0].bytes.len());
    lying.manifest.bytes = text.replace(&format!("\"size\":{}", sizes.0), &format!("\"size\":{}", sizes.1)).into_bytes();
    let error = pull(&store, &registry.add("x", "2", &lying)).await.unwrap_err();
    assert!(matches!(&error, Error::Digest { object, .. } if object.contains("archive")), "{error}");
    // No archive at all; one that ends in the middle; no registry.
    for raw in [noise(3000), testkit::tar::archive(&[Entry::file("a", vec![1; 4000])])[..2000].to_vec()] {
        let broken = ImageSpec::new().raw_layer(raw).build();
        let error = pull(&store, &registry.add("x", "3", &broken)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss, "{error}");
    }
    let missing = pull(&store, &format!("{}/none:1", registry.address())).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let options = Options { retries_max: 1, ..options() };
    let nowhere = ImageStore::open(&dir.path().join("nowhere"), options).await.unwrap();
    assert_eq!(pull(&nowhere, "127.0.0.1:1/x:1").await.unwrap_err().kind(), ErrorKind::Unavailable);
    pull(&store, &reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decompression_bomb_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { unpacked_bytes_max: 1 << 20, entries_max: 100, ..options() };
    let store = ImageStore::open(dir.path(), options).await.unwrap();
    let registry = Registry::start().unwrap();
    let bombs = [
        ImageSpec::new().layer([Entry::file("zeros", vec![0; 8 << 20])]).build(),
        ImageSpec::new().packed_layer([Entry::file("zeros", vec![0; 8 << 20])], Compression::Zstd).build(),
        ImageSpec::new().raw_layer([testkit::tar::archive(&[Entry::file("a", "a")]), vec![0; 8 << 20]].concat()).build(),
        ImageSpec::new().layer((0..200).map(|n| Entry::file(&n.to_string(), ""))).build(),
    ];
    for (n, bomb) in bombs.iter().enumerate() {
        let error = pull(&store, &registry.add("bomb", &n.to_string(), bomb)).await.unwrap_err();
        assert!(matches!(error, Error::Layer { .. }), "{n}: {error}");
        assert!(layer_dirs(dir.path()).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_layer_is_fetched_once_and_kept_as_long_as_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let registry = Registry::start().unwrap();
    let base = ImageSpec::new().layer([Entry::file("base", noise(50_000))]);
    let first = base.clone().layer([Entry::file("one", "1")]).build();
    let second = base.layer([Entry::file("two", "2")]).build();
    let (a, b) = (registry.add("x", "a", &first), registry.add("x", "b", &second));
    let mut progress = store.progress();
    let pulls = [pull(&store, &a), pull(&store, &a), pull(&store, &b), pull(&store, &b)];
    let images: Vec<Image> = futures::future::join_all(pulls).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(registry.count(&first.layers[0].digest()), 1, "the base is fetched once for all four");
    assert_eq!(registry.count(&first.layers[1].digest()) + registry.count(&second.layers[1].digest()), 2);
    assert_eq!(layer_dirs(dir.path()).len(), 3);
    let mut stages = Vec::new();
    while let Ok(event) = progress.try_recv() {
        stages.push(event.stage);
    }
    assert!(stages.contains(&Stage::Fetching) && stages.contains(&Stage::Committed) && stages.last() == Some(&Stage::Done));

    // Removed while a container uses it: gone as an image, its layers stay until the snapshot goes.
    store.prepare_snapshot("c", &images[0]).await.unwrap();
    store.remove(&a).await.unwrap();
    assert!(store.get(&a).is_none());
    assert_eq!(layer_dirs(dir.path()).len(), 3);
    store.remove_snapshot("c").await.unwrap();
    assert_eq!(layer_dirs(dir.path()).len(), 2, "the layer of its own is gone, the base is the other image's");
    // A tag that moves leaves the old image without it.
    registry.add("x", "b", &first);
    let moved = pull(&store, &b).await.unwrap();
    assert_eq!(moved.id, first.id());
    assert_eq!(store.get(&b).unwrap().id, first.id());
    assert!(store.get(&images[2].id).unwrap().repo_tags.is_empty());
    for image in store.list() {
        store.remove(&image.id).await.unwrap();
    }
    assert!(layer_dirs(dir.path()).is_empty());
    assert!(matches!(store.prepare_snapshot("../c", &moved).await, Err(Error::Argument { .. })));
    assert!(store.prepare_snapshot("c", &moved).await.is_err(), "no layers, no snapshot");
    assert!(store.snapshots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_leaves_nothing_half_done() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new().layer([Entry::file("big", noise(300_000))]).build();
    let reference = registry.add("x", "1", &image);
    registry.fault(&image.layers[0].digest(), Fault::Stall(100_000), 1);
    let cancel = CancellationToken::new();
    let mut progress = store.progress();
    let (pulled, ()) = tokio::join!(store.pull(&reference, None, cancel.clone()), async {
        let _ = progress.recv().await;
        cancel.cancel();
    });
    assert_eq!(pulled.unwrap_err().kind(), ErrorKind::Cancelled);
    let deadline = Instant::now() + testkit::poll::PATIENCE;
    while !layer_dirs(dir.path()).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", layer_dirs(dir.path()));
        tokio::task::yield_now().await;
    }
    pull(&store, &reference).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_finds_what_a_power_cut_broke() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new().layer([Entry::file("base", noise(3000))]).layer([Entry::file("top", noise(5000))]).build();
    let reference = registry.add("x", "1", &image);
    let store = open(root).await;
    let id = pull(&store, &reference).await.unwrap().id;
    store.prepare_snapshot("c", &store.get(&id).unwrap()).await.unwrap();
    assert!(matches!(ImageStore::open(root, options()).await, Err(Error::InUse { .. })));
    drop(store);

    let store = open(root).await;
    assert_eq!(store.get(&reference).unwrap().id, id, "a restart finds all");
    assert_eq!(store.snapshots(), ["c"]);
    drop(store);

    let file_of = |name: &str| {
        let dirs = layer_dirs(root).into_iter().map(|n| root.join("layers").join(n).join("fs").join(name));
        dirs.into_iter().find(|p| p.exists()).unwrap()
    };
    let cut = |path: &Path, len: u64| std::fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
    let image_file = root.join("images").join(format!("{}.json", &id[7..]));
    type Damage<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let damages: Vec<Damage> = vec![
        ("file cut off", Box::new(|| cut(&file_of("top"), 10))),
        ("file missing", Box::new(|| std::fs::remove_file(file_of("base")).unwrap())),
        ("layer record cut off", Box::new(|| cut(&file_of("top").parent().unwrap().with_file_name("layer.json"), 20))),
        ("layer record empty", Box::new(|| cut(&file_of("base").parent().unwrap().with_file_name("layer.json"), 0))),
        ("image record cut off", Box::new(|| cut(&image_file, 30))),
        ("image record empty", Box::new(|| cut(&image_file, 0))),
    ];
    for (what, damage) in damages {
        damage();
        std::fs::create_dir_all(root.join("layers/77.new/fs/half")).unwrap();
        std::fs::create_dir_all(root.join("layers/78.dead/fs")).unwrap();
        std::fs::create_dir_all(root.join("snapshots/half.new/fs")).unwrap();
        std::fs::write(root.join("images/x.tmp"), "{").unwrap();
        std::fs::write(root.join("boot"), "an earlier boot").unwrap();
        let store = open(root).await;
        assert!(store.get(&reference).is_none(), "{what}: the image is not whole");
        assert!(!layer_dirs(root).iter().any(|name| name.contains('.')), "{what}");
        assert_eq!(std::fs::read_dir(root.join("snapshots")).unwrap().count(), 1);
        assert_eq!(pull(&store, &reference).await.unwrap().id, id, "{what}");
        assert_eq!(std::fs::read(file_of("top")).unwrap(), noise(5000));
        assert_eq!(std::fs::read(file_of("base")).unwrap(), noise(3000));
        store.collect_garbage().await.unwrap();
        assert_eq!(layer_dirs(root).len(), 2, "{what}");
    }
    // A record of a newer program is not for this one to remove.
    let text = std::fs::read_to_string(&image_file).unwrap().replace("\"version\":1", "\"version\":2");
    std::fs::write(&image_file, text).unwrap();
    assert!(matches!(ImageStore::open(root, options()).await, Err(Error::RecordVersion { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_are_imported() {
    let dir = tempfile::tempdir().unwrap();
    let layer = [Entry::file("same", "same")];
    let built = ImageSpec::new().layer(layer.clone()).layer([Entry::file("a", "a")]).layer(layer).with_index().build();
    let name = "docker.io/library/x:1";
    built.write_oci_layout(&dir.path().join("layout"), name).unwrap();
    built.write_oci_archive(&dir.path().join("oci.tar"), name).unwrap();
    built.write_docker_archive(&dir.path().join("docker.tar"), name).unwrap();
    for source in ["layout", "oci.tar", "docker.tar"] {
        let root = dir.path().join(format!("store-{source}"));
        let store = open(&root).await;
        let images = store.import(&dir.path().join(source)).await.unwrap();
        assert_eq!((images.len(), images[0].id.clone()), (1, built.id()), "{source}");
        assert_eq!(store.get("x:1").unwrap().layers.len(), 3, "{source}");
        assert_eq!(layer_dirs(&root).len(), 3);
        assert_eq!(images[0].repo_digests.is_empty(), source == "docker.tar");
    }
    let store = open(&dir.path().join("store")).await;
    std::fs::write(dir.path().join("rubbish"), noise(2000)).unwrap();
    assert_eq!(store.import(&dir.path().join("rubbish")).await.unwrap_err().kind(), ErrorKind::DataLoss);
    assert!(store.import(&dir.path().join("none")).await.is_err());
    let blob = dir.path().join("layout/blobs/sha256").join(&built.layers[1].digest()[7..]);
    std::fs::write(blob, noise(100)).unwrap();
    assert!(matches!(store.import(&dir.path().join("layout")).await, Err(Error::Digest { .. })));
    assert!(store.list().is_empty());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    on_own_host("a_full_disk_is_an_error_and_leaves_nothing", |dir| async move {
        let root = dir.join("small");
        std::fs::create_dir(&root).unwrap();
        let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=300k", "small"]).arg(&root).status();
        assert!(mounted.unwrap().success());
        let registry = Registry::start().unwrap();
        let big = registry.add("x", "big", &ImageSpec::new().layer([Entry::file("big", noise(600_000))]).build());
        let small = registry.add("x", "small", &ImageSpec::new().layer([Entry::file("small", noise(9000))]).build());
        let store = open(&root).await;
        let error = pull(&store, &big).await.unwrap_err();
        let full = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
        assert!(full.into_iter().any(|e| e.to_string().contains("No space left")), "{error:?}");
        assert!(layer_dirs(&root).is_empty());
        pull(&store, &small).await.unwrap();
        drop(store);
        assert_eq!(open(&root).await.list().len(), 1);
        assert!(std::process::Command::new("umount").arg(&root).status().unwrap().success());
    });
}

#[test]
fn a_registry_elsewhere_is_spoken_to_by_tls() {
    on_own_host("a_registry_elsewhere_is_spoken_to_by_tls", |dir| async move {
        let address = "192.0.2.1:5000";
        linux::rtnl::Route::open().unwrap().add_address(1, "192.0.2.1".parse().unwrap(), 32).unwrap();
        let registry = Registry::start().unwrap();
        let built = ImageSpec::new().layer([Entry::file("a", noise(200_000))]).build();
        registry.add("x", "1", &built);
        let authority = rcgen::generate_simple_self_signed(["192.0.2.1".to_owned()]).unwrap();
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, authority.cert.pem()).unwrap();
        let front = tls_front(address, &registry.address(), &authority).await;
        let trusting = Options { ca_file: Some(ca_file), ..options() };
        let store = ImageStore::open(&dir.join("a"), trusting).await.unwrap();
        let image = pull(&store, &format!("{address}/x:1")).await.unwrap();
        assert_eq!((image.id, registry.count("/blobs/")), (built.id(), 2));
        // Without the authority nothing is asked, let alone in plain text.
        let before = registry.requests().len();
        let store = ImageStore::open(&dir.join("b"), Options { retries_max: 0, ..options() }).await.unwrap();
        let error = pull(&store, &format!("{address}/x:1")).await.unwrap_err();
        assert!(error.to_string().contains("TLS"), "{error}");
        assert_eq!(registry.requests().len(), before);
        front.abort();
    });
}

/// Ends TLS at `address` and passes the bytes on.
async fn tls_front(address: &str, to: &str, identity: &rcgen::CertifiedKey<rcgen::KeyPair>) -> tokio::task::JoinHandle<()> {
    use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.signing_key.serialize_der()));
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![identity.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let to = to.to_owned();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, to) = (acceptor.clone(), to.clone());
            tokio::spawn(async move {
                let (Ok(mut secure), Ok(mut plain)) = (acceptor.accept(stream).await, tokio::net::TcpStream::connect(to).await) else {
                    return;
                };
                let _ = tokio::io::copy_bidirectional(&mut secure, &mut plain).await;
            });
        }
    })
}

/// The process that is killed below; a test by itself only in name.
#[tokio::test(flavor = "multi_thread")]
async fn puller() {
    let Ok(task) = std::env::var("CORACLE_TEST_PULL") else { return };
    let (root, reference) = task.split_once('|').unwrap();
    let store = open(Path::new(root)).await;
    let _ = pull(&store, reference).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_killed_anywhere_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let registry = Registry::start().unwrap();
    let image = ImageSpec::new()
        .layer([Entry::file("a", noise(60_000))])
        .layer([Entry::file("b", noise(200_000)), Entry::file("c", "c")])
        .layer([Entry::file("d", noise(90_000))])
        .build();
    let reference = registry.add("x", "1", &image);
    for (layer, len) in [(0, 0), (0, 30_000), (1, 100_000), (1, 199_000), (2, 1), (2, 80_000)] {
        let digest = image.layers[layer].digest();
        registry.fault(&digest, Fault::Stall(len), 1);
        let before = registry.count(&digest);
        let mut puller = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "puller", "--nocapture"])
            .env("CORACLE_TEST_PULL", format!("{}|{reference}", root.display()))
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + testkit::poll::PATIENCE;
        // Asked for, and something of it is on disk or on its way; then nothing more comes, and it is killed.
        while registry.count(&digest) == before {
            assert!(Instant::now() < deadline && puller.try_wait().unwrap().is_none(), "layer {layer} is never asked for");
            tokio::task::yield_now().await;
        }
        puller.kill().unwrap();
        puller.wait().unwrap();
        let store = open(root).await;
        assert!(store.list().is_empty());
        assert!(layer_dirs(root).iter().all(|name| name.parse::<u64>().is_ok()), "{:?}", layer_dirs(root));
        drop(store);
        // What was committed before the kill stays, and must not be asked for again; so each round begins from nothing.
        std::fs::remove_dir_all(root.join("layers")).unwrap();
    }
    let store = open(root).await;
    assert_eq!(pull(&store, &reference).await.unwrap().id, image.id());
}

#[test]
fn mirrors_are_asked_before_the_registry() {
    on_own_host("mirrors_are_asked_before_the_registry", |dir| async move {
        let (first, second) = (Registry::start().unwrap(), Registry::start().unwrap());
        let image = ImageSpec::new().layer([Entry::file("a", noise(5000))]).build();
        second.add("some/where", "1", &image);
        let folder = dir.join("hosts/registry.invalid");
        std::fs::create_dir_all(&folder).unwrap();
        let hosts = format!(
            "server = 'http://127.0.0.1:1'\n[host.'http://{}']\n[host.'http://{}'.header]\nx-mirror = 'yes'\n",
            first.address(),
            second.address()
        );
        std::fs::write(folder.join("hosts.toml"), hosts).unwrap();
        let options = Options { hosts_dir: Some(dir.join("hosts")), ..options() };
        let store = ImageStore::open(&dir.join("store"), options).await.unwrap();
        let pulled = pull(&store, "registry.invalid/some/where:1").await.unwrap();
        assert_eq!(pulled.repo_tags, ["registry.invalid/some/where:1"]);
        assert_eq!((first.count("/v2/some/where/manifests/1"), second.count("/v2/some/where/manifests/1")), (1, 1));
        // Neither mirror has it: the error is the last endpoint's.
        let error = pull(&store, "registry.invalid/some/where:2").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        std::fs::write(folder.join("hosts.toml"), "skip_verify = true\n").unwrap();
        let error = pull(&store, "registry.invalid/some/where:1").await.unwrap_err();
        assert!(error.to_string().contains("skip_verify") && error.to_string().contains("hosts.toml"), "{error}");
    });
}
