//! A profile to a program: for each architecture, the line of system call numbers is cut into ranges with the same
//! fate, and these are found by a binary tree of comparisons (some eight for the usual profile of 300 calls, where a list
//! takes hundreds).
//!
//! The fate of a call is what libseccomp would have made of the same profile as runc hands it over (v1.5.2,
//! libcontainer/seccomp): rules whose action is the default one are dropped, names that nobody knows too, a rule without
//! conditions beats those with conditions, and calls newer than any that the profile names get ENOSYS instead of the
//! default, so that programs fall back to older ones. Where several rules with conditions and different actions hold, the
//! first in the profile counts.

use std::collections::BTreeMap;

use linux::bpf::{self, Instruction};

use super::arch::{self, Arch, Table, Word, X32_BIT};
use crate::error::{Result, refuse};
use crate::spec::{Seccomp, SyscallArgument};

/// What becomes of a call: `SECCOMP_RET_*`.
pub type Action = u32;

/// The calling thread is killed; also the fate of calls of an architecture that the profile does not list.
pub const KILL_THREAD: Action = 0;
/// The process is killed.
pub const KILL_PROCESS: Action = 0x8000_0000;
/// The process gets SIGSYS.
pub const TRAP: Action = 0x0003_0000;
/// The call fails with the errno in the low half.
pub const ERRNO: Action = 0x0005_0000;
/// A listener decides.
pub const NOTIFY: Action = 0x7fc0_0000;
/// A tracer decides.
pub const TRACE: Action = 0x7ff0_0000;
/// The call is done, and logged.
pub const LOG: Action = 0x7ffc_0000;
/// The call is done.
pub const ALLOW: Action = 0x7fff_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The specification's words for actions.
pub const ACTIONS: [(&str, Action); 9] = [
    ("SCMP_ACT_KILL", KILL_THREAD),
    ("SCMP_ACT_KILL_PROCESS", KILL_PROCESS),
    ("SCMP_ACT_KILL_THREAD", KILL_THREAD),
    ("SCMP_ACT_TRAP", TRAP),
    ("SCMP_ACT_ERRNO", ERRNO),
    ("SCMP_ACT_TRACE", TRACE),
    ("SCMP_ACT_ALLOW", ALLOW),
    ("SCMP_ACT_LOG", LOG),
    ("SCMP_ACT_NOTIFY", NOTIFY),
];

/// The specification's words for comparisons.
pub const OPERATORS: [&str; 7] =
    ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    /// Of what this mask leaves.
    MaskedEqual(u64),
}

/// A condition on an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    index: u32,
    comparison: Comparison,
    value: u64,
}

/// Conditions that must all hold, and what then becomes of the call.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    action: Action,
}

/// What becomes of a range of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// This, always.
    Always(Action),
    /// What the first rule says whose conditions hold, else the default.
    Rules { rules: Vec<Rule>, wide: bool, default: Action },
}

/// A profile with its words read.
pub struct Profile {
    default: Action,
    architectures: Vec<Arch>,
    /// By architecture and number.
    calls: BTreeMap<(Arch, u32), Vec<Rule>>,
    /// The highest number that the profile names, by architecture.
    last: BTreeMap<Arch, u32>,
    /// Whether a rule asks a listener.
    pub notifies: bool,
    /// Flags for the kernel (`linux::seccomp::flags`).
    pub flags: u64,
}

/// Reads an action and its errno.
fn action(word: &str, errno: Option<u32>) -> Result<Action> {
    let Some((_, action)) = ACTIONS.iter().find(|(known, _)| *known == word) else {
        return refuse(format!("seccomp: unknown action {word:?}"));
    };
    match (*action, errno) {
        (ERRNO | TRACE, errno) => Ok(action | errno.unwrap_or(EPERM) & 0xffff),
        (_, None) => Ok(*action),
        (_, Some(_)) => refuse(format!("seccomp: action {word} takes no errnoRet")),
    }
}

fn condition(from: &SyscallArgument) -> Result<Condition> {
    if from.index > 5 {
        return refuse(format!("seccomp: there is no argument {}", from.index));
    }
    let comparison = match from.op.as_str() {
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::LessOrEqual,
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual,
        "SCMP_CMP_GT" => Comparison::Greater,
        "SCMP_CMP_MASKED_EQ" => {
            let (mask, value) = (from.value, from.value_two);
            return Ok(Condition { index: from.index, comparison: Comparison::MaskedEqual(mask), value: value & mask });
        }
        other => return refuse(format!("seccomp: unknown operator {other:?}")),
    };
    Ok(Condition { index: from.index, comparison, value: from.value })
}

/// The conditions of a rule: all together, or one by one when two are about the same argument.
fn alternatives(args: &[SyscallArgument]) -> Result<Vec<Vec<Condition>>> {
    let mut conditions = args.iter().map(condition).collect::<Result<Vec<_>>>()?;
    let repeated = conditions.iter().enumerate().any(|(at, c)| conditions[..at].iter().any(|other| other.index == c.index));
    if repeated {
        return Ok(conditions.into_iter().map(|condition| vec![condition]).collect());
    }
    conditions.sort_by_key(|condition| condition.index);
    Ok(vec![conditions])
}

fn flags(words: &[String]) -> Result<u64> {
    use linux::seccomp::flags::{LOG, SPEC_ALLOW, WAIT_KILLABLE_RECV};
    let mut bits = 0;
    for word in words {
        bits |= match word.as_str() {
            // There is one thread.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => SPEC_ALLOW,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => WAIT_KILLABLE_RECV,
            other => return refuse(format!("seccomp: unknown flag {other:?}")),
        };
    }
    Ok(bits)
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// When a word is unknown (other than a system call's name), or a listener is asked for what it cannot be.
    pub fn read(from: &Seccomp) -> Result<Self> {
        let mut architectures = vec![Arch::native()];
        for word in &from.architectures {
            match Arch::parse(word) {
                Some(Word::Known(arch)) => architectures.push(arch),
                Some(Word::Foreign) => {}
                None => return refuse(format!("seccomp: unknown architecture {word:?}")),
            }
        }
        architectures.sort_unstable();
        architectures.dedup();
        let default = action(&from.default_action, from.default_errno_ret)?;
        let mut profile =
            Self { default, architectures, calls: BTreeMap::new(), last: BTreeMap::new(), notifies: false, flags: flags(&from.flags)? };
        if default == NOTIFY {
            return refuse("SCMP_ACT_NOTIFY cannot be used as default action");
        }
        let table = Table::new();
        for rule in &from.syscalls {
            let action = action(&rule.action, rule.errno_ret)?;
            let alternatives = alternatives(&rule.args)?;
            if rule.names.is_empty() {
                return refuse("seccomp: a rule must name at least one system call");
            }
            for name in &rule.names {
                profile.add(&table, name, action, &alternatives)?;
            }
        }
        if profile.flags & linux::seccomp::flags::WAIT_KILLABLE_RECV != 0 && !profile.notifies {
            return refuse("seccomp: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is without meaning without SCMP_ACT_NOTIFY");
        }
        Ok(profile)
    }

    fn add(&mut self, table: &Table, name: &str, action: Action, alternatives: &[Vec<Condition>]) -> Result<()> {
        if action == NOTIFY {
            if matches!(name, "write" | "sendmsg" | "recvmsg") {
                return refuse(format!("SCMP_ACT_NOTIFY cannot be used for the {name} syscall"));
            }
            self.notifies = true;
        }
        // One that no kernel has yet cannot be called either.
        let Some(numbers) = table.find(name) else { return Ok(()) };
        for (arch, number) in Arch::ALL.into_iter().zip(numbers) {
            if !self.architectures.contains(&arch) {
                continue;
            }
            let multiplexed = if arch == Arch::X86 { arch::multiplexed(name) } else { None };
            if let Some(number) = number.filter(|_| multiplexed.is_none()) {
                let last = self.last.entry(arch).or_default();
                *last = number.max(*last);
            }
            if action == self.default {
                continue;
            }
            for conditions in alternatives {
                if let Some((multiplexer, call)) = multiplexed {
                    // Its own arguments are behind a pointer: the first is the call's number.
                    let first = Condition { index: 0, comparison: Comparison::Equal, value: call };
                    let rest = conditions.iter().filter(|condition| condition.index != 0);
                    let conditions = std::iter::once(first).chain(rest.copied()).collect();
                    self.calls.entry((arch, multiplexer)).or_default().push(Rule { conditions, action });
                }
                if let Some(number) = number {
                    self.calls.entry((arch, number)).or_default().push(Rule { conditions: conditions.clone(), action });
                }
            }
        }
        Ok(())
    }

    /// The program. With `fallback`, calls newer than the profile get ENOSYS.
    ///
    /// # Errors
    /// When it is longer than the kernel takes.
    pub fn program(&self, fallback: bool) -> Result<Vec<Instruction>> {
        const ARCH_OFFSET: u32 = 4;
        const NUMBER_OFFSET: u32 = 0;
        let mut sections: Vec<(u32, Vec<Instruction>)> = Vec::new();
        for arch in &self.architectures {
            if sections.iter().any(|(audit, _)| *audit == arch.audit()) {
                continue;
            }
            let mut section = vec![Instruction::statement(bpf::LOAD, NUMBER_OFFSET)];
            section.extend(search(&self.ranges(*arch, fallback)));
            sections.push((arch.audit(), section));
        }
        let mut program = vec![Instruction::statement(bpf::LOAD, ARCH_OFFSET)];
        for (audit, section) in sections {
            program.push(Instruction::jump(bpf::JUMP_EQUAL, audit, 1, 0));
            program.push(Instruction::statement(bpf::JUMP, section.len() as u32));
            program.extend(section);
        }
        program.push(Instruction::statement(bpf::RETURN, KILL_THREAD));
        if program.len() > linux::seccomp::INSTRUCTIONS_MAX {
            return refuse(format!(
                "seccomp: the profile takes {} instructions, the kernel takes {}",
                program.len(),
                linux::seccomp::INSTRUCTIONS_MAX
            ));
        }
        Ok(program)
    }

    /// The architectures that share an audit architecture.
    fn family(&self, arch: Arch) -> impl Iterator<Item = Arch> + '_ {
        self.architectures.iter().copied().filter(move |other| other.audit() == arch.audit())
    }

    /// The line of numbers, cut where the fate changes: the first number of each range, and its fate.
    fn ranges(&self, arch: Arch, fallback: bool) -> Vec<(u32, Fate)> {
        let mut cuts = vec![0, X32_BIT, u32::MAX];
        for member in self.family(arch) {
            cuts.extend(self.last.get(&member).and_then(|last| last.checked_add(1)));
            for (_, number) in self.calls.keys().filter(|(other, _)| *other == member) {
                cuts.extend([*number, number.saturating_add(1)]);
            }
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut ranges: Vec<(u32, Fate)> = Vec::new();
        for cut in cuts {
            let fate = self.fate(arch, cut, fallback);
            if ranges.last().is_none_or(|(_, last)| *last != fate) {
                ranges.push((cut, fate));
            }
        }
        ranges
    }

    fn fate(&self, arch: Arch, number: u32, fallback: bool) -> Fate {
        let x86 = arch.audit() == Arch::X86_64.audit();
        if fallback && self.is_newer(arch, number) {
            return Fate::Always(ERRNO | ENOSYS);
        }
        let member = match x86 {
            // A tracer that skips a call leaves -1 behind, which is of no architecture.
            true if number & X32_BIT != 0 && number != u32::MAX => Arch::X32,
            true => Arch::X86_64,
            false => arch,
        };
        if !self.architectures.contains(&member) {
            return Fate::Always(KILL_THREAD);
        }
        let Some(rules) = self.calls.get(&(member, number)) else { return Fate::Always(self.default) };
        if let Some(rule) = rules.iter().find(|rule| rule.conditions.is_empty()) {
            return Fate::Always(rule.action);
        }
        Fate::Rules { rules: rules.clone(), wide: !member.is_32_bit(), default: self.default }
    }

    /// Whether the number is above all that the profile names, so that the default would hit a call which its author did
    /// not know; never where the default lets calls pass.
    fn is_newer(&self, arch: Arch, number: u32) -> bool {
        if matches!(self.default & 0xffff_0000, ALLOW | LOG | TRACE) {
            return false;
        }
        let x32 = number & X32_BIT != 0;
        let lasts: Vec<(Arch, u32)> = self.family(arch).filter_map(|member| Some((member, *self.last.get(&member)?))).collect();
        match lasts.as_slice() {
            [] => false,
            [(_, last)] => number > *last,
            several => several.iter().any(|(member, last)| (*member == Arch::X32) == x32 && number > *last),
        }
    }
}

/// Stands for a jump to the block of conditions whose index is the operand, until the blocks have their places.
const TO_BLOCK: u16 = u16::MAX;

/// The code that finds a number's range and does what its fate is. Every path ends by returning. Conditions that several
/// ranges share are there once, behind the tree.
fn search(ranges: &[(u32, Fate)]) -> Vec<Instruction> {
    let mut blocks: Vec<&Fate> = Vec::new();
    for (_, fate) in ranges {
        if matches!(fate, Fate::Rules { .. }) && !blocks.contains(&fate) {
            blocks.push(fate);
        }
    }
    let mut code = tree(ranges, &blocks);
    let mut starts = Vec::with_capacity(blocks.len());
    let mut behind = Vec::new();
    for block in &blocks {
        starts.push(code.len() + behind.len());
        behind.extend(block_code(block));
    }
    for (at, instruction) in code.iter_mut().enumerate().filter(|(_, i)| i.code == TO_BLOCK) {
        let distance = starts[instruction.operand as usize] - (at + 1);
        *instruction = Instruction::statement(bpf::JUMP, distance as u32);
    }
    code.extend(behind);
    code
}

fn tree(ranges: &[(u32, Fate)], blocks: &[&Fate]) -> Vec<Instruction> {
    if let [(_, fate)] = ranges {
        return vec![match (fate, blocks.iter().position(|block| *block == fate)) {
            (Fate::Always(action), _) => Instruction::statement(bpf::RETURN, *action),
            // Every fate with rules is among the blocks.
            (Fate::Rules { .. }, block) => Instruction::statement(TO_BLOCK, block.unwrap_or_default() as u32),
        }];
    }
    let middle = ranges.len() / 2;
    let (left, right) = (tree(&ranges[..middle], blocks), tree(&ranges[middle..], blocks));
    let mut code = match u8::try_from(left.len()) {
        Ok(skip) => vec![Instruction::jump(bpf::JUMP_GREATER_EQUAL, ranges[middle].0, skip, 0)],
        // A conditional jump reaches no further than 255.
        Err(_) => {
            vec![Instruction::jump(bpf::JUMP_GREATER_EQUAL, ranges[middle].0, 0, 1), Instruction::statement(bpf::JUMP, left.len() as u32)]
        }
    };
    code.extend(left);
    code.extend(right);
    code
}

fn block_code(fate: &Fate) -> Vec<Instruction> {
    match fate {
        Fate::Always(action) => vec![Instruction::statement(bpf::RETURN, *action)],
        Fate::Rules { rules, wide, default } => {
            let mut code = Vec::new();
            for rule in rules {
                code.extend(rule_code(rule, *wide));
            }
            code.push(Instruction::statement(bpf::RETURN, *default));
            code
        }
    }
}

/// Where a jump within a condition leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    /// To the next instruction.
    Next,
    /// Past this condition, which holds.
    Holds,
    /// Past the whole rule.
    Fails,
}

/// An instruction whose jumps are not laid out yet.
struct Step {
    code: u16,
    operand: u32,
    on_true: Target,
    on_false: Target,
}

fn step(code: u16, operand: u32, on_true: Target, on_false: Target) -> Step {
    Step { code, operand, on_true, on_false }
}

fn plain(code: u16, operand: u32) -> Step {
    step(code, operand, Target::Next, Target::Next)
}

/// The code of one rule: falls out of its end when it does not apply. At most six conditions of six steps: all jumps are
/// short.
fn rule_code(rule: &Rule, wide: bool) -> Vec<Instruction> {
    let conditions: Vec<Vec<Step>> = rule.conditions.iter().map(|c| condition_steps(c, wide)).collect();
    let total: usize = conditions.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(total);
    for steps in &conditions {
        let end = code.len() + steps.len();
        for step in steps {
            let here = code.len() + 1;
            let distance = |target: Target| match target {
                Target::Next => 0,
                Target::Holds => (end - here) as u8,
                Target::Fails => (total - here) as u8,
            };
            code.push(Instruction::jump(step.code, step.operand, distance(step.on_true), distance(step.on_false)));
        }
    }
    code.push(Instruction::statement(bpf::RETURN, rule.action));
    code
}

fn condition_steps(condition: &Condition, wide: bool) -> Vec<Step> {
    use Target::{Fails, Holds, Next};
    let low_offset = 16 + 8 * condition.index;
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    let mut steps = Vec::new();
    let mask = match condition.comparison {
        Comparison::MaskedEqual(mask) => mask,
        _ => u64::MAX,
    };
    let (mask_low, mask_high) = (mask as u32, (mask >> 32) as u32);
    if wide && !(mask_high == 0 && high == 0) {
        steps.push(plain(bpf::LOAD, low_offset + 4));
        match condition.comparison {
            Comparison::Equal => steps.push(step(bpf::JUMP_EQUAL, high, Next, Fails)),
            Comparison::NotEqual => steps.push(step(bpf::JUMP_EQUAL, high, Next, Holds)),
            Comparison::Greater | Comparison::GreaterOrEqual => {
                steps.push(step(bpf::JUMP_GREATER, high, Holds, Next));
                steps.push(step(bpf::JUMP_EQUAL, high, Next, Fails));
            }
            Comparison::Less | Comparison::LessOrEqual => {
                steps.push(step(bpf::JUMP_GREATER, high, Fails, Next));
                steps.push(step(bpf::JUMP_EQUAL, high, Next, Holds));
            }
            Comparison::MaskedEqual(_) => {
                steps.push(plain(bpf::AND, mask_high));
                steps.push(step(bpf::JUMP_EQUAL, high, Next, Fails));
            }
        }
    }
    steps.push(plain(bpf::LOAD, low_offset));
    match condition.comparison {
        Comparison::Equal => steps.push(step(bpf::JUMP_EQUAL, low, Next, Fails)),
        Comparison::NotEqual => steps.push(step(bpf::JUMP_EQUAL, low, Fails, Next)),
        Comparison::Greater => steps.push(step(bpf::JUMP_GREATER, low, Next, Fails)),
        Comparison::GreaterOrEqual => steps.push(step(bpf::JUMP_GREATER_EQUAL, low, Next, Fails)),
        Comparison::Less => steps.push(step(bpf::JUMP_GREATER_EQUAL, low, Fails, Next)),
        Comparison::LessOrEqual => steps.push(step(bpf::JUMP_GREATER, low, Fails, Next)),
        Comparison::MaskedEqual(_) => {
            steps.push(plain(bpf::AND, mask_low));
            steps.push(step(bpf::JUMP_EQUAL, low, Next, Fails));
        }
    }
    steps
}
