//! The container's file system: opened by the runtime on the host's side, put together by the container's process.
//!
//! What is bound from the host is opened as detached mounts before there is a container process ([`Plan::open`]), so
//! the container's side needs no right to any path of the host. Everything is then attached to descriptors that were
//! resolved below the new root (`openat2(RESOLVE_IN_ROOT)`), never to paths: whatever another process does to the root
//! meanwhile, nothing is mounted or masked outside of it, and no path is resolved twice (CVE-2025-31133, CVE-2025-52565,
//! CVE-2025-52881, CVE-2023-27561).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux::cgroup::{Cgroup, Host};
use linux::mount::{self, AttributeChange, Context as FileSystem, attr};

use crate::error::{Context, Result, refuse};
use crate::mount_options::{self, Options};
use crate::spec::{self, Spec};

const O_PATH: i32 = 0o10_000_000;
const O_DIRECTORY: i32 = 0o200_000;
const O_NOFOLLOW: i32 = 0o400_000;
const O_CREAT: i32 = 0o100;
const O_EXCL: i32 = 0o200;
const O_WRONLY: i32 = 0o1;

/// One mount, ready to be made.
struct Planned {
    destination: PathBuf,
    kind: String,
    source: String,
    options: Options,
    /// For a bind mount.
    tree: Option<OwnedFd>,
}

/// A device node, with a detached mount of the host's where nodes cannot be made.
struct Node {
    device: spec::Device,
    tree: Option<OwnedFd>,
}

/// All that the container's process needs to put its file system together.
pub struct Plan {
    root: OwnedFd,
    mounts: Vec<Planned>,
    nodes: Vec<Node>,
    /// A `/dev` that comes from the host is left as it is.
    sets_up_dev: bool,
    has_kcore: bool,
    readonly: bool,
    masked: Vec<PathBuf>,
    readonly_paths: Vec<PathBuf>,
    propagation: Option<(u64, bool)>,
    cgroups: Host,
    cgroup: Cgroup,
    cgroup_namespace: bool,
}

/// What of the container matters to its file system.
pub struct Surroundings<'a> {
    /// The bundle's directory.
    pub bundle: &'a Path,
    /// This host's hierarchies.
    pub cgroups: &'a Host,
    /// The container's group.
    pub cgroup: &'a Cgroup,
    /// Whether the container has a cgroup namespace of its own.
    pub cgroup_namespace: bool,
    /// Whether it has a user namespace, so that it cannot make device nodes.
    pub user_namespace: bool,
}

/// The nodes of every container (`config-linux.md`, "Default Devices"): path, major, minor.
const DEFAULT_NODES: [(&str, i64, i64); 6] =
    [("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8), ("/dev/urandom", 1, 9), ("/dev/tty", 5, 0)];

impl Plan {
    /// Reads the configuration and opens what comes from the host.
    ///
    /// # Errors
    /// When an option is unknown, or a source is missing.
    pub fn open(spec: &Spec, around: &Surroundings<'_>) -> Result<Self> {
        let (Some(root), Some(linux)) = (&spec.root, &spec.linux) else { return refuse("root and linux must not be empty") };
        let propagation = match linux.rootfs_propagation.as_str() {
            "" => None,
            word => mount_options::propagation(word),
        };
        let shared = propagation.is_some_and(|(flag, _)| flag == mount::flags::MS_SHARED);
        let mounts = spec.mounts.iter().map(|m| Planned::open(m, around, shared)).collect::<Result<Vec<_>>>()?;
        let sets_up_dev = !mounts.iter().any(|m| m.options.bind && m.destination == Path::new("/dev"));
        let root_tree = mount::clone_tree(None, &around.bundle.join(&root.path), true).during(|| "open rootfs".to_owned())?;
        // The root itself must not be shared while it becomes the root; what is below keeps what the host gives it.
        follow_host(root_tree.as_fd(), shared)?;
        let change = AttributeChange { propagation: mount::flags::MS_PRIVATE, ..Default::default() };
        mount::set_attributes(root_tree.as_fd(), change, false)?;
        Ok(Self {
            root: root_tree,
            mounts,
            nodes: if sets_up_dev { nodes(linux, around.user_namespace)? } else { Vec::new() },
            sets_up_dev,
            has_kcore: Path::new("/proc/kcore").exists(),
            readonly: root.readonly,
            masked: linux.masked_paths.clone(),
            readonly_paths: linux.readonly_paths.clone(),
            propagation,
            cgroups: around.cgroups.clone(),
            cgroup: around.cgroup.clone(),
            cgroup_namespace: around.cgroup_namespace,
        })
    }

    /// Puts the file system together, in the container's namespaces and before its root is changed.
    ///
    /// # Errors
    /// Names the mount that failed.
    pub fn build(&self) -> Result<()> {
        // From here on nothing of this namespace travels to the host.
        mount::set_propagation(Path::new("/"), mount::flags::MS_SLAVE | mount::flags::MS_REC)?;
        mount::set_propagation(Path::new("/"), mount::flags::MS_PRIVATE)?;
        let host_root = linux::fs::open_path(Path::new("/"))?;
        mount::attach(self.root.as_fd(), host_root.as_fd()).during(|| "attach rootfs".to_owned())?;
        let mut made_readonly_late = Vec::new();
        for planned in &self.mounts {
            let late = self
                .mount(planned)
                .during(|| format!("error mounting {:?} to rootfs at {:?}", planned.source, planned.destination.display().to_string()))?;
            made_readonly_late.extend(late);
        }
        if self.sets_up_dev {
            self.set_up_dev()?;
        }
        for mounted in made_readonly_late {
            set_readonly(mounted.as_fd(), false)?;
        }
        Ok(())
    }

    /// The new root.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Makes paths read-only and hides others, then makes the root read-only.
    ///
    /// # Errors
    /// Names the path that failed.
    pub fn protect(&self) -> Result<()> {
        if self.mounts.iter().any(|m| m.kind == "proc" && m.destination == Path::new("/proc")) {
            let proc = linux::fs::open_in_root(self.root(), Path::new("/proc"), O_PATH | O_DIRECTORY)?;
            let covered = self.mounts.iter().any(|m| m.kind != "proc" && m.destination == Path::new("/proc"));
            if !covered && !linux::fs::is_on_procfs(proc.as_fd())? {
                return refuse("/proc of the container is not a procfs");
            }
        }
        for path in &self.readonly_paths {
            self.make_readonly(path).during(|| format!("readonly path {}", path.display()))?;
        }
        for path in &self.masked {
            self.mask(path).during(|| format!("can't mask path {:?}", path.display().to_string()))?;
        }
        if self.readonly {
            set_readonly(self.root(), false).during(|| "make rootfs read-only".to_owned())?;
        }
        Ok(())
    }

    /// The propagation that the root is to have when it is the root.
    pub fn root_propagation(&self) -> Option<u64> {
        self.propagation.map(|(flag, recursive)| flag | if recursive { mount::flags::MS_REC } else { 0 })
    }

    fn mount(&self, planned: &Planned) -> Result<Option<OwnedFd>> {
        match (&planned.tree, planned.kind.as_str()) {
            (Some(tree), _) => self.bind(planned, tree).map(|()| None),
            (None, "cgroup") => self.mount_cgroup(planned).map(|()| None),
            (None, _) => self.mount_new(planned),
        }
    }

    fn bind(&self, planned: &Planned, tree: &OwnedFd) -> Result<()> {
        let target = if linux::fs::stat_fd(tree.as_fd())?.is_directory() {
            linux::fs::make_directories_in_root(self.root(), &planned.destination)?
        } else {
            linux::fs::make_file_in_root(self.root(), &planned.destination)?
        };
        mount::attach(tree.as_fd(), target.as_fd())?;
        planned.set_propagation(tree.as_fd())
    }

    fn mount_new(&self, planned: &Planned) -> Result<Option<OwnedFd>> {
        let kernels_own = matches!(planned.kind.as_str(), "proc" | "sysfs");
        let existed = linux::fs::open_in_root(self.root(), &planned.destination, O_PATH | O_DIRECTORY).ok();
        linux::fs::make_directories_in_root(self.root(), &planned.destination)?;
        // A procfs or sysfs behind a link would not be where the masks are put.
        let nofollow = if kernels_own { O_NOFOLLOW } else { 0 };
        let target = linux::fs::open_in_root(self.root(), &planned.destination, O_PATH | O_DIRECTORY | nofollow)?;
        let options = &planned.options;
        let fs = FileSystem::open(&planned.kind)?;
        if !planned.source.is_empty() {
            fs.set("source", &planned.source)?;
        }
        for flag in &options.flags {
            fs.set_flag(flag)?;
        }
        for option in &options.data {
            match option.split_once('=') {
                Some((key, value)) => fs.set(key, value)?,
                None => fs.set_flag(option)?,
            }
        }
        let has_mode = options.data.iter().any(|option| option.starts_with("mode="));
        if let (true, false, Some(dir)) = (planned.kind == "tmpfs", has_mode, existed) {
            // It looks as the directory did that it covers.
            fs.set("mode", &format!("{:o}", linux::fs::stat_fd(dir.as_fd())?.mode & 0o7777))?;
        }
        let attributes = options.set | options.set_recursive;
        // Files are still to be made in it, and mount points.
        let late = planned.kind == "tmpfs" && attributes & attr::RDONLY != 0;
        let mounted = fs.mount(if late { attributes & !attr::RDONLY } else { attributes })?;
        mount::attach(mounted.as_fd(), target.as_fd())?;
        planned.set_propagation(mounted.as_fd())?;
        Ok(late.then_some(mounted))
    }

    fn mount_cgroup(&self, planned: &Planned) -> Result<()> {
        let readonly = planned.options.set & attr::RDONLY;
        let attributes = attr::NOSUID | attr::NODEV | attr::NOEXEC;
        let target = linux::fs::make_directories_in_root(self.root(), &planned.destination)?;
        if self.cgroups.v1.is_empty() {
            let mounted = self.unified(attributes | readonly)?;
            mount::attach(mounted.as_fd(), target.as_fd())?;
            return planned.set_propagation(mounted.as_fd());
        }
        let fs = FileSystem::open("tmpfs")?;
        fs.set("mode", "755")?;
        let parent = fs.mount(attributes)?;
        mount::attach(parent.as_fd(), target.as_fd())?;
        // Of a hybrid host's hierarchies those of v1, as runc shows them.
        for (controllers, dir) in self.cgroup.directories().into_iter().filter(|(controllers, _)| !controllers.is_empty()) {
            self.mount_hierarchy(parent.as_fd(), &controllers, &dir, attributes | readonly)
                .during(|| format!("cgroup hierarchy {}", controllers.join(",")))?;
        }
        if readonly != 0 {
            set_readonly(parent.as_fd(), false)?;
        }
        planned.set_propagation(parent.as_fd())
    }

    /// The v2 hierarchy, from the root of the cgroup namespace that one is in on: what `/proc/self/cgroup` says is a path in it. A user
    /// namespace that may not mount it gets it bound, as with runc (v1.5.2, libcontainer/rootfs_linux.go).
    fn unified(&self, attributes: u64) -> Result<OwnedFd> {
        match FileSystem::open("cgroup2").and_then(|fs| fs.mount(attributes)) {
            Err(e) if e.is(EPERM) || e.is(EBUSY) => {
                let own = self.cgroup.v2_directory().filter(|_| self.cgroup_namespace);
                self.bound(&own.or_else(|| self.cgroups.v2.clone()).unwrap_or_default(), attributes)
            }
            other => Ok(other?),
        }
    }

    fn mount_hierarchy(&self, parent: BorrowedFd<'_>, controllers: &[String], dir: &Path, attributes: u64) -> Result<()> {
        let name = controllers.join(",").replace("name=", "");
        linux::fs::make_directory_at(parent, Path::new(&name), 0o755)?;
        let target = linux::fs::open_beneath(parent, Path::new(&name), O_PATH | O_DIRECTORY, 0)?;
        let mounted = if self.cgroup_namespace {
            let fs = FileSystem::open("cgroup")?;
            for controller in controllers {
                match controller.strip_prefix("name=") {
                    Some(name) => {
                        fs.set_flag("none")?;
                        fs.set("name", name)?;
                    }
                    None => fs.set_flag(controller)?,
                }
            }
            fs.mount(attributes)?
        } else {
            self.bound(dir, attributes)?
        };
        mount::attach(mounted.as_fd(), target.as_fd())?;
        if controllers.len() > 1 {
            for controller in controllers {
                linux::fs::make_link_at(Path::new(&name), parent, Path::new(controller))?;
            }
        }
        Ok(())
    }

    /// A group, bound from the host.
    fn bound(&self, dir: &Path, attributes: u64) -> Result<OwnedFd> {
        let tree = mount::clone_tree(None, dir, false)?;
        mount::set_attributes(tree.as_fd(), AttributeChange { set: attributes, ..Default::default() }, false)?;
        Ok(tree)
    }

    fn set_up_dev(&self) -> Result<()> {
        for node in &self.nodes {
            self.make_node(node).during(|| format!("error creating device node {}", node.device.path.display()))?;
        }
        let dev = linux::fs::make_directories_in_root(self.root(), Path::new("/dev"))?;
        let mut links =
            vec![("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"), ("/proc/self/fd/1", "stdout"), ("/proc/self/fd/2", "stderr")];
        if self.has_kcore {
            links.push(("/proc/kcore", "core"));
        }
        for (to, name) in links {
            linux::fs::make_link_at(Path::new(to), dev.as_fd(), Path::new(name))?;
        }
        linux::fs::remove_at(dev.as_fd(), Path::new("ptmx"))?;
        linux::fs::make_link_at(Path::new("pts/ptmx"), dev.as_fd(), Path::new("ptmx"))?;
        Ok(())
    }

    fn make_node(&self, node: &Node) -> Result<()> {
        let device = &node.device;
        if let Some(tree) = &node.tree {
            let target = linux::fs::make_file_in_root(self.root(), &device.path)?;
            return Ok(mount::attach(tree.as_fd(), target.as_fd())?);
        }
        let (dir, name) = linux::fs::parent_in_root(self.root(), &device.path)?;
        let kind = match device.kind.as_str() {
            "b" => linux::fs::NodeKind::Block,
            "p" => linux::fs::NodeKind::Fifo,
            _ => linux::fs::NodeKind::Char,
        };
        let mode = device.file_mode.unwrap_or(0o666) & 0o7777;
        let owner = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
        // Checked when the nodes were planned.
        let number = (u32::try_from(device.major).unwrap_or(0), u32::try_from(device.minor).unwrap_or(0));
        match linux::fs::make_node_at(dir.as_fd(), &name, kind, mode, number, owner) {
            Err(e) if e.is(EEXIST) => Ok(()),
            other => Ok(other?),
        }
    }

    fn make_readonly(&self, path: &Path) -> Result<()> {
        let Some(target) = self.existing(path)? else { return Ok(()) };
        let tree = mount::clone_tree_fd(target.as_fd(), true)?;
        set_readonly(tree.as_fd(), true)?;
        Ok(mount::attach(tree.as_fd(), target.as_fd())?)
    }

    fn mask(&self, path: &Path) -> Result<()> {
        let Some(target) = self.existing(path)? else { return Ok(()) };
        if linux::fs::stat_fd(target.as_fd())?.is_directory() {
            let fs = FileSystem::open("tmpfs")?;
            fs.set("mode", "755")?;
            fs.set("nr_blocks", "1")?;
            fs.set("nr_inodes", "1")?;
            let empty = fs.mount(attr::RDONLY)?;
            return Ok(mount::attach(empty.as_fd(), target.as_fd())?);
        }
        // The host's own: the root is not changed yet.
        let tree = mount::clone_tree(None, Path::new("/dev/null"), false)?;
        check_null(tree.as_fd())?;
        Ok(mount::attach(tree.as_fd(), target.as_fd())?)
    }

    fn existing(&self, path: &Path) -> Result<Option<OwnedFd>> {
        match linux::fs::open_in_root(self.root(), path, O_PATH) {
            Ok(fd) => Ok(Some(fd)),
            Err(e) if e.is(ENOENT) || e.is(ENOTDIR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Binds the terminal to `/dev/console`.
    ///
    /// # Errors
    /// When there is something at `/dev/console` that is no file.
    pub fn mount_console(&self, slave: BorrowedFd<'_>) -> Result<()> {
        let dev = linux::fs::make_directories_in_root(self.root(), Path::new("/dev"))?;
        // What is there already is not opened: a FIFO would block, a device might act on it.
        match linux::fs::open_beneath(dev.as_fd(), Path::new("console"), O_CREAT | O_EXCL | O_WRONLY, 0o620) {
            Err(e) if !e.is(EEXIST) => return Err(e.into()),
            _ => {}
        }
        let target = linux::fs::open_beneath(dev.as_fd(), Path::new("console"), O_PATH, 0)?;
        let tree = mount::clone_tree_fd(slave, false)?;
        Ok(mount::attach(tree.as_fd(), target.as_fd())?)
    }
}

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENOTDIR: i32 = 20;

impl Planned {
    fn open(from: &spec::Mount, around: &Surroundings<'_>, shared: bool) -> Result<Self> {
        let act = || format!("error mounting {:?} to rootfs at {:?}", from.source, from.destination.display().to_string());
        let options = Options::parse(&from.kind, &from.options)?;
        if options.copy_up {
            return refuse("the option tmpcopyup is not implemented").during(act);
        }
        if options.idmap.is_some() {
            return refuse("the options idmap and ridmap are not implemented").during(act);
        }
        if !options.bind && from.kind.is_empty() {
            return refuse("a mount that is no bind mount needs a type").during(act);
        }
        let tree = if options.bind { Some(open_source(from, &options, around, shared).during(act)?) } else { None };
        Ok(Self { destination: from.destination.clone(), kind: from.kind.clone(), source: from.source.clone(), options, tree })
    }

    fn set_propagation(&self, mounted: BorrowedFd<'_>) -> Result<()> {
        for (propagation, recursive) in &self.options.propagation {
            let change = AttributeChange { propagation: *propagation, ..Default::default() };
            mount::set_attributes(mounted, change, *recursive)?;
        }
        Ok(())
    }
}

fn open_source(from: &spec::Mount, options: &Options, around: &Surroundings<'_>, shared: bool) -> Result<OwnedFd> {
    // An absolute path replaces the bundle's.
    let source = around.bundle.join(&from.source);
    let tree =
        mount::clone_tree(None, &source, options.recursive_bind).map_err(|e| e.source).during(|| format!("stat {}", source.display()))?;
    follow_host(tree.as_fd(), shared)?;
    let change = AttributeChange { set: options.set, clear: options.clear, propagation: 0 };
    if !change.is_empty() {
        mount::set_attributes(tree.as_fd(), change, false)?;
    }
    let change = AttributeChange { set: options.set_recursive, clear: options.clear_recursive, propagation: 0 };
    if !change.is_empty() {
        mount::set_attributes(tree.as_fd(), change, true)?;
    }
    Ok(tree)
}

/// A copy of a shared mount is its peer; unless the container is to share with the host, it only follows it.
fn follow_host(tree: BorrowedFd<'_>, shared: bool) -> Result<()> {
    if shared {
        return Ok(());
    }
    let change = AttributeChange { propagation: mount::flags::MS_SLAVE, ..Default::default() };
    Ok(mount::set_attributes(tree, change, true)?)
}

fn set_readonly(mounted: BorrowedFd<'_>, recursive: bool) -> Result<()> {
    Ok(mount::set_attributes(mounted, AttributeChange { set: attr::RDONLY, ..Default::default() }, recursive)?)
}

fn check_null(fd: BorrowedFd<'_>) -> Result<()> {
    if linux::fs::stat_fd(fd)?.is_char_device(1, 3) {
        return Ok(());
    }
    refuse("/dev/null is not the null device")
}

fn nodes(linux: &spec::Linux, user_namespace: bool) -> Result<Vec<Node>> {
    let default = |(path, major, minor): &(&str, i64, i64)| spec::Device {
        path: PathBuf::from(path),
        kind: "c".to_owned(),
        major: *major,
        minor: *minor,
        ..spec::Device::default()
    };
    let defaults = DEFAULT_NODES.iter().map(default).filter(|d| !linux.devices.iter().any(|own| own.path == d.path));
    let mut nodes = Vec::new();
    for device in linux.devices.iter().cloned().chain(defaults) {
        let path = device.path.display();
        if !matches!(device.kind.as_str(), "c" | "u" | "b" | "p") {
            return refuse(format!("linux.devices: {path} has unknown type {:?}", device.kind));
        }
        if device.kind != "p" && (u32::try_from(device.major).is_err() || u32::try_from(device.minor).is_err()) {
            return refuse(format!("linux.devices: {path} has no valid major and minor numbers"));
        }
        let tree = if user_namespace { Some(mount::clone_tree(None, &device.path, false)?) } else { None };
        nodes.push(Node { device, tree });
    }
    Ok(nodes)
}
