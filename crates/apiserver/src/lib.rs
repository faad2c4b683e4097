//! The Kubernetes API server.
#![forbid(unsafe_code)]
pub mod admission;
pub mod authn;
pub mod authz;
pub mod bootstrap;
pub mod lookup;
pub mod names;
pub mod reviews;
