//! Sandboxes' records on disk: `STATE/sandboxes/ID.json`, written as temporary file and rename, stamped with the boot id.
//!
//! They mean nothing after a reboot (the namespaces are gone), so nothing is synced. A record is written before the kernel or a
//! plugin is asked for anything, and removed after all is undone: what a crash leaves is always on record.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::config::PortMapping;
use crate::error::Error;

const VERSION: u32 = 1;

/// What is kept of one sandbox's network.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    pub boot_id: String,
    pub sandbox_id: String,
    pub netns_path: Utf8PathBuf,
    pub interface: String,
    pub kind: Kind,
}

/// Which network a sandbox is on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Bridge { address: Ipv4Addr, ports: Vec<PortMapping> },
    Cni(Box<CniRecord>),
}

/// All that a later DEL or CHECK needs, whatever has become of the configuration meanwhile.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CniRecord {
    pub list: serde_json::Value,
    pub args: String,
    pub capabilities: serde_json::Map<String, serde_json::Value>,
    pub ips: Vec<IpAddr>,
    /// `None` until ADD has succeeded.
    pub result: Option<serde_json::Value>,
}

/// What was changed on the host itself, so that the end can undo it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Host {
    pub version: u32,
    pub boot_id: String,
    /// `net.ipv4.ip_forward` before it was set to 1.
    pub ip_forward: String,
}

/// The directory of records, locked for this process.
#[derive(Debug)]
pub(crate) struct Records {
    dir: Utf8PathBuf,
    pub boot_id: String,
    /// What is here was written before a reboot, and as nothing is synced, a power cut may have left anything of it.
    rebooted: bool,
    _lock: File,
}

impl Records {
    /// Makes and locks the directory.
    pub fn open(dir: &Utf8Path) -> Result<Self, Error> {
        let sandboxes = dir.join("sandboxes");
        fs::create_dir_all(&sandboxes).map_err(file("create directory", &sandboxes))?;
        let lock_path = dir.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(file("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::InUse { path: dir.to_owned() });
            }
            Err(fs::TryLockError::Error(e)) => return Err(file("lock", &lock_path)(e)),
        }
        let boot_path = Utf8Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = fs::read_to_string(boot_path).map_err(file("read", boot_path))?.trim().to_owned();
        let rebooted = fs::read_to_string(dir.join("boot")).unwrap_or_default() != boot_id;
        Ok(Self { dir: dir.to_owned(), boot_id, rebooted, _lock: lock })
    }

    /// A record of this version and boot.
    pub fn new_record(&self, sandbox_id: &str, netns_path: &Utf8Path, interface: &str, kind: Kind) -> Record {
        Record {
            version: VERSION,
            boot_id: self.boot_id.clone(),
            sandbox_id: sandbox_id.to_owned(),
            netns_path: netns_path.to_owned(),
            interface: interface.to_owned(),
            kind,
        }
    }

    /// All records. Those of the built-in network from before a reboot are removed, for nothing of them is left, and what a power cut has
    /// broken. Unfinished temporary files go too.
    pub fn load(&self) -> Result<Vec<Record>, Error> {
        let dir = self.dir.join("sandboxes");
        let mut records = Vec::new();
        for entry in dir.read_dir_utf8().map_err(file("list", &dir))? {
            let entry = entry.map_err(file("list", &dir))?;
            let path = entry.path();
            if path.extension() != Some("json") {
                remove(path)?;
                continue;
            }
            let bytes = fs::read(path).map_err(file("read", path))?;
            let record: Record = match serde_json::from_slice(&bytes) {
                Err(_) if self.rebooted => {
                    remove(path)?;
                    continue;
                }
                record => record.map_err(|source| Error::Record { path: path.to_owned(), source })?,
            };
            if record.version > VERSION {
                return Err(Error::RecordVersion { path: path.to_owned(), version: record.version, known: VERSION });
            }
            if record.boot_id != self.boot_id && matches!(record.kind, Kind::Bridge { .. }) {
                remove(path)?;
            } else {
                records.push(record);
            }
        }
        if self.rebooted {
            let path = self.dir.join("boot");
            fs::write(&path, &self.boot_id).map_err(file("write", &path))?;
        }
        Ok(records)
    }

    /// Writes a sandbox's record, whole or not at all.
    pub fn save(&self, record: &Record) -> Result<(), Error> {
        self.write(&self.path(&record.sandbox_id), record)
    }

    /// Removes a sandbox's record, if it is there.
    pub fn forget(&self, sandbox_id: &str) -> Result<(), Error> {
        remove(&self.path(sandbox_id))
    }

    /// What was changed on the host since it booted.
    pub fn host(&self) -> Result<Option<Host>, Error> {
        let path = self.dir.join("host.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(file("read", &path)(e)),
        };
        match serde_json::from_slice::<Host>(&bytes) {
            Ok(host) => Ok((host.boot_id == self.boot_id).then_some(host)),
            Err(_) if self.rebooted => Ok(None),
            Err(source) => Err(Error::Record { path, source }),
        }
    }

    /// Records the host's setting before it is changed.
    pub fn save_host(&self, ip_forward: &str) -> Result<(), Error> {
        let host = Host { version: VERSION, boot_id: self.boot_id.clone(), ip_forward: ip_forward.to_owned() };
        self.write(&self.dir.join("host.json"), &host)
    }

    /// Removes everything that this module wrote; the lock file last.
    pub fn remove_all(&self) -> Result<(), Error> {
        let sandboxes = self.dir.join("sandboxes");
        for path in ["host.json", "boot", "lock"].map(|name| self.dir.join(name)) {
            remove(&path)?;
        }
        for dir in [sandboxes, self.dir.clone()] {
            match fs::remove_dir(&dir) {
                Ok(()) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
                Err(e) => return Err(file("remove directory", &dir)(e)),
            }
        }
        Ok(())
    }

    fn path(&self, sandbox_id: &str) -> Utf8PathBuf {
        self.dir.join("sandboxes").join(format!("{sandbox_id}.json"))
    }

    fn write(&self, path: &Utf8Path, value: &impl Serialize) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value).map_err(|source| Error::Record { path: path.to_owned(), source })?;
        let temporary = path.with_extension("tmp");
        let written = fs::write(&temporary, &bytes).map_err(file("write", &temporary));
        let named = written.and_then(|()| fs::rename(&temporary, path).map_err(file("rename", &temporary)));
        if named.is_err() {
            // What stays is removed by the next start.
            let _ = fs::remove_file(&temporary);
        }
        named
    }
}

pub(crate) fn file(act: &'static str, path: &Utf8Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { act, path, source }
}

fn remove(path: &Utf8Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(file("remove", path)(e)),
    }
}
