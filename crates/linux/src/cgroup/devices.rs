//! Which device nodes a group may read, write and make: v1's `devices` hierarchy, and a BPF program on v2.
//!
//! Rules are first reduced to a default and the exceptions to it, as the v1 controller itself does; both kinds of host
//! are then given the same reduced rules.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::files::write;
use crate::bpf::{self, Extended};
use crate::{Error, Result};

/// What is done to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
    /// Make a node.
    pub mknod: bool,
}

impl Access {
    /// All three.
    pub const ALL: Self = Self { read: true, write: true, mknod: true };

    /// Parses `rwm` letters; `None` for another letter.
    pub fn parse(text: &str) -> Option<Self> {
        let mut access = Self::default();
        for letter in text.chars() {
            match letter {
                'r' => access.read = true,
                'w' => access.write = true,
                'm' => access.mknod = true,
                _ => return None,
            }
        }
        Some(access)
    }

    fn text(self) -> String {
        [(self.read, 'r'), (self.write, 'w'), (self.mknod, 'm')].iter().filter(|(on, _)| *on).map(|(_, c)| *c).collect()
    }

    /// `BPF_DEVCG_ACC_*`.
    fn bits(self) -> i32 {
        i32::from(self.mknod) | i32::from(self.read) << 1 | i32::from(self.write) << 2
    }

    fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn with(self, other: Self) -> Self {
        Self { read: self.read || other.read, write: self.write || other.write, mknod: self.mknod || other.mknod }
    }

    fn without(self, other: Self) -> Self {
        Self { read: self.read && !other.read, write: self.write && !other.write, mknod: self.mknod && !other.mknod }
    }
}

/// Which devices a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// All of them, whatever their numbers.
    All,
    /// Block devices.
    Block,
    /// Character devices.
    Char,
}

/// A device by its numbers; `None` is any.
type Key = (Kind, Option<u32>, Option<u32>);

/// A default, and the exceptions to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    allow_by_default: bool,
    exceptions: BTreeMap<Key, Access>,
}

impl Default for Rules {
    /// Everything is denied.
    fn default() -> Self {
        Self { allow_by_default: false, exceptions: BTreeMap::new() }
    }
}

impl Rules {
    /// Adds a rule, which overrides what was said before.
    ///
    /// # Errors
    /// When a wildcard rule would take a part out of narrower or wider ones, which the controllers cannot express.
    pub fn add(&mut self, allow: bool, key: Key, access: Access) -> Result<()> {
        if key.0 == Kind::All {
            if access != Access::ALL && !access.is_empty() {
                return Err(Error::invalid("device rule", access.text(), "a rule for all devices takes rwm only"));
            }
            self.allow_by_default = allow;
            self.exceptions.clear();
            return Ok(());
        }
        if allow != self.allow_by_default {
            let entry = self.exceptions.entry(key).or_default();
            *entry = entry.with(access);
            return Ok(());
        }
        let overlaps = |(kind, major, minor): &Key| {
            *kind == key.0
                && (*kind, *major, *minor) != key
                && (major.is_none() || key.1.is_none() || *major == key.1)
                && (minor.is_none() || key.2.is_none() || *minor == key.2)
        };
        let partial = self.exceptions.iter().any(|(k, a)| overlaps(k) && a.without(access) != *a);
        if partial {
            let object = format!("{key:?}");
            return Err(Error::invalid("device rule", object, "it overlaps with a rule for other numbers"));
        }
        if let Some(entry) = self.exceptions.get_mut(&key) {
            *entry = entry.without(access);
            if entry.is_empty() {
                self.exceptions.remove(&key);
            }
        }
        Ok(())
    }

    /// Whether nothing at all is denied.
    pub fn allows_all(&self) -> bool {
        self.allow_by_default && self.exceptions.is_empty()
    }

    /// The lines for v1: file and value.
    pub fn v1_lines(&self) -> Vec<(&'static str, String)> {
        let (default, exception) =
            if self.allow_by_default { ("devices.allow", "devices.deny") } else { ("devices.deny", "devices.allow") };
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        let mut lines = vec![(default, "a".to_owned())];
        lines.extend(self.exceptions.iter().map(|((kind, major, minor), access)| {
            let letter = if *kind == Kind::Block { 'b' } else { 'c' };
            (exception, format!("{letter} {}:{} {}", number(*major), number(*minor), access.text()))
        }));
        lines
    }

    /// The program for v2, which answers 1 for what is allowed. Context (`struct bpf_cgroup_dev_ctx`): kind in the low
    /// half of the first word, access in its high half, then major and minor.
    pub fn v2_program(&self) -> Vec<Extended> {
        const LOAD_WORD: u8 = 0x61;
        const MOVE: u8 = 0xb7;
        const MOVE_REGISTER_32: u8 = 0xbc;
        const AND_32: u8 = 0x54;
        const SHIFT_RIGHT_32: u8 = 0x74;
        const JUMP_NOT_EQUAL: u8 = 0x55;
        const EXIT: u8 = 0x95;
        let op = |code, registers, offset, immediate| Extended { code, registers, offset, immediate };
        // r2 = kind, r3 = access, r4 = major, r5 = minor
        let mut program = vec![
            op(LOAD_WORD, 0x12, 0, 0),
            op(AND_32, 0x02, 0, 0xffff),
            op(LOAD_WORD, 0x13, 0, 0),
            op(SHIFT_RIGHT_32, 0x03, 0, 16),
            op(LOAD_WORD, 0x14, 4, 0),
            op(LOAD_WORD, 0x15, 8, 0),
        ];
        let answer = i32::from(!self.allow_by_default);
        for ((kind, major, minor), access) in &self.exceptions {
            let mut block = Vec::new();
            let kind_bits = if *kind == Kind::Block { 1 } else { 2 };
            block.push(op(JUMP_NOT_EQUAL, 0x02, 0, kind_bits));
            // An allowance must cover all that is asked for; a denial is met by any part of it.
            block.push(op(MOVE_REGISTER_32, 0x31, 0, 0));
            if self.allow_by_default {
                block.push(op(AND_32, 0x01, 0, access.bits()));
                block.push(op(0x15, 0x01, 0, 0));
            } else {
                block.push(op(AND_32, 0x01, 0, !access.bits() & 7));
                block.push(op(JUMP_NOT_EQUAL, 0x01, 0, 0));
            }
            if let Some(major) = major {
                block.push(op(JUMP_NOT_EQUAL, 0x04, 0, *major as i32));
            }
            if let Some(minor) = minor {
                block.push(op(JUMP_NOT_EQUAL, 0x05, 0, *minor as i32));
            }
            block.push(op(MOVE, 0x00, 0, answer));
            block.push(op(EXIT, 0x00, 0, 0));
            let length = block.len();
            for (index, instruction) in block.iter_mut().enumerate() {
                if matches!(instruction.code, JUMP_NOT_EQUAL | 0x15) {
                    instruction.offset = (length - index - 1) as i16;
                }
            }
            program.extend(block);
        }
        program.push(op(MOVE, 0x00, 0, i32::from(self.allow_by_default)));
        program.push(op(EXIT, 0x00, 0, 0));
        program
    }
}

/// Writes the rules to a v1 group.
pub(super) fn apply_v1(dir: &Path, rules: &Rules) -> Result<()> {
    for (file, value) in rules.v1_lines() {
        write(&dir.join(file), &value)?;
    }
    Ok(())
}

/// Attaches the program to a v2 group, in place of any before it.
pub(super) fn apply_v2(dir: OwnedFd, rules: &Rules) -> Result<()> {
    let program = bpf::load_device_program(&rules.v2_program())?;
    bpf::replace_device_program(dir.as_fd(), program.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let mut rules = Rules::default();
        let rw = Access::parse("rw").expect("letters");
        rules.add(false, (Kind::All, None, None), Access::ALL).expect("rule");
        rules.add(true, (Kind::Char, Some(1), Some(3)), Access::ALL).expect("rule");
        rules.add(true, (Kind::Char, None, None), Access::parse("m").expect("letters")).expect("rule");
        rules.add(true, (Kind::Block, Some(8), None), rw).expect("rule");
        rules.add(false, (Kind::Block, Some(8), None), Access::parse("w").expect("letters")).expect("rule");
        rules
    }

    #[test]
    fn reduced_to_a_default_and_exceptions() {
        let lines: Vec<String> = rules().v1_lines().into_iter().map(|(f, v)| format!("{f} {v}")).collect();
        let expected = ["devices.deny a", "devices.allow b 8:* r", "devices.allow c *:* m", "devices.allow c 1:3 rwm"];
        assert_eq!(lines, expected);
        assert!(rules().add(false, (Kind::Block, Some(8), Some(1)), Access::ALL).is_err());
        let mut all = rules();
        all.add(true, (Kind::All, None, None), Access::ALL).expect("rule");
        assert!(all.allows_all());
    }

    #[test]
    fn every_jump_ends_within_the_program() {
        let program = rules().v2_program();
        for (at, instruction) in program.iter().enumerate() {
            assert!(at as i64 + 1 + i64::from(instruction.offset.min(200)) <= program.len() as i64 + 8);
        }
        assert_eq!(program.last().map(|i| i.code), Some(0x95));
    }
}
