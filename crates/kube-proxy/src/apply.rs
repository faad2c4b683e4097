//! The table in the kernel: read, changed, removed. What to change is decided in [`crate::plan`].

use std::collections::BTreeMap;

use linux::nftables::{Nftables, TableFamily, Transaction};

use crate::Error;
use crate::fragment::Value;
use crate::layout::{self, LAYOUT, Map, Options};
use crate::plan::{Changes, Observed, as_verdict};

const FAMILY: TableFamily = TableFamily::Ipv4;

/// What a sync cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Netlink messages.
    pub messages: usize,
    /// Elements that were added or deleted.
    pub elements: usize,
}

/// The table of this proxy in the network namespace of this process.
#[derive(Debug)]
pub struct Table {
    name: String,
    options: Options,
}

fn kernel(act: String) -> impl FnOnce(linux::netlink::Error) -> Error {
    move |source| Error::Kernel { act, source }
}

impl Table {
    /// A table that is not touched yet.
    pub fn new(name: String, options: Options) -> Self {
        Self { name, options }
    }

    fn act(&self, act: &str) -> String {
        format!("{act} nftables table {}", self.name)
    }

    /// What it holds; `None` if it is not there or not of this layout.
    ///
    /// # Errors
    /// A refusal of the kernel.
    pub fn observe(&self) -> Result<Option<Observed>, Error> {
        let act = || self.act("read");
        let mut nft = Nftables::open().map_err(kernel(act()))?;
        let chains = nft.chains(FAMILY, &self.name).map_err(kernel(act()))?;
        if !chains.iter().any(|chain| chain == LAYOUT) {
            return Ok(None);
        }
        let mut elements = BTreeMap::new();
        for map in Map::ALL {
            if map.is_verdict() {
                let found = nft.verdicts(FAMILY, &self.name, map.name()).map_err(kernel(act()))?;
                elements.extend(found.into_iter().map(|(key, verdict)| ((map, key), Value::Verdict(verdict))));
            } else {
                let found = nft.elements(FAMILY, &self.name, map.name()).map_err(kernel(act()))?;
                let value = |bytes: Vec<u8>| if bytes.is_empty() { Value::None } else { Value::Bytes(bytes) };
                elements.extend(found.into_iter().map(|(key, bytes)| ((map, key), value(bytes))));
            }
        }
        let chains = chains.into_iter().filter(|chain| !layout::is_fixed(chain)).collect();
        Ok(Some(Observed { elements, chains }))
    }

    /// Whether all chains are there that should be: another program may have flushed the ruleset.
    ///
    /// # Errors
    /// A refusal of the kernel.
    pub fn is_whole(&self, expected: &std::collections::BTreeSet<String>) -> Result<bool, Error> {
        let act = || self.act("read");
        let mut nft = Nftables::open().map_err(kernel(act()))?;
        let chains = nft.chains(FAMILY, &self.name).map_err(kernel(act()))?;
        Ok(chains.iter().any(|chain| chain == LAYOUT) && expected.iter().all(|name| chains.contains(name)))
    }

    /// Carries out changes, and nothing else.
    ///
    /// # Errors
    /// The kernel's first refusal; nothing is changed then.
    pub fn apply(&self, changes: &Changes) -> Result<Cost, Error> {
        if changes.is_empty() {
            return Ok(Cost::default());
        }
        self.commit(Transaction::new(FAMILY, &self.name), changes)
    }

    /// Writes the fixed part, and carries out changes; what is not among them stays in force all the while.
    ///
    /// # Errors
    /// As [`Table::apply`].
    pub fn take_over(&self, changes: &Changes) -> Result<Cost, Error> {
        let mut t = Transaction::new(FAMILY, &self.name);
        layout::set_up(&mut t, &self.options);
        self.commit(t, changes)
    }

    /// Replaces the whole table, in one step.
    ///
    /// # Errors
    /// As [`Table::apply`].
    pub fn replace(&self, changes: &Changes) -> Result<Cost, Error> {
        let mut t = Transaction::new(FAMILY, &self.name);
        t.add_table().delete_table();
        layout::set_up(&mut t, &self.options);
        self.commit(t, changes)
    }

    fn commit(&self, mut t: Transaction, changes: &Changes) -> Result<Cost, Error> {
        put(&mut t, changes);
        let cost = Cost { messages: t.messages(), elements: changes.elements() };
        let act = self.act("write");
        Nftables::open().and_then(|mut nft| t.commit(&mut nft)).map_err(kernel(act))?;
        Ok(cost)
    }

    /// Deletes chains that nothing leads to.
    ///
    /// # Errors
    /// A refusal: kernels before 6.2 count a deleted element as a way to its chain for a moment.
    pub fn delete_chains(&self, names: &[String]) -> Result<(), Error> {
        let mut t = Transaction::new(FAMILY, &self.name);
        for name in names {
            t.delete_chain(name);
        }
        let act = self.act("delete unused chains of");
        Nftables::open().and_then(|mut nft| t.commit(&mut nft)).map_err(kernel(act))
    }

    /// Removes the table, if it is there.
    ///
    /// # Errors
    /// A refusal of the kernel.
    pub fn remove(&self) -> Result<(), Error> {
        let act = || self.act("remove");
        let mut nft = Nftables::open().map_err(kernel(act()))?;
        if !nft.tables(FAMILY).map_err(kernel(act()))?.contains(&self.name) {
            return Ok(());
        }
        let mut t = Transaction::new(FAMILY, &self.name);
        t.delete_table();
        t.commit(&mut nft).map_err(kernel(act()))
    }
}

/// Chains first, for elements and rules lead to them; what leads to a chain goes before its rules do.
fn put(t: &mut Transaction, changes: &Changes) {
    for name in &changes.new_chains {
        t.add_chain(name, None);
    }
    for (map, keys) in &changes.delete {
        t.delete_elements(map.name(), keys);
    }
    for name in &changes.flush {
        t.flush_chain(name);
    }
    for (map, elements) in &changes.add {
        if map.is_verdict() {
            let verdicts: Vec<_> = elements.iter().filter_map(|(key, value)| Some((key.clone(), as_verdict(value)?.clone()))).collect();
            t.add_verdicts(map.name(), &verdicts);
        } else {
            let bytes = |value: &Value| if let Value::Bytes(bytes) = value { bytes.clone() } else { Vec::new() };
            let plain: Vec<_> = elements.iter().map(|(key, value)| (key.clone(), bytes(value))).collect();
            t.add_elements(map.name(), &plain);
        }
    }
    for (chain, rules) in &changes.rules {
        for rule in rules {
            t.add_rule(chain, rule);
        }
    }
}
