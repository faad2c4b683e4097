//! What the runtime is asked for, field by field: the rows of `apimachinery/data/fields.toml` name these tests for what a pod cannot
//! see from the inside.

use k8s_openapi::api::core::v1::{Container, Pod};
use protocols::cri::v1 as cri;
use protocols::cri::v1::security_profile::ProfileType;
use serde_json::{Value, json};

use super::dns::{ClusterDns, Decision, decide, parse_resolv_conf};
use super::security::ImageUser;
use super::{NodeFacts, container, hosts, sandbox, security};

fn node() -> NodeFacts {
    NodeFacts {
        memory_bytes: 1 << 30,
        cgroup_root: "/kubepods".to_owned(),
        log_root: "/logs".to_owned(),
        hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
        swap_limit: true,
        cgroup_v2: false,
        seccomp_root: "/seccomp".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
    }
}

fn pod(spec: Value) -> Pod {
    let mut spec = spec;
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "i"}]);
    }
    let metadata = json!({"name": "p", "namespace": "n", "uid": "u", "labels": {"l": "1"}, "annotations": {"a": "2"}});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).expect("a pod")
}

fn sandbox(spec: Value) -> cri::PodSandboxConfig {
    sandbox::config(&pod(spec), 1, cri::DnsConfig::default(), &node(), "now").expect("a sandbox")
}

fn sandbox_security(spec: Value) -> cri::LinuxSandboxSecurityContext {
    sandbox(spec).linux.expect("linux").security_context.expect("a context")
}

/// The configuration of the only container of a pod with this spec and this container.
fn made(spec: Value, fields: Value) -> Result<cri::ContainerConfig, String> {
    let mut own = json!({"name": "c", "image": "i"});
    own.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    let mut spec = spec;
    spec["containers"] = json!([own]);
    let pod = pod(spec);
    let container: Container = pod.spec.as_ref().expect("a spec").containers[0].clone();
    let environment = [("A".to_owned(), "x".to_owned())];
    let inputs = container::Inputs {
        pod: &pod,
        restart_count: 2,
        image_ref: "sha256:1",
        image_user: &ImageUser { uid: Some(7), username: String::new() },
        environment: &environment,
        mounts: Vec::new(),
        target_id: None,
        node: &node(),
    };
    container::config(&container, inputs)
}

fn container(fields: Value) -> cri::ContainerConfig {
    made(json!({}), fields).expect("a container")
}

fn context(spec: Value, security: Value) -> cri::LinuxContainerSecurityContext {
    let config = made(spec, json!({"securityContext": security})).expect("a container");
    config.linux.expect("linux").security_context.expect("a context")
}

fn resources(fields: Value) -> cri::LinuxContainerResources {
    container(fields).linux.expect("linux").resources.expect("resources")
}

#[test]
fn sandboxes_carry_the_pods_fields() {
    let plain = sandbox(json!({}));
    let metadata = plain.metadata.expect("metadata");
    assert_eq!((metadata.name, metadata.namespace, metadata.uid, metadata.attempt), ("p".into(), "n".into(), "u".into(), 1));
    assert_eq!(plain.labels["l"], "1");
    assert_eq!(plain.annotations["a"], "2");
    assert_eq!((plain.hostname.as_str(), plain.log_directory.as_str()), ("p", "/logs/n_p_u"));
    assert_eq!(plain.linux.expect("linux").cgroup_parent, "/kubepods/besteffort/podu");
    let ports = json!([{"name": "c", "image": "i", "ports": [
        {"containerPort": 80, "hostPort": 81, "hostIP": "127.0.0.1"}, {"containerPort": 53, "hostPort": 54, "protocol": "UDP"},
        {"containerPort": 9, "protocol": "SCTP"}]}]);
    let mappings = sandbox(json!({"containers": ports})).port_mappings;
    let seen: Vec<_> = mappings.iter().map(|m| (m.protocol(), m.container_port, m.host_port, m.host_ip.as_str())).collect();
    assert_eq!(seen, [(cri::Protocol::Tcp, 80, 81, "127.0.0.1"), (cri::Protocol::Udp, 53, 54, ""), (cri::Protocol::Sctp, 9, 0, "")]);
    let sysctls = sandbox(json!({"securityContext": {"sysctls": [{"name": "net/ipv4/tcp_syncookies", "value": "0"}]}}));
    assert_eq!(sysctls.linux.expect("linux").sysctls["net.ipv4.tcp_syncookies"], "0");
    let named = sandbox_security(json!({"securityContext": {"runAsUser": 5, "runAsGroup": 6, "supplementalGroups": [8], "fsGroup": 9,
        "supplementalGroupsPolicy": "Strict", "seLinuxOptions": {"level": "s0", "user": "u", "role": "r", "type": "t"}}}));
    assert_eq!((named.run_as_user.map(|v| v.value), named.run_as_group.map(|v| v.value)), (Some(5), Some(6)));
    assert_eq!((named.supplemental_groups, named.supplemental_groups_policy), (vec![9, 8], cri::SupplementalGroupsPolicy::Strict as i32));
    let labels = named.selinux_options.expect("labels");
    assert_eq!([labels.user, labels.role, labels.r#type, labels.level].join(":"), "u:r:t:s0");
}

#[test]
fn namespaces_are_shared_as_the_pod_says() {
    use cri::NamespaceMode::{Container, Node, Pod};
    let modes = |spec: Value| {
        let options = security::namespaces(&pod(spec)).expect("namespaces");
        (options.network(), options.pid(), options.ipc())
    };
    assert_eq!(modes(json!({})), (Pod, Container, Pod));
    assert_eq!(modes(json!({"hostNetwork": true})), (Node, Container, Pod));
    assert_eq!(modes(json!({"hostPID": true})), (Pod, Node, Pod));
    assert_eq!(modes(json!({"hostIPC": true})), (Pod, Container, Node));
    assert_eq!(modes(json!({"shareProcessNamespace": true})), (Pod, Pod, Pod));
    assert!(security::namespaces(&pod(json!({"hostUsers": false}))).is_err());
}

#[test]
fn containers_carry_their_fields() {
    let config = container(json!({"command": ["a", "$(A)"], "args": ["$(A)", "$$(A)", "$(B)"], "workingDir": "/w", "stdin": true,
        "stdinOnce": true, "tty": true, "terminationMessagePath": "/t", "terminationMessagePolicy": "FallbackToLogsOnError",
        "ports": [{"containerPort": 80}], "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}}));
    assert_eq!(config.command, ["a", "x"]);
    assert_eq!(config.args, ["x", "$(A)", "$(B)"]);
    assert_eq!((config.working_dir.as_str(), config.stdin, config.stdin_once, config.tty), ("/w", true, true, true));
    assert_eq!(config.metadata.expect("metadata").name, "c");
    assert_eq!(config.image.expect("an image").user_specified_image, "i");
    assert_eq!(config.log_path, "c/2.log");
    let annotation = |name: &str| config.annotations[&format!("io.kubernetes.container.{name}")].as_str();
    assert_eq!(annotation("terminationMessagePath"), "/t");
    assert_eq!(annotation("terminationMessagePolicy"), "FallbackToLogsOnError");
    assert_eq!(annotation("restartCount"), "2");
    assert!(annotation("preStopHandler").contains("exec") && annotation("ports").contains("80"));
    let plain = container(json!({}));
    assert_eq!((plain.stdin, plain.stdin_once, plain.tty, plain.command.len()), (false, false, false, 0));
}

#[test]
fn resources_become_shares_quotas_and_bytes() {
    let asked = resources(json!({"resources": {"requests": {"cpu": "500m", "memory": "64Mi"},
        "limits": {"cpu": "1500m", "memory": "128Mi", "hugepages-2Mi": "4Mi"}}}));
    assert_eq!((asked.cpu_shares, asked.cpu_quota, asked.cpu_period), (512, 150_000, 100_000));
    assert_eq!((asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes), (128 << 20, 128 << 20));
    // A sixteenth of the node's memory is asked for.
    assert_eq!(asked.oom_score_adj, 938);
    let pages: Vec<_> = asked.hugepage_limits.iter().map(|limit| (limit.page_size.as_str(), limit.limit)).collect();
    assert_eq!(pages, [("2MB", 4 << 20), ("1GB", 0)]);
    let none = resources(json!({}));
    assert_eq!((none.cpu_shares, none.cpu_quota, none.memory_limit_in_bytes, none.oom_score_adj), (2, 0, 0, 1000));
    let whole = made(json!({"resources": {"requests": {"cpu": "1", "memory": "1Mi"}, "limits": {"cpu": "2", "memory": "2Mi"}}}), json!({}));
    let whole = whole.expect("a container").linux.expect("linux").resources.expect("resources");
    assert_eq!((whole.cpu_quota, whole.memory_limit_in_bytes), (200_000, 2 << 20), "the pod's limits hold for a container without");
}

#[test]
fn security_contexts_are_the_containers_over_the_pods() {
    let of_pod = json!({"securityContext": {"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3, "supplementalGroups": [4],
        "seccompProfile": {"type": "RuntimeDefault"}, "seLinuxOptions": {"level": "s1"}, "appArmorProfile": {"type": "RuntimeDefault"}}});
    let inherited = context(of_pod.clone(), json!({}));
    assert_eq!((inherited.run_as_user.map(|v| v.value), inherited.run_as_group.map(|v| v.value)), (Some(1), Some(2)));
    assert_eq!(inherited.supplemental_groups, [3, 4]);
    assert_eq!(inherited.seccomp.as_ref().map(|s| s.profile_type()), Some(ProfileType::RuntimeDefault));
    assert_eq!(inherited.apparmor.as_ref().map(|s| s.profile_type()), Some(ProfileType::RuntimeDefault));
    assert_eq!(inherited.selinux_options.map(|o| o.level), Some("s1".to_owned()));
    assert!(!inherited.no_new_privs && !inherited.privileged && !inherited.readonly_rootfs);
    assert!(inherited.masked_paths.contains(&"/proc/kcore".to_owned()) && inherited.readonly_paths.contains(&"/proc/sys".to_owned()));
    let own = context(
        of_pod,
        json!({"runAsUser": 11, "runAsGroup": 12, "privileged": false, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
            "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}, "seccompProfile": {"type": "Localhost", "localhostProfile": "p.json"},
            "appArmorProfile": {"type": "Localhost", "localhostProfile": "mine"}, "procMount": "Default",
            "seLinuxOptions": {"user": "u", "role": "r", "type": "t", "level": "s2"}}),
    );
    assert_eq!((own.run_as_user.map(|v| v.value), own.run_as_group.map(|v| v.value)), (Some(11), Some(12)));
    assert!(own.no_new_privs && own.readonly_rootfs);
    let capabilities = own.capabilities.expect("capabilities");
    assert_eq!((capabilities.add_capabilities, capabilities.drop_capabilities), (vec!["NET_ADMIN".to_owned()], vec!["ALL".to_owned()]));
    let seccomp = own.seccomp.expect("a profile");
    assert_eq!((seccomp.profile_type(), seccomp.localhost_ref.as_str()), (ProfileType::Localhost, "/seccomp/p.json"));
    let apparmor = own.apparmor.expect("a profile");
    assert_eq!((apparmor.profile_type(), apparmor.localhost_ref.as_str()), (ProfileType::Localhost, "mine"));
    let labels = own.selinux_options.expect("labels");
    assert_eq!([labels.user, labels.role, labels.r#type, labels.level].join(":"), "u:r:t:s2");
    let privileged = context(json!({}), json!({"privileged": true}));
    assert!(privileged.privileged);
    assert_eq!(privileged.run_as_user.map(|v| v.value), Some(7), "the image's user");
}

#[test]
fn who_must_not_be_root_is_not() {
    let refused = |spec: Value, own: Value| made(spec, json!({"securityContext": own})).is_err();
    let required = || json!({"securityContext": {"runAsNonRoot": true}});
    assert!(!refused(required(), json!({})), "the image's user is 7");
    assert!(refused(required(), json!({"runAsUser": 0})));
    assert!(!refused(required(), json!({"runAsUser": 0, "runAsNonRoot": false})));
    assert!(refused(json!({}), json!({"runAsUser": 0, "runAsNonRoot": true})));
}

#[test]
fn resolvers_follow_the_policy() {
    let host = parse_resolv_conf("# x\nnameserver 192.0.2.1\nsearch host.example.\noptions timeout:1\n");
    let cluster = ClusterDns { servers: vec!["10.96.0.10".to_owned()], domain: "cluster.local".to_owned() };
    let show = |decision: Decision| {
        let config = decision.config;
        format!("{} {} {}", config.servers.join(","), config.searches.join(","), config.options.join(","))
    };
    let with = |spec: Value| show(decide(&pod(spec), &host, &cluster));
    let of_cluster = "10.96.0.10 n.svc.cluster.local,svc.cluster.local,cluster.local,host.example ndots:5";
    let of_host = "192.0.2.1 host.example timeout:1";
    assert_eq!(with(json!({})), of_cluster);
    assert_eq!(with(json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true})), of_host);
    assert_eq!(with(json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})), of_cluster);
    assert_eq!(with(json!({"dnsPolicy": "Default"})), of_host);
    let own =
        json!({"nameservers": ["192.0.2.9"], "searches": ["own.example"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
    assert_eq!(with(json!({"dnsPolicy": "None", "dnsConfig": own})), "192.0.2.9 own.example ndots:2,edns0");
    assert_eq!(
        with(json!({"dnsConfig": own})),
        "10.96.0.10,192.0.2.9 n.svc.cluster.local,svc.cluster.local,cluster.local,host.example,own.example ndots:2,edns0"
    );
    let missing = decide(&pod(json!({})), &host, &ClusterDns::default());
    assert!(missing.missing_cluster_dns);
    assert_eq!(show(missing), of_host);
}

#[test]
fn names_and_hosts_files() {
    let name = |spec: Value| hosts::kernel_host_name(&pod(spec), "cluster.local");
    assert_eq!(name(json!({})).as_deref(), Ok("p"));
    assert_eq!(name(json!({"hostname": "h", "subdomain": "s"})).as_deref(), Ok("h"));
    assert_eq!(name(json!({"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true})).as_deref(), Ok("h.s.n.svc.cluster.local"));
    assert_eq!(name(json!({"hostname": "h", "hostnameOverride": "o.example"})).as_deref(), Ok("o.example"));
    assert!(name(json!({"hostname": "h".repeat(63), "subdomain": "s", "setHostnameAsFQDN": true})).is_err());
    let file = |spec: Value| hosts::hosts_file(&pod(spec), &["192.0.2.1".to_owned()], "cluster.local", "127.0.0.1 node\n");
    assert!(file(json!({"subdomain": "s"})).ends_with("192.0.2.1\tp.s.n.svc.cluster.local\tp\n"));
    assert!(file(json!({"hostNetwork": true})).ends_with("127.0.0.1 node\n"));
    let aliases = json!({"hostAliases": [{"ip": "192.0.2.5", "hostnames": ["a", "b"]}]});
    assert!(file(aliases).ends_with("# Entries added by HostAliases.\n192.0.2.5\ta\tb\n"));
}

#[test]
fn mounts_carry_their_fields() {
    use cri::MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
    let mount = |fields: Value, readonly: bool| {
        let mut mount = json!({"name": "v", "mountPath": "/m"});
        mount.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        container::mount(&serde_json::from_value(mount).expect("a mount"), "/host", readonly)
    };
    let plain = mount(json!({}), false);
    assert_eq!((plain.container_path.as_str(), plain.host_path.as_str(), plain.readonly), ("/m", "/host", false));
    assert_eq!(plain.propagation(), PropagationPrivate);
    assert!(mount(json!({"readOnly": true}), false).readonly && mount(json!({}), true).readonly);
    assert_eq!(mount(json!({"mountPropagation": "HostToContainer"}), false).propagation(), PropagationHostToContainer);
    assert_eq!(mount(json!({"mountPropagation": "Bidirectional"}), false).propagation(), PropagationBidirectional);
    assert_eq!(mount(json!({"mountPropagation": "None"}), false).propagation(), PropagationPrivate);
}
