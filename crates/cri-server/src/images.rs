//! The image store behind CRI's words.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image_store::{Auth, ErrorKind, Image, ImageStore, Usage};
use protocols::cri::v1::{AuthConfig, Image as CriImage, ImageSpec, Int64Value};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::spec::ImageDefaults;

/// A mount that a snapshot's root file system is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotMount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// The image store.
#[derive(Clone, Debug)]
pub struct Images(Arc<ImageStore>);

fn failed(act: &'static str, object: impl Into<String>) -> impl FnOnce(image_store::Error) -> Error {
    let object = object.into();
    move |source| Error::Image { act, object, source: Box::new(source) }
}

/// The gRPC code of a store's error.
pub fn code(error: &image_store::Error) -> tonic::Code {
    // containerd's pull answers Unknown to most failures, and the kubelet reads no more than that.
    match error.kind() {
        ErrorKind::InvalidArgument => tonic::Code::InvalidArgument,
        ErrorKind::NotFound => tonic::Code::NotFound,
        ErrorKind::Cancelled => tonic::Code::Cancelled,
        _ => tonic::Code::Unknown,
    }
}

impl Images {
    /// Wraps a store.
    pub fn new(store: Arc<ImageStore>) -> Self {
        Self(store)
    }

    /// All images.
    pub fn list(&self) -> Vec<Image> {
        self.0.list()
    }

    /// The image of a reference or an id, if it is there.
    pub fn find(&self, reference: &str) -> Option<Image> {
        self.0.get(reference)
    }

    /// The image of a reference or an id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, reference: &str) -> Result<Image> {
        self.find(reference).ok_or_else(|| Error::NotFound { kind: "image", id: reference.to_owned() })
    }

    /// Fetches an image.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub async fn pull(&self, reference: &str, auth: Option<AuthConfig>, cancel: CancellationToken) -> Result<Image> {
        self.0.pull(reference, auth.map(credentials).transpose()?.flatten(), cancel).await.map_err(failed("pull image", reference))
    }

    /// Removes an image; one that is not there is as good.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub async fn remove(&self, reference: &str) -> Result<()> {
        self.0.remove(reference).await.map_err(failed("remove image", reference))
    }

    /// Makes a container's writable layer over an image.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub async fn prepare_snapshot(&self, key: &str, image: &Image) -> Result<Vec<SnapshotMount>> {
        let mounts = self.0.prepare_snapshot(key, image).await.map_err(failed("prepare the snapshot of container", key))?;
        Ok(mounts.into_iter().map(|mount| SnapshotMount { kind: mount.r#type, source: mount.source, options: mount.options }).collect())
    }

    /// Removes a container's writable layer; one that is not there is as good.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub async fn remove_snapshot(&self, key: &str) -> Result<()> {
        self.0.remove_snapshot(key).await.map_err(failed("remove the snapshot of container", key))
    }

    /// Where a container's volume is kept: beside its writable layer, with which it goes.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn snapshot_volume(&self, key: &str, number: usize) -> Result<std::path::PathBuf> {
        self.0.snapshot_volume(key, number).map_err(failed("make a volume of container", key))
    }

    /// What a container wrote into its layer; none if there is no such layer.
    pub async fn snapshot_usage(&self, key: &str) -> Option<Usage> {
        self.0.snapshot_usage(key).await.ok()
    }

    /// What all images and snapshots take.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub async fn usage(&self) -> Result<Usage> {
        self.0.usage().await.map_err(failed("measure", "the image store"))
    }

    /// Keys of all snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        self.0.snapshots()
    }
}

/// CRI's credentials; all fields empty are none. `auth` is `USER:PASSWORD` in base64.
fn credentials(auth: AuthConfig) -> Result<Option<Auth>> {
    if !auth.username.is_empty() {
        return Ok(Some(Auth::Basic { username: auth.username, password: auth.password }));
    }
    if !auth.auth.is_empty() {
        let refuse = || Error::Invalid("auth.auth is not USER:PASSWORD in base64".to_owned());
        let text = STANDARD.decode(&auth.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(refuse)?;
        let (username, password) = text.split_once(':').ok_or_else(refuse)?;
        return Ok(Some(Auth::Basic { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() }));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Auth::IdentityToken(auth.identity_token)));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Some(Auth::RegistryToken(auth.registry_token)));
    }
    Ok(None)
}

/// What the image says of its processes.
pub fn defaults(image: &Image) -> ImageDefaults {
    let config = &image.config;
    ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        user: config.user.clone(),
        working_dir: config.working_dir.clone(),
    }
}

/// CRI's Image.
pub fn to_cri(image: &Image) -> CriImage {
    let user = image.config.user.split(':').next().unwrap_or("");
    let uid = user.parse::<i64>().ok();
    CriImage {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        username: if uid.is_some() { String::new() } else { user.to_owned() },
        uid: uid.map(|value| Int64Value { value }),
        spec: Some(ImageSpec { image: image.id.clone(), ..ImageSpec::default() }),
        pinned: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_all_kinds() {
        let none = AuthConfig::default;
        let basic = |username: &str, password: &str| Some(Auth::Basic { username: username.into(), password: password.into() });
        let cases = [
            (none(), None),
            (AuthConfig { username: "u".into(), password: "p".into(), ..none() }, basic("u", "p")),
            (AuthConfig { auth: "dTpw".into(), ..none() }, basic("u", "p")),
            (AuthConfig { identity_token: "i".into(), ..none() }, Some(Auth::IdentityToken("i".into()))),
            (AuthConfig { registry_token: "r".into(), ..none() }, Some(Auth::RegistryToken("r".into()))),
        ];
        for (auth, expected) in cases {
            assert_eq!(credentials(auth).expect("good"), expected);
        }
        assert!(credentials(AuthConfig { auth: "!".into(), ..none() }).is_err());
    }
}
