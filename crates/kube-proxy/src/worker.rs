//! Brings Services into the kernel: sync, for nftables is. One call of [`Worker::sync`] is one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use client::{Informer, ObjectKey};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use linux::rtnl::Route;

use crate::Error;
use crate::apply::{Cost, Table};
use crate::config::{Config, NodePortAddress};
use crate::flows::{self, Way};
use crate::fragment::{Fragment, Surroundings, Value, fragment};
use crate::layout::{Map, Options};
use crate::plan::{Observed, Planner};
use crate::service::{self, Place};

/// Index of slices by `NAMESPACE/SERVICE`.
pub const BY_SERVICE: &str = "service";
const ZONE: &str = "topology.kubernetes.io/zone";

/// The local copies that the worker reads.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Services of this proxy.
    pub services: Informer<Service>,
    /// Their slices, indexed by [`BY_SERVICE`].
    pub slices: Informer<EndpointSlice>,
    /// This node alone.
    pub node: Informer<Node>,
}

/// Everything that a sync needs and leaves.
#[derive(Debug)]
pub struct Worker {
    config: Config,
    sources: Sources,
    table: Table,
    planner: Planner,
    place: Place,
    around: Surroundings,
    node_addresses: BTreeSet<Ipv4Addr>,
    /// UDP ports of each Service.
    ways: BTreeMap<ObjectKey, Vec<Way>>,
    /// Whether what the kernel holds is known.
    known: bool,
    /// Chains that nothing leads to any more.
    idle: Vec<String>,
}

impl Worker {
    /// A worker that has not looked at the kernel yet.
    pub fn new(config: Config, node: String, sources: Sources) -> Self {
        let options = Options {
            cluster_cidr: config.cluster_cidr.clone(),
            masquerade_all: config.masquerade_all,
            every_node_port_address: config.every_node_port_address(),
        };
        Self {
            table: Table::new(config.nftables_table.clone(), options),
            around: Surroundings { cluster_cidr: config.cluster_cidr.clone(), node_ip: None },
            place: Place { node, zone: String::new() },
            config,
            sources,
            planner: Planner::default(),
            node_addresses: BTreeSet::new(),
            ways: BTreeMap::new(),
            known: false,
            idle: Vec::new(),
        }
    }

    /// Brings the Services with these keys into the kernel. The first call, and one after an error, compares all.
    ///
    /// # Errors
    /// A refusal of the kernel; the next call starts from what the kernel then holds.
    pub fn sync(&mut self, dirty: BTreeSet<ObjectKey>) -> Result<Cost, Error> {
        let mut dirty = dirty;
        // Before planning: what the kernel holds is kept in its place.
        let found = if self.known { None } else { Some(self.observe()?) };
        if self.look_at_node() || found.is_some() {
            dirty.extend(self.sources.services.list().iter().map(|service| ObjectKey::of(&**service)));
            dirty.extend(self.planner.owners().cloned());
            self.plan_node_ports()?;
        }
        let mut ways = Vec::new();
        for key in dirty.iter().filter(|key| !key.name.is_empty()) {
            ways.extend(self.plan(key));
        }
        let cost = self.commit(found).inspect_err(|_| self.known = false)?;
        flows::forget_stale(&ways)?;
        Ok(cost)
    }

    /// Takes in where this proxy is; answers whether that changed.
    fn look_at_node(&mut self) -> bool {
        let node = self.sources.node.get(&ObjectKey::new("", self.place.node.as_str()));
        let zone = node.as_ref().and_then(|node| node.metadata.labels.as_ref()?.get(ZONE).cloned()).unwrap_or_default();
        let node_ip = match self.config.bind_address {
            Some(IpAddr::V4(address)) => Some(address),
            _ => node.as_deref().and_then(internal_ip),
        };
        let changed = (&self.place.zone, self.around.node_ip) != (&zone, node_ip);
        self.place.zone = zone;
        self.around.node_ip = node_ip;
        changed
    }

    /// The addresses that NodePorts are served at.
    fn plan_node_ports(&mut self) -> Result<(), Error> {
        let mut addresses = BTreeSet::new();
        let local = || {
            let kernel = |source| Error::Kernel { act: "list this host's addresses".to_owned(), source };
            Route::open().and_then(|mut route| route.addresses()).map_err(kernel)
        };
        for wanted in &self.config.nodeport_addresses {
            match wanted {
                NodePortAddress::Primary => addresses.extend(self.around.node_ip),
                NodePortAddress::Range(range) => {
                    addresses.extend(local()?.into_iter().map(|found| found.address).filter(|address| range.contains(*address)));
                }
            }
        }
        addresses.retain(|address| !address.is_loopback());
        if addresses != self.node_addresses {
            let elements = addresses.iter().map(|address| ((Map::NodePortIps, address.octets().to_vec()), Value::None)).collect();
            self.planner.set(&ObjectKey::default(), |_| Fragment { elements, ..Fragment::default() });
            self.node_addresses = addresses;
        }
        Ok(())
    }

    /// Plans one Service; answers the UDP ports whose flows may lead elsewhere now.
    fn plan(&mut self, key: &ObjectKey) -> Vec<Way> {
        let ports = self.sources.services.get(key).map(|service| service::ports(&service)).unwrap_or_default();
        let slices: Vec<Arc<EndpointSlice>> =
            if ports.is_empty() { Vec::new() } else { self.sources.slices.by_index(BY_SERVICE, &key.to_string()) };
        let (place, around) = (&self.place, &self.around);
        let mut ways = Vec::new();
        self.planner.set(key, |desk| {
            let mut whole = Fragment::default();
            for port in &ports {
                let endpoints = service::endpoints(port, &slices, &place.node);
                ways.extend(Way::of(port, &endpoints));
                let part = fragment(port, &service::usable(port, &endpoints, place), around, desk);
                whole.elements.extend(part.elements);
                whole.chains.extend(part.chains);
            }
            whole
        });
        let before = self.ways.remove(key).unwrap_or_default();
        if !ways.is_empty() {
            self.ways.insert(key.clone(), ways.clone());
        }
        if before == ways {
            return Vec::new();
        }
        if ways.is_empty() { before.into_iter().map(Way::closed).collect() } else { ways }
    }

    /// Takes in what the kernel holds; answers whether there is a table that can be taken over.
    fn observe(&mut self) -> Result<bool, Error> {
        let observed = self.table.observe()?;
        let found = observed.is_some();
        self.planner.observe(observed.unwrap_or_default());
        Ok(found)
    }

    /// One transaction; `found` tells of a table of which only now is known what it holds.
    fn commit(&mut self, found: Option<bool>) -> Result<Cost, Error> {
        let Some(found) = found else {
            let cost = self.table.apply(&self.planner.changes())?;
            self.idle.extend(self.planner.done());
            return Ok(cost);
        };
        let cost = match found.then(|| self.table.take_over(&self.planner.changes())) {
            Some(Ok(cost)) => cost,
            // Not there, or so different that it does not fit: made anew.
            other => {
                if let Some(Err(error)) = other {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the table cannot be taken over; it is replaced");
                }
                self.planner.observe(Observed::default());
                self.table.replace(&self.planner.changes())?
            }
        };
        self.known = true;
        self.idle = self.planner.done();
        Ok(cost)
    }

    /// Deletes chains that have been idle since the last call.
    pub fn sweep(&mut self) {
        let idle = self.planner.still_idle(&std::mem::take(&mut self.idle));
        if idle.is_empty() || !self.known {
            return;
        }
        match self.table.delete_chains(&idle) {
            Ok(()) => self.planner.deleted(&idle),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "chains are still in use; trying again");
                self.idle = idle;
            }
        }
    }

    /// Whether there is something for [`Worker::sweep`].
    pub fn has_idle(&self) -> bool {
        !self.idle.is_empty()
    }

    /// Looks whether the table is still whole, and the host's addresses the same. Answers whether a sync is needed.
    ///
    /// # Errors
    /// A refusal of the kernel.
    pub fn check(&mut self) -> Result<bool, Error> {
        let before = self.node_addresses.clone();
        self.plan_node_ports()?;
        if self.known && !self.table.is_whole(&self.planner.chains())? {
            tracing::warn!(table = self.config.nftables_table, "somebody removed rules; they are written again");
            self.known = false;
        }
        Ok(!self.known || before != self.node_addresses)
    }
}

fn internal_ip(node: &Node) -> Option<Ipv4Addr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses.filter(|address| address.type_ == "InternalIP").find_map(|address| address.address.parse().ok())
}
