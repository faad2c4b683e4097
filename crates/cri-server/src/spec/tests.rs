//! Golden specs.

use std::collections::HashMap;

use protocols::cri::v1::*;
use serde_json::{Value, json};

use super::mounts::{MountSource, SourcePropagation};
use super::*;

/// Everything that facts borrow.
#[derive(Clone)]
struct Case {
    sandbox: PodSandboxConfig,
    config: ContainerConfig,
    image: ImageDefaults,
    files: PodFiles,
    sources: Vec<MountSource>,
    devices: Vec<HostDevice>,
    host: HostFacts,
    target_pid: Option<u32>,
}

impl Case {
    /// The `nginx` of the recorded pod (reference/seams/kubelet-cri.md, section 3).
    fn recorded() -> Self {
        let mount = |container: &str, host: &str, readonly| Mount {
            container_path: container.into(),
            host_path: host.into(),
            readonly,
            ..Mount::default()
        };
        Self {
            sandbox: PodSandboxConfig {
                metadata: Some(PodSandboxMetadata { name: "web-x".into(), uid: "UID".into(), namespace: "default".into(), attempt: 0 }),
                hostname: "web-x".into(),
                linux: Some(LinuxPodSandboxConfig { cgroup_parent: "/kubepods/burstable/podUID".into(), ..Default::default() }),
                ..PodSandboxConfig::default()
            },
            config: ContainerConfig {
                metadata: Some(ContainerMetadata { name: "nginx".into(), attempt: 0 }),
                envs: vec![KeyValue { key: "A".into(), value: b"1".to_vec() }],
                mounts: vec![mount("/etc/hosts", "/pod/etc-hosts", false), mount("/cm", "/pod/cm", true)],
                linux: Some(LinuxContainerConfig {
                    resources: Some(LinuxContainerResources {
                        cpu_period: 100_000,
                        cpu_quota: 20_000,
                        cpu_shares: 51,
                        memory_limit_in_bytes: 67_108_864,
                        memory_swap_limit_in_bytes: 67_108_864,
                        oom_score_adj: 999,
                        hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 0 }],
                        ..LinuxContainerResources::default()
                    }),
                    security_context: Some(LinuxContainerSecurityContext {
                        namespace_options: Some(NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() }),
                        seccomp: Some(SecurityProfile { profile_type: 1, ..Default::default() }),
                        masked_paths: vec!["/proc/kcore".into()],
                        readonly_paths: vec!["/proc/sys".into()],
                        ..LinuxContainerSecurityContext::default()
                    }),
                }),
                ..ContainerConfig::default()
            },
            image: ImageDefaults {
                entrypoint: vec!["/entry".into()],
                cmd: vec!["serve".into()],
                env: vec!["PATH=/bin".into(), "A=0".into()],
                working_dir: "/srv".into(),
                ..ImageDefaults::default()
            },
            files: PodFiles {
                hostname: "/s/hostname".into(),
                hosts: "/s/hosts".into(),
                resolv_conf: "/s/resolv.conf".into(),
                shm: "/s/shm".into(),
            },
            sources: vec![
                MountSource { path: "/pod/etc-hosts".into(), ..Default::default() },
                MountSource { path: "/pod/cm".into(), ..Default::default() },
            ],
            devices: Vec::new(),
            host: HostFacts {
                swap_accounting: true,
                recursive_read_only: true,
                capabilities: ["CAP_CHOWN".to_owned(), "CAP_SYS_ADMIN".to_owned()].into(),
                oom_score_adj_min: -1000,
                architecture: "x86_64".into(),
                ..HostFacts::default()
            },
            target_pid: None,
        }
    }

    fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    fn run(&self) -> Result<Spec, SpecError> {
        container(&ContainerFacts {
            id: "c1",
            sandbox_id: "s1",
            sandbox_pid: 42,
            target_pid: self.target_pid,
            sandbox: &self.sandbox,
            config: &self.config,
            image: &self.image,
            image_name: "nginx:1",
            user: User { uid: 0, gid: 0, additional_gids: vec![0] },
            seccomp_file: None,
            files: &self.files,
            sources: &self.sources,
            devices: &self.devices,
            host: &self.host,
            cgroup_root: "/coracle",
        })
    }

    fn json(&self) -> Value {
        serde_json::to_value(self.run().expect("a spec")).expect("JSON")
    }
}

fn namespaces(spec: &Value) -> HashMap<String, String> {
    let list = spec["linux"]["namespaces"].as_array().expect("a list");
    list.iter().map(|entry| (entry["type"].as_str().unwrap_or("").into(), entry["path"].as_str().unwrap_or("").into())).collect()
}

fn mount<'a>(spec: &'a Value, destination: &str) -> Option<&'a Value> {
    spec["mounts"].as_array().expect("a list").iter().find(|mount| mount["destination"] == destination)
}

#[test]
fn the_recorded_container() {
    let spec = Case::recorded().json();
    assert_eq!(spec["ociVersion"], "1.0.2");
    assert_eq!(spec["process"]["args"], json!(["/entry", "serve"]));
    assert_eq!(spec["process"]["env"], json!(["PATH=/bin", "HOSTNAME=web-x", "A=1"]));
    assert_eq!(spec["process"]["cwd"], "/srv");
    assert_eq!(spec["process"]["oomScoreAdj"], 999);
    assert_eq!(spec["root"], json!({"path": "rootfs"}));
    assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/burstable/podUID/c1");
    assert_eq!(
        spec["linux"]["resources"],
        json!({
            "devices": [{"allow": false, "access": "rwm"}],
            "memory": {"limit": 67_108_864, "swap": 67_108_864},
            "cpu": {"shares": 51, "quota": 20_000, "period": 100_000},
        })
    );
    assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    assert_eq!(spec["linux"]["seccomp"], Value::Null);
    assert_eq!(
        spec["annotations"],
        json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "s1",
            "io.kubernetes.cri.sandbox-name": "web-x",
            "io.kubernetes.cri.sandbox-namespace": "default",
            "io.kubernetes.cri.sandbox-uid": "UID",
            "io.kubernetes.cri.container-name": "nginx",
            "io.kubernetes.cri.image-name": "nginx:1",
        })
    );
    let order: Vec<&str> = spec["mounts"].as_array().expect("a list").iter().filter_map(|mount| mount["destination"].as_str()).collect();
    assert_eq!(
        order,
        [
            "/proc",
            "/dev",
            "/sys",
            "/cm",
            "/dev/pts",
            "/dev/mqueue",
            "/etc/hostname",
            "/etc/resolv.conf",
            "/dev/shm",
            "/etc/hosts",
            "/sys/fs/cgroup"
        ]
    );
    assert_eq!(mount(&spec, "/etc/hosts").expect("there")["source"], "/pod/etc-hosts");
    assert_eq!(mount(&spec, "/cm").expect("there")["options"], json!(["rbind", "rprivate", "ro"]));
    let namespaces = namespaces(&spec);
    assert_eq!(namespaces["pid"], "");
    assert_eq!(namespaces["network"], "/proc/42/ns/net");
    assert_eq!(namespaces["uts"], "/proc/42/ns/uts");
    assert!(!namespaces.contains_key("cgroup"));
}

#[test]
fn process_namespaces() {
    let mut case = Case::recorded();
    let mut pid_path = |mode: NamespaceMode, target: Option<u32>| {
        case.security().namespace_options = Some(NamespaceOption { pid: mode as i32, ..Default::default() });
        case.target_pid = target;
        case.run().map(|spec| spec.linux.namespaces.into_iter().find(|namespace| namespace.kind == "pid").map(|namespace| namespace.path))
    };
    assert_eq!(pid_path(NamespaceMode::Pod, None), Ok(Some("/proc/42/ns/pid".into())));
    assert_eq!(pid_path(NamespaceMode::Node, None), Ok(None));
    assert_eq!(pid_path(NamespaceMode::Target, Some(7)), Ok(Some("/proc/7/ns/pid".into())));
    assert!(matches!(pid_path(NamespaceMode::Target, None), Err(SpecError::Namespace(_))));
}

#[test]
fn a_privileged_container_has_all_that_the_daemon_has() {
    let mut case = Case::recorded();
    case.security().privileged = true;
    case.security().seccomp = Some(SecurityProfile::default());
    assert_eq!(case.run(), Err(SpecError::Privileged));
    let context = LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    case.sandbox.linux.as_mut().expect("set").security_context = Some(context);
    case.host.cgroup_v2 = true;
    let spec = case.json();
    assert_eq!(spec["process"]["capabilities"]["bounding"], json!(["CAP_CHOWN", "CAP_SYS_ADMIN"]));
    assert_eq!(spec["linux"]["maskedPaths"], Value::Null);
    assert_eq!(spec["linux"]["seccomp"], Value::Null);
    assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow": true, "access": "rwm"}]));
    assert_eq!(mount(&spec, "/sys").expect("there")["options"], json!(["nosuid", "noexec", "nodev", "rw"]));
    assert!(!namespaces(&spec).contains_key("cgroup"));
}

#[test]
fn arguments_replace_each_other_as_in_kubernetes() {
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let run = |command: &[&str], args: &[&str], entrypoint: &[&str], cmd: &[&str]| {
        let config = ContainerConfig { command: words(command), args: words(args), ..Default::default() };
        let image = ImageDefaults { entrypoint: words(entrypoint), cmd: words(cmd), ..Default::default() };
        arguments(&config, &image)
    };
    assert_eq!(run(&[], &[], &["e"], &["c"]), Ok(words(&["e", "c"])));
    assert_eq!(run(&["x"], &[], &["e"], &["c"]), Ok(words(&["x"])));
    assert_eq!(run(&[], &["y"], &["e"], &["c"]), Ok(words(&["e", "y"])));
    assert_eq!(run(&["x"], &["y"], &["e"], &["c"]), Ok(words(&["x", "y"])));
    assert_eq!(run(&[], &[], &[""], &["c"]), Ok(words(&["c"])));
    assert_eq!(run(&[], &[], &[], &[]), Err(SpecError::NoCommand));
}

#[test]
fn mounts_are_checked_against_the_host() {
    let with = |change: &dyn Fn(&mut Mount), propagation: SourcePropagation| {
        let mut case = Case::recorded();
        case.sources[1].propagation = propagation;
        change(&mut case.config.mounts[1]);
        case.run()
    };
    let bidirectional = |mount: &mut Mount| mount.propagation = MountPropagation::PropagationBidirectional as i32;
    let spec = with(&bidirectional, SourcePropagation::Shared).expect("shared");
    assert_eq!(spec.linux.rootfs_propagation, "rshared");
    assert!(with(&bidirectional, SourcePropagation::Slave).is_err());
    let to_container = |mount: &mut Mount| mount.propagation = MountPropagation::PropagationHostToContainer as i32;
    assert_eq!(with(&to_container, SourcePropagation::Slave).expect("slave").linux.rootfs_propagation, "rslave");
    assert!(with(&to_container, SourcePropagation::Private).is_err());
    let recursive = |mount: &mut Mount| mount.recursive_read_only = true;
    let spec = with(&recursive, SourcePropagation::Private).expect("supported");
    assert_eq!(spec.oci_version, "1.1.0");
    assert!(with(&|mount| (mount.recursive_read_only, mount.readonly) = (true, false), SourcePropagation::Private).is_err());
    assert!(with(&|mount| mount.container_path = "rel".into(), SourcePropagation::Private).is_err());
    assert!(with(&|mount| mount.container_path = "/a/..".into(), SourcePropagation::Private).is_err());
    let image = |mount: &mut Mount| mount.image = Some(ImageSpec { image: "i".into(), ..Default::default() });
    assert_eq!(with(&image, SourcePropagation::Private), Err(SpecError::Unimplemented("images as volumes")));
}

#[test]
fn what_is_asked_for_and_not_there_is_refused() {
    let refused = |change: &dyn Fn(&mut Case)| {
        let mut case = Case::recorded();
        change(&mut case);
        case.run().expect_err("refused")
    };
    assert_eq!(refused(&|case| case.security().apparmor = Some(SecurityProfile::default())), SpecError::Unsupported("AppArmor"));
    assert_eq!(
        refused(&|case| case.security().selinux_options = Some(SeLinuxOption { level: "s0".into(), ..Default::default() })),
        SpecError::Unsupported("SELinux")
    );
    assert_eq!(
        refused(&|case| {
            let userns = UserNamespace { mode: NamespaceMode::Pod as i32, ..Default::default() };
            case.security().namespace_options = Some(NamespaceOption { userns_options: Some(userns), ..Default::default() });
        }),
        SpecError::Unimplemented("a user namespace of the pod")
    );
    assert_eq!(refused(&|case| case.config.cdi_devices.push(CdiDevice { name: "v/c=d".into() })), SpecError::Unimplemented("CDI devices"));
}

#[test]
fn a_supplied_dev_hides_the_defaults_below_it() {
    let mut case = Case::recorded();
    case.config.mounts[1].container_path = "/dev".into();
    let spec = case.json();
    assert_eq!(mount(&spec, "/dev").expect("there")["type"], "bind");
    assert!(mount(&spec, "/dev/pts").is_none() && mount(&spec, "/dev/shm").is_none());
}

#[test]
fn devices_are_made_and_allowed() {
    let mut case = Case::recorded();
    case.devices.push(HostDevice {
        path: "/dev/x".into(),
        kind: "c".into(),
        major: 1,
        minor: 3,
        file_mode: 0o666,
        access: "rw".into(),
        ..Default::default()
    });
    let spec = case.json();
    assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/x");
    assert_eq!(spec["linux"]["resources"]["devices"][1], json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}));
}

#[test]
fn oom_score_adj_is_clamped_and_cgroups_stay_below_their_root() {
    let mut case = Case::recorded();
    case.host.oom_score_adj_min = 1000;
    assert_eq!(case.run().expect("a spec").process.oom_score_adj, Some(1000));
    assert_eq!(cgroups_path(&PodSandboxConfig::default(), "/coracle", "c1"), "/coracle/c1");
}
