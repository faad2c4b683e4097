//! Architectures, and the numbers that system calls have on them.

/// An architecture that profiles are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// The same processor with 32-bit pointers; its calls are x86_64's with a bit set.
    X32,
    /// 32-bit x86.
    X86,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM.
    Arm,
}

/// The bit that tells x32's system calls from x86_64's.
pub const X32_BIT: u32 = 0x4000_0000;

/// Words of the specification for architectures that neither of our two kinds of machine ever runs: a filter has
/// nothing to say about them.
const FOREIGN: [&str; 16] = [
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
];

/// What a word for an architecture means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// One that is compiled for.
    Known(Arch),
    /// One that cannot occur here.
    Foreign,
}

impl Arch {
    /// All, in the order of the table's columns.
    pub const ALL: [Self; 5] = [Self::X86_64, Self::X32, Self::X86, Self::Aarch64, Self::Arm];

    /// This machine's.
    pub const fn native() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 }
    }

    /// Reads the specification's word.
    pub fn parse(word: &str) -> Option<Word> {
        let known = Self::ALL.into_iter().find(|arch| arch.word() == word).map(Word::Known);
        known.or_else(|| FOREIGN.contains(&word).then_some(Word::Foreign))
    }

    /// The specification's word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::X86_64 => "SCMP_ARCH_X86_64",
            Self::X32 => "SCMP_ARCH_X32",
            Self::X86 => "SCMP_ARCH_X86",
            Self::Aarch64 => "SCMP_ARCH_AARCH64",
            Self::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// `AUDIT_ARCH_*`: what the kernel tells a filter. x32 has x86_64's.
    pub const fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments are taken for 32 bits, as libseccomp does: the upper halves are not looked at.
    pub const fn is_32_bit(self) -> bool {
        matches!(self, Self::X32 | Self::X86 | Self::Arm)
    }
}

/// `name x86_64 x32 x86 aarch64 arm`, sorted by name.
const TABLE: &str = include_str!("syscalls.txt");

/// A system call by its number on each architecture, in the order of [`Arch::ALL`].
pub type Numbers = [Option<u32>; 5];

/// The table, ready to be searched.
pub struct Table(Vec<&'static str>);

impl Table {
    /// Splits the table's text.
    pub fn new() -> Self {
        Self(TABLE.lines().filter(|line| !line.starts_with('#')).collect())
    }

    /// Finds a system call; `None` when no architecture has it.
    pub fn find(&self, name: &str) -> Option<Numbers> {
        let key = |line: &&str| line.split(' ').next().unwrap_or_default().cmp(name);
        let line = self.0[self.0.binary_search_by(key).ok()?];
        let fields: Vec<&str> = line.split(' ').skip(1).collect();
        let number = |index: usize| -> Option<u32> { fields.get(index)?.parse().ok() };
        let x32 = if fields.get(1) == Some(&"=") { number(0) } else { number(1) };
        Some([number(0), x32.map(|n| n | X32_BIT), number(2), number(3), number(4)])
    }

    /// All names, for `features` and tests.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().filter_map(|line| line.split(' ').next())
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

/// The multiplexed calls of 32-bit x86: `socketcall` and `ipc` with the number of the call as their first argument.
pub const SOCKETCALL: u32 = 102;
/// See [`SOCKETCALL`].
pub const IPC: u32 = 117;

const SOCKET_CALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

const IPC_CALLS: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// The multiplexed form of a call on 32-bit x86: the multiplexer's number, and its first argument.
pub fn multiplexed(name: &str) -> Option<(u32, u64)> {
    if let Some(index) = SOCKET_CALLS.iter().position(|known| *known == name) {
        return Some((SOCKETCALL, index as u64 + 1));
    }
    IPC_CALLS.iter().find(|(known, _)| *known == name).map(|(_, number)| (IPC, *number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_right() {
        let table = Table::new();
        let names: Vec<_> = table.names().collect();
        assert!(names.is_sorted() && names.len() > 450);
        assert_eq!(table.find("read"), Some([Some(0), Some(X32_BIT), Some(3), Some(63), Some(3)]));
        assert_eq!(table.find("execve"), Some([Some(59), Some(X32_BIT | 520), Some(11), Some(221), Some(11)]));
        assert_eq!(table.find("clone3"), Some([Some(435), Some(X32_BIT | 435), Some(435), Some(435), Some(435)]));
        assert_eq!(table.find("nope"), None);
        for name in names {
            assert!(table.find(name).is_some_and(|numbers| numbers.iter().any(Option::is_some)), "{name}");
        }
    }
}
