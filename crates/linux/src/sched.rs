//! Scheduling and I/O priority of this process. Source: sched_setattr(2), ioprio_set(2).

use crate::sys::check;
use crate::{Error, Result};

/// `struct sched_attr` of sched_setattr(2), 56 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RawAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// A scheduling policy and its parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `SCHED_*`: 0 other, 1 fifo, 2 rr, 3 batch, 5 idle, 6 deadline.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For other and batch.
    pub nice: i32,
    /// For fifo and rr.
    pub priority: u32,
    /// For deadline, in nanoseconds.
    pub runtime_ns: u64,
    /// For deadline, in nanoseconds.
    pub deadline_ns: u64,
    /// For deadline, in nanoseconds.
    pub period_ns: u64,
}

/// Sets this process' scheduling.
///
/// # Errors
/// The kernel's answer.
pub fn set(attributes: &Attributes) -> Result<()> {
    let raw = RawAttributes {
        size: size_of::<RawAttributes>() as u32,
        policy: attributes.policy,
        flags: attributes.flags,
        nice: attributes.nice,
        priority: attributes.priority,
        runtime: attributes.runtime_ns,
        deadline: attributes.deadline_ns,
        period: attributes.period_ns,
        util_min: 0,
        util_max: 0,
    };
    // SAFETY: the struct carries its true size and outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const raw, 0) };
    check(ret).map_err(|e| Error::new("sched_setattr", format!("{attributes:?}"), e))?;
    Ok(())
}

/// Sets this process' I/O priority: class 1 real time, 2 best effort, 3 idle; level 0 (highest) to 7.
///
/// # Errors
/// The kernel's answer.
pub fn set_io_priority(class: u32, level: u32) -> Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, class << 13 | level) };
    check(ret).map_err(|e| Error::new("ioprio_set", format!("class {class} level {level}"), e))?;
    Ok(())
}
