//! The flags of `coracle cri`.

use camino::{Utf8Path, Utf8PathBuf};

use crate::error::Error;

/// Name of the shim's executable, looked for beside this one and then in PATH.
pub const SHIM_NAME: &str = "containerd-shim-coracle-v2";

/// Settings of the CRI server; names as containerd's where it has the flag.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Directory of what survives a reboot: images and snapshots.
    #[arg(long, default_value = "/var/lib/coracle/cri", value_name = "DIR")]
    pub root: Utf8PathBuf,
    /// Directory of what means nothing after a reboot: pods, containers, namespaces, sockets.
    #[arg(long, default_value = "/run/coracle/cri", value_name = "DIR")]
    pub state: Utf8PathBuf,
    /// The unix socket on which CRI is served.
    #[arg(long, default_value = "/run/coracle/cri.sock", value_name = "SOCKET")]
    pub address: Utf8PathBuf,
    /// Addresses of pods on the built-in network.
    #[arg(long, default_value = "10.85.0.0/16", value_name = "CIDR")]
    pub pod_cidr: String,
    /// Name of the bridge of the built-in network.
    #[arg(long, default_value = "coracle0", value_name = "NAME")]
    pub bridge: String,
    /// Name of the nftables table of the built-in network.
    #[arg(long, default_value = "coracle", value_name = "NAME")]
    pub nftables_table: String,
    /// Directory of CNI configuration; a conflist there takes precedence over the built-in network.
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    pub cni_conf_dir: Utf8PathBuf,
    /// Directory of CNI plugins.
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    pub cni_bin_dir: Utf8PathBuf,
    /// Directory of containerd's `hosts.toml` files: DIR/REGISTRY/hosts.toml names mirrors, headers and paths.
    #[arg(long, value_name = "DIR")]
    pub registry_config_path: Option<Utf8PathBuf>,
    /// The shim's executable [default: containerd-shim-coracle-v2 beside this executable, else in PATH].
    #[arg(long, value_name = "PATH")]
    pub shim: Option<Utf8PathBuf>,
    /// An OCI runtime with runc's command line, in place of the shim's built-in one.
    #[arg(long, value_name = "PATH")]
    pub runtime_binary: Option<Utf8PathBuf>,
    /// A TOML file of further runtime handlers, in containerd's words: `[runtimes.NAME]` with `runtime_type` or `runtime_path`, `sandboxer`, `options`.
    #[arg(long, value_name = "FILE")]
    pub runtime_config: Option<Utf8PathBuf>,
    /// Cgroup below which the containers of sandboxes without a cgroup parent are put.
    #[arg(long, default_value = "/coracle", value_name = "CGROUP")]
    pub cgroup_root: String,
    /// Address of the server of exec, attach and port-forward streams.
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    pub stream_server_address: std::net::IpAddr,
    /// Port of the server of streams; 0 is any that is free.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub stream_server_port: u16,
}

impl Config {
    /// Checks what clap cannot, before anything is bound or made.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag.
    pub fn validate(&self) -> Result<(), Error> {
        let absolute = |flag: &'static str, path: &Utf8Path| {
            if path.is_absolute() { Ok(()) } else { Err(Error::Config { flag, reason: format!("{path} is not an absolute path") }) }
        };
        absolute("--root", &self.root)?;
        absolute("--state", &self.state)?;
        absolute("--address", &self.address)?;
        absolute("--cni-conf-dir", &self.cni_conf_dir)?;
        absolute("--cni-bin-dir", &self.cni_bin_dir)?;
        if let Some(dir) = &self.registry_config_path {
            absolute("--registry-config-path", dir)?;
        }
        if let Some(runtime) = &self.runtime_binary {
            absolute("--runtime-binary", runtime)?;
        }
        // sockaddr_un has 108 bytes with the final zero; the longest socket below the state directory is a shim's.
        if self.state.as_str().len() > STATE_PATH_MAX {
            return Err(Error::Config {
                flag: "--state",
                reason: format!("longer than {STATE_PATH_MAX} bytes: its sockets' paths would be too long"),
            });
        }
        if self.address.as_str().len() > 106 {
            return Err(Error::Config { flag: "--address", reason: "longer than 106 bytes".to_owned() });
        }
        if self.root == self.state {
            return Err(Error::Config { flag: "--state", reason: "must not be --root's directory".to_owned() });
        }
        if self.cgroup_root.split('/').any(|part| part == "..") {
            return Err(Error::Config { flag: "--cgroup-root", reason: "must not contain ..".to_owned() });
        }
        Ok(())
    }

    /// The shim's executable.
    ///
    /// # Errors
    /// [`Error::Config`]: there is none.
    pub fn find_shim(&self) -> Result<Utf8PathBuf, Error> {
        if let Some(shim) = &self.shim {
            return if shim.is_file() {
                Ok(shim.clone())
            } else {
                Err(Error::Config { flag: "--shim", reason: format!("{shim} is not a file") })
            };
        }
        let beside = std::env::current_exe().ok().and_then(|path| Utf8PathBuf::from_path_buf(path).ok());
        let beside = beside.and_then(|path| path.parent().map(|dir| dir.join(SHIM_NAME)));
        beside.filter(|candidate| candidate.is_file()).or_else(|| in_path(Utf8Path::new(SHIM_NAME))).ok_or_else(|| Error::Config {
            flag: "--shim",
            reason: format!("no {SHIM_NAME} beside this executable or in PATH; install it there or give its path"),
        })
    }
}

/// The program of this name in PATH.
pub fn in_path(name: &Utf8Path) -> Option<Utf8PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').filter(|dir| !dir.is_empty()).map(|dir| Utf8Path::new(dir).join(name)).find(|candidate| candidate.is_file())
}

/// 107 bytes less `/s/` and the 32 hexadecimal digits of our shim's name, with some room.
const STATE_PATH_MAX: usize = 68;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        config: Config,
    }

    fn parse(args: &[&str]) -> Config {
        Cli::parse_from(std::iter::once("cri").chain(args.iter().copied())).config
    }

    #[test]
    fn the_defaults_are_valid() {
        parse(&[]).validate().expect("valid");
    }

    #[test]
    fn bad_flags_are_named() {
        for (flag, value) in [
            ("--root", "rel"),
            ("--state", "rel"),
            ("--address", "rel"),
            ("--cgroup-root", "/a/../b"),
            ("--state", "/a-very-long-path/that-leaves-no-room/for-the-sockets-of-shims/which-are-below-it"),
        ] {
            let error = parse(&[flag, value]).validate().expect_err(value);
            assert!(error.to_string().contains(flag), "{error}");
        }
        assert!(parse(&["--shim", "/nonexistent/shim"]).find_shim().is_err());
    }
}
