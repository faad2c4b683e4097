//! Programs for the kernel: classic BPF instructions (seccomp) with an interpreter for tests, and the eBPF calls of
//! the cgroup v2 device controller. Source: bpf(2), linux/filter.h, linux/bpf.h.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::sys::{check, own};
use crate::{Error, Result};

/// A classic BPF instruction, laid out as `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// How many instructions to skip when a jump's condition holds.
    pub jump_true: u8,
    /// How many to skip when it does not.
    pub jump_false: u8,
    /// The operand.
    pub operand: u32,
}

/// Load the 32-bit word at the operand's offset.
pub const LOAD: u16 = 0x20;
/// Jump always, by the operand.
pub const JUMP: u16 = 0x05;
/// Jump if the accumulator equals the operand.
pub const JUMP_EQUAL: u16 = 0x15;
/// Jump if it is greater (unsigned).
pub const JUMP_GREATER: u16 = 0x25;
/// Jump if it is greater or equal (unsigned).
pub const JUMP_GREATER_EQUAL: u16 = 0x35;
/// Jump if it has a bit in common with the operand.
pub const JUMP_SET: u16 = 0x45;
/// Accumulator &= operand.
pub const AND: u16 = 0x54;
/// Return the operand.
pub const RETURN: u16 = 0x06;

impl Instruction {
    /// An instruction without jumps.
    pub const fn statement(code: u16, operand: u32) -> Self {
        Self { code, jump_true: 0, jump_false: 0, operand }
    }

    /// A conditional jump.
    pub const fn jump(code: u16, operand: u32, jump_true: u8, jump_false: u8) -> Self {
        Self { code, jump_true, jump_false, operand }
    }
}

/// Runs a classic program, of the instructions that seccomp filters are made of, over `data` (native words). `None`
/// for a program that is malformed: leaves its end, reads outside of the data, has an unknown instruction.
pub fn interpret(program: &[Instruction], data: &[u32]) -> Option<u32> {
    let mut accumulator = 0u32;
    let mut at = 0usize;
    loop {
        let instruction = program.get(at)?;
        at += 1;
        let operand = instruction.operand;
        let condition = match instruction.code {
            LOAD => {
                accumulator = *data.get(usize::try_from(operand).ok()? / 4)?;
                continue;
            }
            AND => {
                accumulator &= operand;
                continue;
            }
            JUMP => {
                at += usize::try_from(operand).ok()?;
                continue;
            }
            RETURN => return Some(operand),
            JUMP_EQUAL => accumulator == operand,
            JUMP_GREATER => accumulator > operand,
            JUMP_GREATER_EQUAL => accumulator >= operand,
            JUMP_SET => accumulator & operand != 0,
            _ => return None,
        };
        at += usize::from(if condition { instruction.jump_true } else { instruction.jump_false });
    }
}

/// An eBPF instruction, laid out as `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    /// What to do.
    pub code: u8,
    /// Destination register in the low four bits, source in the high.
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// The operand.
    pub immediate: i32,
}

/// The program type and attach type of the cgroup device controller.
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_DETACH: i32 = 9;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_PROG_QUERY: i32 = 16;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    padding: u32,
}

fn bpf<T>(command: i32, attributes: &mut T) -> std::io::Result<libc::c_long> {
    // SAFETY: each attribute struct is a prefix of the kernel's `union bpf_attr` for its command, given with its true
    // size; the pointers within outlive the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) })
}

/// Loads a device program.
///
/// # Errors
/// The kernel's answer.
pub fn load_device_program(program: &[Extended]) -> Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..LoadAttributes::default()
    };
    bpf(BPF_PROG_LOAD, &mut attributes)
        .map(own)
        .map_err(|e| Error::new("load device program", format!("{} instructions", program.len()), e))
}

/// Makes `program` the only device program of the cgroup v2 directory `cgroup`: attaches it, then detaches those that
/// were there, so that there is no moment without one.
///
/// # Errors
/// The kernel's answer.
pub fn replace_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<()> {
    let before = attached_device_programs(cgroup)?;
    let mut attributes = AttachAttributes {
        target_fd: cgroup.as_raw_fd() as u32,
        program_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
        replace_fd: 0,
    };
    bpf(BPF_PROG_ATTACH, &mut attributes).map_err(|e| Error::new("attach device program", "", e))?;
    for old in before {
        let mut attributes = AttachAttributes {
            target_fd: cgroup.as_raw_fd() as u32,
            program_fd: old.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            ..AttachAttributes::default()
        };
        bpf(BPF_PROG_DETACH, &mut attributes).map_err(|e| Error::new("detach device program", "", e))?;
    }
    Ok(())
}

fn attached_device_programs(cgroup: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
    let mut ids = [0u32; 64];
    let mut attributes = QueryAttributes {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        program_ids: ids.as_mut_ptr() as u64,
        program_count: ids.len() as u32,
        ..QueryAttributes::default()
    };
    bpf(BPF_PROG_QUERY, &mut attributes).map_err(|e| Error::new("query device programs", "", e))?;
    ids.iter()
        .take(attributes.program_count as usize)
        .map(|id| {
            #[repr(C)]
            struct ById {
                id: u32,
                next: u32,
                flags: u32,
            }
            bpf(BPF_PROG_GET_FD_BY_ID, &mut ById { id: *id, next: 0, flags: 0 })
                .map(own)
                .map_err(|e| Error::new("open device program", id.to_string(), e))
        })
        .collect()
}
