//! Services. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `validateService`.

use std::net::IpAddr;

use serde_json::Value;

use super::container::port_or_name;
use super::meta;
use super::pod::ip;
use super::support::{Errors, Path, get, list, number, text};
use crate::formats;

const TYPES: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

/// A Service to be created, or updated from `old`.
pub(super) fn service(errors: &mut Errors, service: &Value, old: Option<&Value>) {
    let Some(spec) = get(service, "spec") else { return };
    let path = Path::new("spec");
    let kind = text(spec, "type");
    if let Some(old) = old.and_then(|old| get(old, "spec")) {
        cluster_ips_kept(errors, spec, old, &path.child("clusterIPs"));
    }
    type_rules(errors, spec, kind, &path);
    let headless = text(spec, "clusterIP") == "None";
    let ports_path = path.child("ports");
    if list(spec, "ports").is_empty() && !headless && kind != "ExternalName" {
        errors.required(&ports_path, "");
    }
    ports(errors, spec, &ports_path);
    if get(spec, "selector").is_some() {
        meta::labels(errors, spec, "selector", &path.child("selector"));
    }
    affinity(errors, spec, &path);
    cluster_ips(errors, spec, kind, &path);
    external_ips(errors, spec, &path.child("externalIPs"));
    if kind.is_empty() {
        errors.required(&path.child("type"), "");
    } else {
        errors.one_of(&path.child("type"), kind, TYPES);
    }
    node_ports(errors, spec, kind, &ports_path);
    duplicate_ports(errors, spec, &ports_path);
    balancer(errors, spec, kind, &path);
    policies(errors, spec, kind, &path);
}

fn cluster_ips_kept(errors: &mut Errors, spec: &Value, old: &Value, path: &Path<'_>) {
    let (new_ips, old_ips) = (list(spec, "clusterIPs"), list(old, "clusterIPs"));
    let has_ips = |spec: &Value| text(spec, "type") != "ExternalName";
    if !has_ips(spec) || !has_ips(old) {
        return;
    }
    if let (Some(before), new) = (old_ips.first(), new_ips.first())
        && before.as_str() != Some("")
    {
        match new {
            None => errors.invalid(&path.index(0), Value::Array(new_ips.to_vec()), "primary clusterIP can not be unset"),
            Some(now) if now != before => errors.invalid(&path.index(0), Value::Array(new_ips.to_vec()), "may not change once set"),
            Some(_) => {}
        }
    }
}

/// What a type wants or forbids.
fn type_rules(errors: &mut Errors, spec: &Value, kind: &str, path: &Path<'_>) {
    let headless = text(spec, "clusterIP") == "None";
    match kind {
        "LoadBalancer" | "NodePort" if headless => {
            let what = if kind == "NodePort" { "NodePort" } else { "LoadBalancer" };
            let detail = format!("may not be set to 'None' for {what} services");
            errors.invalid(&path.child("clusterIPs").index(0), "None", detail);
        }
        "ExternalName" => {
            if !list(spec, "clusterIPs").is_empty() {
                errors.forbidden(&path.child("clusterIPs"), "may not be set for ExternalName services");
            }
            let name = text(spec, "externalName");
            let name = name.strip_suffix('.').unwrap_or(name);
            if name.is_empty() {
                errors.required(&path.child("externalName"), "");
            } else {
                errors.all_invalid(&path.child("externalName"), name, formats::dns1123_subdomain(name));
            }
        }
        _ => {}
    }
}

fn ports(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let ports = list(spec, "ports");
    let mut names: Vec<&str> = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let path = &path.index(index);
        let name = text(port, "name");
        if name.is_empty() {
            if ports.len() > 1 {
                errors.required(&path.child("name"), "");
            }
        } else {
            errors.all_invalid(&path.child("name"), name, formats::dns1123_label(name));
            if names.contains(&name) {
                errors.duplicate(&path.child("name"), name);
            }
            names.push(name);
        }
        let number = number(port, "port").unwrap_or(0);
        for text in formats::port_number(number) {
            errors.invalid(&path.child("port"), number, text);
        }
        match text(port, "protocol") {
            "" => errors.required(&path.child("protocol"), ""),
            protocol => errors.one_of(&path.child("protocol"), protocol, &["SCTP", "TCP", "UDP"]),
        }
        port_or_name(errors, get(port, "targetPort"), &path.child("targetPort"));
        if let Some(protocol) = get(port, "appProtocol").and_then(Value::as_str) {
            errors.all_invalid(&path.child("appProtocol"), protocol, formats::label_key(protocol));
        }
    }
}

fn affinity(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let config = path.child("sessionAffinityConfig");
    match text(spec, "sessionAffinity") {
        "" => errors.required(&path.child("sessionAffinity"), ""),
        "ClientIP" => {
            let seconds = spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").and_then(Value::as_i64);
            let client = config.child("clientIP");
            let timeout = client.child("timeoutSeconds");
            match seconds {
                None => errors.required(&timeout, "when session affinity type is ClientIP"),
                Some(seconds) if !(1..=86_400).contains(&seconds) => {
                    errors.invalid(&timeout, seconds, "must be greater than 0 and less than 86400");
                }
                Some(_) => {}
            }
        }
        "None" if get(spec, "sessionAffinityConfig").is_some() => {
            errors.forbidden(&config, "must not be set when session affinity is None");
        }
        other => errors.one_of(&path.child("sessionAffinity"), other, &["ClientIP", "None"]),
    }
}

fn cluster_ips(errors: &mut Errors, spec: &Value, kind: &str, path: &Path<'_>) {
    if kind == "ExternalName" {
        return;
    }
    let (ips_path, families_path) = (path.child("clusterIPs"), path.child("ipFamilies"));
    let (first, ips) = (text(spec, "clusterIP"), list(spec, "clusterIPs"));
    let shown = || Value::Array(ips.to_vec());
    if !first.is_empty() && ips.is_empty() {
        errors.required(&ips_path, "");
    } else if !first.is_empty() && ips[0] != first {
        errors.invalid(&ips_path, shown(), "first value must match `clusterIP`");
    } else if first.is_empty() && !ips.is_empty() {
        errors.invalid(&ips_path, shown(), "must be empty when `clusterIP` is not specified");
    }
    let families: Vec<&str> = list(spec, "ipFamilies").iter().filter_map(Value::as_str).collect();
    for (index, family) in families.iter().enumerate() {
        errors.one_of(&families_path.index(index), family, &["IPv4", "IPv6"]);
        if families[..index].contains(family) {
            errors.duplicate(&families_path.index(index), *family);
        }
    }
    let policies = &["PreferDualStack", "RequireDualStack", "SingleStack"];
    errors.one_of(&path.child("ipFamilyPolicy"), text(spec, "ipFamilyPolicy"), policies);
    let before = errors.len();
    for (index, address) in ips.iter().filter_map(Value::as_str).enumerate() {
        if index == 0 && address == "None" {
            if ips.len() > 1 {
                errors.invalid(&ips_path, shown(), "'None' must be the first and only value");
            }
            continue;
        }
        ip(errors, address, &ips_path.index(index));
    }
    let invalid = errors.len() != before;
    if ips.len() > 2 {
        errors.invalid(&ips_path, shown(), "may only hold up to 2 values");
    }
    if invalid {
        return;
    }
    let is_v6 = |ip: &Value| ip.as_str().is_some_and(|ip| ip.contains(':'));
    if ips.len() > 1 && !(ips.iter().any(is_v6) && ips.iter().any(|ip| !is_v6(ip))) {
        errors.invalid(&ips_path, shown(), "may specify no more than one IP for each IP family");
    }
    for (index, (address, family)) in ips.iter().zip(&families).enumerate().filter(|_| first != "None") {
        let wanted = if is_v6(address) { "IPv6" } else { "IPv4" };
        if *family != wanted {
            let detail = format!("expected an {family} value as indicated by `ipFamilies[{index}]`");
            errors.invalid(&ips_path.index(index), address.clone(), detail);
        }
    }
}

fn external_ips(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    for (index, address) in list(spec, "externalIPs").iter().filter_map(Value::as_str).enumerate() {
        let before = errors.len();
        ip(errors, address, &path.index(index));
        if errors.len() == before {
            endpoint_ip(errors, address, &path.index(index));
        }
    }
}

/// An address that must be reachable from elsewhere.
pub(super) fn endpoint_ip(errors: &mut Errors, address: &str, path: &Path<'_>) {
    let Ok(parsed) = address.parse::<IpAddr>() else { return };
    if parsed.is_unspecified() {
        errors.invalid(path, address, "may not be unspecified (0.0.0.0 or ::)");
    }
    if parsed.is_loopback() {
        errors.invalid(path, address, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    let (unicast, multicast) = match parsed {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(ip) => (ip.segments()[0] & 0xffc0 == 0xfe80, ip.segments()[0] & 0xff0f == 0xff02),
    };
    if unicast {
        errors.invalid(path, address, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if multicast {
        errors.invalid(path, address, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

fn node_ports(errors: &mut Errors, spec: &Value, kind: &str, path: &Path<'_>) {
    let ports = list(spec, "ports");
    let mut seen: Vec<(&str, i64)> = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let Some(number) = number(port, "nodePort").filter(|number| *number != 0) else { continue };
        let path = path.index(index);
        let path = path.child("nodePort");
        if kind == "ClusterIP" {
            errors.forbidden(&path, "may not be used when `type` is 'ClusterIP'");
            continue;
        }
        let key = (text(port, "protocol"), number);
        if seen.contains(&key) {
            errors.duplicate(&path, number);
        }
        seen.push(key);
    }
}

fn duplicate_ports(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let mut seen: Vec<(&str, i64)> = Vec::new();
    for (index, port) in list(spec, "ports").iter().enumerate() {
        let key = (text(port, "protocol"), number(port, "port").unwrap_or(0));
        if seen.contains(&key) {
            errors.duplicate(&path.index(index), Value::Null);
            let (protocol, number) = (Value::from(key.0), key.1);
            errors.show_last(&format!(
                "{{\"Name\":\"\",\"Protocol\":{protocol},\"AppProtocol\":null,\"Port\":{number},\"TargetPort\":0,\"NodePort\":0}}"
            ));
        }
        seen.push(key);
    }
}

fn balancer(errors: &mut Errors, spec: &Value, kind: &str, path: &Path<'_>) {
    let ranges = list(spec, "loadBalancerSourceRanges");
    let ranges_path = path.child("LoadBalancerSourceRanges");
    if !ranges.is_empty() {
        if kind != "LoadBalancer" {
            errors.forbidden(&ranges_path, "may only be used when `type` is 'LoadBalancer'");
        }
        for (index, range) in ranges.iter().filter_map(Value::as_str).enumerate() {
            cidr(errors, range.trim(), &ranges_path.index(index));
        }
    }
    if get(spec, "allocateLoadBalancerNodePorts").is_some() && kind != "LoadBalancer" {
        errors.forbidden(&path.child("allocateLoadBalancerNodePorts"), "may only be used when `type` is 'LoadBalancer'");
    }
    if let Some(class) = get(spec, "loadBalancerClass").and_then(Value::as_str) {
        if kind == "LoadBalancer" {
            errors.all_invalid(&path.child("loadBalancerClass"), class, formats::label_key(class));
        } else {
            errors.forbidden(&path.child("loadBalancerClass"), "may only be used when `type` is 'LoadBalancer'");
        }
    }
}

/// A CIDR.
pub(super) fn cidr(errors: &mut Errors, value: &str, path: &Path<'_>) {
    let parsed = value.split_once('/').and_then(|(address, bits)| Some((address.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?)));
    if parsed.is_none_or(|(address, bits)| bits > if address.is_ipv4() { 32 } else { 128 }) {
        errors.invalid(path, value, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
    }
}

fn policies(errors: &mut Errors, spec: &Value, kind: &str, path: &Path<'_>) {
    let external = text(spec, "externalTrafficPolicy");
    let accessible = matches!(kind, "LoadBalancer" | "NodePort") || (kind == "ClusterIP" && !list(spec, "externalIPs").is_empty());
    let external_path = path.child("externalTrafficPolicy");
    if !accessible {
        if !external.is_empty() {
            errors.invalid(&external_path, external, "may only be set for externally-accessible services");
        }
    } else if external.is_empty() {
        errors.required(&external_path, "");
    } else {
        errors.one_of(&external_path, external, &["Cluster", "Local"]);
    }
    let health = number(spec, "healthCheckNodePort").unwrap_or(0);
    if health != 0 && !(kind == "LoadBalancer" && external == "Local") {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.invalid(&path.child("healthCheckNodePort"), health, detail);
    }
    errors.one_of(&path.child("internalTrafficPolicy"), text(spec, "internalTrafficPolicy"), &["Cluster", "Local"]);
    let distributions = &["PreferClose", "PreferSameZone", "PreferSameNode"];
    errors.one_of(&path.child("trafficDistribution"), text(spec, "trafficDistribution"), distributions);
}
