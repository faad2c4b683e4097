//! Seccomp profiles: the default one as data, and those of the node's administrator. Pure but for the text handed in.
//!
//! The default is equal in effect to containerd's (v2.4.2, `contrib/seccomp/seccomp_default.go`), for Linux 4.8 and later.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use protocols::cri::v1::SecurityProfile;
use protocols::cri::v1::security_profile::ProfileType;
use serde::Deserialize;

use super::SpecError;
use crate::oci::{Seccomp, Syscall, SyscallArg};

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const CLONE_NAMESPACES: u64 = 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;
const ENOSYS: u32 = 38;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DefaultProfile {
    allow: Vec<String>,
    allow_socket_domains: Vec<u64>,
    allow_personalities: Vec<u64>,
    architectures: BTreeMap<String, Vec<String>>,
    allow_by_architecture: BTreeMap<String, Vec<String>>,
    allow_by_capability: BTreeMap<String, Vec<String>>,
}

static DEFAULT: LazyLock<DefaultProfile> =
    LazyLock::new(|| serde_json::from_str(include_str!("seccomp_default.json")).expect("the file is in the crate, and a test reads it"));

/// What the request asks of seccomp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// No filter.
    Unconfined,
    /// The default profile.
    RuntimeDefault,
    /// The profile in this file of the host.
    Localhost(String),
}

/// Reads the request; privileged containers and those without a request run without a filter, as containerd's do.
///
/// # Errors
/// [`SpecError::Seccomp`]: a path without the type Localhost or the reverse, or an unknown type.
pub fn request(profile: Option<&SecurityProfile>, privileged: bool) -> Result<Request, SpecError> {
    let Some(profile) = profile.filter(|_| !privileged) else {
        return Ok(Request::Unconfined);
    };
    let kind = ProfileType::try_from(profile.profile_type)
        .map_err(|_| SpecError::Seccomp(format!("profile_type {} is not known", profile.profile_type)))?;
    match kind {
        ProfileType::Localhost if profile.localhost_ref.is_empty() => {
            Err(SpecError::Seccomp("profile_type Localhost needs a localhost_ref".to_owned()))
        }
        ProfileType::Localhost => {
            let path = profile.localhost_ref.strip_prefix("localhost/").unwrap_or(&profile.localhost_ref);
            Ok(Request::Localhost(path.to_owned()))
        }
        _ if !profile.localhost_ref.is_empty() => Err(SpecError::Seccomp("localhost_ref is only for profile_type Localhost".to_owned())),
        ProfileType::Unconfined => Ok(Request::Unconfined),
        ProfileType::RuntimeDefault => Ok(Request::RuntimeDefault),
    }
}

/// Parses a profile file: the runtime-spec's `linux.seccomp` object in JSON.
///
/// # Errors
/// [`SpecError::Seccomp`] with the path and what is wrong in it.
pub fn parse(path: &str, text: &str) -> Result<Seccomp, SpecError> {
    let profile: Seccomp =
        serde_json::from_str(text).map_err(|error| SpecError::Seccomp(format!("profile {path} is not a seccomp profile: {error}")))?;
    for action in std::iter::once(&profile.default_action).chain(profile.syscalls.iter().map(|rule| &rule.action)) {
        if !ACTIONS.contains(&action.as_str()) {
            return Err(SpecError::Seccomp(format!("profile {path} has an unknown action {action:?}")));
        }
    }
    for op in profile.syscalls.iter().flat_map(|rule| &rule.args).map(|arg| &arg.op) {
        if !OPERATORS.contains(&op.as_str()) {
            return Err(SpecError::Seccomp(format!("profile {path} has an unknown operator {op:?}")));
        }
    }
    Ok(profile)
}

const ACTIONS: [&str; 9] = [
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
];
const OPERATORS: [&str; 7] =
    ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];

/// The default profile for a process with this bounding set, on this architecture (`std::env::consts::ARCH`).
pub fn default_profile(bounding: &[String], architecture: &str) -> Seccomp {
    let data = &*DEFAULT;
    let mut syscalls = vec![allow(data.allow.clone())];
    syscalls.extend(socket_rules(&data.allow_socket_domains));
    syscalls.extend(data.allow_personalities.iter().map(|value| allow_if("personality", 0, *value, "SCMP_CMP_EQ")));
    if let Some(names) = data.allow_by_architecture.get(architecture) {
        syscalls.push(allow(names.clone()));
    }
    for capability in bounding {
        if let Some(names) = data.allow_by_capability.get(capability) {
            syscalls.push(allow(names.clone()));
        }
    }
    if !bounding.iter().any(|capability| capability == "CAP_SYS_ADMIN") {
        syscalls.push(allow_if("clone", 0, CLONE_NAMESPACES, "SCMP_CMP_MASKED_EQ"));
        // libc falls back to clone on ENOSYS, and only on that.
        syscalls.push(Syscall {
            names: vec!["clone3".to_owned()],
            action: "SCMP_ACT_ERRNO".to_owned(),
            errno_ret: Some(ENOSYS),
            args: Vec::new(),
        });
    }
    Seccomp {
        default_action: "SCMP_ACT_ERRNO".to_owned(),
        architectures: data.architectures.get(architecture).cloned().unwrap_or_default(),
        syscalls,
        ..Seccomp::default()
    }
}

/// The families from 1 to the first gap in one comparison (0 cannot be created), the others by equality.
fn socket_rules(domains: &[u64]) -> Vec<Syscall> {
    let run = domains.iter().zip(1..).take_while(|(domain, expected)| *domain == expected).count();
    let mut rules = Vec::new();
    if run > 0 {
        rules.push(allow_if("socket", 0, run as u64 + 1, "SCMP_CMP_LT"));
    }
    rules.extend(domains[run..].iter().map(|domain| allow_if("socket", 0, *domain, "SCMP_CMP_EQ")));
    rules
}

fn allow(names: Vec<String>) -> Syscall {
    Syscall { names, action: "SCMP_ACT_ALLOW".to_owned(), errno_ret: None, args: Vec::new() }
}

fn allow_if(name: &str, index: u32, value: u64, op: &str) -> Syscall {
    Syscall { args: vec![SyscallArg { index, value, value_two: 0, op: op.to_owned() }], ..allow(vec![name.to_owned()]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &Seccomp) -> Vec<&str> {
        profile.syscalls.iter().flat_map(|rule| rule.names.iter().map(String::as_str)).collect()
    }

    #[test]
    fn the_default_profile_depends_on_the_bounding_set() {
        let plain = default_profile(&["CAP_CHOWN".to_owned()], "x86_64");
        assert!(names(&plain).contains(&"arch_prctl") && !names(&plain).contains(&"mount") && !names(&plain).contains(&"unshare"));
        let clone3 = plain.syscalls.iter().find(|rule| rule.names == ["clone3"]).expect("there");
        assert_eq!(clone3.errno_ret, Some(38));
        let admin = default_profile(&["CAP_SYS_ADMIN".to_owned()], "x86_64");
        assert!(names(&admin).contains(&"mount") && admin.syscalls.iter().all(|rule| rule.action == "SCMP_ACT_ALLOW"));
        assert_eq!(plain.architectures[0], "SCMP_ARCH_X86_64");
    }

    #[test]
    fn the_default_profile_has_no_family_for_crypto_and_vsock() {
        let profile = default_profile(&[], "x86_64");
        let sockets: Vec<_> = profile
            .syscalls
            .iter()
            .filter(|rule| rule.names == ["socket"])
            .flat_map(|rule| &rule.args)
            .map(|arg| (arg.op.as_str(), arg.value))
            .collect();
        assert_eq!(sockets[0], ("SCMP_CMP_LT", 38));
        assert!(sockets[1..].iter().all(|(op, value)| *op == "SCMP_CMP_EQ" && ![38, 40].contains(value)));
    }

    #[test]
    fn requests_are_read() {
        let profile = |kind: ProfileType, path: &str| SecurityProfile { profile_type: kind as i32, localhost_ref: path.to_owned() };
        assert_eq!(request(None, false), Ok(Request::Unconfined));
        assert_eq!(request(Some(&SecurityProfile::default()), false), Ok(Request::RuntimeDefault));
        assert_eq!(request(Some(&SecurityProfile::default()), true), Ok(Request::Unconfined));
        assert_eq!(request(Some(&profile(ProfileType::Localhost, "localhost//p.json")), false), Ok(Request::Localhost("/p.json".into())));
        assert!(request(Some(&profile(ProfileType::Localhost, "")), false).is_err());
        assert!(request(Some(&profile(ProfileType::Unconfined, "x")), false).is_err());
    }

    #[test]
    fn broken_profiles_are_refused() {
        for text in [
            "",
            "{}",
            "[]",
            r#"{"defaultAction":"ALLOW"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["x"],"action":"no"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","nonsense":1}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["x"],"action":"SCMP_ACT_LOG","args":[{"index":0,"value":1,"op":"?"}]}]}"#,
        ] {
            let error = parse("/p.json", text).expect_err(text);
            assert!(error.to_string().contains("/p.json"), "{error}");
        }
        let good = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#;
        assert_eq!(parse("/p.json", good).expect("good").syscalls[0].errno_ret, Some(1));
    }
}
