//! The pod's /etc/hosts and its host name (upstream pkg/kubelet/kubelet_pods.go, v1.37). Pure.

use k8s_openapi::api::core::v1::Pod;

use crate::model;

const HEADER: &str = "# Kubernetes-managed hosts file.\n";
const HOST_NETWORK_HEADER: &str = "# Kubernetes-managed hosts file (host network).\n";
const HOST_NAME_BYTES_MAX: usize = 63;

/// The pod's host name and its domain (empty without subdomain).
pub fn host_name(pod: &Pod, cluster_domain: &str) -> (String, String) {
    let spec = pod.spec.as_ref();
    let given = |s: Option<&String>| s.filter(|s| !s.is_empty()).cloned();
    if let Some(overridden) = given(spec.and_then(|s| s.hostname_override.as_ref())) {
        return (overridden, String::new());
    }
    let host = given(spec.and_then(|s| s.hostname.as_ref())).unwrap_or_else(|| {
        let mut name = model::name(pod).to_owned();
        name.truncate(HOST_NAME_BYTES_MAX);
        name.trim_end_matches(['-', '.']).to_owned()
    });
    let domain = given(spec.and_then(|s| s.subdomain.as_ref()))
        .map(|sub| format!("{sub}.{}.svc.{cluster_domain}", model::namespace(pod)))
        .unwrap_or_default();
    (host, domain)
}

/// The name that the sandbox is given: the full one with `setHostnameAsFQDN`. The kernel takes 64 bytes.
pub fn kernel_host_name(pod: &Pod, cluster_domain: &str) -> Result<String, String> {
    let (host, domain) = host_name(pod, cluster_domain);
    let as_fqdn = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn).unwrap_or(false);
    if !as_fqdn || domain.is_empty() {
        return Ok(host);
    }
    let full = format!("{host}.{domain}");
    if full.len() > 64 {
        return Err(format!(
            "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long (64 characters is the max, {} characters requested)",
            full.len()
        ));
    }
    Ok(full)
}

/// The content of the pod's /etc/hosts; `host_file` is the node's own.
pub fn hosts_file(pod: &Pod, pod_ips: &[String], cluster_domain: &str, host_file: &str) -> String {
    let mut text = String::new();
    if model::is_host_network(pod) {
        text.push_str(HOST_NETWORK_HEADER);
        text.push_str(host_file);
    } else {
        text.push_str(HEADER);
        text.push_str("127.0.0.1\tlocalhost\n");
        text.push_str("::1\tlocalhost ip6-localhost ip6-loopback\n");
        text.push_str("fe00::\tip6-localnet\n");
        text.push_str("fe00::\tip6-mcastprefix\n");
        text.push_str("fe00::1\tip6-allnodes\n");
        text.push_str("fe00::2\tip6-allrouters\n");
        let (host, domain) = host_name(pod, cluster_domain);
        for ip in pod_ips {
            if domain.is_empty() {
                text.push_str(&format!("{ip}\t{host}\n"));
            } else {
                text.push_str(&format!("{ip}\t{host}.{domain}\t{host}\n"));
            }
        }
    }
    let aliases = pod.spec.as_ref().and_then(|s| s.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let names = alias.hostnames.as_deref().unwrap_or_default();
            text.push_str(&format!("{}\t{}\n", alias.ip, names.join("\t")));
        }
    }
    text
}
