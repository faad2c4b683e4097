//! nftables over nfnetlink: tables, chains, rules, sets and maps, each change of a [`Transaction`] atomic; no `nft` program needed.
//!
//! Only the expressions that Coracle's rules use are encoded. Facts: `include/uapi/linux/netfilter/nf_tables.h`, nft(8).

use std::net::Ipv4Addr;

use crate::netlink::{Attrs, Batch, Error, F_ACK, F_APPEND, F_CREATE, F_DUMP, Family, Socket, trim_nul};

const SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUM: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LEN: u16 = 7;
const SET_ID: u16 = 10;
const SET_FLAG_MAP: u32 = 8;
const ELEM_LIST_TABLE: u16 = 1;
const ELEM_LIST_SET: u16 = 2;
const ELEM_LIST_ELEMENTS: u16 = 3;
const ELEM_KEY: u16 = 1;
const ELEM_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// Elements per message: far below the 64 KiB that the attribute around them may have.
const ELEMENTS_PER_MESSAGE: usize = 256;

/// The first 32-bit register, and the 128-bit register that starts at the same place.
pub const REG_0: u32 = 8;
/// The second 32-bit register.
pub const REG_1: u32 = 9;
/// The third 32-bit register.
pub const REG_2: u32 = 10;

/// `NFPROTO_*`: which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableFamily {
    /// IPv4 only (`ip`).
    Ipv4 = 2,
    /// IPv6 only (`ip6`).
    Ipv6 = 10,
}

/// Where in the stack a base chain sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting = 0,
    /// Routed through this host.
    Forward = 2,
    /// Made on this host.
    Output = 3,
    /// After routing.
    Postrouting = 4,
}

/// What a base chain is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseChain {
    /// "nat", "filter" or "route".
    pub kind: &'static str,
    /// The hook.
    pub hook: Hook,
    /// Order among the chains of the hook, smaller first: -300 raw, -100 dstnat, 0 filter, 100 srcnat.
    pub priority: i32,
}

/// One of the data types that `nft list` uses to print keys and values (`TYPE_*` of nft's datatype.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    /// An IPv4 address, 4 bytes.
    Ipv4Addr = 7,
    /// A layer 4 protocol number, 1 byte.
    InetProto = 12,
    /// A port, 2 bytes big-endian.
    InetService = 13,
}

/// A named set or map of concatenated fields; every field takes a whole number of 32-bit words.
#[derive(Debug, Clone, Copy)]
pub struct Set<'a> {
    /// Name within the table.
    pub name: &'a str,
    /// Fields of the key.
    pub key: &'a [DataType],
    /// Fields of the value; empty for a plain set.
    pub value: &'a [DataType],
}

/// Key and value of a set's element; the value is empty for a plain set.
pub type Element = (Vec<u8>, Vec<u8>);

/// An expression of a rule; see nft(8) for what each does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Loads `len` bytes at `offset` of the network header.
    Network { offset: u32, len: u32, to: u32 },
    /// Loads `len` bytes at `offset` of the transport header.
    Transport { offset: u32, len: u32, to: u32 },
    /// Loads the layer 4 protocol.
    L4Proto { to: u32 },
    /// Loads the incoming interface's name (16 bytes).
    InputName { to: u32 },
    /// Loads the outgoing interface's name (16 bytes).
    OutputName { to: u32 },
    /// Loads conntrack's status bits (host order).
    CtStatus { to: u32 },
    /// Loads the type of the destination address (host order, `RTN_*`).
    DestinationType { to: u32 },
    /// Goes on only if the register equals the bytes.
    Equal { from: u32, bytes: Vec<u8> },
    /// Goes on only if the register differs from the bytes.
    NotEqual { from: u32, bytes: Vec<u8> },
    /// `register = register & mask`, in place.
    Mask { register: u32, mask: Vec<u8> },
    /// Goes on only if the key is in the set; a map's value is loaded into `to`.
    Lookup { set: String, from: u32, to: Option<u32> },
    /// Destination NAT to the address and port in two registers.
    Dnat { address: u32, port: u32 },
    /// Source NAT to the outgoing interface's address.
    Masquerade,
    /// Drops the packet.
    Drop,
    /// Goes through another chain and comes back.
    Jump(String),
}

/// The expressions that match an IPv4 address field (`offset` 12 source, 16 destination) against a network.
pub fn match_network(offset: u32, network: Ipv4Addr, prefix_len: u8, equal: bool) -> Vec<Expr> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
    let bytes = (u32::from(network) & mask).to_be_bytes().to_vec();
    vec![
        Expr::Network { offset, len: 4, to: REG_0 },
        Expr::Mask { register: REG_0, mask: mask.to_be_bytes().to_vec() },
        if equal { Expr::Equal { from: REG_0, bytes } } else { Expr::NotEqual { from: REG_0, bytes } },
    ]
}

/// An interface name as the kernel compares it: 16 bytes, NUL-padded.
pub fn interface_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// A list of changes to one table, carried out all or not at all.
#[derive(Debug)]
pub struct Transaction {
    batch: Batch,
    family: TableFamily,
    table: String,
    sets: u32,
}

impl Transaction {
    /// Begins a transaction on `table`.
    pub fn new(family: TableFamily, table: &str) -> Self {
        let mut batch = Batch::new();
        batch.begin(BATCH_BEGIN, 0, "begin an nftables transaction").put(&nfgen(0, SUBSYS_NFTABLES));
        Self { batch, family, table: table.to_owned(), sets: 0 }
    }

    fn begin(&mut self, kind: u16, flags: u16, act: String) -> &mut Batch {
        let header = nfgen(self.family as u8, 0);
        self.batch.begin(SUBSYS_NFTABLES << 8 | kind, flags, act).put(&header)
    }

    /// Makes the table if it is not there.
    pub fn add_table(&mut self) -> &mut Self {
        let table = &self.table.clone();
        self.begin(NEWTABLE, F_CREATE, format!("add nftables table {table}")).attr_str(TABLE_NAME, table);
        self
    }

    /// Deletes the table and all in it; it must be there (put [`Self::add_table`] before it to be sure).
    pub fn delete_table(&mut self) -> &mut Self {
        let table = &self.table.clone();
        self.begin(DELTABLE, 0, format!("delete nftables table {table}")).attr_str(TABLE_NAME, table);
        self
    }

    /// Makes a chain; with `base` it is attached to a hook and lets pass what no rule ends.
    pub fn add_chain(&mut self, name: &str, base: Option<BaseChain>) -> &mut Self {
        let table = &self.table.clone();
        let batch = self.begin(NEWCHAIN, F_CREATE, format!("add nftables chain {name}"));
        batch.attr_str(CHAIN_TABLE, table).attr_str(CHAIN_NAME, name);
        if let Some(base) = base {
            batch.nest(CHAIN_HOOK, |b| {
                b.attr_be32(HOOK_NUM, base.hook as u32).attr_be32(HOOK_PRIORITY, base.priority as u32);
            });
            batch.attr_be32(CHAIN_POLICY, 1).attr_str(CHAIN_TYPE, base.kind);
        }
        self
    }

    /// Makes a set or map.
    pub fn add_set(&mut self, set: &Set<'_>) -> &mut Self {
        self.sets += 1;
        let (table, id) = (&self.table.clone(), self.sets);
        let batch = self.begin(NEWSET, F_CREATE, format!("add nftables set {}", set.name));
        batch
            .attr_str(SET_TABLE, table)
            .attr_str(SET_NAME, set.name)
            .attr_be32(SET_FLAGS, if set.value.is_empty() { 0 } else { SET_FLAG_MAP })
            .attr_be32(SET_KEY_TYPE, concatenated(set.key))
            .attr_be32(SET_KEY_LEN, 4 * set.key.len() as u32);
        if !set.value.is_empty() {
            batch.attr_be32(SET_DATA_TYPE, concatenated(set.value)).attr_be32(SET_DATA_LEN, 4 * set.value.len() as u32);
        }
        batch.attr_be32(SET_ID, id);
        self
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, chain: &str, exprs: &[Expr]) -> &mut Self {
        let table = &self.table.clone();
        self.begin(NEWRULE, F_CREATE | F_APPEND, format!("add a rule to nftables chain {chain}"))
            .attr_str(RULE_TABLE, table)
            .attr_str(RULE_CHAIN, chain)
            .nest(RULE_EXPRESSIONS, |b| {
                for expr in exprs {
                    b.nest(LIST_ELEM, |b| put_expr(b, expr));
                }
            });
        self
    }

    /// Adds elements (key, value; the value is empty for a plain set). An element that is there with the same value is no error.
    pub fn add_elements(&mut self, set: &str, elements: &[Element]) -> &mut Self {
        self.elements(NEWSETELEM, F_CREATE, "add to", set, elements)
    }

    /// Deletes elements by key; each must be there.
    pub fn delete_elements(&mut self, set: &str, keys: &[Vec<u8>]) -> &mut Self {
        let elements: Vec<_> = keys.iter().map(|key| (key.clone(), Vec::new())).collect();
        self.elements(DELSETELEM, 0, "delete from", set, &elements)
    }

    fn elements(&mut self, kind: u16, flags: u16, act: &str, set: &str, elements: &[Element]) -> &mut Self {
        let table = &self.table.clone();
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.begin(kind, flags, format!("{act} nftables set {set}"))
                .attr_str(ELEM_LIST_TABLE, table)
                .attr_str(ELEM_LIST_SET, set)
                .nest(ELEM_LIST_ELEMENTS, |b| {
                    for (key, value) in chunk {
                        b.nest(LIST_ELEM, |b| {
                            b.nest(ELEM_KEY, |b| {
                                b.attr(DATA_VALUE, key);
                            });
                            if !value.is_empty() {
                                b.nest(ELEM_DATA, |b| {
                                    b.attr(DATA_VALUE, value);
                                });
                            }
                        });
                    }
                });
        }
        self
    }

    /// Carries out the changes in the network namespace that `nft` was opened in.
    ///
    /// # Errors
    /// The first refusal; nothing is changed then.
    pub fn commit(mut self, nft: &mut Nftables) -> Result<(), Error> {
        self.batch.begin(BATCH_END, 0, "commit an nftables transaction").put(&nfgen(0, SUBSYS_NFTABLES));
        nft.0.transact(self.batch)
    }
}

/// An nfnetlink socket for nftables.
#[derive(Debug)]
pub struct Nftables(Socket);

impl Nftables {
    /// Opens the socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Socket::open(Family::Netfilter).map(Self)
    }

    /// The names of all tables of a family.
    ///
    /// # Errors
    /// A refusal or a malformed reply.
    pub fn tables(&mut self, family: TableFamily) -> Result<Vec<String>, Error> {
        let mut batch = Batch::new();
        batch.begin(SUBSYS_NFTABLES << 8 | GETTABLE, F_DUMP, "list nftables tables").put(&nfgen(family as u8, 0));
        let replies = self.0.request(batch)?;
        let names = replies.iter().filter_map(|reply| {
            let (_, name) = Attrs(reply.payload.get(4..)?).find(|(kind, _)| *kind == TABLE_NAME)?;
            Some(String::from_utf8_lossy(trim_nul(name)).into_owned())
        });
        Ok(names.collect())
    }

    /// The keys and values of a set's elements.
    ///
    /// # Errors
    /// A refusal (no such set) or a malformed reply.
    pub fn elements(&mut self, family: TableFamily, table: &str, set: &str) -> Result<Vec<Element>, Error> {
        let mut batch = Batch::new();
        batch
            .begin(SUBSYS_NFTABLES << 8 | GETSETELEM, F_DUMP | F_ACK, format!("list nftables set {set}"))
            .put(&nfgen(family as u8, 0))
            .attr_str(ELEM_LIST_TABLE, table)
            .attr_str(ELEM_LIST_SET, set);
        let mut elements = Vec::new();
        for reply in self.0.request(batch)? {
            let lists = Attrs(reply.payload.get(4..).unwrap_or(&[])).filter(|(kind, _)| *kind == ELEM_LIST_ELEMENTS);
            for (_, element) in lists.flat_map(|(_, list)| Attrs(list)) {
                let value = |wanted| {
                    let (_, data) = Attrs(element).find(|(kind, _)| *kind == wanted)?;
                    Attrs(data).find(|(kind, _)| *kind == DATA_VALUE).map(|(_, bytes)| bytes.to_vec())
                };
                elements.push((value(ELEM_KEY).unwrap_or_default(), value(ELEM_DATA).unwrap_or_default()));
            }
        }
        Ok(elements)
    }
}

/// nft's type number of a concatenation: six bits a field.
fn concatenated(fields: &[DataType]) -> u32 {
    fields.iter().fold(0, |all, field| all << 6 | *field as u32)
}

/// `struct nfgenmsg`.
fn nfgen(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn expression(b: &mut Batch, name: &str, fill: impl FnOnce(&mut Batch)) {
    b.attr_str(EXPR_NAME, name).nest(EXPR_DATA, fill);
}

fn data(b: &mut Batch, kind: u16, bytes: &[u8]) {
    b.nest(kind, |b| {
        b.attr(DATA_VALUE, bytes);
    });
}

fn verdict(b: &mut Batch, code: i32, chain: Option<&str>) {
    expression(b, "immediate", |b| {
        b.attr_be32(1, 0).nest(2, |b| {
            b.nest(DATA_VERDICT, |b| {
                b.attr_be32(VERDICT_CODE, code as u32);
                if let Some(chain) = chain {
                    b.attr_str(VERDICT_CHAIN, chain);
                }
            });
        });
    });
}

fn payload(b: &mut Batch, base: u32, offset: u32, len: u32, to: u32) {
    expression(b, "payload", |b| {
        b.attr_be32(1, to).attr_be32(2, base).attr_be32(3, offset).attr_be32(4, len);
    });
}

fn load(b: &mut Batch, name: &str, key: u32, to: u32) {
    expression(b, name, |b| {
        b.attr_be32(1, to).attr_be32(2, key);
    });
}

fn compare(b: &mut Batch, from: u32, op: u32, bytes: &[u8]) {
    expression(b, "cmp", |b| {
        b.attr_be32(1, from).attr_be32(2, op);
        data(b, 3, bytes);
    });
}

/// Writes name and attributes of one expression; numbers are the `NFTA_*` and key values of nf_tables.h.
fn put_expr(b: &mut Batch, expr: &Expr) {
    match expr {
        Expr::Network { offset, len, to } => payload(b, 1, *offset, *len, *to),
        Expr::Transport { offset, len, to } => payload(b, 2, *offset, *len, *to),
        Expr::L4Proto { to } => load(b, "meta", 16, *to),
        Expr::InputName { to } => load(b, "meta", 6, *to),
        Expr::OutputName { to } => load(b, "meta", 7, *to),
        Expr::CtStatus { to } => load(b, "ct", 2, *to),
        Expr::DestinationType { to } => expression(b, "fib", |b| {
            b.attr_be32(1, *to).attr_be32(2, 3).attr_be32(3, 2);
        }),
        Expr::Equal { from, bytes } => compare(b, *from, 0, bytes),
        Expr::NotEqual { from, bytes } => compare(b, *from, 1, bytes),
        Expr::Mask { register, mask } => expression(b, "bitwise", |b| {
            b.attr_be32(1, *register).attr_be32(2, *register).attr_be32(3, mask.len() as u32);
            data(b, 4, mask);
            data(b, 5, &vec![0; mask.len()]);
        }),
        Expr::Lookup { set, from, to } => expression(b, "lookup", |b| {
            b.attr_str(1, set).attr_be32(2, *from);
            if let Some(to) = to {
                b.attr_be32(3, *to);
            }
        }),
        Expr::Dnat { address, port } => expression(b, "nat", |b| {
            b.attr_be32(1, 1).attr_be32(2, TableFamily::Ipv4 as u32).attr_be32(3, *address).attr_be32(5, *port);
        }),
        Expr::Masquerade => expression(b, "masq", |_| {}),
        Expr::Drop => verdict(b, 0, None),
        Expr::Jump(chain) => verdict(b, -3, Some(chain)),
    }
}
