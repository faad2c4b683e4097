//! Which thresholds are met, what the node's conditions are, and which threshold pods are evicted for
//! (upstream pkg/kubelet/eviction/eviction_manager.go `synchronize`, v1.37). Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::eviction::thresholds::{Pressure, Signal, Threshold};

/// What was measured of one signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What there is.
    pub capacity: i64,
    /// What of it is free.
    pub available: i64,
}

/// What was measured, by signal; what could not be measured is missing and meets no threshold.
pub type Observations = BTreeMap<Signal, Observation>;

/// What is remembered from one look to the next.
#[derive(Clone, Debug, Default)]
pub struct State {
    first_seen: Vec<(Threshold, Instant)>,
    last_seen: BTreeMap<Pressure, Instant>,
    met: Vec<Threshold>,
}

/// What one look decides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// What the node is short of.
    pub pressures: Vec<Pressure>,
    /// Thresholds that pods are to be evicted for, the most urgent first.
    pub thresholds: Vec<Threshold>,
}

/// The thresholds that are met; with `reclaiming`, also those that are not yet passed by what is to be won beyond.
pub fn met(thresholds: &[Threshold], seen: &Observations, reclaiming: bool) -> Vec<Threshold> {
    let is_met = |threshold: &&Threshold| {
        let Some(seen) = seen.get(&threshold.signal) else { return false };
        let beyond = threshold.min_reclaim.filter(|_| reclaiming).map_or(0, |amount| amount.of(seen.capacity));
        threshold.value.of(seen.capacity).saturating_add(beyond) > seen.available
    };
    thresholds.iter().filter(is_met).copied().collect()
}

/// One look. `transition` is how long a condition stays after it was last seen.
pub fn look(state: &mut State, thresholds: &[Threshold], seen: &Observations, transition: Duration, now: Instant) -> Decision {
    let mut current = met(thresholds, seen, false);
    for unresolved in met(&state.met, seen, true) {
        if !current.contains(&unresolved) {
            current.push(unresolved);
        }
    }
    let since = |threshold: &Threshold| state.first_seen.iter().find(|(t, _)| t == threshold).map_or(now, |(_, at)| *at);
    state.first_seen = current.iter().map(|threshold| (*threshold, since(threshold))).collect();
    state.last_seen.extend(current.iter().map(|threshold| (threshold.signal.pressure(), now)));
    let is_met = |pressure: Pressure| current.iter().any(|threshold| threshold.signal.pressure() == pressure);
    state.last_seen.retain(|pressure, at| is_met(*pressure) || now.duration_since(*at) < transition);
    let ripe = state.first_seen.iter().filter(|(threshold, at)| now.duration_since(*at) >= threshold.grace);
    state.met = ripe.map(|(threshold, _)| *threshold).collect();
    let mut urgent = state.met.clone();
    // Memory first: its want is the most harmful (`byEvictionPriority`).
    urgent.sort_by_key(|threshold| threshold.signal != Signal::MemoryAvailable);
    Decision { pressures: state.last_seen.keys().copied().collect(), thresholds: urgent }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::thresholds::parse;

    fn seen(signal: Signal, available: i64) -> Observations {
        Observations::from([(signal, Observation { capacity: 1000, available })])
    }

    #[test]
    fn hard_thresholds_act_at_once_and_conditions_linger() {
        let flags = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let thresholds = parse(&flags("nodefs.available<10%"), &[], &[], &flags("nodefs.available=50")).expect("flags");
        let mut state = State::default();
        let begin = Instant::now();
        let transition = Duration::from_secs(300);
        let mut look_at = |available, seconds| {
            let now = begin + Duration::from_secs(seconds);
            let decision = look(&mut state, &thresholds, &seen(Signal::NodeFsAvailable, available), transition, now);
            (decision.pressures, decision.thresholds.len())
        };
        assert_eq!(look_at(100, 0), (vec![], 0), "what equals the bound does not meet it");
        assert_eq!(look_at(99, 10), (vec![Pressure::Disk], 1));
        assert_eq!(look_at(149, 20), (vec![Pressure::Disk], 1), "50 more than the bound are to be won");
        assert_eq!(look_at(150, 30), (vec![Pressure::Disk], 0));
        assert_eq!(look_at(150, 319), (vec![Pressure::Disk], 0), "the condition was last seen at 20 s");
        assert_eq!(look_at(150, 320), (vec![], 0));
        assert_eq!(look_at(140, 330), (vec![], 0), "only what is being reclaimed goes beyond the bound");
    }

    #[test]
    fn soft_thresholds_wait_for_their_grace() {
        let flags = |text: &str| vec![text.to_owned()];
        let thresholds = parse(&[], &flags("memory.available<500"), &flags("memory.available=30s"), &[]).expect("flags");
        let mut state = State::default();
        let begin = Instant::now();
        let mut look_at = |available, seconds| {
            let now = begin + Duration::from_secs(seconds);
            let decision = look(&mut state, &thresholds, &seen(Signal::MemoryAvailable, available), Duration::ZERO, now);
            (decision.pressures, decision.thresholds.len())
        };
        assert_eq!(look_at(400, 0), (vec![Pressure::Memory], 0));
        assert_eq!(look_at(400, 29), (vec![Pressure::Memory], 0));
        assert_eq!(look_at(600, 29), (vec![], 0), "it was not held");
        assert_eq!(look_at(400, 30), (vec![Pressure::Memory], 0));
        assert_eq!(look_at(400, 60), (vec![Pressure::Memory], 1));
        let blind = look(&mut state, &thresholds, &Observations::new(), Duration::ZERO, begin + Duration::from_secs(70));
        assert_eq!(blind, Decision::default(), "what cannot be measured evicts nothing");
    }

    #[test]
    fn memory_goes_first() {
        let flags = ["nodefs.available<50%", "memory.available<50%"].map(str::to_owned);
        let thresholds = parse(&flags, &[], &[], &[]).expect("flags");
        let mut all = seen(Signal::MemoryAvailable, 1);
        all.extend(seen(Signal::NodeFsAvailable, 1));
        let decision = look(&mut State::default(), &thresholds, &all, Duration::ZERO, Instant::now());
        assert_eq!(decision.thresholds[0].signal, Signal::MemoryAvailable);
        assert_eq!(decision.pressures, [Pressure::Memory, Pressure::Disk]);
    }
}
