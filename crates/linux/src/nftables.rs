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
const GETCHAIN: u16 = 4;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
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
const SET_DESC: u16 = 9;
const SET_DESC_SIZE: u16 = 1;
const SET_ID: u16 = 10;
const SET_FLAG_MAP: u32 = 8;
const SET_FLAG_TIMEOUT: u32 = 0x10;
const SET_FLAG_EVAL: u32 = 0x20;
/// The type of data that is a verdict.
const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;
const CODE_DROP: i32 = 0;
const CODE_JUMP: i32 = -3;
const CODE_GOTO: i32 = -4;
const CODE_RETURN: i32 = -5;
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
/// As above, with a chain's name of up to 255 bytes in each.
const VERDICTS_PER_MESSAGE: usize = 128;

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
    /// For this host.
    Input = 1,
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
    /// A number of 4 bytes in the host's order.
    Mark = 19,
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

/// What a verdict map does with a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Drops it.
    Drop,
    /// Goes on in another chain, without coming back.
    Goto(String),
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
    /// Loads the bit of conntrack's state (host order; 8 is a new flow).
    CtState { to: u32 },
    /// Loads the type of the destination address (host order, `RTN_*`).
    DestinationType { to: u32 },
    /// Loads the type of the source address (host order, `RTN_*`).
    SourceType { to: u32 },
    /// Loads the packet's mark (host order).
    Mark { to: u32 },
    /// Sets the packet's mark.
    SetMark { from: u32 },
    /// Loads bytes.
    Load { to: u32, bytes: Vec<u8> },
    /// Loads a random number below `modulus` (host order).
    Random { modulus: u32, to: u32 },
    /// Goes on only if the register equals the bytes.
    Equal { from: u32, bytes: Vec<u8> },
    /// Goes on only if the register differs from the bytes.
    NotEqual { from: u32, bytes: Vec<u8> },
    /// `register = register & mask`, in place.
    Mask { register: u32, mask: Vec<u8> },
    /// `register = (register & mask) ^ xor`, in place.
    Bitwise { register: u32, mask: Vec<u8>, xor: Vec<u8> },
    /// Goes on only if the key is in the set; a map's value is loaded into `to`.
    Lookup { set: String, from: u32, to: Option<u32> },
    /// Goes on only if the key is not in the set.
    NotIn { set: String, from: u32 },
    /// Does what the verdict map says for the key; goes on if it has none.
    Verdict { map: String, from: u32 },
    /// Puts key and value into a dynamic map, or keeps the element there for another `timeout_ms` milliseconds. Goes on only if there was
    /// room.
    Update { map: String, key: u32, value: u32, timeout_ms: u64 },
    /// Takes a key out of a dynamic map (`value` is any register with as many bytes as its values); goes on whether it was there or not.
    Forget { map: String, key: u32, value: u32 },
    /// Destination NAT to the address and port in two registers.
    Dnat { address: u32, port: u32 },
    /// Source NAT to the outgoing interface's address.
    Masquerade,
    /// As [`Expr::Masquerade`], with random ports, so that flows that begin at the same time do not collide.
    MasqueradeRandom,
    /// Answers that the port is unreachable, and drops the packet.
    Reject,
    /// Drops the packet.
    Drop,
    /// Goes through another chain and comes back.
    Jump(String),
    /// Goes on in another chain, without coming back.
    Goto(String),
    /// Goes back to the chain that jumped here.
    Return,
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
        if set.value.is_empty() {
            self.new_set(set.name, set.key, 0, None, None)
        } else {
            self.new_set(set.name, set.key, SET_FLAG_MAP, Some((concatenated(set.value), set.value.len())), None)
        }
    }

    /// Makes a map from keys to verdicts.
    pub fn add_verdict_map(&mut self, name: &str, key: &[DataType]) -> &mut Self {
        // The kernel knows a verdict's length.
        self.new_set(name, key, SET_FLAG_MAP, Some((DATA_TYPE_VERDICT, 0)), None)
    }

    /// Makes a map that packets fill ([`Expr::Update`]) with at most `size` elements, each of which goes after its time.
    pub fn add_dynamic_map(&mut self, map: &Set<'_>, size: u32) -> &mut Self {
        let flags = SET_FLAG_MAP | SET_FLAG_TIMEOUT | SET_FLAG_EVAL;
        self.new_set(map.name, map.key, flags, Some((concatenated(map.value), map.value.len())), Some(size))
    }

    fn new_set(&mut self, name: &str, key: &[DataType], flags: u32, data: Option<(u32, usize)>, size: Option<u32>) -> &mut Self {
        self.sets += 1;
        let (table, id) = (&self.table.clone(), self.sets);
        let batch = self.begin(NEWSET, F_CREATE, format!("add nftables set {name}"));
        batch
            .attr_str(SET_TABLE, table)
            .attr_str(SET_NAME, name)
            .attr_be32(SET_FLAGS, flags)
            .attr_be32(SET_KEY_TYPE, concatenated(key))
            .attr_be32(SET_KEY_LEN, 4 * key.len() as u32);
        if let Some((data_type, fields)) = data {
            batch.attr_be32(SET_DATA_TYPE, data_type);
            if fields > 0 {
                batch.attr_be32(SET_DATA_LEN, 4 * fields as u32);
            }
        }
        if let Some(size) = size {
            batch.nest(SET_DESC, |b| {
                b.attr_be32(SET_DESC_SIZE, size);
            });
        }
        batch.attr_be32(SET_ID, id);
        self
    }

    /// Deletes the rules of a chain; it must be there.
    pub fn flush_chain(&mut self, name: &str) -> &mut Self {
        let table = &self.table.clone();
        self.begin(DELRULE, 0, format!("flush nftables chain {name}")).attr_str(RULE_TABLE, table).attr_str(RULE_CHAIN, name);
        self
    }

    /// Deletes a chain; it must be there, and nothing may lead to it.
    pub fn delete_chain(&mut self, name: &str) -> &mut Self {
        let table = &self.table.clone();
        self.begin(DELCHAIN, 0, format!("delete nftables chain {name}")).attr_str(CHAIN_TABLE, table).attr_str(CHAIN_NAME, name);
        self
    }

    /// Number of messages so far.
    pub fn messages(&self) -> usize {
        self.batch.len()
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

    /// Adds keys to a verdict map. A key that is there with the same verdict is no error.
    pub fn add_verdicts(&mut self, map: &str, elements: &[(Vec<u8>, Verdict)]) -> &mut Self {
        let table = &self.table.clone();
        for chunk in elements.chunks(VERDICTS_PER_MESSAGE) {
            self.begin(NEWSETELEM, F_CREATE, format!("add to nftables map {map}"))
                .attr_str(ELEM_LIST_TABLE, table)
                .attr_str(ELEM_LIST_SET, map)
                .nest(ELEM_LIST_ELEMENTS, |b| {
                    for (key, verdict) in chunk {
                        b.nest(LIST_ELEM, |b| {
                            data(b, ELEM_KEY, key);
                            b.nest(ELEM_DATA, |b| put_verdict(b, verdict));
                        });
                    }
                });
        }
        self
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
                            data(b, ELEM_KEY, key);
                            if !value.is_empty() {
                                data(b, ELEM_DATA, value);
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

    /// The names of all chains of a table; none if there is no such table.
    ///
    /// # Errors
    /// A refusal or a malformed reply.
    pub fn chains(&mut self, family: TableFamily, table: &str) -> Result<Vec<String>, Error> {
        let mut batch = Batch::new();
        batch.begin(SUBSYS_NFTABLES << 8 | GETCHAIN, F_DUMP, "list nftables chains").put(&nfgen(family as u8, 0));
        let replies = self.0.request(batch)?;
        let names = replies.iter().filter_map(|reply| {
            let attributes = reply.payload.get(4..)?;
            let text = |wanted| Some(String::from_utf8_lossy(trim_nul(find(attributes, wanted)?)).into_owned());
            // A dump is of all tables.
            (text(CHAIN_TABLE)? == table).then(|| text(CHAIN_NAME))?
        });
        Ok(names.collect())
    }

    /// The keys and values of a set's elements.
    ///
    /// # Errors
    /// A refusal (no such set) or a malformed reply.
    pub fn elements(&mut self, family: TableFamily, table: &str, set: &str) -> Result<Vec<Element>, Error> {
        self.dump_elements(family, table, set, |element| {
            let value = |wanted| find(find(element, wanted)?, DATA_VALUE).map(<[u8]>::to_vec);
            Some((value(ELEM_KEY).unwrap_or_default(), value(ELEM_DATA).unwrap_or_default()))
        })
    }

    /// The keys of a verdict map with what each does; others than [`Verdict`] has are left out.
    ///
    /// # Errors
    /// A refusal (no such map) or a malformed reply.
    pub fn verdicts(&mut self, family: TableFamily, table: &str, map: &str) -> Result<Vec<(Vec<u8>, Verdict)>, Error> {
        self.dump_elements(family, table, map, |element| {
            let key = find(find(element, ELEM_KEY)?, DATA_VALUE)?;
            let verdict = find(find(element, ELEM_DATA)?, DATA_VERDICT)?;
            let code = i32::from_be_bytes(find(verdict, VERDICT_CODE)?.try_into().ok()?);
            let verdict = match code {
                CODE_DROP => Verdict::Drop,
                CODE_GOTO => Verdict::Goto(String::from_utf8_lossy(trim_nul(find(verdict, VERDICT_CHAIN)?)).into_owned()),
                _ => return None,
            };
            Some((key.to_vec(), verdict))
        })
    }

    fn dump_elements<T>(
        &mut self,
        family: TableFamily,
        table: &str,
        set: &str,
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let mut batch = Batch::new();
        batch
            .begin(SUBSYS_NFTABLES << 8 | GETSETELEM, F_DUMP | F_ACK, format!("list nftables set {set}"))
            .put(&nfgen(family as u8, 0))
            .attr_str(ELEM_LIST_TABLE, table)
            .attr_str(ELEM_LIST_SET, set);
        let mut elements = Vec::new();
        for reply in self.0.request(batch)? {
            let lists = Attrs(reply.payload.get(4..).unwrap_or(&[])).filter(|(kind, _)| *kind == ELEM_LIST_ELEMENTS);
            elements.extend(lists.flat_map(|(_, list)| Attrs(list)).filter_map(|(_, element)| parse(element)));
        }
        Ok(elements)
    }
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attrs(attributes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
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
        b.attr_be32(1, 0).nest(2, |b| put_code(b, code, chain));
    });
}

fn put_code(b: &mut Batch, code: i32, chain: Option<&str>) {
    b.nest(DATA_VERDICT, |b| {
        b.attr_be32(VERDICT_CODE, code as u32);
        if let Some(chain) = chain {
            b.attr_str(VERDICT_CHAIN, chain);
        }
    });
}

fn put_verdict(b: &mut Batch, verdict: &Verdict) {
    match verdict {
        Verdict::Drop => put_code(b, CODE_DROP, None),
        Verdict::Goto(chain) => put_code(b, CODE_GOTO, Some(chain)),
    }
}

/// A type of address (`NFT_FIB_RESULT_ADDRTYPE`) of the source (1) or the destination (2).
fn address_type(b: &mut Batch, which: u32, to: u32) {
    expression(b, "fib", |b| {
        b.attr_be32(1, to).attr_be32(2, 3).attr_be32(3, which);
    });
}

fn bitwise(b: &mut Batch, register: u32, mask: &[u8], xor: &[u8]) {
    expression(b, "bitwise", |b| {
        b.attr_be32(1, register).attr_be32(2, register).attr_be32(3, mask.len() as u32);
        data(b, 4, mask);
        data(b, 5, xor);
    });
}

fn lookup(b: &mut Batch, set: &str, from: u32, to: Option<u32>, flags: Option<u32>) {
    expression(b, "lookup", |b| {
        b.attr_str(1, set).attr_be32(2, from);
        if let Some(to) = to {
            b.attr_be32(3, to);
        }
        if let Some(flags) = flags {
            b.attr_be32(5, flags);
        }
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
        Expr::CtState { to } => load(b, "ct", 0, *to),
        Expr::DestinationType { to } => address_type(b, 2, *to),
        Expr::SourceType { to } => address_type(b, 1, *to),
        Expr::Mark { to } => load(b, "meta", 3, *to),
        Expr::SetMark { from } => expression(b, "meta", |b| {
            b.attr_be32(2, 3).attr_be32(3, *from);
        }),
        Expr::Load { to, bytes } => expression(b, "immediate", |b| {
            b.attr_be32(1, *to);
            data(b, 2, bytes);
        }),
        Expr::Random { modulus, to } => expression(b, "numgen", |b| {
            b.attr_be32(1, *to).attr_be32(2, *modulus).attr_be32(3, 1).attr_be32(4, 0);
        }),
        Expr::Equal { from, bytes } => compare(b, *from, 0, bytes),
        Expr::NotEqual { from, bytes } => compare(b, *from, 1, bytes),
        Expr::Mask { register, mask } => bitwise(b, *register, mask, &vec![0; mask.len()]),
        Expr::Bitwise { register, mask, xor } => bitwise(b, *register, mask, xor),
        Expr::Lookup { set, from, to } => lookup(b, set, *from, *to, None),
        Expr::NotIn { set, from } => lookup(b, set, *from, None, Some(1)),
        Expr::Verdict { map, from } => lookup(b, map, *from, Some(0), None),
        Expr::Update { map, key, value, timeout_ms } => expression(b, "dynset", |b| {
            b.attr_str(1, map).attr_be32(3, 1).attr_be32(4, *key).attr_be32(5, *value).attr(6, &timeout_ms.to_be_bytes());
        }),
        Expr::Forget { map, key, value } => expression(b, "dynset", |b| {
            b.attr_str(1, map).attr_be32(3, 2).attr_be32(4, *key).attr_be32(5, *value);
        }),
        Expr::Dnat { address, port } => expression(b, "nat", |b| {
            b.attr_be32(1, 1).attr_be32(2, TableFamily::Ipv4 as u32).attr_be32(3, *address).attr_be32(5, *port);
        }),
        Expr::Masquerade => expression(b, "masq", |_| {}),
        Expr::MasqueradeRandom => expression(b, "masq", |b| {
            b.attr_be32(1, 1 << 4);
        }),
        Expr::Reject => expression(b, "reject", |b| {
            b.attr_be32(1, 0).attr(2, &[3]);
        }),
        Expr::Drop => verdict(b, CODE_DROP, None),
        Expr::Jump(chain) => verdict(b, CODE_JUMP, Some(chain)),
        Expr::Goto(chain) => verdict(b, CODE_GOTO, Some(chain)),
        Expr::Return => verdict(b, CODE_RETURN, None),
    }
}
