//! The files of configMap, secret, downwardAPI and projected volumes (upstream pkg/volume/{configmap,secret,downwardapi,
//! projected}, v1.37). Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, ProjectedVolumeSource, Secret, Volume, VolumeProjection};

use crate::downward;
use crate::model;
use crate::volume::Inputs;

/// A file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Content.
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner, when it is not root.
    pub owner: Option<u32>,
}

/// Files by relative path.
pub type Files = BTreeMap<String, File>;

const DEFAULT_MODE: i32 = 0o644;

/// (kind for the directory's name, files) of a volume; an error for a kind that is not carried out.
pub fn files(volume: &Volume, inputs: &Inputs<'_>) -> Result<(&'static str, Files), String> {
    let mut files = Files::new();
    if let Some(source) = &volume.config_map {
        let optional = source.optional.unwrap_or(false);
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let map = inputs.lookup.config_map(&source.name, optional)?;
        let data = config_map_data(map);
        project(&mut files, &data, source.items.as_deref(), mode, optional).map_err(|e| format!("configmap {e}"))?;
        return Ok(("configmap", files));
    }
    if let Some(source) = &volume.secret {
        let optional = source.optional.unwrap_or(false);
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or("");
        let secret = inputs.lookup.secret(name, optional)?;
        project(&mut files, &secret_data(secret), source.items.as_deref(), mode, optional).map_err(|e| format!("secret {e}"))?;
        return Ok(("secret", files));
    }
    if let Some(source) = &volume.downward_api {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        downward_files(&mut files, source.items.as_deref().unwrap_or_default(), mode, inputs)?;
        return Ok(("downward-api", files));
    }
    if let Some(source) = &volume.projected {
        projected(&mut files, &volume.name, source, inputs)?;
        return Ok(("projected", files));
    }
    Err(unsupported(volume))
}

fn unsupported(volume: &Volume) -> String {
    let kind = serde_json::to_value(volume)
        .ok()
        .and_then(|v| v.as_object()?.keys().find(|k| *k != "name").cloned())
        .unwrap_or_else(|| "no source".to_owned());
    format!("volumes of kind {kind} are not supported by this kubelet")
}

fn projected(files: &mut Files, volume: &str, source: &ProjectedVolumeSource, inputs: &Inputs<'_>) -> Result<(), String> {
    let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
    for (index, part) in source.sources.iter().flatten().enumerate() {
        projected_part(files, volume, index, part, mode, inputs)?;
    }
    Ok(())
}

fn projected_part(
    files: &mut Files,
    volume: &str,
    index: usize,
    part: &VolumeProjection,
    mode: i32,
    inputs: &Inputs<'_>,
) -> Result<(), String> {
    if let Some(source) = &part.config_map {
        let optional = source.optional.unwrap_or(false);
        let data = config_map_data(inputs.lookup.config_map(&source.name, optional)?);
        return project(files, &data, source.items.as_deref(), mode, optional).map_err(|e| format!("configmap {e}"));
    }
    if let Some(source) = &part.secret {
        let optional = source.optional.unwrap_or(false);
        let data = secret_data(inputs.lookup.secret(&source.name, optional)?);
        return project(files, &data, source.items.as_deref(), mode, optional).map_err(|e| format!("secret {e}"));
    }
    if let Some(source) = &part.downward_api {
        return downward_files(files, source.items.as_deref().unwrap_or_default(), mode, inputs);
    }
    if let Some(source) = &part.service_account_token {
        let token = inputs.tokens.get(volume, index)?;
        let owner = one_user(inputs);
        let group = inputs.pod.spec.as_ref().and_then(|s| s.security_context.as_ref()).and_then(|c| c.fs_group);
        let private = owner.is_some() || group.is_some();
        let mode = if private { 0o600 } else { mode };
        let file = File { data: token.as_bytes().to_vec(), mode: bits(mode), owner };
        files.insert(checked_path(&source.path)?, file);
        return Ok(());
    }
    Err("projected volume source: only configMap, secret, downwardAPI and serviceAccountToken are supported by this kubelet".to_owned())
}

/// The user that all containers run as, if they agree.
fn one_user(inputs: &Inputs<'_>) -> Option<u32> {
    let pod = inputs.pod;
    let of_pod = pod.spec.as_ref().and_then(|s| s.security_context.as_ref()).and_then(|c| c.run_as_user);
    let mut users = model::containers(pod)
        .iter()
        .chain(model::init_containers(pod))
        .map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|u| u == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

type Data<'a> = BTreeMap<&'a str, &'a [u8]>;

fn config_map_data(map: Option<&ConfigMap>) -> Data<'_> {
    let mut data = Data::new();
    if let Some(map) = map {
        let text = map.data.iter().flatten();
        data.extend(text.map(|(k, v)| (k.as_str(), v.as_bytes())));
        let binary = map.binary_data.iter().flatten();
        data.extend(binary.map(|(k, v)| (k.as_str(), v.0.as_slice())));
    }
    data
}

fn secret_data(secret: Option<&Secret>) -> Data<'_> {
    let data = secret.iter().flat_map(|s| s.data.iter().flatten());
    data.map(|(k, v)| (k.as_str(), v.0.as_slice())).collect()
}

fn project(files: &mut Files, data: &Data<'_>, items: Option<&[KeyToPath]>, mode: i32, optional: bool) -> Result<(), String> {
    let Some(items) = items.filter(|i| !i.is_empty()) else {
        for (key, value) in data {
            let file = File { data: value.to_vec(), mode: bits(mode), owner: None };
            files.insert((*key).to_owned(), file);
        }
        return Ok(());
    };
    for item in items {
        let Some(value) = data.get(item.key.as_str()) else {
            if optional {
                continue;
            }
            return Err(format!("references non-existent config key: {}", item.key));
        };
        let mode = item.mode.unwrap_or(mode);
        let file = File { data: value.to_vec(), mode: bits(mode), owner: None };
        files.insert(checked_path(&item.path)?, file);
    }
    Ok(())
}

fn downward_files(files: &mut Files, items: &[DownwardAPIVolumeFile], mode: i32, inputs: &Inputs<'_>) -> Result<(), String> {
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            downward::field(inputs.pod, inputs.facts, &field.field_path)
        } else if let Some(resource) = &item.resource_field_ref {
            downward::resource(inputs.pod, None, inputs.facts, resource)
        } else {
            continue;
        };
        let data = text.map_err(|e| e.to_string())?.into_bytes();
        let mode = item.mode.unwrap_or(mode);
        files.insert(checked_path(&item.path)?, File { data, mode: bits(mode), owner: None });
    }
    Ok(())
}

fn bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0o644) & 0o777
}

/// A relative path without `..`, and not one of the writer's own names.
fn checked_path(path: &str) -> Result<String, String> {
    let bad = path.is_empty() || path.starts_with('/') || path.starts_with("..") || path.split('/').any(|part| part == "..");
    if bad {
        return Err(format!("invalid path {path:?}: must be relative, without '..'"));
    }
    Ok(path.split('/').filter(|p| !p.is_empty() && *p != ".").collect::<Vec<_>>().join("/"))
}
