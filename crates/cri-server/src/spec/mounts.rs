//! The mounts of a container: the defaults, the pod's files, and CRI's. Pure.
//!
//! Source: containerd v2.4.2, `pkg/oci/mounts.go`, `internal/cri/opts/spec_linux_opts.go` (withMounts).

use std::collections::BTreeSet;

use protocols::cri::v1::{Mount as CriMount, MountPropagation};

use super::{ContainerFacts, PodFiles, SpecError};
use crate::oci::Mount;

/// How the mount that a source lies on propagates, on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcePropagation {
    /// Neither in nor out.
    #[default]
    Private,
    /// In both directions.
    Shared,
    /// From its master only.
    Slave,
}

/// What was found on the host for a mount of the request, in the request's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountSource {
    /// The path with symbolic links resolved.
    pub path: String,
    /// How its mount propagates.
    pub propagation: SourcePropagation,
}

/// All mounts of the container, in order, and the root's propagation (empty: private).
///
/// # Errors
/// [`SpecError::Mount`] for a request that contradicts itself or the host, [`SpecError::Unimplemented`] for images as volumes.
pub fn resolve(facts: &ContainerFacts<'_>, privileged: bool) -> Result<(Vec<Mount>, String), SpecError> {
    let requested = requested(facts)?;
    let taken: BTreeSet<&str> = requested.iter().map(|(mount, _)| mount.destination.as_str()).collect();
    let covered = |destination: &str| taken.contains(destination) || taken.contains("/dev") && destination.starts_with("/dev/");
    let readonly = facts.security().readonly_rootfs;
    let mut mounts: Vec<Mount> = defaults(privileged).into_iter().filter(|mount| !covered(&mount.destination)).collect();
    mounts.extend(pod_files(facts.files, readonly).into_iter().filter(|mount| !covered(&mount.destination)));
    let mut propagation = "";
    for (_, mode) in &requested {
        propagation = match (mode, propagation) {
            (MountPropagation::PropagationBidirectional, _) => "rshared",
            (MountPropagation::PropagationHostToContainer, "") => "rslave",
            (_, before) => before,
        };
    }
    mounts.extend(requested.into_iter().map(|(mount, _)| mount));
    // A mount must not hide one that lies deeper; the sort is stable, so that equals keep their order.
    mounts.sort_by_key(|mount| mount.destination.trim_end_matches('/').matches('/').count());
    Ok((mounts, propagation.to_owned()))
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.to_owned(),
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn defaults(privileged: bool) -> Vec<Mount> {
    let access = if privileged { "rw" } else { "ro" };
    let cgroup: &[&str] = &["nosuid", "noexec", "nodev", "relatime", access];
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", cgroup),
    ]
}

fn pod_files(files: &PodFiles, readonly: bool) -> Vec<Mount> {
    let access = if readonly { "ro" } else { "rw" };
    let bind = |destination: &str, source: &str, access| mount(destination, "bind", source, &["rbind", "rprivate", access]);
    vec![
        bind("/etc/hostname", &files.hostname, access),
        bind("/etc/hosts", &files.hosts, access),
        bind("/etc/resolv.conf", &files.resolv_conf, access),
        bind("/dev/shm", &files.shm, "rw"),
    ]
}

fn requested(facts: &ContainerFacts<'_>) -> Result<Vec<(Mount, MountPropagation)>, SpecError> {
    facts
        .config
        .mounts
        .iter()
        .zip(facts.sources)
        .map(|(request, source)| {
            let mode = MountPropagation::try_from(request.propagation)
                .map_err(|_| refuse(request, format!("propagation {} is not known", request.propagation)))?;
            Ok((one(request, source, mode, facts.host.recursive_read_only)?, mode))
        })
        .collect()
}

fn refuse(request: &CriMount, reason: impl Into<String>) -> SpecError {
    SpecError::Mount { container_path: request.container_path.clone(), reason: reason.into() }
}

fn one(request: &CriMount, source: &MountSource, mode: MountPropagation, rro: bool) -> Result<Mount, SpecError> {
    if request.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        return Err(SpecError::Unimplemented("images as volumes"));
    }
    if !request.uid_mappings.is_empty() || !request.gid_mappings.is_empty() {
        return Err(SpecError::Unimplemented("mounts with id mappings"));
    }
    let destination = clean(&request.container_path);
    if !request.container_path.starts_with('/') || destination == "/" {
        return Err(refuse(request, "not an absolute path below the root"));
    }
    let mut options = vec!["rbind".to_owned()];
    options.push(
        match (mode, source.propagation) {
            (MountPropagation::PropagationPrivate, _) => "rprivate",
            (MountPropagation::PropagationBidirectional, SourcePropagation::Shared) => "rshared",
            (MountPropagation::PropagationBidirectional, _) => {
                return Err(refuse(request, format!("{} does not lie on a shared mount", source.path)));
            }
            (MountPropagation::PropagationHostToContainer, SourcePropagation::Private) => {
                return Err(refuse(request, format!("{} lies neither on a shared nor on a slave mount", source.path)));
            }
            (MountPropagation::PropagationHostToContainer, _) => "rslave",
        }
        .to_owned(),
    );
    let access = match (request.readonly, request.recursive_read_only) {
        (false, true) => return Err(refuse(request, "recursive_read_only contradicts a mount that is not readonly")),
        (true, true) if !rro => return Err(refuse(request, "this host cannot make a mount read-only with all below it")),
        (true, true) if mode != MountPropagation::PropagationPrivate => {
            return Err(refuse(request, "recursive_read_only needs private propagation"));
        }
        (true, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    };
    options.push(access.to_owned());
    options.extend(request.mount_options.iter().cloned());
    Ok(Mount { destination, kind: "bind".to_owned(), source: source.path.clone(), options })
}

/// The path without `.`, `..`, doubled and trailing slashes, by words alone.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
