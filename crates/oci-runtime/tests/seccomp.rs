//! Compiled profiles against libseccomp's for the same profile, both run in the interpreter; and loaded for real.

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use linux::bpf::{Instruction, interpret};
use oci_runtime::seccomp::arch::{Arch, Table};
use oci_runtime::seccomp::compile::{ACTIONS, ALLOW, ERRNO, KILL_THREAD, OPERATORS, Profile};
use oci_runtime::spec::{Seccomp, SyscallArgument, SyscallRule};
use serde_json::json;
use support::{Bundle, available};

/// A program over Debian's libseccomp2, with prototypes of its own so that no header is needed: reads a profile in words,
/// writes the filter.
const PROGRAM: &str = r#"
#include <stdint.h>
#include <stdio.h>
#include <string.h>
struct cmp { unsigned arg; int op; uint64_t a, b; };
void *seccomp_init(uint32_t); int seccomp_arch_add(void *, uint32_t); int seccomp_export_bpf(void *, int);
int seccomp_syscall_resolve_name(const char *); int seccomp_rule_add_array(void *, uint32_t, int, unsigned, const struct cmp *);
int main(void) {
    char word[64]; unsigned action, n; void *ctx = 0;
    while (scanf("%63s", word) == 1) {
        if (!strcmp(word, "default")) { if (scanf("%u", &action) != 1) return 2; ctx = seccomp_init(action); if (!ctx) return 3; }
        else if (!strcmp(word, "arch")) { if (scanf("%u", &n) != 1) return 2; int r = seccomp_arch_add(ctx, n); if (r && r != -17) return 4; }
        else if (!strcmp(word, "rule")) {
            struct cmp c[6]; if (scanf("%u %63s %u", &action, word, &n) != 3 || n > 6) return 2;
            for (unsigned i = 0; i < n; i++)
                if (scanf("%u %d %lu %lu", &c[i].arg, &c[i].op, &c[i].a, &c[i].b) != 4) return 2;
            int nr = seccomp_syscall_resolve_name(word);
            if (nr == -1) { fprintf(stderr, "unknown %s\n", word); continue; }
            int r = seccomp_rule_add_array(ctx, action, nr, n, c);
            if (r) { fprintf(stderr, "rule %s: %d\n", word, r); return 5; }
        } else return 2;
    }
    return seccomp_export_bpf(ctx, 1) ? 6 : 0;
}
"#;

/// The program's directory, removed when dropped.
struct Reference(PathBuf);

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Builds the program, or says why it cannot be.
fn reference(test: &str) -> Option<Reference> {
    let dir = std::env::temp_dir().join(format!("coracle-test-seccomp-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let reference = Reference(dir);
    std::fs::write(reference.0.join("reference.c"), PROGRAM).expect("written");
    let built = Command::new("cc").current_dir(&reference.0).args(["-O1", "-o", "reference", "reference.c", "-l:libseccomp.so.2"]).output();
    match built {
        Ok(output) if output.status.success() => Some(reference),
        Ok(output) => {
            eprintln!("SKIPPED: {test}: no program over libseccomp2 can be built: {}", String::from_utf8_lossy(&output.stderr).trim());
            None
        }
        Err(error) => {
            eprintln!("SKIPPED: {test}: no cc: {error}");
            None
        }
    }
}

fn number_of(word: &str, errno: Option<u32>) -> u32 {
    let action = ACTIONS.iter().find(|(known, _)| *known == word).expect("an action").1;
    if word == "SCMP_ACT_ERRNO" || word == "SCMP_ACT_TRACE" { action | errno.unwrap_or(1) } else { action }
}

/// The filter that libseccomp makes of the profile, handed over as runc hands it over.
fn libseccomp(reference: &Reference, profile: &Seccomp) -> Vec<Instruction> {
    let default = number_of(&profile.default_action, profile.default_errno_ret);
    let mut text = format!("default {default}\n");
    for arch in &profile.architectures {
        let arch = Arch::ALL.into_iter().find(|known| known.word() == arch).expect("an architecture");
        // libseccomp's token of x32 is x86_64's audit number without its 64-bit mark.
        let token = if arch == Arch::X32 { 0x4000_003e } else { arch.audit() };
        text += &format!("arch {token}\n");
    }
    for rule in &profile.syscalls {
        let action = number_of(&rule.action, rule.errno_ret);
        if action == default {
            continue;
        }
        let repeated = rule.args.iter().enumerate().any(|(at, c)| rule.args[..at].iter().any(|other| other.index == c.index));
        let condition = |c: &SyscallArgument| {
            let op = OPERATORS.iter().position(|known| *known == c.op).expect("an operator") + 1;
            format!(" {} {op} {} {}", c.index, c.value, c.value_two)
        };
        for name in &rule.names {
            if repeated {
                rule.args.iter().for_each(|c| text += &format!("rule {action} {name} 1{}\n", condition(c)));
            } else {
                let all: String = rule.args.iter().map(condition).collect();
                text += &format!("rule {action} {name} {}{all}\n", rule.args.len());
            }
        }
    }
    let mut child = Command::new(reference.0.join("reference"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{:?} {}\n{text}", output.status, String::from_utf8_lossy(&output.stderr));
    let half = |bytes: &[u8]| u16::from_ne_bytes([bytes[0], bytes[1]]);
    let word = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    output
        .stdout
        .chunks_exact(8)
        .map(|b| Instruction { code: half(b), jump_true: b[2], jump_false: b[3], operand: word(&b[4..]) })
        .collect()
}

/// Numbers that are the same on every run.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.throw(from.len() as u64) as usize]
    }
}

/// Whether libseccomp 2.5.4 has left out, as it does for some profiles of several architectures, to load the call's number
/// after it has found the architecture, so that it compares the architecture with numbers of calls.
fn forgets_the_number(program: &[Instruction], audit: u32) -> bool {
    let found = program.iter().position(|i| i.code == linux::bpf::JUMP_EQUAL && i.operand == audit);
    let section = found.map(|at| program[at + 1 + usize::from(program[at].jump_true)]);
    section.is_some_and(|first| first.code != linux::bpf::RETURN && first != Instruction::statement(linux::bpf::LOAD, 0))
}

/// Every call that matters to the profile, and those beside them, with arguments that meet, just miss and pass by the
/// conditions.
fn differences(profile: &Seccomp, ours: &[Instruction], theirs: &[Instruction], dice: &mut Dice) -> Vec<String> {
    let table = Table::new();
    let mut numbers: BTreeSet<u32> = [u32::MAX, u32::MAX - 1, 0x3fff_ffff, 0x4000_0000, 600].into();
    for name in table.names() {
        let named = profile.syscalls.iter().any(|rule| rule.names.iter().any(|n| n == name));
        if named || dice.throw(4) == 0 {
            numbers.extend(table.find(name).expect("known").into_iter().flatten().flat_map(|n| [n, n + 1]));
        }
    }
    numbers.extend([102, 117]);
    let mut values: Vec<u64> = vec![0, 1, u64::MAX, 40, 1 << 32];
    for condition in profile.syscalls.iter().flat_map(|rule| &rule.args) {
        for value in [condition.value, condition.value_two] {
            values.extend([value, value.wrapping_add(1), value.wrapping_sub(1), value ^ (1 << 32), value & 0xffff_ffff]);
        }
    }
    values.extend(1..25);
    let mut found = Vec::new();
    for audit in [Arch::X86_64, Arch::X86, Arch::Aarch64, Arch::Arm].map(Arch::audit).into_iter().chain([0xdead]) {
        if forgets_the_number(theirs, audit) {
            continue;
        }
        for number in &numbers {
            let trials = if profile.syscalls.iter().any(|rule| !rule.args.is_empty()) { 8 } else { 1 };
            for _ in 0..trials {
                let mut data = vec![*number, audit, 0, 0];
                for _ in 0..6 {
                    let value = dice.pick(&values);
                    data.extend([value as u32, (value >> 32) as u32]);
                }
                let (a, b) = (interpret(ours, &data), interpret(theirs, &data));
                if a != b {
                    found.push(format!("number {number:#x} audit {audit:#x} data {data:x?}: ours {a:x?}, libseccomp's {b:x?}"));
                }
            }
        }
    }
    found
}

fn random_profile(dice: &mut Dice, names: &[&str]) -> Seccomp {
    let actions =
        ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_KILL"];
    let all = [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64, Arch::Arm];
    let architectures = all.into_iter().filter(|_| dice.throw(2) == 0).map(|arch| arch.word().to_owned()).collect();
    let default_action = dice.pick(&actions).to_owned();
    let mut profile = Seccomp { default_action, architectures, ..Seccomp::default() };
    let mut used = BTreeSet::new();
    for _ in 0..1 + dice.throw(12) {
        let action = dice.pick(&actions);
        let errno = (action == "SCMP_ACT_ERRNO" && dice.throw(2) == 0).then(|| 1 + dice.throw(100) as u32);
        let mut args = Vec::new();
        if dice.throw(2) == 0 {
            for index in 0..6 {
                if dice.throw(4) == 0 {
                    let value = [dice.throw(50), dice.throw(1 << 40), dice.throw(u64::MAX), 1 << 31][dice.throw(4) as usize];
                    let op = dice.pick(&OPERATORS);
                    let value_two = if op == "SCMP_CMP_MASKED_EQ" { value & dice.throw(u64::MAX) } else { 0 };
                    args.push(SyscallArgument { index, value, value_two, op: op.to_owned() });
                }
            }
        }
        // Rules with different actions for one call are apart: see the module.
        let rule_names: Vec<String> =
            (0..1 + dice.throw(30)).map(|_| dice.pick(names)).filter(|name| used.insert(*name)).map(str::to_owned).collect();
        if !rule_names.is_empty() {
            profile.syscalls.push(SyscallRule { names: rule_names, action: action.to_owned(), errno_ret: errno, args });
        }
    }
    profile
}

/// Names that Debian's libseccomp (2.5.4, of 2022) gives the same numbers, but the multiplexers, whose rules overlap with those of
/// the calls behind them.
fn shared_names() -> Vec<&'static str> {
    let newer = |name: &&str| Table::new().find(name).is_some_and(|numbers| numbers.iter().flatten().all(|n| n & 0x3fff_ffff < 450));
    Table::new().names().filter(newer).filter(|name| !["uretprobe", "uprobe", "fstatat64", "ipc", "socketcall"].contains(name)).collect()
}

#[test]
fn the_same_as_libseccomp() {
    let Some(program) = reference("the_same_as_libseccomp") else { return };
    let names = shared_names();
    let mut dice = Dice(0x5eed_c0de);
    let (mut shorter, mut forgotten) = (0i64, 0);
    for round in 0..100 {
        let profile = random_profile(&mut dice, &names);
        let ours = Profile::read(&profile).expect("valid").program(false).expect("short enough");
        let theirs = libseccomp(&program, &profile);
        let found = differences(&profile, &ours, &theirs, &mut dice);
        assert!(found.is_empty(), "round {round}, {} differences, the first: {}\n{profile:#?}", found.len(), found[0]);
        forgotten +=
            [Arch::X86_64, Arch::X86, Arch::Aarch64, Arch::Arm].iter().filter(|arch| forgets_the_number(&theirs, arch.audit())).count();
        shorter += theirs.len() as i64 - ours.len() as i64;
    }
    assert!(forgotten < 100, "libseccomp's own mistake leaves too little to compare: {forgotten} sections");
    eprintln!("sections left out for libseccomp's own mistake: {forgotten}");
    eprintln!("instructions fewer than libseccomp's over all rounds: {shorter}");
}

#[test]
fn calls_newer_than_the_profile_are_unknown() {
    let rule = |names: &[&str], action: &str| SyscallRule {
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        action: action.to_owned(),
        ..SyscallRule::default()
    };
    let mut profile = Seccomp {
        default_action: "SCMP_ACT_ERRNO".to_owned(),
        architectures: ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_MIPS"].map(str::to_owned).into(),
        syscalls: vec![rule(&["read", "openat2", "nobody_knows_this_one"], "SCMP_ACT_ALLOW"), rule(&["socket"], "SCMP_ACT_ALLOW")],
        ..Seccomp::default()
    };
    let run = |profile: &Seccomp, number: u32, arch: Arch, first: u32| {
        let program = Profile::read(profile).expect("valid").program(true).expect("short enough");
        let mut data = vec![number, arch.audit()];
        data.resize(16, 0);
        data[4] = first;
        interpret(&program, &data).expect("a well-formed program")
    };
    assert_eq!(run(&profile, 0, Arch::X86_64, 0), ALLOW);
    assert_eq!(run(&profile, 1, Arch::X86_64, 0), ERRNO | 1);
    assert_eq!(run(&profile, 437, Arch::X86_64, 0), ALLOW);
    assert_eq!(run(&profile, 438, Arch::X86_64, 0), ERRNO | 38);
    assert_eq!(run(&profile, 0x4000_0000, Arch::X86_64, 0), ERRNO | 38);
    assert_eq!(run(&profile, 102, Arch::X86, 1), ALLOW, "socketcall(SYS_SOCKET)");
    assert_eq!(run(&profile, 102, Arch::X86, 2), ERRNO | 1);
    assert_eq!(run(&profile, 359, Arch::X86, 0), ALLOW, "socket");
    assert_eq!(run(&profile, 63, Arch::Aarch64, 0), KILL_THREAD, "an architecture that is not listed");
    profile.default_action = "SCMP_ACT_LOG".to_owned();
    assert_eq!(run(&profile, 438, Arch::X86_64, 0), 0x7ffc_0000);
}

#[test]
fn what_cannot_be_is_refused() {
    let good = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] });
    for (pointer, value, words) in [
        ("/defaultAction", json!("SCMP_ACT_MAYBE"), "unknown action"),
        ("/defaultAction", json!("SCMP_ACT_NOTIFY"), "default action"),
        ("/architectures", json!(["SCMP_ARCH_VAX"]), "unknown architecture"),
        ("/flags", json!(["SECCOMP_FILTER_FLAG_WHAT"]), "unknown flag"),
        ("/syscalls/0/args", json!([{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }]), "argument 6"),
        ("/syscalls/0/args", json!([{ "index": 0, "value": 0, "op": "SCMP_CMP_IS" }]), "unknown operator"),
        ("/syscalls/0/errnoRet", json!(1), "takes no errnoRet"),
        ("/syscalls/0/names", json!([]), "at least one"),
        ("/syscalls/0", json!({ "names": ["write"], "action": "SCMP_ACT_NOTIFY" }), "write"),
    ] {
        let mut profile = good.clone();
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let place = profile.pointer_mut(parent).expect("a parent");
        match key.parse::<usize>() {
            Ok(index) => place[index] = value,
            Err(_) => place[key] = value,
        }
        let profile: Seccomp = serde_json::from_value(profile).expect("a profile");
        let error = Profile::read(&profile).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(words), "{pointer}: {error:?} has no {words:?}");
    }
}

#[test]
fn filters_hold_inside() {
    if !available("filters_hold_inside") {
        return;
    }
    let mut bundle = Bundle::new("seccomp");
    bundle.config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }] });
    bundle.shell("mkdir /d; grep Seccomp: /proc/self/status");
    for no_new_privileges in [true, false] {
        bundle.config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let answer = bundle.run(&["run", "--bundle", ".", "c"]);
        assert!(answer.err.contains("Operation not supported") && answer.out == "Seccomp:\t2\n", "{answer:?}");
    }
    // exec gets the container's filter too.
    bundle.config["process"]["args"] = json!(["sleep", "1000"]);
    bundle.run(&["run", "--detach", "--bundle", ".", "c"]).ok();
    let answer = bundle.run(&["exec", "c", "mkdir", "/d"]);
    assert!(answer.code == 1 && answer.err.contains("Operation not supported"), "{answer:?}");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.config["linux"]["seccomp"]["architectures"] = json!(["SCMP_ARCH_VAX"]);
    bundle.run(&["create", "--bundle", ".", "c"]).failed("unknown architecture");
    bundle.assert_nothing_left();
}

#[test]
fn a_listener_is_passed_on() {
    if !available("a_listener_is_passed_on") {
        return;
    }
    use std::os::fd::AsFd;
    let mut bundle = Bundle::new("notify");
    let path = bundle.path("agent.sock");
    let listener = linux::unix::listen(linux::unix::Kind::Stream, &path, 1).expect("a socket");
    bundle.config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "meta",
        "syscalls": [{ "names": ["swapoff"], "action": "SCMP_ACT_NOTIFY" }] });
    bundle.run(&["create", "--bundle", ".", "c"]).ok();
    let agent = linux::unix::accept(listener.as_fd()).expect("a connection");
    let (bytes, fds) = linux::unix::receive(agent.as_fd(), 65536).expect("a message");
    let message: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
    assert_eq!((message["fds"][0].as_str(), message["metadata"].as_str(), fds.len()), (Some("seccompFd"), Some("meta"), 1));
    assert_eq!(message["state"]["id"], "c");
    let link = std::fs::read_link(linux::fs::descriptor_path(fds[0].as_fd())).expect("a link");
    assert_eq!(link.display().to_string(), "anon_inode:seccomp notify");
    bundle.run(&["delete", "--force", "c"]).ok();
    bundle.config["linux"]["seccomp"]["listenerPath"] = json!("");
    bundle.run(&["create", "--bundle", ".", "c"]).failed("needs listenerPath");
    bundle.assert_nothing_left();
}
