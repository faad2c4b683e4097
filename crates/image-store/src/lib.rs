//! Images: pulled from registries or imported from archives, unpacked once per node, mounted as overlayfs snapshots.
#![forbid(unsafe_code)]

mod error;
mod types;

use std::path::Path;

use tokio_util::sync::CancellationToken;

pub use error::{Error, ErrorKind};
pub use types::{Auth, Image, ImageConfig, Mount, Options, Platform, Progress, Stage, Usage};

/// What functions here return.
pub type Result<T> = std::result::Result<T, Error>;

/// The images and snapshots below one directory.
#[derive(Debug)]
pub struct ImageStore {}

fn unimplemented<T>() -> Result<T> {
    Err(Error::Task { what: "image store (not yet implemented)" })
}

impl ImageStore {
    /// Opens the store below `root`, and drops what a crash or a power cut left half done.
    ///
    /// # Errors
    /// When the directory can't be used, or another process has it open.
    pub async fn open(root: &Path, options: Options) -> Result<Self> {
        let _ = (root, options);
        Ok(Self {})
    }

    /// Pulls an image; layers that are here already are not fetched. Dropping the future or cancelling ends it.
    ///
    /// # Errors
    /// See [`Error::kind`].
    pub async fn pull(&self, reference: &str, auth: Option<Auth>, cancel: CancellationToken) -> Result<Image> {
        let _ = (reference, auth, cancel);
        unimplemented()
    }

    /// Imports all images of an OCI layout (directory or tar) or a `docker save` archive.
    ///
    /// # Errors
    /// As for [`Self::pull`].
    pub async fn import(&self, path: &Path) -> Result<Vec<Image>> {
        let _ = path;
        unimplemented()
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Image> {
        Vec::new()
    }

    /// The image with this id ("sha256:…", hex, or a unique prefix of 3 or more digits) or reference.
    pub fn get(&self, reference_or_id: &str) -> Option<Image> {
        let _ = reference_or_id;
        None
    }

    /// Removes an image with all its names, and the layers that nothing else needs. One that is not here is a success.
    ///
    /// # Errors
    /// When files can't be removed.
    pub async fn remove(&self, reference_or_id: &str) -> Result<()> {
        let _ = reference_or_id;
        unimplemented()
    }

    /// What all layers and snapshots take on disk.
    ///
    /// # Errors
    /// When a directory can't be read.
    pub async fn usage(&self) -> Result<Usage> {
        unimplemented()
    }

    /// Makes a writable snapshot of an image for container `key`, and returns the mounts that make its root. A key that is there
    /// already gives the same mounts again.
    ///
    /// # Errors
    /// A bad key, or an image whose layers are gone.
    pub async fn prepare_snapshot(&self, key: &str, image: &Image) -> Result<Vec<Mount>> {
        let _ = (key, image);
        unimplemented()
    }

    /// Removes a snapshot (it must not be mounted). One that is not here is a success.
    ///
    /// # Errors
    /// When files can't be removed.
    pub async fn remove_snapshot(&self, key: &str) -> Result<()> {
        let _ = key;
        unimplemented()
    }

    /// What the container wrote into its snapshot.
    ///
    /// # Errors
    /// [`Error::SnapshotMissing`].
    pub async fn snapshot_usage(&self, key: &str) -> Result<Usage> {
        let _ = key;
        unimplemented()
    }

    /// Keys of all snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        Vec::new()
    }

    /// Progress of all pulls from now on; a receiver that falls behind loses the oldest events.
    pub fn progress(&self) -> tokio::sync::broadcast::Receiver<Progress> {
        tokio::sync::broadcast::channel(1).1
    }
}
