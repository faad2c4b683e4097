//! What a Deployment's ReplicaSets should become: a pure function (`pkg/controller/deployment`, 1.37).
//!
//! ```text
//! being deleted ──────────────> status only
//! paused, or replicas changed ─> scale what is there, in proportion
//! Recreate ──> scale old to 0 ─> wait for their pods ─> make / scale the new one ─> clean up
//! RollingUpdate ─> make / scale the new one up ─> scale old ones down ─> clean up
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::annotations;
use super::status::{self, Progress};
use crate::hash::template_hash;
use crate::objects::{by_creation, controller_ref};

/// The label that tells the ReplicaSets of a Deployment apart.
pub const HASH_LABEL: &str = "pod-template-hash";

/// One effect.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the ReplicaSet of a new template.
    Create(Box<ReplicaSet>),
    /// Write a ReplicaSet; `scaled` holds its old and new size when that changed.
    Update { rs: Box<ReplicaSet>, scaled: Option<(i32, i32)> },
    /// Delete an old ReplicaSet of no use.
    Delete(String),
}

/// All effects of one sync, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// On ReplicaSets.
    pub actions: Vec<Action>,
    /// The Deployment's revision annotation as it should be.
    pub revision: Option<String>,
    /// The Deployment's status as it should be.
    pub status: DeploymentStatus,
    /// When to look again though nothing changes.
    pub requeue_after: Option<Duration>,
}

/// The Deployment with the numbers that all steps need.
pub(super) struct Target<'a> {
    pub(super) d: &'a Deployment,
    pub(super) replicas: i32,
    pub(super) max_surge: i32,
    pub(super) max_unavailable: i32,
    rolling: bool,
}

fn scaled(value: Option<&IntOrString>, total: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(value)) => *value,
        Some(IntOrString::String(text)) => {
            // Validation lets only percentages through.
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent * i64::from(total);
            let value = if round_up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(value).unwrap_or(i32::MAX)
        }
    }
}

impl<'a> Target<'a> {
    pub(super) fn new(d: &'a Deployment) -> Self {
        let replicas = d.spec.replicas.unwrap_or(1);
        let strategy = d.spec.strategy.as_ref();
        let rolling = strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("Recreate");
        let parameters = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let max_surge = scaled(parameters.and_then(|p| p.max_surge.as_ref()), replicas, true);
        let mut max_unavailable = scaled(parameters.and_then(|p| p.max_unavailable.as_ref()), replicas, false);
        if max_surge == 0 && max_unavailable == 0 {
            max_unavailable = 1;
        }
        let max_unavailable = if rolling { max_unavailable.min(replicas) } else { 0 };
        Self { d, replicas, max_surge: if rolling { max_surge } else { 0 }, max_unavailable, rolling }
    }

    fn max_replicas(&self) -> i32 {
        self.replicas.saturating_add(self.max_surge)
    }
}

/// Wanted replicas of a ReplicaSet.
pub(super) fn size(rs: &ReplicaSet) -> i32 {
    rs.spec.replicas.unwrap_or(1)
}

pub(super) fn available(rs: &ReplicaSet) -> i32 {
    rs.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn template(rs: &ReplicaSet) -> PodTemplateSpec {
    let mut template = rs.spec.template.clone().unwrap_or_default();
    if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.remove(HASH_LABEL);
    }
    template
}

/// Whether a ReplicaSet's template is the Deployment's, but for the hash.
pub fn same_template(d: &Deployment, rs: &ReplicaSet) -> bool {
    let mut wanted = d.spec.template.clone();
    if let Some(labels) = wanted.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.remove(HASH_LABEL);
    }
    template(rs) == wanted
}

/// The state that the steps work on. What they change here they also put down as actions.
struct Work<'a> {
    target: Target<'a>,
    old: Vec<ReplicaSet>,
    new: Option<ReplicaSet>,
    changes: BTreeMap<String, (ReplicaSet, Option<(i32, i32)>)>,
    created: Option<ReplicaSet>,
    deleted: Vec<String>,
    revision: Option<String>,
}

/// Decides one sync. `owned` are the Deployment's ReplicaSets; `others_pods` says whether a pod of an old ReplicaSet is
/// still there and not ended (only asked for by Recreate).
pub fn plan(d: &Deployment, owned: &[ReplicaSet], others_pods: bool, now: Timestamp) -> Plan {
    let mut all = owned.to_vec();
    all.sort_by(|a, b| by_creation(&a.metadata, &b.metadata));
    let new_at = all.iter().position(|rs| same_template(d, rs));
    let new = new_at.map(|at| all.remove(at));
    let mut work =
        Work { target: Target::new(d), old: all, new, changes: BTreeMap::new(), created: None, deleted: Vec::new(), revision: None };
    let progress = work.run(others_pods);
    work.finish(progress, now)
}

impl Work<'_> {
    fn run(&mut self, others_pods: bool) -> Progress {
        let d = self.target.d;
        if d.metadata.deletion_timestamp.is_some() {
            return Progress::Untouched;
        }
        let paused = d.spec.paused.unwrap_or(false);
        self.sync_newest();
        if paused {
            self.scale();
            self.clean_up();
            return Progress::Untouched;
        }
        if self.is_scaling() {
            self.scale();
            return Progress::Untouched;
        }
        if self.target.rolling {
            self.roll()
        } else {
            self.recreate(others_pods)
        }
        Progress::Checked
    }

    /// Gives the newest ReplicaSet its revision, annotations and minReadySeconds.
    fn sync_newest(&mut self) {
        let next = self.old.iter().map(annotations::revision).max().unwrap_or(0) + 1;
        let min_ready = self.target.d.spec.min_ready_seconds;
        let Some(new) = &mut self.new else { return };
        let mut changed = annotations::set_newest(self.target.d, new, next);
        if new.spec.min_ready_seconds.unwrap_or(0) != min_ready.unwrap_or(0) {
            new.spec.min_ready_seconds = min_ready;
            changed = true;
        }
        self.revision = new.metadata.annotations.as_ref().and_then(|all| all.get(annotations::REVISION).cloned());
        if changed {
            let new = new.clone();
            self.changes.insert(new.metadata.name.clone().unwrap_or_default(), (new, None));
        }
    }

    fn is_scaling(&self) -> bool {
        self.old.iter().chain(&self.new).filter(|rs| size(rs) > 0).any(|rs| {
            annotations::number(rs, annotations::DESIRED_REPLICAS).is_some_and(|desired| desired != i64::from(self.target.replicas))
        })
    }

    fn replica_set_mut(&mut self, name: &str) -> Option<&mut ReplicaSet> {
        self.old.iter_mut().chain(&mut self.new).find(|rs| rs.metadata.name.as_deref() == Some(name))
    }

    /// Scales one ReplicaSet; `force` also where only the annotations are out of date. True if the size changed.
    fn resize(&mut self, name: &str, to: i32, force: bool) -> bool {
        let (replicas, max) = (self.target.replicas, self.target.max_replicas());
        let Some(rs) = self.replica_set_mut(name) else { return false };
        let from = size(rs);
        if from == to && !force {
            return false;
        }
        let annotated = annotations::set_replicas(rs, replicas, max);
        if from == to && !annotated {
            return false;
        }
        rs.spec.replicas = Some(to);
        let rs = rs.clone();
        // Two scalings of one ReplicaSet in one sync are told as one.
        let first = self.changes.get(name).and_then(|(_, scaled)| *scaled).map_or(from, |(first, _)| first);
        self.changes.insert(name.to_owned(), (rs, (first != to).then_some((first, to))));
        from != to
    }

    fn name(rs: &ReplicaSet) -> String {
        rs.metadata.name.clone().unwrap_or_default()
    }

    fn total(&self) -> i32 {
        self.old.iter().chain(&self.new).map(size).sum()
    }

    /// Brings what is there to the Deployment's size, without a roll-out.
    fn scale(&mut self) {
        let replicas = self.target.replicas;
        let mut active: Vec<ReplicaSet> = self.old.iter().chain(&self.new).filter(|rs| size(rs) > 0).cloned().collect();
        if active.len() <= 1 {
            let only = active.first().or(self.new.as_ref()).or(self.old.last()).map(Self::name);
            if let Some(name) = only {
                self.resize(&name, replicas, false);
            }
            return;
        }
        if self.is_saturated() {
            let old: Vec<String> = self.old.iter().filter(|rs| size(rs) > 0).map(Self::name).collect();
            old.iter().for_each(|name| _ = self.resize(name, 0, false));
            return;
        }
        if !self.target.rolling {
            return;
        }
        let allowed = if replicas > 0 { self.target.max_replicas() } else { 0 };
        let to_add = allowed - active.iter().map(size).sum::<i32>();
        active.sort_by(|a, b| {
            let age = by_creation(&a.metadata, &b.metadata);
            size(b).cmp(&size(a)).then(if to_add > 0 { age.reverse() } else { age })
        });
        let mut added = 0;
        let mut sizes = Vec::new();
        for rs in &active {
            let share = self.proportion(rs, to_add, added);
            added += share;
            sizes.push(size(rs) + share);
        }
        if to_add != 0 {
            sizes[0] = (sizes[0] + to_add - added).max(0);
        }
        for (rs, size) in active.iter().zip(sizes) {
            self.resize(&Self::name(rs), size, true);
        }
    }

    fn is_saturated(&self) -> bool {
        self.new.as_ref().is_some_and(|new| {
            let replicas = self.target.replicas;
            size(new) == replicas
                && available(new) == replicas
                && annotations::number(new, annotations::DESIRED_REPLICAS) == Some(i64::from(replicas))
        })
    }

    /// A ReplicaSet's share of the replicas to add (or, negative, to take away).
    fn proportion(&self, rs: &ReplicaSet, to_add: i32, added: i32) -> i32 {
        if size(rs) == 0 || to_add == 0 || to_add == added {
            return 0;
        }
        let fraction = if self.target.replicas == 0 {
            -size(rs)
        } else {
            let before = annotations::number(rs, annotations::MAX_REPLICAS)
                .filter(|before| *before > 0)
                .or_else(|| self.target.d.status.as_ref()?.replicas.map(i64::from))
                .unwrap_or(0);
            if before == 0 {
                0
            } else {
                let wanted = f64::from(size(rs)) * f64::from(self.target.max_replicas()) / before as f64;
                wanted.round() as i32 - size(rs)
            }
        };
        if to_add > 0 { fraction.min(to_add - added) } else { fraction.max(to_add - added) }
    }

    /// How large the newest ReplicaSet may be now.
    fn newest_size(&self, now: i32) -> i32 {
        if !self.target.rolling {
            return self.target.replicas;
        }
        let room = self.target.max_replicas() - self.total();
        if room <= 0 { now } else { now + room.min(self.target.replicas - now) }
    }

    fn create(&mut self) {
        let d = self.target.d;
        let spec = &d.spec;
        let hash = template_hash(&spec.template, d.status.as_ref().and_then(|status| status.collision_count));
        let mut template = spec.template.clone();
        let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
        labels.insert(HASH_LABEL.to_owned(), hash.clone());
        let labels = labels.clone();
        let mut selector = spec.selector.clone();
        selector.match_labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
        let name = d.metadata.name.as_deref().unwrap_or_default();
        let mut rs = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{}-{hash}", &name[..name.len().min(253 - 1 - hash.len())])),
                namespace: d.metadata.namespace.clone(),
                labels: Some(labels),
                owner_references: Some(vec![controller_ref(d)]),
                ..ObjectMeta::default()
            },
            spec: ReplicaSetSpec {
                replicas: Some(self.newest_size(0)),
                min_ready_seconds: spec.min_ready_seconds,
                selector,
                template: Some(template),
            },
            status: None,
        };
        let next = self.old.iter().map(annotations::revision).max().unwrap_or(0) + 1;
        annotations::set_newest(d, &mut rs, next);
        annotations::set_replicas(&mut rs, self.target.replicas, self.target.max_replicas());
        self.revision = Some(next.to_string());
        self.created = Some(rs.clone());
        self.new = Some(rs);
    }

    fn roll(&mut self) {
        if self.new.is_none() {
            return self.create();
        }
        let Some(new) = &self.new else { return };
        let (name, now, replicas) = (Self::name(new), size(new), self.target.replicas);
        let wanted = if now > replicas { replicas } else { self.newest_size(now) };
        if now != replicas && self.resize(&name, wanted, false) {
            return;
        }
        if self.scale_old_down() {
            return;
        }
        self.clean_up_if_complete();
    }

    /// Takes old replicas away as far as enough stay available: first those that are not, then the oldest.
    fn scale_old_down(&mut self) -> bool {
        let Some(new) = &self.new else { return false };
        let min_available = self.target.replicas - self.target.max_unavailable;
        let new_unavailable = size(new) - available(new);
        let budget = self.total() - min_available - new_unavailable;
        if self.old.iter().map(size).sum::<i32>() == 0 || budget <= 0 {
            return false;
        }
        let mut unhealthy_left = budget;
        let mut scaled_down = false;
        for rs in self.old.clone() {
            let unhealthy = (size(&rs) - available(&rs)).clamp(0, unhealthy_left.max(0));
            if unhealthy > 0 {
                unhealthy_left -= unhealthy;
                scaled_down |= self.resize(&Self::name(&rs), size(&rs) - unhealthy, false);
            }
        }
        let mut left = self.old.iter().chain(&self.new).map(available).sum::<i32>() - min_available;
        for rs in self.old.clone() {
            let down = size(&rs).min(left.max(0));
            if down > 0 {
                left -= down;
                scaled_down |= self.resize(&Self::name(&rs), size(&rs) - down, false);
            }
        }
        scaled_down
    }

    fn recreate(&mut self, others_pods: bool) {
        let active: Vec<String> = self.old.iter().filter(|rs| size(rs) > 0).map(Self::name).collect();
        if !active.is_empty() {
            active.iter().for_each(|name| _ = self.resize(name, 0, false));
            return;
        }
        let running: i32 = self.old.iter().filter_map(|rs| rs.status.as_ref()).map(|status| status.replicas).sum();
        if running > 0 || others_pods {
            return;
        }
        match &self.new {
            None => self.create(),
            Some(new) => {
                let name = Self::name(new);
                self.resize(&name, self.target.replicas, false);
                self.clean_up_if_complete();
            }
        }
    }

    fn clean_up_if_complete(&mut self) {
        let d = self.target.d;
        if d.status.as_ref().is_some_and(|status| status::is_complete(&self.target, status)) {
            self.clean_up();
        }
    }

    /// Deletes the oldest ReplicaSets beyond the history limit that have nothing left.
    fn clean_up(&mut self) {
        let limit = self.target.d.spec.revision_history_limit;
        let Some(limit) = limit.filter(|limit| *limit != i32::MAX) else { return };
        let mut old: Vec<&ReplicaSet> = self.old.iter().filter(|rs| rs.metadata.deletion_timestamp.is_none()).collect();
        let surplus = old.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        old.sort_by(|a, b| annotations::revision(a).cmp(&annotations::revision(b)).then(by_creation(&a.metadata, &b.metadata)));
        let idle = |rs: &&&ReplicaSet| {
            let status = rs.status.clone().unwrap_or_default();
            size(rs) == 0 && status.replicas == 0 && rs.metadata.generation.unwrap_or(0) <= status.observed_generation.unwrap_or(0)
        };
        self.deleted = old.iter().take(surplus).filter(idle).map(|rs| Self::name(rs)).collect();
    }

    fn finish(self, progress: Progress, now: Timestamp) -> Plan {
        let made = self.created.is_some();
        let all: Vec<&ReplicaSet> = self.old.iter().chain(self.new.iter()).collect();
        let (status, requeue_after) = status::status(&self.target, &all, self.new.as_ref(), made, progress, now);
        let mut actions: Vec<Action> = Vec::new();
        actions.extend(self.created.map(|rs| Action::Create(Box::new(rs))));
        // Up before down: what is added first keeps the most available.
        let (down, up): (Vec<_>, Vec<_>) = self.changes.into_values().partition(|(_, scaled)| scaled.is_some_and(|(from, to)| from > to));
        let update = |(rs, scaled)| Action::Update { rs: Box::new(rs), scaled };
        actions.extend(up.into_iter().map(update));
        actions.extend(down.into_iter().map(update));
        actions.extend(self.deleted.into_iter().map(Action::Delete));
        Plan { actions, revision: self.revision, status, requeue_after }
    }
}
