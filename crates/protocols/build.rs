//! Compiles the seams' `.proto` files with protox (no protoc), one function per cargo feature.

use std::error::Error;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if enabled("CRI") {
        compile_cri()?;
    }
    if enabled("ETCD") {
        compile_etcd()?;
    }
    if enabled("SHIM") {
        compile_shim()?;
    }
    Ok(())
}

/// Whether cargo builds this crate with the feature (named in upper case).
fn enabled(feature: &str) -> bool {
    std::env::var_os(format!("CARGO_FEATURE_{feature}")).is_some()
}

/// Where the protos live; a change of any of them compiles again.
fn proto_root(seam: &str) -> PathBuf {
    let root = Path::new("proto");
    println!("cargo::rerun-if-changed={}", root.join(seam).display());
    root.to_path_buf()
}

/// Seam 4: CRI v1 with tonic's client and server.
fn compile_cri() -> Result<(), Box<dyn Error>> {
    let root = proto_root("cri");
    let files = protox::compile(["cri/api.proto"], [&root])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}

/// Seam 2: etcd v3 with tonic's client; keys and values are shared slices.
fn compile_etcd() -> Result<(), Box<dyn Error>> {
    let root = proto_root("etcd");
    let files = protox::compile(["etcd/rpc.proto"], [&root])?;
    tonic_prost_build::configure().build_server(false).bytes(".").compile_fds(files)?;
    Ok(())
}

/// Seam 5: shim v2's messages and coracle.io.v1, without services (both ends speak ttrpc in a codec of their own).
fn compile_shim() -> Result<(), Box<dyn Error>> {
    let root = proto_root("shim");
    proto_root("coracle");
    let names = [
        "shim/ttrpc.proto",
        "shim/task.proto",
        "shim/sandbox.proto",
        "shim/bootstrap.proto",
        "shim/events.proto",
        "shim/forward.proto",
        "shim/runc_options.proto",
        "shim/runtime_options.proto",
        "shim/cgroups_v1.proto",
        "shim/cgroups_v2.proto",
        "shim/pod.proto",
        "coracle/shim.proto",
    ];
    let files = protox::compile(names, [&root])?;
    prost_build::Config::new().btree_map(["."]).include_file("shim_packages.rs").compile_fds(files)?;
    Ok(())
}
