//! A complete Kubernetes in one program.
fn main() {}
