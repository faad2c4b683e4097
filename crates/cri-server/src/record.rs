//! What the state directory keeps of pods and containers: one JSON file each, renamed into place, stamped with the boot id,
//! never synced. CRI's own messages are kept in their encoding.

use std::fs;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use camino::{Utf8Path, Utf8PathBuf};
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::handler::Handler;
use crate::oci::{Resources, User};
use crate::shim::StartedShim;

/// The version of both kinds of record.
pub const VERSION: u32 = 1;
const FILE: &str = "record.json";

/// What a sandbox was when this was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxPhase {
    /// RunPodSandbox has not answered: nobody knows its id.
    Creating,
    /// Ready, as far as its shim lives.
    Ready,
    /// Stopped; its network is gone.
    NotReady,
}

/// A pod sandbox on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub version: u32,
    pub boot_id: String,
    pub id: String,
    pub phase: SandboxPhase,
    /// CRI's PodSandboxConfig.
    pub config: Encoded,
    /// As the pod names it.
    pub runtime_handler: String,
    pub handler: Handler,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Absent on the host's network.
    pub netns: Option<Utf8PathBuf>,
    pub ips: Vec<String>,
    pub pid: u32,
    pub shim: Option<StartedShim>,
}

/// What a container was when this was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum ContainerPhase {
    /// CreateContainer has not answered: nobody knows its id.
    Creating,
    /// Made, not started.
    Created,
    /// StartContainer has begun.
    Starting,
    /// Started.
    Running { pid: u32, started_at: i64 },
    /// Ended.
    Exited { started_at: i64, finished_at: i64, exit_code: i32, reason: String, message: String },
}

/// A container on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub version: u32,
    pub boot_id: String,
    pub id: String,
    pub sandbox_id: String,
    pub phase: ContainerPhase,
    /// CRI's ContainerConfig.
    pub config: Encoded,
    pub image_id: String,
    /// Path of the log; empty if there is none.
    pub log_path: String,
    pub created_at: i64,
    pub user: User,
    pub resources: Resources,
    pub oom_score_adj: Option<i64>,
    /// The signal of the image or the request.
    pub stop_signal: Option<u32>,
    pub cgroups_path: String,
}

/// A protobuf message in base64.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Encoded(String);

impl Encoded {
    /// Encodes.
    pub fn of(message: &impl Message) -> Self {
        Self(STANDARD.encode(message.encode_to_vec()))
    }

    /// Decodes; `None` if it is not such a message.
    pub fn decode<M: Message + Default>(&self) -> Option<M> {
        M::decode(STANDARD.decode(&self.0).ok()?.as_slice()).ok()
    }
}

/// Writes a record into the directory of its pod or container, which is there.
///
/// # Errors
/// [`Error::Io`].
pub fn write(dir: &Utf8Path, record: &impl Serialize) -> Result<()> {
    let path = dir.join(FILE);
    let temporary = dir.join(".record.json.tmp");
    let text = serde_json::to_vec(record).map_err(|error| Error::Record { path: path.clone(), reason: error.to_string() })?;
    let written = fs::write(&temporary, text).map_err(Error::io("write", &temporary));
    let named = written.and_then(|()| fs::rename(&temporary, &path).map_err(Error::io("rename", &temporary)));
    if named.is_err() {
        // What stays goes with the directory.
        let _ = fs::remove_file(&temporary);
    }
    named
}

/// What was found in a directory of records.
#[derive(Debug)]
pub struct Found<R> {
    /// Good ones.
    pub records: Vec<R>,
    /// Directories whose record cannot be read, by id: nothing of theirs is touched.
    pub unreadable: Vec<(String, Error)>,
    /// Ids of directories without a record: what a crash left before the first write, or after the last removal.
    pub bare: Vec<String>,
}

/// Reads the records of all directories in `parent`, which need not exist.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be listed.
pub fn read_all<R: serde::de::DeserializeOwned>(parent: &Utf8Path) -> Result<Found<R>> {
    let mut found = Found { records: Vec::new(), unreadable: Vec::new(), bare: Vec::new() };
    let entries = match parent.read_dir_utf8() {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(source) => return Err(Error::Io { act: "list", path: parent.to_owned(), source }),
    };
    for entry in entries {
        let entry = entry.map_err(Error::io("list", parent))?;
        let path = entry.path().join(FILE);
        let id = entry.file_name().to_owned();
        match fs::read(&path) {
            Ok(text) => match parse(&text) {
                Ok(record) => found.records.push(record),
                Err(reason) => found.unreadable.push((id, Error::Record { path, reason })),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => found.bare.push(id),
            Err(source) => found.unreadable.push((id, Error::Io { act: "read", path, source })),
        }
    }
    Ok(found)
}

impl<R> Found<R> {
    /// Takes broken records for what was never written: for those of another boot, which a power cut may have left in any state. Nothing of
    /// theirs can be alive.
    pub fn give_up_unreadable(&mut self) {
        for (id, error) in self.unreadable.drain(..) {
            tracing::warn!(id, error = error.chain(), "a record from before the reboot is broken; what is left of it is removed");
            self.bare.push(id);
        }
    }
}

fn parse<R: serde::de::DeserializeOwned>(text: &[u8]) -> std::result::Result<R, String> {
    #[derive(Deserialize)]
    struct Stamp {
        version: u32,
    }
    let stamp: Stamp = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if stamp.version != VERSION {
        return Err(format!("version {} is not {VERSION}", stamp.version));
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use protocols::cri::v1::PodSandboxConfig;

    use super::*;

    fn sandbox(id: &str) -> SandboxRecord {
        SandboxRecord {
            version: VERSION,
            boot_id: "boot".into(),
            id: id.into(),
            phase: SandboxPhase::Ready,
            config: Encoded::of(&PodSandboxConfig { hostname: "h".into(), ..PodSandboxConfig::default() }),
            runtime_handler: String::new(),
            handler: Handler::default(),
            created_at: 1,
            netns: None,
            ips: vec!["10.85.0.2".into()],
            pid: 3,
            shim: None,
        }
    }

    #[test]
    fn records_come_back_and_bad_ones_are_told_apart() {
        let dir = tempfile::tempdir().expect("a directory");
        let parent = Utf8Path::from_path(dir.path()).expect("UTF-8");
        assert!(read_all::<SandboxRecord>(&parent.join("none")).expect("fine").records.is_empty());
        for name in ["good", "bare", "cut", "newer"] {
            fs::create_dir(parent.join(name)).expect("made");
        }
        write(&parent.join("good"), &sandbox("good")).expect("written");
        fs::write(parent.join("cut/record.json"), "{\"version\":1,").expect("written");
        fs::write(parent.join("newer/record.json"), "{\"version\":2}").expect("written");
        let mut found = read_all::<SandboxRecord>(parent).expect("listed");
        assert_eq!(found.records, [sandbox("good")]);
        assert_eq!(found.bare, ["bare"]);
        assert_eq!(found.unreadable.len(), 2);
        found.give_up_unreadable();
        found.bare.sort();
        assert_eq!((found.bare.as_slice(), found.unreadable.len()), (["bare", "cut", "newer"].map(String::from).as_slice(), 0));
        let config: PodSandboxConfig = found.records[0].config.decode().expect("a config");
        assert_eq!(config.hostname, "h");
    }
}
