//! Images: pulled from registries or imported from archives, unpacked once per node, mounted as overlayfs snapshots.
//!
//! The seam is OCI distribution 1.1 and Docker's registry protocol (seam 8 of ARCHITECTURE.md). A layer's life:
//!
//! ```text
//! absent -> N.new (arriving, hashed and unpacked in one pass) -> synced -> N (committed) -> N.dead (nothing needs it) -> absent
//! ```
//!
//! **Invariant**: no content store. Packed layers are not kept; what is kept is unpacked, checked against both of its digests, and synced.

#![forbid(unsafe_code)]

mod disk;
mod error;
#[cfg(test)]
mod fuzz;
mod import;
mod layer;
mod media;
mod merge;
mod pull;
mod reference;
mod registry;
mod store;
mod tar;
mod types;
mod unpack;

use std::path::Path;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub use error::{Error, ErrorKind};
pub use reference::{Digest, Reference};
pub use types::{Auth, Image, ImageConfig, Mount, Options, Platform, Progress, Stage, Usage};

use store::{Shared, join};

/// What functions here return.
pub type Result<T> = std::result::Result<T, Error>;

/// The images and snapshots below one directory. Clones are the same store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

impl ImageStore {
    /// Opens the store below `root`, and drops what a crash or a power cut left half done.
    ///
    /// # Errors
    /// When the directory can't be used, or another process has it open.
    pub async fn open(root: &Path, options: Options) -> Result<Self> {
        let root = root.to_owned();
        let opened = tokio::task::spawn_blocking(move || Shared::open(&root, options));
        Ok(Self { shared: Arc::new(join(opened, "opening the image store").await??) })
    }

    /// Pulls an image; layers that are here already are not fetched. Dropping the future or cancelling ends it; what is committed by then stays
    /// for the next try, unless the disk is full.
    ///
    /// # Errors
    /// See [`Error::kind`].
    pub async fn pull(&self, reference: &str, auth: Option<Auth>, cancel: CancellationToken) -> Result<Image> {
        let parsed = Reference::parse(reference)?;
        let id = tokio::select! {
            id = pull::pull(&self.shared, &parsed, auth) => id,
            () = cancel.cancelled() => return Err(Error::Cancelled { reference: reference.to_owned() }),
        };
        if id.as_ref().is_err_and(Error::is_full)
            && let Err(error) = self.collect_garbage().await
        {
            tracing::warn!(%reference, %error, "failed to remove the layers of an image for which there is no room");
        }
        let id = id?;
        self.shared.image(&id).ok_or_else(|| Error::ImageMissing { reference: reference.to_owned() })
    }

    /// Imports all images of an OCI layout (directory or tar) or a `docker save` archive.
    ///
    /// # Errors
    /// When the file is no such archive, or an image in it can't be used.
    pub async fn import(&self, path: &Path) -> Result<Vec<Image>> {
        let (shared, path) = (self.shared.clone(), path.to_owned());
        let ids = join(tokio::task::spawn_blocking(move || import::import(&shared, &path)), "importing").await??;
        Ok(ids.iter().filter_map(|id| self.shared.image(id)).collect())
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Image> {
        self.shared.images()
    }

    /// The image with this id ("sha256:…", hex, or a unique prefix of 3 or more digits) or reference; `None` also for what is neither.
    pub fn get(&self, reference_or_id: &str) -> Option<Image> {
        let id = self.shared.resolve(reference_or_id).ok().flatten()?;
        self.shared.image(&id)
    }

    /// Removes an image with all its names, and the layers that nothing else needs. One that is not here is a success.
    ///
    /// # Errors
    /// A text that is neither reference nor id; files that can't be removed.
    pub async fn remove(&self, reference_or_id: &str) -> Result<()> {
        let Some(id) = self.shared.resolve(reference_or_id)? else { return Ok(()) };
        let shared = self.shared.clone();
        join(tokio::task::spawn_blocking(move || shared.remove_image_blocking(&id)), "removing an image").await?
    }

    /// What all layers take on disk (snapshots: [`Self::snapshot_usage`]).
    ///
    /// # Errors
    /// None at present.
    pub async fn usage(&self) -> Result<Usage> {
        Ok(self.shared.layers_usage())
    }

    /// Makes a writable snapshot of an image for container `key`, and returns the mounts that make its root. A key that is there already (and not
    /// mounted) gives the same mounts again. Nothing is synced.
    ///
    /// # Errors
    /// A bad key, a key of another image's snapshot, or an image whose layers are gone.
    pub async fn prepare_snapshot(&self, key: &str, image: &Image) -> Result<Vec<Mount>> {
        check_key(key)?;
        let (shared, key, image) = (self.shared.clone(), key.to_owned(), image.clone());
        join(tokio::task::spawn_blocking(move || shared.prepare_blocking(&key, &image)), "preparing a snapshot").await?
    }

    /// Where a volume of a snapshot's container is kept, for the caller to make: it goes with the snapshot.
    ///
    /// # Errors
    /// A bad key, or [`Error::SnapshotMissing`].
    pub fn snapshot_volume(&self, key: &str, number: usize) -> Result<std::path::PathBuf> {
        check_key(key)?;
        if !self.shared.index().snapshots.contains_key(key) {
            return Err(Error::SnapshotMissing { key: key.to_owned() });
        }
        Ok(self.shared.disk.snapshots().join(key).join("volumes").join(number.to_string()))
    }

    /// Removes a snapshot (it must not be mounted). One that is not here is a success.
    ///
    /// # Errors
    /// When files can't be removed.
    pub async fn remove_snapshot(&self, key: &str) -> Result<()> {
        check_key(key)?;
        let (shared, key) = (self.shared.clone(), key.to_owned());
        join(tokio::task::spawn_blocking(move || shared.remove_snapshot_blocking(&key)), "removing a snapshot").await?
    }

    /// What the container wrote into its snapshot.
    ///
    /// # Errors
    /// [`Error::SnapshotMissing`].
    pub async fn snapshot_usage(&self, key: &str) -> Result<Usage> {
        check_key(key)?;
        if !self.shared.index().snapshots.contains_key(key) {
            return Err(Error::SnapshotMissing { key: key.to_owned() });
        }
        let path = self.shared.disk.snapshots().join(key).join("fs");
        let measured = tokio::task::spawn_blocking(move || unpack::measure(&path).map_err(error::file("measure", &path)));
        join(measured, "measuring a snapshot").await?
    }

    /// Keys of all snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        self.shared.index().snapshots.keys().cloned().collect()
    }

    /// Removes layers that no image, snapshot or pull needs, such as those of pulls that failed.
    ///
    /// # Errors
    /// When files can't be removed.
    pub async fn collect_garbage(&self) -> Result<()> {
        let shared = self.shared.clone();
        join(tokio::task::spawn_blocking(move || shared.collect_blocking()), "collecting garbage").await?
    }

    /// Progress of all pulls from now on; a receiver that falls behind loses the oldest events.
    pub fn progress(&self) -> tokio::sync::broadcast::Receiver<Progress> {
        self.shared.subscribe()
    }
}

fn check_key(key: &str) -> Result<()> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let ours = key.ends_with(".new") || key.ends_with(".dead");
    if key.is_empty() || key.len() > 128 || key.starts_with('.') || ours || !key.bytes().all(fits) {
        let why = "expected 1 to 128 letters, digits, '-', '_' or '.'";
        return Err(Error::Argument { field: "snapshot key", value: key.to_owned(), why });
    }
    Ok(())
}
