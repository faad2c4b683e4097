//! CNI 1.1 as a runtime executes it: configuration lists, plugins, prevResult, capabilities, cached results.
//!
//! Facts: containernetworking/cni SPEC.md 1.1.0; which capabilities a Kubernetes runtime offers: containerd 2.x `internal/cri/server/sandbox_run.go`.

mod conf;
mod exec;
#[cfg(test)]
mod fuzz;

use std::net::IpAddr;

use camino::Utf8PathBuf;
use serde_json::{Map, Value, json};

pub(crate) use conf::{ConfList, load};
pub(crate) use exec::Invocation;

use crate::config::{PodNetwork, Protocol};

/// The first version whose DEL gets prevResult and that has CHECK.
const WITH_CHECK: (u32, u32, u32) = (0, 4, 0);
/// The first version with STATUS and GC.
const WITH_STATUS: (u32, u32, u32) = (1, 1, 0);

/// What went wrong with a configuration or a plugin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory or a file in it could not be read.
    #[error("failed to read CNI configuration {path}")]
    Read { path: Utf8PathBuf, source: std::io::Error },
    /// A configuration that is no JSON.
    #[error("failed to parse CNI configuration {path}")]
    Parse { path: Utf8PathBuf, source: serde_json::Error },
    /// A configuration that the specification forbids.
    #[error("bad CNI configuration {path}: {what}")]
    Invalid { path: Utf8PathBuf, what: String },
    /// No such plugin in the plugin directories.
    #[error("CNI plugin {plugin:?} is in none of {dirs:?}")]
    PluginMissing { plugin: String, dirs: Vec<Utf8PathBuf> },
    /// The plugin could not be started, or did not end in time.
    #[error("failed to {act} CNI plugin {plugin}")]
    Execute { act: &'static str, plugin: String, source: std::io::Error },
    /// The plugin said no; code and texts are its own.
    #[error("CNI plugin {plugin} failed {command}: {message} (code {code}){}", if details.is_empty() { String::new() } else { format!(": {details}") })]
    Plugin { plugin: String, command: &'static str, code: u64, message: String, details: String },
    /// The plugin's answer is no result.
    #[error("CNI plugin {plugin} gave a bad result: {what}")]
    Result { plugin: String, what: String },
}

/// The capability arguments of a pod: what `runtimeConfig` may carry, for plugins that declare it.
pub(crate) fn capabilities(pod: &PodNetwork) -> Map<String, Value> {
    let mut all = Map::new();
    let ports: Vec<Value> = pod
        .port_mappings
        .iter()
        .filter(|m| m.host_port != 0)
        .map(|m| {
            json!({
                "hostPort": m.host_port,
                "containerPort": m.container_port,
                "protocol": Protocol::as_str(m.protocol),
                "hostIP": m.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".into(), ports.into());
    }
    if let Some(limit) = pod.bandwidth {
        let mut bandwidth = Map::new();
        for (direction, rate) in [("ingress", limit.ingress_bits_per_second), ("egress", limit.egress_bits_per_second)] {
            if rate != 0 {
                bandwidth.insert(format!("{direction}Rate"), rate.into());
                bandwidth.insert(format!("{direction}Burst"), u32::MAX.into());
            }
        }
        all.insert("bandwidth".into(), bandwidth.into());
    }
    if !pod.requested_ips.is_empty() {
        all.insert("ips".into(), pod.requested_ips.clone().into());
    }
    if let Some(path) = &pod.cgroup_path {
        all.insert("cgroupPath".into(), path.clone().into());
    }
    if let Some(dns) = &pod.dns {
        all.insert("dns".into(), json!(dns));
    }
    all.insert("io.kubernetes.cri.pod-annotations".into(), json!(pod.annotations));
    all
}

/// `CNI_ARGS` of a pod.
pub(crate) fn args(pod: &PodNetwork) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.sandbox_id, pod.uid
    )
}

/// ADD of all plugins in order; the last result.
///
/// # Errors
/// The first failure. What the plugins before it did is not undone here: the caller runs [`delete`].
pub(crate) fn add(list: &ConfList, call: &Invocation<'_>, capabilities: &Map<String, Value>) -> Result<Value, Error> {
    let mut previous: Option<Value> = None;
    for plugin in &list.plugins {
        let conf = list.plugin_conf(plugin, capabilities, previous.as_ref());
        let kind = conf::plugin_type(plugin);
        let mut result =
            call.run("ADD", kind, &conf)?.ok_or_else(|| Error::Result { plugin: kind.to_owned(), what: "it printed nothing".into() })?;
        if !result.is_object() {
            return Err(Error::Result { plugin: kind.to_owned(), what: "expected a JSON object".into() });
        }
        if result.get("cniVersion").is_none() {
            result["cniVersion"] = "0.1.0".into();
        }
        previous = Some(result);
    }
    Ok(previous.unwrap_or(Value::Null))
}

/// DEL of all plugins in reverse order, each tried whatever the others say.
///
/// # Errors
/// The first failure, after all were tried.
pub(crate) fn delete(
    list: &ConfList,
    call: &Invocation<'_>,
    capabilities: &Map<String, Value>,
    cached: Option<&Value>,
) -> Result<(), Error> {
    let cached = cached.filter(|_| list.version >= WITH_CHECK);
    let mut first = None;
    for plugin in list.plugins.iter().rev() {
        let conf = list.plugin_conf(plugin, capabilities, cached);
        if let Err(e) = call.run("DEL", conf::plugin_type(plugin), &conf) {
            first.get_or_insert(e);
        }
    }
    first.map_or(Ok(()), Err)
}

/// CHECK of all plugins in order, where version and configuration have it.
///
/// # Errors
/// The first failure.
pub(crate) fn check(
    list: &ConfList,
    call: &Invocation<'_>,
    capabilities: &Map<String, Value>,
    cached: Option<&Value>,
) -> Result<(), Error> {
    if list.disable_check || list.version < WITH_CHECK {
        return Ok(());
    }
    for plugin in &list.plugins {
        call.run("CHECK", conf::plugin_type(plugin), &list.plugin_conf(plugin, capabilities, cached))?;
    }
    Ok(())
}

/// STATUS of all plugins: whether the network can take pods.
///
/// # Errors
/// The first plugin's refusal, or a plugin that is missing (also before 1.1, where there is no STATUS).
pub(crate) fn status(list: &ConfList, call: &Invocation<'_>) -> Result<(), Error> {
    for plugin in &list.plugins {
        let kind = conf::plugin_type(plugin);
        call.find(kind)?;
        if list.version >= WITH_STATUS {
            call.run("STATUS", kind, &list.plugin_conf(plugin, &Map::new(), None))?;
        }
    }
    Ok(())
}

/// GC of all plugins: everything but `attachments` (container id, interface) may be freed.
///
/// # Errors
/// The first failure, after all were tried.
pub(crate) fn collect(list: &ConfList, call: &Invocation<'_>, attachments: &[(String, String)]) -> Result<(), Error> {
    if list.disable_gc || list.version < WITH_STATUS {
        return Ok(());
    }
    let valid: Vec<Value> = attachments.iter().map(|(id, name)| json!({"containerID": id, "ifname": name})).collect();
    let mut first = None;
    for plugin in &list.plugins {
        let mut conf = list.plugin_conf(plugin, &Map::new(), None);
        conf["cni.dev/valid-attachments"] = valid.clone().into();
        conf["cni.dev/attachments"] = valid.clone().into();
        if let Err(e) = call.run("GC", conf::plugin_type(plugin), &conf) {
            first.get_or_insert(e);
        }
    }
    first.map_or(Ok(()), Err)
}

/// The addresses that a result gives the pod, IPv4 first: those of interfaces inside the sandbox, or of none in particular.
pub(crate) fn result_ips(result: &Value) -> Vec<IpAddr> {
    let parse = |text: &Value| text.as_str()?.split('/').next()?.parse::<IpAddr>().ok();
    let mut ips: Vec<IpAddr> = ["ip4", "ip6"].iter().filter_map(|family| parse(&result[*family]["ip"])).collect();
    for ip in result["ips"].as_array().into_iter().flatten() {
        let outside = ip["interface"]
            .as_u64()
            .and_then(|index| result["interfaces"].get(index as usize))
            .is_some_and(|interface| interface["sandbox"].as_str().unwrap_or("").is_empty());
        if !outside {
            ips.extend(parse(&ip["address"]));
        }
    }
    ips.sort_by_key(IpAddr::is_ipv6);
    ips
}
