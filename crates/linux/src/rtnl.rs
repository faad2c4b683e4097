//! Links, addresses and routes over rtnetlink. Facts: `include/uapi/linux/{if_link,if_addr,rtnetlink}.h`, rtnetlink(7).

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::{Attrs, Batch, Error, F_ACK, F_CREATE, F_DUMP, F_EXCL, F_REPLACE, Family, Socket, trim_nul};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWQDISC: u16 = 36;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const VETH_INFO_PEER: u16 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_H_ROOT: u32 = u32::MAX;
const TC_LINKLAYER_ETHERNET: u8 = 1;

const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

const AF_INET: u8 = libc::AF_INET as u8;
const IFF_UP: u32 = libc::IFF_UP as u32;
/// The longest interface name (`IFNAMSIZ` less the NUL).
pub const NAME_LEN_MAX: usize = 15;

/// A network link as `RTM_GETLINK` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface index in its namespace.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Whether `IFF_UP` is set.
    pub up: bool,
    /// Index of the bridge it is a port of, if any.
    pub master: Option<u32>,
    /// `IFLA_INFO_KIND`: "bridge", "veth", …; empty for hardware and loopback.
    pub kind: String,
    /// Hardware address.
    pub address: Vec<u8>,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFLA_IFALIAS`: a free text of up to 255 bytes; empty if none.
    pub alias: String,
}

/// An IPv4 address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Interface index.
    pub index: u32,
    /// The address itself.
    pub address: Ipv4Addr,
    /// Length of the network prefix, 0 to 32.
    pub prefix_len: u8,
}

/// A veth pair to make: `name` here, `peer_name` inside `peer_namespace`.
#[derive(Debug)]
pub struct Veth<'a> {
    /// Name of the end in this namespace.
    pub name: &'a str,
    /// Name of the other end.
    pub peer_name: &'a str,
    /// Namespace of the other end.
    pub peer_namespace: BorrowedFd<'a>,
    /// Hardware address of the other end.
    pub peer_address: [u8; 6],
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// Index of the bridge that this end becomes a port of.
    pub master: u32,
}

/// An rtnetlink socket with the requests that Coracle makes.
#[derive(Debug)]
pub struct Route(Socket);

impl Route {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Socket::open(Family::Route).map(Self)
    }

    /// The link called `name`, or `None`.
    ///
    /// # Errors
    /// Any refusal but "no such device".
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        let mut batch = Batch::new();
        batch.begin(RTM_GETLINK, F_ACK, format!("look up link {name}")).put(&ifinfo(0, 0, 0)).attr_str(IFLA_IFNAME, name);
        match self.0.request(batch) {
            Ok(replies) => Ok(replies.iter().find_map(|r| parse_link(&r.payload))),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// A refusal or a malformed reply.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let mut batch = Batch::new();
        batch.begin(RTM_GETLINK, F_DUMP, "list links").put(&ifinfo(0, 0, 0));
        Ok(self.0.request(batch)?.iter().filter_map(|r| parse_link(&r.payload)).collect())
    }

    /// All IPv4 addresses of the namespace.
    ///
    /// # Errors
    /// A refusal or a malformed reply.
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        let mut batch = Batch::new();
        batch.begin(RTM_GETADDR, F_DUMP, "list addresses").put(&[AF_INET, 0, 0, 0, 0, 0, 0, 0]);
        Ok(self.0.request(batch)?.iter().filter_map(|r| parse_address(&r.payload)).collect())
    }

    /// Makes a bridge that forwards at once (no forward delay) and has the given hardware address and alias, and sets it up.
    ///
    /// # Errors
    /// [`Error::is_exists`] when the name is taken.
    pub fn add_bridge(&mut self, name: &str, address: [u8; 6], mtu: u32, alias: &str) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch
            .begin(RTM_NEWLINK, F_ACK | F_CREATE | F_EXCL, format!("add bridge {name}"))
            .put(&ifinfo(0, IFF_UP, IFF_UP))
            .attr_str(IFLA_IFNAME, name)
            .attr(IFLA_ADDRESS, &address)
            .attr_u32(IFLA_MTU, mtu)
            .nest(IFLA_LINKINFO, |b| {
                b.attr_str(IFLA_INFO_KIND, "bridge").nest(IFLA_INFO_DATA, |b| {
                    b.attr_u32(IFLA_BR_FORWARD_DELAY, 0);
                });
            });
        self.0.transact(batch)?;
        self.set_alias(name, alias)
    }

    /// Gives the link called `name` an alias (at most 255 bytes).
    ///
    /// # Errors
    /// A refusal.
    pub fn set_alias(&mut self, name: &str, alias: &str) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch
            .begin(RTM_NEWLINK, F_ACK, format!("set the alias of {name}"))
            .put(&ifinfo(0, 0, 0))
            .attr_str(IFLA_IFNAME, name)
            .attr(IFLA_IFALIAS, alias.as_bytes());
        self.0.transact(batch)
    }

    /// Makes a veth pair with one end inside its namespace from the start, this end up, one queue each way (more cost an RCU wait under
    /// RTNL), and this end a bridge port in hairpin mode: a pod may reach itself through its own host port.
    ///
    /// # Errors
    /// [`Error::is_exists`] when a name is taken in either namespace. No half-made pair stays.
    pub fn add_veth(&mut self, veth: &Veth<'_>) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch
            .begin(RTM_NEWLINK, F_ACK | F_CREATE | F_EXCL, format!("add veth {}", veth.name))
            .put(&ifinfo(0, IFF_UP, IFF_UP))
            .attr_str(IFLA_IFNAME, veth.name)
            .attr_u32(IFLA_MTU, veth.mtu)
            .attr_u32(IFLA_NUM_TX_QUEUES, 1)
            .attr_u32(IFLA_NUM_RX_QUEUES, 1)
            .attr_u32(IFLA_MASTER, veth.master)
            .nest(IFLA_LINKINFO, |b| {
                b.attr_str(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |b| {
                    b.nest(VETH_INFO_PEER, |b| {
                        // Not up yet: the kernel opens this end before it knows its peer (ENOTCONN).
                        b.put(&ifinfo(0, 0, 0))
                            .attr_str(IFLA_IFNAME, veth.peer_name)
                            .attr_u32(IFLA_NET_NS_FD, veth.peer_namespace.as_raw_fd() as u32)
                            .attr(IFLA_ADDRESS, &veth.peer_address)
                            .attr_u32(IFLA_MTU, veth.mtu)
                            .attr_u32(IFLA_NUM_TX_QUEUES, 1)
                            .attr_u32(IFLA_NUM_RX_QUEUES, 1);
                    });
                });
            });
        batch
            .begin(RTM_NEWLINK, F_ACK, format!("set {} to hairpin mode", veth.name))
            .put(&ifinfo(0, 0, 0))
            .attr_str(IFLA_IFNAME, veth.name)
            .nest(IFLA_LINKINFO, |b| {
                b.attr_str(IFLA_INFO_SLAVE_KIND, "bridge").nest(IFLA_INFO_SLAVE_DATA, |b| {
                    b.attr(IFLA_BRPORT_MODE, &[1]);
                });
            });
        self.0.transact(batch)
    }

    /// Sets the loopback and link `index` up, and gives the link an address and the default route, in one send.
    ///
    /// # Errors
    /// The first refusal.
    pub fn configure_pod(&mut self, index: u32, address: Ipv4Addr, prefix_len: u8, gateway: Ipv4Addr) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch.begin(RTM_NEWLINK, F_ACK, "set loopback up").put(&ifinfo(1, IFF_UP, IFF_UP));
        batch.begin(RTM_NEWLINK, F_ACK, format!("set link {index} up")).put(&ifinfo(index, IFF_UP, IFF_UP));
        put_address(&mut batch, index, address, prefix_len);
        batch
            .begin(RTM_NEWROUTE, F_ACK | F_CREATE | F_EXCL, format!("add default route by {gateway}"))
            .put(&[AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0])
            .attr(RTA_GATEWAY, &gateway.octets())
            .attr_u32(RTA_OIF, index);
        self.0.transact(batch)
    }

    /// Gives link `index` an address.
    ///
    /// # Errors
    /// [`Error::is_exists`] when it has it already.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix_len: u8) -> Result<(), Error> {
        let mut batch = Batch::new();
        put_address(&mut batch, index, address, prefix_len);
        self.0.transact(batch)
    }

    /// Limits what link `index` sends, in bits per second, by a token bucket: bursts of 50 ms (at least 64 KiB), a queue of 25 ms behind it.
    ///
    /// # Errors
    /// [`Error::is_not_found`] when the kernel has no token bucket filter.
    pub fn limit_rate(&mut self, index: u32, bits_per_second: u64) -> Result<(), Error> {
        let rate = (bits_per_second / 8).max(1);
        let burst = u32::try_from(rate / 20).unwrap_or(u32::MAX / 2).clamp(64 * 1024, u32::MAX / 2);
        let limit = u32::try_from(rate / 40).unwrap_or(u32::MAX / 2).min(u32::MAX / 2) + burst;
        let mut header = vec![0u8; 4];
        header.extend_from_slice(&index.to_ne_bytes());
        for word in [1u32 << 16, TC_H_ROOT, 0] {
            header.extend_from_slice(&word.to_ne_bytes());
        }
        // struct tc_tbf_qopt: two tc_ratespec of 12 bytes (the second for a peak rate), limit, buffer (by TCA_TBF_BURST), mtu.
        let mut parameters = vec![0u8; 36];
        parameters[1] = TC_LINKLAYER_ETHERNET;
        parameters[8..12].copy_from_slice(&u32::try_from(rate).unwrap_or(u32::MAX).to_ne_bytes());
        parameters[24..28].copy_from_slice(&limit.to_ne_bytes());
        let mut batch = Batch::new();
        batch
            .begin(RTM_NEWQDISC, F_ACK | F_CREATE | F_REPLACE, format!("limit the rate of link {index}"))
            .put(&header)
            .attr_str(TCA_KIND, "tbf")
            .nest(TCA_OPTIONS, |b| {
                b.attr(TCA_TBF_PARMS, &parameters).attr_u32(TCA_TBF_BURST, burst).attr(TCA_TBF_RATE64, &rate.to_ne_bytes());
            });
        self.0.transact(batch)
    }

    /// Sets link `index` up.
    ///
    /// # Errors
    /// A refusal.
    pub fn set_up(&mut self, index: u32) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch.begin(RTM_NEWLINK, F_ACK, format!("set link {index} up")).put(&ifinfo(index, IFF_UP, IFF_UP));
        self.0.transact(batch)
    }

    /// Deletes links by index, all in one send; those already gone are passed over. Waits for the kernel (about 10 ms each).
    ///
    /// # Errors
    /// The first refusal but "no such device"; the others are still tried.
    pub fn delete_links(&mut self, indexes: &[u32]) -> Result<(), Error> {
        let mut first = None;
        for index in indexes {
            let mut batch = Batch::new();
            batch.begin(RTM_DELLINK, F_ACK, format!("delete link {index}")).put(&ifinfo(*index, 0, 0));
            match self.0.transact(batch) {
                Err(e) if !e.is_not_found() => first = first.or(Some(e)),
                _ => {}
            }
        }
        first.map_or(Ok(()), Err)
    }
}

fn put_address(batch: &mut Batch, index: u32, address: Ipv4Addr, prefix_len: u8) {
    let host_bits = u32::MAX.checked_shr(u32::from(prefix_len)).unwrap_or(0);
    let broadcast = Ipv4Addr::from(u32::from(address) | host_bits);
    let mut header = vec![AF_INET, prefix_len, 0, 0];
    header.extend_from_slice(&index.to_ne_bytes());
    batch
        .begin(RTM_NEWADDR, F_ACK | F_CREATE | F_EXCL, format!("add address {address}/{prefix_len}"))
        .put(&header)
        .attr(IFA_LOCAL, &address.octets())
        .attr(IFA_ADDRESS, &address.octets())
        .attr(IFA_BROADCAST, &broadcast.octets());
}

/// `struct ifinfomsg`.
fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(trim_nul(bytes)).into_owned()
}

pub(crate) fn parse_link(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: word(payload.get(4..)?)?,
        name: String::new(),
        up: word(payload.get(8..)?)? & IFF_UP != 0,
        master: None,
        kind: String::new(),
        address: Vec::new(),
        mtu: 0,
        alias: String::new(),
    };
    for (kind, value) in Attrs(payload.get(16..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_MASTER => link.master = word(value),
            IFLA_ADDRESS => link.address = value.to_vec(),
            IFLA_IFALIAS => link.alias = text(value),
            IFLA_MTU => link.mtu = word(value).unwrap_or(0),
            IFLA_LINKINFO => {
                if let Some((_, name)) = Attrs(value).find(|(k, _)| *k == IFLA_INFO_KIND) {
                    link.kind = text(name);
                }
            }
            _ => {}
        }
    }
    Some(link)
}

pub(crate) fn parse_address(payload: &[u8]) -> Option<Address> {
    let prefix_len = *payload.get(1)?;
    let index = word(payload.get(4..)?)?;
    let (mut local, mut peer) = (None, None);
    for (kind, value) in Attrs(payload.get(8..)?) {
        let octets: Option<[u8; 4]> = value.try_into().ok();
        match kind {
            IFA_LOCAL => local = octets,
            IFA_ADDRESS => peer = octets,
            _ => {}
        }
    }
    Some(Address { index, address: Ipv4Addr::from(local.or(peer)?), prefix_len })
}
