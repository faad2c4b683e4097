//! PodSandboxConfig (recorded in reference/seams/kubelet-cri.md, section 3). Pure.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1 as cri;

use crate::cri::{NodeFacts, hosts, log_directory, security};
use crate::model::{self, labels};
use crate::qos;

/// Makes the sandbox's configuration; the error names what cannot be carried out.
pub fn config(pod: &Pod, attempt: u32, dns: cri::DnsConfig, node: &NodeFacts, seen_at: &str) -> Result<cri::PodSandboxConfig, String> {
    let host_network = model::is_host_network(pod);
    let hostname = if host_network { String::new() } else { hosts::kernel_host_name(pod, &node.cluster_domain)? };
    let mut all_labels: HashMap<String, String> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    all_labels.extend(pod_labels(pod));
    let mut annotations: HashMap<String, String> = pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect();
    annotations.entry("kubernetes.io/config.source".into()).or_insert_with(|| "api".into());
    annotations.entry("kubernetes.io/config.seen".into()).or_insert_with(|| seen_at.to_owned());
    Ok(cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: model::name(pod).to_owned(),
            uid: model::uid(pod).to_owned(),
            namespace: model::namespace(pod).to_owned(),
            attempt,
        }),
        hostname,
        log_directory: log_directory(&node.log_root, pod),
        dns_config: Some(dns),
        port_mappings: port_mappings(pod),
        labels: all_labels,
        annotations,
        linux: Some(linux(pod, node)?),
        windows: None,
    })
}

/// The three labels that tie CRI objects to the pod.
pub fn pod_labels(pod: &Pod) -> [(String, String); 3] {
    [
        (labels::POD_NAME.to_owned(), model::name(pod).to_owned()),
        (labels::POD_NAMESPACE.to_owned(), model::namespace(pod).to_owned()),
        (labels::POD_UID.to_owned(), model::uid(pod).to_owned()),
    ]
}

/// The pod's cgroup: `ROOT[/burstable|/besteffort]/podUID`; empty without QoS cgroups.
pub fn cgroup_parent(pod: &Pod, node: &NodeFacts) -> String {
    if node.cgroup_root.is_empty() {
        return String::new();
    }
    let tier = match qos::class(pod) {
        qos::Class::Guaranteed => "",
        qos::Class::Burstable => "/burstable",
        qos::Class::BestEffort => "/besteffort",
    };
    format!("{}{tier}/pod{}", node.cgroup_root, model::uid(pod))
}

fn port_mappings(pod: &Pod) -> Vec<cri::PortMapping> {
    let sidecars = model::init_containers(pod).iter().filter(|c| model::is_sidecar(c));
    let ports = model::containers(pod).iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    ports
        .map(|port| cri::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => cri::Protocol::Udp,
                Some("SCTP") => cri::Protocol::Sctp,
                _ => cri::Protocol::Tcp,
            } as i32,
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}

fn linux(pod: &Pod, node: &NodeFacts) -> Result<cri::LinuxPodSandboxConfig, String> {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let privileged = model::containers(pod)
        .iter()
        .chain(model::init_containers(pod))
        .any(|c| c.security_context.as_ref().and_then(|s| s.privileged) == Some(true));
    let int = |v: Option<i64>| v.map(|value| cri::Int64Value { value });
    let sysctls = context.iter().flat_map(|c| c.sysctls.iter().flatten());
    Ok(cri::LinuxPodSandboxConfig {
        cgroup_parent: cgroup_parent(pod, node),
        security_context: Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(security::namespaces(pod)?),
            selinux_options: context.and_then(|c| c.se_linux_options.as_ref()).map(security::selinux),
            run_as_user: int(context.and_then(|c| c.run_as_user)),
            run_as_group: int(context.and_then(|c| c.run_as_group)),
            supplemental_groups: security::supplemental_groups(pod),
            supplemental_groups_policy: security::supplemental_groups_policy(pod),
            privileged,
            seccomp: Some(cri::SecurityProfile {
                profile_type: cri::security_profile::ProfileType::RuntimeDefault as i32,
                localhost_ref: String::new(),
            }),
            ..Default::default()
        }),
        sysctls: sysctls.map(|s| (s.name.replace('/', "."), s.value.clone())).collect(),
        overhead: Some(overhead(pod)),
        resources: Some(resources(pod)),
    })
}

fn overhead(pod: &Pod) -> cri::LinuxContainerResources {
    use crate::quantity::{list_milli, list_value};
    let Some(list) = pod.spec.as_ref().and_then(|s| s.overhead.as_ref()) else {
        return cri::LinuxContainerResources::default();
    };
    let cpu = list_milli(Some(list), "cpu");
    cri::LinuxContainerResources {
        cpu_period: if cpu > 0 { qos::CPU_PERIOD_US } else { 0 },
        cpu_quota: qos::cpu_quota_us(cpu),
        cpu_shares: if cpu > 0 { qos::cpu_shares(cpu) } else { 0 },
        memory_limit_in_bytes: list_value(Some(list), "memory"),
        ..Default::default()
    }
}

fn resources(pod: &Pod) -> cri::LinuxContainerResources {
    let sums = qos::pod_resources(pod);
    let limit = sums.cpu_limit_milli.filter(|l| *l > 0);
    cri::LinuxContainerResources {
        cpu_period: qos::CPU_PERIOD_US,
        cpu_quota: limit.map_or(0, qos::cpu_quota_us),
        cpu_shares: qos::cpu_shares(sums.cpu_request_milli),
        memory_limit_in_bytes: sums.memory_limit_bytes.unwrap_or(0),
        ..Default::default()
    }
}
