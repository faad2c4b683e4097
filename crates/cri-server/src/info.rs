//! What verbose answers and Status say beyond the states.

use std::collections::HashMap;

use protocols::cri::v1::{RuntimeCondition, RuntimeFeatures, RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusResponse};
use serde_json::json;

use crate::container::read_spec;
use crate::error::Error;
use crate::server::Server;
use crate::state::{Container, ContainerState, Sandbox};

fn info(value: &serde_json::Value) -> HashMap<String, String> {
    [("info".to_owned(), value.to_string())].into()
}

/// The verbose part of PodSandboxStatus.
pub fn sandbox(sandbox: &Sandbox) -> HashMap<String, String> {
    let facts = sandbox.facts();
    let shim = facts.shim.map(|shim| json!({ "address": shim.address, "version": shim.version }));
    info(&json!({
        "pid": facts.pid,
        "netNS": sandbox.netns,
        "shim": shim,
        "stateDir": sandbox.dir,
        "runtimeHandler": sandbox.runtime_handler,
    }))
}

/// The verbose part of ContainerStatus.
pub fn container(container: &Container) -> HashMap<String, String> {
    let pid = match container.state() {
        ContainerState::Running { pid, .. } => pid,
        _ => 0,
    };
    // What cannot be read is left out.
    let spec = read_spec(&container.bundle().join("config.json")).ok();
    info(&json!({
        "sandboxID": container.sandbox_id,
        "pid": pid,
        "snapshotKey": container.id,
        "snapshotter": "overlayfs",
        "cgroupsPath": container.cgroups_path,
        "runtimeSpec": spec,
    }))
}

/// The answer of Status.
pub fn status(server: &Server, verbose: bool, runtime: Option<Error>, network: Result<network::Status, network::Error>) -> StatusResponse {
    let condition = |kind: &str, reason: &str, message: Option<String>| RuntimeCondition {
        r#type: kind.to_owned(),
        status: message.is_none(),
        reason: if message.is_some() { reason.to_owned() } else { String::new() },
        message: message.unwrap_or_default(),
    };
    let network_name = network.as_ref().ok().map(|status| status.network.clone());
    let runtime_message = runtime.map(|error| error.chain());
    let network_message = network.err().map(|error| error_chain(&error));
    let mut response = StatusResponse {
        status: Some(RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", "KeeperNotReady", runtime_message),
                condition("NetworkReady", "NetworkPluginNotReady", network_message),
            ],
        }),
        runtime_handlers: runtime_handlers(server),
        features: Some(RuntimeFeatures { supplemental_groups_policy: true, ..RuntimeFeatures::default() }),
        ..StatusResponse::default()
    };
    if verbose {
        let config = &server.config;
        let text = json!({
            "root": config.root,
            "state": config.state,
            "podCIDR": config.pod_cidr,
            "network": network_name,
            "runtimes": server.handlers.all().map(|handler| (handler.name.clone(), json!(handler))).collect::<serde_json::Map<_, _>>(),
            "cgroupV2": server.host.cgroup_v2,
            "swapAccounting": server.host.swap_accounting,
            "streamServer": server.stream_url,
        });
        response.info.insert("config".to_owned(), text.to_string());
    }
    response
}

/// The empty name is the default's.
fn runtime_handlers(server: &Server) -> Vec<RuntimeHandler> {
    let features = RuntimeHandlerFeatures { recursive_read_only_mounts: server.host.recursive_read_only, user_namespaces: false };
    let names = std::iter::once("").chain(server.handlers.all().map(|handler| handler.name.as_str()));
    names.map(|name| RuntimeHandler { name: name.to_owned(), features: Some(features) }).collect()
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
