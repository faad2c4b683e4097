//! Containers. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `validateContainerCommon` and what it calls.

use serde_json::Value;

use super::support::{Errors, Path, flag, get, list, number, text};
use super::volume::descending_path;
use super::{resources, security};
use crate::formats;
use crate::quantity::Quantity;

/// Fields that the downward API offers in variables.
const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Resources that the downward API offers.
const RESOURCES: &[&str] =
    &["limits.cpu", "limits.ephemeral-storage", "limits.memory", "requests.cpu", "requests.ephemeral-storage", "requests.memory"];

/// What a container is checked against.
pub(super) struct Context<'a> {
    /// Names of the pod's good volumes.
    pub(super) volumes: &'a [&'a str],
    /// Names of the pod's resource claims.
    pub(super) claims: &'a [&'a str],
    /// `terminationGracePeriodSeconds` of the pod.
    pub(super) grace_seconds: Option<i64>,
    /// Whether the pod shares the host's user namespace.
    pub(super) host_users: bool,
    /// The pod's `restartPolicy`.
    pub(super) restart_policy: &'a str,
}

/// The pod's containers.
pub(super) fn containers(errors: &mut Errors, spec: &Value, context: &Context<'_>, path: &Path<'_>) {
    let containers = list(spec, "containers");
    if containers.is_empty() {
        errors.required(path, "");
        return;
    }
    let mut names: Vec<&str> = Vec::new();
    for (index, container) in containers.iter().enumerate() {
        let path = &path.index(index);
        common(errors, container, context, path);
        let name = text(container, "name");
        if names.contains(&name) {
            errors.duplicate(&path.child("name"), name);
        } else {
            names.push(name);
        }
        lifecycle(errors, container, context, path);
        probes(errors, container, context, path);
        restart_rules(errors, container, path);
    }
    host_ports(errors, containers, path);
}

/// The pod's init containers.
pub(super) fn init_containers(errors: &mut Errors, spec: &Value, context: &Context<'_>, path: &Path<'_>) {
    let mut names: Vec<&str> = list(spec, "containers").iter().map(|container| text(container, "name")).collect();
    for (index, container) in list(spec, "initContainers").iter().enumerate() {
        let list_path = path;
        let path = &path.index(index);
        common(errors, container, context, path);
        restart_rules(errors, container, path);
        let name = text(container, "name");
        if names.contains(&name) {
            errors.duplicate(&path.child("name"), name);
        } else if !name.is_empty() {
            names.push(name);
        }
        host_ports(errors, std::slice::from_ref(container), list_path);
        if text(container, "restartPolicy") == "Always" {
            lifecycle(errors, container, context, path);
            probes(errors, container, context, path);
        } else {
            for key in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if get(container, key).is_some() {
                    errors.forbidden(&path.child(key), "may not be set for init containers without restartPolicy=Always");
                }
            }
        }
    }
}

pub(super) fn common(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &Path<'_>) {
    let name = text(container, "name");
    if name.is_empty() {
        errors.required(&path.child("name"), "");
    } else {
        errors.all_invalid(&path.child("name"), name, formats::dns1123_label(name));
    }
    if text(container, "image").is_empty() {
        errors.required(&path.child("image"), "");
    }
    errors.one_of(&path.child("terminationMessagePolicy"), text(container, "terminationMessagePolicy"), &["File", "FallbackToLogsOnError"]);
    ports(errors, container, &path.child("ports"));
    env(errors, container, &path.child("env"));
    env_from(errors, container, &path.child("envFrom"));
    mounts(errors, container, context, &path.child("volumeMounts"));
    errors.one_of(&path.child("imagePullPolicy"), text(container, "imagePullPolicy"), &["Always", "IfNotPresent", "Never"]);
    if let Some(found) = get(container, "resources") {
        resources::requirements(errors, found, context.claims, &path.child("resources"));
    }
    resize_policy(errors, container, context, &path.child("resizePolicy"));
    security::container(errors, container, context.host_users, path);
}

fn ports(errors: &mut Errors, container: &Value, path: &Path<'_>) {
    let mut names: Vec<&str> = Vec::new();
    for (index, port) in list(container, "ports").iter().enumerate() {
        let indexed = path.index(index);
        let name = text(port, "name");
        if !name.is_empty() {
            let found = formats::port_name(name);
            if !found.is_empty() {
                errors.all_invalid(&indexed.child("name"), name, found);
            } else if names.contains(&name) {
                errors.duplicate(&indexed.child("name"), name);
            } else {
                names.push(name);
            }
        }
        match number(port, "containerPort").unwrap_or(0) {
            0 => errors.required(&indexed.child("containerPort"), ""),
            number => port_number(errors, number, &indexed.child("containerPort")),
        }
        if let Some(number) = number(port, "hostPort").filter(|number| *number != 0) {
            port_number(errors, number, &indexed.child("hostPort"));
        }
        match text(port, "protocol") {
            "" => errors.required(&indexed.child("protocol"), ""),
            protocol => errors.one_of(&indexed.child("protocol"), protocol, &["SCTP", "TCP", "UDP"]),
        }
    }
}

fn port_number(errors: &mut Errors, port: i64, path: &Path<'_>) {
    for text in formats::port_number(port) {
        errors.invalid(path, port, text);
    }
}

/// A port's number or name (probes, `targetPort`).
pub(super) fn port_or_name(errors: &mut Errors, port: Option<&Value>, path: &Path<'_>) {
    match port {
        Some(Value::String(name)) => errors.all_invalid(path, name, formats::port_name(name)),
        other => port_number(errors, other.and_then(Value::as_i64).unwrap_or(0), path),
    }
}

fn host_ports(errors: &mut Errors, containers: &[Value], path: &Path<'_>) {
    let mut seen: Vec<String> = Vec::new();
    for (index, container) in containers.iter().enumerate() {
        for (port_index, port) in list(container, "ports").iter().enumerate() {
            let Some(number) = number(port, "hostPort").filter(|number| *number != 0) else { continue };
            let key = format!("{}/{}/{number}", text(port, "protocol"), text(port, "hostIP"));
            if seen.contains(&key) {
                errors.duplicate(&path.index(index).child("ports").index(port_index).child("hostPort"), key);
            } else {
                seen.push(key);
            }
        }
    }
}

fn env(errors: &mut Errors, container: &Value, path: &Path<'_>) {
    for (index, variable) in list(container, "env").iter().enumerate() {
        let path = &path.index(index);
        let name = text(variable, "name");
        if name.is_empty() {
            errors.required(&path.child("name"), "");
        } else {
            errors.all_invalid(&path.child("name"), name, formats::relaxed_env_name(name));
        }
        if let Some(from) = get(variable, "valueFrom") {
            value_from(errors, from, text(variable, "value"), &path.child("valueFrom"));
        }
    }
}

fn value_from(errors: &mut Errors, from: &Value, value: &str, path: &Path<'_>) {
    let mut count = 0;
    if let Some(field) = get(from, "fieldRef") {
        count += 1;
        field_selector(errors, field, ENV_FIELDS, &path.child("fieldRef"));
    }
    if let Some(resource) = get(from, "resourceFieldRef") {
        count += 1;
        resource_selector(errors, resource, false, &path.child("resourceFieldRef"));
    }
    for key in ["configMapKeyRef", "secretKeyRef"] {
        let Some(found) = get(from, key) else { continue };
        count += 1;
        let path = &path.child(key);
        let name = text(found, "name");
        errors.all_invalid(&path.child("name"), name, formats::dns1123_subdomain(name));
        match text(found, "key") {
            "" => errors.required(&path.child("key"), ""),
            key => errors.all_invalid(&path.child("key"), key, formats::config_key(key)),
        }
    }
    if get(from, "fileKeyRef").is_some() {
        count += 1;
    }
    if count == 0 {
        let sources = "`fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
        errors.invalid(path, "", format!("must specify one of: {sources}"));
    } else if !value.is_empty() {
        errors.invalid(path, "", "may not be specified when `value` is not empty");
    } else if count > 1 {
        errors.invalid(path, "", "may not have more than one field specified at a time");
    }
}

/// A `fieldRef`.
pub(super) fn field_selector(errors: &mut Errors, field: &Value, fields: &[&str], path: &Path<'_>) {
    let (version, name) = (text(field, "apiVersion"), text(field, "fieldPath"));
    if version.is_empty() {
        errors.required(&path.child("apiVersion"), "");
        return;
    }
    if name.is_empty() {
        errors.required(&path.child("fieldPath"), "");
        return;
    }
    if version != "v1" {
        let detail = format!("error converting fieldPath: unsupported pod version: {version}");
        errors.invalid(&path.child("fieldPath"), name, detail);
        return;
    }
    let subscripted = name.strip_suffix("']").and_then(|name| name.split_once("['"));
    let known = [
        "metadata.annotations",
        "metadata.labels",
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.serviceAccountName",
        "spec.schedulerName",
        "status.phase",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
        "status.podIPs",
    ];
    let base = subscripted.map_or(name, |(base, _)| base);
    let convertible = match subscripted {
        Some(_) => matches!(base, "metadata.annotations" | "metadata.labels"),
        None => known.contains(&name) || name == "spec.host",
    };
    if !convertible {
        let detail = match subscripted {
            Some(_) => format!("error converting fieldPath: field label does not support subscript: {name}"),
            None => format!("error converting fieldPath: field label not supported: {name}"),
        };
        errors.invalid(&path.child("fieldPath"), name, detail);
        return;
    }
    match subscripted {
        Some(("metadata.annotations", key)) => {
            let key = key.to_lowercase();
            errors.all_invalid(path, &key, formats::label_key(&key));
        }
        Some((_, key)) => errors.all_invalid(path, key, formats::label_key(key)),
        None if !fields.contains(&name) => errors.not_supported(&path.child("fieldPath"), name, fields),
        None => {}
    }
}

/// A `resourceFieldRef`; in volumes it must name a container.
pub(super) fn resource_selector(errors: &mut Errors, resource: &Value, volume: bool, path: &Path<'_>) {
    let name = text(resource, "resource");
    if volume && text(resource, "containerName").is_empty() {
        errors.required(&path.child("containerName"), "");
    } else if name.is_empty() {
        errors.required(&path.child("resource"), "");
    } else if !RESOURCES.contains(&name) && !name.starts_with("limits.hugepages-") && !name.starts_with("requests.hugepages-") {
        errors.not_supported(&path.child("resource"), name, RESOURCES);
    }
    let divisor = text(resource, "divisor");
    if divisor.parse::<Quantity>().map_or(0, |divisor| divisor.sign()) == 0 {
        return;
    }
    const SIZES: &[&str] = &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let sizes = |what: &str| {
        format!("only divisor's values 1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei are supported with the {what} resource")
    };
    let (good, detail) = match name.split_once('.').map_or("", |(_, name)| name) {
        "cpu" => (matches!(divisor, "1m" | "1"), "only divisor's values 1m and 1 are supported with the cpu resource".to_owned()),
        "memory" => (SIZES.contains(&divisor), sizes("memory")),
        "ephemeral-storage" => (SIZES.contains(&divisor), sizes("local ephemeral storage")),
        other if other.starts_with("hugepages-") => (SIZES.contains(&divisor), sizes("hugepages")),
        _ => return,
    };
    if !good {
        errors.invalid(&path.child("divisor"), name, detail);
    }
}

fn env_from(errors: &mut Errors, container: &Value, path: &Path<'_>) {
    for (index, from) in list(container, "envFrom").iter().enumerate() {
        let indexed = path.index(index);
        let prefix = text(from, "prefix");
        if !prefix.is_empty() {
            errors.all_invalid(&indexed.child("prefix"), prefix, formats::relaxed_env_name(prefix));
        }
        let mut count = 0;
        for key in ["configMapRef", "secretRef"] {
            let Some(found) = get(from, key) else { continue };
            count += 1;
            let (path, name) = (indexed.child(key), text(found, "name"));
            if name.is_empty() {
                errors.required(&path.child("name"), "");
            } else {
                errors.all_invalid(&path.child("name"), name, formats::dns1123_subdomain(name));
            }
        }
        match count {
            0 => errors.invalid(path, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => errors.invalid(path, "", "may not have more than one field specified at a time"),
        }
    }
}

fn mounts(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &Path<'_>) {
    let devices = list(container, "volumeDevices");
    let mut points: Vec<&str> = Vec::new();
    for (index, mount) in list(container, "volumeMounts").iter().enumerate() {
        let indexed = path.index(index);
        let (name, point) = (text(mount, "name"), text(mount, "mountPath"));
        if name.is_empty() {
            errors.required(&indexed.child("name"), "");
        }
        if !context.volumes.contains(&name) {
            errors.push(crate::field_error::FieldError::not_found(indexed.child("name"), name));
        }
        if point.is_empty() {
            errors.required(&indexed.child("mountPath"), "");
        }
        if points.contains(&point) {
            errors.invalid(&indexed.child("mountPath"), point, "must be unique");
        }
        points.push(point);
        if devices.iter().any(|device| text(device, "name") == name) {
            errors.invalid(&indexed.child("name"), name, "must not already exist in volumeDevices");
        }
        if devices.iter().any(|device| text(device, "devicePath") == point) {
            errors.invalid(&indexed.child("mountPath"), point, "must not already exist as a path in volumeDevices");
        }
        let (sub_path, expression) = (text(mount, "subPath"), text(mount, "subPathExpr"));
        if !sub_path.is_empty() {
            descending_path(errors, sub_path, &path.child("subPath"));
        }
        if !expression.is_empty() {
            if !sub_path.is_empty() {
                errors.invalid(&indexed.child("subPathExpr"), expression, "subPathExpr and subPath are mutually exclusive");
            }
            descending_path(errors, expression, &path.child("subPathExpr"));
        }
        propagation(errors, container, mount, path);
    }
}

fn propagation(errors: &mut Errors, container: &Value, mount: &Value, path: &Path<'_>) {
    let mode = text(mount, "mountPropagation");
    errors.one_of(&path.child("mountPropagation"), mode, &["Bidirectional", "HostToContainer", "None"]);
    let privileged = get(container, "securityContext").is_some_and(|context| flag(context, "privileged"));
    if mode == "Bidirectional" && !privileged {
        let detail = "Bidirectional mount propagation is available only to privileged containers";
        errors.forbidden(&path.child("mountPropagation"), detail);
    }
    let path = path.child("recursiveReadOnly");
    match text(mount, "recursiveReadOnly") {
        "" | "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if !flag(mount, "readOnly") {
                errors.forbidden(&path, "may only be specified when readOnly is true");
            }
            if !matches!(mode, "" | "None") {
                errors.forbidden(&path, "may only be specified when mountPropagation is None or not specified");
            }
        }
        other => errors.not_supported(&path, other, &["Disabled", "Enabled", "IfPossible"]),
    }
}

fn resize_policy(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &Path<'_>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, policy) in list(container, "resizePolicy").iter().enumerate() {
        let (resource, restart) = (text(policy, "resourceName"), text(policy, "restartPolicy"));
        if seen.contains(&resource) {
            errors.duplicate(&path.index(index), resource);
        }
        seen.push(resource);
        for (value, supported) in [(resource, &["cpu", "memory"]), (restart, &["NotRequired", "RestartContainer"])] {
            if value.is_empty() {
                errors.required(path, "");
            } else {
                errors.one_of(path, value, supported);
            }
        }
        if context.restart_policy == "Never" && restart != "NotRequired" {
            errors.invalid(path, restart, "must be 'NotRequired' when pod `restartPolicy` is 'Never'");
        }
    }
}

fn restart_rules(errors: &mut Errors, container: &Value, path: &Path<'_>) {
    let rules = list(container, "restartPolicyRules");
    let policy_path = path.child("restartPolicy");
    match get(container, "restartPolicy").and_then(Value::as_str) {
        None if rules.is_empty() => return,
        None => errors.required(&policy_path, "must specify restartPolicy when restart rules are used"),
        Some(policy) if !matches!(policy, "Always" | "Never" | "OnFailure") => {
            errors.not_supported(&policy_path, policy, &["Always", "Never", "OnFailure"]);
        }
        Some(_) => {}
    }
    let rules_path = path.child("restartPolicyRules");
    if rules.len() > 20 {
        errors.push(crate::field_error::FieldError::too_many(&rules_path, rules.len(), 20));
    }
    for (index, rule) in rules.iter().enumerate() {
        let path = &rules_path.index(index);
        if !matches!(text(rule, "action"), "Restart" | "RestartAllContainers") {
            errors.not_supported(&path.child("action"), text(rule, "action"), &["Restart", "RestartAllContainers"]);
        }
        match get(rule, "exitCodes") {
            None => errors.required(&path.child("exitCodes"), "must be specified"),
            Some(codes) if !matches!(text(codes, "operator"), "In" | "NotIn") => {
                errors.not_supported(&path.child("exitCodes").child("operator"), text(codes, "operator"), &["In", "NotIn"]);
            }
            Some(_) => {}
        }
    }
}

fn lifecycle(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &Path<'_>) {
    let Some(lifecycle) = get(container, "lifecycle") else { return };
    for key in ["postStart", "preStop"] {
        if let Some(hook) = get(lifecycle, key) {
            handler(errors, hook, context, &path.child("lifecycle").child(key));
        }
    }
}

fn handler(errors: &mut Errors, handler: &Value, context: &Context<'_>, path: &Path<'_>) {
    let mut count = 0;
    for kind in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let Some(action) = get(handler, kind) else { continue };
        let path = &path.child(kind);
        count += 1;
        if count > 1 {
            errors.forbidden(path, "may not specify more than 1 handler type");
            continue;
        }
        match kind {
            "exec" if list(action, "command").is_empty() => errors.required(&path.child("command"), ""),
            "httpGet" => http_get(errors, action, path),
            "tcpSocket" | "grpc" => port_or_name(errors, get(action, "port"), &path.child("port")),
            "sleep" => {
                let seconds = number(action, "seconds").unwrap_or(0);
                if let Some(grace) = context.grace_seconds.filter(|grace| seconds < 0 || seconds > *grace) {
                    let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
                    errors.invalid(path, seconds, detail);
                }
            }
            _ => {}
        }
    }
    if count == 0 {
        errors.required(path, "must specify a handler type");
    }
}

fn http_get(errors: &mut Errors, action: &Value, path: &Path<'_>) {
    if text(action, "path").is_empty() {
        errors.required(&path.child("path"), "");
    }
    port_or_name(errors, get(action, "port"), &path.child("port"));
    errors.one_of(&path.child("scheme"), text(action, "scheme"), &["HTTP", "HTTPS"]);
    for header in list(action, "httpHeaders") {
        let name = text(header, "name");
        errors.all_invalid(&path.child("httpHeaders"), name, formats::http_header_name(name));
    }
}

fn probes(errors: &mut Errors, container: &Value, context: &Context<'_>, path: &Path<'_>) {
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = get(container, key) else { continue };
        let path = &path.child(key);
        handler(errors, probe, context, path);
        for key in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
            errors.nonnegative(&path.child(key), number(probe, key));
        }
        let grace = path.child("terminationGracePeriodSeconds");
        if let Some(seconds) = number(probe, "terminationGracePeriodSeconds").filter(|seconds| *seconds <= 0) {
            errors.invalid(&grace, seconds, "must be greater than 0");
        }
        if key == "readinessProbe" {
            if let Some(seconds) = number(probe, "terminationGracePeriodSeconds") {
                errors.invalid(&grace, seconds, "must not be set for readinessProbes");
            }
        } else if number(probe, "successThreshold").unwrap_or(0) != 1 {
            errors.invalid(&path.child("successThreshold"), number(probe, "successThreshold").unwrap_or(0), "must be 1");
        }
    }
}
