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

/// What there is before a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct There {
    /// Deployments.
    pub deployments: usize,
    /// Pods that end by themselves.
    pub tasks: usize,
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
    /// Nothing, for so long.
    Pause { milliseconds: usize },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateDeployment { replicas } => write!(f, "deployment of {replicas}"),
            Self::Scale { replicas, .. } => write!(f, "scale to {replicas}"),
            Self::Restart { .. } => write!(f, "rollout"),
            Self::DeleteDeployment { .. } => write!(f, "delete deployment"),
            Self::DeletePod { grace_seconds, .. } => write!(f, "delete pod in {grace_seconds} s"),
            Self::CreateTask { lines, code } => write!(f, "task of {lines} lines, exit {code}"),
            Self::KillUp => write!(f, "KILL up"),
            Self::KillShim { .. } => write!(f, "KILL shim"),
            Self::KillKeeper => write!(f, "KILL keeper"),
            Self::KillContainer { .. } => write!(f, "KILL container"),
            Self::Pause { milliseconds } => write!(f, "{milliseconds} ms"),
        }
    }
}

/// The actions of one round: one to three changes, then one to three deaths, close together.
pub fn round(random: &mut Random, there: &There) -> Vec<Action> {
    let mut there = there.clone();
    let mut actions = Vec::new();
    for _ in 0..=random.below(3) {
        let change = change(random, &mut there);
        actions.push(change);
        pause(random, &mut actions, 200);
    }
    for _ in 0..=random.below(3) {
        actions.push(death(random));
        pause(random, &mut actions, 400);
    }
    actions
}

fn change(random: &mut Random, there: &mut There) -> Action {
    let victim = random.below(1 << 16);
    match random.below(10) {
        0 | 1 if there.tasks < TASKS_MAX => {
            there.tasks += 1;
            Action::CreateTask { lines: 1 + random.below(300), code: random.below(4) * 21 }
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

fn death(random: &mut Random) -> Action {
    let victim = random.below(1 << 16);
    match random.below(8) {
        0..=2 => Action::KillUp,
        3 | 4 => Action::KillShim { victim },
        5 => Action::KillKeeper,
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

    #[test]
    fn a_seed_is_replayed() {
        let there = There { deployments: 2, tasks: 0 };
        let rounds = |seed| {
            let mut random = Random::new(seed);
            (0..50).map(|_| round(&mut random, &there)).collect::<Vec<_>>()
        };
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
        let all: Vec<Action> = rounds(7).concat();
        assert!(all.contains(&Action::KillUp) && all.contains(&Action::KillKeeper));
        assert!(rounds(7).iter().all(|actions| actions.iter().any(|action| action.to_string().starts_with("KILL"))));
    }

    #[test]
    fn no_more_is_made_than_is_allowed() {
        let mut random = Random::new(1);
        for _ in 0..200 {
            let made = round(&mut random, &There { deployments: DEPLOYMENTS_MAX, tasks: TASKS_MAX });
            assert!(!made.iter().any(|action| matches!(action, Action::CreateTask { .. })), "{made:?}");
        }
    }
}
