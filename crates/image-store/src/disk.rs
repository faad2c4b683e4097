//! The store on disk, and what a start finds there.
//!
//! ```text
//! ROOT/lock              held while the store is open
//! ROOT/boot              boot id of the last start that found everything in order
//! ROOT/images/HEX.json   one record an image
//! ROOT/layers/N/         layer.json, fs/: a committed layer; N.new: one being unpacked; N.dead: one being removed
//! ROOT/snapshots/KEY/    snapshot.json, fs/, work/; KEY.new and KEY.dead as above
//! ```
//!
//! **Invariant**: `layers/N` has that name only after its content was synced (fsync of each file or syncfs, then the rename, then fsync of `layers`). So after a power cut a
//! layer is there whole or not at all; the first start of each boot compares every layer with the survey in its record all the same, and drops
//! what differs. An image whose layers are not all there is dropped too, and fetched again by the next pull.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, file};

pub(crate) const VERSION: u32 = 1;
const SYNC_EACH_ENTRIES_MAX: u64 = 16;

/// What is counted of a layer when it is committed, to be compared after a reboot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Survey {
    pub entries: u64,
    pub file_bytes: u64,
    pub disk_bytes: u64,
}

/// A committed layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub version: u32,
    pub chain_id: String,
    pub diff_id: String,
    pub survey: Survey,
    /// The directory's number.
    #[serde(skip)]
    pub number: u64,
}

/// An image that is here whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub version: u32,
    pub id: String,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub size_bytes: u64,
    pub config: String,
    pub layers: Vec<String>,
}

/// A container's snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub version: u32,
    pub layers: Vec<String>,
}

/// All records, as they are in memory.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub images: BTreeMap<String, ImageRecord>,
    pub layers: HashMap<String, LayerRecord>,
    pub snapshots: BTreeMap<String, SnapshotRecord>,
    /// Chains that a pull in progress needs, with their number of pulls.
    pub pinned: HashMap<String, usize>,
    pub next_number: u64,
}

impl Index {
    /// Chains that neither an image nor a snapshot nor a pull needs.
    pub fn unused(&self) -> Vec<LayerRecord> {
        let mut used: HashSet<&String> = self.images.values().flat_map(|i| &i.layers).collect();
        used.extend(self.snapshots.values().flat_map(|s| &s.layers));
        used.extend(self.pinned.keys());
        self.layers.values().filter(|l| !used.contains(&l.chain_id)).cloned().collect()
    }
}

/// The directories below the root.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    root: PathBuf,
}

impl Disk {
    /// Makes the directories and takes the lock, which lasts as long as the file that is returned.
    pub fn open(root: &Path) -> Result<(Self, File), Error> {
        let disk = Self { root: root.to_owned() };
        let mut made = false;
        for dir in [disk.images(), disk.layers(), disk.snapshots()] {
            if !dir.is_dir() {
                fs::create_dir_all(&dir).map_err(file("create directory", &dir))?;
                made = true;
            }
        }
        if made {
            // What is synced below them later can only be found by their names.
            sync_dir(root)?;
        }
        // Images bring set-user-id files with them, which are not for the users of this host.
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        for dir in [root.to_owned(), disk.layers(), disk.snapshots()] {
            fs::set_permissions(&dir, std::fs::Permissions::clone(&private)).map_err(file("set mode of", &dir))?;
        }
        let path = root.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(file("open", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok((disk, lock)),
            Err(fs::TryLockError::WouldBlock) => Err(Error::InUse { path: root.to_owned() }),
            Err(fs::TryLockError::Error(e)) => Err(file("lock", &path)(e)),
        }
    }

    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The directory of a committed layer's files.
    pub fn layer_fs(&self, number: u64) -> PathBuf {
        self.layers().join(number.to_string()).join("fs")
    }

    /// Reads everything, and removes what is half made, half removed, broken or without its layers.
    pub fn load(&self) -> Result<Index, Error> {
        let boot_path = self.root.join("boot");
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let rebooted = fs::read_to_string(&boot_path).unwrap_or_default() != boot_id;
        let mut index = Index::default();
        self.load_layers(&mut index, rebooted)?;
        self.load_images(&mut index)?;
        self.load_snapshots(&mut index)?;
        // On a full disk the next start compares the layers once more; images must be there to be removed.
        if rebooted && let Err(error) = fs::write(&boot_path, boot_id) {
            tracing::warn!(path = %boot_path.display(), %error, "failed to note that all layers were compared");
        }
        Ok(index)
    }

    fn load_layers(&self, index: &mut Index, rebooted: bool) -> Result<(), Error> {
        let dir = self.layers();
        for name in names(&dir)? {
            let path = dir.join(&name);
            let number = name.split('.').next().and_then(|n| n.parse::<u64>().ok());
            index.next_number = index.next_number.max(number.map_or(0, |n| n + 1));
            let Ok(number) = name.parse::<u64>() else {
                remove(&dir, &name)?;
                continue;
            };
            match read_record::<LayerRecord>(&path.join("layer.json"), |r| r.version)? {
                Some(record) if !rebooted || survey(&path.join("fs")).is_ok_and(|now| now.same_content(&record.survey)) => {
                    // One was being removed and fetched again when the power failed: either will do.
                    if let Some(twin) = index.layers.insert(record.chain_id.clone(), LayerRecord { number, ..record }) {
                        remove(&dir, &twin.number.to_string())?;
                    }
                }
                _ => {
                    tracing::warn!(layer = %path.display(), "layer is incomplete and is dropped; a pull fetches it again");
                    remove(&dir, &name)?;
                }
            }
        }
        Ok(())
    }

    fn load_images(&self, index: &mut Index) -> Result<(), Error> {
        let dir = self.images();
        for name in names(&dir)? {
            let path = dir.join(&name);
            let record = if name.ends_with(".json") { read_record::<ImageRecord>(&path, |r| r.version)? } else { None };
            match record {
                Some(record) if record.layers.iter().all(|chain| index.layers.contains_key(chain)) => {
                    index.images.insert(record.id.clone(), record);
                }
                record => {
                    if let Some(record) = record {
                        tracing::warn!(image = %record.id, "image has lost a layer and is dropped; a pull fetches it again");
                    }
                    remove(&dir, &name)?;
                }
            }
        }
        Ok(())
    }

    fn load_snapshots(&self, index: &mut Index) -> Result<(), Error> {
        let dir = self.snapshots();
        for name in names(&dir)? {
            let record = if name.ends_with(".new") || name.ends_with(".dead") {
                None
            } else {
                read_record::<SnapshotRecord>(&dir.join(&name).join("snapshot.json"), |r| r.version)?
            };
            match record {
                Some(record) => drop(index.snapshots.insert(name, record)),
                None => remove(&dir, &name)?,
            }
        }
        Ok(())
    }

    /// Writes images' records durably, each before the next. All are on disk under temporary names before the first gets its own: a full disk
    /// refuses all of them.
    pub fn save_images(&self, records: &[ImageRecord]) -> Result<(), Error> {
        let dir = self.images();
        let paths = || records.iter().map(|record| dir.join(format!("{}.json", hex_of(&record.id))));
        let staged = records.iter().zip(paths()).try_for_each(|(record, path)| stage_record(&path, record, true));
        let named = staged.and_then(|()| {
            paths().try_for_each(|path| {
                name_record(&path)?;
                sync_dir(&dir)
            })
        });
        if named.is_err() {
            paths().for_each(|path| discard(&temporary(&path)));
        }
        named
    }

    /// Removes an image's record durably.
    pub fn forget_image(&self, id: &str) -> Result<(), Error> {
        let path = self.images().join(format!("{}.json", hex_of(id)));
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(&self.images()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(file("remove", &path)(e)),
        }
    }

    /// Makes `layers/N.new/fs` for a layer to be unpacked.
    pub fn stage(&self, number: u64) -> Result<Staging, Error> {
        let path = self.layers().join(format!("{number}.new"));
        let fs_path = path.join("fs");
        fs::create_dir_all(&fs_path).map_err(file("create directory", &fs_path))?;
        Ok(Staging { dir: self.layers(), number, path, committed: false })
    }

    /// Takes a layer out of the way at once, and returns what is to be removed by [`remove`].
    pub fn retire_layer(&self, number: u64) -> Result<(PathBuf, String), Error> {
        retire(&self.layers(), &number.to_string())
    }

    /// The same for a snapshot.
    pub fn retire_snapshot(&self, key: &str) -> Result<(PathBuf, String), Error> {
        retire(&self.snapshots(), key)
    }
}

fn retire(dir: &Path, name: &str) -> Result<(PathBuf, String), Error> {
    let dead = format!("{name}.dead");
    remove(dir, &dead)?;
    match fs::rename(dir.join(name), dir.join(&dead)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file("retire", &dir.join(name))(e)),
        _ => Ok((dir.to_owned(), dead)),
    }
}

/// A layer being unpacked; dropped without a commit, its files go.
#[derive(Debug)]
pub(crate) struct Staging {
    dir: PathBuf,
    number: u64,
    path: PathBuf,
    committed: bool,
}

impl Staging {
    pub fn fs(&self) -> PathBuf {
        self.path.join("fs")
    }

    /// Syncs the files, and gives the layer its name.
    pub fn commit(mut self, chain_id: &str, diff_id: &str) -> Result<LayerRecord, Error> {
        let survey = survey(&self.fs()).map_err(file("survey", &self.path))?;
        let record =
            LayerRecord { version: VERSION, chain_id: chain_id.to_owned(), diff_id: diff_id.to_owned(), survey, number: self.number };
        write_record(&self.path.join("layer.json"), &record)?;
        self.sync(&survey).map_err(file("sync", &self.path))?;
        fs::rename(&self.path, self.dir.join(self.number.to_string())).map_err(file("commit", &self.path))?;
        self.committed = true;
        sync_dir(&self.dir)?;
        Ok(record)
    }
}

impl Staging {
    /// A few files are synced by themselves; for many, the whole file system at once is cheaper, though it waits for others' writes as well. Links
    /// and devices cannot be opened to be synced: their owners and modes are durable only with the whole.
    fn sync(&self, survey: &Survey) -> io::Result<()> {
        if survey.entries > SYNC_EACH_ENTRIES_MAX || !self.sync_each()? {
            rustix::fs::syncfs(File::open(&self.path)?)?;
        }
        Ok(())
    }

    /// False when something is there that is neither a file nor a directory.
    fn sync_each(&self) -> io::Result<bool> {
        let mut left = vec![self.path.clone()];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    left.push(entry.path());
                } else if kind.is_file() {
                    File::open(entry.path())?.sync_all()?;
                } else {
                    return Ok(false);
                }
            }
            File::open(&dir)?.sync_all()?;
        }
        Ok(true)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed
            && let Err(e) = remove(&self.dir, &format!("{}.new", self.number))
        {
            tracing::warn!(error = %e, "failed to remove a layer that was not committed; the next start does it");
        }
    }
}

impl Survey {
    /// Allocation may differ from day to day; content may not.
    pub fn same_content(&self, other: &Self) -> bool {
        (self.entries, self.file_bytes) == (other.entries, other.file_bytes)
    }
}

/// Counts what is below a directory.
pub(crate) fn survey(dir: &Path) -> io::Result<Survey> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Survey::default();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let metadata = entry.path().symlink_metadata()?;
            found.entries += 1;
            found.disk_bytes += metadata.blocks() * 512;
            if metadata.is_file() {
                found.file_bytes += metadata.len();
            } else if metadata.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// The hex digits of "sha256:HEX".
pub(crate) fn hex_of(digest: &str) -> &str {
    digest.rsplit(':').next().unwrap_or(digest)
}

fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(file("list", dir))? {
        let entry = entry.map_err(file("list", dir))?;
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}

/// Removes a file or a whole directory by name.
pub(crate) fn remove(dir: &Path, name: &str) -> Result<(), Error> {
    let fd = File::open(dir).map_err(file("open", dir))?;
    match linux::tree::remove_at(&fd, name.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", &dir.join(name))(error)),
        _ => Ok(()),
    }
}

/// A record that parses; `None` when it is missing or broken. One of a newer version is an error: an older program must not remove it.
fn read_record<T: serde::de::DeserializeOwned>(path: &Path, version: impl Fn(&T) -> u32) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(file("read", path)(e)),
    };
    let Ok(record) = serde_json::from_slice::<T>(&bytes) else { return Ok(None) };
    match version(&record) {
        newer if newer > VERSION => Err(Error::RecordVersion { path: path.to_owned(), version: newer, known: VERSION }),
        _ => Ok(Some(record)),
    }
}

/// Temporary file and rename. Nothing is synced.
pub(crate) fn write_record(path: &Path, record: &impl Serialize) -> Result<(), Error> {
    let written = stage_record(path, record, false).and_then(|()| name_record(path));
    if written.is_err() {
        discard(&temporary(path));
    }
    written
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

fn stage_record(path: &Path, record: &impl Serialize, durable: bool) -> Result<(), Error> {
    let temporary = temporary(path);
    let bytes = serde_json::to_vec(record).map_err(|e| file("encode", path)(e.into()))?;
    let mut out = File::create(&temporary).map_err(file("create", &temporary))?;
    out.write_all(&bytes).map_err(file("write", &temporary))?;
    if durable { out.sync_all().map_err(file("sync", &temporary)) } else { Ok(()) }
}

fn name_record(path: &Path) -> Result<(), Error> {
    fs::rename(temporary(path), path).map_err(file("name", path))
}

/// What cannot be removed is removed by the next start.
fn discard(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "failed to remove a temporary file");
        }
        _ => {}
    }
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(file("sync", dir))
}
