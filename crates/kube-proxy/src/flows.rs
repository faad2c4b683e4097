//! Datagram flows that go on to where a Service no longer leads: conntrack decides at the first packet, and a flow that is never silent
//! never ends. Source: upstream's `pkg/proxy/conntrack/cleanup.go`, v1.37.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use linux::conntrack::{Conntrack, Flow};

use crate::Error;
use crate::service::{Endpoint, Protocol, ServicePort};

/// A UDP port of a Service, and where its flows may lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    addresses: Vec<Ipv4Addr>,
    port: u16,
    node_port: Option<u16>,
    serving: BTreeSet<(Ipv4Addr, u16)>,
}

impl Way {
    /// The way of a port; `None` if it is not UDP.
    pub fn of(port: &ServicePort, endpoints: &[Endpoint]) -> Option<Self> {
        let addresses =
            [port.cluster_ip].into_iter().chain(port.external_ips.iter().copied()).chain(port.load_balancer_ips.iter().copied());
        (port.protocol == Protocol::Udp).then(|| Self {
            addresses: addresses.collect(),
            port: port.port,
            node_port: port.node_port,
            serving: endpoints.iter().filter(|endpoint| endpoint.serving).map(|endpoint| (endpoint.address, endpoint.port)).collect(),
        })
    }

    /// The same way when its Service is gone.
    pub fn closed(mut self) -> Self {
        self.serving.clear();
        self
    }

    /// Whether a flow took this way and leads elsewhere than it would now.
    fn is_stale(&self, flow: &Flow) -> bool {
        let to_address = self.addresses.contains(&flow.destination) && self.port == flow.destination_port;
        // A node's port is known by its number alone: without any endpoint, flows of others would be taken for ours.
        let to_node = self.node_port == Some(flow.destination_port) && !self.serving.is_empty();
        flow.protocol == Protocol::Udp.number() && (to_address || to_node) && !self.serving.contains(&(flow.answering, flow.answering_port))
    }
}

/// Forgets the stale flows; answers how many.
///
/// # Errors
/// A refusal of the kernel.
pub fn forget_stale(ways: &[Way]) -> Result<usize, Error> {
    if ways.is_empty() {
        return Ok(0);
    }
    let kernel = |source| Error::Kernel { act: "forget stale UDP flows".to_owned(), source };
    let mut conntrack = Conntrack::open().map_err(kernel)?;
    let mut flows = conntrack.flows().map_err(kernel)?;
    flows.retain(|flow| ways.iter().any(|way| way.is_stale(flow)));
    conntrack.forget(&flows).map_err(kernel)?;
    Ok(flows.len())
}
