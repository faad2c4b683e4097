//! Services in, transactions out: what a change costs; and the table in the kernel, in a network namespace of its own.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use client::ObjectKey;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use crate::config::Config;
use crate::worker::{BY_SERVICE, Sources, Worker};

const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const WAIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

fn config() -> Config {
    let flags = ["x", "--kubeconfig=k", "--bind-address=192.0.2.1", "--nftables-table=kube-proxy-test", "--cluster-cidr=10.85.0.0/16"];
    Cli::try_parse_from(flags).expect("flags").config
}

fn sources() -> Sources {
    let sources = Sources::default();
    sources.slices.add_index(BY_SERVICE, |slice| crate::service_of(slice).map(|key| key.to_string()).into_iter().collect());
    sources
}

fn put_service(sources: &Sources, name: &str, spec: Value) -> ObjectKey {
    let service = json!({"metadata": {"namespace": "d", "name": name}, "spec": spec});
    sources.services.apply(Event::Apply(serde_json::from_value(service).expect("service")), &mut None);
    ObjectKey::new("d", name)
}

fn put_endpoints(sources: &Sources, name: &str, protocol: &str, addresses: &[&str]) -> ObjectKey {
    let endpoints: Vec<Value> =
        addresses.iter().map(|address| json!({"addresses": [address], "nodeName": "n", "conditions": {"ready": true}})).collect();
    let slice = json!({"metadata": {"namespace": "d", "name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": 8080, "protocol": protocol}]});
    sources.slices.apply(Event::Apply(serde_json::from_value(slice).expect("slice")), &mut None);
    ObjectKey::new("d", name)
}

fn spec(address: &str, change: Value) -> Value {
    let mut spec = json!({"clusterIP": address, "ports": [{"port": 80, "protocol": "TCP"}]});
    for (key, value) in change.as_object().expect("object") {
        spec[key] = value.clone();
    }
    spec
}

/// Runs the test in a network namespace with a host's address, a default route, and addresses that stand for pods.
fn on_own_host(test: impl FnOnce() + Send) {
    linux::netns::in_private(|| {
        let mut commands = vec![
            "link set lo up".to_owned(),
            "link add uplink type bridge".to_owned(),
            format!("address add {HOST}/24 dev uplink"),
            "link set uplink up".to_owned(),
            "route add default via 192.0.2.254".to_owned(),
        ];
        commands.extend((2..6).map(|last| format!("address add 10.85.0.{last}/32 dev lo")));
        for command in commands {
            let status = Command::new("ip").args(command.split(' ')).status().expect("ip runs");
            assert!(status.success(), "ip {command}");
        }
        test();
    })
    .expect("a namespace");
}

/// Answers each connection with its own address.
fn serve(last: u8) {
    let address = SocketAddr::from((Ipv4Addr::new(10, 85, 0, last), 8080));
    let listener = TcpListener::bind(address).expect("bind");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(&[last]);
        }
    });
}

/// Which endpoint answers.
fn ask(to: &str) -> std::io::Result<u8> {
    let mut stream = TcpStream::connect_timeout(&to.parse().expect("address"), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer[0])
}

fn asked(to: &str, times: usize) -> BTreeSet<u8> {
    (0..times).map(|_| ask(to).unwrap_or_else(|error| panic!("{to}: {error}"))).collect()
}

fn sync(worker: &mut Worker, keys: &[ObjectKey]) -> crate::apply::Cost {
    worker.sync(keys.iter().cloned().collect()).expect("sync")
}

#[test]
fn a_change_costs_what_changed() {
    on_own_host(|| {
        let sources = sources();
        let mut worker = Worker::new(config(), "n".to_owned(), sources.clone());
        for number in 0..300 {
            let name = format!("s{number}");
            put_service(&sources, &name, spec(&format!("10.96.{}.{}", number / 200, number % 200 + 1), json!({})));
            let addresses: Vec<String> = (0..20).map(|last| format!("10.{}.{}.{last}", 85 + number / 250, number % 250)).collect();
            put_endpoints(&sources, &name, "TCP", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let all = sync(&mut worker, &[]);
        assert!(all.elements > 6000 && all.messages > 600, "{all:?}");
        // One endpoint is exchanged for another: its slot, and its way to itself.
        let mut addresses: Vec<String> = (0..20).map(|last| format!("10.85.7.{last}")).collect();
        addresses[3] = "10.85.7.99".to_owned();
        let list = |addresses: &[String]| addresses.to_vec();
        let put = |addresses: Vec<String>| put_endpoints(&sources, "s7", "TCP", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
        let one = sync(&mut worker, &[put(list(&addresses))]);
        assert_eq!((one.elements, one.messages), (4, 5), "two deleted, two added, and the transaction's begin");
        // One less: its slot is taken by the last, and the chain draws from fewer.
        addresses.remove(0);
        let less = sync(&mut worker, &[put(list(&addresses))]);
        assert!(less.elements <= 4 && less.messages <= 7, "{less:?}");
        assert_eq!(sync(&mut worker, &[ObjectKey::new("d", "s7"), ObjectKey::new("d", "s8")]), crate::apply::Cost::default());
        // A successor finds the table as it should be: only the fixed part is written, no element.
        let mut successor = Worker::new(config(), "n".to_owned(), sources.clone());
        assert_eq!(sync(&mut successor, &[]).elements, 0);
        // A Service that goes takes all with it.
        sources.services.apply(
            Event::Delete(serde_json::from_value(json!({"metadata": {"namespace": "d", "name": "s7"}})).expect("service")),
            &mut None,
        );
        sync(&mut successor, &[ObjectKey::new("d", "s7")]);
        successor.sweep();
        assert!(!successor.check().expect("check"));
        let listed = Command::new("nft").args(["list", "table", "ip", "kube-proxy-test"]).output();
        if let Ok(listed) = listed {
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            assert!(text.contains("service/d/s8/tcp/") && !text.contains("d/s7/") && !text.contains("10.85.7.1 "), "{text}");
        }
        crate::remove(&config()).expect("remove");
        crate::remove(&config()).expect("remove again");
    });
}

#[test]
fn traffic_is_led_and_refused() {
    on_own_host(|| {
        (2..6).for_each(serve);
        let sources = sources();
        let mut worker = Worker::new(config(), "n".to_owned(), sources.clone());
        put_service(&sources, "web", spec("10.96.0.9", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]})));
        put_endpoints(&sources, "web", "TCP", &["10.85.0.2", "10.85.0.3"]);
        put_service(&sources, "none", spec("10.96.0.10", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30081}]})));
        put_service(&sources, "local", spec("10.96.0.11", json!({"internalTrafficPolicy": "Local"})));
        put_endpoints(&sources, "local", "TCP", &["10.85.0.4"]);
        sync(&mut worker, &[]);
        let both = BTreeSet::from([2, 3]);
        assert_eq!(asked("10.96.0.9:80", 40), both);
        assert_eq!(asked("192.0.2.1:30080", 40), both);
        assert_eq!(asked("10.96.0.11:80", 5), BTreeSet::from([4]));
        for refused in ["10.96.0.10:80", "192.0.2.1:30081", "10.96.0.9:81"] {
            let error = ask(refused).expect_err(refused);
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}: {error}");
        }
        // An endpoint that comes to the empty Service, and one that goes from the other.
        let keys = [put_endpoints(&sources, "none", "TCP", &["10.85.0.5"]), put_endpoints(&sources, "web", "TCP", &["10.85.0.3"])];
        sync(&mut worker, &keys);
        assert_eq!(asked("10.96.0.10:80", 5), BTreeSet::from([5]));
        assert_eq!(asked("192.0.2.1:30081", 5), BTreeSet::from([5]));
        assert_eq!(asked("10.96.0.9:80", 10), BTreeSet::from([3]));
        // Rules that somebody removed come back.
        crate::remove(&config()).expect("remove");
        assert!(worker.check().expect("check"));
        sync(&mut worker, &[]);
        assert_eq!(asked("10.96.0.9:80", 5), BTreeSet::from([3]));
        crate::remove(&config()).expect("remove");
    });
}

#[test]
fn clients_stay_with_their_endpoint_also_across_a_restart() {
    on_own_host(|| {
        (2..6).for_each(serve);
        let sources = sources();
        let mut worker = Worker::new(config(), "n".to_owned(), sources.clone());
        let affinity = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}});
        put_service(&sources, "web", spec("10.96.0.9", affinity));
        let all = ["10.85.0.2", "10.85.0.3", "10.85.0.4", "10.85.0.5"];
        put_endpoints(&sources, "web", "TCP", &all);
        sync(&mut worker, &[]);
        let first = ask("10.96.0.9:80").expect("an answer");
        assert_eq!(asked("10.96.0.9:80", 20), BTreeSet::from([first]));
        // While somebody asks all the time, the proxy is started anew several times: no gap, and the same endpoint.
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let asking = std::thread::spawn(move || {
            let mut found = BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                found.insert(ask("10.96.0.9:80").expect("no gap"));
            }
            found
        });
        for _ in 0..5 {
            worker = Worker::new(config(), "n".to_owned(), sources.clone());
            sync(&mut worker, &[]);
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(asking.join().expect("no gap"), BTreeSet::from([first]));
        // The endpoint goes: the client gets another, and stays with it though the first comes back.
        let rest: Vec<&str> = all.into_iter().filter(|address| !address.ends_with(&format!(".{first}"))).collect();
        let key = put_endpoints(&sources, "web", "TCP", &rest);
        sync(&mut worker, std::slice::from_ref(&key));
        let second = ask("10.96.0.9:80").expect("an answer");
        assert_ne!(second, first);
        put_endpoints(&sources, "web", "TCP", &all);
        sync(&mut worker, &[key]);
        assert_eq!(asked("10.96.0.9:80", 20), BTreeSet::from([second]));
        crate::remove(&config()).expect("remove");
    });
}

#[test]
fn a_flow_of_datagrams_follows_the_endpoints() {
    on_own_host(|| {
        let answering = |last: u8| {
            let socket = UdpSocket::bind((Ipv4Addr::new(10, 85, 0, last), 8080)).expect("bind");
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[last], from);
                }
            });
        };
        (2..4).for_each(answering);
        let sources = sources();
        let mut worker = Worker::new(config(), "n".to_owned(), sources.clone());
        let key = put_service(&sources, "dns", spec("10.96.0.9", json!({"ports": [{"port": 53, "protocol": "UDP"}]})));
        put_endpoints(&sources, "dns", "UDP", &["10.85.0.2"]);
        sync(&mut worker, &[]);
        // One socket, one flow: without help it would go to its first endpoint for ever.
        let socket = UdpSocket::bind((HOST, 0)).expect("bind");
        socket.connect("10.96.0.9:53").expect("connect");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout");
        let answer = || {
            let deadline = Instant::now() + WAIT;
            let mut buffer = [0];
            while Instant::now() < deadline {
                let _ = socket.send(b"?");
                if socket.recv(&mut buffer).is_ok() {
                    return buffer[0];
                }
            }
            panic!("no answer");
        };
        assert_eq!(answer(), 2);
        put_endpoints(&sources, "dns", "UDP", &["10.85.0.3"]);
        sync(&mut worker, &[key]);
        let deadline = Instant::now() + WAIT;
        while answer() != 3 {
            assert!(Instant::now() < deadline, "the flow did not follow");
        }
        crate::remove(&config()).expect("remove");
    });
}

#[test]
fn load_balancers_let_only_their_sources_pass() {
    on_own_host(|| {
        (2..4).for_each(serve);
        let sources = sources();
        let mut worker = Worker::new(config(), "n".to_owned(), sources.clone());
        let balanced = |name: &str, cluster_ip: &str, address: &str, range: &str| {
            let service = json!({"metadata": {"namespace": "d", "name": name},
                "spec": spec(cluster_ip, json!({"type": "LoadBalancer", "loadBalancerSourceRanges": [range]})),
                "status": {"loadBalancer": {"ingress": [{"ip": address, "ipMode": "VIP"}]}}});
            sources.services.apply(Event::Apply(serde_json::from_value(service).expect("service")), &mut None);
            put_endpoints(&sources, name, "TCP", &["10.85.0.2"]);
        };
        balanced("open", "10.96.0.9", "203.0.113.1", "192.0.2.0/24");
        balanced("closed", "10.96.0.10", "203.0.113.2", "198.51.100.0/24");
        put_service(&sources, "external", spec("10.96.0.11", json!({"externalIPs": ["203.0.113.3"], "externalTrafficPolicy": "Local"})));
        put_endpoints(&sources, "external", "TCP", &["10.85.0.3"]);
        sync(&mut worker, &[]);
        assert_eq!(asked("203.0.113.1:80", 3), BTreeSet::from([2]));
        assert_eq!(asked("203.0.113.3:80", 3), BTreeSet::from([3]));
        assert_eq!(asked("10.96.0.10:80", 3), BTreeSet::from([2]), "the cluster IP is open to all");
        assert!(ask("203.0.113.2:80").is_err());
        crate::remove(&config()).expect("remove");
    });
}
