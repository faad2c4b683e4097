//! Runtime handlers: which shim serves a pod. Configured in the words of containerd's `config.toml` (v2.4.2, `docs/cri/config.md`):
//!
//! ```toml
//! default_runtime_name = "runc"              # the handler of pods that name none; absent: our own shim
//! [runtimes.runc]
//! runtime_type = "io.containerd.runc.v2"     # containerd-shim-runc-v2, in PATH
//! runtime_path = "/usr/bin/containerd-shim-runc-v2"  # where it is, if not there
//! sandboxer = "podsandbox"                   # a pause container is the sandbox; "shim": the shim's Sandbox API
//! [runtimes.runc.options]
//! BinaryName = "/usr/sbin/runc"              # its OCI runtime
//! Root = "/run/runc"                         # where that keeps its state; absent: below --state
//! ```
//!
//! Shims of other types than runc's have `TypeUrl` and `ConfigPath` for options.

use std::collections::BTreeMap;

use camino::{Utf8Path, Utf8PathBuf};
use prost::Message;
use prost_types::Any;
use protocols::shim::options::{GENERIC_TYPE_URL, RUNC_TYPE_URL, generic, runc};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::{Error, Result};

const FLAG: &str = "--runtime-config";
/// Our own shim's handler, beside the empty name.
pub const OWN: &str = "coracle";
/// The type of our own shim.
const OWN_TYPE: &str = "io.containerd.coracle.v2";
/// The type of the shim that drives runc.
const RUNC_TYPE: &str = "io.containerd.runc.v2";
/// 107 bytes less `/s/` and the 64 hexadecimal digits of the names that containerd's shims give to their sockets.
const STATE_PATH_MAX: usize = 40;

/// Who makes a pod's sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandboxer {
    /// The shim, by its Sandbox API.
    Shim,
    /// This server: a pause container is the pod's first task.
    #[default]
    PodSandbox,
}

/// Options of a shim: the first three of `io.containerd.runc.v2`, the others of all other types.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    #[serde(rename = "BinaryName")]
    pub binary_name: String,
    #[serde(rename = "Root")]
    pub root: String,
    #[serde(rename = "SystemdCgroup")]
    systemd_cgroup: bool,
    #[serde(rename = "TypeUrl")]
    type_url: String,
    #[serde(rename = "ConfigPath")]
    config_path: String,
}

/// A handler; kept in the records of its pods too, so that they can be ended when it is configured no more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handler {
    pub name: String,
    /// `io.containerd.NAME.vN`, or a path.
    pub runtime_type: String,
    /// The shim's executable.
    pub shim: Utf8PathBuf,
    pub sandboxer: Sandboxer,
    pub options: Options,
}

/// All handlers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handlers {
    /// The handler of the empty name.
    default: String,
    all: BTreeMap<String, Handler>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    default_runtime_name: String,
    runtimes: BTreeMap<String, Runtime>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Runtime {
    runtime_type: String,
    runtime_path: Utf8PathBuf,
    sandboxer: Sandboxer,
    options: Options,
}

fn refuse(reason: impl Into<String>) -> Error {
    Error::Config { flag: FLAG, reason: reason.into() }
}

impl Handler {
    /// The options that the shim is given, as containerd does; `root` is where an OCI runtime keeps its state by default.
    pub fn options(&self, root: &Utf8Path) -> Option<Any> {
        let Options { binary_name, root: own_root, type_url, config_path, .. } = self.options.clone();
        if self.takes_runc_options() {
            let root = if own_root.is_empty() { root.to_string() } else { own_root };
            let options = runc::Options { binary_name, root, ..runc::Options::default() };
            return Some(Any { type_url: RUNC_TYPE_URL.to_owned(), value: options.encode_to_vec() });
        }
        let options = generic::Options { type_url, config_path, config_body: Vec::new() };
        let is_empty = options == generic::Options::default();
        (!is_empty).then(|| Any { type_url: GENERIC_TYPE_URL.to_owned(), value: options.encode_to_vec() })
    }

    fn takes_runc_options(&self) -> bool {
        [OWN_TYPE, RUNC_TYPE].contains(&self.runtime_type.as_str())
    }
}

impl Handlers {
    /// Our own handler, with `own_shim`, and those of the configuration.
    ///
    /// # Errors
    /// [`Error::Config`]: the file cannot be read or parsed, or names a shim that is not there.
    pub fn load(config: &Config, own_shim: &Utf8Path) -> Result<Self> {
        let file = match &config.runtime_config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("{path}: {error}")))?;
                toml::from_str(&text).map_err(|error| refuse(format!("{path}: {error}")))?
            }
        };
        if !file.runtimes.is_empty() && config.state.as_str().len() > STATE_PATH_MAX {
            let reason = format!("longer than {STATE_PATH_MAX} bytes: the paths of the sockets of containerd's shims would be too long");
            return Err(Error::Config { flag: "--state", reason });
        }
        let binary_name = config.runtime_binary.as_ref().map(ToString::to_string).unwrap_or_default();
        let options = Options { binary_name, ..Options::default() };
        let own = Handler {
            name: OWN.to_owned(),
            runtime_type: OWN_TYPE.to_owned(),
            shim: own_shim.to_owned(),
            sandboxer: Sandboxer::Shim,
            options,
        };
        let mut all = BTreeMap::from([(OWN.to_owned(), own)]);
        for (name, runtime) in file.runtimes {
            all.insert(name.clone(), handler(name, runtime)?);
        }
        let default = if file.default_runtime_name.is_empty() { OWN.to_owned() } else { file.default_runtime_name };
        if !all.contains_key(&default) {
            return Err(refuse(format!("default_runtime_name {default:?} is not among the runtimes")));
        }
        Ok(Self { default, all })
    }

    /// The handler that a pod asks for; the empty name is the default's.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming those that there are.
    pub fn get(&self, name: &str) -> Result<&Handler> {
        self.all.get(if name.is_empty() { self.default.as_str() } else { name }).ok_or_else(|| {
            let known: Vec<&str> = self.all.keys().map(String::as_str).collect();
            Error::Invalid(format!("no runtime for {name:?} is configured, only {}", known.join(", ")))
        })
    }

    /// The handler of a pod that was made earlier: as it was, with the executable of today, for that may have moved.
    pub fn restored(&self, recorded: &Handler) -> Handler {
        match self.all.get(&recorded.name) {
            Some(now) if now.runtime_type == recorded.runtime_type => Handler { shim: now.shim.clone(), ..recorded.clone() },
            _ => recorded.clone(),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Handler> {
        self.all.values()
    }
}

fn handler(name: String, runtime: Runtime) -> Result<Handler> {
    let failed = |reason: String| refuse(format!("runtimes.{name}: {reason}"));
    if runtime.options.systemd_cgroup {
        return Err(failed("options.SystemdCgroup is not implemented".to_owned()));
    }
    let executable = executable_of(&runtime.runtime_type).map_err(&failed)?;
    let shim = if runtime.runtime_path.as_str().is_empty() {
        let found =
            if executable.is_absolute() { executable.is_file().then(|| executable.clone()) } else { crate::config::in_path(&executable) };
        found.ok_or_else(|| failed(format!("there is no {executable}; install it in PATH, or give its path as runtime_path")))?
    } else {
        runtime.runtime_path
    };
    if !shim.is_absolute() || !shim.is_file() {
        return Err(failed(format!("runtime_path {shim} is not the absolute path of a file")));
    }
    let handler =
        Handler { name: name.clone(), runtime_type: runtime.runtime_type, shim, sandboxer: runtime.sandboxer, options: runtime.options };
    let options = &handler.options;
    let (of_runc, of_others) = ([&options.binary_name, &options.root], [&options.type_url, &options.config_path]);
    let (wrong, words) =
        if handler.takes_runc_options() { (of_others, "TypeUrl and ConfigPath") } else { (of_runc, "BinaryName and Root") };
    if wrong.iter().any(|option| !option.is_empty()) {
        return Err(failed(format!("options: {words} are not for the type {:?}", handler.runtime_type)));
    }
    Ok(handler)
}

/// `io.containerd.NAME.vN` is `containerd-shim-NAME-vN` (containerd v2.4.2, `pkg/shim/util.go`, BinaryName); a path is itself.
fn executable_of(runtime_type: &str) -> Result<Utf8PathBuf, String> {
    if runtime_type.starts_with('/') {
        return Ok(runtime_type.into());
    }
    let mut parts = runtime_type.rsplit('.');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(version), Some(name), Some(_)) if !version.is_empty() && !name.is_empty() => {
            Ok(format!("containerd-shim-{name}-{version}").into())
        }
        _ => Err(format!("runtime_type {runtime_type:?} is not of the form io.containerd.NAME.vN")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn load(text: &str) -> Result<Handlers> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let path = file.path().to_str().expect("UTF-8");
        let config = Cli::parse_from(["cri", "--runtime-config", path, "--runtime-binary", "/usr/bin/crun"]).config;
        Handlers::load(&config, Utf8Path::new("/bin/shim"))
    }

    #[test]
    fn ours_is_there_without_a_file() {
        let handlers = load("").expect("good");
        let own = handlers.get("").expect("the default");
        assert_eq!(
            (own, own.options.binary_name.as_str(), own.sandboxer),
            (handlers.get(OWN).expect("ours"), "/usr/bin/crun", Sandboxer::Shim)
        );
        assert!(handlers.get("runc").expect_err("unknown").to_string().contains("only coracle"));
    }

    #[test]
    fn handlers_in_containerds_words() {
        let text = "default_runtime_name = \"runc\"\n[runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\nruntime_path = \"/bin/sh\"\n\
                    options = { BinaryName = \"/b\" }\n[runtimes.vm]\nruntime_type = \"/bin/sh\"\nsandboxer = \"shim\"\n\
                    [runtimes.kata]\nruntime_type = \"io.containerd.kata.v2\"\nruntime_path = \"/bin/sh\"\noptions = { ConfigPath = \"/k\" }\n";
        let handlers = load(text).expect("good");
        let runc = handlers.get("").expect("the default");
        assert_eq!((runc.shim.as_str(), runc.options.binary_name.as_str(), runc.sandboxer), ("/bin/sh", "/b", Sandboxer::PodSandbox));
        assert_eq!(handlers.get("vm").expect("there").sandboxer, Sandboxer::Shim);
        let urls =
            ["runc", "vm", "kata"].map(|name| handlers.get(name).expect("there").options(Utf8Path::new("/r")).map(|any| any.type_url));
        assert_eq!(urls, [Some(RUNC_TYPE_URL.to_owned()), None, Some(GENERIC_TYPE_URL.to_owned())]);
        assert_eq!(executable_of("io.containerd.runc.v2"), Ok("containerd-shim-runc-v2".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("[runtimes.a]\nruntime_type = \"io.containerd.a.v2\"\nruntime_path = \"/nonexistent\"", "/nonexistent"),
            ("[runtimes.a]\nruntime_path = \"/bin/sh\"", "runtime_type"),
            ("[runtimes.a]\nruntime_type = \"/bin/sh\"\noptions = { BinaryName = \"/b\" }", "BinaryName"),
            ("[runtimes.a]\nruntime_type = \"runc\"", "runtimes.a"),
            ("[runtimes.a]\nruntime_type = \"io.containerd.nonexistent.v2\"", "containerd-shim-nonexistent-v2"),
            ("[runtimes.a]\nruntime_type = \"/bin/sh\"\noptions = { SystemdCgroup = true }", "SystemdCgroup"),
            ("[runtimes.a]\nruntime_type = \"/bin/sh\"\nsnapshotter = \"x\"", "snapshotter"),
            ("[runtimes.a]\nruntime_type = \"/bin/sh\"\nsandboxer = \"x\"", "sandboxer"),
            ("default_runtime_name = \"a\"", "default_runtime_name"),
        ] {
            let error = load(text).expect_err(text).to_string();
            assert!(error.contains(word) && error.contains(FLAG), "{error}");
        }
    }
}
