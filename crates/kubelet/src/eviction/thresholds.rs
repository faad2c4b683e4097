//! Thresholds and their flags (upstream pkg/kubelet/eviction/helpers.go `ParseThresholdConfig`, v1.37). Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity;

/// Upstream's `DefaultEvictionHard` (pkg/kubelet/eviction/defaults_linux.go).
pub const HARD_DEFAULT: &str =
    "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,imagefs.inodesFree<5%";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// Memory that the host can still give.
    MemoryAvailable,
    /// Free bytes where the kubelet's directory is.
    NodeFsAvailable,
    /// Free inodes there.
    NodeFsInodesFree,
    /// Free bytes where the runtime keeps images.
    ImageFsAvailable,
    /// Free inodes there.
    ImageFsInodesFree,
    /// Process ids that are free.
    PidAvailable,
}

/// A condition of the node that a signal raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// `MemoryPressure`.
    Memory,
    /// `DiskPressure`.
    Disk,
    /// `PIDPressure`.
    Pid,
}

impl Pressure {
    /// The condition's type.
    pub fn condition(self) -> &'static str {
        match self {
            Self::Memory => "MemoryPressure",
            Self::Disk => "DiskPressure",
            Self::Pid => "PIDPressure",
        }
    }
}

impl Signal {
    const ALL: [(&'static str, Self); 6] = [
        ("memory.available", Self::MemoryAvailable),
        ("nodefs.available", Self::NodeFsAvailable),
        ("nodefs.inodesFree", Self::NodeFsInodesFree),
        ("imagefs.available", Self::ImageFsAvailable),
        ("imagefs.inodesFree", Self::ImageFsInodesFree),
        ("pid.available", Self::PidAvailable),
    ];

    /// The flag's word.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, signal)| *signal == self).map_or("", |(name, _)| name)
    }

    fn parse(text: &str) -> Result<Self, String> {
        if let Some((_, signal)) = Self::ALL.iter().find(|(name, _)| *name == text) {
            return Ok(*signal);
        }
        // Upstream knows these; it derives them itself, and ignores what is said of the first two.
        Err(match text {
            "containerfs.available" | "containerfs.inodesFree" => {
                format!("signal {text} follows nodefs or imagefs and cannot be set")
            }
            "allocatableMemory.available" => format!("signal {text} is not carried out by this kubelet"),
            _ => format!("unsupported eviction signal {text}"),
        })
    }

    /// The condition that it raises.
    pub fn pressure(self) -> Pressure {
        match self {
            Self::MemoryAvailable => Pressure::Memory,
            Self::PidAvailable => Pressure::Pid,
            _ => Pressure::Disk,
        }
    }

    /// The resource that is short, in upstream's word.
    pub fn resource(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory",
            Self::NodeFsAvailable | Self::ImageFsAvailable => "ephemeral-storage",
            Self::NodeFsInodesFree | Self::ImageFsInodesFree => "inodes",
            Self::PidAvailable => "pids",
        }
    }
}

/// An amount, or a share of what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// Bytes, inodes or process ids.
    Absolute(i64),
    /// A part of the capacity, 0 to 1; of upstream's precision, so that thresholds are the same to the byte.
    Share(f32),
}

impl Amount {
    /// In units, given the capacity.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    pub fn of(self, capacity: i64) -> i64 {
        match self {
            Self::Absolute(amount) => amount,
            Self::Share(share) => (capacity as f64 * f64::from(share)) as i64,
        }
    }
}

/// Below its value the signal is met; soft when there is a grace period.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// What is measured.
    pub signal: Signal,
    /// The bound.
    pub value: Amount,
    /// How long it must be met before pods are evicted; zero is a hard threshold.
    pub grace: Duration,
    /// What is won beyond the bound once pods are evicted.
    pub min_reclaim: Option<Amount>,
}

impl Threshold {
    /// True when pods are evicted at once.
    pub fn is_hard(&self) -> bool {
        self.grace.is_zero()
    }
}

/// A flag's name and what is wrong with it.
pub type Wrong = (&'static str, String);

/// The thresholds of the four flags.
///
/// # Errors
/// The flag and why it cannot be used.
pub fn parse(hard: &[String], soft: &[String], grace: &[String], reclaim: &[String]) -> Result<Vec<Threshold>, Wrong> {
    let of = |flag, list| thresholds(list).map_err(|text| (flag, text));
    let mut all = of("eviction-hard", hard)?;
    let mut soft = of("eviction-soft", soft)?;
    let grace = grace_periods(grace).map_err(|text| ("eviction-soft-grace-period", text))?;
    for threshold in &mut soft {
        let period = grace.get(&threshold.signal).copied();
        threshold.grace = period.ok_or_else(|| {
            let text = format!("grace period must be specified for the soft eviction threshold {}", threshold.signal.name());
            ("eviction-soft", text)
        })?;
    }
    all.extend(soft);
    let reclaim = reclaims(reclaim).map_err(|text| ("eviction-minimum-reclaim", text))?;
    for threshold in &mut all {
        threshold.min_reclaim = reclaim.get(&threshold.signal).copied();
    }
    Ok(all)
}

/// `A<B` or `A=B` entries as a map: a later one of the same key wins.
fn entries(list: &[String], separator: char) -> Result<BTreeMap<&str, &str>, String> {
    let pairs = list.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
    pairs
        .map(|text| match text.split_once(separator) {
            Some((key, value)) => Ok((key.trim(), value.trim())),
            None => Err(format!("malformed pair, expect string{separator}string: {text:?}")),
        })
        .collect()
}

fn thresholds(list: &[String]) -> Result<Vec<Threshold>, String> {
    let mut found = Vec::new();
    for (key, text) in entries(list, '<')? {
        let signal = Signal::parse(key)?;
        // None and all of it are no thresholds.
        if text == "0%" || text == "100%" {
            continue;
        }
        let value = match text.strip_suffix('%') {
            Some(percent) => Amount::Share(share(percent, text, key, "eviction percentage threshold")?),
            None => match amount(text)? {
                bytes if bytes > 0 => Amount::Absolute(bytes),
                _ => return Err(format!("eviction threshold {key} must be positive: {text}")),
            },
        };
        found.push(Threshold { signal, value, grace: Duration::ZERO, min_reclaim: None });
    }
    Ok(found)
}

fn share(percent: &str, text: &str, key: &str, noun: &str) -> Result<f32, String> {
    let number: f32 = percent.parse().map_err(|_| format!("{noun} {key} is no number: {text}"))?;
    match number / 100.0 {
        share if share < 0.0 => Err(format!("{noun} {key} must be >= 0%: {text}")),
        share if share > 1.0 => Err(format!("{noun} {key} must be <= 100%: {text}")),
        share if share.is_nan() => Err(format!("{noun} {key} is no number: {text}")),
        share => Ok(share),
    }
}

fn amount(text: &str) -> Result<i64, String> {
    quantity::value(&Quantity(text.to_owned())).ok_or_else(|| format!("{text:?} is no quantity"))
}

fn grace_periods(list: &[String]) -> Result<BTreeMap<Signal, Duration>, String> {
    let pairs = entries(list, '=')?;
    pairs.into_iter().map(|(key, text)| Ok((Signal::parse(key)?, crate::config::parse_duration(text)?))).collect()
}

fn reclaims(list: &[String]) -> Result<BTreeMap<Signal, Amount>, String> {
    let pairs = entries(list, '=')?;
    let parse = |(key, text): (&str, &str)| {
        let signal = Signal::parse(key)?;
        let value = match text.strip_suffix('%') {
            Some(percent) => match share(percent, text, key, "eviction percentage minimum reclaim")? {
                share if share > 0.0 => Amount::Share(share),
                _ => return Err(format!("eviction percentage minimum reclaim {key} must be positive: {text}")),
            },
            None => match amount(text)? {
                bytes if bytes >= 0 => Amount::Absolute(bytes),
                _ => return Err(format!("negative eviction minimum reclaim specified for {key}")),
            },
        };
        Ok((signal, value))
    };
    pairs.into_iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn flags_as_upstream() {
        let all = parse(&list(HARD_DEFAULT), &[], &[], &list("nodefs.available=1Gi")).expect("upstream's default");
        assert_eq!(all.len(), 5);
        let of = |signal| all.iter().find(|t| t.signal == signal).expect("a threshold");
        assert_eq!(of(Signal::MemoryAvailable).value, Amount::Absolute(100 << 20));
        assert_eq!(of(Signal::NodeFsAvailable).value, Amount::Share(0.1));
        assert_eq!(of(Signal::NodeFsAvailable).min_reclaim, Some(Amount::Absolute(1 << 30)));
        assert!(all.iter().all(Threshold::is_hard));
        assert_eq!(parse(&list(""), &[], &[], &[]), Ok(Vec::new()), "an empty flag turns eviction off");
        assert_eq!(parse(&list("nodefs.available<0%,imagefs.available<100%"), &[], &[], &[]), Ok(Vec::new()));
        let soft = parse(&[], &list("memory.available<1.5Gi"), &list("memory.available=1m30s"), &[]).expect("a soft threshold");
        assert_eq!((soft[0].value, soft[0].grace), (Amount::Absolute(3 << 29), Duration::from_secs(90)));
    }

    #[test]
    fn wrong_flags_are_named() {
        let none: Vec<String> = Vec::new();
        for (hard, soft, grace, reclaim, flag, text) in [
            ("memory<1", "", "", "", "eviction-hard", "unsupported eviction signal memory"),
            ("memory.available", "", "", "", "eviction-hard", "malformed pair"),
            ("memory.available<-1", "", "", "", "eviction-hard", "must be positive"),
            ("memory.available<x", "", "", "", "eviction-hard", "is no quantity"),
            ("nodefs.available<101%", "", "", "", "eviction-hard", "must be <= 100%"),
            ("containerfs.available<1%", "", "", "", "eviction-hard", "cannot be set"),
            ("allocatableMemory.available<1%", "", "", "", "eviction-hard", "not carried out"),
            ("", "memory.available<1Gi", "", "", "eviction-soft", "grace period must be specified"),
            ("", "", "memory.available=x", "", "eviction-soft-grace-period", "is no duration"),
            ("", "", "", "nodefs.available=0%", "eviction-minimum-reclaim", "must be positive"),
            ("", "", "", "nodefs.available=-1", "eviction-minimum-reclaim", "negative"),
        ] {
            let list = |text: &str| if text.is_empty() { none.clone() } else { list(text) };
            let wrong = parse(&list(hard), &list(soft), &list(grace), &list(reclaim)).expect_err("a wrong flag");
            assert!(wrong.0 == flag && wrong.1.contains(text), "{hard}{soft}{grace}{reclaim}: {wrong:?}");
        }
    }

    #[test]
    fn shares_are_of_the_capacity() {
        assert_eq!(Amount::Share(0.1).of(1000), 100);
        assert_eq!(Amount::Absolute(5).of(1000), 5);
    }
}
