//! Errors of the pod network: each names the act and the object.

use std::io;

use camino::Utf8PathBuf;

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A CIDR that can't be used.
    #[error("bad pod CIDR {value:?}: {why}")]
    Cidr { value: String, why: &'static str },
    /// A name that the kernel would refuse.
    #[error("bad {field} {value:?}: {why}")]
    Name { field: &'static str, value: String, why: &'static str },
    /// An id that can't be a file name.
    #[error("bad sandbox id {id:?}: expected 1 to 128 letters, digits, '-', '_' or '.'")]
    SandboxId { id: String },
    /// A file of ours could not be read or written.
    #[error("failed to {act} {path}")]
    File { act: &'static str, path: Utf8PathBuf, source: io::Error },
    /// A record that does not parse.
    #[error("failed to read record {path}")]
    Record { path: Utf8PathBuf, source: serde_json::Error },
    /// A record of a newer version.
    #[error("record {path} has version {version}, this program knows up to {known}")]
    RecordVersion { path: Utf8PathBuf, version: u32, known: u32 },
    /// Another process works in the state directory.
    #[error("network state {path} is in use by another process")]
    InUse { path: Utf8PathBuf },
    /// Netlink or nftables.
    #[error("failed to {act}")]
    Kernel { act: String, source: linux::netlink::Error },
    /// The pod's namespace.
    #[error("failed to set up network of sandbox {sandbox_id}")]
    Namespace { sandbox_id: String, source: linux::netns::Error },
    /// The interface is not in the pod's namespace.
    #[error("interface {interface} of sandbox {sandbox_id} is missing")]
    InterfaceMissing { interface: String, sandbox_id: String },
    /// The bridge's name belongs to something else.
    #[error("interface {name} exists and is a {kind}, not a bridge: choose another bridge name")]
    NotABridge { name: String, kind: String },
    /// The bridge is another instance's.
    #[error("bridge {name} belongs to {owner}: end that one with `coracle down`, or choose another bridge name, pod CIDR and table")]
    BridgeOwned { name: String, owner: String },
    /// Another interface has addresses of the pod CIDR.
    #[error("pod CIDR {cidr} overlaps address {address} of interface {interface}: choose another pod CIDR")]
    CidrTaken { cidr: String, address: String, interface: String },
    /// All addresses are taken.
    #[error("no address is free in {cidr}: {taken} are taken")]
    AddressesExhausted { cidr: String, taken: usize },
    /// An address asked for can't be had.
    #[error("address {address} can't be given to sandbox {sandbox_id}: {why}")]
    Address { address: String, sandbox_id: String, why: String },
    /// A host port is another sandbox's.
    #[error("host port {port}/{protocol} is taken by sandbox {owner}")]
    PortTaken { port: u16, protocol: &'static str, owner: String },
    /// A port mapping that the built-in network can't do.
    #[error("port mapping {port}/{protocol} of sandbox {sandbox_id}: {why}")]
    PortMapping { port: u16, protocol: &'static str, sandbox_id: String, why: &'static str },
    /// Traffic limits without a plugin for them.
    #[error("sandbox {sandbox_id} asks for a bandwidth limit, which {network} can't carry out")]
    Bandwidth { sandbox_id: String, network: String },
    /// The sandbox has a network already.
    #[error("sandbox {sandbox_id} is attached to a network already")]
    Exists { sandbox_id: String },
    /// The sandbox is not known.
    #[error("sandbox {sandbox_id} has no network")]
    Unknown { sandbox_id: String },
    /// A network that is not as its record says.
    #[error("network of sandbox {sandbox_id} is broken: {what}")]
    Broken { sandbox_id: String, what: String },
    /// CNI configuration or execution.
    #[error(transparent)]
    Cni(#[from] crate::cni::Error),
    /// Several steps of a teardown failed; all others were carried out.
    #[error("{count} steps failed")]
    Several { count: usize, source: Box<Error> },
}

impl Error {
    /// One error of several: the first as the source, and their number.
    pub(crate) fn collect(errors: Vec<Error>) -> Result<(), Error> {
        let count = errors.len();
        match (count, errors.into_iter().next()) {
            (_, None) => Ok(()),
            (1, Some(error)) => Err(error),
            (_, Some(error)) => Err(Error::Several { count, source: Box::new(error) }),
        }
    }
}
