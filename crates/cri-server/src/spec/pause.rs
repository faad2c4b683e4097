//! The container that is a pod's sandbox where the shim has no Sandbox API: our own static executable's `pause`, so that no image is needed. Pure.
//!
//! Source: containerd v2.4.2, `internal/cri/server/podsandbox/sandbox_run_linux.go` (sandboxContainerSpec).

use std::collections::BTreeMap;

use protocols::cri::v1::{NamespaceMode, PodSandboxConfig};

use super::{HostFacts, cgroups_path, sandbox_namespaces};
use crate::oci::{Cpu, DeviceRule, Linux, Mount, Namespace, Process, Resources, Root, Spec, User};

/// Where the executable is in the container; also its mount point in the bundle's `rootfs`.
const EXECUTABLE: &str = "/pause";
/// `nobody`, as far as a container without files has one; as Kubernetes' own pause image.
const NOBODY: u32 = 65535;
/// The score of a pod's sandbox, as containerd's.
const OOM_SCORE_ADJ: i64 = -998;
/// The shares of a process that sleeps, as containerd's.
const CPU_SHARES: u64 = 2;

/// All that the spec depends on.
#[derive(Clone, Debug)]
pub struct PauseFacts<'a> {
    pub id: &'a str,
    pub config: &'a PodSandboxConfig,
    /// Our shim's executable.
    pub executable: &'a str,
    /// Where the pod's network namespace is pinned; none on the host's network.
    pub netns: Option<&'a str>,
    pub host: &'a HostFacts,
    /// Parent of sandboxes that name none.
    pub cgroup_root: &'a str,
}

/// The spec of a sandbox' pause container.
pub fn spec(facts: &PauseFacts<'_>) -> Spec {
    let linux = facts.config.linux.clone().unwrap_or_default();
    let strings = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: strings(options),
    };
    let deny = DeviceRule { access: "rwm".to_owned(), ..DeviceRule::default() };
    Spec {
        oci_version: "1.0.2".to_owned(),
        process: Process {
            user: User { uid: NOBODY, gid: NOBODY, additional_gids: Vec::new() },
            args: strings(&[EXECUTABLE, "pause"]),
            cwd: "/".to_owned(),
            no_new_privileges: true,
            oom_score_adj: Some(OOM_SCORE_ADJ.max(facts.host.oom_score_adj_min)),
            ..Process::default()
        },
        root: Root { path: "rootfs".to_owned(), readonly: true },
        hostname: if shares_host_names(facts.config) { String::new() } else { facts.config.hostname.clone() },
        mounts: vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"]),
            // Read-only, so that no container that can trace it writes to the node's executable.
            mount(EXECUTABLE, "bind", facts.executable, &["bind", "ro", "nosuid", "nodev"]),
        ],
        annotations: annotations(facts),
        linux: Linux {
            namespaces: namespaces(facts),
            cgroups_path: cgroups_path(facts.config, facts.cgroup_root, facts.id),
            resources: Resources {
                devices: vec![deny],
                cpu: Some(Cpu { shares: Some(CPU_SHARES), ..Cpu::default() }),
                ..Resources::default()
            },
            sysctl: linux.sysctls.into_iter().map(|(name, value)| (name.replace('/', "."), value)).collect::<BTreeMap<_, _>>(),
            ..Linux::default()
        },
    }
}

fn shares_host_names(config: &PodSandboxConfig) -> bool {
    sandbox_namespaces(config).network == NamespaceMode::Node as i32
}

fn namespaces(facts: &PauseFacts<'_>) -> Vec<Namespace> {
    let options = sandbox_namespaces(facts.config);
    let make = |kind: &str| Namespace { kind: kind.to_owned(), path: String::new() };
    let mut namespaces = vec![make("mount")];
    if let Some(netns) = facts.netns {
        namespaces.push(Namespace { kind: "network".to_owned(), path: netns.to_owned() });
    }
    if !shares_host_names(facts.config) {
        namespaces.push(make("uts"));
    }
    if options.ipc != NamespaceMode::Node as i32 {
        namespaces.push(make("ipc"));
    }
    if options.pid != NamespaceMode::Node as i32 {
        namespaces.push(make("pid"));
    }
    namespaces
}

/// Shims group a pod's containers by `sandbox-id`; microVM shims tell the sandbox by `container-type`.
fn annotations(facts: &PauseFacts<'_>) -> BTreeMap<String, String> {
    let pod = facts.config.metadata.clone().unwrap_or_default();
    [
        ("container-type", "sandbox".to_owned()),
        ("sandbox-id", facts.id.to_owned()),
        ("sandbox-name", pod.name),
        ("sandbox-namespace", pod.namespace),
        ("sandbox-uid", pod.uid),
        ("sandbox-log-directory", facts.config.log_directory.clone()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use protocols::cri::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    use super::*;

    fn made(options: NamespaceOption, netns: Option<&str>) -> Spec {
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let sysctls = [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into();
        let linux = LinuxPodSandboxConfig { security_context: Some(context), sysctls, ..Default::default() };
        let config = PodSandboxConfig { hostname: "web".into(), linux: Some(linux), ..Default::default() };
        let host = HostFacts { oom_score_adj_min: 0, ..HostFacts::default() };
        spec(&PauseFacts { id: "ab", config: &config, executable: "/bin/shim", netns, host: &host, cgroup_root: "/c" })
    }

    fn kinds(spec: &Spec) -> Vec<&str> {
        spec.linux.namespaces.iter().map(|namespace| namespace.kind.as_str()).collect()
    }

    #[test]
    fn a_pod_of_its_own() {
        let spec = made(NamespaceOption::default(), Some("/n"));
        assert_eq!(kinds(&spec), ["mount", "network", "uts", "ipc", "pid"]);
        assert_eq!((spec.hostname.as_str(), spec.linux.cgroups_path.as_str(), spec.root.readonly), ("web", "/c/ab", true));
        assert_eq!(spec.annotations["io.kubernetes.cri.sandbox-id"], "ab");
        assert_eq!(spec.process.oom_score_adj, Some(0), "what the daemon may set");
        assert_eq!(spec.linux.sysctl["net.ipv4.ip_forward"], "1");
        assert!(spec.process.capabilities.bounding.is_empty() && spec.process.user.uid != 0);
    }

    #[test]
    fn a_pod_on_the_host() {
        let node = NamespaceMode::Node as i32;
        let spec = made(NamespaceOption { network: node, pid: node, ipc: node, ..NamespaceOption::default() }, None);
        assert_eq!((kinds(&spec), spec.hostname.as_str()), (vec!["mount"], ""));
    }
}
