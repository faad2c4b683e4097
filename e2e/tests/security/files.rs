//! What users of the host can read of a cluster's files: certificates, and no key, Secret, log or image.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;

/// A user who is not root.
const NOBODY: &str = "65534";

/// Looks with another user's eyes (CVE-2021-41103: containerd's directories let users of the host run set-user-id files of images).
pub fn judge(cluster: &Cluster) -> Result<()> {
    let folder = cluster.folder().to_string_lossy().into_owned();
    let find = |user: &str| -> Result<Vec<String>> {
        let enter = cluster.enter(Path::new("setpriv"));
        let mut command = Command::new(enter.get_program());
        command.args(enter.get_args()).args(["--reuid", user, "--regid", user, "--clear-groups", "--"]);
        command.args(["find", &folder, "-xdev", "-type", "f", "-readable"]);
        // Directories that cannot be read are errors of find's, and what is looked for.
        let output = command.stdin(Stdio::null()).output().context("failed to run find")?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    };
    let (all, readable) = (find("0")?, find(NOBODY)?);
    for part in ["/store/", "/pki/ca.key", "/kubeconfig", "/kubelet/pods/", "/cri/layers/"] {
        ensure!(all.iter().any(|file| file.contains(part)), "there is no {part} in {folder}: the files are not where this test looks");
    }
    let public = |file: &&String| {
        let name = file.rsplit('/').next().unwrap_or_default();
        // A lock has a pid in it; the last two are the test's own.
        name.ends_with(".crt") || name == "sa.pub" || name == "lock" || name == "up.log" || name == "exec-request"
    };
    let leaked: Vec<_> = readable.iter().filter(|file| !public(file)).collect();
    ensure!(leaked.is_empty(), "other users of the host can read {leaked:#?}");
    println!("{} files, {} of them readable by others", all.len(), readable.len());
    Ok(())
}
