//! The pod's resolver configuration (upstream pkg/kubelet/network/dns/dns.go, v1.37). Pure.

use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1::DnsConfig;

use crate::model;

/// Name servers, search domains and options of a pod, at most (resolv.conf(5), upstream's limits).
const SERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;

/// `--cluster-dns` and `--cluster-domain`.
#[derive(Clone, Debug, Default)]
pub struct ClusterDns {
    /// Addresses of the cluster's DNS service.
    pub servers: Vec<String>,
    /// The cluster's domain, without a trailing dot; may be empty.
    pub domain: String,
}

/// The outcome.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// For RunPodSandbox.
    pub config: DnsConfig,
    /// The pod asked for ClusterFirst and the kubelet has no cluster DNS (event MissingClusterDNS).
    pub missing_cluster_dns: bool,
}

/// Reads a resolv.conf.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                config.searches = words.map(|s| if s == "." { s } else { s.trim_end_matches('.') }.to_owned()).collect();
            }
            Some("options") => {
                for option in words {
                    if !config.options.iter().any(|o| o == option) {
                        config.options.push(option.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    config
}

/// Decides the pod's resolver configuration from its policy.
pub fn decide(pod: &Pod, host: &DnsConfig, cluster: &ClusterDns) -> Decision {
    let spec = pod.spec.as_ref();
    let policy = spec.and_then(|s| s.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let host_network = model::is_host_network(pod);
    let wants_cluster = match policy {
        "ClusterFirstWithHostNet" => true,
        "ClusterFirst" => !host_network,
        _ => false,
    };
    let missing_cluster_dns = wants_cluster && cluster.servers.is_empty();
    let mut config = if policy == "None" {
        DnsConfig::default()
    } else if wants_cluster && !missing_cluster_dns {
        DnsConfig {
            servers: cluster.servers.clone(),
            searches: cluster_searches(pod, host, &cluster.domain),
            options: vec!["ndots:5".to_owned()],
        }
    } else {
        host.clone()
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        extend(&mut config.servers, own.nameservers.iter().flatten());
        extend(&mut config.searches, own.searches.iter().flatten());
        for option in own.options.iter().flatten() {
            let Some(name) = option.name.as_deref() else {
                continue;
            };
            config.options.retain(|o| o.split(':').next() != Some(name));
            config.options.push(match option.value.as_deref().filter(|v| !v.is_empty()) {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            });
        }
    }
    config.servers.truncate(SERVERS_MAX);
    config.searches.truncate(SEARCHES_MAX);
    Decision { config, missing_cluster_dns }
}

fn cluster_searches(pod: &Pod, host: &DnsConfig, domain: &str) -> Vec<String> {
    let mut searches = Vec::new();
    if !domain.is_empty() {
        searches.push(format!("{}.svc.{domain}", model::namespace(pod)));
        searches.push(format!("svc.{domain}"));
        searches.push(domain.to_owned());
    }
    extend(&mut searches, host.searches.iter());
    searches
}

fn extend<'a>(list: &mut Vec<String>, more: impl Iterator<Item = &'a String>) {
    for item in more {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
}
