//! The command line: flags as Go's `flag` package reads them, one dash or two, as containerd writes them.

use std::ffi::OsString;

/// What to do, with its flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container or sandbox.
    pub id: String,
    /// `-address`: containerd's gRPC socket; for the daemon, the socket to remove at its end.
    pub address: String,
    /// `-publish-binary`: containerd's executable; unused, as events go over ttrpc.
    pub publish_binary: String,
    /// `-bundle`, of `delete`.
    pub bundle: String,
    /// `--state`, of `keeper`.
    pub state: String,
    /// `-debug`.
    pub debug: bool,
    /// What to do.
    pub action: Action,
}

/// The modes of the executable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Serve (started by `start` only, with the listener as descriptor 3).
    #[default]
    Serve,
    /// Start a shim, or find the group's, and print its address.
    Start,
    /// Remove what a dead shim left of one container or sandbox.
    Delete,
    /// Print what this runtime is and can.
    Info,
    /// Print the version.
    Version,
    /// Be process 1 of a pod's PID namespace.
    Pause,
    /// Be the node's keeper.
    Keeper,
    /// Print the usage.
    Help,
}

/// A command line that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// A flag that there is not.
    #[error("unknown flag {0}")]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag {0} needs a value")]
    NoValue(String),
    /// A command that there is not.
    #[error("unknown command {0:?}: start, delete or keeper is known")]
    UnknownCommand(String),
    /// A flag that the command needs.
    #[error("{0} is required")]
    Missing(&'static str),
}

/// The text of `-help`.
pub const USAGE: &str = "usage: containerd-shim-coracle-v2 -namespace NS -address SOCKET -id ID [-debug] start
       containerd-shim-coracle-v2 -namespace NS -address SOCKET -id ID -bundle DIR [-debug] delete
       containerd-shim-coracle-v2 -info < OPTIONS
       containerd-shim-coracle-v2 keeper --state DIR
A containerd runtime v2 shim: one process for a pod. containerd runs it (runtime io.containerd.coracle.v2).
";

impl Args {
    /// Reads the command line, without the program's name.
    ///
    /// # Errors
    /// [`ArgsError`], naming the flag.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut parsed = Self::default();
        let mut args = args.into_iter().map(|arg| arg.to_string_lossy().into_owned());
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                parsed.action = command(&arg)?;
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let target = match name {
                "namespace" => &mut parsed.namespace,
                "id" => &mut parsed.id,
                "address" => &mut parsed.address,
                "publish-binary" => &mut parsed.publish_binary,
                "bundle" => &mut parsed.bundle,
                "state" => &mut parsed.state,
                "debug" => {
                    parsed.debug = value.is_none_or(|value| value != "false");
                    continue;
                }
                "info" => {
                    parsed.action = Action::Info;
                    continue;
                }
                "v" | "version" => {
                    parsed.action = Action::Version;
                    continue;
                }
                "h" | "help" => {
                    parsed.action = Action::Help;
                    continue;
                }
                _ => return Err(ArgsError::UnknownFlag(arg)),
            };
            *target = match value.or_else(|| args.next()) {
                Some(value) => value,
                None => return Err(ArgsError::NoValue(arg)),
            };
        }
        parsed.check()?;
        Ok(parsed)
    }

    fn check(&self) -> Result<(), ArgsError> {
        match self.action {
            Action::Start | Action::Delete | Action::Serve if self.namespace.is_empty() => Err(ArgsError::Missing("-namespace")),
            Action::Start | Action::Delete | Action::Serve if self.id.is_empty() => Err(ArgsError::Missing("-id")),
            Action::Keeper if self.state.is_empty() => Err(ArgsError::Missing("--state")),
            _ => Ok(()),
        }
    }
}

fn command(word: &str) -> Result<Action, ArgsError> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "keeper" => Ok(Action::Keeper),
        "pause" => Ok(Action::Pause),
        "help" => Ok(Action::Help),
        _ => Err(ArgsError::UnknownCommand(word.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_lines() {
        let args = parse("-namespace k8s.io -address /a -publish-binary /c -id x -debug start").expect("valid");
        assert_eq!((args.action, args.debug, args.id.as_str()), (Action::Start, true, "x"));
        let args = parse("-namespace k8s.io -address /a -publish-binary /c -id x -bundle /b delete").expect("valid");
        assert_eq!((args.action, args.bundle.as_str()), (Action::Delete, "/b"));
        assert_eq!(parse("-info").expect("valid").action, Action::Info);
        assert_eq!(parse("keeper --state=/s").expect("valid").state, "/s");
    }

    #[test]
    fn wrong_lines_name_the_flag() {
        assert_eq!(parse("-x"), Err(ArgsError::UnknownFlag("-x".into())));
        assert_eq!(parse("-namespace n -id"), Err(ArgsError::NoValue("-id".into())));
        assert_eq!(parse("-id a start"), Err(ArgsError::Missing("-namespace")));
        assert_eq!(parse("keeper"), Err(ArgsError::Missing("--state")));
        assert_eq!(parse("frob"), Err(ArgsError::UnknownCommand("frob".into())));
    }
}
