//! From CRI's ContainerConfig and the image's to an OCI spec. Pure: what must be looked up on the host is in the facts.
//!
//! Source: containerd v2.4.2, `internal/cri/server/container_create.go` (buildLinuxSpec).

pub mod capabilities;
pub mod mounts;
pub mod pause;
pub mod resources;
pub mod seccomp;
pub mod signal;
pub mod user;

use std::collections::{BTreeMap, BTreeSet};

use protocols::cri::v1::{ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig};

use crate::oci::{Device, DeviceRule, Linux, Namespace, Process, Resources, Root, Seccomp, Spec, User};
use mounts::MountSource;

#[cfg(test)]
mod tests;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A request that cannot be made into a spec; the words are for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("container config: {0} is missing")]
    Missing(&'static str),
    #[error("container config: no command specified, neither in the request nor in the image")]
    NoCommand,
    #[error("user: {0}")]
    User(String),
    #[error("seccomp: {0}")]
    Seccomp(String),
    #[error("capabilities: {0:?} is not a capability")]
    Capability(String),
    #[error("resources: {0}")]
    Resource(String),
    #[error("stop signal: {0:?} is not a signal")]
    Signal(String),
    #[error("mount {container_path}: {reason}")]
    Mount { container_path: String, reason: String },
    #[error("device {path}: {reason}")]
    Device { path: String, reason: String },
    #[error("namespace_options: {0}")]
    Namespace(String),
    #[error("{0} is not supported by this host")]
    Unsupported(&'static str),
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    #[error("no privileged container allowed in a sandbox that is not")]
    Privileged,
}

/// What this host and this server have; read once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// All controllers are on cgroup v2.
    pub cgroup_v2: bool,
    /// There is a hugetlb controller where limits can be set.
    pub hugetlb: bool,
    /// Swap can be limited.
    pub swap_accounting: bool,
    /// Read-only with all below (mount_setattr with AT_RECURSIVE, Linux 5.12).
    pub recursive_read_only: bool,
    /// This server's own permitted capabilities.
    pub capabilities: BTreeSet<String>,
    /// The lowest oom_score_adj that this server may set: without CAP_SYS_RESOURCE its own.
    pub oom_score_adj_min: i64,
    /// As `std::env::consts::ARCH`.
    pub architecture: String,
    /// The host's name.
    pub hostname: String,
}

/// What an image says of its processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// `USER[:GROUP]`.
    pub user: String,
    pub working_dir: String,
}

/// Host paths that the containers of a pod share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles {
    pub hostname: String,
    pub hosts: String,
    pub resolv_conf: String,
    /// The pod's own tmpfs, or the host's `/dev/shm`.
    pub shm: String,
}

/// A device node found on the host, under the container's path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostDevice {
    /// Path in the container.
    pub path: String,
    /// `c` or `b`.
    pub kind: String,
    pub major: i64,
    pub minor: i64,
    pub file_mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// `rwm` or a part of it.
    pub access: String,
}

/// All that a container's spec depends on.
#[derive(Clone, Debug)]
pub struct ContainerFacts<'a> {
    pub id: &'a str,
    pub sandbox_id: &'a str,
    /// A process that is in the pod's namespaces.
    pub sandbox_pid: u32,
    /// The process whose PID namespace is joined (mode TARGET).
    pub target_pid: Option<u32>,
    pub sandbox: &'a PodSandboxConfig,
    pub config: &'a ContainerConfig,
    pub image: &'a ImageDefaults,
    /// The image's name as the user gave it.
    pub image_name: &'a str,
    pub user: User,
    /// The profile of [`seccomp::Request::Localhost`].
    pub seccomp_file: Option<Seccomp>,
    pub files: &'a PodFiles,
    /// For each of `config.mounts`.
    pub sources: &'a [MountSource],
    /// Those of `config.devices`, with all below directories; for privileged containers the host's as well.
    pub devices: &'a [HostDevice],
    pub host: &'a HostFacts,
    /// Parent of containers whose sandbox names none.
    pub cgroup_root: &'a str,
}

static NO_SECURITY: std::sync::LazyLock<LinuxContainerSecurityContext> = std::sync::LazyLock::new(LinuxContainerSecurityContext::default);

/// The security context of a container config, or an empty one.
pub fn security(config: &ContainerConfig) -> &LinuxContainerSecurityContext {
    config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).unwrap_or(&NO_SECURITY)
}

/// The namespace options of a sandbox config, or the defaults.
pub fn sandbox_namespaces(config: &PodSandboxConfig) -> NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.clone())
        .unwrap_or_default()
}

/// Refuses what no container of this server can have yet.
///
/// # Errors
/// [`SpecError::Unimplemented`] or [`SpecError::Unsupported`] with the feature's name.
pub fn check_namespaces(options: &NamespaceOption) -> Result<(), SpecError> {
    if options.userns_options.as_ref().is_some_and(|userns| userns.mode() != NamespaceMode::Node) {
        return Err(SpecError::Unimplemented("a user namespace of the pod"));
    }
    Ok(())
}

/// The cgroup of a container, below the pod's or `cgroup_root`.
pub fn cgroups_path(sandbox: &PodSandboxConfig, cgroup_root: &str, id: &str) -> String {
    let parent = sandbox.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).filter(|parent| !parent.is_empty());
    mounts::clean(&format!("/{}/{id}", parent.unwrap_or(cgroup_root)))
}

impl<'a> ContainerFacts<'a> {
    fn security(&self) -> &'a LinuxContainerSecurityContext {
        security(self.config)
    }
}

/// The spec of a container.
///
/// # Errors
/// [`SpecError`]: the request is wrong in itself, or this host cannot carry it out.
pub fn container(facts: &ContainerFacts<'_>) -> Result<Spec, SpecError> {
    let security = facts.security();
    let privileged = security.privileged;
    check_labels(facts)?;
    let (mounts, rootfs_propagation) = mounts::resolve(facts, privileged)?;
    let capabilities = capabilities::resolve(security.capabilities.as_ref(), privileged, &facts.host.capabilities)?;
    let seccomp = match seccomp::request(security.seccomp.as_ref(), privileged)? {
        seccomp::Request::Unconfined => None,
        seccomp::Request::RuntimeDefault => Some(seccomp::default_profile(&capabilities.bounding, &facts.host.architecture)),
        seccomp::Request::Localhost(path) => {
            Some(facts.seccomp_file.clone().ok_or_else(|| SpecError::Seccomp(format!("profile {path} was not read")))?)
        }
    };
    let (devices, device_rules) = devices(facts, privileged);
    let mut resources = Resources { devices: device_rules, ..Resources::default() };
    let requested = facts.config.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    if let Some(requested) = requested {
        resources::merge(&mut resources, requested, facts.host)?;
    }
    let needs_1_1 = mounts.iter().any(|mount| mount.options.iter().any(|option| option == "rro"));
    Ok(Spec {
        oci_version: if needs_1_1 { "1.1.0" } else { "1.0.2" }.to_owned(),
        process: Process {
            terminal: facts.config.tty,
            user: facts.user.clone(),
            args: arguments(facts.config, facts.image)?,
            env: environment(facts),
            cwd: working_dir(facts),
            capabilities,
            no_new_privileges: security.no_new_privs,
            oom_score_adj: requested.map(|resources| resources.oom_score_adj.max(facts.host.oom_score_adj_min)),
        },
        root: Root { path: "rootfs".to_owned(), readonly: security.readonly_rootfs },
        hostname: String::new(),
        mounts,
        annotations: annotations(facts),
        linux: Linux {
            namespaces: namespaces(facts, privileged)?,
            devices,
            cgroups_path: cgroups_path(facts.sandbox, facts.cgroup_root, facts.id),
            resources,
            sysctl: BTreeMap::new(),
            rootfs_propagation,
            seccomp,
            masked_paths: if privileged { Vec::new() } else { security.masked_paths.clone() },
            readonly_paths: if privileged { Vec::new() } else { security.readonly_paths.clone() },
        },
    })
}

/// Labels of security modules that these hosts lack, and what else must not be passed over in silence.
fn check_labels(facts: &ContainerFacts<'_>) -> Result<(), SpecError> {
    use protocols::cri::v1::security_profile::ProfileType;
    let security = facts.security();
    let sandbox_privileged =
        facts.sandbox.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).is_some_and(|context| context.privileged);
    if security.privileged && !sandbox_privileged {
        return Err(SpecError::Privileged);
    }
    if security.apparmor.as_ref().is_some_and(|profile| profile.profile_type() != ProfileType::Unconfined)
        || !matches!(security.apparmor_profile.as_str(), "" | "unconfined")
    {
        return Err(SpecError::Unsupported("AppArmor"));
    }
    if !security.seccomp_profile_path.is_empty() && security.seccomp.is_none() {
        return Err(SpecError::Seccomp("seccomp_profile_path is not read, give seccomp".to_owned()));
    }
    let selinux = security.selinux_options.as_ref();
    if selinux.is_some_and(|options| [&options.user, &options.role, &options.r#type, &options.level].iter().any(|word| !word.is_empty())) {
        return Err(SpecError::Unsupported("SELinux"));
    }
    if !facts.config.cdi_devices.is_empty() {
        return Err(SpecError::Unimplemented("CDI devices"));
    }
    check_namespaces(&security.namespace_options.clone().unwrap_or_default())
}

/// `command` replaces the image's entrypoint and, with it, its cmd; `args` replace the cmd.
fn arguments(config: &ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, SpecError> {
    let mut arguments = config.command.clone();
    if arguments.is_empty() {
        if image.entrypoint != [""] {
            arguments.extend(image.entrypoint.iter().cloned());
        }
        let tail = if config.args.is_empty() { &image.cmd } else { &config.args };
        arguments.extend(tail.iter().cloned());
    } else {
        arguments.extend(config.args.iter().cloned());
    }
    if arguments.is_empty() { Err(SpecError::NoCommand) } else { Ok(arguments) }
}

fn environment(facts: &ContainerFacts<'_>) -> Vec<String> {
    let hostname = if facts.sandbox.hostname.is_empty() { &facts.host.hostname } else { &facts.sandbox.hostname };
    let mut env = vec![DEFAULT_PATH.to_owned()];
    if facts.config.tty {
        env.push("TERM=xterm".to_owned());
    }
    env.push(format!("HOSTNAME={hostname}"));
    let requested = facts.config.envs.iter().map(|pair| format!("{}={}", pair.key, String::from_utf8_lossy(&pair.value)));
    for entry in facts.image.env.iter().cloned().chain(requested) {
        let name = entry.split('=').next().unwrap_or("").to_owned();
        match env.iter_mut().find(|known| known.split('=').next() == Some(&name)) {
            Some(known) => *known = entry,
            None => env.push(entry),
        }
    }
    env
}

fn working_dir(facts: &ContainerFacts<'_>) -> String {
    [&facts.config.working_dir, &facts.image.working_dir].into_iter().find(|dir| !dir.is_empty()).cloned().unwrap_or_else(|| "/".to_owned())
}

fn annotations(facts: &ContainerFacts<'_>) -> BTreeMap<String, String> {
    let pod = facts.sandbox.metadata.clone().unwrap_or_default();
    let name = facts.config.metadata.clone().unwrap_or_default().name;
    [
        ("container-type", "container".to_owned()),
        ("sandbox-id", facts.sandbox_id.to_owned()),
        ("sandbox-name", pod.name),
        ("sandbox-namespace", pod.namespace),
        ("sandbox-uid", pod.uid),
        ("container-name", name),
        ("image-name", facts.image_name.to_owned()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value))
    .collect()
}

fn namespaces(facts: &ContainerFacts<'_>, privileged: bool) -> Result<Vec<Namespace>, SpecError> {
    let options = facts.security().namespace_options.clone().unwrap_or_default();
    let make = |kind: &str| Namespace { kind: kind.to_owned(), path: String::new() };
    let join = |kind: &str, file: &str, pid: u32| Namespace { kind: kind.to_owned(), path: format!("/proc/{pid}/ns/{file}") };
    let mut namespaces = vec![make("mount")];
    let mode = NamespaceMode::try_from(options.pid).map_err(|_| SpecError::Namespace(format!("pid {} is not known", options.pid)))?;
    match mode {
        NamespaceMode::Container => namespaces.push(make("pid")),
        NamespaceMode::Pod => namespaces.push(join("pid", "pid", facts.sandbox_pid)),
        NamespaceMode::Target => {
            let pid = facts.target_pid.ok_or_else(|| SpecError::Namespace(format!("target {:?} does not run", options.target_id)))?;
            namespaces.push(join("pid", "pid", pid));
        }
        NamespaceMode::Node => {}
    }
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        namespaces.push(join(kind, file, facts.sandbox_pid));
    }
    // On v1 a cgroup namespace would hide the hierarchies from programs that look for their own limits.
    if facts.host.cgroup_v2 && !privileged {
        namespaces.push(make("cgroup"));
    }
    Ok(namespaces)
}

fn devices(facts: &ContainerFacts<'_>, privileged: bool) -> (Vec<Device>, Vec<DeviceRule>) {
    let nodes = facts
        .devices
        .iter()
        .map(|device| Device {
            path: device.path.clone(),
            kind: device.kind.clone(),
            major: device.major,
            minor: device.minor,
            file_mode: device.file_mode,
            uid: device.uid,
            gid: device.gid,
        })
        .collect();
    let all = |allow| DeviceRule { allow, access: "rwm".to_owned(), ..DeviceRule::default() };
    if privileged {
        return (nodes, vec![all(true)]);
    }
    let mut rules = vec![all(false)];
    rules.extend(facts.devices.iter().map(|device| DeviceRule {
        allow: true,
        kind: device.kind.clone(),
        major: Some(device.major),
        minor: Some(device.minor),
        access: device.access.clone(),
    }));
    (nodes, rules)
}
