//! CRI's resources as the OCI spec's, in both directions. Pure.
//!
//! Source: containerd v2.4.2, `internal/cri/opts/spec_linux_opts.go` (WithResources).

use protocols::cri::v1::{HugepageLimit as CriHugepageLimit, LinuxContainerResources};

use super::{HostFacts, SpecError};
use crate::oci::{Cpu, HugepageLimit, Memory, Resources};

/// Puts the request over what is there: a zero or empty field leaves what is there.
///
/// # Errors
/// [`SpecError::Resource`]: a limit that no controller of this host can enforce, or a number below zero.
pub fn merge(into: &mut Resources, request: &LinuxContainerResources, host: &HostFacts) -> Result<(), SpecError> {
    let cpu = into.cpu.get_or_insert_with(Cpu::default);
    merge_cpu(cpu, request)?;
    if *cpu == Cpu::default() {
        into.cpu = None;
    }
    if request.memory_limit_in_bytes != 0 || request.memory_swap_limit_in_bytes != 0 {
        let memory = into.memory.get_or_insert_with(Memory::default);
        if request.memory_limit_in_bytes != 0 {
            memory.limit = Some(request.memory_limit_in_bytes);
            // A container does not swap unless the request says so.
            if request.memory_swap_limit_in_bytes == 0 && host.swap_accounting {
                memory.swap = Some(request.memory_limit_in_bytes);
            }
        }
        if request.memory_swap_limit_in_bytes != 0 && host.swap_accounting {
            memory.swap = Some(request.memory_swap_limit_in_bytes);
        }
    }
    for limit in &request.hugepage_limits {
        merge_hugepages(into, limit, host)?;
    }
    if !request.unified.is_empty() && !host.cgroup_v2 {
        return Err(SpecError::Resource("unified: this host has no cgroup v2 controllers".to_owned()));
    }
    into.unified.extend(request.unified.iter().map(|(key, value)| (key.clone(), value.clone())));
    Ok(())
}

fn merge_cpu(cpu: &mut Cpu, request: &LinuxContainerResources) -> Result<(), SpecError> {
    let unsigned =
        |value: i64, field: &str| u64::try_from(value).map_err(|_| SpecError::Resource(format!("{field} {value} is below zero")));
    if request.cpu_period != 0 {
        cpu.period = Some(unsigned(request.cpu_period, "cpu_period")?);
    }
    if request.cpu_quota != 0 {
        cpu.quota = Some(request.cpu_quota);
    }
    if request.cpu_shares != 0 {
        cpu.shares = Some(unsigned(request.cpu_shares, "cpu_shares")?);
    }
    if !request.cpuset_cpus.is_empty() {
        cpu.cpus.clone_from(&request.cpuset_cpus);
    }
    if !request.cpuset_mems.is_empty() {
        cpu.mems.clone_from(&request.cpuset_mems);
    }
    Ok(())
}

fn merge_hugepages(into: &mut Resources, request: &CriHugepageLimit, host: &HostFacts) -> Result<(), SpecError> {
    if !host.hugetlb {
        if request.limit == 0 {
            return Ok(());
        }
        return Err(SpecError::Resource(format!("hugepage_limits {}: this host has no hugetlb controller", request.page_size)));
    }
    match into.hugepage_limits.iter_mut().find(|limit| limit.page_size == request.page_size) {
        Some(limit) => limit.limit = request.limit,
        None => into.hugepage_limits.push(HugepageLimit { page_size: request.page_size.clone(), limit: request.limit }),
    }
    Ok(())
}

/// What ContainerStatus says of the limits in force.
pub fn to_cri(resources: &Resources, oom_score_adj: Option<i64>) -> LinuxContainerResources {
    let cpu = resources.cpu.clone().unwrap_or_default();
    let memory = resources.memory.clone().unwrap_or_default();
    let signed = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok()).unwrap_or(0);
    LinuxContainerResources {
        cpu_period: signed(cpu.period),
        cpu_quota: cpu.quota.unwrap_or(0),
        cpu_shares: signed(cpu.shares),
        memory_limit_in_bytes: memory.limit.unwrap_or(0),
        memory_swap_limit_in_bytes: memory.swap.unwrap_or(0),
        oom_score_adj: oom_score_adj.unwrap_or(0),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|limit| CriHugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: resources.unified.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts { swap_accounting: true, ..HostFacts::default() }
    }

    #[test]
    fn a_second_request_changes_only_what_it_names() {
        let mut resources = Resources::default();
        let first = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            memory_limit_in_bytes: 64,
            hugepage_limits: vec![CriHugepageLimit { page_size: "2MB".into(), limit: 0 }],
            ..LinuxContainerResources::default()
        };
        merge(&mut resources, &first, &host()).expect("good");
        assert_eq!(resources.memory, Some(Memory { limit: Some(64), swap: Some(64) }));
        assert!(resources.hugepage_limits.is_empty());
        let second = LinuxContainerResources { cpu_shares: 51, ..LinuxContainerResources::default() };
        merge(&mut resources, &second, &host()).expect("good");
        let back = to_cri(&resources, Some(5));
        assert_eq!((back.cpu_period, back.cpu_quota, back.cpu_shares, back.memory_limit_in_bytes), (100_000, 20_000, 51, 64));
        assert_eq!(back.oom_score_adj, 5);
    }

    #[test]
    fn without_swap_accounting_there_is_no_swap_limit() {
        let mut resources = Resources::default();
        let request =
            LinuxContainerResources { memory_limit_in_bytes: 64, memory_swap_limit_in_bytes: 64, ..LinuxContainerResources::default() };
        merge(&mut resources, &request, &HostFacts::default()).expect("good");
        assert_eq!(resources.memory, Some(Memory { limit: Some(64), swap: None }));
    }

    #[test]
    fn what_the_host_cannot_enforce_is_refused() {
        for request in [
            LinuxContainerResources {
                hugepage_limits: vec![CriHugepageLimit { page_size: "2MB".into(), limit: 1 }],
                ..LinuxContainerResources::default()
            },
            LinuxContainerResources { unified: [("memory.high".to_owned(), "1".to_owned())].into(), ..LinuxContainerResources::default() },
            LinuxContainerResources { cpu_shares: -1, ..LinuxContainerResources::default() },
        ] {
            assert!(merge(&mut Resources::default(), &request, &host()).is_err(), "{request:?}");
        }
    }
}
