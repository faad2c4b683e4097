//! What a soak does: a pure function of the seed and of what there is.

use std::fmt;

/// A small generator (splitmix64): the same seed gives the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % u64::try_from(limit).unwrap_or(1).max(1)).unwrap_or(0)
    }
}

/// The most Deployments.
pub const DEPLOYMENTS_MAX: usize = 3;
/// The most replicas of one.
pub const REPLICAS_MAX: usize = 4;
/// The most pods that end by themselves and are still to be judged.
pub const TASKS_MAX: usize = 4;

/// The steps of the daemon's clock, in seconds beside the machine's.
pub const CLOCKS: [i64; 5] = [-3600, -40, 0, 40, 3600];

/// What there is before a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct There {
    /// Deployments.
    pub deployments: usize,
    /// Pods that end by themselves.
    pub tasks: usize,
    /// The daemon's clock can be moved.
    pub clock: bool,
    /// The store is a real etcd.
    pub etcd: bool,
}

/// What a round is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All that is known.
    Mixed,
    /// Changes, then a death of the whole `coracle up`.
    Deaths,
}

/// How a registry misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registry {
    /// It sends so many bytes, and then nothing.
    Stalls { bytes: usize },
    /// It sends so many bytes and closes.
    BreaksOff { bytes: usize },
    /// It sends other bytes.
    Lies,
    /// It answers 503.
    IsBusy,
}

/// One thing that is done. `victim` chooses among what is there at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Makes a Deployment.
    CreateDeployment { replicas: usize },
    /// Changes the number of its replicas.
    Scale { victim: usize, replicas: usize },
    /// Changes its template, so that all its pods are replaced.
    Restart { victim: usize },
    /// Deletes it.
    DeleteDeployment { victim: usize },
    /// Deletes a pod of a Deployment.
    DeletePod { victim: usize, grace_seconds: usize },
    /// Makes a pod that writes so many lines and ends with this code.
    CreateTask { lines: usize, code: usize },
    /// `kill -9` of `coracle up`. It is started again at the end of the round.
    KillUp,
    /// `kill -9` of a pod's shim.
    KillShim { victim: usize },
    /// `kill -9` of the keeper.
    KillKeeper,
    /// `kill -9` of a container's first process.
    KillContainer { victim: usize },
    /// `coracle up` is started, and killed so long after.
    KillStarting { milliseconds: usize },
    /// A new image, whose registry misbehaves for so many requests. The pods that are made from then on have it.
    Image { registry: Registry, requests: usize },
    /// The daemon's clock is so many seconds beside the machine's.
    Clock { seconds: i64 },
    /// etcd's process hangs for so long.
    HangEtcd { milliseconds: usize },
    /// `kill -9` of etcd, which is started again after so long.
    KillEtcd { milliseconds: usize },
    /// Nothing, for so long.
    Pause { milliseconds: usize },
}

impl Action {
    /// What it is counted as.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CreateDeployment { .. } => "deployment",
            Self::Scale { .. } => "scale",
            Self::Restart { .. } => "rollout",
            Self::DeleteDeployment { .. } => "delete deployment",
            Self::DeletePod { .. } => "delete pod",
            Self::CreateTask { .. } => "task",
            Self::KillUp => "KILL up",
            Self::KillShim { .. } => "KILL shim",
            Self::KillKeeper => "KILL keeper",
            Self::KillContainer { .. } => "KILL container",
            Self::KillStarting { .. } => "KILL up while it starts",
            Self::Image { registry: Registry::Stalls { .. }, .. } => "REGISTRY stalls",
            Self::Image { registry: Registry::BreaksOff { .. }, .. } => "REGISTRY breaks off",
            Self::Image { registry: Registry::Lies, .. } => "REGISTRY lies",
            Self::Image { registry: Registry::IsBusy, .. } => "REGISTRY is busy",
            Self::Clock { .. } => "CLOCK steps",
            Self::HangEtcd { .. } => "HANG etcd",
            Self::KillEtcd { .. } => "KILL etcd",
            Self::Pause { .. } => "pause",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::CreateDeployment { replicas } => write!(f, " of {replicas}"),
            Self::Scale { replicas, .. } => write!(f, " to {replicas}"),
            Self::DeletePod { grace_seconds, .. } => write!(f, " in {grace_seconds} s"),
            Self::CreateTask { lines, code } => write!(f, " of {lines} lines, exit {code}"),
            Self::Image { registry: Registry::Stalls { bytes } | Registry::BreaksOff { bytes }, requests } => {
                write!(f, " after {bytes} bytes, {requests} times")
            }
            Self::Image { requests, .. } => write!(f, " {requests} times"),
            Self::Clock { seconds } => write!(f, " to {seconds:+} s"),
            Self::HangEtcd { milliseconds } => write!(f, " for {milliseconds} ms"),
            Self::KillEtcd { milliseconds } | Self::KillStarting { milliseconds } => write!(f, " ({milliseconds} ms)"),
            Self::Pause { milliseconds } => write!(f, " {milliseconds} ms"),
            _ => Ok(()),
        }
    }
}

/// The actions of one round: one to three changes, then deaths and other faults, close together.
pub fn round(random: &mut Random, kind: Kind, there: &There) -> Vec<Action> {
    let mut there = there.clone();
    let mut actions = Vec::new();
    if random.below(3) == 0 {
        actions.extend(image(random, &mut there));
    }
    for _ in 0..=random.below(3) {
        let change = change(random, &mut there);
        actions.push(change);
        pause(random, &mut actions, 200);
    }
    if kind == Kind::Deaths {
        actions.push(Action::KillUp);
        for _ in 0..random.below(3) {
            actions.push(Action::KillStarting { milliseconds: random.below(1500) });
        }
        return actions;
    }
    for _ in 0..=random.below(3) {
        actions.push(fault(random, &there));
        pause(random, &mut actions, 400);
    }
    actions
}

/// An image from a registry that misbehaves, and a pod that needs it.
fn image(random: &mut Random, there: &mut There) -> Vec<Action> {
    // An image of the soak is a layer of some megabyte, a configuration and a manifest.
    let bytes = random.below(600_000);
    let registry = match random.below(4) {
        0 => Registry::Stalls { bytes },
        1 => Registry::BreaksOff { bytes },
        2 => Registry::Lies,
        _ => Registry::IsBusy,
    };
    let image = Action::Image { registry, requests: 1 + random.below(2) };
    if there.tasks >= TASKS_MAX {
        return vec![image];
    }
    there.tasks += 1;
    vec![image, task(random)]
}

fn task(random: &mut Random) -> Action {
    Action::CreateTask { lines: 1 + random.below(300), code: random.below(4) * 21 }
}

fn change(random: &mut Random, there: &mut There) -> Action {
    let victim = random.below(1 << 16);
    match random.below(10) {
        0 | 1 if there.tasks < TASKS_MAX => {
            there.tasks += 1;
            task(random)
        }
        2 if there.deployments > 1 => {
            there.deployments -= 1;
            Action::DeleteDeployment { victim }
        }
        3 if there.deployments > 0 => Action::Restart { victim },
        4 | 5 if there.deployments > 0 => Action::DeletePod { victim, grace_seconds: [0, 1, 30][random.below(3)] },
        _ if there.deployments < DEPLOYMENTS_MAX => {
            there.deployments += 1;
            Action::CreateDeployment { replicas: 1 + random.below(REPLICAS_MAX) }
        }
        _ => Action::Scale { victim, replicas: random.below(REPLICAS_MAX + 1) },
    }
}

fn fault(random: &mut Random, there: &There) -> Action {
    let victim = random.below(1 << 16);
    match random.below(12) {
        0..=2 => Action::KillUp,
        3..=5 => Action::KillShim { victim },
        6 => Action::KillKeeper,
        7 if there.clock => Action::Clock { seconds: CLOCKS[random.below(CLOCKS.len())] },
        8 if there.etcd => Action::HangEtcd { milliseconds: random.below(5000) },
        9 if there.etcd => Action::KillEtcd { milliseconds: random.below(3000) },
        _ => Action::KillContainer { victim },
    }
}

fn pause(random: &mut Random, actions: &mut Vec<Action>, most: usize) {
    if random.below(2) == 0 {
        actions.push(Action::Pause { milliseconds: random.below(most) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THERE: There = There { deployments: 2, tasks: 0, clock: true, etcd: true };

    fn rounds(seed: u64, kind: Kind, there: &There) -> Vec<Vec<Action>> {
        let mut random = Random::new(seed);
        (0..100).map(|_| round(&mut random, kind, there)).collect()
    }

    #[test]
    fn a_seed_is_replayed() {
        assert_eq!(rounds(7, Kind::Mixed, &THERE), rounds(7, Kind::Mixed, &THERE));
        assert_ne!(rounds(7, Kind::Mixed, &THERE), rounds(8, Kind::Mixed, &THERE));
    }

    #[test]
    fn every_fault_has_its_turn_where_there_is_the_means() {
        let kinds = |there: &There| {
            let all = rounds(7, Kind::Mixed, there).concat();
            all.iter().map(Action::kind).filter(|kind| kind.starts_with(char::is_uppercase)).collect::<std::collections::BTreeSet<_>>()
        };
        let without = ["KILL container", "KILL keeper", "KILL shim", "KILL up"];
        let registry = ["REGISTRY breaks off", "REGISTRY is busy", "REGISTRY lies", "REGISTRY stalls"];
        assert!(kinds(&There { deployments: 2, ..There::default() }).into_iter().eq(without.into_iter().chain(registry)));
        assert_eq!(kinds(&THERE).len(), without.len() + registry.len() + ["CLOCK steps", "HANG etcd", "KILL etcd"].len());
    }

    #[test]
    fn every_round_of_deaths_kills_the_whole() {
        let all = rounds(7, Kind::Deaths, &THERE);
        assert!(all.iter().all(|actions| actions.iter().filter(|action| **action == Action::KillUp).count() == 1));
        assert!(all.concat().iter().any(|action| matches!(action, Action::KillStarting { .. })));
    }

    #[test]
    fn no_more_is_made_than_is_allowed() {
        let there = There { deployments: DEPLOYMENTS_MAX, tasks: TASKS_MAX, ..There::default() };
        let made = rounds(1, Kind::Mixed, &there).concat();
        assert!(!made.iter().any(|action| matches!(action, Action::CreateTask { .. })), "{made:?}");
    }
}
