//! Security contexts. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`.

use std::sync::OnceLock;

use regex::Regex;
use serde_json::Value;

use super::support::{Errors, Path, flag, get, list, number, text};
use super::volume::descending_path;
use crate::formats;

const SYSCTL: &str = r"^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";

fn id(errors: &mut Errors, owner: &Value, key: &str, path: &Path<'_>) {
    if let Some(id) = number(owner, key) {
        for text in formats::user_id(id) {
            errors.invalid(&path.child(key), id, text);
        }
    }
}

/// The security context of a pod.
pub(super) fn pod(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let Some(context) = get(spec, "securityContext") else { return };
    for key in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(errors, context, key, path);
    }
    for (index, group) in list(context, "supplementalGroups").iter().enumerate() {
        let group = group.as_i64().unwrap_or(0);
        for text in formats::user_id(group) {
            errors.invalid(&path.child("supplementalGroups").index(index), group, text);
        }
    }
    sysctls(errors, context, spec, &path.child("sysctls"));
    if get(context, "fsGroupChangePolicy").is_some() && !matches!(text(context, "fsGroupChangePolicy"), "OnRootMismatch" | "Always") {
        let value = text(context, "fsGroupChangePolicy");
        errors.not_supported(&path.child("fsGroupChangePolicy"), value, &["Always", "OnRootMismatch"]);
    }
    seccomp(errors, context, path);
    app_armor(errors, context, path);
    if get(context, "supplementalGroupsPolicy").is_some() {
        let value = text(context, "supplementalGroupsPolicy");
        if !matches!(value, "Merge" | "Strict") {
            errors.not_supported(&path.child("supplementalGroupsPolicy"), value, &["Merge", "Strict"]);
        }
    }
}

fn sysctls(errors: &mut Errors, context: &Value, spec: &Value, path: &Path<'_>) {
    static PATTERN: OnceLock<Regex> = OnceLock::new();
    let pattern = PATTERN.get_or_init(|| Regex::new(SYSCTL).expect("a literal pattern"));
    let mut names: Vec<&str> = Vec::new();
    for (index, sysctl) in list(context, "sysctls").iter().enumerate() {
        let (name, path) = (text(sysctl, "name"), &path.index(index));
        let path = &path.child("name");
        if name.is_empty() {
            errors.required(path, "");
        } else if name.len() > 253 || !pattern.is_match(name) {
            errors.invalid(path, name, format!("must have at most 253 characters and match regex {SYSCTL}"));
        } else if names.contains(&name) {
            errors.duplicate(path, name);
        }
        let dotted = name.replace('/', ".");
        if flag(spec, "hostNetwork") && dotted.starts_with("net.") {
            errors.invalid(path, name, "may not be specified when 'hostNetwork' is true");
        }
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."].iter().any(|prefix| dotted.starts_with(prefix));
        if flag(spec, "hostIPC") && ipc {
            errors.invalid(path, name, "may not be specified when 'hostIPC' is true");
        }
        names.push(name);
    }
}

fn seccomp(errors: &mut Errors, context: &Value, path: &Path<'_>) {
    let Some(profile) = get(context, "seccompProfile") else { return };
    let path = &path.child("seccompProfile");
    let kind = text(profile, "type");
    match kind {
        "Localhost" | "RuntimeDefault" | "Unconfined" => {}
        "" => errors.required(&path.child("type"), "type is required when seccompProfile is set"),
        other => errors.not_supported(&path.child("type"), other, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
    let local = path.child("localhostProfile");
    match (kind, get(profile, "localhostProfile").and_then(Value::as_str)) {
        ("Localhost", None) => errors.required(&local, "must be set when seccomp type is Localhost"),
        ("Localhost", Some(file)) => descending_path(errors, file, &local),
        (_, Some(file)) => {
            errors.invalid(&local, Value::Null, "can only be set when seccomp type is Localhost");
            errors.show_last(&format!("{{\"Type\":{},\"LocalhostProfile\":{}}}", Value::from(kind), Value::from(file)));
        }
        _ => {}
    }
}

fn app_armor(errors: &mut Errors, context: &Value, path: &Path<'_>) {
    let Some(profile) = get(context, "appArmorProfile") else { return };
    let path = &path.child("appArmorProfile");
    let local = get(profile, "localhostProfile").and_then(Value::as_str);
    let local_path = path.child("localhostProfile");
    match text(profile, "type") {
        "Localhost" => match local {
            None => errors.required(&local_path, "must be set when AppArmor type is Localhost"),
            Some(name) if name.trim() != name => errors.invalid(&local_path, name, "must not be padded with whitespace"),
            Some("") => errors.required(&local_path, "must be set when AppArmor type is Localhost"),
            Some(_) => {}
        },
        "RuntimeDefault" | "Unconfined" => {
            if let Some(name) = local {
                errors.invalid(&local_path, name, "can only be set when AppArmor type is Localhost");
            }
        }
        "" => errors.required(&path.child("type"), "type is required when appArmorProfile is set"),
        other => errors.not_supported(&path.child("type"), other, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
}

/// The security context of a container.
pub(super) fn container(errors: &mut Errors, container: &Value, host_users: bool, path: &Path<'_>) {
    let Some(context) = get(container, "securityContext") else { return };
    let path = &path.child("securityContext");
    for key in ["runAsUser", "runAsGroup"] {
        id(errors, context, key, path);
    }
    if let Some(mount) = get(context, "procMount").and_then(Value::as_str) {
        if !matches!(mount, "Default" | "Unmasked") {
            errors.not_supported(&path.child("procMount"), mount, &["Default", "Unmasked"]);
        }
        if host_users && mount == "Unmasked" {
            errors.invalid(&path.child("procMount"), mount, "`hostUsers` must be false to use `Unmasked`");
        }
    }
    seccomp(errors, context, path);
    if get(context, "allowPrivilegeEscalation") == Some(&Value::Bool(false)) {
        if flag(context, "privileged") {
            errors.invalid(path, Value::Null, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
            errors.show_last(&go_context(context));
        }
        let added = get(context, "capabilities").map_or(&[][..], |capabilities| list(capabilities, "add"));
        for _ in added.iter().filter(|capability| *capability == "CAP_SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.invalid(path, Value::Null, detail);
            errors.show_last(&go_context(context));
        }
    }
    app_armor(errors, context, path);
}

/// A security context as Go's JSON shows upstream's internal type.
fn go_context(context: &Value) -> String {
    let show = |key: &str| get(context, key).cloned().unwrap_or(Value::Null).to_string();
    let capabilities = get(context, "capabilities").map_or_else(
        || "null".to_owned(),
        |found| {
            let show = |key: &str| get(found, key).cloned().unwrap_or(Value::Null).to_string();
            format!("{{\"Add\":{},\"Drop\":{}}}", show("add"), show("drop"))
        },
    );
    let profile = |key: &str| {
        get(context, key).map_or_else(
            || "null".to_owned(),
            |found| {
                let local = get(found, "localhostProfile").cloned().unwrap_or(Value::Null);
                format!("{{\"Type\":{},\"LocalhostProfile\":{local}}}", Value::from(text(found, "type")))
            },
        )
    };
    format!(
        "{{\"Capabilities\":{capabilities},\"Privileged\":{},\"SELinuxOptions\":{},\"WindowsOptions\":{},\"RunAsUser\":{},\
         \"RunAsGroup\":{},\"RunAsNonRoot\":{},\"ReadOnlyRootFilesystem\":{},\"AllowPrivilegeEscalation\":{},\"ProcMount\":{},\
         \"SeccompProfile\":{},\"AppArmorProfile\":{}}}",
        show("privileged"),
        show("seLinuxOptions"),
        show("windowsOptions"),
        show("runAsUser"),
        show("runAsGroup"),
        show("runAsNonRoot"),
        show("readOnlyRootFilesystem"),
        show("allowPrivilegeEscalation"),
        show("procMount"),
        profile("seccompProfile"),
        profile("appArmorProfile"),
    )
}
