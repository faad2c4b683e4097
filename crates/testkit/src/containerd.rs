//! The configuration of upstream's containerd, of any release, with all its files in folders of a test's own.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;

/// Where Debian's package `containernetworking-plugins` has the CNI plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";
/// The plugins of [`Bridge`].
const PLUGINS: [&str; 3] = ["bridge", "host-local", "loopback"];
/// CNI's version of the network's configuration: containerd 1.6 knows no later one.
const CNI_VERSION: &str = "1.0.0";

/// Whether pods can have a [`Bridge`].
pub fn has_cni_plugins() -> bool {
    PLUGINS.iter().all(|plugin| Path::new(CNI_PLUGINS).join(plugin).exists())
}

/// The form of the configuration (containerd docs/PLUGINS.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigVersion {
    /// Version 2, of containerd 1.6 and 1.7.
    Two,
    /// Version 3, of containerd 2.x.
    Three,
}

/// One containerd.
#[derive(Clone, Debug)]
pub struct Config {
    /// The form.
    pub version: ConfigVersion,
    /// For the configuration and all that lasts.
    pub folder: PathBuf,
    /// For what runs; the OCI runtime's state is in its folder `runc`.
    pub state: PathBuf,
    /// Of all services; `SOCKET.ttrpc` is that of the events.
    pub socket: PathBuf,
    /// `None`: without CRI.
    pub cri: Option<Cri>,
}

/// containerd's CRI plugin. Its OOM scores are restricted to what the daemon may set, and NRI is off.
#[derive(Clone, Debug)]
pub struct Cri {
    /// The image of the pause container.
    pub sandbox_image: String,
    /// HOST:PORT of a registry that speaks plain HTTP: containerd takes one on a port other than 80 for one with TLS, unless told.
    pub registry: String,
    /// The pods' network; `None`: only pods on the host's can run.
    pub network: Option<Bridge>,
    /// The runtime handlers; the one called `runc` is the default.
    pub handlers: Vec<Handler>,
}

/// A CNI network of a bridge, with addresses given out on this host, without masquerading.
#[derive(Clone, Debug)]
pub struct Bridge {
    /// The link's name.
    pub link: &'static str,
    /// Of the addresses: "10.89.0.0/24".
    pub subnet: String,
}

/// A runtime handler.
#[derive(Clone, Debug)]
pub struct Handler {
    /// As a pod asks for it.
    pub name: &'static str,
    /// The shim's type: "io.containerd.runc.v2".
    pub kind: &'static str,
    /// The OCI runtime, of a shim that takes containerd's options for runc.
    pub runtime: Option<PathBuf>,
    /// The shim itself answers for the sandbox; 2.x alone knows it.
    pub sandbox_by_shim: bool,
}

impl Handler {
    /// Upstream's shim with this OCI runtime.
    pub fn runc(name: &'static str, runtime: PathBuf) -> Handler {
        Handler { name, kind: "io.containerd.runc.v2", runtime: Some(runtime), sandbox_by_shim: false }
    }
}

impl Config {
    /// Of a containerd whose files are all in `folder`: the state in `state`, the socket `c.sock`.
    pub fn within(folder: &Path, version: ConfigVersion, cri: Option<Cri>) -> Config {
        Config { version, folder: folder.to_owned(), state: folder.join("state"), socket: folder.join("c.sock"), cri }
    }

    /// Where the OCI runtimes of the handlers keep their containers.
    pub fn runtime_root(&self) -> PathBuf {
        self.state.join("runc")
    }

    /// Writes it, with the network's and the registry's files, below its folder; answers the path for `--config`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self) -> io::Result<PathBuf> {
        let (cni, hosts) = (self.folder.join("cni"), self.folder.join("hosts"));
        std::fs::create_dir_all(&cni)?;
        if let Some(cri) = &self.cri {
            let host = hosts.join(&cri.registry);
            std::fs::create_dir_all(&host)?;
            // 1.7 does not read a file that names no host.
            let text = format!("server = \"http://{0}\"\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", cri.registry);
            std::fs::write(host.join("hosts.toml"), text)?;
            if let Some(bridge) = &cri.network {
                std::fs::write(cni.join("10-bridge.conflist"), bridge.conflist(&self.folder.join("ipam")))?;
            }
        }
        let path = self.folder.join("config.toml");
        let cri = self.cri.as_ref().map(|config| self.cri_tables(config, &cni, &hosts));
        std::fs::write(&path, self.head() + &cri.unwrap_or_default())?;
        Ok(path)
    }

    fn head(&self) -> String {
        let version = match self.version {
            ConfigVersion::Two => 2,
            ConfigVersion::Three => 3,
        };
        let cri = ["io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri"];
        let disabled = if self.cri.is_none() { &cri[..] } else { &[] };
        let ttrpc = format!("{}.ttrpc", self.socket.display());
        let (root, opt) = (self.folder.join("root"), self.folder.join("opt"));
        format!(
            "version = {version}\nroot = {root:?}\nstate = {:?}\ndisabled_plugins = {disabled:?}\n[grpc]\naddress = {:?}\n\
             [ttrpc]\naddress = {ttrpc:?}\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {opt:?}\n",
            self.state, self.socket,
        )
    }

    fn cri_tables(&self, cri: &Cri, cni: &Path, hosts: &Path) -> String {
        let sandbox = &cri.sandbox_image;
        let (head, images, runtime, plugins) = match self.version {
            ConfigVersion::Two => {
                let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
                let head = format!("[{cri}]\nsandbox_image = {sandbox:?}\nrestrict_oom_score_adj = true\n");
                (head, cri, cri, format!("bin_dir = {CNI_PLUGINS:?}"))
            }
            ConfigVersion::Three => {
                let (images, runtime) = ("plugins.\"io.containerd.cri.v1.images\"", "plugins.\"io.containerd.cri.v1.runtime\"");
                let head = format!(
                    "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n[{images}.pinned_images]\nsandbox = {sandbox:?}\n\
                     [{runtime}]\nrestrict_oom_score_adj = true\n"
                );
                (head, images, runtime, format!("bin_dirs = [{CNI_PLUGINS:?}]"))
            }
        };
        let mut text = format!("{head}[{images}.registry]\nconfig_path = {hosts:?}\n[{runtime}.cni]\n{plugins}\nconf_dir = {cni:?}\n");
        for handler in &cri.handlers {
            let table = format!("{runtime}.containerd.runtimes.{}", handler.name);
            text += &format!("[{table}]\nruntime_type = {:?}\n", handler.kind);
            if handler.sandbox_by_shim {
                text += "sandboxer = \"shim\"\n";
            }
            if let Some(binary) = &handler.runtime {
                text += &format!("[{table}.options]\nBinaryName = {binary:?}\nRoot = {:?}\n", self.runtime_root());
            }
        }
        text
    }
}

impl Bridge {
    fn conflist(&self, addresses: &Path) -> String {
        let ipam = json!({
            "type": "host-local", "dataDir": addresses, "ranges": [[{ "subnet": self.subnet }]], "routes": [{ "dst": "0.0.0.0/0" }],
        });
        let bridge = json!({ "type": "bridge", "bridge": self.link, "isGateway": true, "ipMasq": false, "ipam": ipam });
        json!({ "cniVersion": CNI_VERSION, "name": "bridge", "plugins": [bridge] }).to_string()
    }
}
