//! What the table should hold, what it holds, and the difference. Pure: the kernel is only told what [`Planner::changes`] says.
//!
//! ```text
//!  Service, slices ─> fragments ─set─> wanted ─┐
//!                                              ├─ changes ─> (kernel) ─> done
//!  kernel, at the start or after an error ─> held ─┘
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};

use linux::nftables::Verdict;

use crate::fragment::{ElementKey, Fragment, Rules, Value};
use crate::layout::Map;

/// Whose fragment it is: a Service (namespace and name), or the node (both empty).
pub type Owner = client::ObjectKey;

/// What a chain holds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Held {
    /// These rules.
    Rules(Rules),
    /// Whatever was found.
    Unknown,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Elements of all maps.
    pub elements: BTreeMap<ElementKey, Value>,
    /// Names of the chains that belong to Services.
    pub chains: BTreeSet<String>,
}

/// One transaction's worth of changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Chains to be made.
    pub new_chains: Vec<String>,
    /// Chains to be emptied before rules are added, or because nobody needs them.
    pub flush: Vec<String>,
    /// Elements to be deleted.
    pub delete: BTreeMap<Map, Vec<Vec<u8>>>,
    /// Elements to be added; one that changes is deleted as well.
    pub add: BTreeMap<Map, Vec<(Vec<u8>, Value)>>,
    /// Rules of chains that are new or flushed.
    pub rules: Vec<(String, Rules)>,
}

impl Changes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Number of elements that are touched.
    pub fn elements(&self) -> usize {
        self.delete.values().map(Vec::len).sum::<usize>() + self.add.values().map(Vec::len).sum::<usize>()
    }
}

/// Numbers for names: stable while a name is in use.
#[derive(Debug, Default)]
pub struct Numbers {
    by_name: HashMap<String, u32>,
    taken: BTreeSet<u32>,
}

impl Numbers {
    /// A hash, so that a successor of this process finds the same numbers; the next free one where two collide.
    fn of(&mut self, name: &str) -> u32 {
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let mut number = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        while !self.taken.insert(number) {
            number = number.wrapping_add(1);
        }
        self.by_name.insert(name.to_owned(), number);
        number
    }

    fn free(&mut self, name: &str) {
        if let Some(number) = self.by_name.remove(name) {
            self.taken.remove(&number);
        }
    }
}

/// What the builder of a fragment may ask.
pub struct Desk<'a> {
    numbers: &'a mut Numbers,
    used: BTreeSet<String>,
    held: &'a BTreeMap<ElementKey, Value>,
}

impl Desk<'_> {
    /// The number of a name, the same as long as its owner asks for it.
    pub fn number(&mut self, name: &str) -> u32 {
        self.used.insert(name.to_owned());
        self.numbers.of(name)
    }

    /// Puts the endpoints of a group into slots so that those which the kernel holds already stay where they are, as far as there
    /// are no gaps: a change costs as many slots as endpoints came and went.
    pub fn arrange(&self, group: u32, targets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut left: BTreeSet<Vec<u8>> = targets.into_iter().collect();
        let count = u32::try_from(left.len()).unwrap_or(u32::MAX);
        let kept: Vec<Option<Vec<u8>>> = (0..count)
            .map(|slot| match self.held.get(&(Map::Endpoints, slot_key(group, slot))) {
                Some(Value::Bytes(target)) => left.take(target),
                _ => None,
            })
            .collect();
        kept.into_iter().filter_map(|target| target.or_else(|| left.pop_first())).collect()
    }
}

/// The key of a slot.
pub fn slot_key(group: u32, slot: u32) -> Vec<u8> {
    [group.to_ne_bytes(), slot.to_ne_bytes()].concat()
}

/// The state of all.
#[derive(Debug, Default)]
pub struct Planner {
    fragments: BTreeMap<Owner, Fragment>,
    numbers: Numbers,
    names: BTreeMap<Owner, BTreeSet<String>>,
    /// Who wants which value; the first owner's counts.
    wanted: BTreeMap<ElementKey, BTreeMap<Owner, Value>>,
    held_elements: BTreeMap<ElementKey, Value>,
    held_chains: BTreeMap<String, Held>,
    dirty_elements: BTreeSet<ElementKey>,
    dirty_chains: BTreeSet<String>,
    wanted_chains: BTreeMap<String, Rules>,
}

impl Planner {
    /// Replaces what an owner wants.
    pub fn set(&mut self, owner: &Owner, build: impl FnOnce(&mut Desk<'_>) -> Fragment) {
        let mut desk = Desk { numbers: &mut self.numbers, used: BTreeSet::new(), held: &self.held_elements };
        let fragment = build(&mut desk);
        let used = desk.used;
        let before = self.names.remove(owner).unwrap_or_default();
        for name in before.difference(&used) {
            self.numbers.free(name);
        }
        if !used.is_empty() {
            self.names.insert(owner.clone(), used);
        }
        let old = self.fragments.remove(owner).unwrap_or_default();
        self.exchange_elements(owner, &old, &fragment);
        for (name, rules) in &old.chains {
            if fragment.chains.get(name) != Some(rules) {
                self.wanted_chains.remove(name);
                self.dirty_chains.insert(name.clone());
            }
        }
        for (name, rules) in &fragment.chains {
            if old.chains.get(name) != Some(rules) {
                self.wanted_chains.insert(name.clone(), rules.clone());
                self.dirty_chains.insert(name.clone());
            }
        }
        if fragment != Fragment::default() {
            self.fragments.insert(owner.clone(), fragment);
        }
    }

    fn exchange_elements(&mut self, owner: &Owner, old: &Fragment, new: &Fragment) {
        for key in old.elements.keys().filter(|key| !new.elements.contains_key(*key)) {
            if let Some(owners) = self.wanted.get_mut(key) {
                owners.remove(owner);
                if owners.is_empty() {
                    self.wanted.remove(key);
                }
            }
            self.dirty_elements.insert(key.clone());
        }
        for (key, value) in &new.elements {
            if old.elements.get(key) != Some(value) {
                self.wanted.entry(key.clone()).or_default().insert(owner.clone(), value.clone());
                self.dirty_elements.insert(key.clone());
            }
        }
    }

    /// The owners that want something.
    pub fn owners(&self) -> impl Iterator<Item = &Owner> {
        self.fragments.keys()
    }

    /// What the kernel was found to hold; everything is compared anew.
    pub fn observe(&mut self, observed: Observed) {
        self.dirty_elements = self.wanted.keys().chain(observed.elements.keys()).cloned().collect();
        self.dirty_chains = self.wanted_chains.keys().chain(observed.chains.iter()).cloned().collect();
        self.held_elements = observed.elements;
        self.held_chains = observed.chains.into_iter().map(|name| (name, Held::Unknown)).collect();
    }

    /// The names of the chains that the kernel should have now.
    pub fn chains(&self) -> BTreeSet<String> {
        self.held_chains.keys().cloned().collect()
    }

    fn want(&self, key: &ElementKey) -> Option<&Value> {
        self.wanted.get(key)?.values().next()
    }

    /// The difference between wanted and held.
    pub fn changes(&self) -> Changes {
        let mut changes = Changes::default();
        for name in &self.dirty_chains {
            let held = self.held_chains.get(name);
            match (self.wanted_chains.get(name), held) {
                (Some(rules), Some(Held::Rules(same))) if rules == same => continue,
                (None, None) => continue,
                (None, Some(Held::Rules(rules))) if rules.is_empty() => continue,
                (Some(rules), _) => changes.rules.push((name.clone(), rules.clone())),
                (None, Some(_)) => {}
            }
            let list = if held.is_some() { &mut changes.flush } else { &mut changes.new_chains };
            list.push(name.clone());
        }
        for key in &self.dirty_elements {
            let (wanted, held) = (self.want(key), self.held_elements.get(key));
            if wanted == held {
                continue;
            }
            if held.is_some() {
                changes.delete.entry(key.0).or_default().push(key.1.clone());
            }
            if let Some(value) = wanted {
                changes.add.entry(key.0).or_default().push((key.1.clone(), value.clone()));
            }
        }
        changes
    }

    /// The changes of [`Planner::changes`] are in the kernel. Answers the chains that nothing leads to any more.
    pub fn done(&mut self) -> Vec<String> {
        let mut idle = Vec::new();
        for name in std::mem::take(&mut self.dirty_chains) {
            match self.wanted_chains.get(&name) {
                Some(rules) => drop(self.held_chains.insert(name, Held::Rules(rules.clone()))),
                None if self.held_chains.contains_key(&name) => {
                    self.held_chains.insert(name.clone(), Held::Rules(Rules::new()));
                    idle.push(name);
                }
                None => {}
            }
        }
        for key in std::mem::take(&mut self.dirty_elements) {
            match self.want(&key).cloned() {
                Some(value) => self.held_elements.insert(key, value),
                None => self.held_elements.remove(&key),
            };
        }
        idle
    }

    /// Of some idle chains those that are still so and can be deleted.
    pub fn still_idle(&self, names: &[String]) -> Vec<String> {
        let idle = |name: &&String| self.held_chains.contains_key(*name) && !self.wanted_chains.contains_key(*name);
        names.iter().filter(idle).cloned().collect()
    }

    /// Chains were deleted.
    pub fn deleted(&mut self, names: &[String]) {
        for name in names {
            self.held_chains.remove(name);
        }
    }
}

/// The value of an element that holds a verdict.
pub fn as_verdict(value: &Value) -> Option<&Verdict> {
    match value {
        Value::Verdict(verdict) => Some(verdict),
        Value::None | Value::Bytes(_) => None,
    }
}
