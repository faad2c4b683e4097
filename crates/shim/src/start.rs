//! The `start` command: finds the group's shim or starts one, and prints its address in the caller's language.
//!
//! What containerd of each version sends and takes: `reference/seams/shim.md`, "Version differences".

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use linux::child::{self, Fork};
use prost::Message;
use protocols::shim::bootstrap::v1::{BootstrapParams, BootstrapResult};
use protocols::shim::options;

use crate::args::Args;
use crate::job::Config;

/// Where containerd keeps shims' sockets, if it does not say.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Variable by which containerd from 1.7 on tells what answers it reads.
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// The daemon's words, if nobody reads them from a FIFO.
const LOG: &str = "shim.log";
/// The most that is read from stdin, in bytes.
const STDIN_BYTES_MAX: u64 = 4 << 20;

/// How the caller wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// containerd 1.6: the address.
    Plain,
    /// containerd 1.7 to 2.2: JSON.
    Json,
    /// containerd 2.3 and later: protobuf.
    Protobuf,
}

/// What stdin said.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// How to answer.
    pub language: Language,
    /// Where sockets go.
    pub socket_dir: PathBuf,
    /// The runtime options' cgroup for the shim, or empty.
    pub shim_cgroup: String,
}

/// Reads stdin: BootstrapParams if it is of this very shim, else an Any of options (whose first field is a string as well).
#[must_use]
pub fn understand(stdin: &[u8], id: &str, namespace: &str, max_version: Option<&str>) -> Asked {
    let options_of = |any: &prost_types::Any| {
        (any.type_url.rsplit('/').next() == Some(options::RUNC_TYPE_URL))
            .then(|| options::runc::Options::decode(any.value.as_slice()).ok())
            .flatten()
            .map(|options| options.shim_cgroup)
    };
    if let Ok(params) = BootstrapParams::decode(stdin)
        && params.instance_id == id
        && params.namespace == namespace
    {
        let socket_dir = params.socket_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or(SOCKET_DIR);
        let cgroup = params.extensions.iter().filter_map(|extension| extension.value.as_ref()).find_map(options_of);
        return Asked { language: Language::Protobuf, socket_dir: PathBuf::from(socket_dir), shim_cgroup: cgroup.unwrap_or_default() };
    }
    let cgroup = prost_types::Any::decode(stdin).ok().as_ref().and_then(options_of);
    Asked {
        language: if max_version.is_some() { Language::Json } else { Language::Plain },
        socket_dir: PathBuf::from(SOCKET_DIR),
        shim_cgroup: cgroup.unwrap_or_default(),
    }
}

/// The answer.
#[must_use]
pub fn answer(language: Language, address: &str) -> Vec<u8> {
    match language {
        Language::Plain => address.as_bytes().to_vec(),
        Language::Json => serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" }).to_string().into_bytes(),
        Language::Protobuf => {
            BootstrapResult { version: 3, address: address.to_owned(), protocol: "ttrpc".to_owned(), ..BootstrapResult::default() }
                .encode_to_vec()
        }
    }
}

/// Which containers share a shim: those of one group.
#[must_use]
pub fn group(config: &Config, id: &str) -> String {
    let of = |name: &str| config.annotations.get(name).filter(|value| !value.is_empty());
    of("io.containerd.runc.v2.group").or_else(|| of("io.kubernetes.cri.sandbox-id")).map_or(id, String::as_str).to_owned()
}

/// The socket of a group: a name of fixed length, as socket paths are short. (FNV-1a of 128 bits: it need be spread, not
/// secret; who may name a group may join it anyway.)
#[must_use]
pub fn socket_path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in [address, namespace, group].join("\0").bytes() {
        hash = (hash ^ u128::from(byte)).wrapping_mul(PRIME);
    }
    dir.join(format!("{hash:032x}"))
}

/// Runs `start`, in the bundle.
///
/// # Errors
/// What could not be done; containerd shows it.
pub fn run(args: &Args) -> Result<(), String> {
    let mut stdin = Vec::new();
    io::stdin()
        .take(STDIN_BYTES_MAX)
        .read_to_end(&mut stdin)
        .map_err(|error| format!("failed to read bootstrap parameters from stdin: {error}"))?;
    let asked = understand(&stdin, &args.id, &args.namespace, std::env::var(MAX_SHIM_VERSION).ok().as_deref());
    let bundle = std::env::current_dir().map_err(|error| format!("failed to find the bundle: {error}"))?;
    // A sandbox' bundle has no config.json.
    let group = match Config::read(&bundle) {
        Ok(config) => group(&config, &args.id),
        Err(error) if error.kind() == io::ErrorKind::NotFound => args.id.clone(),
        Err(error) => return Err(format!("failed to read {}/config.json: {error}", bundle.display())),
    };
    let socket = socket_path(&asked.socket_dir, &args.address, &args.namespace, &group);
    let address = format!("unix://{}", socket.display());
    make_socket_dir(&asked.socket_dir)?;
    // Two that start the shim of one group at a time (a daemon's last order, and its successor's first) must not each find
    // none: the second would take the first one's socket away, and with it the only way to that shim.
    let lock = lock(&asked.socket_dir)?;
    if UnixStream::connect(&socket).is_err() {
        let listener = listen(&socket)?;
        launch(args, &socket, &listener, &bundle, &asked.shim_cgroup)?;
    }
    drop(lock);
    if asked.language != Language::Protobuf {
        // containerd 1.6 and 1.7 find the shim by it after a restart.
        let path = bundle.join("address");
        crate::disk::replace(&path, address.as_bytes()).map_err(|error| format!("failed to write {}: {error}", path.display()))?;
    }
    io::stdout()
        .write_all(&answer(asked.language, &address))
        .and_then(|()| io::stdout().flush())
        .map_err(|error| format!("failed to print the address: {error}"))
}

fn make_socket_dir(dir: &Path) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| format!("failed to make socket directory {}: {error}", dir.display()))
}

/// Held while it is found out whether a shim is there, and one is started: some milliseconds.
fn lock(dir: &Path) -> Result<std::fs::File, String> {
    let said = |error: io::Error| format!("failed to lock socket directory {}: {error}", dir.display());
    let file = std::fs::File::open(dir).map_err(said)?;
    file.lock().map_err(said)?;
    Ok(file)
}

fn listen(socket: &Path) -> Result<UnixListener, String> {
    use std::os::unix::fs::PermissionsExt;
    // Nobody answers on it: its shim is dead.
    let _ = std::fs::remove_file(socket);
    let said = |error: io::Error| format!("failed to listen on {}: {error}", socket.display());
    let listener = UnixListener::bind(socket).map_err(said)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(said)?;
    Ok(listener)
}

/// Starts the daemon, with the listener as descriptor 3 and nothing of the caller's open.
fn launch(args: &Args, socket: &Path, listener: &UnixListener, bundle: &Path, cgroup: &str) -> Result<(), String> {
    let said = |error: io::Error| format!("failed to start the shim's daemon: {error}");
    let executable = std::env::current_exe().map_err(said)?;
    match child::fork().map_err(said)? {
        Fork::Child => {
            let error = become_daemon(args, socket, listener, bundle, &executable);
            // Its stderr is the log by now, or still the caller's pipe.
            say!("failed to start the shim's daemon: {error}");
            child::exit_now(1)
        }
        Fork::Parent(pid) => {
            if !cgroup.is_empty() {
                join_cgroup(cgroup, pid)?;
            }
            set_oom_score(pid);
            Ok(())
        }
    }
}

fn become_daemon(args: &Args, socket: &Path, listener: &UnixListener, bundle: &Path, executable: &Path) -> io::Error {
    let prepare = || -> io::Result<()> {
        linux::process::setsid()?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        child::dup_to(null.as_fd(), 0)?;
        child::dup_to(null.as_fd(), 1)?;
        // containerd reads this FIFO, if it has made one; what is written later, when it is gone, is lost. Without one
        // there is a file beside it.
        let log = linux::pipes::open_fifo(&bundle.join("log"), linux::pipes::Access::Write).or_else(|_| {
            let file = std::fs::File::options().append(true).create(true).open(bundle.join(LOG));
            file.map(std::os::fd::OwnedFd::from)
        });
        child::dup_to(log.as_ref().map_or(null.as_fd(), |log| log.as_fd()), 2)?;
        // Either may have number 3.
        drop((log, null));
        child::dup_to(listener.as_fd(), 3)?;
        Ok(linux::process::close_from(4, true)?)
    };
    if let Err(error) = prepare() {
        return error;
    }
    let mut words: Vec<OsString> = vec!["-namespace".into(), args.namespace.clone().into()];
    words.extend(["-id".into(), args.id.clone().into(), "-address".into(), socket.into()]);
    if args.debug {
        words.push("-debug".into());
    }
    Command::new(executable).args(words).exec()
}

/// Puts the daemon into the cgroup that the runtime options name, in every hierarchy that has it.
fn join_cgroup(cgroup: &str, pid: u32) -> Result<(), String> {
    let places = crate::stats::cgroups_at(cgroup);
    if places.is_empty() {
        return Err(format!("runtime options: there is no cgroup {cgroup} for the shim"));
    }
    for (_, dir) in places {
        let file = dir.join("cgroup.procs");
        std::fs::write(&file, pid.to_string()).map_err(|error| format!("failed to put the shim into {}: {error}", file.display()))?;
    }
    Ok(())
}

/// One above the caller's, as containerd's shim: so the kernel takes a shim before its daemon.
fn set_oom_score(pid: u32) {
    let path = format!("/proc/{}/oom_score_adj", std::os::unix::process::parent_id());
    let Some(score) = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok()) else { return };
    // Where it is refused the caller's own value stays, which is right as well.
    let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(1000).to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocols::shim::bootstrap::v1::Extension;

    #[test]
    fn stdin_of_every_version() {
        let options = options::runc::Options { shim_cgroup: "/g".into(), ..Default::default() };
        let any = prost_types::Any { type_url: options::RUNC_TYPE_URL.into(), value: options.encode_to_vec() };
        let params = BootstrapParams {
            instance_id: "c".into(),
            namespace: "n".into(),
            socket_dir: Some("/s".into()),
            extensions: vec![Extension { value: Some(any.clone()) }],
            ..Default::default()
        };
        let asked = understand(&params.encode_to_vec(), "c", "n", Some("2"));
        assert_eq!((asked.language, asked.socket_dir.to_str(), asked.shim_cgroup.as_str()), (Language::Protobuf, Some("/s"), "/g"));
        let asked = understand(&any.encode_to_vec(), "c", "n", Some("2"));
        assert_eq!((asked.language, asked.shim_cgroup.as_str()), (Language::Json, "/g"));
        assert_eq!(understand(b"", "c", "n", Some("2")).language, Language::Json);
        assert_eq!(understand(b"", "c", "n", None).language, Language::Plain);
    }

    #[test]
    fn answers_of_every_version() {
        assert_eq!(answer(Language::Plain, "unix:///a"), b"unix:///a");
        let json: serde_json::Value = serde_json::from_slice(&answer(Language::Json, "unix:///a")).expect("JSON");
        assert_eq!(json, serde_json::json!({ "version": 2, "address": "unix:///a", "protocol": "ttrpc" }));
        let result = BootstrapResult::decode(answer(Language::Protobuf, "unix:///a").as_slice()).expect("protobuf");
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///a", "ttrpc"));
    }

    #[test]
    fn groups() {
        let config = |json: &str| serde_json::from_str::<Config>(json).expect("valid");
        assert_eq!(group(&config("{}"), "c"), "c");
        let pod = config(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"p"}}"#);
        assert_eq!(group(&pod, "c"), "p");
        let dir = Path::new("/run/s");
        assert_eq!(socket_path(dir, "/a", "n", "p"), socket_path(dir, "/a", "n", "p"));
        assert_ne!(socket_path(dir, "/a", "n", "p"), socket_path(dir, "/a", "n", "q"));
        assert!(socket_path(dir, "/a", "n", "p").as_os_str().len() < 100);
    }
}
