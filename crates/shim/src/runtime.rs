//! The OCI runtime: its command lines, how it is run, and what its failure says.
//!
//! Built in (`oci_runtime::main` in a forked child, no exec), or any program with runc's command line, by the runtime
//! options' BinaryName. Source of the lines: `reference/seams/oci-runtime.md`, section 1.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use protocols::shim::options::runc::Options;
use serde::{Deserialize, Serialize};

/// The runtime of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// The program; empty: built in.
    pub binary: String,
    /// Where it keeps its state: ROOT/NAMESPACE.
    pub root: PathBuf,
    /// Cgroups by systemd.
    pub systemd_cgroup: bool,
    /// No pivot_root (initial ramfs).
    pub no_pivot: bool,
    /// No session keyring of its own.
    pub no_new_keyring: bool,
}

/// Where the built-in runtime keeps its state, if the options do not say.
const ROOT: &str = "/run/coracle/oci";
/// Where runc keeps its state, if the options do not say (containerd's).
const RUNC_ROOT: &str = "/run/containerd/runc";

impl Runtime {
    /// The runtime that the options ask for.
    #[must_use]
    pub fn new(options: &Options, namespace: &str) -> Self {
        let default = if options.binary_name.is_empty() { ROOT } else { RUNC_ROOT };
        let root = if options.root.is_empty() { default } else { &options.root };
        Self {
            binary: options.binary_name.clone(),
            root: Path::new(root).join(namespace),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
        }
    }

    /// A command of this runtime on a container with that bundle.
    #[must_use]
    pub fn line(&self, bundle: &Path, words: &[&str]) -> Line {
        let mut args: Vec<OsString> = vec!["--root".into(), self.root.clone().into()];
        args.extend(["--log".into(), bundle.join("log.json").into(), "--log-format".into(), "json".into()]);
        if self.systemd_cgroup {
            args.push("--systemd-cgroup".into());
        }
        args.extend(words.iter().map(OsString::from));
        Line { binary: self.binary.clone(), args }
    }

    /// `create` of a container.
    #[must_use]
    pub fn create(&self, bundle: &Path, id: &str, console: Option<&Path>) -> Line {
        let mut line = self.line(bundle, &["create", "--bundle"]);
        line.args.extend([bundle.into(), "--pid-file".into(), bundle.join("init.pid").into()]);
        if let Some(console) = console {
            line.args.extend(["--console-socket".into(), console.into()]);
        }
        if self.no_pivot {
            line.args.push("--no-pivot".into());
        }
        if self.no_new_keyring {
            line.args.push("--no-new-keyring".into());
        }
        line.args.push(id.into());
        line
    }

    /// `exec` of the process whose spec is in the file `process`.
    #[must_use]
    pub fn exec(&self, bundle: &Path, id: &str, exec_id: &str, process: &Path, console: Option<&Path>) -> Line {
        let mut line = self.line(bundle, &["exec", "--process"]);
        line.args.push(process.into());
        if let Some(console) = console {
            line.args.extend(["--console-socket".into(), console.into()]);
        }
        let pid_file = bundle.join(format!("{exec_id}.pid"));
        line.args.extend(["--detach".into(), "--pid-file".into(), pid_file.into(), id.into()]);
        line
    }

    /// `features`, which has no global flags.
    #[must_use]
    pub fn features(&self) -> Line {
        Line { binary: self.binary.clone(), args: vec!["features".into()] }
    }
}

/// A command line of a runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    binary: String,
    args: Vec<OsString>,
}

impl Line {
    /// Becomes the runtime. For a forked child only.
    #[must_use]
    pub fn become_it(self) -> u8 {
        if self.binary.is_empty() {
            return built_in(self.args);
        }
        let error = Command::new(&self.binary).args(&self.args).env_remove("NOTIFY_SOCKET").exec();
        say!("failed to run the OCI runtime {}: {error}", self.binary);
        127
    }

    /// Runs the runtime to its end. For a forked child only.
    #[must_use]
    pub fn run(self) -> u8 {
        if self.binary.is_empty() {
            return built_in(self.args);
        }
        match Command::new(&self.binary).args(&self.args).env_remove("NOTIFY_SOCKET").status() {
            Ok(status) => status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255),
            Err(error) => {
                say!("failed to run the OCI runtime {}: {error}", self.binary);
                127
            }
        }
    }
}

fn built_in(args: Vec<OsString>) -> u8 {
    oci_runtime::main(std::iter::once(OsString::from("coracle-oci")).chain(args))
}

/// Bytes of the runtime's log before a command, so that an older error is not taken for the command's.
#[must_use]
pub fn log_mark(bundle: &Path) -> u64 {
    std::fs::metadata(bundle.join("log.json")).map_or(0, |meta| meta.len())
}

/// Why a command failed: the last error of its log since `mark`, else what it printed, else its status.
#[must_use]
pub fn failure(bundle: &Path, mark: u64, printed: &str, status: u32) -> String {
    let log = std::fs::read(bundle.join("log.json")).unwrap_or_default();
    let fresh = usize::try_from(mark).ok().and_then(|mark| log.get(mark..)).unwrap_or_default();
    if let Some(message) = last_error(fresh) {
        return message;
    }
    match printed.trim() {
        "" => format!("exit status {status}"),
        text => text.to_owned(),
    }
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

pub(crate) fn last_error(log: &[u8]) -> Option<String> {
    serde_json::Deserializer::from_slice(log)
        .into_iter::<LogLine>()
        .map_while(Result::ok)
        .filter(|line| line.level == "error")
        .last()
        .map(|line| line.msg.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &Line) -> String {
        line.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn lines_are_as_containerds_shim_writes_them() {
        let options = Options { binary_name: "runc".into(), no_pivot_root: true, ..Options::default() };
        let runtime = Runtime::new(&options, "k8s.io");
        let global = "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json";
        assert_eq!(
            words(&runtime.create(Path::new("/b"), "c1", Some(Path::new("/s")))),
            format!("{global} create --bundle /b --pid-file /b/init.pid --console-socket /s --no-pivot c1")
        );
        assert_eq!(
            words(&runtime.exec(Path::new("/b"), "c1", "e1", Path::new("/p"), None)),
            format!("{global} exec --process /p --detach --pid-file /b/e1.pid c1")
        );
        assert_eq!(words(&runtime.features()), "features");
        let options = Options { root: "/r".into(), systemd_cgroup: true, ..Options::default() };
        assert_eq!(
            words(&Runtime::new(&options, "n").line(Path::new("/b"), &["kill", "--all", "c1", "9"])),
            "--root /r/n --log /b/log.json --log-format json --systemd-cgroup kill --all c1 9"
        );
    }

    #[test]
    fn the_last_error_is_the_reason() {
        let log = br#"{"level":"error","msg":"one","time":"t"}
{"level":"error","msg":"two\n"}{"level":"warning","msg":"three"}
rubbish"#;
        assert_eq!(last_error(log).as_deref(), Some("two"));
        assert_eq!(last_error(b"plain text"), None);
    }
}
