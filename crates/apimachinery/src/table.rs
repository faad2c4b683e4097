//! Tables: the columns and cells that `kubectl get` shows.
//!
//! Cells are those of upstream's printers, wide ones included; clients hide columns whose priority is above 0. Source: kubernetes v1.37
//! `pkg/printers/internalversion/printers.go`; the columns are facts of [`crate::kinds`].

mod pod;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::KindFacts;
use crate::time::{self, human_duration};
use crate::tree::{Members, Tree};

/// The `columnDefinitions` of a kind.
pub fn columns(kind: &KindFacts) -> Vec<Value> {
    if kind.columns.is_empty() {
        return vec![
            json!({"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}),
            json!({"name": "Created At", "type": "date", "format": "", "description": "", "priority": 0}),
        ];
    }
    let column = |column: &crate::kinds::Column| json!({"name": column.name, "type": column.r#type, "format": column.format, "description": "", "priority": column.priority});
    kind.columns.iter().map(column).collect()
}

/// A row, but for its `object`.
#[derive(Debug, Serialize)]
pub struct Row {
    /// A cell for each column.
    pub cells: Vec<Value>,
    /// That a pod has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conditions: Option<Value>,
}

/// The row of an object.
pub fn row(kind: &KindFacts, object: &Tree<'_>, now: Timestamp) -> Row {
    let object = View { object, now };
    let cells = match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => pod::cells(&object),
        ("", "Namespace") => vec![object.name(), object.cell("/status/phase"), object.age()],
        ("", "Node") => node(&object),
        ("", "Service") => service(&object),
        ("", "ConfigMap") => vec![object.name(), (object.size("/data") + object.size("/binaryData")).into(), object.age()],
        ("", "Secret") => vec![object.name(), object.cell("/type"), object.size("/data").into(), object.age()],
        ("", "ServiceAccount") => vec![object.name(), object.age()],
        ("", "Event") => event(&object, "involvedObject", "source", "message", "count", "reportingComponent"),
        ("events.k8s.io", "Event") => event(&object, "regarding", "deprecatedSource", "note", "deprecatedCount", "reportingController"),
        ("coordination.k8s.io", "Lease") => vec![object.name(), object.cell("/spec/holderIdentity"), object.age()],
        ("apps", "Deployment") => deployment(&object),
        ("apps", "ReplicaSet") => replica_set(&object),
        ("scheduling.k8s.io", "PriorityClass") => vec![
            object.name(),
            object.number("/value").into(),
            (object.get("/globalDefault") == Some(&Tree::Bool(true))).into(),
            object.age(),
            object.cell("/preemptionPolicy"),
        ],
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => binding(&object),
        ("discovery.k8s.io", "EndpointSlice") => endpoint_slice(&object),
        _ => vec![object.name(), object.get("/metadata/creationTimestamp").map_or(Value::Null, Tree::to_value)],
    };
    let conditions = if (kind.group.as_str(), kind.kind.as_str()) == ("", "Pod") { pod::conditions(&object) } else { None };
    Row { cells, conditions }
}

/// An object and the time it is looked at.
struct View<'a> {
    object: &'a Tree<'a>,
    now: Timestamp,
}

impl<'a> View<'a> {
    fn get(&self, path: &str) -> Option<&'a Tree<'a>> {
        self.object.pointer(path)
    }

    fn text(&self, path: &str) -> &'a str {
        self.get(path).and_then(Tree::as_str).unwrap_or("")
    }

    fn cell(&self, path: &str) -> Value {
        self.text(path).into()
    }

    fn cell_or(&self, path: &str, otherwise: &str) -> Value {
        let text = self.text(path);
        if text.is_empty() { otherwise.into() } else { text.into() }
    }

    fn name(&self) -> Value {
        self.cell("/metadata/name")
    }

    fn number(&self, path: &str) -> i64 {
        self.get(path).and_then(Tree::as_i64).unwrap_or(0)
    }

    fn list(&self, path: &str) -> &'a [Tree<'a>] {
        self.get(path).and_then(Tree::as_list).unwrap_or(&[])
    }

    fn size(&self, path: &str) -> usize {
        self.get(path).and_then(Tree::as_object).map_or(0, Members::len)
    }

    fn age(&self) -> Value {
        self.since(self.text("/metadata/creationTimestamp")).into()
    }

    /// The time since an RFC 3339 time; `<unknown>` when there is none.
    fn since(&self, text: &str) -> String {
        match time::parse(text) {
            None => "<unknown>".to_owned(),
            Some(then) => human_duration(self.now.as_millisecond().saturating_sub(then.as_millisecond()).div_euclid(1000)),
        }
    }
}

fn texts<'a>(items: &'a [Tree<'a>], key: &'a str) -> impl Iterator<Item = &'a str> {
    items.iter().map(move |item| item.get(key).and_then(Tree::as_str).unwrap_or(""))
}

fn join<'a>(texts: impl Iterator<Item = &'a str>, separator: &str) -> String {
    texts.collect::<Vec<_>>().join(separator)
}

fn node(node: &View<'_>) -> Vec<Value> {
    let ready = node.list("/status/conditions").iter().rfind(|condition| condition["type"] == "Ready");
    let mut status = match ready {
        None => "Unknown".to_owned(),
        Some(condition) if condition["status"] == "True" => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
    };
    if node.get("/spec/unschedulable") == Some(&Tree::Bool(true)) {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in node.get("/metadata/labels").and_then(Tree::as_object).into_iter().flat_map(Members::iter) {
        let value = value.as_str().unwrap_or("");
        match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => roles.push(role),
            None if key == "kubernetes.io/role" && !value.is_empty() => roles.push(value),
            _ => {}
        }
    }
    roles.sort_unstable();
    roles.dedup();
    let roles = if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") };
    let address = |kind: &str| {
        let found = node.list("/status/addresses").iter().find(|address| address["type"] == kind);
        found.and_then(|address| address.get("address")).map_or_else(|| "<none>".into(), Tree::to_value)
    };
    let mut kernel = node.cell_or("/status/nodeInfo/kernelVersion", "<unknown>");
    let architecture = node.text("/status/nodeInfo/architecture");
    if !architecture.is_empty() {
        kernel = format!("{} ({architecture})", kernel.as_str().unwrap_or("")).into();
    }
    vec![
        node.name(),
        status.into(),
        roles.into(),
        node.age(),
        node.cell("/status/nodeInfo/kubeletVersion"),
        address("InternalIP"),
        address("ExternalIP"),
        node.cell_or("/status/nodeInfo/osImage", "<unknown>"),
        kernel,
        node.cell_or("/status/nodeInfo/containerRuntimeVersion", "<unknown>"),
    ]
}

fn service(service: &View<'_>) -> Vec<Value> {
    let port = |port: &Tree<'_>| {
        let number = |key: &str| port.get(key).and_then(Tree::as_i64).unwrap_or(0);
        let protocol = port["protocol"].as_str().unwrap_or("");
        match number("nodePort") {
            0 => format!("{}/{protocol}", number("port")),
            node_port => format!("{}:{node_port}/{protocol}", number("port")),
        }
    };
    let ports: Vec<String> = service.list("/spec/ports").iter().map(port).collect();
    let ports = if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") };
    let internal = service.list("/spec/clusterIPs").first().map_or_else(|| "<none>".into(), Tree::to_value);
    vec![
        service.name(),
        service.cell("/spec/type"),
        internal,
        external_ip(service).into(),
        ports.into(),
        service.age(),
        format_labels(service.get("/spec/selector")).into(),
    ]
}

fn external_ip(service: &View<'_>) -> String {
    let mut ips: Vec<&str> = service.list("/spec/externalIPs").iter().filter_map(Tree::as_str).collect();
    match service.text("/spec/type") {
        "ClusterIP" | "NodePort" if ips.is_empty() => "<none>".to_owned(),
        "ClusterIP" | "NodePort" => ips.join(","),
        "LoadBalancer" => {
            let ingress = service.list("/status/loadBalancer/ingress").iter();
            let text =
                |item: &'static str| move |ingress: &Tree<'_>| ingress[item].as_str().map(str::to_owned).filter(|text| !text.is_empty());
            let mut balancers: Vec<String> = ingress.filter_map(|item| text("ip")(item).or_else(|| text("hostname")(item))).collect();
            balancers.sort_unstable();
            balancers.dedup();
            let mut all: Vec<&str> = balancers.iter().map(String::as_str).collect();
            all.append(&mut ips);
            if all.is_empty() { "<pending>".to_owned() } else { all.join(",") }
        }
        "ExternalName" => service.text("/spec/externalName").to_owned(),
        _ => "<unknown>".to_owned(),
    }
}

/// `a=b,c=d`, or `<none>`.
fn format_labels(labels: Option<&Tree<'_>>) -> String {
    let labels = labels.and_then(Tree::as_object).into_iter().flat_map(Members::iter);
    let mut pairs: Vec<String> = labels.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))).collect();
    pairs.sort_unstable();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

/// A LabelSelector as text: `a=b,c in (d,e),!f`.
fn format_selector(selector: Option<&Tree<'_>>) -> String {
    let Some(selector) = selector else { return String::new() };
    let mut parts: Vec<(String, String)> = Vec::new();
    for (key, value) in selector.get("matchLabels").and_then(Tree::as_object).into_iter().flat_map(Members::iter) {
        parts.push((key.to_owned(), format!("{key}={}", value.as_str().unwrap_or(""))));
    }
    for expression in selector.get("matchExpressions").and_then(Tree::as_list).into_iter().flatten() {
        let key = expression["key"].as_str().unwrap_or("");
        let values = expression.get("values").and_then(Tree::as_list).into_iter().flatten();
        let mut values: Vec<&str> = values.filter_map(Tree::as_str).collect();
        values.sort_unstable();
        let text = match expression["operator"].as_str().unwrap_or("") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            _ => return "<invalid>".to_owned(),
        };
        parts.push((key.to_owned(), text));
    }
    parts.sort_by(|left, right| left.0.cmp(&right.0));
    parts.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(",")
}

fn containers(view: &View<'_>) -> [Value; 2] {
    let containers = view.list("/spec/template/spec/containers");
    [join(texts(containers, "name"), ",").into(), join(texts(containers, "image"), ",").into()]
}

fn deployment(deployment: &View<'_>) -> Vec<Value> {
    let [names, images] = containers(deployment);
    vec![
        deployment.name(),
        format!("{}/{}", deployment.number("/status/readyReplicas"), deployment.number("/spec/replicas")).into(),
        deployment.number("/status/updatedReplicas").into(),
        deployment.number("/status/availableReplicas").into(),
        deployment.age(),
        names,
        images,
        format_selector(deployment.get("/spec/selector")).into(),
    ]
}

fn replica_set(set: &View<'_>) -> Vec<Value> {
    let [names, images] = containers(set);
    let selector = format_selector(set.get("/spec/selector"));
    let selector = if selector.is_empty() { "<none>".to_owned() } else { selector };
    vec![
        set.name(),
        set.number("/spec/replicas").into(),
        set.number("/status/replicas").into(),
        set.number("/status/readyReplicas").into(),
        set.age(),
        names,
        images,
        selector.into(),
    ]
}

/// Field names differ between core/v1 and events.k8s.io/v1.
fn event(event: &View<'_>, object: &str, source: &str, message: &str, count: &str, reporter: &str) -> Vec<Value> {
    let old = object == "involvedObject";
    let stamp = |name: &str| {
        let path = if old { format!("/{name}Timestamp") } else { format!("/deprecated{}Timestamp", capital(name)) };
        event.text(&path)
    };
    let first = match stamp("first") {
        "" => event.since(event.text("/eventTime")),
        first => event.since(first),
    };
    let mut last = match stamp("last") {
        "" => first.clone(),
        last => event.since(last),
    };
    let mut times = event.number(&format!("/{count}"));
    if event.get("/series").is_some() {
        last = event.since(event.text("/series/lastObservedTime"));
        times = event.number("/series/count");
    } else if times == 0 {
        times = 1;
    }
    let kind = event.text(&format!("/{object}/kind")).to_lowercase();
    let target = match event.text(&format!("/{object}/name")) {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let first_text = |left: &str, right: &str| -> String {
        let left = event.text(left);
        if left.is_empty() { event.text(right).to_owned() } else { left.to_owned() }
    };
    let component = first_text(&format!("/{source}/component"), &format!("/{reporter}"));
    let instance = first_text(&format!("/{source}/host"), "/reportingInstance");
    let origin = if instance.is_empty() { component } else { format!("{component}, {instance}") };
    vec![
        last.into(),
        event.cell("/type"),
        event.cell("/reason"),
        target.into(),
        event.cell(&format!("/{object}/fieldPath")),
        origin.into(),
        event.text(&format!("/{message}")).trim().into(),
        first.into(),
        times.into(),
        event.name(),
    ]
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn binding(binding: &View<'_>) -> Vec<Value> {
    let subjects = binding.list("/subjects");
    let of = |kind: &str| -> Value {
        let name = |subject: &Tree<'_>| {
            let text = |key: &str| subject.get(key).and_then(Tree::as_str).unwrap_or("").to_owned();
            let (namespace, name) = (text("namespace"), text("name"));
            if kind == "ServiceAccount" { format!("{namespace}/{name}") } else { name }
        };
        subjects.iter().filter(|subject| subject["kind"] == kind).map(name).collect::<Vec<_>>().join(", ").into()
    };
    vec![
        binding.name(),
        format!("{}/{}", binding.text("/roleRef/kind"), binding.text("/roleRef/name")).into(),
        binding.age(),
        of("User"),
        of("Group"),
        of("ServiceAccount"),
    ]
}

/// At most three, `<unset>` for none, and how many more there are.
fn some_of(all: Vec<String>) -> String {
    match all.len() {
        0 => "<unset>".to_owned(),
        1..=3 => all.join(","),
        count => format!("{} + {} more...", all[..3].join(","), count - 3),
    }
}

fn endpoint_slice(slice: &View<'_>) -> Vec<Value> {
    let port = |port: &Tree<'_>| match (port.get("port").and_then(Tree::as_i64), port.get("name").and_then(Tree::as_str)) {
        (Some(number), _) => number.to_string(),
        (None, Some(name)) => name.to_owned(),
        (None, None) => "*".to_owned(),
    };
    let ports = slice.list("/ports").iter().map(port).collect();
    let addresses = slice.list("/endpoints").iter().flat_map(|endpoint| endpoint["addresses"].as_list().into_iter().flatten());
    let addresses = addresses.map(|address| address.as_str().unwrap_or("").to_owned()).collect();
    vec![slice.name(), slice.cell("/addressType"), some_of(ports).into(), some_of(addresses).into(), slice.age()]
}

#[cfg(test)]
mod tests;
