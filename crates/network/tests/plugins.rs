//! The plugins of containernetworking executed from a conflist: directory in `$CORACLE_CNI_PLUGINS`, else where Debian's package
//! containernetworking-plugins has them.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use network::{Bandwidth, Config, Network, PodNetwork, netns};

const TEST: &str = "upstream_plugins_attach_check_and_detach";

#[test]
fn upstream_plugins_attach_check_and_detach() {
    let plugins = std::env::var("CORACLE_CNI_PLUGINS").unwrap_or_else(|_| "/usr/lib/cni".to_owned());
    if !Utf8Path::new(&plugins).join("bridge").exists() {
        eprintln!("SKIPPED: {TEST}: no CNI plugins in {plugins}");
        return;
    }
    let ran = testkit::host::on_own_host(TEST, |_| run(Utf8Path::new(&plugins)));
    ran.unwrap();
}

fn run(plugins: &Utf8Path) {
    let dir = tempfile::tempdir().unwrap();
    let dir = Utf8Path::from_path(dir.path()).unwrap();
    let leases: Utf8PathBuf = dir.join("leases");
    let conflist = serde_json::json!({
        "cniVersion": "1.0.0", "name": "upstream", "plugins": [
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
