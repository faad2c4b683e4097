//! The node's keeper: subreaper of all shims, and holder of descriptors that are to outlive one.

use crate::args::Args;

/// Runs the keeper.
///
/// # Errors
/// Not built yet.
pub fn run(_args: &Args) -> Result<(), String> {
    Err("the keeper is not implemented yet".to_owned())
}
