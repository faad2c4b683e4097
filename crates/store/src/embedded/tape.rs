//! Power cuts: what the log did to its disk is written down, and played back up to any moment, with any of what was not yet
//! synced: writes torn at 512 bytes, file lengths without data, names that were changed and whose directory was not synced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::{Embedded, Options};
use crate::{DeleteRequest, KeyValue, Op, PutRequest, RangeRequest, Store, Txn};

/// What a disk writes whole.
const SECTOR: usize = 512;
/// Power cuts that are played.
const CUTS: usize = 3000;

/// One change.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    Create {
        name: String,
        inode: u64,
    },
    Write {
        inode: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    SetLength {
        inode: u64,
        length: u64,
    },
    Sync {
        inode: u64,
    },
    Rename {
        inode: u64,
        from: String,
        to: String,
    },
    Remove {
        name: String,
    },
    SyncDir,
    /// A client was told that this revision is there.
    Acknowledged {
        revision: i64,
    },
}

static TAPES: Mutex<BTreeMap<PathBuf, Vec<Effect>>> = Mutex::new(BTreeMap::new());

/// Writes a change down, where the directory is on tape.
pub(crate) fn note(path: &Path, effect: impl FnOnce() -> Effect) {
    if let Some(dir) = path.parent() {
        note_in(dir, effect);
    }
}

/// As [`note`], for a change of the directory itself.
pub(crate) fn note_in(dir: &Path, effect: impl FnOnce() -> Effect) {
    let mut tapes = TAPES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(tape) = tapes.get_mut(dir) {
        tape.push(effect());
    }
}

pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(crate) fn inode(file: &File) -> u64 {
    file.metadata().expect("an open file has metadata").ino()
}

/// Numbers of a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).expect("below a usize")
    }
}

/// What is on a disk.
#[derive(Clone, Debug, Default)]
struct Disk {
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Vec<u8>>,
}

impl Disk {
    fn name_change(&mut self, effect: &Effect) {
        match effect {
            Effect::Create { name, inode } => {
                self.names.insert(name.clone(), *inode);
            }
            // The name is of this file, whatever of the old name's own changes reached the disk.
            Effect::Rename { inode, from, to } => {
                self.names.remove(from);
                self.names.insert(to.clone(), *inode);
            }
            Effect::Remove { name } => {
                self.names.remove(name);
            }
            _ => {}
        }
    }

    /// One write or new length; what of it reached the disk is `keeps`' choice, sector by sector.
    fn data_change(&mut self, effect: &Effect, mut keeps: impl FnMut() -> bool) {
        match effect {
            Effect::Create { inode, .. } => {
                self.files.insert(*inode, Vec::new());
            }
            Effect::SetLength { inode, length } if keeps() => {
                let length = usize::try_from(*length).expect("small");
                self.files.entry(*inode).or_default().resize(length, 0);
            }
            Effect::Write { inode, offset, bytes } => {
                let file = self.files.entry(*inode).or_default();
                let start = usize::try_from(*offset).expect("small");
                // The length may be on disk without the data.
                if keeps() && file.len() < start + bytes.len() {
                    file.resize(start + bytes.len(), 0);
                }
                let mut at = start;
                while at < start + bytes.len() {
                    let end = ((at / SECTOR + 1) * SECTOR).min(start + bytes.len());
                    if keeps() {
                        if file.len() < end {
                            file.resize(end, 0);
                        }
                        file[at..end].copy_from_slice(&bytes[at - start..end - start]);
                    }
                    at = end;
                }
            }
            _ => {}
        }
    }

    fn write_to(&self, dir: &Path) {
        for entry in std::fs::read_dir(dir).expect("list").flatten() {
            std::fs::remove_file(entry.path()).expect("remove");
        }
        for (name, inode) in &self.names {
            std::fs::write(dir.join(name), self.files.get(inode).map_or(&[][..], Vec::as_slice)).expect("write");
        }
    }
}

/// The disk after a power cut right after the first `cut` changes.
fn after_cut(tape: &[Effect], cut: usize, rng: &mut Random) -> Disk {
    let mut disk = Disk::default();
    let played = &tape[..cut];
    let synced_names = played.iter().rposition(|effect| matches!(effect, Effect::SyncDir)).unwrap_or(0);
    let mut synced: BTreeMap<u64, usize> = BTreeMap::new();
    for (at, effect) in played.iter().enumerate() {
        if let Effect::Sync { inode } = effect {
            synced.insert(*inode, at);
        }
    }
    // How much of the rest is there differs from cut to cut: nothing, all, and everything between.
    let share = [0, 20, 50, 90, 100][rng.below(5)];
    for (at, effect) in played.iter().enumerate() {
        if at <= synced_names || rng.below(100) < share {
            disk.name_change(effect);
        }
        let durable = match effect {
            Effect::Write { inode, .. } | Effect::SetLength { inode, .. } => synced.get(inode).is_some_and(|sync| at < *sync),
            _ => true,
        };
        disk.data_change(effect, || durable || rng.below(100) < share);
    }
    disk
}

async fn all(store: &Embedded) -> (i64, Vec<KeyValue>) {
    let range = RangeRequest { range_end: Bytes::from_static(b"\0"), ..RangeRequest::key(&b"\0"[..]) };
    let answer = store.range(range).await.expect("range");
    (answer.revision, answer.kvs)
}

fn options() -> Options {
    Options { compaction_interval: None, rewrite_bytes_min: 8 << 10, ..Options::default() }
}

/// Writes, deletes, compacts (so that the log is rewritten) and starts anew; gives the content at each revision.
async fn record(dir: &Path, rng: &mut Random) -> (BTreeMap<i64, Vec<KeyValue>>, Vec<Effect>) {
    let acknowledge = |revision| note_in(dir, || Effect::Acknowledged { revision });
    TAPES.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.to_owned(), Vec::new());
    let mut states = BTreeMap::new();
    for life in 0..3 {
        let store = Embedded::open(dir, options()).expect("open");
        for n in 0..60 {
            let key = |n: usize| Bytes::from(format!("/k/{}", n % 7));
            let value = vec![b'a' + (n % 26) as u8; 1 + rng.below(1500)];
            let mut success = vec![Op::Put(PutRequest { key: key(n), value: value.into(), ..PutRequest::default() })];
            if n % 5 == 4 {
                success.push(Op::Delete(DeleteRequest { key: key(n + 1), ..DeleteRequest::default() }));
            }
            let revision = store.txn(Txn { success, ..Txn::default() }).await.expect("txn").revision;
            acknowledge(revision);
            let (visible, content) = all(&store).await;
            assert_eq!(visible, revision, "life {life}");
            states.insert(revision, content);
            if n % 15 == 14 {
                store.compact(revision - 3).await.expect("compact");
            }
        }
        store.close().await;
    }
    let mut tape = TAPES.lock().unwrap_or_else(PoisonError::into_inner).remove(dir).expect("on tape");
    number_files(&mut tape);
    (states, tape)
}

/// Gives each file a number of its own: the file system gives that of a removed file to a new one.
fn number_files(tape: &mut [Effect]) {
    let mut numbers = BTreeMap::new();
    let mut made = 0;
    for effect in tape {
        if let Effect::Create { inode, .. } = effect {
            made += 1;
            numbers.insert(*inode, made);
        }
        match effect {
            Effect::Create { inode, .. }
            | Effect::Write { inode, .. }
            | Effect::SetLength { inode, .. }
            | Effect::Sync { inode }
            | Effect::Rename { inode, .. } => {
                *inode = numbers[inode];
            }
            Effect::Remove { .. } | Effect::SyncDir | Effect::Acknowledged { .. } => {}
        }
    }
}

/// A directory whose syncs cost nothing, where there is one.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("tempdir")
}

/// Plays power cuts; the error is the first one after which something is wrong. Gives how many revisions were found.
async fn play(tape: &[Effect], states: &BTreeMap<i64, Vec<KeyValue>>, cuts: usize, rng: &mut Random) -> Result<usize, String> {
    let dir = directory();
    let mut seen = BTreeSet::new();
    for round in 0..cuts {
        let cut = if round < tape.len() { round } else { rng.below(tape.len() + 1) };
        let acknowledged = tape[..cut].iter().rev().find_map(|effect| match effect {
            Effect::Acknowledged { revision } => Some(*revision),
            _ => None,
        });
        let disk = after_cut(tape, cut, rng);
        disk.write_to(dir.path());
        let store = Embedded::open(dir.path(), options()).map_err(|error| format!("cut {cut}: {error}; {:?}", disk.names))?;
        let (revision, content) = all(&store).await;
        let least = acknowledged.unwrap_or(1);
        if revision < least {
            return Err(format!("cut {cut}: revision {least} was acknowledged, {revision} is there"));
        }
        if Some(&content) != states.get(&revision) {
            return Err(format!("cut {cut}: revision {revision} has another content"));
        }
        seen.insert(revision);
        // And it goes on from there.
        let put = Op::Put(PutRequest { key: Bytes::from_static(b"/after"), value: Bytes::from_static(b"x"), ..PutRequest::default() });
        let next = store.txn(Txn { success: vec![put], ..Txn::default() }).await;
        if !next.as_ref().is_ok_and(|next| next.revision == revision + 1) {
            return Err(format!("cut {cut}: {next:?} follows {revision}"));
        }
        store.close().await;
    }
    Ok(seen.len())
}

#[tokio::test]
async fn a_power_cut_at_any_moment_loses_nothing_acknowledged() {
    let mut rng = Random(7);
    let recorded = directory();
    let (mut states, tape) = record(recorded.path(), &mut rng).await;
    states.insert(1, Vec::new());
    let renames = tape.iter().filter(|effect| matches!(effect, Effect::Rename { .. })).count();
    assert!(renames > 3, "the log was rewritten {renames} times only");
    let revisions = play(&tape, &states, CUTS, &mut rng).await.expect("nothing is lost");
    assert!(revisions > 100, "only {revisions} revisions were seen");

    // The judge sees a loss where there is one: with syncs that never were.
    for missing in [|effect: &Effect| matches!(effect, Effect::Sync { .. }), |effect: &Effect| matches!(effect, Effect::SyncDir)] {
        let unsynced: Vec<Effect> = tape.iter().filter(|effect| !missing(effect)).cloned().collect();
        play(&unsynced, &states, CUTS, &mut rng).await.expect_err("something is lost");
    }
}
