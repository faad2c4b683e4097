//! The network of pods: a built-in bridge network through netlink and nftables, or the CNI configuration of the host.
//!
//! A conflist in the CNI directory takes precedence (seam 7 of ARCHITECTURE.md). Everything here is synchronous and acts in
//! the network namespace of the calling thread's process; callers in async programs use `spawn_blocking`.
//!
//! A sandbox's life: `setup` writes its record, then asks the kernel or the plugins; `teardown` undoes, then removes the record. Both are
//! safe to cut off anywhere: what is on record is found again by [`Network::reconcile`].

#![forbid(unsafe_code)]

mod bridge;
pub mod cni;
mod config;
mod error;
pub mod netns;
mod plan;
mod record;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use camino::Utf8Path;

pub use config::{Attachment, Bandwidth, Config, Dns, Ipv4Cidr, PodNetwork, PortMapping, Protocol};
pub use error::Error;

use cni::{ConfList, Invocation};
use plan::PortElement;
use record::{CniRecord, Kind, Record, Records};

/// The pod network of one host. One instance per state directory, also across processes.
#[derive(Debug)]
pub struct Network {
    config: Config,
    records: Records,
    state: Mutex<State>,
    /// Held while bridge or table are made anew, and while a pod's elements go, so that no table is written from a list that is
    /// changing; true once both have been made by this instance. Taken before `state`, never after it.
    prepared: Mutex<bool>,
}

#[derive(Debug, Default)]
struct State {
    sandboxes: BTreeMap<String, Record>,
    last_address: Option<Ipv4Addr>,
}

/// Which network pods get at present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The bridge's name, or the conflist's.
    pub network: String,
    /// Whether it is a CNI configuration.
    pub cni: bool,
}

impl Network {
    /// Opens the network: locks the state directory, loads the records, and, unless a CNI configuration has precedence, sets up bridge, table
    /// and forwarding, with the host ports of all sandboxes on record.
    ///
    /// # Errors
    /// A bad configuration, a state directory in use, a name or range that is another's.
    pub fn open(config: Config) -> Result<Self, Error> {
        config.validate()?;
        let records = Records::open(&config.state_dir)?;
        let mut state = State::default();
        for record in records.load()? {
            if let Kind::Bridge { address, .. } = record.kind {
                state.last_address = state.last_address.max(Some(address));
            }
            state.sandboxes.insert(record.sandbox_id.clone(), record);
        }
        let network = Self { config, records, state: Mutex::new(state), prepared: Mutex::new(false) };
        // A broken conflist is told by status() and setup(), where it can be mended without a restart.
        if matches!(cni::load(&network.config.cni_conf_dir), Ok(None)) {
            network.prepare(&mut network.lock_prepared())?;
        }
        Ok(network)
    }

    /// Attaches a pod. The record is there before anything is done, and after a failure everything is undone again.
    ///
    /// # Errors
    /// [`Error::Exists`] for a sandbox that has a network; else what could not be done, and for which pod.
    pub fn setup(&self, pod: &PodNetwork) -> Result<Attachment, Error> {
        check_id(&pod.sandbox_id)?;
        let bandwidth = match pod.bandwidth {
            None => Bandwidth::from_annotations(&pod.annotations)?,
            given => given,
        };
        let pod = &PodNetwork { bandwidth, ..pod.clone() };
        let done = match cni::load(&self.config.cni_conf_dir)? {
            Some(list) => self.setup_cni(pod, &list),
            None => self.setup_bridge(pod),
        };
        if let Err(e) = &done
            && !matches!(e, Error::Exists { .. })
        {
            // The first error is the one to tell; what can't be undone now stays on record for reconcile.
            let _ = self.teardown(&pod.sandbox_id);
        }
        done
    }

    /// What a sandbox got when it was set up (also by an earlier process); `None` when it has no network, or not yet.
    pub fn attachment(&self, sandbox_id: &str) -> Option<Attachment> {
        let state = self.lock();
        let record = state.sandboxes.get(sandbox_id)?;
        match &record.kind {
            Kind::Bridge { address, .. } => Some(self.bridge_attachment(*address)),
            Kind::Cni(cni) => Some(Attachment {
                ips: cni.ips.clone(),
                interface: record.interface.clone(),
                network: cni.list["name"].as_str().unwrap_or_default().to_owned(),
                cni_result: Some(cni.result.clone()?),
            }),
        }
    }

    /// Detaches a pod: host ports, address, and whatever plugins hold. A sandbox without a network is a success. The built-in network's veth
    /// pair goes with its namespace (deleting it by itself would wait 20 ms), so the caller removes that next ([`netns::remove`]).
    ///
    /// # Errors
    /// What could not be undone; the record stays then, and the call may be repeated.
    pub fn teardown(&self, sandbox_id: &str) -> Result<(), Error> {
        let Some(record) = self.lock().sandboxes.get(sandbox_id).cloned() else {
            return Ok(());
        };
        let _table = matches!(record.kind, Kind::Bridge { .. }).then(|| self.lock_prepared());
        match &record.kind {
            Kind::Bridge { address, ports } => {
                let elements = plan::port_elements(*address, ports);
                if !bridge::delete_ports(&self.config, &elements)? {
                    let others = self.elements(|id| id != sandbox_id);
                    bridge::write_table(&self.config, &others)?;
                }
                bridge::forget_flows(&self.config, ports)?;
            }
            Kind::Cni(cni) => self.delete_cni(&record, cni)?,
        }
        self.records.forget(sandbox_id)?;
        self.lock().sandboxes.remove(sandbox_id);
        Ok(())
    }

    /// Checks that a sandbox's network still is as it was made (for CNI: CHECK).
    ///
    /// # Errors
    /// [`Error::Broken`] and [`Error::Unknown`]; a plugin's own refusal.
    pub fn check(&self, sandbox_id: &str) -> Result<(), Error> {
        let unknown = || Error::Unknown { sandbox_id: sandbox_id.to_owned() };
        let record = self.lock().sandboxes.get(sandbox_id).cloned().ok_or_else(unknown)?;
        match &record.kind {
            Kind::Bridge { address, ports } => {
                let elements = plan::port_elements(*address, ports);
                match bridge::inspect(&self.config, sandbox_id, &record.netns_path, *address, &elements)? {
                    Some(what) => Err(Error::Broken { sandbox_id: sandbox_id.to_owned(), what }),
                    None => Ok(()),
                }
            }
            Kind::Cni(cni) => {
                let list = ConfList::parse(cni.list.clone(), Utf8Path::new("(record)"))?;
                let call = self.invocation(&record, &cni.args);
                Ok(cni::check(&list, &call, &cni.capabilities, cni.result.as_ref())?)
            }
        }
    }

    /// Tears down what belongs to no sandbox of `live`, and writes the table anew. For the start of a runtime, after it has found its sandboxes.
    ///
    /// # Errors
    /// All steps are tried; the first failure and their number.
    pub fn reconcile(&self, live: &HashSet<String>) -> Result<(), Error> {
        let stale: Vec<String> = self.lock().sandboxes.keys().filter(|id| !live.contains(*id)).cloned().collect();
        let mut errors: Vec<Error> = stale.iter().filter_map(|id| self.teardown(id).err()).collect();
        let kept: HashSet<String> = self.lock().sandboxes.keys().map(|id| plan::veth_name(id)).collect();
        errors.extend(bridge::delete_veths(&self.config, |name| kept.contains(name)).err());
        match cni::load(&self.config.cni_conf_dir) {
            Ok(Some(list)) => errors.extend(self.collect_cni(&list).err()),
            Ok(None) => errors.extend(self.prepare(&mut self.lock_prepared()).err()),
            Err(e) => errors.push(e.into()),
        }
        Error::collect(errors)
    }

    /// Whether pods can be attached, and to what: for NetworkReady.
    ///
    /// # Errors
    /// What stands in the way: a bad conflist, a missing plugin, a plugin's STATUS.
    pub fn status(&self) -> Result<Status, Error> {
        match cni::load(&self.config.cni_conf_dir)? {
            Some(list) => {
                cni::status(&list, &Invocation { bin_dirs: &self.config.cni_bin_dirs, ..Invocation::default() })?;
                Ok(Status { network: list.name, cni: true })
            }
            None => Ok(Status { network: self.config.bridge.clone(), cni: false }),
        }
    }

    /// Ids of all sandboxes with a network.
    pub fn sandboxes(&self) -> Vec<String> {
        self.lock().sandboxes.keys().cloned().collect()
    }

    /// Removes everything: all sandboxes' networks, bridge, table, the changed setting, the records.
    ///
    /// # Errors
    /// All steps are tried; the first failure and their number.
    pub fn remove_all(&self) -> Result<(), Error> {
        let mut errors: Vec<Error> = self.sandboxes().iter().filter_map(|id| self.teardown(id).err()).collect();
        errors.extend(bridge::delete_veths(&self.config, |_| false).err());
        errors.extend(bridge::remove(&self.config).err());
        errors.extend(bridge::restore_forwarding(&self.records).err());
        if errors.is_empty() {
            errors.extend(self.records.remove_all().err());
        }
        *self.lock_prepared() = false;
        Error::collect(errors)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No invariant of the map can be half made: each change is one insert or one remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bridge_attachment(&self, address: Ipv4Addr) -> Attachment {
        Attachment {
            ips: vec![IpAddr::V4(address)],
            interface: bridge::INTERFACE.into(),
            network: self.config.bridge.clone(),
            cni_result: None,
        }
    }

    /// Bridge, table with all elements, forwarding.
    fn prepare(&self, prepared: &mut bool) -> Result<(), Error> {
        *prepared = false;
        bridge::ensure_bridge(&self.config)?;
        bridge::enable_forwarding(&self.records)?;
        bridge::write_table(&self.config, &self.elements(|_| true))?;
        *prepared = true;
        Ok(())
    }

    fn lock_prepared(&self) -> MutexGuard<'_, bool> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bridge's index; it is made again if somebody has deleted it.
    fn bridge(&self) -> Result<u32, Error> {
        let mut prepared = self.lock_prepared();
        if *prepared && let Some(index) = bridge::index(&self.config)? {
            return Ok(index);
        }
        self.prepare(&mut prepared)?;
        let gone = || Error::Name { field: "bridge", value: self.config.bridge.clone(), why: "it vanished while it was set up" };
        bridge::index(&self.config)?.ok_or_else(gone)
    }

    fn elements(&self, of: impl Fn(&str) -> bool) -> Vec<PortElement> {
        let state = self.lock();
        let mut all = Vec::new();
        for record in state.sandboxes.values().filter(|r| of(&r.sandbox_id)) {
            if let Kind::Bridge { address, ports } = &record.kind {
                all.extend(plan::port_elements(*address, ports));
            }
        }
        all
    }

    fn setup_bridge(&self, pod: &PodNetwork) -> Result<Attachment, Error> {
        let ports = self.built_in_ports(pod)?;
        let master = self.bridge()?;
        let address = self.reserve(pod, &ports)?;
        bridge::attach(&self.config, master, pod, address)?;
        if !bridge::add_ports(&self.config, &plan::port_elements(address, &ports))? {
            let _table = self.lock_prepared();
            bridge::write_table(&self.config, &self.elements(|_| true))?;
        }
        bridge::forget_flows(&self.config, &ports)?;
        Ok(self.bridge_attachment(address))
    }

    /// The mappings that map something; refuses what the built-in network can't do.
    fn built_in_ports(&self, pod: &PodNetwork) -> Result<Vec<PortMapping>, Error> {
        let ports: Vec<_> = pod.port_mappings.iter().filter(|m| m.host_port != 0).copied().collect();
        for mapping in &ports {
            let why = match mapping.host_ip {
                Some(IpAddr::V6(ip)) if !ip.is_unspecified() => "the built-in network has no IPv6",
                _ if mapping.container_port == 0 => "container port is 0",
                _ => continue,
            };
            return Err(Error::PortMapping {
                port: mapping.host_port,
                protocol: mapping.protocol.as_str(),
                sandbox_id: pod.sandbox_id.clone(),
                why,
            });
        }
        Ok(ports)
    }

    /// Chooses an address, and puts it and the ports on record for the pod.
    fn reserve(&self, pod: &PodNetwork, ports: &[PortMapping]) -> Result<Ipv4Addr, Error> {
        let mut state = self.lock();
        if state.sandboxes.contains_key(&pod.sandbox_id) {
            return Err(Error::Exists { sandbox_id: pod.sandbox_id.clone() });
        }
        let mut taken = BTreeSet::new();
        for record in state.sandboxes.values() {
            let Kind::Bridge { address, ports: theirs } = &record.kind else {
                continue;
            };
            taken.insert(*address);
            if let Some(port) = ports.iter().find(|p| theirs.iter().any(|t| plan::ports_collide(p, t))) {
                let owner = record.sandbox_id.clone();
                return Err(Error::PortTaken { port: port.host_port, protocol: port.protocol.as_str(), owner });
            }
        }
        let address = match pod.requested_ips.first() {
            Some(wanted) => self.requested_address(pod, wanted, &taken)?,
            None => plan::next_address(self.config.pod_cidr, state.last_address, &taken)
                .ok_or_else(|| Error::AddressesExhausted { cidr: self.config.pod_cidr.to_string(), taken: taken.len() })?,
        };
        let kind = Kind::Bridge { address, ports: ports.to_vec() };
        let record = self.records.new_record(&pod.sandbox_id, &pod.netns_path, bridge::INTERFACE, kind);
        self.records.save(&record)?;
        state.last_address = Some(address);
        state.sandboxes.insert(pod.sandbox_id.clone(), record);
        Ok(address)
    }

    fn requested_address(&self, pod: &PodNetwork, wanted: &str, taken: &BTreeSet<Ipv4Addr>) -> Result<Ipv4Addr, Error> {
        let refuse = |why: String| Err(Error::Address { address: pod.requested_ips.join(","), sandbox_id: pod.sandbox_id.clone(), why });
        if pod.requested_ips.len() > 1 {
            return refuse("the built-in network gives one address".into());
        }
        let text = wanted.split('/').next().unwrap_or_default();
        let Ok(address) = text.parse::<Ipv4Addr>() else {
            return refuse("not an IPv4 address".into());
        };
        let (first, last) = self.config.pod_cidr.pod_range();
        if !(first..=last).contains(&u32::from(address)) {
            return refuse(format!("it is not one of {}", self.config.pod_cidr));
        }
        if taken.contains(&address) {
            return refuse("it is taken".into());
        }
        Ok(address)
    }

    fn setup_cni(&self, pod: &PodNetwork, list: &ConfList) -> Result<Attachment, Error> {
        if pod.bandwidth.is_some_and(|b| b != Bandwidth::default()) && !list.has_capability("bandwidth") {
            return Err(Error::Bandwidth { sandbox_id: pod.sandbox_id.clone(), network: list.name.clone() });
        }
        let mut cni =
            CniRecord { list: list.raw.clone(), args: cni::args(pod), capabilities: cni::capabilities(pod), ips: Vec::new(), result: None };
        let mut record = {
            let mut state = self.lock();
            if state.sandboxes.contains_key(&pod.sandbox_id) {
                return Err(Error::Exists { sandbox_id: pod.sandbox_id.clone() });
            }
            let kind = Kind::Cni(Box::new(cni.clone()));
            let record = self.records.new_record(&pod.sandbox_id, &pod.netns_path, bridge::INTERFACE, kind);
            self.records.save(&record)?;
            state.sandboxes.insert(pod.sandbox_id.clone(), record.clone());
            record
        };
        bridge::loopback_up(&pod.netns_path, &pod.sandbox_id)?;
        let result = cni::add(list, &self.invocation(&record, &cni.args), &cni.capabilities)?;
        cni.ips = cni::result_ips(&result);
        cni.result = Some(result.clone());
        let ips = cni.ips.clone();
        record.kind = Kind::Cni(Box::new(cni));
        self.records.save(&record)?;
        self.lock().sandboxes.insert(pod.sandbox_id.clone(), record.clone());
        Ok(Attachment { ips, interface: record.interface, network: list.name.clone(), cni_result: Some(result) })
    }

    fn delete_cni(&self, record: &Record, cni: &CniRecord) -> Result<(), Error> {
        let list = ConfList::parse(cni.list.clone(), Utf8Path::new("(record)"))?;
        let call = self.invocation(record, &cni.args);
        Ok(cni::delete(&list, &call, &cni.capabilities, cni.result.as_ref())?)
    }

    fn collect_cni(&self, list: &ConfList) -> Result<(), Error> {
        let state = self.lock();
        let of_list = |r: &&Record| matches!(&r.kind, Kind::Cni(cni) if cni.list["name"] == list.name.as_str());
        let valid: Vec<_> = state.sandboxes.values().filter(of_list).map(|r| (r.sandbox_id.clone(), r.interface.clone())).collect();
        drop(state);
        let call = Invocation { bin_dirs: &self.config.cni_bin_dirs, ..Invocation::default() };
        Ok(cni::collect(list, &call, &valid)?)
    }

    fn invocation<'a>(&'a self, record: &'a Record, args: &'a str) -> Invocation<'a> {
        Invocation {
            bin_dirs: &self.config.cni_bin_dirs,
            container_id: &record.sandbox_id,
            netns: if netns::is_pinned(&record.netns_path) { record.netns_path.as_str() } else { "" },
            interface: &record.interface,
            args,
        }
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.bytes().all(fits) {
        return Err(Error::SandboxId { id: id.to_owned() });
    }
    Ok(())
}
