//! The real kubectl, 1.32 and 1.37, against `coracle up`: every command of the issue, its output checked.

use anyhow::Result;
use e2e::cluster::Cluster;
use e2e::kubectl;

#[test]
fn the_commands_of_kubectl() -> Result<()> {
    let clients = kubectl::clients();
    if clients.is_empty() {
        return Ok(());
    }
    let mut cluster = Cluster::start("kubectl")?;
    kubectl::serve_images(&cluster)?;
    for client in &clients {
        println!("--- {}", client.display());
        kubectl::commands(&cluster, client)?;
        kubectl::over_a_restart(&mut cluster, client)?;
    }
    Ok(())
}
