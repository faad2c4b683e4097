//! Plugins executed from a conflist: those of containernetworking, of Debian's package (1.1) and built by Go (1.9, in
//! `$CORACLE_PEERS/cni`), and one that writes down what it is asked.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use network::{Bandwidth, Config, Network, PodNetwork, netns};

#[test]
fn upstream_plugins_attach_check_and_detach() {
    const TEST: &str = "upstream_plugins_attach_check_and_detach";
    upstream(TEST, Utf8Path::new("/usr/lib/cni"), "1.0.0", "the CNI plugins are Debian's package");
}

#[test]
fn built_plugins_attach_check_and_detach() {
    const TEST: &str = "built_plugins_attach_check_and_detach";
    let peers = std::env::var("CORACLE_PEERS").unwrap_or_default();
    upstream(TEST, &Utf8PathBuf::from(peers).join("cni"), "1.1.0", "the CNI plugins 1.9 are built by Go");
}

fn upstream(test: &str, plugins: &Utf8Path, version: &str, reason: &str) {
    if !plugins.join("bridge").exists() {
        eprintln!("SKIPPED: {test}: {reason}");
        return;
    }
    testkit::host::on_own_host(test, |_| run(plugins, version)).unwrap();
}

/// Which commands each version of the specification has.
#[test]
fn plugins_are_asked_what_their_version_knows() {
    const TEST: &str = "plugins_are_asked_what_their_version_knows";
    let versions: [(&str, &[&str]); 4] = [
        ("0.3.1", &["ADD", "DEL"]),
        ("0.4.0", &["ADD", "CHECK", "DEL"]),
        ("1.0.0", &["ADD", "CHECK", "DEL"]),
        ("1.1.0", &["STATUS", "ADD", "CHECK", "GC", "DEL"]),
    ];
    let ran = testkit::host::on_own_host(TEST, |_| {
        for (version, commands) in versions {
            let asked = ask_all(version);
            let names: Vec<&str> = asked.lines().filter_map(|line| line.split_once(' ')).map(|(command, _)| command).collect();
            assert_eq!(names, commands, "specification {version}");
            let attachments = r#""cni.dev/valid-attachments":[{"containerID":"abc","ifname":"eth0"}]"#;
            assert!(asked.lines().filter(|line| line.starts_with("GC ")).all(|line| line.contains(attachments)), "{asked}");
        }
    });
    ran.unwrap();
}

/// Calls everything once, and answers the plugin's record: a command and its configuration a line.
fn ask_all(version: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(dir.path()).unwrap();
    let record = dir.join("record");
    let of = if version.starts_with('0') { r#""version":"4","# } else { "" };
    let script = format!(
        "#!/bin/sh\necho \"$CNI_COMMAND $(cat)\" >> {record}\n\
         [ \"$CNI_COMMAND\" != ADD ] || echo '{{\"cniVersion\":\"{version}\",\"ips\":[{{{of}\"address\":\"10.77.0.9/24\"}}]}}'\n"
    );
    std::fs::write(dir.join("recorder"), script).unwrap();
    std::fs::set_permissions(dir.join("recorder"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(dir.join("net.d")).unwrap();
    let conflist = serde_json::json!({"cniVersion": version, "name": "recorded", "plugins": [{"type": "recorder"}]});
    std::fs::write(dir.join("net.d/10.conflist"), conflist.to_string()).unwrap();
    let config = Config { cni_conf_dir: dir.join("net.d"), cni_bin_dirs: vec![dir.to_owned()], ..Config::new(dir.join("state")) };
    let network = Network::open(config).unwrap();
    network.status().unwrap();
    let pod = PodNetwork { sandbox_id: "abc".into(), netns_path: dir.join("abc"), ..PodNetwork::default() };
    netns::create(&pod.netns_path).unwrap();
    let attachment = network.setup(&pod).unwrap();
    assert_eq!(attachment.ips, [IpAddr::from([10, 77, 0, 9])]);
    network.check("abc").unwrap();
    network.reconcile(&HashSet::from(["abc".to_owned()])).unwrap();
    network.teardown("abc").unwrap();
    netns::remove(&pod.netns_path).unwrap();
    std::fs::read_to_string(record).unwrap()
}

fn run(plugins: &Utf8Path, version: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(dir.path()).unwrap();
    let leases: Utf8PathBuf = dir.join("leases");
    let conflist = serde_json::json!({
        "cniVersion": version, "name": "upstream", "plugins": [
            {"type": "bridge", "bridge": "up0", "isGateway": true, "ipam": {
                "type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.77.0.0/24"}]]}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
            {"type": "tuning", "sysctl": {"net.core.somaxconn": "512"}},
        ]
    });
    std::fs::create_dir(dir.join("net.d")).unwrap();
    std::fs::write(dir.join("net.d/10.conflist"), conflist.to_string()).unwrap();
    let config = Config { cni_conf_dir: dir.join("net.d"), cni_bin_dirs: vec![plugins.to_owned()], ..Config::new(dir.join("state")) };
    let network = Network::open(config.clone()).unwrap();
    network.status().unwrap();
    let pod = PodNetwork {
        sandbox_id: "abc".into(),
        namespace: "default".into(),
        name: "web".into(),
        uid: "u".into(),
        netns_path: dir.join("abc"),
        bandwidth: Some(Bandwidth { ingress_bits_per_second: 10_000_000, egress_bits_per_second: 10_000_000 }),
        ..PodNetwork::default()
    };
    netns::create(&pod.netns_path).unwrap();
    let attachment = network.setup(&pod).unwrap();
    let ip = attachment.ips[0];
    assert!(ip.to_string().starts_with("10.77.0."), "{attachment:?}");
    let within = |visit: &(dyn Fn() + Sync)| linux::netns::within(pod.netns_path.as_std_path(), visit).unwrap();
    within(&|| assert_eq!(std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim(), "512"));
    let listener = linux::netns::within(pod.netns_path.as_std_path(), || TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], 80))).unwrap());
    assert!(TcpStream::connect_timeout(&SocketAddr::from((ip, 80)), Duration::from_secs(5)).is_ok());
    drop(listener);
    network.check("abc").unwrap();
    let lease = |ip: IpAddr| leases.join("upstream").join(ip.to_string());
    assert!(lease(ip).exists());
    drop(network);
    // After a restart the record alone knows what to delete, here because no sandbox owns it.
    let network = Network::open(config).unwrap();
    assert_eq!(network.attachment("abc").unwrap(), attachment);
    network.reconcile(&HashSet::new()).unwrap();
    assert!(network.sandboxes().is_empty() && !lease(ip).exists());
    netns::remove(&pod.netns_path).unwrap();
    network.remove_all().unwrap();
}
