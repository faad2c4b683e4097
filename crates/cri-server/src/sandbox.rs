//! RunPodSandbox, StopPodSandbox, RemovePodSandbox, and the watch over a sandbox' shim.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use network::{Dns, PodNetwork, PortMapping, Protocol};
use prost::Message;
use protocols::cri::v1::{
    ContainerEventType, DnsConfig, NamespaceMode, PodSandboxConfig, PortMapping as CriPortMapping, Protocol as CriProtocol,
    RunPodSandboxRequest,
};

use crate::container::{creation_key, write_json};
use crate::error::{Error, Result};
use crate::handler::Sandboxer;
use crate::host;
use crate::record::{Encoded, SandboxPhase, SandboxRecord, VERSION};
use crate::server::{Server, Span, pod_uid};
use crate::shim::{PodRequest, Shim, StartedShim};
use crate::spec::pause::{self, PauseFacts};
use crate::spec::{check_namespaces, sandbox_namespaces};
use crate::state::{Link, Sandbox};

/// How long a shim may take to end after it said that it would.
const SHIM_EXIT: Duration = Duration::from_secs(10);

/// Refuses a config that cannot be carried out, before anything is made.
fn check(request: &RunPodSandboxRequest) -> Result<PodSandboxConfig> {
    let config = request.config.clone().ok_or_else(|| Error::Invalid("config is missing".to_owned()))?;
    let metadata = config.metadata.as_ref().ok_or_else(|| Error::Invalid("config.metadata is missing".to_owned()))?;
    if metadata.name.is_empty() || metadata.uid.is_empty() {
        return Err(Error::Invalid("config.metadata needs a name and a uid".to_owned()));
    }
    let linux = config.linux.clone().unwrap_or_default();
    if linux.cgroup_parent.ends_with(".slice") {
        return Err(Error::Unimplemented("the systemd cgroup driver (cgroup_parent ends with .slice)"));
    }
    if linux.cgroup_parent.split('/').any(|part| part == "..") {
        return Err(Error::Invalid(format!("cgroup_parent {:?} leaves its hierarchy", linux.cgroup_parent)));
    }
    let security = linux.security_context.unwrap_or_default();
    check_namespaces(&security.namespace_options.unwrap_or_default())?;
    if security.selinux_options.is_some_and(|selinux| selinux.encoded_len() > 0) {
        return Err(crate::spec::SpecError::Unsupported("SELinux").into());
    }
    if security.apparmor.is_some_and(|profile| profile.profile_type() != protocols::cri::v1::security_profile::ProfileType::Unconfined) {
        return Err(crate::spec::SpecError::Unsupported("AppArmor").into());
    }
    port_mappings(&config)?;
    Ok(config)
}

fn port_mappings(config: &PodSandboxConfig) -> Result<Vec<PortMapping>> {
    config.port_mappings.iter().map(port_mapping).collect()
}

fn port_mapping(mapping: &CriPortMapping) -> Result<PortMapping> {
    let port =
        |value: i32, field: &str| u16::try_from(value).map_err(|_| Error::Invalid(format!("port_mappings: {field} {value} is not a port")));
    let protocol = match CriProtocol::try_from(mapping.protocol) {
        Ok(CriProtocol::Tcp) => Protocol::Tcp,
        Ok(CriProtocol::Udp) => Protocol::Udp,
        Ok(CriProtocol::Sctp) => Protocol::Sctp,
        Err(_) => return Err(Error::Invalid(format!("port_mappings: protocol {} is not known", mapping.protocol))),
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse::<IpAddr>().map_err(|_| Error::Invalid(format!("port_mappings: host_ip {text:?} is not an address")))?),
    };
    Ok(PortMapping {
        protocol,
        container_port: port(mapping.container_port, "container_port")?,
        host_port: port(mapping.host_port, "host_port")?,
        host_ip,
    })
}

/// The resolv.conf of a DNS config.
fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn pod_network(sandbox: &Sandbox, netns: &Utf8Path) -> Result<PodNetwork> {
    let metadata = sandbox.config.metadata.clone().unwrap_or_default();
    let linux = sandbox.config.linux.clone().unwrap_or_default();
    Ok(PodNetwork {
        sandbox_id: sandbox.id.clone(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        netns_path: netns.to_owned(),
        port_mappings: port_mappings(&sandbox.config)?,
        cgroup_path: Some(linux.cgroup_parent).filter(|path| !path.is_empty()),
        dns: sandbox.config.dns_config.clone().map(|dns| Dns { servers: dns.servers, searches: dns.searches, options: dns.options }),
        annotations: sandbox.config.annotations.clone().into_iter().collect(),
        ..PodNetwork::default()
    })
}

fn is_host_network(config: &PodSandboxConfig) -> bool {
    sandbox_namespaces(config).network == NamespaceMode::Node as i32
}

fn is_host_ipc(config: &PodSandboxConfig) -> bool {
    sandbox_namespaces(config).ipc == NamespaceMode::Node as i32
}

/// The host path of the pod's `/dev/shm`.
pub fn shm_path(sandbox: &Sandbox) -> camino::Utf8PathBuf {
    if is_host_ipc(&sandbox.config) { "/dev/shm".into() } else { sandbox.dir.join("shm") }
}

impl Server {
    /// Makes a sandbox and answers its id, or makes nothing.
    ///
    /// # Errors
    /// [`Error`] of the step that failed.
    pub async fn run_pod_sandbox(self: &Arc<Self>, request: RunPodSandboxRequest) -> Result<String> {
        let config = check(&request)?;
        let handler = self.handlers.get(&request.runtime_handler)?.clone();
        let id = host::new_id()?;
        let record = SandboxRecord {
            version: VERSION,
            boot_id: self.boot_id.clone(),
            id: id.clone(),
            phase: SandboxPhase::Creating,
            config: Encoded::of(&config),
            runtime_handler: request.runtime_handler,
            handler: handler.clone(),
            created_at: host::now(),
            netns: (!is_host_network(&config)).then(|| self.netns_path(&id)),
            ips: Vec::new(),
            pid: 0,
            shim: None,
        };
        let sandbox = Arc::new(Sandbox::new(&record, config, handler, self.sandbox_dir(&id)));
        self.registry(|registry| registry.reserve(&sandbox.name, &id))?;
        let server = Arc::clone(self);
        self.finish(async move {
            let made = server.make_sandbox(&sandbox).await;
            if let Err(error) = made {
                tracing::warn!(sandbox_id = sandbox.id, error = error.chain(), "failed to run a pod sandbox");
                if let Err(error) = server.unmake_sandbox(&sandbox).await {
                    tracing::error!(sandbox_id = sandbox.id, error = error.chain(), "failed to clean up after it");
                }
                server.registry(|registry| registry.remove(&sandbox.id));
                return Err(error);
            }
            server.registry(|registry| registry.add_sandbox(Arc::clone(&sandbox)));
            server.watch_sandbox(&sandbox);
            server.emit(ContainerEventType::ContainerCreatedEvent, &sandbox.id, &sandbox.id);
            server.emit(ContainerEventType::ContainerStartedEvent, &sandbox.id, &sandbox.id);
            tracing::info!(sandbox_id = sandbox.id, pod = sandbox.name, "pod sandbox runs");
            Ok(sandbox.id.clone())
        })
        .await
    }

    async fn make_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let uid = pod_uid(&sandbox.config);
        let whole = Span::begin(uid, "cri.RunPodSandbox");
        let (server, copy) = (Arc::clone(self), Arc::clone(sandbox));
        self.blocking(move || server.make_files(&copy)).await?;
        // Both need the network namespace, and neither the other.
        let (network, shim) = tokio::join!(self.attach_network(sandbox), self.start_shim(sandbox));
        let (ips, (shim, started, pid)) = (network?, shim?);
        sandbox.change(|facts| {
            facts.phase = SandboxPhase::Ready;
            facts.ips = ips;
            facts.pid = pid;
            facts.shim = Some(started);
        });
        sandbox.link.send_replace(Link::Up(shim));
        self.save_sandbox(sandbox)?;
        whole.end();
        Ok(())
    }

    fn make_files(&self, sandbox: &Sandbox) -> Result<()> {
        let bundle = sandbox.bundle();
        fs::create_dir_all(&bundle).map_err(Error::io("make directory", &bundle))?;
        self.save_sandbox(sandbox)?;
        let write = |name: &str, text: &[u8]| {
            let path = sandbox.dir.join(name);
            fs::write(&path, text).map_err(Error::io("write", &path))
        };
        let read = |path: &str| fs::read(path).map_err(Error::io("read", path));
        let hostname = if sandbox.config.hostname.is_empty() { host::hostname() } else { sandbox.config.hostname.clone() };
        write("hostname", format!("{hostname}\n").as_bytes())?;
        write("hosts", &read("/etc/hosts").unwrap_or_else(|_| b"127.0.0.1 localhost\n".to_vec()))?;
        match &sandbox.config.dns_config {
            Some(dns) => write("resolv.conf", resolv_conf(dns).as_bytes())?,
            None => write("resolv.conf", &read("/etc/resolv.conf")?)?,
        }
        if !is_host_ipc(&sandbox.config) {
            host::mount_shm(&sandbox.dir.join("shm"))?;
        }
        if let Some(netns) = &sandbox.netns {
            network::netns::create(netns)
                .map_err(|error| Error::Serve { endpoint: format!("the network namespace {netns}"), source: error.into() })?;
        }
        match sandbox.handler.sandboxer {
            Sandboxer::Shim => Ok(()),
            Sandboxer::PodSandbox => self.make_pause_bundle(sandbox),
        }
    }

    /// The bundle of the pause container, and the file that containerd's shims log to.
    fn make_pause_bundle(&self, sandbox: &Sandbox) -> Result<()> {
        let bundle = sandbox.bundle();
        let spec = pause::spec(&PauseFacts {
            id: &sandbox.id,
            config: &sandbox.config,
            executable: self.launcher.shim.as_str(),
            netns: sandbox.netns.as_deref().map(Utf8Path::as_str),
            host: &self.host,
            cgroup_root: &self.config.cgroup_root,
        });
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(Error::io("make directory", &rootfs))?;
        // A FIFO would need a reader, which this server cannot be all the time.
        let log = bundle.join("log");
        fs::write(&log, "").map_err(Error::io("write", &log))?;
        write_json(&bundle.join("config.json"), &spec)
    }

    async fn attach_network(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<Vec<String>> {
        let Some(netns) = sandbox.netns.clone() else { return Ok(Vec::new()) };
        let span = Span::begin(pod_uid(&sandbox.config), "cri.RunPodSandbox.network");
        let pod = pod_network(sandbox, &netns)?;
        let network = Arc::clone(&self.network);
        let id = sandbox.id.clone();
        let attachment = self
            .blocking(move || {
                network.setup(&pod).map_err(|source| Error::Network { act: "set up the network", id, source: Box::new(source) })
            })
            .await?;
        span.end();
        Ok(attachment.ips.iter().map(ToString::to_string).collect())
    }

    async fn start_shim(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(Arc<Shim>, StartedShim, u32)> {
        let span = Span::begin(pod_uid(&sandbox.config), "cri.RunPodSandbox.shim");
        let id = &sandbox.id;
        let bundle = sandbox.bundle();
        let started = self.launcher.start(&sandbox.handler, id, &bundle).await?;
        sandbox.change(|facts| facts.shim = Some(started.clone()));
        let shim = Shim::connect(&started, sandbox.handler.sandboxer).await.map_err(Error::shim("connect to the shim of", id))?;
        // What unmakes a sandbox finds the shim here.
        sandbox.link.send_replace(Link::Up(Arc::clone(&shim)));
        let request = PodRequest {
            id,
            bundle: bundle.as_str(),
            netns: sandbox.netns.as_deref().map_or("", Utf8Path::as_str),
            config: &sandbox.config,
            options: self.launcher.options(&sandbox.handler),
        };
        let pid = shim.run_sandbox(&request).await.map_err(Error::shim("make sandbox", id))?;
        span.end();
        Ok((shim, started, pid))
    }

    /// Removes whatever there is of a sandbox; every step is tried.
    ///
    /// # Errors
    /// The first error; the directory stays then, so that the next attempt finds the rest.
    pub async fn unmake_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let mut errors = Vec::new();
        errors.extend(self.end_shim(sandbox).await.err());
        if !sandbox.is_released() {
            errors.extend(self.release(sandbox).await.err());
        }
        let dir = sandbox.dir.clone();
        if let Some(error) = errors.into_iter().next() {
            return Err(error);
        }
        self.blocking(move || remove_dir(&dir)).await
    }

    async fn release_network(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let Some(netns) = sandbox.netns.clone() else { return Ok(()) };
        let network = Arc::clone(&self.network);
        let id = sandbox.id.clone();
        self.blocking(move || {
            let down =
                network.teardown(&id).map_err(|source| Error::Network { act: "tear down the network", id, source: Box::new(source) });
            let gone = network::netns::remove(&netns)
                .map_err(|error| Error::Serve { endpoint: format!("the network namespace {netns}"), source: error.into() });
            down.and(gone)
        })
        .await
    }

    /// Ends the shim; if it is gone, its `delete` command ends what it left.
    async fn end_shim(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let id = &sandbox.id;
        let mut is_clean = false;
        if let Some(shim) = sandbox.shim() {
            // It ends the pod's own process too.
            shim.shutdown_sandbox(id).await.map_err(Error::shim("shut down the shim of", id))?;
            is_clean = tokio::time::timeout(SHIM_EXIT, shim.closed()).await.is_ok();
        }
        sandbox.link.send_replace(Link::Lost);
        if !is_clean {
            self.delete_leftovers(sandbox).await?;
            // `delete` leaves the socket of a shim that was killed.
            if let Some(shim) = sandbox.facts().shim {
                let _ = fs::remove_file(shim.socket());
            }
        }
        sandbox.change(|facts| facts.shim = None);
        Ok(())
    }

    /// Runs the `delete` command for a sandbox without its shim, and for its containers, as containerd does.
    async fn delete_leftovers(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        if sandbox.facts().shim.is_none() {
            return Ok(());
        }
        let containers = self.registry(|registry| registry.containers_of(&sandbox.id));
        let bundles = containers.iter().map(|container| (container.id.clone(), container.bundle()));
        for (id, bundle) in bundles.chain([(sandbox.id.clone(), sandbox.bundle())]) {
            if bundle.is_dir() {
                self.launcher.delete(&sandbox.handler, &id, &bundle).await?;
            }
        }
        Ok(())
    }

    /// Ends all that runs in a sandbox and gives its network back. An id that is not known is as good as stopped.
    ///
    /// # Errors
    /// [`Error`] of the first step that failed; all were tried.
    pub async fn stop_pod_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        let Some(sandbox) = Error::if_found(self.registry(|registry| registry.sandbox(id)))? else { return Ok(()) };
        let server = Arc::clone(self);
        self.finish(async move {
            let _one = server.locks.acquire(&sandbox.id).await;
            server.stop_sandbox(&sandbox).await
        })
        .await
    }

    /// As [`Server::stop_pod_sandbox`]; the caller holds the sandbox' lock.
    pub async fn stop_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let containers = self.registry(|registry| registry.containers_of(&sandbox.id));
        let stops = containers.iter().map(|container| self.stop(container, Duration::ZERO));
        let mut errors: Vec<Error> = futures::future::join_all(stops).await.into_iter().filter_map(Result::err).collect();
        if sandbox.is_released() {
            return errors.into_iter().next().map_or(Ok(()), Err);
        }
        let was_ready = sandbox.is_ready();
        // From here on no container can be started in it.
        sandbox.change(|facts| facts.phase = SandboxPhase::NotReady);
        // Neither needs the other: no process of a container is left.
        let (ended, released) = tokio::join!(self.stop_in_shim(sandbox, was_ready), self.release(sandbox));
        errors.extend(ended.err().into_iter().chain(released.err()));
        sandbox.change(|facts| {
            facts.ips.clear();
            if errors.is_empty() {
                facts.pid = 0;
            }
        });
        if let Err(error) = self.save_sandbox(sandbox) {
            // It is stopped all the same, and on a full disk it must be possible to remove it. A next start sees that nothing of it lives.
            tracing::warn!(sandbox_id = sandbox.id, error = error.chain(), "failed to record the end of a sandbox");
        }
        if was_ready {
            self.emit(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
        }
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    /// Ends the pod's own process, if it has one; without a shim, whatever was left.
    async fn stop_in_shim(self: &Arc<Self>, sandbox: &Arc<Sandbox>, was_ready: bool) -> Result<()> {
        if !was_ready {
            return Ok(());
        }
        let Some(shim) = sandbox.shim() else { return self.delete_leftovers(sandbox).await };
        match shim.stop_sandbox(&sandbox.id).await {
            Err(error) if !error.is_closed() => Err(Error::Shim { act: "stop sandbox", id: sandbox.id.clone(), source: error }),
            _ => Ok(()),
        }
    }

    /// Gives back the network and `/dev/shm`.
    async fn release(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let released = self.release_network(sandbox).await;
        let shm = (!is_host_ipc(&sandbox.config)).then(|| sandbox.dir.join("shm"));
        let unmounted = self.blocking(move || shm.as_deref().map_or(Ok(()), host::unmount)).await;
        released.and(unmounted)
    }

    /// Removes a sandbox with its containers, ending them first. An id that is not known is as good as removed.
    ///
    /// # Errors
    /// [`Error`]; the sandbox stays, not ready, and the call can be repeated.
    pub async fn remove_pod_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        let Some(sandbox) = Error::if_found(self.registry(|registry| registry.sandbox(id)))? else { return Ok(()) };
        let server = Arc::clone(self);
        self.finish(async move {
            let _one = server.locks.acquire(&sandbox.id).await;
            // A removal that was under way has done it.
            if server.registry(|registry| registry.sandbox(&sandbox.id)).is_err() {
                return Ok(());
            }
            server.stop_sandbox(&sandbox).await?;
            // Not ready by now: no container is made in it any more, and the last one is in the table.
            drop(server.locks.acquire(&creation_key(&sandbox.id)).await);
            server.remove_stopped(&sandbox).await?;
            server.emit(ContainerEventType::ContainerDeletedEvent, &sandbox.id, &sandbox.id);
            server.registry(|registry| registry.remove(&sandbox.id));
            tracing::info!(sandbox_id = sandbox.id, pod = sandbox.name, "pod sandbox removed");
            Ok(())
        })
        .await
    }

    /// Removes the containers of a stopped sandbox, its shim and its files.
    async fn remove_stopped(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let containers = self.registry(|registry| registry.containers_of(&sandbox.id));
        let removals = futures::future::try_join_all(containers.iter().map(|container| self.remove(container)));
        if sandbox.shim().is_some() {
            // A living shim reads nothing of a container that has ended.
            let (removed, unmade) = tokio::join!(removals, self.unmake_sandbox(sandbox));
            return removed.map(drop).and(unmade);
        }
        // What ends the leftovers of a dead shim finds them by the containers' bundles.
        self.end_shim(sandbox).await?;
        removals.await?;
        self.unmake_sandbox(sandbox).await
    }

    /// Watches over the sandbox until it ends. A shim that died is started again where it can adopt what it left.
    pub fn watch_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let (server, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        let cancel = self.cancel.clone();
        self.tasks.spawn(cancel.run_until_cancelled_owned(async move {
            while let Some(shim) = sandbox.shim() {
                match shim.wait_sandbox(&sandbox.id).await {
                    Err(error) if error.is_closed() => {
                        if !sandbox.is_ready() {
                            return;
                        }
                        sandbox.link.send_replace(Link::Pending);
                        server.reconnect(&sandbox, &shim).await;
                    }
                    ended => {
                        if sandbox.is_ready() {
                            tracing::warn!(sandbox_id = sandbox.id, ?ended, "the sandbox ended by itself");
                            break;
                        }
                        return;
                    }
                }
            }
            let _one = server.locks.acquire(&sandbox.id).await;
            if sandbox.is_ready()
                && let Err(error) = server.stop_sandbox(&sandbox).await
            {
                tracing::warn!(sandbox_id = sandbox.id, error = error.chain(), "failed to clean up after the sandbox");
            }
        }));
    }

    async fn reconnect(self: &Arc<Self>, sandbox: &Arc<Sandbox>, lost: &Arc<Shim>) {
        let id = &sandbox.id;
        tracing::warn!(sandbox_id = id, "the connection to the shim is lost");
        let started = sandbox.facts().shim.unwrap_or_default();
        if let Ok(shim) = Shim::connect(&started, sandbox.handler.sandboxer).await {
            sandbox.link.send_replace(Link::Up(shim));
            return;
        }
        if lost.adopts() {
            match self.adopt(sandbox).await {
                Ok(()) => {
                    tracing::info!(sandbox_id = id, "a new shim has taken the sandbox over");
                    return;
                }
                Err(error) => tracing::error!(sandbox_id = id, error = error.chain(), "no new shim takes the sandbox over"),
            }
        }
        sandbox.link.send_replace(Link::Lost);
    }

    /// Starts a shim on the bundle of one that died.
    ///
    /// # Errors
    /// [`Error::ShimStart`], or [`Error::Shim`] if it does not answer.
    pub async fn adopt(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        let id = &sandbox.id;
        let started = self.launcher.start(&sandbox.handler, id, &sandbox.bundle()).await?;
        let shim = Shim::connect(&started, sandbox.handler.sandboxer).await.map_err(Error::shim("connect to the shim of", id))?;
        let status = match shim.sandbox_status(id).await {
            Ok(status) => status,
            Err(source) => {
                // It found nothing to take over, and serves nobody.
                if let Err(error) = shim.shutdown_sandbox(id).await {
                    tracing::warn!(sandbox_id = id, %error, "failed to end a shim that is of no use");
                }
                return Err(Error::Shim { act: "ask for the status of sandbox", id: id.clone(), source });
            }
        };
        sandbox.change(|facts| {
            facts.shim = Some(started);
            facts.pid = status.pid;
        });
        sandbox.link.send_replace(Link::Up(shim));
        self.save_sandbox(sandbox)
    }
}

/// Removes a directory with all in it; none is fine.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_dir(dir: &Utf8Path) -> Result<()> {
    match linux::tree::remove(dir.as_std_path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(Error::io("remove directory", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_as_upstream_writes_it() {
        let dns = DnsConfig {
            servers: vec!["10.96.0.10".into(), "1.1.1.1".into()],
            searches: vec!["a.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(resolv_conf(&dns), "search a.local local\nnameserver 10.96.0.10\nnameserver 1.1.1.1\noptions ndots:5\n");
        assert_eq!(resolv_conf(&DnsConfig::default()), "");
    }

    #[test]
    fn bad_sandboxes_are_refused_with_the_field() {
        let good = || RunPodSandboxRequest {
            config: Some(PodSandboxConfig {
                metadata: Some(protocols::cri::v1::PodSandboxMetadata { name: "n".into(), uid: "u".into(), ..Default::default() }),
                ..Default::default()
            }),
            runtime_handler: String::new(),
        };
        assert!(check(&good()).is_ok());
        let refused = |change: fn(&mut RunPodSandboxRequest), word: &str| {
            let mut request = good();
            change(&mut request);
            let error = check(&request).expect_err(word).chain();
            assert!(error.contains(word), "{error}");
        };
        refused(|request| request.config = None, "config");
        refused(|request| request.config.as_mut().expect("set").metadata = None, "metadata");
        refused(
            |request| {
                request.config.as_mut().expect("set").port_mappings.push(CriPortMapping { host_port: 70000, ..Default::default() });
            },
            "70000",
        );
        refused(
            |request| {
                let linux = protocols::cri::v1::LinuxPodSandboxConfig { cgroup_parent: "a.slice".into(), ..Default::default() };
                request.config.as_mut().expect("set").linux = Some(linux);
            },
            "systemd",
        );
    }
}
