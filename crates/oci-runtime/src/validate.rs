//! What of a configuration can be carried out: everything else is refused here, before anything is made.

use std::collections::HashSet;
use std::path::Path;

use linux::namespace::Kind;

use crate::error::{Result, refuse};
use crate::spec::{Linux, Namespace, Process, Spec};

/// The kind of a namespace by the specification's word.
pub fn namespace_kind(word: &str) -> Option<Kind> {
    Some(match word {
        "pid" => Kind::Pid,
        "network" => Kind::Net,
        "mount" => Kind::Mount,
        "ipc" => Kind::Ipc,
        "uts" => Kind::Uts,
        "user" => Kind::User,
        "cgroup" => Kind::Cgroup,
        "time" => Kind::Time,
        _ => return None,
    })
}

/// Checks a container's configuration.
///
/// # Errors
/// Names the property that is wrong, or cannot be carried out.
pub fn container(spec: &Spec) -> Result<()> {
    if !spec.oci_version.starts_with("1.") {
        return refuse(format!("ociVersion {:?} is not supported: this runtime implements 1.x", spec.oci_version));
    }
    if spec.vm.is_some() {
        return refuse("vm is not supported by this runtime");
    }
    let Some(process) = &spec.process else { return refuse("process property must not be empty") };
    self::process(process)?;
    match &spec.root {
        None => return refuse("root property must not be empty"),
        Some(root) if root.path.as_os_str().is_empty() => return refuse("root.path must not be empty"),
        Some(_) => {}
    }
    for mount in &spec.mounts {
        if mount.destination.as_os_str().is_empty() {
            return refuse("mounts: a destination must not be empty");
        }
        if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
            return refuse(format!("mount {}: uidMappings and gidMappings are not implemented", mount.destination.display()));
        }
    }
    for (point, hooks) in [
        ("prestart", &spec.hooks.prestart),
        ("createRuntime", &spec.hooks.create_runtime),
        ("createContainer", &spec.hooks.create_container),
        ("startContainer", &spec.hooks.start_container),
        ("poststart", &spec.hooks.poststart),
        ("poststop", &spec.hooks.poststop),
    ] {
        if let Some(hook) = hooks.iter().find(|hook| !hook.path.is_absolute()) {
            return refuse(format!("hooks.{point}: path {} is not absolute", hook.path.display()));
        }
    }
    match &spec.linux {
        Some(linux) => self::linux(spec, linux),
        None => refuse("linux property must not be empty"),
    }
}

/// Checks a process.
///
/// # Errors
/// Names the property that is wrong, or cannot be carried out.
pub fn process(process: &Process) -> Result<()> {
    if process.args.is_empty() || process.args[0].is_empty() {
        return refuse("args must not be empty");
    }
    if !process.cwd.is_absolute() {
        return refuse(format!("cwd must be an absolute path, not {:?}", process.cwd));
    }
    if !process.selinux_label.is_empty() {
        return refuse("process.selinuxLabel: SELinux is not implemented");
    }
    if process.exec_cpu_affinity.as_ref().is_some_and(|a| !a.initial.is_empty() || !a.last.is_empty()) {
        return refuse("process.execCPUAffinity is not implemented");
    }
    let mut seen = HashSet::new();
    for limit in &process.rlimits {
        if linux::rlimit::number(&limit.kind).is_none() {
            return refuse(format!("process.rlimits: invalid rlimit type {:?}", limit.kind));
        }
        if !seen.insert(limit.kind.as_str()) {
            return refuse(format!("process.rlimits: {} is given twice", limit.kind));
        }
    }
    if let Some(scheduler) = &process.scheduler {
        crate::process::scheduling(scheduler)?;
    }
    if let Some(priority) = &process.io_priority {
        crate::process::io_priority_class(&priority.class)?;
        if !(0..=7).contains(&priority.priority) {
            return refuse(format!("process.ioPriority.priority {} is not between 0 and 7", priority.priority));
        }
    }
    Ok(())
}

fn linux(spec: &Spec, linux: &Linux) -> Result<()> {
    namespaces(linux)?;
    let has = |kind| find(linux, kind).is_some();
    if !find(linux, Kind::Mount).is_some_and(|ns| ns.path.is_empty()) {
        return refuse("linux.namespaces: a mount namespace that is the container's own is needed");
    }
    if !spec.hostname.is_empty() && !has(Kind::Uts) {
        return refuse("unable to set hostname without a private UTS namespace");
    }
    if !spec.domainname.is_empty() && !has(Kind::Uts) {
        return refuse("unable to set domainname without a private UTS namespace");
    }
    for (name, unknown) in [
        ("intelRdt", linux.intel_rdt.is_some()),
        ("memoryPolicy", linux.memory_policy.is_some()),
        ("netDevices", !linux.net_devices.is_empty()),
        ("timeOffsets", !linux.time_offsets.is_empty()),
    ] {
        if unknown {
            return refuse(format!("linux.{name} is not implemented"));
        }
    }
    if !linux.mount_label.is_empty() {
        return refuse("linux.mountLabel: SELinux is not implemented");
    }
    let user = find(linux, Kind::User);
    let maps = !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty();
    match user {
        None if maps => return refuse("linux.uidMappings and gidMappings need a user namespace"),
        Some(ns) if ns.path.is_empty() && (linux.uid_mappings.is_empty() || linux.gid_mappings.is_empty()) => {
            return refuse("linux.namespaces: a new user namespace needs uidMappings and gidMappings");
        }
        _ => {}
    }
    if !linux.rootfs_propagation.is_empty() && crate::mount_options::propagation(&linux.rootfs_propagation).is_none() {
        return refuse(format!("linux.rootfsPropagation {:?} is unknown", linux.rootfs_propagation));
    }
    for path in linux.masked_paths.iter().chain(&linux.readonly_paths) {
        if !path.is_absolute() {
            return refuse(format!("linux.maskedPaths, readonlyPaths: {} is not absolute", path.display()));
        }
    }
    sysctls(spec, linux)?;
    if let Some(personality) = &linux.personality {
        crate::process::persona(personality)?;
    }
    if linux.resources.as_ref().and_then(|r| r.memory.as_ref()).and_then(|m| m.use_hierarchy) == Some(false) {
        return refuse("linux.resources.memory.useHierarchy: false is not supported by the kernel any more");
    }
    Ok(())
}

/// The namespace of this kind in the configuration.
pub fn find(linux: &Linux, kind: Kind) -> Option<&Namespace> {
    linux.namespaces.iter().find(|ns| namespace_kind(&ns.kind) == Some(kind))
}

fn namespaces(linux: &Linux) -> Result<()> {
    let mut seen = HashSet::new();
    for ns in &linux.namespaces {
        match namespace_kind(&ns.kind) {
            None => return refuse(format!("linux.namespaces: unknown type {:?}", ns.kind)),
            Some(Kind::Time) => return refuse("linux.namespaces: time namespaces are not implemented"),
            Some(kind) if !seen.insert(kind) => {
                return refuse(format!("linux.namespaces: malformed spec file: duplicated ns {:?}", ns.kind));
            }
            Some(_) => {}
        }
        if !ns.path.is_empty() && !Path::new(&ns.path).is_absolute() {
            return refuse(format!("linux.namespaces: {} is not an absolute path", ns.path));
        }
    }
    Ok(())
}

/// Settings that are of a namespace; others would change the host. The same rules as runc's
/// (libcontainer/configs/validate, v1.5.2).
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

fn sysctls(spec: &Spec, linux: &Linux) -> Result<()> {
    let has = |kind| find(linux, kind).is_some();
    for name in linux.sysctl.keys() {
        let path = linux::sysctl::path(name)?;
        let parts: Vec<_> = path.iter().skip(1).map(|part| part.to_string_lossy()).collect();
        let dotted = parts.join(".");
        let needs = |kind, what: &str| match has(kind) {
            true => Ok(()),
            false => refuse(format!("sysctl {name:?} is not allowed in the hosts {what} namespace")),
        };
        if IPC_SYSCTLS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            needs(Kind::Ipc, "ipc")?;
        } else if parts[0] == "net" {
            needs(Kind::Net, "network")?;
        } else if dotted == "kernel.domainname" {
            needs(Kind::Uts, "uts")?;
        } else if dotted == "kernel.hostname" {
            needs(Kind::Uts, "uts")?;
            if !spec.hostname.is_empty() {
                return refuse("sysctl \"kernel.hostname\" conflicts with hostname");
            }
        } else if parts[0] == "user" {
            needs(Kind::User, "user")?;
        } else {
            return refuse(format!("sysctl {name:?} is not in a separate kernel namespace"));
        }
    }
    Ok(())
}
