//! `coracle etcd`: what one does with a store beside running it, in etcdutl's words.

use anyhow::Result;
use camino::Utf8PathBuf;
use clap::Subcommand;
use store::{SnapshotStatus, snapshot_restore, snapshot_save, snapshot_status};

/// What to do with a store.
#[derive(Subcommand)]
pub enum Command {
    /// Save, look at or restore a snapshot of the embedded store.
    #[command(subcommand)]
    Snapshot(Snapshot),
}

/// What to do with a snapshot.
#[derive(Subcommand)]
pub enum Snapshot {
    /// Write a snapshot to a new file. The API server may be running.
    Save {
        /// The file; nothing may be there.
        file: Utf8PathBuf,
        /// The store's directory: DATA/store of a `coracle up`.
        #[arg(long, default_value = "/var/lib/coracle/store")]
        data_dir: Utf8PathBuf,
    },
    /// Print what a snapshot holds.
    Status {
        /// The snapshot.
        file: Utf8PathBuf,
    },
    /// Make a store of a snapshot, in a directory that has none. Components must be restarted: the revisions go back.
    Restore {
        /// The snapshot.
        file: Utf8PathBuf,
        /// The store's directory: DATA/store of a `coracle up`.
        #[arg(long, default_value = "/var/lib/coracle/store")]
        data_dir: Utf8PathBuf,
    },
}

/// Runs the command; what it prints is data.
pub async fn run(command: Command) -> Result<()> {
    let Command::Snapshot(snapshot) = command;
    let status = tokio::task::spawn_blocking(move || match snapshot {
        Snapshot::Save { file, data_dir } => snapshot_save(data_dir.as_std_path(), file.as_std_path()),
        Snapshot::Status { file } => snapshot_status(file.as_std_path()),
        Snapshot::Restore { file, data_dir } => snapshot_restore(file.as_std_path(), data_dir.as_std_path()),
    });
    let SnapshotStatus { revision, keys, bytes } = status.await??;
    println!("{{\"revision\":{revision},\"totalKey\":{keys},\"totalSize\":{bytes}}}");
    Ok(())
}
