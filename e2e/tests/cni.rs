//! Upstream's CNI plugins under `coracle cri`, driven by crictl: Debian's 1.1 and 1.9 built by Go, each with every version of the
//! specification that it speaks.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::node::{Node, on_node};
use serde_json::{Value, json};

/// The address of the bridge, and the port of the host that leads to the pod.
const GATEWAY: [u8; 4] = [10, 77, 0, 1];
const HOST_PORT: u16 = 18080;
const POD_PORT: u16 = 8080;
/// The versions of the specification; the plugins 1.1 do not speak the last.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The plugins that a conflist here names.
const PLUGINS: [&str; 5] = ["bridge", "host-local", "portmap", "firewall", "tuning"];

#[test]
fn upstreams_cni_plugins_under_our_runtime() -> Result<()> {
    let test = "upstreams_cni_plugins_under_our_runtime";
    let Some(crictl) = e2e::peer("crictl") else {
        e2e::skip(test, "crictl is built by Go");
        return Ok(());
    };
    let mut sets = Vec::new();
    match Path::new("/usr/lib/cni/bridge").exists() {
        true => sets.push(("Debian's 1.1", PathBuf::from("/usr/lib/cni"), &VERSIONS[..3])),
        false => e2e::skip("debians_cni_plugins_under_our_runtime", "they are Debian's package containernetworking-plugins"),
    }
    match e2e::peer("cni/bridge") {
        Some(bridge) => sets.push(("1.9", bridge.with_file_name(""), &VERSIONS[..])),
        None => e2e::skip(test, "the plugins 1.9 are built by Go"),
    }
    let done = on_node(test, |node| {
        node.registry.add("tools", "v1", &e2e::images::busybox("v1")?);
        node.start_ours(&[])?;
        let run = Run { node, crictl };
        let image = run.image();
        run.crictl(&["pull", &image])?;
        for (name, folder, versions) in &sets {
            run.install(folder)?;
            for version in *versions {
                println!("--- {name}, specification {version}");
                run.pod(version).with_context(|| format!("plugins {name}, specification {version}"))?;
            }
        }
        Ok(())
    })?;
    if done.is_none() {
        e2e::skip(test, "it cannot have a host of its own");
    }
    Ok(())
}

struct Run<'a, 'b> {
    node: &'a Node<'b>,
    crictl: PathBuf,
}

impl Run<'_, '_> {
    fn image(&self) -> String {
        format!("{}/tools:v1", self.node.registry.address())
    }

    /// The folder of configuration and plugins.
    fn folder(&self) -> PathBuf {
        self.node.folder().join("cni")
    }

    fn leases(&self) -> PathBuf {
        self.node.folder().join("leases")
    }

    fn install(&self, plugins: &Path) -> Result<()> {
        let _ = fs::remove_dir_all(self.folder());
        fs::create_dir(self.folder()).context("failed to make a folder")?;
        for plugin in PLUGINS {
            std::os::unix::fs::symlink(plugins.join(plugin), self.folder().join(plugin)).context("failed to make a link")?;
        }
        Ok(())
    }

    fn crictl(&self, words: &[&str]) -> Result<String> {
        let socket = format!("unix://{}", self.node.socket().display());
        let mut command = self.node.enter(&self.crictl);
        command.args(["--runtime-endpoint", &socket, "--image-endpoint", &socket, "--timeout", "120s"]).args(words);
        let output = command.output().context("failed to run crictl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(output.status.success(), "crictl {words:?}: {}", text(&output.stderr));
        Ok(text(&output.stdout))
    }

    fn write(&self, name: &str, value: &Value) -> Result<String> {
        let path = self.node.folder().join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path.display().to_string())
    }

    /// What is left of pods on the host: interfaces, rules and leases.
    fn leftovers(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for (program, arguments) in [("ip", &["-o", "link", "show"][..]), ("nft", &["list", "ruleset"])] {
            let output =
                self.node.enter(Path::new(program)).args(arguments).output().with_context(|| format!("failed to run {program}"))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let is_pods = |line: &&str| line.contains("veth") || line.contains("10.77.0.") || line.contains(&HOST_PORT.to_string());
            found.extend(text.lines().filter(is_pods).map(|line| line.trim().to_owned()));
        }
        let leases = fs::read_dir(self.leases().join("net")).into_iter().flatten().flatten();
        found.extend(leases.map(|lease| lease.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with("10.")));
        Ok(found)
    }

    /// A pod has an address and a host port, serves, can be executed in, and leaves nothing.
    fn pod(&self, version: &str) -> Result<()> {
        let mut conflist = json!({"cniVersion": version, "name": "net", "plugins": [
            {"type": "bridge", "bridge": "up0", "isGateway": true, "ipMasq": true,
                "ipam": {"type": "host-local", "dataDir": self.leases(), "ranges": [[{"subnet": "10.77.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
            {"type": "tuning", "sysctl": {"net.core.somaxconn": "512"}},
        ]});
        if let (true, Some(plugins)) = (version != "0.3.1", conflist["plugins"].as_array_mut()) {
            // It speaks 0.4.0 and later.
            plugins.push(json!({"type": "firewall", "backend": "iptables"}));
        }
        self.write("cni/10.conflist", &conflist)?;
        let info: Value = serde_json::from_str(&self.crictl(&["info"])?).context("info printed no JSON")?;
        let conditions = info["status"]["conditions"].as_array().cloned().unwrap_or_default();
        ensure!(conditions.iter().any(|c| c["type"] == "NetworkReady" && c["status"] == true), "not ready: {conditions:?}");
        let before = self.leftovers()?;
        let uid = format!("u-{version}");
        let sandbox = json!({"metadata": {"name": "web", "namespace": "default", "uid": uid, "attempt": 1}, "log_directory": self.node.folder().join("logs"),
            "port_mappings": [{"protocol": 0, "container_port": POD_PORT, "host_port": HOST_PORT}], "linux": {}});
        let sandbox = self.write("pod.json", &sandbox)?;
        let pod = self.crictl(&["runp", &sandbox])?;
        let inspected: Value = serde_json::from_str(&self.crictl(&["inspectp", &pod])?).context("inspectp printed no JSON")?;
        let ip: IpAddr = inspected["status"]["network"]["ip"].as_str().unwrap_or_default().parse().context("the pod has no address")?;
        ensure!(ip.to_string().starts_with("10.77.0."), "{ip}");
        let command = format!("echo it is > /tmp/index.html; exec httpd -f -p {POD_PORT} -h /tmp");
        let container = json!({"metadata": {"name": "c"}, "image": {"image": self.image()}, "command": ["/bin/sh", "-c", command],
            "log_path": "c.log", "linux": {}});
        let id = self.crictl(&["create", &pod, &self.write("container.json", &container)?, &sandbox])?;
        self.crictl(&["start", &id])?;
        eventually("it serves at its own address", || Ok(connects(SocketAddr::from((ip, POD_PORT)))))?;
        eventually("it serves at the host's port", || Ok(connects(SocketAddr::from((GATEWAY, HOST_PORT)))))?;
        let said = self.crictl(&["exec", "-s", &id, "cat", "/proc/sys/net/core/somaxconn"])?;
        ensure!(said == "512", "tuning: {said:?}");
        ensure!(self.crictl(&["exec", "-s", &id, "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"])? == "it is", "its loopback is up");
        self.crictl(&["stopp", &pod])?;
        self.crictl(&["rmp", &pod])?;
        let after = self.leftovers()?;
        // The plugins keep their chains for the network as a whole: the first pod makes them.
        let left: Vec<_> = after.difference(&before).filter(|line| line.contains("veth") || line.contains(&ip.to_string())).collect();
        ensure!(left.is_empty(), "the pod has left {left:?}");
        ensure!(!after.iter().any(|line| line.contains(&HOST_PORT.to_string())), "the host's port is still led on: {after:?}");
        Ok(())
    }
}

fn connects(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, Duration::from_secs(5)).is_ok()
}
