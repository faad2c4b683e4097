//! Generated messages of the wire seams (etcd, CRI, shim v2, Sandbox), a feature per seam.

#![forbid(unsafe_code)]

#[cfg(feature = "cri")]
pub mod cri;

#[cfg(feature = "etcd")]
pub mod etcd;

#[cfg(feature = "shim")]
pub mod shim;
#[cfg(feature = "shim")]
pub mod ttrpc;
