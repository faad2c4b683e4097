//! The configuration's limits, as the kernel crate takes them.

use linux::cgroup::devices::{Access, Kind, Rules};
use linux::cgroup::{BlockIo, Cpu, DeviceLimit, Memory, Network, Rdma, Resources};

use crate::error::{Result, refuse};
use crate::spec;

/// Limits of a configuration. Device rules are apart: [`device_rules`].
///
/// # Errors
/// When a value is outside of its range.
pub fn resources(from: &spec::Resources) -> Result<Resources> {
    let mut to = Resources {
        pids_limit: from.pids.as_ref().and_then(|pids| pids.limit),
        hugepages: from.hugepage_limits.iter().map(|limit| (limit.page_size.clone(), limit.limit)).collect(),
        unified: from.unified.clone(),
        ..Resources::default()
    };
    if let Some(memory) = &from.memory {
        to.memory = self::memory(memory)?;
    }
    if let Some(cpu) = &from.cpu {
        to.cpu = Cpu {
            shares: cpu.shares,
            quota: cpu.quota,
            burst: cpu.burst,
            period: cpu.period,
            realtime_runtime: cpu.realtime_runtime,
            realtime_period: cpu.realtime_period,
            cpus: cpu.cpus.clone(),
            mems: cpu.mems.clone(),
            idle: cpu.idle,
        };
    }
    if let Some(io) = &from.block_io {
        to.block_io = block_io(io);
    }
    if let Some(network) = &from.network {
        let priorities = network.priorities.iter().map(|p| (p.name.clone(), p.priority)).collect();
        to.network = Network { class_id: network.class_id, priorities };
    }
    to.rdma = from
        .rdma
        .iter()
        .map(|(device, limit)| Rdma { device: device.clone(), handles: limit.hca_handles, objects: limit.hca_objects })
        .collect();
    Ok(to)
}

fn memory(from: &spec::Memory) -> Result<Memory> {
    for (name, value) in [("limit", from.limit), ("reservation", from.reservation), ("swap", from.swap)] {
        if value.is_some_and(|v| v < -1) {
            return refuse(format!("linux.resources.memory.{name} is lower than -1"));
        }
    }
    if from.swappiness.is_some_and(|v| v > 100 && v != u64::MAX) {
        return refuse("linux.resources.memory.swappiness is higher than 100");
    }
    // `kernel` is obsolete in the specification, and without effect in Linux 5.16 and later: as runc does, it is passed over.
    Ok(Memory {
        limit: from.limit,
        reservation: from.reservation,
        swap: from.swap,
        kernel_tcp: from.kernel_tcp,
        swappiness: from.swappiness,
        disable_oom_killer: from.disable_oom_killer,
        check_before_update: from.check_before_update.unwrap_or(false),
    })
}

fn block_io(from: &spec::BlockIo) -> BlockIo {
    let rates = |list: &[spec::ThrottleDevice]| {
        list.iter().map(|d| DeviceLimit { major: d.major, minor: d.minor, value: d.rate }).collect::<Vec<_>>()
    };
    let weights = |pick: fn(&spec::WeightDevice) -> Option<u16>| {
        let limit = |d: &spec::WeightDevice| Some(DeviceLimit { major: d.major, minor: d.minor, value: pick(d)?.into() });
        from.weight_device.iter().filter_map(limit).collect::<Vec<_>>()
    };
    BlockIo {
        weight: from.weight,
        leaf_weight: from.leaf_weight,
        weight_devices: weights(|d| d.weight),
        leaf_weight_devices: weights(|d| d.leaf_weight),
        read_bps: rates(&from.throttle_read_bps_device),
        write_bps: rates(&from.throttle_write_bps_device),
        read_iops: rates(&from.throttle_read_iops_device),
        write_iops: rates(&from.throttle_write_iops_device),
    }
}

/// What every container may use, whatever the configuration says: making nodes of any kind, the nodes that are made in
/// every container, and terminals. The same list as runc's (libcontainer/specconv, v1.5.2).
const ALWAYS: [(Kind, Option<u32>, Option<u32>, &str); 11] = [
    (Kind::Char, None, None, "m"),
    (Kind::Block, None, None, "m"),
    (Kind::Char, Some(1), Some(3), "rwm"),
    (Kind::Char, Some(1), Some(5), "rwm"),
    (Kind::Char, Some(1), Some(7), "rwm"),
    (Kind::Char, Some(1), Some(8), "rwm"),
    (Kind::Char, Some(1), Some(9), "rwm"),
    (Kind::Char, Some(5), Some(0), "rwm"),
    (Kind::Char, Some(136), None, "rwm"),
    (Kind::Char, Some(5), Some(2), "rwm"),
    (Kind::Char, Some(5), Some(1), "rwm"),
];

/// The device rules of a configuration: denied by default, then its rules in order, then what every container may.
///
/// # Errors
/// When a rule is malformed, or cannot be expressed.
pub fn device_rules(from: &[spec::DeviceRule]) -> Result<Rules> {
    let mut rules = Rules::default();
    for rule in from {
        let kind = match rule.kind.as_str() {
            "" | "a" => Kind::All,
            "b" => Kind::Block,
            "c" | "u" => Kind::Char,
            other => return refuse(format!("linux.resources.devices: unknown type {other:?}")),
        };
        let Some(access) = Access::parse(&rule.access) else {
            return refuse(format!("linux.resources.devices: unknown access {:?}", rule.access));
        };
        let access = if rule.access.is_empty() { Access::ALL } else { access };
        rules.add(rule.allow, (kind, number(rule.major)?, number(rule.minor)?), access)?;
    }
    if !rules.allows_all() {
        for (kind, major, minor, access) in ALWAYS {
            // A literal of the table above.
            let access = Access::parse(access).unwrap_or(Access::ALL);
            rules.add(true, (kind, major, minor), access)?;
        }
    }
    Ok(rules)
}

/// A device number; -1 and absent are any.
fn number(value: Option<i64>) -> Result<Option<u32>> {
    match value {
        None | Some(-1) => Ok(None),
        Some(value) => match u32::try_from(value) {
            Ok(number) => Ok(Some(number)),
            Err(_) => refuse(format!("linux.resources.devices: {value} is no device number")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        let deny = spec::DeviceRule { access: "rwm".into(), ..Default::default() };
        let lines = device_rules(std::slice::from_ref(&deny)).expect("rules").v1_lines();
        assert_eq!(lines[0], ("devices.deny", "a".to_owned()));
        assert_eq!(lines.len(), 12);
        let all = spec::DeviceRule { allow: true, access: "rwm".into(), ..Default::default() };
        assert!(device_rules(&[deny.clone(), all]).expect("rules").allows_all());
        let bad = spec::DeviceRule { access: "x".into(), ..deny };
        assert!(device_rules(&[bad]).is_err());
    }

    #[test]
    fn impossible_values() {
        let memory = spec::Memory { limit: Some(-2), ..Default::default() };
        assert!(resources(&spec::Resources { memory: Some(memory), ..Default::default() }).is_err());
    }
}
