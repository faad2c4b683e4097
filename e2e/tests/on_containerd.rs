//! Our kubelet, with one flag, on upstream's containerd: the kubectl road, as on our own runtime.

use anyhow::{Context, Result};
use e2e::cluster::Cluster;
use e2e::containerd::Release;
use e2e::kubectl;

/// The road on one release of containerd.
fn road(name: &str, folder: &str, release: Option<Release>, reason: &str) -> Result<()> {
    let Some(release) = release else {
        e2e::skip(name, reason);
        return Ok(());
    };
    let Some(client) = kubectl::clients().into_iter().next() else {
        e2e::skip(name, "there is no kubectl");
        return Ok(());
    };
    println!("--- {}, {}", release.version()?, client.display());
    let cluster = Cluster::start_on_containerd(folder, &release)?;
    kubectl::serve_images(&cluster)?;
    kubectl::commands(&cluster, &client).with_context(|| cluster.log_tail())
}

#[test]
fn our_kubelet_on_containerd_2() -> Result<()> {
    road("our_kubelet_on_containerd_2", "ctd2", Release::v2(), "containerd, runc and kubectl are built by Go")
}

#[test]
fn our_kubelet_on_containerd_1_6() -> Result<()> {
    road("our_kubelet_on_containerd_1_6", "ctd16", Release::debian(), "containerd 1.6 and runc are Debian's packages")
}
