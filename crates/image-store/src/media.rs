//! Manifests, indexes and configurations: OCI image-spec 1.1 and Docker image manifest v2 schema 2.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::reference::Digest;
use crate::types::{ImageConfig, Platform};

/// What overlayfs stacks at most (`OVL_MAX_STACK`).
const LAYERS_MAX: usize = 500;

/// What the Accept header of a manifest request lists.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A descriptor that was checked.
#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    pub digest: Digest,
    pub size: u64,
}

/// A manifest's content.
#[derive(Debug, Clone)]
pub(crate) enum Manifest {
    /// One image.
    Image { config: Descriptor, layers: Vec<Descriptor> },
    /// A choice of images; the one for our platform was picked.
    Index(Descriptor),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u32,
    #[serde(default)]
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Vec<RawDescriptor>,
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
}

impl RawDescriptor {
    fn check(&self, object: &str) -> Result<Descriptor, Error> {
        let digest = Digest::parse(&self.digest)
            .ok_or_else(|| Error::Unusable { object: object.to_owned(), why: format!("digest {:?} is not sha256", self.digest) })?;
        Ok(Descriptor { digest, size: self.size })
    }
}

/// Parses a manifest or index; `object` is named in errors.
pub(crate) fn parse_manifest(bytes: &[u8], platform: &Platform, object: &str) -> Result<Manifest, Error> {
    let bad = |why: String| Error::BadAnswer { object: object.to_owned(), why };
    let raw: RawManifest = serde_json::from_slice(bytes).map_err(|e| bad(format!("not a manifest: {e}")))?;
    if raw.schema_version != 2 {
        return Err(Error::Unusable { object: object.to_owned(), why: format!("schema version {} is not 2", raw.schema_version) });
    }
    if let Some(manifests) = raw.manifests {
        return pick(&manifests, platform, object).map(Manifest::Index);
    }
    let config = raw.config.ok_or_else(|| bad("it has neither config nor manifests".into()))?;
    if let Some(strange) = raw.layers.iter().find(|l| !is_layer(&l.media_type)) {
        return Err(Error::Unusable {
            object: object.to_owned(),
            why: format!("{:?} is no layer of a root file system", strange.media_type),
        });
    }
    if raw.layers.len() > LAYERS_MAX {
        return Err(Error::Unusable { object: object.to_owned(), why: format!("it has more than {LAYERS_MAX} layers") });
    }
    let layers = raw.layers.iter().map(|l| l.check(object)).collect::<Result<_, _>>()?;
    Ok(Manifest::Image { config: config.check(object)?, layers })
}

fn is_layer(media_type: &str) -> bool {
    media_type.is_empty()
        || media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.")
}

/// Attestations that builders put beside images are no images.
fn pick(manifests: &[RawDescriptor], platform: &Platform, object: &str) -> Result<Descriptor, Error> {
    let usable = |m: &&RawDescriptor| m.annotations.get("vnd.docker.reference.type").is_none_or(|kind| kind != "attestation-manifest");
    let candidates: Vec<&RawDescriptor> = manifests.iter().filter(usable).collect();
    let fits = |m: &&&RawDescriptor, variant: bool| {
        m.platform.as_ref().is_some_and(|p| {
            p.os == platform.os
                && p.architecture == platform.architecture
                && (!variant || p.variant == platform.variant || p.variant.is_empty() || platform.variant.is_empty())
        })
    };
    let picked = candidates
        .iter()
        .find(|m| fits(m, true))
        .or_else(|| candidates.iter().find(|m| fits(m, false)))
        .or_else(|| candidates.first().filter(|m| candidates.len() == 1 && m.platform.is_none()));
    match picked {
        Some(descriptor) => descriptor.check(object),
        None => Err(Error::Unusable {
            object: object.to_owned(),
            why: format!("it has no variant for {}/{}", platform.os, platform.architecture),
        }),
    }
}

/// What matters of a configuration.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub diff_ids: Vec<Digest>,
}

/// Parses an image configuration; `object` is named in errors.
pub(crate) fn parse_config(bytes: &[u8], platform: &Platform, object: &str) -> Result<Config, Error> {
    let unusable = |why: String| Error::Unusable { object: object.to_owned(), why };
    let value: Value = serde_json::from_slice(bytes).map_err(|e| unusable(format!("configuration is no JSON: {e}")))?;
    let os = value["os"].as_str().unwrap_or_default();
    let architecture = value["architecture"].as_str().unwrap_or_default();
    let differs = |theirs: &str, ours: &str| !theirs.is_empty() && theirs != ours;
    if differs(os, &platform.os) || differs(architecture, &platform.architecture) {
        return Err(unusable(format!("it is for {os}/{architecture}, not for {}/{}", platform.os, platform.architecture)));
    }
    let mut diff_ids = Vec::new();
    for id in value["rootfs"]["diff_ids"].as_array().into_iter().flatten() {
        let id = id.as_str().and_then(Digest::parse).ok_or_else(|| unusable(format!("diff id {id} is not sha256")))?;
        diff_ids.push(id);
    }
    if diff_ids.len() > LAYERS_MAX {
        return Err(unusable(format!("it has more than {LAYERS_MAX} layers")));
    }
    Ok(Config { diff_ids })
}

pub(crate) fn image_config(config: &Value) -> ImageConfig {
    let text = |key: &str| config[key].as_str().unwrap_or_default().to_owned();
    let list =
        |key: &str| -> Vec<String> { config[key].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect() };
    let labels = config["Labels"].as_object().into_iter().flatten();
    ImageConfig {
        entrypoint: list("Entrypoint"),
        cmd: list("Cmd"),
        env: list("Env"),
        user: text("User"),
        working_dir: text("WorkingDir"),
        stop_signal: text("StopSignal"),
        volumes: config["Volumes"].as_object().into_iter().flatten().map(|(path, _)| path.clone()).collect(),
        labels: labels.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect(),
    }
}

/// Chain ids of a stack of layers, bottom first (OCI image-spec, config.md, "Layer ChainID").
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::new();
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => diff_id.clone(),
            Some(parent) => Digest::of(format!("{parent} {diff_id}").as_bytes()),
        });
    }
    chain
}
