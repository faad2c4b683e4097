//! Limits, in the units of runtime-spec (`config-linux.md`, "Control groups"); `None` leaves what is.

use std::collections::BTreeMap;

/// All limits of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Memory.
    pub memory: Memory,
    /// Processors.
    pub cpu: Cpu,
    /// How many tasks; negative for no limit, 0 leaves what is.
    pub pids_limit: Option<i64>,
    /// Block devices.
    pub block_io: BlockIo,
    /// Huge pages: size (`2MB`) and bytes.
    pub hugepages: Vec<(String, u64)>,
    /// Network marks (v1).
    pub network: Network,
    /// RDMA, by device.
    pub rdma: Vec<Rdma>,
    /// Files of the v2 group and their values, written as they are.
    pub unified: BTreeMap<String, String>,
}

/// Memory limits in bytes; -1 is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// What is kept under pressure.
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
    /// Kernel memory of TCP buffers (v1).
    pub kernel_tcp: Option<i64>,
    /// 0 to 100 (v1).
    pub swappiness: Option<u64>,
    /// Tasks wait instead of being killed (v1).
    pub disable_oom_killer: Option<bool>,
    /// Refuse a limit below what is used now.
    pub check_before_update: bool,
}

/// Processor limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Relative weight, 2 to 262144.
    pub shares: Option<u64>,
    /// Microseconds a period; -1 is no limit.
    pub quota: Option<i64>,
    /// Microseconds that may be saved up.
    pub burst: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Real-time microseconds a period (v1).
    pub realtime_runtime: Option<i64>,
    /// Microseconds (v1).
    pub realtime_period: Option<u64>,
    /// List of processors (`0-3,7`).
    pub cpus: Option<String>,
    /// List of memory nodes.
    pub mems: Option<String>,
    /// 1: runs only when nobody else wants to.
    pub idle: Option<i64>,
}

/// A limit of one block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLimit {
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Weight, bytes a second or operations a second.
    pub value: u64,
}

/// Block device limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockIo {
    /// Relative weight, 10 to 1000.
    pub weight: Option<u16>,
    /// The same against child groups (v1).
    pub leaf_weight: Option<u16>,
    /// Weights by device.
    pub weight_devices: Vec<DeviceLimit>,
    /// Leaf weights by device (v1).
    pub leaf_weight_devices: Vec<DeviceLimit>,
    /// Bytes read a second.
    pub read_bps: Vec<DeviceLimit>,
    /// Bytes written a second.
    pub write_bps: Vec<DeviceLimit>,
    /// Reads a second.
    pub read_iops: Vec<DeviceLimit>,
    /// Writes a second.
    pub write_iops: Vec<DeviceLimit>,
}

/// Network marks (v1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// The class of packets.
    pub class_id: Option<u32>,
    /// Priorities by interface.
    pub priorities: Vec<(String, u32)>,
}

/// Limits of an RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rdma {
    /// The device.
    pub device: String,
    /// HCA handles.
    pub handles: Option<u32>,
    /// HCA objects.
    pub objects: Option<u32>,
}

impl Rdma {
    /// The line for `rdma.max`.
    pub(crate) fn line(&self) -> String {
        let mut line = self.device.clone();
        if let Some(handles) = self.handles {
            line += &format!(" hca_handle={handles}");
        }
        if let Some(objects) = self.objects {
            line += &format!(" hca_object={objects}");
        }
        line
    }
}
