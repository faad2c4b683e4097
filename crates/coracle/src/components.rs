//! The flags that `up` gives to each part: exactly what an operator would type to run it alone.

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

/// The API server with its embedded store.
pub fn apiserver(settings: &Settings) -> Result<apiserver::Config> {
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
    parse("apiserver", flags)
}

/// The controllers, each with its own identity.
pub fn controller_manager(settings: &Settings) -> Result<controller_manager::Config> {
    parse(
        "controller-manager",
        vec![
            flag("kubeconfig", settings.kubeconfig("kube-controller-manager")),
            flag("root-ca-file", settings.pki("ca.crt")),
            flag("use-service-account-credentials", true),
            // One of each on this machine: an election would only delay the start.
            flag("leader-elect", false),
        ],
    )
}

/// The scheduler.
pub fn scheduler(settings: &Settings) -> Result<scheduler::Config> {
    parse("scheduler", vec![flag("kubeconfig", settings.kubeconfig("kube-scheduler")), flag("leader-elect", false)])
}

/// The kubelet.
pub fn kubelet(settings: &Settings) -> Result<kubelet::Config> {
    parse(
        "kubelet",
        vec![
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
        ],
    )
}

/// The proxy.
pub fn kube_proxy(settings: &Settings) -> Result<kube_proxy::Config> {
    parse(
        "kube-proxy",
        vec![
            flag("kubeconfig", settings.kubeconfig("kube-proxy")),
            flag("hostname-override", settings.node()?),
            flag("bind-address", settings.node_address()?),
            flag("cluster-cidr", &settings.pod_cidr),
            flag("healthz-bind-address", SocketAddr::new(settings.bind_address, settings.proxy_healthz_port)),
            flag("nftables-table", settings.proxy_table()),
        ],
    )
}

/// The container runtime.
pub fn cri(settings: &Settings) -> Result<cri_server::Config> {
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
    parse("cri", flags)
}
