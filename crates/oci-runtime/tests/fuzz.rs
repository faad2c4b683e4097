//! Mutated `config.json`, `process.json` and seccomp profiles: a configuration or an error, never a panic.

use oci_runtime::seccomp::Filter;
use oci_runtime::spec::{Process, Resources, Spec, parse};
use oci_runtime::{mount_options, validate};
use serde_json::json;
use testkit::fuzz::Fuzz;

const WORDS: [&str; 12] = [
    "\"linux\"",
    "\"mounts\"",
    "\"namespaces\"",
    "\"path\"",
    "\"SCMP_ACT_ERRNO\"",
    "\"rbind\"",
    "\"sysctl\"",
    "kernel.",
    "\"args\"",
    "\"hooks\"",
    "\"resources\"",
    "\"rprivate\"",
];

#[test]
fn configurations() {
    let mut full = oci_runtime::features::example();
    full["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel/shmmni": "1" });
    full["linux"]["devices"] = json!([{ "path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0 }]);
    full["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 1000, "size": 65536 }]);
    full["linux"]["personality"] = json!({ "domain": "LINUX32" });
    full["linux"]["resources"] = json!({ "memory": { "limit": 1_048_576, "swap": -1 }, "cpu": { "shares": 2, "quota": 1000, "cpus": "0-3,5" },
        "pids": { "limit": -1 }, "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }], "unified": { "memory.high": "max" },
        "devices": [{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 1, "minor": -1, "access": "r" }] });
    full["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{ "names": ["clone", "read"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 2_114_060_288u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] }] });
    full["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 2 }]);
    full["process"]["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 10 });
    full["hooks"] = json!({ "prestart": [{ "path": "/bin/true", "args": ["true"], "timeout": 5 }] });
    Fuzz::new("config.json").seed(full.to_string()).seed(oci_runtime::features::example().to_string()).words(&WORDS).run(|input| {
        let text = String::from_utf8_lossy(input);
        let _ = parse::<Process>(&text).map(|process| validate::process(&process).is_ok());
        let _ = parse::<Resources>(&text);
        let Ok(spec) = parse::<Spec>(&text) else { return };
        let _ = validate::container(&spec);
        for mount in &spec.mounts {
            let _ = mount_options::Options::parse(&mount.kind, &mount.options);
        }
        if let Some(profile) = spec.linux.as_ref().and_then(|linux| linux.seccomp.as_ref()) {
            let _ = Filter::compile(profile);
        }
    });
}
