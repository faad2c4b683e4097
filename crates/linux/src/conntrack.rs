//! Connection tracking over nfnetlink: flows listed and forgotten, as conntrack(8) does. Facts: `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.
//!
//! NAT is decided at a flow's first packet. A datagram flow never ends as long as somebody sends, so when the rules change its entry must go.

use std::net::Ipv4Addr;

use crate::netlink::{Attrs, Batch, Error, F_ACK, F_DUMP, Family, Socket};

const SUBSYS_CTNETLINK: u16 = 1;
const CT_GET: u16 = 1;
const CT_DELETE: u16 = 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const IPS_DST_NAT: u32 = 1 << 5;
const NLA_F_NESTED: u16 = 1 << 15;
/// `struct nfgenmsg` for IPv4.
const NFGEN: [u8; 4] = [libc::AF_INET as u8, 0, 0, 0];

/// A tracked IPv4 flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Layer 4 protocol number.
    pub protocol: u8,
    /// Where its first packet was sent to.
    pub destination: Ipv4Addr,
    /// The port it was sent to; 0 for protocols without ports.
    pub destination_port: u16,
    /// Who answers: another one than `destination` when the destination was translated.
    pub answering: Ipv4Addr,
    /// The port that it answers from; 0 for protocols without ports.
    pub answering_port: u16,
    /// Whether its destination was translated.
    pub translated: bool,
    tuple: Vec<u8>,
    id: Option<Vec<u8>>,
}

/// A ctnetlink socket.
#[derive(Debug)]
pub struct Conntrack(Socket);

impl Conntrack {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Socket::open(Family::Netfilter).map(Self)
    }

    /// All IPv4 flows.
    ///
    /// # Errors
    /// A refusal (no connection tracking in this kernel) or a malformed reply.
    pub fn flows(&mut self) -> Result<Vec<Flow>, Error> {
        let mut batch = Batch::new();
        batch.begin(SUBSYS_CTNETLINK << 8 | CT_GET, F_DUMP, "list tracked flows").put(&NFGEN);
        Ok(self.0.request(batch)?.iter().filter_map(|reply| parse(reply.payload.get(4..)?)).collect())
    }

    /// Forgets flows; those that have ended meanwhile are passed over.
    ///
    /// # Errors
    /// The first refusal, after all were tried.
    pub fn forget<'a>(&mut self, flows: impl IntoIterator<Item = &'a Flow>) -> Result<(), Error> {
        let mut first = None;
        for flow in flows {
            let mut batch = Batch::new();
            batch.begin(SUBSYS_CTNETLINK << 8 | CT_DELETE, F_ACK, "forget a tracked flow").put(&NFGEN);
            batch.attr(TUPLE_ORIG | NLA_F_NESTED, &flow.tuple);
            if let Some(id) = &flow.id {
                batch.attr(ID, id);
            }
            match self.0.transact(batch) {
                Err(e) if !e.is_not_found() => first = first.or(Some(e)),
                _ => {}
            }
        }
        first.map_or(Ok(()), Err)
    }
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attrs(attributes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn address(tuple: &[u8], which: u16) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = find(find(tuple, TUPLE_IP)?, which)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets))
}

fn port(proto: &[u8], which: u16) -> u16 {
    find(proto, which).and_then(|port| port.try_into().ok()).map_or(0, u16::from_be_bytes)
}

pub(crate) fn parse(attributes: &[u8]) -> Option<Flow> {
    let tuple = find(attributes, TUPLE_ORIG)?;
    let proto = find(tuple, TUPLE_PROTO)?;
    let reply = find(attributes, TUPLE_REPLY)?;
    let status = find(attributes, STATUS).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes);
    Some(Flow {
        protocol: *find(proto, PROTO_NUM)?.first()?,
        destination: address(tuple, IP_V4_DST)?,
        destination_port: port(proto, PROTO_DST_PORT),
        answering: address(reply, IP_V4_SRC)?,
        answering_port: find(reply, TUPLE_PROTO).map_or(0, |proto| port(proto, PROTO_SRC_PORT)),
        translated: status & IPS_DST_NAT != 0,
        tuple: tuple.to_vec(),
        id: find(attributes, ID).map(<[u8]>::to_vec),
    })
}
