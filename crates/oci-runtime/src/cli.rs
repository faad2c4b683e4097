//! runc's command line: global flags, verbs and their flags, in both forms (`--flag value`, `--flag=value`).
//!
//! Source: opencontainers/runc v1.5.2 `main.go` and its verb files. Flags of one dash are taken as well, as runc's
//! parser does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::{Result, refuse};

/// The flags before the verb.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Global {
    /// Where states are kept.
    pub root: PathBuf,
    /// Where errors are written (appended); none: standard error.
    pub log: Option<PathBuf>,
    /// Whether the log is JSON lines.
    pub log_json: bool,
    /// Whether each verb is logged too.
    pub debug: bool,
}

/// The flags and arguments of a verb.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// Flags that take a value, each with all values given.
    values: BTreeMap<&'static str, Vec<String>>,
    /// Flags that take none.
    switches: Vec<&'static str>,
    /// What is no flag.
    pub positional: Vec<String>,
}

impl Arguments {
    /// Whether the switch was given.
    pub fn has(&self, name: &str) -> bool {
        self.switches.contains(&name)
    }

    /// The last value given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.last().map(String::as_str)
    }

    /// All values given.
    pub fn values(&self, name: &str) -> &[String] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    /// The last value as a number.
    ///
    /// # Errors
    /// When it is none.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        match self.value(name) {
            None => Ok(None),
            Some(text) => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => refuse(format!("invalid value {text:?} for flag --{name}: it is not a number")),
            },
        }
    }
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// Flags before the verb.
    pub global: Global,
    /// The verb, by its first name.
    pub verb: &'static str,
    /// Its flags and arguments.
    pub arguments: Arguments,
}

/// A flag: its names (the first is the one that counts), and whether it takes a value.
struct Flag(&'static [&'static str], bool);

/// A verb: its name, its flags, how many arguments it takes at least and at most.
struct Verb {
    name: &'static str,
    usage: &'static str,
    flags: &'static [Flag],
    least: usize,
    most: usize,
    /// Whether what follows the first argument is not ours to parse.
    open_end: bool,
}

const CREATE_FLAGS: [Flag; 7] = [
    Flag(&["bundle", "b"], true),
    Flag(&["console-socket"], true),
    Flag(&["pidfd-socket"], true),
    Flag(&["pid-file"], true),
    Flag(&["no-pivot"], false),
    Flag(&["no-new-keyring"], false),
    Flag(&["preserve-fds"], true),
];

const RUN_FLAGS: [Flag; 10] = [
    Flag(&["bundle", "b"], true),
    Flag(&["console-socket"], true),
    Flag(&["pidfd-socket"], true),
    Flag(&["detach", "d"], false),
    Flag(&["keep"], false),
    Flag(&["pid-file"], true),
    Flag(&["no-subreaper"], false),
    Flag(&["no-pivot"], false),
    Flag(&["no-new-keyring"], false),
    Flag(&["preserve-fds"], true),
];

const EXEC_FLAGS: [Flag; 17] = [
    Flag(&["console-socket"], true),
    Flag(&["pidfd-socket"], true),
    Flag(&["cwd"], true),
    Flag(&["env", "e"], true),
    Flag(&["tty", "t"], false),
    Flag(&["user", "u"], true),
    Flag(&["additional-gids", "g"], true),
    Flag(&["process", "p"], true),
    Flag(&["detach", "d"], false),
    Flag(&["pid-file"], true),
    Flag(&["process-label"], true),
    Flag(&["apparmor"], true),
    Flag(&["no-new-privs"], false),
    Flag(&["cap", "c"], true),
    Flag(&["preserve-fds"], true),
    Flag(&["cgroup"], true),
    Flag(&["ignore-paused"], false),
];

const UPDATE_FLAGS: [Flag; 20] = [
    Flag(&["resources", "r"], true),
    Flag(&["blkio-weight"], true),
    Flag(&["cpu-period"], true),
    Flag(&["cpu-quota"], true),
    Flag(&["cpu-burst"], true),
    Flag(&["cpu-share"], true),
    Flag(&["cpu-rt-period"], true),
    Flag(&["cpu-rt-runtime"], true),
    Flag(&["cpuset-cpus"], true),
    Flag(&["cpuset-mems"], true),
    Flag(&["cpu-idle"], true),
    Flag(&["memory"], true),
    Flag(&["memory-reservation"], true),
    Flag(&["memory-swap"], true),
    Flag(&["pids-limit"], true),
    Flag(&["kernel-memory"], true),
    Flag(&["kernel-memory-tcp"], true),
    Flag(&["l3-cache-schema"], true),
    Flag(&["mem-bw-schema"], true),
    Flag(&["memory-check-before-update"], false),
];

const VERBS: [Verb; 17] = [
    Verb {
        name: "create",
        usage: "ID: make a container, up to where its process waits",
        flags: &CREATE_FLAGS,
        least: 1,
        most: 1,
        open_end: false,
    },
    Verb { name: "start", usage: "ID: let a created container's process go", flags: &[], least: 1, most: 1, open_end: false },
    Verb { name: "run", usage: "ID: create and start", flags: &RUN_FLAGS, least: 1, most: 1, open_end: false },
    Verb {
        name: "exec",
        usage: "ID [COMMAND...]: run another process in a container",
        flags: &EXEC_FLAGS,
        least: 1,
        most: usize::MAX,
        open_end: true,
    },
    Verb {
        name: "kill",
        usage: "ID [SIGNAL]: send a signal, TERM if none is named",
        flags: &[Flag(&["all", "a"], false)],
        least: 1,
        most: 2,
        open_end: false,
    },
    Verb {
        name: "delete",
        usage: "ID: remove a stopped container",
        flags: &[Flag(&["force", "f"], false)],
        least: 1,
        most: 1,
        open_end: false,
    },
    Verb { name: "state", usage: "ID: print a container's state", flags: &[], least: 1, most: 1, open_end: false },
    Verb { name: "pause", usage: "ID: stop all processes where they are", flags: &[], least: 1, most: 1, open_end: false },
    Verb { name: "resume", usage: "ID: let them go on", flags: &[], least: 1, most: 1, open_end: false },
    Verb {
        name: "ps",
        usage: "ID [PS-OPTION...]: list processes",
        flags: &[Flag(&["format", "f"], true)],
        least: 1,
        most: usize::MAX,
        open_end: true,
    },
    Verb {
        name: "list",
        usage: "list containers",
        flags: &[Flag(&["format", "f"], true), Flag(&["quiet", "q"], false)],
        least: 0,
        most: 0,
        open_end: false,
    },
    Verb { name: "update", usage: "ID: change limits", flags: &UPDATE_FLAGS, least: 1, most: 1, open_end: false },
    Verb {
        name: "events",
        usage: "ID: print usage",
        flags: &[Flag(&["interval"], true), Flag(&["stats"], false)],
        least: 1,
        most: 1,
        open_end: false,
    },
    Verb { name: "features", usage: "print what this runtime can do", flags: &[], least: 0, most: 0, open_end: false },
    Verb {
        name: "spec",
        usage: "write a config.json to begin with",
        flags: &[Flag(&["bundle", "b"], true), Flag(&["rootless"], false)],
        least: 0,
        most: 0,
        open_end: false,
    },
    Verb { name: "checkpoint", usage: "not implemented", flags: &[], least: 0, most: usize::MAX, open_end: true },
    Verb { name: "restore", usage: "not implemented", flags: &[], least: 0, most: usize::MAX, open_end: true },
];

const GLOBAL_FLAGS: [Flag; 7] = [
    Flag(&["root"], true),
    Flag(&["log"], true),
    Flag(&["log-format"], true),
    Flag(&["debug"], false),
    Flag(&["systemd-cgroup"], false),
    Flag(&["version", "v"], false),
    Flag(&["help", "h"], false),
];

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A verb.
    Run(CommandLine),
    /// The version.
    Version,
    /// The usage.
    Help,
}

/// Parses the arguments after the program's name. Answers the global flags found so far with an error, for it is to be
/// logged where they say.
///
/// # Errors
/// A flag or verb that is unknown, a missing or a superfluous argument.
pub fn parse(args: impl IntoIterator<Item = OsString>, default_root: PathBuf) -> std::result::Result<Request, (Global, crate::Error)> {
    let mut global = Global { root: default_root, ..Global::default() };
    let parsed = parse_into(args, &mut global);
    parsed.map_err(|error| (global, error))
}

fn parse_into(args: impl IntoIterator<Item = OsString>, global: &mut Global) -> Result<Request> {
    let mut args = args.into_iter().map(|arg| match arg.into_string() {
        Ok(text) => Ok(text),
        Err(bytes) => refuse(format!("argument {:?} is not UTF-8", bytes.to_string_lossy())),
    });
    let mut head = Arguments::default();
    let Some(verb) = take_flags(&GLOBAL_FLAGS, &mut args, &mut head)? else {
        return Ok(if head.has("version") { Request::Version } else { Request::Help });
    };
    if head.has("version") {
        return Ok(Request::Version);
    }
    if head.has("help") || verb == "help" {
        return Ok(Request::Help);
    }
    if let Some(root) = head.value("root") {
        global.root = root.into();
    }
    global.log = head.value("log").filter(|path| !path.is_empty()).map(PathBuf::from);
    global.debug = head.has("debug");
    global.log_json = match head.value("log-format") {
        None | Some("text") => false,
        Some("json") => true,
        Some(other) => return refuse(format!("invalid log-format: {other}")),
    };
    let Some(verb) = VERBS.iter().find(|known| known.name == verb) else {
        return refuse(format!("unknown command {verb:?}; --help lists them"));
    };
    if head.has("systemd-cgroup") && !["state", "list", "ps", "features", "spec"].contains(&verb.name) {
        return refuse("--systemd-cgroup is not implemented: use the cgroupfs driver");
    }
    let mut arguments = Arguments::default();
    while let Some(argument) = take_flags(verb.flags, &mut args, &mut arguments)? {
        arguments.positional.push(argument);
        if verb.open_end {
            for rest in args.by_ref() {
                arguments.positional.push(rest?);
            }
        }
    }
    if arguments.has("help") {
        return Ok(Request::Help);
    }
    let count = arguments.positional.len();
    if count < verb.least {
        return refuse(format!("{}: {:?} requires at least {} argument(s)", verb.name, verb.name, verb.least));
    }
    if count > verb.most {
        return refuse(format!("{}: {:?} takes at most {} argument(s)", verb.name, verb.name, verb.most));
    }
    Ok(Request::Run(CommandLine { global: global.clone(), verb: verb.name, arguments }))
}

/// Takes flags until an argument that is none, which it answers.
fn take_flags(flags: &[Flag], args: &mut impl Iterator<Item = Result<String>>, into: &mut Arguments) -> Result<Option<String>> {
    while let Some(argument) = args.next() {
        let argument = argument?;
        if argument == "--" {
            return args.next().transpose();
        }
        // A dash alone is a value, not a flag.
        let Some(name) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')).filter(|n| !n.is_empty()) else {
            return Ok(Some(argument));
        };
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        if matches!(name, "help" | "h") {
            into.switches.push("help");
            continue;
        }
        let Some(Flag(names, takes_value)) = flags.iter().find(|Flag(names, _)| names.contains(&name)) else {
            if name == "criu" {
                // go-runc writes it before the verb for the shim's option CriuPath; runc itself knows it no more.
                return refuse("--criu is not implemented: there is no checkpoint and restore");
            }
            return refuse(format!("flag provided but not defined: -{name}"));
        };
        match (takes_value, value) {
            (true, Some(value)) => into.values.entry(names[0]).or_default().push(value),
            (true, None) => match args.next().transpose()? {
                Some(value) => into.values.entry(names[0]).or_default().push(value),
                None => return refuse(format!("flag needs an argument: -{name}")),
            },
            (false, None) => into.switches.push(names[0]),
            (false, Some(value)) => match value.as_str() {
                "true" | "1" | "t" => into.switches.push(names[0]),
                "false" | "0" | "f" => into.switches.retain(|known| known != &names[0]),
                other => return refuse(format!("invalid boolean value {other:?} for -{name}")),
            },
        }
    }
    Ok(None)
}

/// The usage, for `--help`.
pub fn usage() -> String {
    let mut text = String::from(
        "coracle-oci: an OCI runtime (runtime-spec 1.3) with runc's command line\n\n\
         usage: coracle-oci [--root DIR] [--log FILE] [--log-format text|json] [--debug] COMMAND [FLAGS] [ARGUMENTS]\n\n\
         commands:\n",
    );
    for verb in &VERBS {
        text.push_str(&format!("  {:<11} {}\n", verb.name, verb.usage));
        for Flag(names, takes_value) in verb.flags {
            let value = if *takes_value { " VALUE" } else { "" };
            text.push_str(&format!("                --{}{value}\n", names[0]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> std::result::Result<CommandLine, String> {
        let args = line.split(' ').map(OsString::from);
        match parse(args, "/run/x".into()) {
            Ok(Request::Run(command)) => Ok(command),
            Ok(other) => Err(format!("{other:?}")),
            Err((_, error)) => Err(error.to_string()),
        }
    }

    #[test]
    fn what_the_shim_and_conmon_send() {
        let line = "--root /r/k8s.io --log /b/log.json --log-format json create --bundle /b --pid-file /b/init.pid abc";
        let command = run(line).expect("valid");
        assert_eq!((command.verb, command.global.log_json), ("create", true));
        assert_eq!(command.global.root, PathBuf::from("/r/k8s.io"));
        assert_eq!(
            (command.arguments.value("pid-file"), command.arguments.positional.as_slice()),
            (Some("/b/init.pid"), &["abc".to_owned()][..])
        );
        let command = run("--log-format=json --log /l exec --detach --tty --console-socket /s --process /p -- id").expect("valid");
        assert!(command.arguments.has("detach") && command.arguments.has("tty"));
        assert_eq!(run("update --resources - id").expect("valid").arguments.value("resources"), Some("-"));
        assert_eq!(run("kill --all id 9").expect("valid").arguments.positional, ["id", "9"]);
        let command = run("exec -t --user 1:2 id sh -c --detach").expect("valid");
        assert_eq!(command.arguments.positional, ["id", "sh", "-c", "--detach"]);
        assert_eq!(run("ps id -ef").expect("valid").arguments.positional, ["id", "-ef"]);
    }

    #[test]
    fn what_is_refused() {
        for (line, word) in [
            ("create", "at least 1"),
            ("create --nope x", "not defined"),
            ("create a b", "at most 1"),
            ("frobnicate", "unknown command"),
            ("--systemd-cgroup create x", "not implemented"),
            ("--log-format xml list", "log-format"),
            ("create --bundle", "needs an argument"),
            ("--criu /usr/sbin/criu create x", "--criu is not implemented"),
            ("create --criu=/usr/sbin/criu x", "--criu is not implemented"),
            ("create --no-subreaper x", "not defined"),
        ] {
            let error = run(line).expect_err(line);
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
