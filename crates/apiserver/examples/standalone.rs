//! An API server alone, for development: makes keys and `admin.kubeconfig` in the directory given and serves until Ctrl-C.
//!
//! `cargo run -p apiserver --example standalone -- DIR`

#[path = "../tests/common/mod.rs"]
mod common;

#[tokio::main]
async fn main() -> Result<(), apiserver::Error> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let dir = std::env::args().nth(1).unwrap_or_else(|| "/tmp/apiserver".to_owned());
    std::fs::create_dir_all(&dir).ok();
    let pki = common::Pki::new(std::path::Path::new(&dir));
    println!("{}", pki.kubeconfig("admin", "kubernetes-admin", &["coracle:cluster-admins"]).display());
    pki.kubeconfig("masters", "root", &["system:masters"]);
    pki.kubeconfig("node", "system:node:n1", &["system:nodes"]);
    pki.kubeconfig("nobody", "nobody", &[]);
    pki.kubeconfig("scheduler", "system:kube-scheduler", &[]);
    pki.kubeconfig("kcm", "system:kube-controller-manager", &[]);
    let cancel = tokio_util::sync::CancellationToken::new();
    let ended = cancel.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            ended.cancel();
        }
    });
    apiserver::run(pki.config(), cancel).await
}
