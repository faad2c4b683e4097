//! The `paths` of an OpenAPI document: an item per path, an operation per verb.

use serde_json::{Map, Value, json};

use super::{body_type, list_type, reference, subresource_gvk};
use crate::kinds::{Gvk, KindFacts, Subresource};
use crate::schema::{TypeId, schema};

/// A query parameter: name and type.
type Parameter = (&'static str, &'static str);

const LIST: &[Parameter] = &[
    ("allowWatchBookmarks", "boolean"),
    ("continue", "string"),
    ("fieldSelector", "string"),
    ("labelSelector", "string"),
    ("limit", "integer"),
    ("resourceVersion", "string"),
    ("resourceVersionMatch", "string"),
    ("sendInitialEvents", "boolean"),
    ("timeoutSeconds", "integer"),
    ("watch", "boolean"),
];
const WRITE: &[Parameter] = &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string")];
const PATCH: &[Parameter] = &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string"), ("force", "boolean")];
const DELETE: &[Parameter] = &[
    ("dryRun", "string"),
    ("gracePeriodSeconds", "integer"),
    ("ignoreStoreReadErrorWithClusterBreakingPotential", "boolean"),
    ("orphanDependents", "boolean"),
    ("propagationPolicy", "string"),
];
const LOG: &[Parameter] = &[
    ("container", "string"),
    ("follow", "boolean"),
    ("insecureSkipTLSVerifyBackend", "boolean"),
    ("limitBytes", "integer"),
    ("previous", "boolean"),
    ("sinceSeconds", "integer"),
    ("stream", "string"),
    ("tailLines", "integer"),
    ("timestamps", "boolean"),
];
const EXEC: &[Parameter] = &[
    ("command", "string"),
    ("container", "string"),
    ("stderr", "boolean"),
    ("stdin", "boolean"),
    ("stdout", "boolean"),
    ("tty", "boolean"),
];

const PORT_FORWARD: &[Parameter] = &[("ports", "integer")];

fn parameter((name, kind): &Parameter) -> Value {
    json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
}

fn path_parameter(name: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}})
}

/// What an operation is about.
struct Subject<'a> {
    group: &'a str,
    version: &'a str,
    /// `NamespacedPod`, `NamespacedPodStatus`, `Node`.
    noun: String,
    gvk: Gvk,
}

/// The group in names: `Core`, `RbacAuthorization`.
fn group_words(group: &str) -> String {
    if group.is_empty() {
        return "core".to_owned();
    }
    let mut words = group.trim_end_matches(".k8s.io").split('.');
    let first = words.next().unwrap_or("").to_owned();
    words.fold(first, |name, word| name + &capital(word))
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

struct Operation<'a> {
    /// Verb of the operation's id: `read`, `list`, `create`, `replace`, `patch`, `delete`, `connect`.
    name: &'a str,
    /// What stands before the noun: `Collection`, `Get`, `Post`, or nothing.
    infix: &'a str,
    /// `x-kubernetes-action`.
    action: &'a str,
    parameters: &'a [Parameter],
    body: Option<TypeId>,
    answer: Option<TypeId>,
}

fn operation(subject: &Subject<'_>, operation: &Operation<'_>) -> Value {
    let group = group_words(subject.group);
    let mut value = json!({
        "tags": [format!("{group}_{}", subject.version)],
        "operationId": format!("{}{}{}{}{}", operation.name, capital(&group), capital(subject.version), operation.infix, subject.noun),
        "x-kubernetes-action": operation.action,
        "x-kubernetes-group-version-kind": {
            "group": subject.gvk.group, "version": subject.gvk.version, "kind": subject.gvk.kind,
        },
    });
    if !operation.parameters.is_empty() {
        value["parameters"] = operation.parameters.iter().map(parameter).collect();
    }
    if let Some(body) = operation.body {
        let is_patch = operation.action == "patch";
        let types: &[&str] = if is_patch {
            &["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"]
        } else {
            &["*/*"]
        };
        let content: Map<String, Value> = types.iter().map(|media| ((*media).to_owned(), json!({"schema": reference(body)}))).collect();
        value["requestBody"] = json!({"content": content, "required": operation.name != "delete"});
    }
    let answer = operation.answer.map_or_else(|| json!({"type": "string"}), reference);
    let content = ["application/json", "application/vnd.kubernetes.protobuf", "application/yaml"];
    let content: Map<String, Value> = content.iter().map(|media| ((*media).to_owned(), json!({"schema": answer}))).collect();
    let ok = json!({"description": "OK", "content": content});
    value["responses"] = json!({"200": ok, "401": {"description": "Unauthorized"}});
    if matches!(operation.action, "post" | "put" | "patch") {
        value["responses"]["201"] = json!({"description": "Created", "content": ok["content"]});
    }
    value
}

/// Adds the paths of a kind.
pub(super) fn add(paths: &mut Map<String, Value>, kind: &KindFacts) {
    let root = if kind.group.is_empty() { format!("/api/{}", kind.version) } else { format!("/apis/{}/{}", kind.group, kind.version) };
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{root}{scope}/{}", kind.resource);
    let item = format!("{collection}/{{name}}");
    let scoped = if kind.namespaced { vec![path_parameter("namespace")] } else { Vec::new() };
    let prefix = if kind.namespaced { "Namespaced" } else { "" };
    let subject = Subject { group: &kind.group, version: &kind.version, noun: format!("{prefix}{}", kind.kind), gvk: kind.gvk() };
    insert(paths, &collection, scoped.clone(), collection_operations(&subject, kind));
    let mut named = vec![path_parameter("name")];
    named.extend(scoped);
    insert(paths, &item, named.clone(), item_operations(&subject, kind));
    if kind.namespaced && kind.has_verb("list") {
        let noun = format!("{}ForAllNamespaces", kind.kind);
        let everywhere = Subject { group: &kind.group, version: &kind.version, noun, gvk: kind.gvk() };
        let list = Operation { name: "list", infix: "", action: "list", parameters: LIST, body: None, answer: list_type(kind) };
        insert(paths, &format!("{root}/{}", kind.resource), Vec::new(), vec![("get", operation(&everywhere, &list))]);
    }
    for sub in &kind.subresources {
        let noun = format!("{prefix}{}{}", kind.kind, capital(&sub.name));
        let subject = Subject { group: &kind.group, version: &kind.version, noun, gvk: subresource_gvk(kind, sub) };
        insert(paths, &format!("{item}/{}", sub.name), named.clone(), subresource_operations(&subject, kind, sub));
    }
}

fn insert(paths: &mut Map<String, Value>, path: &str, parameters: Vec<Value>, operations: Vec<(&'static str, Value)>) {
    if operations.is_empty() {
        return;
    }
    let mut item: Map<String, Value> = operations.into_iter().map(|(method, operation)| (method.to_owned(), operation)).collect();
    if !parameters.is_empty() {
        item.insert("parameters".to_owned(), parameters.into());
    }
    paths.insert(path.to_owned(), Value::Object(item));
}

fn meta(name: &str) -> Option<TypeId> {
    schema().by_name(&format!("meta.v1.{name}"))
}

fn collection_operations(subject: &Subject<'_>, kind: &KindFacts) -> Vec<(&'static str, Value)> {
    let mut operations = Vec::new();
    let own = Some(kind.type_id);
    if kind.has_verb("list") {
        let list = Operation { name: "list", infix: "", action: "list", parameters: LIST, body: None, answer: list_type(kind) };
        operations.push(("get", operation(subject, &list)));
    }
    if kind.has_verb("create") {
        let create = Operation { name: "create", infix: "", action: "post", parameters: WRITE, body: own, answer: own };
        operations.push(("post", operation(subject, &create)));
    }
    if kind.has_verb("deletecollection") {
        let parameters: Vec<Parameter> = LIST.iter().chain(DELETE).copied().collect();
        let (body, answer) = (meta("DeleteOptions"), meta("Status"));
        let delete = Operation { name: "delete", infix: "Collection", action: "deletecollection", parameters: &parameters, body, answer };
        operations.push(("delete", operation(subject, &delete)));
    }
    operations
}

fn item_operations(subject: &Subject<'_>, kind: &KindFacts) -> Vec<(&'static str, Value)> {
    let own = Some(kind.type_id);
    let patch = meta("Patch");
    let all = [
        ("get", "get", Operation { name: "read", infix: "", action: "get", parameters: &[], body: None, answer: own }),
        ("update", "put", Operation { name: "replace", infix: "", action: "put", parameters: WRITE, body: own, answer: own }),
        ("patch", "patch", Operation { name: "patch", infix: "", action: "patch", parameters: PATCH, body: patch, answer: own }),
        (
            "delete",
            "delete",
            Operation {
                name: "delete",
                infix: "",
                action: "delete",
                parameters: DELETE,
                body: meta("DeleteOptions"),
                answer: meta("Status"),
            },
        ),
    ];
    let served = all.iter().filter(|(verb, ..)| kind.has_verb(verb));
    served.map(|(_, method, found)| (*method, operation(subject, found))).collect()
}

fn subresource_operations(subject: &Subject<'_>, kind: &KindFacts, sub: &Subresource) -> Vec<(&'static str, Value)> {
    let body = body_type(kind, sub);
    let has = |verb: &str| sub.verbs.iter().any(|known| known == verb);
    let mut operations = Vec::new();
    if matches!(sub.name.as_str(), "exec" | "attach" | "portforward" | "proxy") {
        let parameters: &[Parameter] = if sub.name == "exec" {
            EXEC
        } else if sub.name == "attach" {
            &EXEC[1..]
        } else if sub.name == "portforward" {
            PORT_FORWARD
        } else {
            &[]
        };
        for (verb, method, infix) in [("get", "get", "Get"), ("create", "post", "Post")] {
            if has(verb) {
                let connect = Operation { name: "connect", infix, action: "connect", parameters, body: None, answer: None };
                operations.push((method, operation(subject, &connect)));
            }
        }
        return operations;
    }
    let log = sub.name == "log";
    let read = Operation {
        name: "read",
        infix: "",
        action: "get",
        parameters: if log { LOG } else { &[] },
        body: None,
        answer: if log { None } else { body },
    };
    let all = [
        ("get", "get", read),
        ("create", "post", Operation { name: "create", infix: "", action: "post", parameters: WRITE, body, answer: body }),
        ("update", "put", Operation { name: "replace", infix: "", action: "put", parameters: WRITE, body, answer: body }),
        ("patch", "patch", Operation { name: "patch", infix: "", action: "patch", parameters: PATCH, body: meta("Patch"), answer: body }),
    ];
    operations.extend(all.iter().filter(|(verb, ..)| has(verb)).map(|(_, method, found)| (*method, operation(subject, found))));
    operations
}
