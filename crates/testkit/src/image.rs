//! Images made in memory: layers from lists of entries, OCI or Docker media types, written as OCI layout or `docker save` archive.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::tar::{self, Entry};

/// How a layer's archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One gzip member.
    Gzip,
    /// Several gzip members one after another, as pigz and estargz write them.
    GzipMembers,
    /// One zstd frame.
    Zstd,
}

/// Bytes with a media type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Media type.
    pub media_type: String,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Blob {
    /// "sha256:…" of the content.
    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest(), "size": self.bytes.len()})
    }
}

/// "sha256:…" of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// An image to be built.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    layers: Vec<(Vec<Entry>, Compression)>,
    raw_layers: Vec<(usize, Vec<u8>)>,
    config: Value,
    architecture: String,
    docker: bool,
    index: bool,
}

impl Default for ImageSpec {
    fn default() -> Self {
        Self::new()
    }
}

impl ImageSpec {
    /// An image without layers, of this machine's platform, OCI media types, no index.
    pub fn new() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            layers: Vec::new(),
            raw_layers: Vec::new(),
            config: json!({}),
            architecture: architecture.into(),
            docker: false,
            index: false,
        }
    }

    /// With one more layer, packed by gzip.
    pub fn layer(self, entries: impl IntoIterator<Item = Entry>) -> Self {
        self.packed_layer(entries, Compression::Gzip)
    }

    /// With one more layer, packed as told.
    pub fn packed_layer(mut self, entries: impl IntoIterator<Item = Entry>, compression: Compression) -> Self {
        self.layers.push((entries.into_iter().collect(), compression));
        self
    }

    /// With one more layer of these very bytes (after unpacking), however broken.
    pub fn raw_layer(mut self, bytes: Vec<u8>) -> Self {
        self.raw_layers.push((self.layers.len(), bytes));
        self.layers.push((Vec::new(), Compression::Gzip));
        self
    }

    /// With a field of the `config` object: `Entrypoint`, `Cmd`, `Env`, `User`, `WorkingDir`, `StopSignal`, `Volumes`, `Labels`.
    pub fn config(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.config[field] = value.into();
        self
    }

    /// With Docker's media types (schema 2).
    pub fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Behind an index that also names a platform nobody has.
    pub fn with_index(mut self) -> Self {
        self.index = true;
        self
    }

    /// Builds it.
    pub fn build(&self) -> Image {
        let kinds = if self.docker { &DOCKER } else { &OCI };
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for (n, (entries, compression)) in self.layers.iter().enumerate() {
            let raw = self.raw_layers.iter().find(|(at, _)| *at == n).map(|(_, bytes)| bytes.clone());
            let plain = raw.unwrap_or_else(|| tar::archive(entries));
            diff_ids.push(digest(&plain));
            layers.push(pack(plain, *compression, kinds));
        }
        let config = json!({
            "architecture": self.architecture, "os": "linux", "config": self.config, "created": "2026-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = Blob { media_type: kinds.config.into(), bytes: config.to_string().into_bytes() };
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kinds.manifest, "config": config.descriptor(),
            "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
        });
        let manifest = Blob { media_type: kinds.manifest.into(), bytes: manifest.to_string().into_bytes() };
        let mut others = Vec::new();
        let index = self.index.then(|| {
            let mut ours = manifest.descriptor();
            ours["platform"] = json!({"os": "linux", "architecture": self.architecture});
            others = foreign(kinds);
            let mut other = others[0].descriptor();
            other["platform"] = json!({"os": "plan9", "architecture": "mips"});
            let index = json!({"schemaVersion": 2, "mediaType": kinds.index, "manifests": [other, ours]});
            Blob { media_type: kinds.index.into(), bytes: index.to_string().into_bytes() }
        });
        Image { manifest, config, layers, index, others, diff_ids }
    }
}

/// Manifest and configuration of an image for a platform nobody has.
fn foreign(kinds: &MediaTypes) -> Vec<Blob> {
    let config = json!({"architecture": "mips", "os": "plan9", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}});
    let config = Blob { media_type: kinds.config.into(), bytes: config.to_string().into_bytes() };
    let manifest = json!({"schemaVersion": 2, "mediaType": kinds.manifest, "config": config.descriptor(), "layers": []});
    vec![Blob { media_type: kinds.manifest.into(), bytes: manifest.to_string().into_bytes() }, config]
}

struct MediaTypes {
    manifest: &'static str,
    config: &'static str,
    index: &'static str,
    layer: &'static str,
    layer_gzip: &'static str,
    layer_zstd: &'static str,
}

const OCI: MediaTypes = MediaTypes {
    manifest: "application/vnd.oci.image.manifest.v1+json",
    config: "application/vnd.oci.image.config.v1+json",
    index: "application/vnd.oci.image.index.v1+json",
    layer: "application/vnd.oci.image.layer.v1.tar",
    layer_gzip: "application/vnd.oci.image.layer.v1.tar+gzip",
    layer_zstd: "application/vnd.oci.image.layer.v1.tar+zstd",
};

const DOCKER: MediaTypes = MediaTypes {
    manifest: "application/vnd.docker.distribution.manifest.v2+json",
    config: "application/vnd.docker.container.image.v1+json",
    index: "application/vnd.docker.distribution.manifest.list.v2+json",
    layer: "application/vnd.docker.image.rootfs.diff.tar",
    layer_gzip: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    layer_zstd: "application/vnd.docker.image.rootfs.diff.tar.zstd",
};

fn pack(plain: Vec<u8>, compression: Compression, kinds: &MediaTypes) -> Blob {
    // Writers into memory do not fail.
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    };
    let (media_type, bytes) = match compression {
        Compression::None => (kinds.layer, plain),
        Compression::Gzip => (kinds.layer_gzip, gzip(&plain)),
        Compression::GzipMembers => (kinds.layer_gzip, plain.chunks(700).flat_map(gzip).collect()),
        Compression::Zstd => (kinds.layer_zstd, zstd::encode_all(&plain[..], 3).expect("memory")),
    };
    Blob { media_type: media_type.into(), bytes }
}

/// An image that was built.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its manifest.
    pub manifest: Blob,
    /// Its configuration.
    pub config: Blob,
    /// Its layers, bottom first.
    pub layers: Vec<Blob>,
    /// The index around it, if any.
    pub index: Option<Blob>,
    /// Blobs of the index' other platform.
    pub others: Vec<Blob>,
    /// Digests of the layers' archives before packing.
    pub diff_ids: Vec<String>,
}

impl Image {
    /// What a tag points to: the index, or the manifest.
    pub fn top(&self) -> &Blob {
        self.index.as_ref().unwrap_or(&self.manifest)
    }

    /// The image id: the configuration's digest.
    pub fn id(&self) -> String {
        self.config.digest()
    }

    /// All blobs, manifests included.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        [&self.manifest, &self.config].into_iter().chain(&self.layers).chain(&self.index).chain(&self.others)
    }

    /// Writes an OCI image layout into `dir` (made if it is not there), named `name` ("docker.io/library/x:1").
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_oci_layout(&self, dir: &Path, name: &str) -> std::io::Result<()> {
        for (path, bytes) in self.layout_files(name) {
            let path = dir.join(path);
            std::fs::create_dir_all(path.parent().unwrap_or(dir))?;
            std::fs::write(path, bytes)?;
        }
        Ok(())
    }

    /// Writes an OCI image layout as a tar archive, as `ctr images export` and `docker save` since 25 do.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_oci_archive(&self, path: &Path, name: &str) -> std::io::Result<()> {
        let entries: Vec<Entry> = self.layout_files(name).into_iter().map(|(path, bytes)| Entry::file(&path, bytes)).collect();
        std::fs::write(path, tar::archive(&entries))
    }

    fn layout_files(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for blob in self.blobs() {
            files.insert(format!("blobs/sha256/{}", &blob.digest()[7..]), blob.bytes.clone());
        }
        let mut top = self.top().descriptor();
        let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        top["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
        files.insert("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        files.insert("index.json".into(), json!({"schemaVersion": 2, "manifests": [top]}).to_string().into_bytes());
        files
    }

    /// Writes what `docker save` before 25 wrote: manifest.json, unpacked layers, a layer that is a symlink to another one.
    ///
    /// # Errors
    /// Those of the file system, and of unpacking our own layers.
    pub fn write_docker_archive(&self, path: &Path, name: &str) -> std::io::Result<()> {
        let config = format!("{}.json", &self.id()[7..]);
        let mut entries = vec![Entry::file(&config, self.config.bytes.clone())];
        let mut paths = Vec::new();
        for (n, (layer, diff_id)) in self.layers.iter().zip(&self.diff_ids).enumerate() {
            let path = format!("{n}/layer.tar");
            let first = self.diff_ids.iter().position(|d| d == diff_id).filter(|first| *first < n);
            entries.push(Entry::dir(&format!("{n}/")));
            entries.push(match first {
                Some(first) => Entry::symlink(&path, &format!("../{first}/layer.tar")),
                None => Entry::file(&path, unpack(&layer.bytes)?),
            });
            paths.push(path);
        }
        let manifest = json!([{"Config": config, "RepoTags": [name], "Layers": paths}]);
        entries.push(Entry::file("manifest.json", manifest.to_string()));
        std::fs::write(path, tar::archive(&entries))
    }
}

fn unpack(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    if bytes.starts_with(&[0x1f, 0x8b]) {
        std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(bytes), &mut plain)?;
        Ok(plain)
    } else if bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        zstd::decode_all(bytes)
    } else {
        Ok(bytes.to_vec())
    }
}
