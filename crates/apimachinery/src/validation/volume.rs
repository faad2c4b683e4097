//! Volumes of pods. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `ValidateVolumes`.

use serde_json::Value;

use super::container::{field_selector, resource_selector};
use super::support::{Errors, Path, get, list, number, text};
use crate::formats;
use crate::quantity::Quantity;

const MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
/// Fields that the downward API offers in files.
const FILE_FIELDS: &[&str] = &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
/// Volume types in the order upstream looks at them.
const KINDS: &[&str] = &[
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
    "downwardAPI",
    "fc",
    "flexVolume",
    "configMap",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "storageos",
    "projected",
    "scaleIO",
    "csi",
    "ephemeral",
    "image",
];

/// Checks the volumes; returns the names of the good ones.
pub(super) fn volumes<'a>(errors: &mut Errors, spec: &'a Value, path: &Path<'_>) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for (index, volume) in list(spec, "volumes").iter().enumerate() {
        let path = &path.index(index);
        let (name, before) = (text(volume, "name"), errors.len());
        source(errors, volume, path);
        let name_path = path.child("name");
        if name.is_empty() {
            errors.required(&name_path, "");
        } else {
            errors.all_invalid(&name_path, name, formats::dns1123_label(name));
        }
        if names.contains(&name) {
            errors.duplicate(&name_path, name);
        }
        if errors.len() == before {
            names.push(name);
        }
    }
    names
}

fn source(errors: &mut Errors, volume: &Value, path: &Path<'_>) {
    let mut first = true;
    for kind in KINDS {
        let Some(source) = get(volume, kind) else { continue };
        let path = &path.child(kind);
        if !first {
            errors.forbidden(path, "may not specify more than 1 volume type");
            continue;
        }
        first = false;
        one(errors, kind, source, path);
    }
    if first {
        errors.required(path, "must specify a volume type");
    }
}

fn one(errors: &mut Errors, kind: &str, source: &Value, path: &Path<'_>) {
    match kind {
        "emptyDir" => {
            let limit = get(source, "sizeLimit").and_then(Value::as_str).and_then(|text| text.parse::<Quantity>().ok());
            if limit.is_some_and(|limit| limit.sign() < 0) {
                errors.forbidden(&path.child("sizeLimit"), "SizeLimit field must be a valid resource quantity");
            }
        }
        "hostPath" => host_path(errors, source, path),
        "secret" => {
            if text(source, "secretName").is_empty() {
                errors.required(&path.child("secretName"), "");
            }
            mode(errors, source, "defaultMode", path);
            items(errors, source, path, &mut None);
        }
        "configMap" => {
            if text(source, "name").is_empty() {
                errors.required(&path.child("name"), "");
            }
            mode(errors, source, "defaultMode", path);
            items(errors, source, path, &mut None);
        }
        "downwardAPI" => {
            mode(errors, source, "defaultMode", path);
            for file in list(source, "items") {
                downward_file(errors, file, path);
            }
        }
        "projected" => projected(errors, source, path),
        "persistentVolumeClaim" if text(source, "claimName").is_empty() => errors.required(&path.child("claimName"), ""),
        "nfs" => {
            for key in ["server", "path"] {
                if text(source, key).is_empty() {
                    errors.required(&path.child(key), "");
                }
            }
            if !text(source, "path").starts_with('/') {
                errors.invalid(&path.child("path"), text(source, "path"), "must be an absolute path");
            }
        }
        "csi" if text(source, "driver").is_empty() => errors.required(&path.child("driver"), ""),
        _ => {}
    }
}

fn host_path(errors: &mut Errors, source: &Value, path: &Path<'_>) {
    let file = text(source, "path");
    if file.is_empty() {
        errors.required(&path.child("path"), "");
        return;
    }
    no_backsteps(errors, file, &path.child("path"));
    let kinds = &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    if !kinds.contains(&text(source, "type")) {
        errors.not_supported(&path.child("type"), text(source, "type"), kinds);
    }
}

fn mode(errors: &mut Errors, owner: &Value, key: &str, path: &Path<'_>) {
    if let Some(mode) = number(owner, key).filter(|mode| !(0..=0o777).contains(mode)) {
        errors.invalid(&path.child(key), mode, MODE);
    }
}

/// `items` of a source; with `seen`, paths may not repeat across the sources of a projected volume.
fn items<'a>(errors: &mut Errors, source: &'a Value, path: &Path<'_>, seen: &mut Option<(&mut Vec<&'a str>, &Path<'_>, &str)>) {
    for (index, item) in list(source, "items").iter().enumerate() {
        let items_path = path.child("items");
        let path = &items_path.index(index);
        let file = text(item, "path");
        for key in ["key", "path"] {
            if text(item, key).is_empty() {
                errors.required(&path.child(key), "");
            }
        }
        local_path(errors, file, &path.child("path"));
        mode(errors, item, "mode", path);
        if let Some((seen, volume, name)) = seen.as_mut().filter(|_| !file.is_empty()) {
            if seen.contains(&file) {
                errors.invalid(volume, *name, "conflicting duplicate paths");
            } else {
                seen.push(file);
            }
        }
    }
}

fn downward_file(errors: &mut Errors, file: &Value, path: &Path<'_>) {
    let target = text(file, "path");
    if target.is_empty() {
        errors.required(&path.child("path"), "");
    }
    local_path(errors, target, &path.child("path"));
    match (get(file, "fieldRef"), get(file, "resourceFieldRef")) {
        (Some(field), resource) => {
            field_selector(errors, field, FILE_FIELDS, &path.child("fieldRef"));
            if resource.is_some() {
                errors.invalid(path, "resource", "fieldRef and resourceFieldRef can not be specified simultaneously");
            }
        }
        (None, Some(resource)) => resource_selector(errors, resource, true, &path.child("resourceFieldRef")),
        (None, None) => errors.required(path, "one of fieldRef and resourceFieldRef is required"),
    }
    mode(errors, file, "mode", path);
}

fn projected(errors: &mut Errors, source: &Value, path: &Path<'_>) {
    mode(errors, source, "defaultMode", path);
    let mut seen: Vec<&str> = Vec::new();
    for (index, part) in list(source, "sources").iter().enumerate() {
        let sources = path.child("sources");
        let part_path = &sources.index(index);
        let mut count = 0;
        for kind in ["secret", "configMap"] {
            let Some(found) = get(part, kind) else { continue };
            count += 1;
            let name = text(found, "name");
            if name.is_empty() {
                errors.required(&part_path.child(kind).child("name"), "");
            }
            items(errors, found, &part_path.child(kind), &mut Some((&mut seen, path, name)));
        }
        if let Some(found) = get(part, "downwardAPI") {
            count += 1;
            for file in list(found, "items") {
                downward_file(errors, file, &part_path.child("downwardAPI"));
                let target = text(file, "path");
                if seen.contains(&target) {
                    errors.invalid(path, target, "conflicting duplicate paths");
                } else if !target.is_empty() {
                    seen.push(target);
                }
            }
        }
        if let Some(token) = get(part, "serviceAccountToken") {
            count += 1;
            service_account_token(errors, token, part_path, path);
        }
        count += ["clusterTrustBundle", "podCertificate"].iter().filter(|kind| get(part, kind).is_some()).count();
        if count > 1 {
            errors.forbidden(part_path, "may not specify more than 1 volume type per source");
        }
    }
}

fn service_account_token(errors: &mut Errors, token: &Value, part_path: &Path<'_>, path: &Path<'_>) {
    let token_path = part_path.child("serviceAccountToken");
    let expiration = token_path.child("expirationSeconds");
    match number(token, "expirationSeconds") {
        None => errors.required(&expiration, ""),
        Some(seconds) if seconds < 600 => errors.invalid(&expiration, seconds, "may not specify a duration less than 10 minutes"),
        Some(seconds) if seconds > 1 << 32 => {
            errors.invalid(&expiration, seconds, "may not specify a duration larger than 2^32 seconds");
        }
        Some(_) => {}
    }
    if text(token, "path").is_empty() {
        errors.required(&path.child("path"), "");
    } else {
        local_path(errors, text(token, "path"), &path.child("path"));
    }
}

fn no_backsteps(errors: &mut Errors, file: &str, path: &Path<'_>) {
    if file.split('/').any(|part| part == "..") {
        errors.invalid(path, file, "must not contain '..'");
    }
}

/// A path below something: relative, without `..`.
pub(super) fn descending_path(errors: &mut Errors, file: &str, path: &Path<'_>) {
    if file.starts_with('/') {
        errors.invalid(path, file, "must be a relative path");
    }
    no_backsteps(errors, file, path);
}

/// A file in a volume: as [`descending_path`], and not beginning with two dots.
fn local_path(errors: &mut Errors, file: &str, path: &Path<'_>) {
    descending_path(errors, file, path);
    if file.starts_with("..") && !file.starts_with("../") {
        errors.invalid(path, file, "must not start with '..'");
    }
}
