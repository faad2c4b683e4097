//! `ServiceAccount`: every pod has a service account, and its token mounted unless someone says no
//! (upstream: `plugin/pkg/admission/serviceaccount`).

use apimachinery::status::Status;
use serde_json::{Value, json};

use super::Request;
use crate::lookup::{items, text};

const DEFAULT: &str = "default";
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
const MIRROR: &str = "/metadata/annotations/kubernetes.io~1config.mirror";
/// An hour and seven seconds: the issuer knows this number and extends such tokens.
const EXPIRATION_SECONDS: i64 = 3607;

pub(super) fn admit(request: &Request, pod: &mut Value) -> Result<(), Status> {
    if pod.pointer(MIRROR).is_some() {
        return Ok(());
    }
    if text(pod, "/spec/serviceAccountName").is_empty() {
        pod["spec"]["serviceAccountName"] = json!(DEFAULT);
        pod["spec"]["serviceAccount"] = json!(DEFAULT);
    }
    let account = account(request, pod)?;
    let automount = pod["spec"]["automountServiceAccountToken"].as_bool();
    if automount.or_else(|| account["automountServiceAccountToken"].as_bool()).unwrap_or(true) {
        mount_token(pod);
    }
    let pulls = items(&account, "/imagePullSecrets");
    if items(pod, "/spec/imagePullSecrets").is_empty() && !pulls.is_empty() {
        pod["spec"]["imagePullSecrets"] = pulls.iter().map(|reference| json!({ "name": text(reference, "/name") })).collect();
    }
    Ok(())
}

fn account(request: &Request, pod: &Value) -> Result<std::sync::Arc<Value>, Status> {
    let (namespace, name) = (request.namespace, text(pod, "/spec/serviceAccountName"));
    request.lookup.get("serviceaccounts", namespace, name).ok_or_else(|| {
        request.forbidden(&format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"))
    })
}

fn mount_token(pod: &mut Value) {
    let present = items(pod, "/spec/volumes").iter().map(|volume| text(volume, "/name")).find(|name| name.starts_with(VOLUME_PREFIX));
    let has_volume = present.is_some();
    let volume = present.map_or_else(|| format!("{VOLUME_PREFIX}{}", crate::names::random_suffix()), str::to_owned);
    let mut needed = false;
    for list in ["initContainers", "containers"] {
        for container in pod["spec"].get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if items(container, "/volumeMounts").iter().any(|mount| text(mount, "/mountPath") == MOUNT_PATH) {
                continue;
            }
            needed = true;
            let mount = json!({ "name": volume, "readOnly": true, "mountPath": MOUNT_PATH });
            match container["volumeMounts"].as_array_mut() {
                Some(mounts) => mounts.push(mount),
                None => container["volumeMounts"] = json!([mount]),
            }
        }
    }
    if has_volume || !needed {
        return;
    }
    let source = json!({ "name": volume, "projected": { "defaultMode": 0o644, "sources": [
        { "serviceAccountToken": { "path": "token", "expirationSeconds": EXPIRATION_SECONDS } },
        { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
        { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } }] } },
    ] } });
    match pod["spec"]["volumes"].as_array_mut() {
        Some(volumes) => volumes.push(source),
        None => pod["spec"]["volumes"] = json!([source]),
    }
}

pub(super) fn validate(request: &Request, pod: &Value) -> Result<(), Status> {
    if pod.pointer(MIRROR).is_some() {
        return validate_mirror(request, pod);
    }
    let account = account(request, pod)?;
    let enforced = text(&account, "/metadata/annotations/kubernetes.io~1enforce-mountable-secrets");
    if matches!(enforced, "1" | "t" | "T" | "true" | "TRUE" | "True") { only_listed_secrets(request, &account, pod) } else { Ok(()) }
}

fn validate_mirror(request: &Request, pod: &Value) -> Result<(), Status> {
    if !text(pod, "/spec/serviceAccountName").is_empty() {
        return Err(request.forbidden("a mirror pod may not reference service accounts"));
    }
    if !secret_names(pod).is_empty() {
        return Err(request.forbidden("a mirror pod may not reference secrets"));
    }
    let projects_token =
        |volume: &Value| items(volume, "/projected/sources").iter().any(|source| source.get("serviceAccountToken").is_some());
    if items(pod, "/spec/volumes").iter().any(projects_token) {
        return Err(request.forbidden("a mirror pod may not use ServiceAccountToken volume projections"));
    }
    Ok(())
}

/// Every secret that a pod mentions outside projected volumes.
fn secret_names(pod: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = items(pod, "/spec/volumes").iter().map(|volume| text(volume, "/secret/secretName")).collect();
    names.extend(items(pod, "/spec/imagePullSecrets").iter().map(|reference| text(reference, "/name")));
    for list in ["/spec/initContainers", "/spec/containers", "/spec/ephemeralContainers"] {
        for container in items(pod, list) {
            names.extend(items(container, "/env").iter().map(|env| text(env, "/valueFrom/secretKeyRef/name")));
            names.extend(items(container, "/envFrom").iter().map(|source| text(source, "/secretRef/name")));
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// The annotation `enforce-mountable-secrets`: a pod uses only the secrets that its account lists.
fn only_listed_secrets(request: &Request, account: &Value, pod: &Value) -> Result<(), Status> {
    let name = text(account, "/metadata/name");
    let listed: Vec<&str> =
        ["/secrets", "/imagePullSecrets"].iter().flat_map(|list| items(account, list)).map(|reference| text(reference, "/name")).collect();
    match secret_names(pod).into_iter().find(|secret| !listed.contains(secret)) {
        Some(secret) => {
            Err(request
                .forbidden(&format!("secret {secret:?} is not allowed because service account {name} does not reference that secret")))
        }
        None => Ok(()),
    }
}
