//! Images from files: OCI layouts (a directory or a tar archive) and `docker save` archives.
//!
//! Facts: OCI image-spec image-layout.md; containerd's name annotation `io.containerd.image.name`; docker image spec v1.2 `manifest.json`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::disk::{ImageRecord, VERSION};
use crate::error::{Error, file};
use crate::layer::{self, Expected};
use crate::media::{self, Manifest};
use crate::reference::{Digest, Reference};
use crate::store::Shared;
use crate::tar::{Archive, Kind};
use crate::unpack::Limits;

const DOCUMENT_BYTES_MAX: u64 = 8 << 20;
const NAME_ANNOTATION: &str = "io.containerd.image.name";
const LINKS_MAX: usize = 8;

/// Imports every image of `path` and returns their ids. Runs on a thread that may block.
pub(crate) fn import(shared: &Arc<Shared>, path: &Path) -> Result<Vec<String>, Error> {
    let source = if path.is_dir() { Source::Dir(path.to_owned()) } else { Source::archive(path)? };
    if source.has("index.json") && source.has("oci-layout") {
        return import_layout(shared, &source);
    }
    if source.has("manifest.json") {
        return import_docker(shared, &source);
    }
    Err(Error::Unusable {
        object: path.display().to_string(),
        why: "it has neither index.json (OCI layout) nor manifest.json (docker save); compressed archives must be unpacked first".into(),
    })
}

/// Where an archive's files are.
enum Source {
    Dir(PathBuf),
    Tar { path: PathBuf, members: HashMap<String, Member> },
}

enum Member {
    File { offset: u64, size: u64 },
    Link(String),
}

impl Source {
    /// Reads over the archive once, and notes where each file begins.
    fn archive(path: &Path) -> Result<Self, Error> {
        let unusable = |e: std::io::Error| Error::Unusable { object: path.display().to_string(), why: e.to_string() };
        let input = File::open(path).map_err(file("open", path))?;
        let mut members = HashMap::new();
        let mut archive = Archive::new(Counting { inner: std::io::BufReader::new(input), at: 0 });
        while let Some(entry) = archive.next().map_err(unusable)? {
            let name = clean(&String::from_utf8_lossy(&entry.path));
            let member = match entry.kind {
                Kind::File => Member::File { offset: archive.get_ref().at, size: entry.size },
                Kind::Symlink | Kind::HardLink => {
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    let base = if entry.kind == Kind::HardLink { "" } else { name.rsplit_once('/').map_or("", |(dir, _)| dir) };
                    Member::Link(clean(&format!("{base}/{target}")))
                }
                _ => continue,
            };
            members.insert(name, member);
        }
        Ok(Self::Tar { path: path.to_owned(), members })
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Tar { members, .. } => members.contains_key(name),
        }
    }

    /// Opens a file, and gives its size.
    fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), Error> {
        let missing = || Error::Unusable { object: self.name(), why: format!("it has no {name}") };
        match self {
            Self::Dir(dir) => {
                let path = dir.join(clean(name));
                let opened = File::open(&path).map_err(|_| missing())?;
                let size = opened.metadata().map_err(file("read", &path))?.len();
                Ok((Box::new(opened), size))
            }
            Self::Tar { path, members } => {
                let mut name = clean(name);
                for _ in 0..LINKS_MAX {
                    match members.get(&name).ok_or_else(missing)? {
                        Member::Link(target) => name = target.clone(),
                        Member::File { offset, size } => {
                            let mut opened = File::open(path).map_err(file("open", path))?;
                            opened.seek(SeekFrom::Start(*offset)).map_err(file("seek in", path))?;
                            return Ok((Box::new(opened.take(*size)), *size));
                        }
                    }
                }
                Err(missing())
            }
        }
    }

    /// A small file, whole.
    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let (input, size) = self.open(name)?;
        let bad = |why: String| Error::Unusable { object: self.name(), why };
        if size > DOCUMENT_BYTES_MAX {
            return Err(bad(format!("{name} is larger than {DOCUMENT_BYTES_MAX} bytes")));
        }
        let mut bytes = Vec::new();
        input.take(DOCUMENT_BYTES_MAX).read_to_end(&mut bytes).map_err(|e| bad(format!("{name}: {e}")))?;
        Ok(bytes)
    }

    fn name(&self) -> String {
        match self {
            Self::Dir(path) | Self::Tar { path, .. } => path.display().to_string(),
        }
    }
}

/// A path without "." and "..", relative to the archive's root and never above it.
fn clean(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

struct Counting<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// One image to be imported: its configuration, where its layers are, and its names.
struct Found {
    config: Vec<u8>,
    /// File name and digest of the packed bytes, if it is known.
    layers: Vec<(String, Option<Digest>)>,
    /// Digest of the manifest or index.
    top: Option<Digest>,
    names: Vec<String>,
}

fn import_layout(shared: &Arc<Shared>, source: &Source) -> Result<Vec<String>, Error> {
    let index: Value = parse(source, "index.json")?;
    let mut ids = Vec::new();
    for entry in index["manifests"].as_array().into_iter().flatten() {
        let bad = |why: String| Error::Unusable { object: source.name(), why };
        let top = entry["digest"].as_str().and_then(Digest::parse).ok_or_else(|| bad("a digest of index.json is not sha256".into()))?;
        let (mut digest, mut image) = (top.clone(), None);
        for _ in 0..3 {
            let bytes = checked(source, &digest)?;
            match media::parse_manifest(&bytes, &shared.options.platform, &source.name())? {
                Manifest::Index(descriptor) => digest = descriptor.digest,
                Manifest::Image { config, layers } => {
                    image = Some((config, layers));
                    break;
                }
            }
        }
        let (config, layers) = image.ok_or_else(|| bad("its indexes are nested too deep".into()))?;
        let name = entry["annotations"][NAME_ANNOTATION].as_str();
        // The specification's own annotation may be a whole name, or a tag alone (which names nothing).
        let name = name.or(entry["annotations"]["org.opencontainers.image.ref.name"].as_str().filter(|n| n.contains([':', '/'])));
        let layers = layers.into_iter().map(|l| (blob_path(&l.digest), Some(l.digest))).collect();
        let found = Found {
            config: checked(source, &config.digest)?,
            layers,
            top: Some(top),
            names: name.map(str::to_owned).into_iter().collect(),
        };
        ids.push(store(shared, source, found)?);
    }
    Ok(ids)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn import_docker(shared: &Arc<Shared>, source: &Source) -> Result<Vec<String>, Error> {
    let saved: Vec<Saved> = parse(source, "manifest.json")?;
    let mut ids = Vec::new();
    for image in saved {
        let found = Found {
            config: source.read(&image.config)?,
            layers: image.layers.into_iter().map(|path| (path, None)).collect(),
            top: None,
            names: image.repo_tags.unwrap_or_default(),
        };
        ids.push(store(shared, source, found)?);
    }
    Ok(ids)
}

fn parse<T: serde::de::DeserializeOwned>(source: &Source, name: &str) -> Result<T, Error> {
    let bytes = source.read(name)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Unusable { object: source.name(), why: format!("{name}: {e}") })
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}", digest.as_str().replace(':', "/"))
}

fn checked(source: &Source, digest: &Digest) -> Result<Vec<u8>, Error> {
    let bytes = source.read(&blob_path(digest))?;
    let actual = Digest::of(&bytes);
    if actual != *digest {
        return Err(Error::Digest {
            object: format!("blob of {}", source.name()),
            expected: digest.to_string(),
            actual: actual.to_string(),
        });
    }
    Ok(bytes)
}

fn store(shared: &Arc<Shared>, source: &Source, found: Found) -> Result<String, Error> {
    let references: Vec<Reference> = found.names.iter().map(|n| Reference::parse(n)).collect::<Result<_, _>>()?;
    let config = media::parse_config(&found.config, &shared.options.platform, &source.name())?;
    if config.diff_ids.len() != found.layers.len() {
        let why = format!("it has {} layers and {} diff ids", found.layers.len(), config.diff_ids.len());
        return Err(Error::Unusable { object: source.name(), why });
    }
    let chains: Vec<String> = media::chain_ids(&config.diff_ids).iter().map(ToString::to_string).collect();
    let pins = shared.pin(&chains);
    let mut size_bytes = found.config.len() as u64;
    for (n, ((path, packed), diff_id)) in found.layers.into_iter().zip(config.diff_ids).enumerate() {
        // A pull of the same chain waits for us, and we for it.
        let in_flight = shared.in_flight(&chains[n]);
        let _only = in_flight.blocking_lock();
        let (input, size) = source.open(&path)?;
        size_bytes = size_bytes.saturating_add(size);
        if shared.has_layer(&chains[n]) {
            continue;
        }
        let limits = Limits { bytes: shared.options.unpacked_bytes_max, entries: shared.options.entries_max };
        let expected = Expected { packed, diff_id, limits };
        let staged = layer::stage(&shared.disk, shared.next_number(), input, &expected)?;
        shared.commit_blocking(staged, &chains[..n], &chains[n], expected.diff_id.as_str())?;
    }
    let digests = match &found.top {
        Some(top) => references.iter().map(|r| format!("{}@{top}", r.name())).collect(),
        None => Vec::new(),
    };
    let id = shared.put_image_blocking(ImageRecord {
        version: VERSION,
        id: Digest::of(&found.config).to_string(),
        tags: references.iter().filter_map(Reference::tagged).collect(),
        digests,
        size_bytes,
        config: String::from_utf8_lossy(&found.config).into_owned(),
        layers: chains,
    });
    drop(pins);
    id
}
