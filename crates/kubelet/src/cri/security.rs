//! Security contexts in CRI's words (upstream pkg/kubelet/kuberuntime/security_context.go, pkg/securitycontext, v1.37).

use k8s_openapi::api::core::v1::{Container, Pod, SELinuxOptions, SeccompProfile, SecurityContext};
use protocols::cri::v1 as cri;

use crate::cri::NodeFacts;
use crate::model;

/// Paths that an unprivileged container does not see (the recorded 12).
const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// Paths that an unprivileged container only reads.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Who the image says its process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageUser {
    /// Numeric user.
    pub uid: Option<i64>,
    /// User name, when not numeric.
    pub username: String,
}

/// Namespaces of the pod's sandbox and containers.
pub fn namespaces(pod: &Pod) -> Result<cri::NamespaceOption, String> {
    let spec = pod.spec.as_ref();
    let flag = |f: fn(&k8s_openapi::api::core::v1::PodSpec) -> Option<bool>| spec.and_then(f) == Some(true);
    if spec.and_then(|s| s.host_users) == Some(false) {
        return Err("spec.hostUsers false: user namespaces of pods are not supported by this kubelet".to_owned());
    }
    let node_or = |yes: bool, other: cri::NamespaceMode| {
        if yes { cri::NamespaceMode::Node } else { other }
    };
    let pid = if flag(|s| s.share_process_namespace) { cri::NamespaceMode::Pod } else { cri::NamespaceMode::Container };
    Ok(cri::NamespaceOption {
        network: node_or(flag(|s| s.host_network), cri::NamespaceMode::Pod) as i32,
        pid: node_or(flag(|s| s.host_pid), pid) as i32,
        ipc: node_or(flag(|s| s.host_ipc), cri::NamespaceMode::Pod) as i32,
        target_id: String::new(),
        userns_options: Some(cri::UserNamespace { mode: cri::NamespaceMode::Node as i32, ..Default::default() }),
    })
}

/// fsGroup first, then the supplemental groups.
pub fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let groups = context.iter().flat_map(|c| c.supplemental_groups.iter().flatten());
    context.and_then(|c| c.fs_group).into_iter().chain(groups.copied()).collect()
}

/// `Merge` or `Strict`.
pub fn supplemental_groups_policy(pod: &Pod) -> i32 {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    match context.and_then(|c| c.supplemental_groups_policy.as_deref()) {
        Some("Strict") => cri::SupplementalGroupsPolicy::Strict as i32,
        _ => cri::SupplementalGroupsPolicy::Merge as i32,
    }
}

/// SELinux labels.
pub fn selinux(options: &SELinuxOptions) -> cri::SeLinuxOption {
    let text = |s: &Option<String>| s.clone().unwrap_or_default();
    cri::SeLinuxOption { user: text(&options.user), role: text(&options.role), r#type: text(&options.type_), level: text(&options.level) }
}

/// Refuses a container that must not run as root and would, or might.
pub fn verify_non_root(pod: &Pod, container: &Container, image: &ImageUser) -> Result<(), String> {
    let own = container.security_context.as_ref();
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let required = own.and_then(|c| c.run_as_non_root).or(of_pod.and_then(|c| c.run_as_non_root));
    if required != Some(true) {
        return Ok(());
    }
    let at = format!("(pod: \"{}\", container: {})", model::format_pod(pod), container.name);
    let user = own.and_then(|c| c.run_as_user).or(of_pod.and_then(|c| c.run_as_user));
    match user {
        Some(0) => Err(format!("container's runAsUser breaks non-root policy {at}")),
        Some(_) => Ok(()),
        None if image.uid == Some(0) => Err(format!("container has runAsNonRoot and image will run as root {at}")),
        None if image.uid.is_none() && !image.username.is_empty() => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {at}",
            image.username
        )),
        None => Ok(()),
    }
}

/// The container's security context: its own over the pod's, the image's user where neither says one.
pub fn context(
    pod: &Pod,
    container: &Container,
    image: &ImageUser,
    node: &NodeFacts,
) -> Result<cri::LinuxContainerSecurityContext, String> {
    let none = SecurityContext::default();
    let own = container.security_context.as_ref().unwrap_or(&none);
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let int = |value: i64| cri::Int64Value { value };
    let user = own.run_as_user.or(of_pod.and_then(|c| c.run_as_user));
    let group = own.run_as_group.or(of_pod.and_then(|c| c.run_as_group));
    let (run_as_user, run_as_username) = match user {
        Some(user) => (Some(int(user)), String::new()),
        None => (image.uid.map(int), image.username.clone()),
    };
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
    let paths = |list: &[&str]| {
        if unmasked { Vec::new() } else { list.iter().map(|p| (*p).to_owned()).collect() }
    };
    let selinux_options = own.se_linux_options.as_ref();
    Ok(cri::LinuxContainerSecurityContext {
        capabilities: own.capabilities.as_ref().map(|c| cri::Capability {
            add_capabilities: c.add.clone().unwrap_or_default(),
            drop_capabilities: c.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged: own.privileged.unwrap_or(false),
        namespace_options: Some(namespaces(pod)?),
        selinux_options: selinux_options.or(of_pod.and_then(|c| c.se_linux_options.as_ref())).map(selinux),
        run_as_user,
        run_as_group: group.map(int),
        run_as_username,
        readonly_rootfs: own.read_only_root_filesystem.unwrap_or(false),
        supplemental_groups: supplemental_groups(pod),
        supplemental_groups_policy: supplemental_groups_policy(pod),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths: paths(&MASKED_PATHS),
        readonly_paths: paths(&READONLY_PATHS),
        seccomp: Some(seccomp(
            own.seccomp_profile.as_ref().or(of_pod.and_then(|c| c.seccomp_profile.as_ref())),
            own.privileged == Some(true),
            node,
        )?),
        apparmor: apparmor(pod, own),
        ..Default::default()
    })
}

fn seccomp(profile: Option<&SeccompProfile>, privileged: bool, node: &NodeFacts) -> Result<cri::SecurityProfile, String> {
    use cri::security_profile::ProfileType;
    let of = |profile_type: ProfileType, localhost_ref: String| cri::SecurityProfile { profile_type: profile_type as i32, localhost_ref };
    let Some(profile) = profile.filter(|_| !privileged) else {
        return Ok(of(ProfileType::Unconfined, String::new()));
    };
    match profile.type_.as_str() {
        "RuntimeDefault" => Ok(of(ProfileType::RuntimeDefault, String::new())),
        "Localhost" => {
            let name = profile.localhost_profile.as_deref().filter(|n| !n.is_empty());
            let name = name.ok_or("localhostProfile must be set if seccompProfile type is Localhost.")?;
            Ok(of(ProfileType::Localhost, format!("{}/{name}", node.seccomp_root)))
        }
        _ => Ok(of(ProfileType::Unconfined, String::new())),
    }
}

fn apparmor(pod: &Pod, own: &SecurityContext) -> Option<cri::SecurityProfile> {
    use cri::security_profile::ProfileType;
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let profile = own.app_armor_profile.as_ref().or(of_pod.and_then(|c| c.app_armor_profile.as_ref()))?;
    let (profile_type, localhost_ref) = match profile.type_.as_str() {
        "RuntimeDefault" => (ProfileType::RuntimeDefault, String::new()),
        "Localhost" => (ProfileType::Localhost, profile.localhost_profile.clone().unwrap_or_default()),
        _ => (ProfileType::Unconfined, String::new()),
    };
    Some(cri::SecurityProfile { profile_type: profile_type as i32, localhost_ref })
}
