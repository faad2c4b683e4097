//! Cluster role aggregation: a ClusterRole with an aggregation rule has the rules of all that its selectors match.

use std::sync::Arc;

use client::{ObjectKey, Requeue, WorkQueue, run_workers};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::Api;
use kube::api::PostParams;
use kube::core::{Selector, SelectorExt};

use crate::context::{Context, Starting};

const WORKERS: usize = 5;

/// The rules that a role should have; `None`: it has them, or does not aggregate.
fn plan(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let selectors = role.aggregation_rule.as_ref()?.cluster_role_selectors.as_deref().unwrap_or_default();
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in selectors {
        let Ok(selector) = Selector::try_from(selector.clone()) else { continue };
        // The informer lists by name, which is upstream's order.
        let chosen = all.iter().filter(|other| other.metadata.name != role.metadata.name);
        for other in chosen.filter(|other| selector.matches(&other.metadata.labels.clone().unwrap_or_default())) {
            for rule in other.rules.iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    (role.rules.clone().unwrap_or_default() != rules).then_some(rules)
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let (add, roles) = (queue.clone(), context.informers.cluster_roles.clone());
    context.informers.cluster_roles.on_change(move |_| {
        let aggregating = roles.list().into_iter().filter(|role| role.aggregation_rule.is_some());
        aggregating.for_each(|role| add.add(ObjectKey::of(&*role)));
    });
    Box::pin(async move {
        let Some((client, _)) = context.identity("clusterrole-aggregation-controller").await else { return };
        let roles = context.informers.cluster_roles.clone();
        run_workers("clusterrole-aggregation", queue, WORKERS, context.cancel.clone(), move |key: ObjectKey| {
            let change = roles.get(&key).and_then(|role| Some((plan(&role, &roles.list())?, role)));
            let api: Api<ClusterRole> = Api::all(client.clone());
            async move {
                if let Some((rules, role)) = change {
                    let updated = ClusterRole { rules: Some(rules), ..(*role).clone() };
                    api.replace(&key.name, &PostParams::default(), &updated).await?;
                }
                Ok::<_, kube::Error>(Requeue::No)
            }
        })
        .await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_are_gathered_once_and_in_order() {
        let role = |value: serde_json::Value| -> Arc<ClusterRole> { Arc::new(serde_json::from_value(value).expect("role")) };
        let rule = |verb: &str| json!({"verbs": [verb], "apiGroups": [""], "resources": ["pods"]});
        let part = |name: &str, verbs: &[&str]| {
            role(json!({"metadata": {"name": name, "labels": {"x": "y"}},
                "rules": verbs.iter().map(|verb| rule(verb)).collect::<Vec<_>>()}))
        };
        let whole = role(json!({"metadata": {"name": "whole", "labels": {"x": "y"}},
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"x": "y"}}]}, "rules": [rule("old")]}));
        let all = [part("a", &["get", "list"]), part("b", &["list", "watch"]), whole.clone()];
        let rules = plan(&whole, &all).expect("a change");
        let verbs: Vec<_> = rules.iter().flat_map(|rule| rule.verbs.clone()).collect();
        assert_eq!(verbs, ["get", "list", "watch"]);
        let done = ClusterRole { rules: Some(rules), ..(*whole).clone() };
        assert_eq!(plan(&done, &all), None);
        assert_eq!(plan(&all[0], &all), None);
    }
}
