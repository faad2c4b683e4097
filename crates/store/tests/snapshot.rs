//! Snapshots: what was acknowledged before one is in it, and a store comes back from it.

mod common;

use common::{embedded, get, put};
use store::{Embedded, Error, Options, Store, snapshot_restore, snapshot_save, snapshot_status};

#[tokio::test]
async fn a_store_comes_back_from_a_snapshot_made_while_it_runs() {
    let (store, folder) = embedded().await;
    let lease = store.lease_grant(0, 600).await.expect("grant").id;
    for number in 0..20 {
        put(&store, &format!("/k/{}", number % 7), &number.to_string()).await;
    }
    let revision = store.revision().await.expect("revision");
    let file = folder.path().join("snapshot");
    let saved = snapshot_save(folder.path(), &file).expect("save");
    assert_eq!((saved.revision, saved.keys), (revision, 7));
    put(&store, "/later", "x").await;
    assert!(matches!(snapshot_save(folder.path(), &file), Err(Error::Io { .. })), "a snapshot replaces nothing");
    assert_eq!(snapshot_status(&file).expect("status"), saved);
    assert!(matches!(snapshot_restore(&file, folder.path()), Err(Error::Locked { .. })), "a store in use is left alone");

    let other = tempfile::tempdir().expect("tempdir");
    assert_eq!(snapshot_restore(&file, other.path()).expect("restore"), saved);
    assert!(matches!(snapshot_restore(&file, other.path()), Err(Error::Io { .. })), "a store that is there is left alone");
    let back = Embedded::open(other.path(), Options::default()).expect("open");
    assert_eq!(back.revision().await.expect("revision"), revision);
    assert!(get(&back, "/later", 0).await.is_none());
    assert_eq!(get(&back, "/k/3", 0).await.expect("there").value, "17");
    assert_eq!(get(&back, "/k/3", revision - 3).await.expect("there").value, "10", "with its history");
    assert_eq!(back.lease_time_to_live(lease).await.expect("lease").granted_ttl_seconds, 600);
    assert_eq!(put(&back, "/k/3", "new").await, revision + 1);
}

#[tokio::test]
async fn a_damaged_snapshot_is_refused_and_changes_nothing() {
    let (store, folder) = embedded().await;
    put(&store, "/a", "1").await;
    put(&store, "/b", "2").await;
    let file = folder.path().join("snapshot");
    snapshot_save(folder.path(), &file).expect("save");
    let bytes = std::fs::read(&file).expect("read");
    for damaged in [&bytes[..bytes.len() - 1], b"hello, I am no snapshot at all, only text", b""] {
        std::fs::write(&file, damaged).expect("write");
        let other = tempfile::tempdir().expect("tempdir");
        assert!(matches!(snapshot_restore(&file, other.path()), Err(Error::Corrupt { .. })));
        assert_eq!(std::fs::read_dir(other.path()).expect("list").count(), 0);
    }
}
