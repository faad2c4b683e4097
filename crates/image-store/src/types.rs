//! What callers see: images, their configuration, mounts, usage, progress.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of an [`crate::ImageStore`].
#[derive(Debug, Clone)]
pub struct Options {
    /// Which manifest of an index is taken.
    pub platform: Platform,
    /// How many layers are fetched at a time, over all pulls.
    pub layers_in_parallel: usize,
    /// A layer that unpacks to more bytes than this is refused.
    pub unpacked_bytes_max: u64,
    /// A layer with more entries than this is refused.
    pub entries_max: u64,
    /// Mount snapshots `volatile`: nothing that a container wrote into its own root survives a power cut, as it needs not.
    pub volatile: bool,
    /// A connection on which nothing arrives for so long counts as broken.
    pub stall_timeout: Duration,
    /// How often a transfer is begun again without any byte gained.
    pub retries_max: u32,
    /// Pause before the first retry; doubles with each.
    pub retry_pause: Duration,
    /// A PEM file of certificate authorities beside the built-in ones; the system's bundle by default, if there is one.
    pub ca_file: Option<PathBuf>,
    /// Directory of containerd's `hosts.toml` files, one folder per registry; read at each pull.
    pub hosts_dir: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        let bundle = PathBuf::from("/etc/ssl/certs/ca-certificates.crt");
        Self {
            platform: Platform::host(),
            layers_in_parallel: 4,
            unpacked_bytes_max: 64 << 30,
            entries_max: 4_000_000,
            volatile: true,
            stall_timeout: Duration::from_secs(60),
            retries_max: 5,
            retry_pause: Duration::from_millis(250),
            ca_file: bundle.exists().then_some(bundle),
            hosts_dir: None,
        }
    }
}

/// An image's platform (OCI image-spec, image-index.md).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// "linux".
    pub os: String,
    /// Go's name: "amd64", "arm64".
    pub architecture: String,
    /// Variant such as "v8"; empty for any.
    pub variant: String,
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "aarch64" => ("arm64", "v8"),
            other => (other, ""),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }
}

/// Credentials for a registry, as CRI's AuthConfig has them.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// User name and password.
    Basic { username: String, password: String },
    /// An OAuth2 refresh token, exchanged at the registry's token server.
    IdentityToken(String),
    /// A bearer token that is sent as it is.
    RegistryToken(String),
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
            Self::RegistryToken(_) => "RegistryToken(…)",
        })
    }
}

/// An image that is here whole: every layer unpacked and committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the configuration: "sha256:…".
    pub id: String,
    /// Names with tags: "docker.io/library/busybox:latest".
    pub repo_tags: Vec<String>,
    /// Names with manifest or index digests.
    pub repo_digests: Vec<String>,
    /// Size of manifest, configuration and compressed layers, in bytes.
    pub size_bytes: u64,
    /// What a container takes from it.
    pub config: ImageConfig,
    /// The configuration as it came, for `inspect`.
    pub config_json: String,
    /// Chain ids, bottom first.
    pub layers: Vec<String>,
}

/// The `config` object of an image (OCI image-spec, config.md).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`: NAME=VALUE.
    pub env: Vec<String>,
    /// `User`: "name", "uid", "uid:gid", "name:group"; empty for root.
    pub user: String,
    /// `WorkingDir`; empty for "/".
    pub working_dir: String,
    /// `StopSignal`: "SIGTERM", "15"; empty for none.
    pub stop_signal: String,
    /// Keys of `Volumes`.
    pub volumes: Vec<String>,
    /// `Labels`.
    pub labels: BTreeMap<String, String>,
}

/// A mount to be made by the shim, in the form of the shim protocol's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// "overlay" or "bind".
    pub r#type: String,
    /// Source; "overlay" for overlay.
    pub source: String,
    /// Options, as mount(8) has them.
    pub options: Vec<String>,
}

/// What something takes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Files, directories, links, devices.
    pub inodes: u64,
}

/// What a pull is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The reference that was asked for, normalised.
    pub reference: String,
    /// Digest of the layer; empty for the image as a whole.
    pub layer: String,
    /// Bytes fetched of it.
    pub bytes_done: u64,
    /// Its size in bytes.
    pub bytes_total: u64,
    /// Where it stands.
    pub stage: Stage,
}

/// The stages of a layer, and at last of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Arriving, and being unpacked while it arrives.
    Fetching,
    /// Unpacked, checked, synced, committed (or found to be here already).
    Committed,
    /// All layers are committed and the image is on record.
    Done,
}
