//! Images and registry of the testkit, proved on upstream: containerd pulls and imports them. Binaries `containerd` and `ctr` in `$CORACLE_PEERS`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testkit::containerd::{Config, ConfigVersion};
use testkit::host::{Host, checked, on_own_host};
use testkit::image::{Compression, Image, ImageSpec};
use testkit::registry::{Access, Registry};
use testkit::tar::Entry;

const TEST: &str = "containerd_takes_what_the_testkit_makes";

#[test]
fn containerd_takes_what_the_testkit_makes() {
    let peers = match std::env::var_os("CORACLE_PEERS").map(PathBuf::from) {
        Some(peers) if peers.join("containerd").exists() && peers.join("ctr").exists() => peers,
        Some(peers) => return eprintln!("SKIPPED: {TEST}: no containerd and ctr in {}", peers.display()),
        None => return eprintln!("SKIPPED: {TEST}: CORACLE_PEERS is not set"),
    };
    let root = std::env::temp_dir().join(format!("coracle-testkit-{}", std::process::id()));
    std::fs::create_dir_all(&root).unwrap();
    let ran = on_own_host(TEST, |host| run(host, &peers, &root));
    std::fs::remove_dir_all(&root).unwrap();
    ran.unwrap();
}

fn spec() -> ImageSpec {
    let long = format!("{}/f", "n".repeat(150));
    ImageSpec::new()
        .layer([Entry::dir("etc"), Entry::file("etc/gone", "x"), Entry::file("target", "t"), Entry::symlink("l", "/etc")])
        .packed_layer(
            [Entry::whiteout("etc/gone"), Entry::file("t", "t"), Entry::hardlink("h", "t"), Entry::char_device("null", 1, 3)],
            Compression::Zstd,
        )
        .packed_layer([Entry::file(&long, "f").xattr("user.x", b"1".to_vec())], Compression::GzipMembers)
        .packed_layer([Entry::dir("etc"), Entry::opaque("etc")], Compression::None)
        .config("Cmd", vec!["/x"])
}

fn start(host: &Host, peers: &Path, root: &Path) -> std::process::Child {
    let config = Config::within(root, ConfigVersion::Three, None).write().unwrap();
    let log = std::fs::File::create(root.join("log")).unwrap();
    let mut daemon = host.command(peers.join("containerd").to_str().unwrap());
    daemon.arg("-c").arg(config).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn run(host: &Host, peers: &Path, root: &Path) {
    let mut daemon = start(host, peers, root);
    let socket = root.join("c.sock");
    let ctr = |args: &[&str]| checked(Command::new(peers.join("ctr")).arg("-a").arg(&socket).args(args).output().unwrap());
    let deadline = Instant::now() + Duration::from_secs(30);
    while ctr(&["version"]).is_err() {
        let log = || std::fs::read_to_string(root.join("log")).unwrap_or_default();
        assert!(Instant::now() < deadline && daemon.try_wait().unwrap().is_none(), "containerd does not start: {}", log());
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let registry = Registry::start().unwrap();
    let variants: [(&str, Image); 4] = [
        ("oci", spec().build()),
        ("docker", spec().docker().build()),
        ("index", spec().with_index().build()),
        ("list", spec().docker().with_index().build()),
    ];
    for (tag, image) in &variants {
        let mount = root.join(tag);
        std::fs::create_dir_all(&mount).unwrap();
        let reference = registry.add("some/thing", tag, image);
        ctr(&["images", "pull", "--plain-http", &reference]).unwrap();
        ctr(&["images", "mount", &reference, mount.to_str().unwrap()]).unwrap();
        let there = |name: &&str| mount.join(name).symlink_metadata().is_ok();
        let names: Vec<&str> = ["etc/gone", "h", "null", "l"].into_iter().filter(there).collect();
        assert_eq!(names, ["h", "null", "l"], "{tag}");
        ctr(&["images", "unmount", "--rm", mount.to_str().unwrap()]).unwrap();
    }
    registry.set_access(Access::Token { username: "u".into(), password: "p".into() });
    let reference = registry.add("private", "1", &variants[0].1);
    assert!(ctr(&["images", "pull", "--plain-http", &reference]).is_err());
    ctr(&["images", "pull", "--plain-http", "--user", "u:p", &reference]).unwrap();

    variants[2].1.write_oci_archive(&root.join("oci.tar"), "docker.io/library/oci:1").unwrap();
    variants[1].1.write_docker_archive(&root.join("docker.tar"), "docker.io/library/docker:1").unwrap();
    for (archive, name) in [("oci.tar", "docker.io/library/oci:1"), ("docker.tar", "docker.io/library/docker:1")] {
        ctr(&["images", "import", root.join(archive).to_str().unwrap()]).unwrap();
        assert!(ctr(&["images", "ls", "-q"]).unwrap().contains(name), "{archive}");
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
