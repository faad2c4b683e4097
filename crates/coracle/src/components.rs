//! The flags of each part: those that `up` gives it, and `parts` tells an operator to type.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use clap::{Args, Command, FromArgMatches};

use crate::settings::Settings;

/// Parses a part's flags as its own command line would.
fn parse<C: Args + FromArgMatches>(name: &'static str, flags: Vec<String>) -> Result<C> {
    let command = C::augment_args(Command::new(name).no_binary_name(true));
    let matches = command.try_get_matches_from(&flags).with_context(|| format!("flags of {name}"))?;
    C::from_arg_matches(&matches).with_context(|| format!("flags of {name}"))
}

fn flag(name: &str, value: impl ToString) -> String {
    format!("--{name}={}", value.to_string())
}

/// The command lines of all parts, as a shell takes them.
pub fn command_lines(settings: &Settings) -> Result<Vec<String>> {
    let mut parts = vec![
        ("apiserver", apiserver_flags(settings)?),
        ("controller-manager", controller_manager_flags(settings)),
        ("scheduler", scheduler_flags(settings)),
        ("cri", cri_flags(settings)),
        ("kubelet", kubelet_flags(settings)?),
        ("kube-proxy", kube_proxy_flags(settings)?),
    ];
    parts.retain(|(name, _)| *name != "cri" || settings.container_runtime_endpoint.is_none());
    let line = |name: &str, flags: Vec<String>| {
        let words: Vec<String> = flags.iter().map(|flag| quoted(flag)).collect();
        format!("coracle {name} {}", words.join(" "))
    };
    Ok(parts.into_iter().map(|(name, flags)| line(name, flags)).collect())
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_=./:,%+@".contains(letter);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// The API server with its embedded store.
pub fn apiserver(settings: &Settings) -> Result<apiserver::Config> {
    parse("apiserver", apiserver_flags(settings)?)
}

fn apiserver_flags(settings: &Settings) -> Result<Vec<String>> {
    let mut flags = vec![
        flag("data-dir", settings.data_dir.join("store")),
        flag("bind-address", settings.bind_address),
        flag("secure-port", settings.secure_port),
        flag("advertise-address", settings.node_address()?),
        flag("service-cluster-ip-range", &settings.service_cluster_ip_range),
        flag("client-ca-file", settings.pki("ca.crt")),
        flag("tls-cert-file", settings.pki("apiserver.crt")),
        flag("tls-private-key-file", settings.pki("apiserver.key")),
        flag("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        flag("service-account-key-file", settings.pki("sa.pub")),
        flag("service-account-signing-key-file", settings.pki("sa.key")),
        flag("kubelet-certificate-authority", settings.pki("ca.crt")),
        flag("kubelet-client-certificate", settings.pki("apiserver-kubelet-client.crt")),
        flag("kubelet-client-key", settings.pki("apiserver-kubelet-client.key")),
    ];
    if !settings.etcd_servers.is_empty() {
        flags.push(flag("etcd-servers", settings.etcd_servers.join(",")));
    }
    for (name, file) in
        [("etcd-cafile", &settings.etcd_cafile), ("etcd-certfile", &settings.etcd_certfile), ("etcd-keyfile", &settings.etcd_keyfile)]
    {
        flags.extend(file.as_ref().map(|file| flag(name, file)));
    }
    Ok(flags)
}

/// The controllers, each with its own identity. There is one of each on this machine: an election would only delay the start.
pub fn controller_manager(settings: &Settings) -> Result<controller_manager::Config> {
    parse("controller-manager", [controller_manager_flags(settings), vec![flag("leader-elect", false)]].concat())
}

fn controller_manager_flags(settings: &Settings) -> Vec<String> {
    vec![
        flag("kubeconfig", settings.kubeconfig("kube-controller-manager")),
        flag("root-ca-file", settings.pki("ca.crt")),
        flag("use-service-account-credentials", true),
    ]
}

/// The scheduler.
pub fn scheduler(settings: &Settings) -> Result<scheduler::Config> {
    parse("scheduler", [scheduler_flags(settings), vec![flag("leader-elect", false)]].concat())
}

fn scheduler_flags(settings: &Settings) -> Vec<String> {
    vec![flag("kubeconfig", settings.kubeconfig("kube-scheduler"))]
}

/// The kubelet.
pub fn kubelet(settings: &Settings) -> Result<kubelet::Config> {
    parse("kubelet", kubelet_flags(settings)?)
}

fn kubelet_flags(settings: &Settings) -> Result<Vec<String>> {
    Ok(vec![
        flag("kubeconfig", settings.kubeconfig("kubelet")),
        flag("container-runtime-endpoint", settings.runtime_endpoint()),
        flag("root-dir", settings.data_dir.join("kubelet")),
        flag("pod-logs-dir", &settings.pod_log_dir),
        flag("hostname-override", settings.node()?),
        flag("node-ip", settings.node_address()?),
        flag("address", settings.bind_address),
        flag("port", settings.kubelet_port),
        flag("client-ca-file", settings.pki("ca.crt")),
        flag("tls-cert-file", settings.pki("kubelet-server.crt")),
        flag("tls-private-key-file", settings.pki("kubelet-server.key")),
        flag("cgroup-root", &settings.cgroup_root),
        flag("pod-cidr", &settings.pod_cidr),
        flag("eviction-hard", &settings.eviction_hard),
    ])
}

/// The proxy.
pub fn kube_proxy(settings: &Settings) -> Result<kube_proxy::Config> {
    parse("kube-proxy", kube_proxy_flags(settings)?)
}

fn kube_proxy_flags(settings: &Settings) -> Result<Vec<String>> {
    Ok(vec![
        flag("kubeconfig", settings.kubeconfig("kube-proxy")),
        flag("hostname-override", settings.node()?),
        flag("bind-address", settings.node_address()?),
        flag("cluster-cidr", &settings.pod_cidr),
        flag("healthz-bind-address", SocketAddr::new(settings.bind_address, settings.proxy_healthz_port)),
        flag("nftables-table", settings.proxy_table()),
    ])
}

/// The container runtime.
pub fn cri(settings: &Settings) -> Result<cri_server::Config> {
    parse("cri", cri_flags(settings))
}

fn cri_flags(settings: &Settings) -> Vec<String> {
    let mut flags = vec![
        flag("root", settings.data_dir.join("cri")),
        flag("state", settings.state_dir.join("cri")),
        flag("address", settings.cri_socket()),
        flag("pod-cidr", &settings.pod_cidr),
        flag("bridge", &settings.bridge),
        flag("nftables-table", &settings.nftables_table),
        flag("cni-conf-dir", &settings.cni_conf_dir),
        flag("cni-bin-dir", &settings.cni_bin_dir),
    ];
    // Pods without a cgroup parent of their own (crictl's) still stay below what this Coracle may use.
    if settings.cgroup_root != "/" {
        flags.push(flag("cgroup-root", &settings.cgroup_root));
    }
    if let Some(shim) = &settings.shim {
        flags.push(flag("shim", shim));
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_of_a_shell() {
        assert_eq!(quoted("--a=/b/c.d,e:1%"), "--a=/b/c.d,e:1%");
        assert_eq!(quoted("--a=x<5%"), "'--a=x<5%'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
