//! The store's state in memory, and its effects on disk. Disk work runs on blocking threads and is finished even if the caller goes away.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, broadcast};
use tokio::task::JoinHandle;

use crate::disk::{self, Disk, ImageRecord, Index, LayerRecord, SnapshotRecord, VERSION, hex_of};
use crate::error::{Error, file};
use crate::layer::Staged;
use crate::media;
use crate::reference::Reference;
use crate::registry::Transport;
use crate::types::{Image, Mount, Options, Progress};
use crate::unpack;

const PROGRESS_EVENTS_MAX: usize = 256;
const ID_PREFIX_MIN: usize = 3;

/// What all pulls and callers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub options: Options,
    pub transport: Transport,
    pub disk: Disk,
    pub parallel: Semaphore,
    index: Mutex<Index>,
    in_flight: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    progress: broadcast::Sender<Progress>,
    /// Held by whoever changes images' records.
    writer: Mutex<()>,
    _lock: File,
}

/// Layers that no garbage collection takes as long as this lives.
#[derive(Debug)]
pub(crate) struct Pins {
    shared: Arc<Shared>,
    chains: Vec<String>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut index = self.shared.index();
        for chain in &self.chains {
            if let Some(count) = index.pinned.get_mut(chain) {
                *count -= 1;
                if *count == 0 {
                    index.pinned.remove(chain);
                }
            }
        }
    }
}

/// Waits for a blocking task.
pub(crate) async fn join<T>(task: JoinHandle<T>, what: &'static str) -> Result<T, Error> {
    task.await.map_err(|_| Error::Task { what })
}

impl Shared {
    pub fn open(root: &Path, options: Options) -> Result<Self, Error> {
        if options.layers_in_parallel == 0 {
            return Err(Error::Argument { field: "layers in parallel", value: "0".into(), why: "at least one is needed" });
        }
        if let Some(path) = root.to_str().filter(|path| !path.contains([':', ',', '\\'])) {
            tracing::debug!(path, "opening the image store");
        } else {
            let why = "overlayfs can't be given a path with ':', ',' or '\\'";
            return Err(Error::Argument { field: "image store directory", value: root.display().to_string(), why });
        }
        let transport = Transport::new(&options)?;
        let (disk, lock) = Disk::open(root)?;
        let index = disk.load()?;
        Ok(Self {
            parallel: Semaphore::new(options.layers_in_parallel),
            options,
            transport,
            disk,
            index: Mutex::new(index),
            in_flight: Mutex::default(),
            progress: broadcast::channel(PROGRESS_EVENTS_MAX).0,
            writer: Mutex::default(),
            _lock: lock,
        })
    }

    pub fn index(&self) -> MutexGuard<'_, Index> {
        // Each change is one insert or remove: a thread that panicked has left nothing half done.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Tells whoever listens; the event is only made when somebody does.
    pub fn report(&self, progress: impl FnOnce() -> Progress) {
        if self.progress.receiver_count() > 0 {
            let _ = self.progress.send(progress());
        }
    }

    pub fn next_number(&self) -> u64 {
        let mut index = self.index();
        index.next_number += 1;
        index.next_number - 1
    }

    pub fn has_layer(&self, chain: &str) -> bool {
        self.index().layers.contains_key(chain)
    }

    /// The lock of one chain; locks that nobody holds are forgotten.
    pub fn in_flight(&self, chain: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(chain.to_owned()).or_default().clone()
    }

    pub fn pin(self: &Arc<Self>, chains: &[String]) -> Pins {
        let mut index = self.index();
        for chain in chains {
            *index.pinned.entry(chain.clone()).or_default() += 1;
        }
        Pins { shared: self.clone(), chains: chains.to_vec() }
    }

    /// Finishes a staged layer with the look of those below (`below`, bottom first), and commits it.
    pub async fn commit(self: Arc<Self>, staged: Staged, below: Vec<String>, chain: String, diff_id: String) -> Result<(), Error> {
        let task = tokio::task::spawn_blocking(move || self.commit_blocking(staged, &below, &chain, &diff_id));
        join(task, "committing a layer").await?
    }

    pub fn commit_blocking(&self, mut staged: Staged, below: &[String], chain: &str, diff_id: &str) -> Result<(), Error> {
        let mut lower = Vec::new();
        for path in self.layer_dirs(below)?.iter().rev() {
            lower.push(unpack::open_root(path).map_err(file("open", path))?);
        }
        let fs = staged.staging.fs();
        let root = unpack::open_root(&fs).map_err(file("open", &fs))?;
        unpack::complete(&root, &mut staged.unpacked, &lower, diff_id)?;
        drop((root, lower));
        let record = staged.staging.commit(chain, diff_id)?;
        self.index().layers.insert(chain.to_owned(), record);
        Ok(())
    }

    /// Directories of committed layers, in the order of `chains`.
    fn layer_dirs(&self, chains: &[String]) -> Result<Vec<std::path::PathBuf>, Error> {
        let index = self.index();
        let dir = |chain: &String| {
            let record = index.layers.get(chain).ok_or_else(|| Error::ImageMissing { reference: format!("(layer {chain})") })?;
            Ok(self.disk.layer_fs(record.number))
        };
        chains.iter().map(dir).collect()
    }

    /// Puts an image on record; its names leave the images that had them. Pins are held until it is.
    pub async fn put_image(self: Arc<Self>, record: ImageRecord, pins: Pins) -> Result<String, Error> {
        let task = tokio::task::spawn_blocking(move || {
            let _pins = pins;
            self.put_image_blocking(record)
        });
        join(task, "recording an image").await?
    }

    pub fn put_image_blocking(&self, mut record: ImageRecord) -> Result<String, Error> {
        // Two records must not both claim a name; the index itself is not locked while the disk is busy.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut losers = Vec::new();
        {
            let index = self.index();
            if let Some(old) = index.images.get(&record.id) {
                merge(&mut record.tags, &old.tags);
                merge(&mut record.digests, &old.digests);
            }
            for other in index.images.values().filter(|i| i.id != record.id && i.tags.iter().any(|t| record.tags.contains(t))) {
                let mut other = other.clone();
                other.tags.retain(|tag| !record.tags.contains(tag));
                losers.push(other);
            }
        }
        let id = record.id.clone();
        // The new owner of a name comes last: a crash in between leaves nobody with it rather than two.
        losers.push(record);
        self.disk.save_images(&losers)?;
        let mut index = self.index();
        for record in losers {
            index.images.insert(record.id.clone(), record);
        }
        Ok(id)
    }

    /// The id that a reference, an id or a prefix of one stands for.
    pub fn resolve(&self, text: &str) -> Result<Option<String>, Error> {
        let index = self.index();
        if index.images.contains_key(text) {
            return Ok(Some(text.to_owned()));
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let is_id = (ID_PREFIX_MIN..=64).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit());
        // A name goes before the beginning of an id that looks like it, as in containerd.
        if hex.len() == text.len() && (!is_id || text.len() < 64) {
            let reference = Reference::parse(text)?;
            let by_digest = reference.digest.as_ref().map(|digest| format!("{}@{digest}", reference.name()));
            let named = |image: &&ImageRecord| match &by_digest {
                Some(name) => image.digests.contains(name),
                None => reference.tagged().is_some_and(|tag| image.tags.contains(&tag)),
            };
            if let Some(image) = index.images.values().find(named) {
                return Ok(Some(image.id.clone()));
            }
        }
        if !is_id {
            return Ok(None);
        }
        let mut found = index.images.keys().filter(|id| hex_of(id).starts_with(hex));
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => Err(Error::Ambiguous { id: text.to_owned() }),
            (found, _) => Ok(found.cloned()),
        }
    }

    pub fn image(&self, id: &str) -> Option<Image> {
        self.index().images.get(id).map(to_image)
    }

    pub fn images(&self) -> Vec<Image> {
        self.index().images.values().map(to_image).collect()
    }

    pub fn remove_image_blocking(&self, id: &str) -> Result<(), Error> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.disk.forget_image(id)?;
        self.index().images.remove(id);
        self.collect_blocking()
    }

    /// Removes the layers that nothing needs.
    pub fn collect_blocking(&self) -> Result<(), Error> {
        let mut dead = Vec::new();
        {
            // Out of the index and out of the way under the lock; the long removal comes after it.
            let mut index = self.index();
            for layer in index.unused() {
                dead.push(self.disk.retire_layer(layer.number)?);
                index.layers.remove(&layer.chain_id);
            }
        }
        dead.iter().try_for_each(|(dir, name)| disk::remove(dir, name))
    }

    pub fn prepare_blocking(&self, key: &str, image: &Image) -> Result<Vec<Mount>, Error> {
        let path = self.disk.snapshots().join(key);
        let present = self.index().snapshots.get(key).map(|s| s.layers.clone());
        if let Some(layers) = present {
            if layers != image.layers {
                return Err(Error::Argument { field: "snapshot key", value: key.to_owned(), why: "it is a snapshot of another image" });
            }
            // Left by a mount that was not unmounted in order; what it warns of (lost writes) does not matter to a container's own root.
            let incompat = path.join("work/work/incompat/volatile");
            let _ = std::fs::remove_dir(incompat);
            return self.mounts(key, &layers);
        }
        let mounts = self.mounts(key, &image.layers)?;
        // On record before it is on disk, so that no layer is collected in between.
        let record = SnapshotRecord { version: VERSION, layers: image.layers.clone() };
        self.index().snapshots.insert(key.to_owned(), record.clone());
        let made = self.make_snapshot(key, &record);
        if made.is_err() {
            self.index().snapshots.remove(key);
        }
        made.map(|()| mounts)
    }

    fn make_snapshot(&self, key: &str, record: &SnapshotRecord) -> Result<(), Error> {
        let dir = self.disk.snapshots();
        let name = format!("{key}.new");
        disk::remove(&dir, &name)?;
        let path = dir.join(&name);
        for sub in ["fs", "work"] {
            let sub = path.join(sub);
            std::fs::create_dir_all(&sub).map_err(file("create directory", &sub))?;
        }
        // The merged root looks as the upper directory does, so that must look as the image's root.
        if let Some(top) = self.layer_dirs(&record.layers)?.last() {
            copy_look(top, &path.join("fs")).map_err(file("set owner and mode of", &path))?;
        }
        disk::write_record(&path.join("snapshot.json"), record)?;
        std::fs::rename(&path, dir.join(key)).map_err(file("name", &path))
    }

    fn mounts(&self, key: &str, layers: &[String]) -> Result<Vec<Mount>, Error> {
        let path = self.disk.snapshots().join(key);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let upper = text(&path.join("fs"));
        let lower: Vec<String> = self.layer_dirs(layers)?.iter().rev().map(|dir| text(dir)).collect();
        if lower.is_empty() {
            return Ok(vec![Mount { r#type: "bind".into(), source: upper, options: vec!["rbind".into(), "rw".into()] }]);
        }
        let mut options =
            vec![format!("lowerdir={}", lower.join(":")), format!("upperdir={upper}"), format!("workdir={}", text(&path.join("work")))];
        if self.options.volatile {
            options.push("volatile".into());
        }
        Ok(vec![Mount { r#type: "overlay".into(), source: "overlay".into(), options }])
    }

    pub fn remove_snapshot_blocking(&self, key: &str) -> Result<(), Error> {
        let (dir, dead) = self.disk.retire_snapshot(key)?;
        self.index().snapshots.remove(key);
        disk::remove(&dir, &dead)?;
        self.collect_orphans_of_snapshots()
    }

    /// An image that was removed while a container used it leaves its layers to the last snapshot.
    fn collect_orphans_of_snapshots(&self) -> Result<(), Error> {
        let index = self.index();
        let any = !index.unused().is_empty();
        drop(index);
        if any { self.collect_blocking() } else { Ok(()) }
    }

    pub fn layers_usage(&self) -> crate::Usage {
        let index = self.index();
        let add = |all: crate::Usage, l: &LayerRecord| crate::Usage {
            bytes: all.bytes + l.survey.disk_bytes,
            inodes: all.inodes + l.survey.entries,
        };
        index.layers.values().fold(crate::Usage::default(), add)
    }
}

fn copy_look(from: &Path, to: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    std::fs::set_permissions(to, metadata.permissions())
}

fn merge(into: &mut Vec<String>, more: &[String]) {
    for name in more {
        if !into.contains(name) {
            into.push(name.clone());
        }
    }
    into.sort();
}

fn to_image(record: &ImageRecord) -> Image {
    let value: serde_json::Value = serde_json::from_str(&record.config).unwrap_or_default();
    Image {
        id: record.id.clone(),
        repo_tags: record.tags.clone(),
        repo_digests: record.digests.clone(),
        size_bytes: record.size_bytes,
        config: media::image_config(&value["config"]),
        config_json: record.config.clone(),
        layers: record.layers.clone(),
    }
}
