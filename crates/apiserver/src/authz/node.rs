//! The Node authorizer: a kubelet reads what the pods of its node use, and nothing else
//! (upstream: `plugin/pkg/auth/authorizer/node`, v1.37).
//!
//! Upstream keeps a graph; here the pods of the node are looked through, which are at most a few hundred.

use serde_json::Value;

use super::{Attributes, Decision, rbac};
use crate::lookup::{Lookup, items, text};

/// What every node may do: the rules of the default role `system:node`.
pub fn rules() -> Vec<Value> {
    let role = crate::bootstrap::objects()
        .into_iter()
        .find(|object| text(object, "/kind") == "ClusterRole" && text(object, "/metadata/name") == "system:node");
    role.map(|role| items(&role, "/rules").to_vec()).unwrap_or_default()
}

/// Decides for nodes; has no opinion of anybody else.
pub fn authorize(attributes: &Attributes, rules: &[Value], lookup: &dyn Lookup) -> Decision {
    let no = |reason: &str| Decision::NoOpinion(reason.to_owned());
    let Some(node) = attributes.user.node() else { return no("") };
    if node.is_empty() {
        return no(&format!("unknown node for user {:?}", attributes.user.name));
    }
    if attributes.is_resource {
        match (attributes.api_group, attributes.resource) {
            ("", "secrets" | "configmaps") => return read_used(node, attributes, lookup),
            ("", "serviceaccounts") => return service_account(node, attributes, lookup),
            ("", "nodes") => return own_node(node, attributes),
            ("", "pods") => return pods(node, attributes, lookup),
            ("coordination.k8s.io", "leases") => return lease(node, attributes),
            ("storage.k8s.io", "csinodes") => return csi_node(node, attributes),
            ("", "persistentvolumeclaims" | "persistentvolumes") | ("storage.k8s.io", "volumeattachments") => {
                return no("volumes are not carried out yet");
            }
            _ => {}
        }
    }
    if rules.iter().any(|rule| rbac::allows(rule, attributes)) { Decision::Allow } else { no("") }
}

fn unrelated(node: &str) -> Decision {
    Decision::NoOpinion(format!("no relationship found between node '{node}' and this object"))
}

fn read_used(node: &str, attributes: &Attributes, lookup: &dyn Lookup) -> Decision {
    let no = |reason: &str| Decision::NoOpinion(reason.to_owned());
    if !matches!(attributes.verb, "get" | "list" | "watch") {
        return no("can only read resources of this type");
    }
    if !attributes.subresource.is_empty() {
        return no("cannot read subresource");
    }
    if attributes.namespace.is_empty() {
        return no("can only read namespaced object of this type");
    }
    if attributes.name.is_empty() {
        return no("No Object name found");
    }
    let secret = attributes.resource == "secrets";
    let used = pods_of(node, attributes.namespace, lookup).any(|pod| uses(&pod, secret, attributes.name));
    if used { Decision::Allow } else { unrelated(node) }
}

fn pods_of<'a>(node: &'a str, namespace: &str, lookup: &dyn Lookup) -> impl Iterator<Item = std::sync::Arc<Value>> + 'a {
    lookup.list("pods", Some(namespace)).into_iter().filter(move |pod| text(pod, "/spec/nodeName") == node)
}

/// Whether a pod mentions a secret or a config map: in a volume, an environment or as a pull secret.
fn uses(pod: &Value, secret: bool, name: &str) -> bool {
    let (volume_source, volume_name, key_ref, env_from) = if secret {
        ("/secret", "/secretName", "/valueFrom/secretKeyRef/name", "/secretRef/name")
    } else {
        ("/configMap", "/name", "/valueFrom/configMapKeyRef/name", "/configMapRef/name")
    };
    let volume = |volume: &Value| {
        text(volume, &format!("{volume_source}{volume_name}")) == name
            || items(volume, "/projected/sources").iter().any(|source| text(source, &format!("{volume_source}/name")) == name)
    };
    let container = |container: &Value| {
        items(container, "/env").iter().any(|env| text(env, key_ref) == name)
            || items(container, "/envFrom").iter().any(|source| text(source, env_from) == name)
    };
    items(pod, "/spec/volumes").iter().any(volume)
        || ["/spec/initContainers", "/spec/containers", "/spec/ephemeralContainers"]
            .iter()
            .any(|list| items(pod, list).iter().any(container))
        || secret && items(pod, "/spec/imagePullSecrets").iter().any(|reference| text(reference, "/name") == name)
}

fn service_account(node: &str, attributes: &Attributes, lookup: &dyn Lookup) -> Decision {
    let no = |reason: &str| Decision::NoOpinion(reason.to_owned());
    let reads = attributes.verb == "get" && attributes.subresource.is_empty();
    if !reads {
        if attributes.verb != "create" || attributes.name.is_empty() {
            return no("can only create tokens for individual service accounts");
        }
        if attributes.subresource != "token" {
            return no("can only create token subresource of serviceaccount");
        }
    }
    let used = pods_of(node, attributes.namespace, lookup).any(|pod| text(&pod, "/spec/serviceAccountName") == attributes.name);
    if used { Decision::Allow } else { unrelated(node) }
}

fn own_node(node: &str, attributes: &Attributes) -> Decision {
    match (attributes.subresource, attributes.verb) {
        ("", "create" | "update" | "patch") | ("status", "update" | "patch") => Decision::Allow,
        ("", "get" | "list" | "watch") => match attributes.name {
            name if name == node => Decision::Allow,
            "" => Decision::NoOpinion(format!("node '{node}' cannot read all nodes, only its own Node object")),
            name => Decision::NoOpinion(format!("node '{node}' cannot read '{name}', only its own Node object")),
        },
        _ => Decision::NoOpinion(String::new()),
    }
}

fn pods(node: &str, attributes: &Attributes, lookup: &dyn Lookup) -> Decision {
    let own = || lookup.get("pods", attributes.namespace, attributes.name).is_some_and(|pod| text(&pod, "/spec/nodeName") == node);
    match (attributes.subresource, attributes.verb) {
        ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => Decision::Allow,
        ("", "get") if attributes.name.is_empty() => Decision::NoOpinion("No Object name found".to_owned()),
        ("", "get") => {
            if own() {
                Decision::Allow
            } else {
                unrelated(node)
            }
        }
        ("", "list" | "watch") if attributes.node_name_selector == node => Decision::Allow,
        ("", "list" | "watch") if attributes.name.is_empty() => {
            Decision::NoOpinion("can only list/watch pods with spec.nodeName field selector".to_owned())
        }
        ("", "list" | "watch") => {
            if own() {
                Decision::Allow
            } else {
                unrelated(node)
            }
        }
        _ => Decision::NoOpinion(String::new()),
    }
}

fn lease(node: &str, attributes: &Attributes) -> Decision {
    let no = |reason: &str| Decision::NoOpinion(reason.to_owned());
    if !matches!(attributes.verb, "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a node lease");
    }
    if attributes.namespace != "kube-node-lease" {
        return no("can only access leases in the \"kube-node-lease\" system namespace");
    }
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access node lease with the same name as the requesting node");
    }
    Decision::Allow
}

fn csi_node(node: &str, attributes: &Attributes) -> Decision {
    let no = |reason: &str| Decision::NoOpinion(reason.to_owned());
    if !attributes.subresource.is_empty() {
        return no("cannot authorize CSINode subresources");
    }
    if !matches!(attributes.verb, "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a CSINode");
    }
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access CSINode with the same name as the requesting node");
    }
    Decision::Allow
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authn::User;
    use crate::lookup::fake::Fake;
    use serde_json::json;

    #[test]
    fn a_kubelet_reads_what_its_pods_use() {
        let pod = json!({ "metadata": { "namespace": "ns", "name": "p" }, "spec": { "nodeName": "n1", "serviceAccountName": "web",
            "volumes": [{ "projected": { "sources": [{ "configMap": { "name": "root-ca" } }, { "secret": { "name": "projected" } }] } },
                        { "secret": { "secretName": "mounted" } }],
            "containers": [{ "env": [{ "valueFrom": { "secretKeyRef": { "name": "env" } } }], "envFrom": [{ "configMapRef": { "name": "all" } }] }],
            "imagePullSecrets": [{ "name": "pull" }] } });
        let elsewhere = json!({ "metadata": { "namespace": "ns", "name": "q" }, "spec": { "nodeName": "n2", "volumes": [{ "secret": { "secretName": "foreign" } }] } });
        let lookup = Fake::default().with("pods", pod).with("pods", elsewhere);
        let user = User { name: "system:node:n1".into(), groups: vec!["system:nodes".into()], ..User::default() };
        // verb, group/resource/subresource, namespace, name, selector, allowed
        let cases = [
            ("get", "/secrets/", "ns", "mounted", "", true),
            ("watch", "/secrets/", "ns", "projected", "", true),
            ("get", "/secrets/", "ns", "env", "", true),
            ("get", "/secrets/", "ns", "pull", "", true),
            ("get", "/secrets/", "ns", "foreign", "", false),
            ("get", "/secrets/", "other", "mounted", "", false),
            ("list", "/secrets/", "ns", "", "", false),
            ("update", "/secrets/", "ns", "mounted", "", false),
            ("get", "/configmaps/", "ns", "root-ca", "", true),
            ("get", "/configmaps/", "ns", "all", "", true),
            ("get", "/configmaps/", "ns", "mounted", "", false),
            ("create", "/serviceaccounts/token", "ns", "web", "", true),
            ("create", "/serviceaccounts/token", "ns", "admin", "", false),
            ("get", "/nodes/", "", "n1", "", true),
            ("get", "/nodes/", "", "n2", "", false),
            ("list", "/nodes/", "", "", "", false),
            ("delete", "/nodes/", "", "n1", "", false),
            ("list", "/pods/", "", "", "n1", true),
            ("list", "/pods/", "", "", "n2", false),
            ("list", "/pods/", "", "", "", false),
            ("get", "/pods/", "ns", "p", "", true),
            ("get", "/pods/", "ns", "q", "", false),
            ("update", "coordination.k8s.io/leases/", "kube-node-lease", "n1", "", true),
            ("update", "coordination.k8s.io/leases/", "kube-node-lease", "n2", "", false),
            ("get", "/services/", "", "", "", true),
            ("create", "/events/", "ns", "", "", true),
            ("create", "/pods/exec", "ns", "p", "", false),
            ("delete", "apps/deployments/", "ns", "d", "", false),
        ];
        let rules = rules();
        for (verb, what, namespace, name, selector, allowed) in cases {
            let parts: Vec<&str> = what.split('/').collect();
            let attributes = Attributes {
                user: &user,
                verb,
                api_group: parts[0],
                resource: parts[1],
                subresource: parts[2],
                name,
                namespace,
                path: "",
                is_resource: true,
                node_name_selector: selector,
            };
            assert_eq!(authorize(&attributes, &rules, &lookup) == Decision::Allow, allowed, "{verb} {what} {namespace}/{name}");
        }
    }
}
