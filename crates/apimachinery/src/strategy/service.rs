//! What creation and updates do to a Service before its addresses are allocated.
//!
//! Source: kubernetes v1.37 `pkg/registry/core/service/{strategy,storage/storage}.go`.

use serde_json::{Value, json};

fn text<'a>(service: &'a Value, path: &str) -> &'a str {
    service.pointer(path).and_then(Value::as_str).unwrap_or("")
}

/// `clusterIP` alone stands for both fields.
pub(super) fn create(object: &mut Value) {
    let ip = text(object, "/spec/clusterIP").to_owned();
    if !ip.is_empty() && object.pointer("/spec/clusterIPs").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        object["spec"]["clusterIPs"] = json!([ip]);
    }
}

/// An update: keeps what was allocated where the client left it out, brings the two address fields together, and sheds what only the
/// old type had.
pub(super) fn update(object: &mut Value, old: &Value) {
    let same_ips = object.pointer("/spec/clusterIPs") == old.pointer("/spec/clusterIPs");
    let (ip, old_ip) = (text(object, "/spec/clusterIP").to_owned(), text(old, "/spec/clusterIP").to_owned());
    if same_ips && ip != old_ip {
        if ip.is_empty() {
            remove(object, &["clusterIPs"]);
        } else if let Some(first) = object.pointer_mut("/spec/clusterIPs/0") {
            *first = ip.into();
        }
    }
    create(object);
    keep_allocated(object, old);
    drop_type_dependent(object, old);
}

fn keep_allocated(object: &mut Value, old: &Value) {
    let has_ip = |kind: &str| matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer");
    let (new_type, old_type) = (service_type(object).to_owned(), service_type(old).to_owned());
    let absent = |object: &Value, key: &str| object["spec"].get(key).is_none_or(Value::is_null);
    if has_ip(&new_type) && has_ip(&old_type) {
        if text(object, "/spec/clusterIP").is_empty() && absent(object, "clusterIPs") {
            for key in ["clusterIP", "clusterIPs"] {
                if let Some(value) = old["spec"].get(key) {
                    object["spec"][key] = value.clone();
                }
            }
        }
        for key in ["ipFamilies", "ipFamilyPolicy"] {
            if let (true, Some(value)) = (absent(object, key), old["spec"].get(key)) {
                object["spec"][key] = value.clone();
            }
        }
    }
    let has_ports = |kind: &str| matches!(kind, "NodePort" | "LoadBalancer");
    if has_ports(&new_type) && has_ports(&old_type) {
        let key = |port: &Value| (port["protocol"].clone(), port["port"].clone());
        let before = old.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
        for port in object.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
            let number = port.get("nodePort").and_then(Value::as_i64).unwrap_or(0);
            let known = before.iter().find(|old| key(old) == key(port)).and_then(|old| old.get("nodePort"));
            if let (0, Some(known)) = (number, known) {
                port["nodePort"] = known.clone();
            }
        }
    }
    let health = |service: &Value| text(service, "/spec/externalTrafficPolicy") == "Local" && service_type(service) == "LoadBalancer";
    if let (true, true, Some(port)) =
        (health(object) && health(old), absent(object, "healthCheckNodePort"), old["spec"].get("healthCheckNodePort"))
    {
        object["spec"]["healthCheckNodePort"] = port.clone();
    }
}

fn service_type(service: &Value) -> &str {
    service.pointer("/spec/type").and_then(Value::as_str).unwrap_or("")
}

/// A Service that changes its type sheds what only the old type has, when the client left it as it was.
///
/// Source: kubernetes v1.37 `pkg/registry/core/service/strategy.go`, `dropTypeDependentFields`.
fn drop_type_dependent(object: &mut Value, old: &Value) {
    let (new_type, old_type) = (service_type(object).to_owned(), service_type(old).to_owned());
    let same = |object: &Value, key: &str| object.pointer(key) == old.pointer(key);
    let has_node_ports = |name: &str| matches!(name, "NodePort" | "LoadBalancer");
    if old_type != "ExternalName" && new_type == "ExternalName" && same(object, "/spec/clusterIP") && same(object, "/spec/clusterIPs") {
        remove(object, &["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"]);
    }
    let node_ports = |object: &Value| -> Vec<Value> {
        let ports = object.pointer("/spec/ports").and_then(Value::as_array);
        ports.into_iter().flatten().map(|port| port.get("nodePort").cloned().unwrap_or(Value::Null)).collect()
    };
    if has_node_ports(&old_type) && !has_node_ports(&new_type) {
        if node_ports(object) == node_ports(old) {
            for port in object.pointer_mut("/spec/ports").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Value::Object(port) = port {
                    port.remove("nodePort");
                }
            }
        }
        if same(object, "/spec/externalTrafficPolicy") {
            remove(object, &["externalTrafficPolicy"]);
        }
    }
    if old_type == "LoadBalancer" && new_type != "LoadBalancer" {
        for key in ["allocateLoadBalancerNodePorts", "loadBalancerClass", "healthCheckNodePort"] {
            if same(object, &format!("/spec/{key}")) {
                remove(object, &[key]);
            }
        }
    }
}

fn remove(object: &mut Value, keys: &[&str]) {
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        spec.retain(|key, _| !keys.contains(&key.as_str()));
    }
}
