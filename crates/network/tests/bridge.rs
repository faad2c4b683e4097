//! The built-in network against the real kernel, in network and mount namespaces of its own.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use network::{Config, Error, Network, PodNetwork, PortMapping, Protocol, netns};
use testkit::poll::until;

const WAIT: Duration = Duration::from_secs(5);

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn path(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    fn config(&self) -> Config {
        Config { cni_conf_dir: self.path().join("net.d"), ..Config::new(self.path().join("state")) }
    }

    fn pod(&self, id: &str, ports: &[(u16, u16)]) -> PodNetwork {
        let netns_path = self.path().join(id);
        netns::create(&netns_path).unwrap();
        let mapping =
            |&(host_port, container_port): &(u16, u16)| PortMapping { protocol: Protocol::Tcp, container_port, host_port, host_ip: None };
        PodNetwork {
            sandbox_id: id.into(),
            namespace: "default".into(),
            name: id.into(),
            uid: format!("uid-{id}"),
            netns_path,
            port_mappings: ports.iter().map(mapping).collect(),
            ..PodNetwork::default()
        }
    }
}

/// Runs the test as a host of its own: namespaces, loopback up.
fn on_own_host(test: impl FnOnce(&Host) + Send) {
    if !rustix_is_root() {
        eprintln!("SKIPPED: network bridge tests: not root");
        return;
    }
    linux::netns::in_private(|| {
        let host = Host { dir: tempfile::tempdir().unwrap() };
        linux::rtnl::Route::open().unwrap().set_up(1).unwrap();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        test(&host);
    })
    .unwrap();
}

fn rustix_is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}

fn within<T: Send>(path: &Utf8Path, visit: impl FnOnce() -> T + Send) -> T {
    linux::netns::within(path.as_std_path(), visit).unwrap()
}

/// Serves one connection after another: answers with the peer's address as the server sees it.
fn serve(path: &Utf8Path, port: u16) {
    let listener = within(path, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().unwrap().ip().to_string();
            let _ = stream.write_all(peer.as_bytes());
        }
    });
}

/// Whom the server behind `to` sees, or the error.
fn ask(to: (Ipv4Addr, u16)) -> std::io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from(to), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    text.parse().map_err(std::io::Error::other)
}

fn v4(ips: &[IpAddr]) -> Ipv4Addr {
    match ips[0] {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(_) => panic!("IPv6"),
    }
}

fn links() -> Vec<String> {
    let mut names: Vec<_> = linux::rtnl::Route::open().unwrap().links().unwrap().into_iter().map(|l| l.name).collect();
    names.sort();
    names
}

fn tables() -> Vec<String> {
    linux::nftables::Nftables::open().unwrap().tables(linux::nftables::TableFamily::Ipv4).unwrap()
}

#[test]
fn pods_reach_each_other_and_host_ports() {
    on_own_host(|host| {
        let before = (links(), tables());
        let network = Network::open(host.config()).unwrap();
        let a = host.pod("a", &[(8080, 80)]);
        let b = host.pod("b", &[]);
        let a_ip = v4(&network.setup(&a).unwrap().ips);
        let b_ip = v4(&network.setup(&b).unwrap().ips);
        assert_ne!(a_ip, b_ip);
        serve(&a.netns_path, 80);
        let gateway = Ipv4Addr::new(10, 85, 0, 1);

        assert_eq!(within(&b.netns_path, || ask((a_ip, 80))).unwrap(), b_ip, "pod to pod keeps the source");
        assert_eq!(ask((a_ip, 80)).unwrap(), gateway, "host to pod");
        assert_eq!(ask((Ipv4Addr::LOCALHOST, 8080)).unwrap(), gateway, "host port by 127.0.0.1");
        assert_eq!(ask((gateway, 8080)).unwrap(), gateway, "host port by the host's address");
        assert!(within(&b.netns_path, || ask((gateway, 8080))).is_ok(), "pod to another pod's host port");
        assert!(within(&a.netns_path, || ask((gateway, 8080))).is_ok(), "pod to itself by its host port");
        network.check("a").unwrap();

        network.teardown("a").unwrap();
        network.teardown("a").unwrap();
        assert!(ask((Ipv4Addr::LOCALHOST, 8080)).is_err());
        assert!(matches!(network.check("a"), Err(Error::Unknown { .. })));
        netns::remove(&a.netns_path).unwrap();
        netns::remove(&b.netns_path).unwrap();
        network.remove_all().unwrap();
        until("veths go with their namespaces", || links() == before.0);
        assert_eq!(tables(), before.1);
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "0");
        assert!(!host.path().join("state").exists());
    });
}

fn sh(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
}

/// A neighbour of the host: 192.0.2.2, the host being 192.0.2.1 there.
fn neighbour(host: &Host) -> Utf8PathBuf {
    let outside = host.path().join("outside");
    netns::create(&outside).unwrap();
    // Made from the other side: this host's namespace has no path, but a thread in it has a number.
    let thread = std::fs::read_link("/proc/thread-self").unwrap();
    let thread = thread.file_name().unwrap().to_str().unwrap().to_owned();
    within(&outside, || {
        sh(&format!("ip link add out0 type veth peer name up0 netns {thread}"));
        sh("ip addr add 192.0.2.2/24 dev out0; ip link set out0 up");
    });
    sh("ip addr add 192.0.2.1/24 dev up0; ip link set up0 up");
    outside
}

#[test]
fn pods_are_masqueraded_outside() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let outside = neighbour(host);
        serve(&outside, 90);
        let pod = host.pod("m", &[]);
        network.setup(&pod).unwrap();
        let seen = within(&pod.netns_path, || ask((Ipv4Addr::new(192, 0, 2, 2), 90))).unwrap();
        assert_eq!(seen, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), "masqueraded");
        netns::remove(&pod.netns_path).unwrap();
        netns::remove(&outside).unwrap();
        network.remove_all().unwrap();
    });
}

/// `route_localnet` let pods and neighbours of a host reach what listens on its 127.0.0.1 alone.
#[test]
fn cve_2020_8558_the_hosts_loopback_from_outside() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        // Also where other software of the host has set it for all links.
        std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
        let outside = neighbour(host);
        let pod = host.pod("m", &[]);
        network.setup(&pod).unwrap();
        let attackers = [(&pod.netns_path, "via 10.85.0.1 dev eth0"), (&outside, "via 192.0.2.1 dev out0")];
        for (place, way) in attackers {
            within(place, || {
                std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap();
                sh("ip route flush table local root 127.0.0.0/8");
                sh(&format!("ip route add 127.0.0.0/8 {way}"));
            });
        }
        let send = |text: &[u8]| {
            for (place, _) in attackers {
                within(place, || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(text, (Ipv4Addr::LOCALHOST, 4444)).unwrap());
            }
        };
        let service = UdpSocket::bind((Ipv4Addr::LOCALHOST, 4444)).unwrap();
        service.set_nonblocking(true).unwrap();
        send(b"guarded");
        // That it is the guard which keeps them off is shown by its end.
        sh("nft delete chain ip coracle loopback_guard");
        let mut seen = HashSet::new();
        until("both reach it without the guard", || {
            send(b"open");
            let mut text = [0; 16];
            while let Ok((length, from)) = service.recv_from(&mut text) {
                assert_eq!(&text[..length], b"open", "{from} came past the guard");
                seen.insert(from.ip());
            }
            seen.len() == 2
        });
        netns::remove(&pod.netns_path).unwrap();
        netns::remove(&outside).unwrap();
        network.remove_all().unwrap();
    });
}

#[test]
fn addresses_and_ports_survive_a_restart() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        assert!(matches!(Network::open(host.config()), Err(Error::InUse { .. })));
        let a = host.pod("a", &[(8080, 80)]);
        let a_ip = v4(&network.setup(&a).unwrap().ips);
        serve(&a.netns_path, 80);
        drop(network);

        let network = Network::open(host.config()).unwrap();
        assert_eq!(v4(&network.attachment("a").unwrap().ips), a_ip);
        assert!(ask((Ipv4Addr::LOCALHOST, 8080)).is_ok(), "host port after the restart");
        assert!(matches!(network.setup(&a), Err(Error::Exists { .. })));
        let b = host.pod("b", &[(8080, 80)]);
        assert!(matches!(network.setup(&b), Err(Error::PortTaken { owner, .. }) if owner == "a"));
        let b = PodNetwork { port_mappings: Vec::new(), ..b };
        assert_ne!(v4(&network.setup(&b).unwrap().ips), a_ip);

        // What no sandbox owns any more is torn down, what is alive stays.
        network.reconcile(&HashSet::from(["a".to_owned()])).unwrap();
        assert_eq!(network.sandboxes(), ["a"]);
        assert!(ask((Ipv4Addr::LOCALHOST, 8080)).is_ok());
        network.check("a").unwrap();

        // A flushed ruleset is written anew by the next pod with a host port.
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
        let c = host.pod("c", &[(8081, 80)]);
        network.setup(&c).unwrap();
        assert!(ask((Ipv4Addr::LOCALHOST, 8080)).is_ok());
        for id in ["a", "b", "c"] {
            netns::remove(&host.path().join(id)).unwrap();
        }
        network.remove_all().unwrap();
    });
}

#[test]
fn datagram_flows_follow_the_host_port() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        // One client with one port throughout: to the kernel it is always the same flow.
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let ask = |word: &[u8]| {
            client.send_to(word, (Ipv4Addr::LOCALHOST, 5353)).unwrap();
            let mut answer = [0; 16];
            client.recv(&mut answer).map(|len| answer[..len].to_vec())
        };
        assert!(ask(b"too early").is_err());
        for id in ["a", "b"] {
            let mut pod = host.pod(id, &[(5353, 53)]);
            pod.port_mappings[0].protocol = Protocol::Udp;
            network.setup(&pod).unwrap();
            let server = within(&pod.netns_path, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).unwrap());
            let name = id.to_owned();
            let serving = std::thread::spawn(move || {
                let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
                server.send_to(name.as_bytes(), from).unwrap();
            });
            assert_eq!(ask(b"who").unwrap(), id.as_bytes());
            serving.join().unwrap();
            network.teardown(id).unwrap();
            netns::remove(&pod.netns_path).unwrap();
        }
        network.remove_all().unwrap();
    });
}

#[test]
fn many_pods_come_and_go_at_once() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let pods: Vec<PodNetwork> = (0..24).map(|n| host.pod(&format!("pod{n}"), &[(9000 + n, 80)])).collect();
        let started = Instant::now();
        let addresses: HashSet<Ipv4Addr> = std::thread::scope(|scope| {
            let setup = |pod| v4(&network.setup(pod).unwrap().ips);
            let threads: Vec<_> = pods.iter().map(|pod| scope.spawn(move || setup(pod))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(addresses.len(), pods.len());
        eprintln!("24 pods attached in {:?}", started.elapsed());
        pods.iter().for_each(|pod| network.check(&pod.sandbox_id).unwrap());
        // Half go while the ruleset is flushed under the others' feet.
        std::thread::scope(|scope| {
            for pod in pods.iter().step_by(2) {
                let network = &network;
                scope.spawn(move || {
                    network.teardown(&pod.sandbox_id).unwrap();
                    netns::remove(&pod.netns_path).unwrap();
                });
            }
            scope.spawn(|| assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success()));
        });
        let live: HashSet<String> = pods.iter().skip(1).step_by(2).map(|p| p.sandbox_id.clone()).collect();
        network.reconcile(&live).unwrap();
        live.iter().for_each(|id| network.check(id).unwrap());
        assert_eq!(network.sandboxes().len(), 12);
        // A bridge that somebody deleted is made again; whose pods hung on it is told by check.
        assert!(Command::new("ip").args(["link", "del", "coracle0"]).status().unwrap().success());
        let late = host.pod("late", &[]);
        network.setup(&late).unwrap();
        network.check("late").unwrap();
        assert!(matches!(network.check("pod1"), Err(Error::Broken { .. })));
        for pod in pods.iter().chain([&late]) {
            netns::remove(&pod.netns_path).unwrap();
        }
        network.remove_all().unwrap();
        until("all links go", || links() == ["lo"]);
    });
}

#[test]
fn a_host_port_of_one_address_is_that_address_alone() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let gateway = Ipv4Addr::new(10, 85, 0, 1);
        let mut one = host.pod("one", &[(8080, 80)]);
        one.port_mappings[0].host_ip = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
        network.setup(&one).unwrap();
        serve(&one.netns_path, 80);
        network.check("one").unwrap();
        assert!(ask((Ipv4Addr::LOCALHOST, 8080)).is_ok());
        assert!(ask((gateway, 8080)).is_err());
        // The same port of another address is free; of all addresses it is not; of none that exists it is refused.
        let mut other = host.pod("other", &[(8080, 81)]);
        assert!(matches!(network.setup(&other), Err(Error::PortTaken { .. })));
        other.port_mappings[0].host_ip = Some("fd00::1".parse().unwrap());
        assert!(matches!(network.setup(&other), Err(Error::PortMapping { .. })));
        other.port_mappings[0].host_ip = Some(IpAddr::V4(gateway));
        network.setup(&other).unwrap();
        serve(&other.netns_path, 81);
        assert!(ask((gateway, 8080)).is_ok());
        let limited = host.pod("limited", &[]);
        let asked = |ip: &str| PodNetwork { requested_ips: vec![ip.into()], ..limited.clone() };
        for bad in ["10.85.0.1", "10.86.0.9", "10.85.0.2", "x"] {
            assert!(matches!(network.setup(&asked(bad)), Err(Error::Address { .. })), "{bad}");
        }
        assert_eq!(v4(&network.setup(&asked("10.85.7.9/16")).unwrap().ips), Ipv4Addr::new(10, 85, 7, 9));
        for id in ["one", "other", "limited"] {
            netns::remove(&host.path().join(id)).unwrap();
        }
        network.remove_all().unwrap();
    });
}

#[test]
fn bandwidth_annotations_are_carried_out() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let annotated = |id: &str, ingress: &str, egress: &str| {
            let annotations =
                [("ingress", ingress), ("egress", egress)].map(|(d, v)| (format!("kubernetes.io/{d}-bandwidth"), v.to_owned()));
            PodNetwork { annotations: annotations.into_iter().collect(), ..host.pod(id, &[]) }
        };
        let bad = annotated("bad", "fast", "1M");
        assert!(network.setup(&bad).unwrap_err().to_string().contains("kubernetes.io/ingress-bandwidth"));
        assert!(network.setup(&PodNetwork { annotations: [("kubernetes.io/egress-bandwidth".into(), "1".into())].into(), ..bad }).is_err());
        let pod = annotated("limited", "8M", "16M");
        let ip = v4(&network.setup(&pod).unwrap().ips);
        let server = within(&pod.netns_path, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap());
        // 8 Mbit/s towards the pod are 1 MB/s, 64 KiB of it at once; 16 Mbit/s from it are 2 MB/s.
        let bytes = vec![7u8; 600_000];
        let copied = bytes.clone();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut got = vec![0; copied.len()];
            stream.read_exact(&mut got).unwrap();
            stream.write_all(&copied).unwrap();
        });
        let mut stream = TcpStream::connect((ip, 80)).unwrap();
        let started = Instant::now();
        stream.write_all(&bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).unwrap();
        serving.join().unwrap();
        let took = started.elapsed();
        assert!(took > Duration::from_millis(500), "without limits this takes milliseconds, it took {took:?}");
        netns::remove(&pod.netns_path).unwrap();
        netns::remove(&host.path().join("bad")).unwrap();
        network.remove_all().unwrap();
    });
}

#[test]
fn what_a_crash_left_is_deleted_and_what_lives_is_kept() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let pods = ["lost", "gone", "alive"].map(|id| host.pod(id, &[]));
        pods.iter().for_each(|pod| drop(network.setup(pod).unwrap()));
        let veths = || links().iter().filter(|name| name.starts_with("cv")).count();
        assert_eq!(veths(), 3);
        drop(network);
        // One whose record never came to be, though its namespace is held; one whose namespace is gone, though it is on record.
        std::fs::remove_file(host.path().join("state/sandboxes/lost.json")).unwrap();
        netns::remove(&pods[1].netns_path).unwrap();
        until("the veth of the namespace that is gone", || veths() == 2);
        let network = Network::open(host.config()).unwrap();
        network.reconcile(&HashSet::from(["alive".to_owned()])).unwrap();
        assert_eq!((network.sandboxes(), veths()), (vec!["alive".to_owned()], 1));
        network.check("alive").unwrap();
        for pod in &pods {
            netns::remove(&pod.netns_path).unwrap();
        }
        network.remove_all().unwrap();
    });
}

#[test]
fn records_cut_off_by_a_crash_are_harmless() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        drop(network);
        let dir = host.path().join("state/sandboxes");
        std::fs::write(dir.join("x.tmp"), b"{\"vers").unwrap();
        let old = r#"{"version":1,"boot_id":"earlier","sandbox_id":"y","netns_path":"/gone","interface":"eth0",
                      "kind":{"bridge":{"address":"10.85.0.2","ports":[]}}}"#;
        std::fs::write(dir.join("y.json"), old).unwrap();
        let network = Network::open(host.config()).unwrap();
        assert!(network.sandboxes().is_empty(), "a record from before the reboot is forgotten");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
        // A namespace that vanished half-way leaves no record and no address.
        let mut gone = host.pod("gone", &[]);
        netns::remove(&gone.netns_path).unwrap();
        assert!(network.setup(&gone).is_err());
        assert!(network.sandboxes().is_empty());
        gone.sandbox_id = "../x".into();
        assert!(matches!(network.setup(&gone), Err(Error::SandboxId { .. })));
        network.remove_all().unwrap();
    });
}

#[test]
fn a_second_instance_is_told_who_has_the_bridge() {
    on_own_host(|host| {
        let network = Network::open(host.config()).unwrap();
        let second = Config { state_dir: host.path().join("second"), ..host.config() };
        match Network::open(second.clone()) {
            Err(Error::BridgeOwned { owner, .. }) => assert_eq!(owner, host.path().join("state")),
            other => panic!("{other:?}"),
        }
        let other_bridge = Config { bridge: "other0".into(), ..second };
        assert!(matches!(Network::open(other_bridge), Err(Error::CidrTaken { .. })));
        network.remove_all().unwrap();
    });
}

/// A plugin that logs what it is asked, and gives a result in which the previous one is kept.
const PLUGIN: &str = r#"#!/bin/sh
conf=$(cat)
printf '%s %s %s %s %s %s\n' "${0##*/}" "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_ARGS" "$conf" >> "LOG"
case "$CNI_COMMAND" in
ADD) if [ -e "FAIL" ] && [ "${0##*/}" = second ]; then echo '{"cniVersion":"1.1.0","code":11,"msg":"try later","details":"d"}'; exit 1; fi
     echo '{"cniVersion":"1.1.0","interfaces":[{"name":"br"},{"name":"eth0","sandbox":"x"}],"ips":[{"address":"fd00::5/64","interface":1},{"address":"10.1.2.3/24","interface":1},{"address":"10.1.2.1/24","interface":0}]}' ;;
esac
"#;

#[test]
fn a_conflist_takes_precedence_and_is_executed() {
    on_own_host(|host| {
        let log: Utf8PathBuf = host.path().join("log");
        let fail = host.path().join("fail");
        let bin = host.path().join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(host.path().join("net.d")).unwrap();
        for name in ["first", "second"] {
            let path = bin.join(name);
            std::fs::write(&path, PLUGIN.replace("LOG", log.as_str()).replace("FAIL", fail.as_str())).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let conflist = r#"{"cniVersion":"1.0.0","cniVersions":["1.1.0"],"name":"net","plugins":[
            {"type":"first","mine":1},{"type":"second","capabilities":{"portMappings":true}}]}"#;
        let conf_path = host.path().join("net.d/10-net.conflist");
        std::fs::write(&conf_path, conflist).unwrap();
        let config = Config { cni_bin_dirs: vec![bin], ..host.config() };
        let network = Network::open(config.clone()).unwrap();
        assert_eq!(links(), ["lo"], "no bridge beside a conflist");
        assert_eq!(network.status().unwrap().network, "net");
        let mut pod = host.pod("p", &[(8080, 80)]);
        pod.port_mappings[0].host_ip = Some("127.0.0.1".parse().unwrap());
        let attachment = network.setup(&pod).unwrap();
        let ips: Vec<String> = attachment.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.2.3", "fd00::5"]);
        network.check("p").unwrap();
        drop(network);
        // DEL works from the record alone: after a restart, and with the configuration gone.
        std::fs::remove_file(&conf_path).unwrap();
        let network = Network::open(Config { bridge: "unused0".into(), ..config.clone() }).unwrap();
        assert_eq!(network.attachment("p").unwrap(), attachment);
        network.teardown("p").unwrap();
        let lines = std::fs::read_to_string(&log).unwrap();
        let of = |n: usize| lines.lines().nth(n).unwrap().to_owned();
        let starts: Vec<String> = lines.lines().map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            starts,
            ["first STATUS", "second STATUS", "first ADD", "second ADD", "first CHECK", "second CHECK", "second DEL", "first DEL"]
        );
        assert!(
            of(2)
                .contains("p eth0 IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=p;K8S_POD_UID=uid-p")
        );
        assert!(of(2).contains("\"mine\":1") && of(2).contains("\"cniVersion\":\"1.1.0\"") && !of(2).contains("prevResult"));
        assert!(!of(2).contains("runtimeConfig") && of(3).contains("\"hostPort\":8080") && of(3).contains("\"hostIP\":\"127.0.0.1\""));
        assert!(of(3).contains("prevResult") && of(6).contains("prevResult") && of(7).contains("10.1.2.3/24"));

        // A plugin that fails: its own words, and everything is deleted again.
        std::fs::write(&conf_path, conflist).unwrap();
        std::fs::write(&fail, "").unwrap();
        let error = network.setup(&pod).unwrap_err().to_string();
        assert!(error.contains("second") && error.contains("try later") && error.contains("code 11"), "{error}");
        assert!(network.sandboxes().is_empty());
        assert!(std::fs::read_to_string(&log).unwrap().lines().last().unwrap().starts_with("first DEL"));

        std::fs::write(&conf_path, "{").unwrap();
        assert!(network.status().is_err() && network.setup(&pod).is_err(), "a broken conflist is not passed over");
        netns::remove(&pod.netns_path).unwrap();
        std::fs::remove_file(&conf_path).unwrap();
        network.remove_all().unwrap();
    });
}
