//! What the commands need of the machine: Debian packages by apt, Go tools where Go is. What cannot be had is named.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;

/// How much is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A linker, for everything.
    Demo,
    /// All that tests use.
    Tests,
}

/// A package, and a file or program that shows that it is there.
struct Package {
    name: &'static str,
    shown_by: &'static str,
    need: Need,
}

const PACKAGES: &[Package] = &[
    Package { name: "gcc", shown_by: "cc", need: Need::Demo },
    Package { name: "libc6-dev", shown_by: "/usr/lib/x86_64-linux-gnu/libc.a", need: Need::Demo },
    Package { name: "busybox-static", shown_by: "/bin/busybox", need: Need::Tests },
    Package { name: "e2fsprogs", shown_by: "/sbin/mkfs.ext4", need: Need::Tests },
    Package { name: "strace", shown_by: "/usr/bin/strace", need: Need::Tests },
    Package { name: "curl", shown_by: "curl", need: Need::Tests },
    Package { name: "iproute2", shown_by: "ip", need: Need::Tests },
    Package { name: "nftables", shown_by: "nft", need: Need::Tests },
    Package { name: "libseccomp2", shown_by: "/usr/lib/x86_64-linux-gnu/libseccomp.so.2", need: Need::Tests },
    Package { name: "libseccomp-dev", shown_by: "/usr/include/seccomp.h", need: Need::Tests },
    Package { name: "containernetworking-plugins", shown_by: "/usr/lib/cni/bridge", need: Need::Tests },
    Package { name: "crun", shown_by: "/usr/bin/crun", need: Need::Tests },
    Package { name: "pkg-config", shown_by: "pkg-config", need: Need::Tests },
    Package { name: "qemu-system-x86", shown_by: "qemu-system-x86_64", need: Need::Tests },
];

/// What this machine has.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// The running kernel's release.
    pub kernel: String,
    /// The folder of upstream's programs; `None` without Go and apt.
    pub peers: Option<PathBuf>,
    /// The golden files of k8s.io/api; `None` without Go.
    pub golden: Option<PathBuf>,
    /// Whether packages can be installed.
    pub apt: bool,
    /// Whether Go is there.
    pub go: bool,
    /// What could not be had, and why.
    pub missing: Vec<String>,
}

/// The folder for what is kept between runs, outside the clone: `CORACLE_CACHE`, else below `XDG_CACHE_HOME` or `~/.cache`.
pub fn cache() -> PathBuf {
    if let Some(cache) = std::env::var_os("CORACLE_CACHE") {
        return PathBuf::from(cache);
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from).join(".cache");
    base.unwrap_or_else(home).join("coracle")
}

/// Installs what is missing, as far as it can be had.
pub fn prepare(need: Need) -> Result<Host> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("failed to read the kernel's release")?;
    let mut host = Host { kernel, apt: sh::on_path("apt-get"), go: sh::on_path("go"), ..Host::default() };
    packages(need, &mut host);
    if need == Need::Tests {
        if host.apt {
            let directory = cache().join("peers");
            debian(&mut host, &directory);
            keep(&mut host, &directory, "vmlinuz", GUEST_KERNEL, debian_kernel);
            host.peers = Some(directory);
        }
        if host.go {
            host.peers = Some(peers(&mut host)?);
            match golden() {
                Ok(folder) => host.golden = Some(folder),
                Err(error) => host.missing.push(format!("golden files of k8s.io/api: {error:#}")),
            }
        } else {
            host.missing.push("Go peers: there is no Go on this machine".to_owned());
        }
    }
    Ok(host)
}

fn there(package: &Package) -> bool {
    if package.shown_by.starts_with('/') { Path::new(package.shown_by).exists() } else { sh::on_path(package.shown_by) }
}

fn packages(need: Need, host: &mut Host) {
    let wanted = |package: &&Package| (package.need == Need::Demo || need == Need::Tests) && !there(package);
    let names: Vec<&str> = PACKAGES.iter().filter(wanted).map(|package| package.name).collect();
    if names.is_empty() {
        return;
    }
    if host.apt {
        let update = sh::run("apt-get update", Command::new("apt-get").args(["update", "-qq"]));
        let mut install = Command::new("apt-get");
        install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&names).env("DEBIAN_FRONTEND", "noninteractive");
        if let Err(error) = update.and_then(|()| sh::run("apt-get install", &mut install)) {
            host.missing.push(format!("Debian packages: {error:#}"));
        }
    }
    for package in PACKAGES.iter().filter(wanted) {
        host.missing.push(format!("Debian package {} ({})", package.name, package.shown_by));
    }
}

/// A Go module that needs no `replace`: installed by name.
struct Installed {
    program: &'static str,
    module: &'static str,
    version: &'static str,
    tags: &'static str,
}

const CONTAINERD_TAGS: &str = "no_btrfs no_devmapper";
const INSTALLED: &[Installed] = &[
    Installed { program: "runc", module: "github.com/opencontainers/runc", version: "v1.5.2", tags: "seccomp" },
    Installed {
        program: "containerd",
        module: "github.com/containerd/containerd/v2/cmd/containerd",
        version: "v2.4.2",
        tags: CONTAINERD_TAGS,
    },
    Installed {
        program: "containerd-shim-runc-v2",
        module: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        version: "v2.4.2",
        tags: CONTAINERD_TAGS,
    },
    Installed { program: "ctr", module: "github.com/containerd/containerd/v2/cmd/ctr", version: "v2.4.2", tags: CONTAINERD_TAGS },
];

const CONTAINERD_1_7: &str = "v1.7.29";
const KUBERNETES: &str = "v1.37.2";
const STAGING: &str = "v0.37.2";
const ETCD: &str = "v3.7.3";
const CNI_PLUGINS: &str = "v1.9.1";
pub const CRI_TOOLS: &str = "v1.34.0";
const CRI_TOOLS_STAGING: &str = "v0.34.2";

/// A Debian package that is unpacked and not installed: its services and its programs on PATH are not wanted here.
struct Unpacked {
    package: &'static str,
    /// A file of it.
    shown_by: &'static str,
}

const UNPACKED: &[Unpacked] = &[
    Unpacked { package: "containerd", shown_by: "usr/bin/containerd" },
    Unpacked { package: "runc", shown_by: "usr/sbin/runc" },
    Unpacked { package: "libfaketime", shown_by: "usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1" },
];

/// Unpacks Debian's packages to `debian/PACKAGE` in the folder of peers.
fn debian(host: &mut Host, directory: &Path) {
    for peer in UNPACKED {
        let to = directory.join("debian").join(peer.package);
        if to.join(peer.shown_by).exists() {
            continue;
        }
        if let Err(error) = unpack(peer.package, &to) {
            host.missing.push(format!("Debian package {}: {error:#}", peer.package));
        }
    }
}

/// The package that depends on the newest kernel of the series: one for virtual machines, with the drivers that the guest needs built in.
const GUEST_KERNEL: &str = "linux-image-6.12-cloud-amd64";

/// The guest's kernel (guest.rs), out of its package: to install it would write to /boot.
fn debian_kernel(to: &Path) -> Result<()> {
    let depends = || {
        let text = sh::output(Command::new("apt-cache").args(["depends", GUEST_KERNEL]))?;
        let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-").map(|end| format!("linux-image-{end}")));
        name.with_context(|| format!("apt knows no {GUEST_KERNEL}"))
    };
    let package = depends().or_else(|_| {
        sh::run("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
        depends()
    })?;
    let tree = cache().join("debs/kernel");
    unpack(&package, &tree)?;
    let boot = fs::read_dir(tree.join("boot")).context("the package has no /boot")?.flatten().map(|entry| entry.path());
    let is_kernel = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"));
    let kernel = boot.into_iter().find(is_kernel).context("the package has no kernel")?;
    fs::copy(&kernel, to).with_context(|| format!("failed to write {}", to.display()))?;
    fs::remove_dir_all(&tree).with_context(|| format!("failed to remove {}", tree.display()))
}

fn unpack(package: &str, to: &Path) -> Result<()> {
    let scratch = cache().join("debs").join(package);
    // What an earlier run left half done.
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).with_context(|| format!("failed to create {}", scratch.display()))?;
    let download = || {
        let mut command = Command::new("apt-get");
        command.args(["download", "-qq", package]).current_dir(&scratch);
        sh::run(&format!("download Debian's {package}"), &mut command)
    };
    // The lists of packages may be missing or old.
    download().or_else(|_| {
        sh::run("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
        download()
    })?;
    let is_package = |path: &PathBuf| path.extension().is_some_and(|end| end == "deb");
    let deb = fs::read_dir(&scratch)?.flatten().map(|entry| entry.path()).find(is_package).context("apt-get downloaded nothing")?;
    sh::run(&format!("unpack {package}"), Command::new("dpkg-deb").arg("-x").arg(&deb).arg(scratch.join("tree")))?;
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
    }
    let _ = fs::remove_dir_all(to);
    fs::rename(scratch.join("tree"), to).with_context(|| format!("failed to write {}", to.display()))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("failed to remove {}", scratch.display()))
}

/// Builds what is not in the cache yet. A program that does not build is named and left out.
fn peers(host: &mut Host) -> Result<PathBuf> {
    let directory = cache().join("peers");
    fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
    for peer in INSTALLED {
        let build = |to: &Path| {
            let mut command = go(&["install", "-ldflags", "-s -w", "-tags", peer.tags, &format!("{}@{}", peer.module, peer.version)]);
            command.env("GOBIN", to.parent().unwrap_or(to));
            sh::run(&format!("build {} {}", peer.program, peer.version), &mut command)
        };
        keep(host, &directory, peer.program, peer.version, build);
    }
    for program in ["containerd", "containerd-shim-runc-v2", "ctr"] {
        keep(host, &directory, &format!("containerd-1.7/{program}"), CONTAINERD_1_7, |to| containerd_1_7(program, to));
    }
    keep(host, &directory, "cni", CNI_PLUGINS, cni_plugins);
    keep(host, &directory, "etcd", ETCD, etcd);
    if host.apt {
        keep(host, &directory, "etcd-debian", "etcd-server", debian_etcd);
    }
    for program in ["kubectl", "kube-apiserver"] {
        keep(host, &directory, program, KUBERNETES, |to| kubernetes(program, to));
    }
    for program in ["crictl", "critest"] {
        keep(host, &directory, program, CRI_TOOLS, |to| cri_tools(program, to));
    }
    if host.apt {
        keep(host, &directory, "busybox", "debian", debian_busybox);
    }
    Ok(directory)
}

/// Builds `program` unless the cache has this version of it.
fn keep(host: &mut Host, directory: &Path, program: &str, version: &str, build: impl FnOnce(&Path) -> Result<()>) {
    let (path, stamp) = (directory.join(program), directory.join(format!("{program}.version")));
    if path.exists() && fs::read_to_string(&stamp).is_ok_and(|kept| kept == version) {
        return;
    }
    let result = build(&path).and_then(|()| fs::write(&stamp, version).context("failed to write the version"));
    if let Err(error) = result {
        host.missing.push(format!("{program} {version}: {error:#}"));
    }
}

fn go(arguments: &[&str]) -> Command {
    let mut command = Command::new("go");
    command.args(arguments).env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=mod").stdin(std::process::Stdio::null());
    // The modules' chatter says nothing that a failure does not.
    command.stderr(std::process::Stdio::inherit());
    command
}

/// A scratch module in which a program of other modules is built.
fn scratch(name: &str, go_mod: &str) -> Result<PathBuf> {
    let directory = cache().join("go").join(name);
    fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
    fs::write(directory.join("go.mod"), format!("module peers\ngo 1.26\n{go_mod}")).context("failed to write go.mod")?;
    Ok(directory)
}

fn go_build(step: &str, directory: &Path, arguments: &[&str], to: &Path, package: &str) -> Result<()> {
    let mut command = go(arguments);
    command.arg("-o").arg(to).arg(package).current_dir(directory).env("GONOSUMDB", "sigs.k8s.io/cri-tools");
    sh::run(step, &mut command)
}

/// A program of containerd 1.7, whose `exclude` keeps it from being installed by name.
fn containerd_1_7(program: &str, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    let directory = scratch("containerd-1.7", &format!("require github.com/containerd/containerd {CONTAINERD_1_7}\n"))?;
    let package = format!("github.com/containerd/containerd/cmd/{program}");
    let arguments = ["build", "-ldflags", "-s -w", "-tags", CONTAINERD_TAGS];
    go_build(&format!("build {program} {CONTAINERD_1_7}"), &directory, &arguments, to, &package)
}

/// containernetworking's plugins, in a folder of their own: their names are too common.
fn cni_plugins(to: &Path) -> Result<()> {
    let plugins = ["main/bridge", "main/loopback", "ipam/host-local", "meta/portmap", "meta/firewall", "meta/bandwidth", "meta/tuning"];
    let packages = plugins.map(|plugin| format!("github.com/containernetworking/plugins/plugins/{plugin}@{CNI_PLUGINS}"));
    let mut command = go(&["install", "-ldflags", "-s -w"]);
    command.args(packages).env("GOBIN", to).env("CGO_ENABLED", "0");
    sh::run(&format!("build CNI plugins {CNI_PLUGINS}"), &mut command)
}

fn etcd(to: &Path) -> Result<()> {
    let directory = scratch("etcd", &format!("require go.etcd.io/etcd/server/v3 {ETCD}\n"))?;
    go_build(&format!("build etcd {ETCD}"), &directory, &["build", "-ldflags", "-s -w"], to, "go.etcd.io/etcd/server/v3")
}

/// Debian's etcd, an old one: taken out of its package, for to install it would start it.
fn debian_etcd(to: &Path) -> Result<()> {
    let directory = cache().join("debian");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
    sh::run("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
    // Without the sandbox user, who could not write here.
    let mut download = Command::new("apt-get");
    download.args(["-o", "APT::Sandbox::User=root", "-qq", "download", "etcd-server"]).current_dir(&directory);
    sh::run("apt-get download etcd-server", &mut download)?;
    let packages = fs::read_dir(&directory).context("failed to list the download")?;
    let package = packages.filter_map(|entry| Some(entry.ok()?.path())).next().context("apt-get left no package")?;
    sh::run("dpkg -x", Command::new("dpkg").arg("-x").arg(&package).arg(directory.join("root")))?;
    fs::copy(directory.join("root/usr/bin/etcd"), to).context("failed to copy etcd")?;
    Ok(())
}

fn kubernetes(program: &str, to: &Path) -> Result<()> {
    let module = format!("k8s.io/kubernetes@{KUBERNETES}");
    let mut download = go(&["mod", "download", "-json", &module]);
    download.env_remove("GOFLAGS").env("GOTOOLCHAIN", "local").current_dir(std::env::temp_dir());
    let facts: serde_json::Value = serde_json::from_str(&sh::output(&mut download)?).context("go mod download printed no JSON")?;
    let go_mod = facts["GoMod"].as_str().context("go mod download named no go.mod")?;
    let text = fs::read_to_string(go_mod).with_context(|| format!("failed to read {go_mod}"))?;
    let replaced = text.lines().filter_map(|line| line.trim().split_once(" => ./staging/")).map(|(module, _)| module.trim());
    let replaces: String = replaced.map(|module| format!("replace {module} => {module} {STAGING}\n")).collect();
    let directory = scratch("kubernetes", &format!("require k8s.io/kubernetes {KUBERNETES}\n{replaces}"))?;
    let base = "k8s.io/component-base/version";
    let flags = format!("-s -w -X {base}.gitVersion={KUBERNETES} -X {base}.gitMajor=1 -X {base}.gitMinor=37");
    let package = format!("k8s.io/kubernetes/cmd/{program}");
    go_build(&format!("build {program} {KUBERNETES}"), &directory, &["build", "-ldflags", &flags], to, &package)
}

/// The busybox that Debian links dynamically: its shell runs commands by their paths, where busybox-static's runs them in itself. The two packages
/// exclude each other, so it is unpacked and not installed.
fn debian_busybox(to: &Path) -> Result<()> {
    let directory = cache().join("debian");
    // Of an earlier attempt there may be an older package.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
    let download = || {
        let mut command = Command::new("apt-get");
        // As root: its own user may not be able to write to the cache.
        command.args(["download", "-qq", "-o", "APT::Sandbox::User=root", "busybox"]).current_dir(&directory);
        sh::run("download busybox", &mut command)
    };
    if download().is_err() {
        sh::run("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
        download()?;
    }
    let mut names = fs::read_dir(&directory).context("failed to list the downloads")?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = names.find(|path| path.extension().is_some_and(|extension| extension == "deb")).context("no package was downloaded")?;
    sh::run("unpack busybox", Command::new("dpkg-deb").arg("-x").arg(&package).arg(&directory))?;
    fs::copy(directory.join("bin/busybox"), to).map(drop).with_context(|| format!("failed to write {}", to.display()))
}

/// Where the module proxy's copy of k8s.io/api has its golden files.
fn golden() -> Result<PathBuf> {
    let mut download = go(&["mod", "download", "-json", &format!("k8s.io/api@{STAGING}")]);
    download.env_remove("GOFLAGS").current_dir(std::env::temp_dir());
    let facts: serde_json::Value = serde_json::from_str(&sh::output(&mut download)?).context("go mod download printed no JSON")?;
    Ok(Path::new(facts["Dir"].as_str().context("go mod download named no folder")?).join("testdata/HEAD"))
}

fn cri_tools(program: &str, to: &Path) -> Result<()> {
    let modules = ["api", "apimachinery", "client-go", "cri-api", "cri-client", "kubectl", "kubelet", "component-base", "cli-runtime"];
    let requires: String = modules.iter().map(|module| format!("require k8s.io/{module} {CRI_TOOLS_STAGING}\n")).collect();
    let directory = scratch("cri-tools", &format!("require sigs.k8s.io/cri-tools {CRI_TOOLS}\n{requires}"))?;
    let arguments: &[&str] = if program == "critest" { &["test", "-c", "-ldflags", "-s -w"] } else { &["build", "-ldflags", "-s -w"] };
    let package = format!("sigs.k8s.io/cri-tools/cmd/{program}");
    go_build(&format!("build {program} {CRI_TOOLS}"), &directory, arguments, to, &package)
}
