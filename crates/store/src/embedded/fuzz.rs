//! Mutated log files: the store opens, or says what is wrong with which file; it never panics, and it never changes what it refuses.

use bytes::Bytes;
use testkit::fuzz::Fuzz;

use super::log::{LOG_FILE, Log};
use super::record::Record;
use super::{Embedded, Options};

fn records() -> Vec<u8> {
    let put = |revision, key: &'static str, version| Record::Put {
        revision,
        sub: 0,
        create_revision: 2,
        version,
        lease: 7,
        key: Bytes::from_static(key.as_bytes()),
        value: Bytes::from_static(b"value"),
    };
    let all = [
        Record::LeaseGrant { id: 7, ttl_seconds: 60 },
        put(2, "/registry/a", 1),
        put(3, "/registry/a", 2),
        Record::Delete { revision: 4, sub: 0, key: Bytes::from_static(b"/registry/a") },
        Record::Compact { revision: 3 },
        Record::Revision { revision: 5 },
        Record::LeaseRevoke { id: 7 },
    ];
    let mut bytes = Vec::new();
    all.iter().for_each(|record| record.encode(&mut bytes));
    bytes
}

/// A log with these frames, which are sound whatever is in them.
fn log_of(dir: &std::path::Path, frames: &[&[u8]]) -> Vec<u8> {
    let path = dir.join(LOG_FILE);
    let _ = std::fs::remove_file(&path);
    let mut log = Log::open(dir, |_| {}).expect("a new log");
    frames.iter().for_each(|frame| log.write(frame).expect("written"));
    std::fs::read(path).expect("there")
}

fn open(dir: &std::path::Path) {
    let path = dir.join(LOG_FILE);
    let before = std::fs::read(&path).expect("there");
    match Embedded::open(dir, Options::default()) {
        Ok(store) => drop(store),
        Err(error) => {
            assert!(error.to_string().contains("store"), "{error}");
            assert_eq!(std::fs::read(&path).expect("still there"), before, "a log that was refused was changed");
        }
    }
}

#[test]
fn files() {
    let dir = tempfile::tempdir().expect("a directory");
    let records = records();
    let seed = log_of(dir.path(), &[&records, &records[..0]]);
    Fuzz::new("store-file").seed(seed).words(&["CORSTORE", "1MRF"]).runs(800).run(|input| {
        std::fs::write(dir.path().join(LOG_FILE), input).expect("written");
        open(dir.path());
    });
}

/// With checksums that are right: what a later version, or a mistake of this one, would write.
#[test]
fn records_that_make_no_sense() {
    let dir = tempfile::tempdir().expect("a directory");
    let records = records();
    Fuzz::new("store-records").seed(records.clone()).runs(800).run(|input| {
        log_of(dir.path(), &[&records, input]);
        open(dir.path());
    });
}
