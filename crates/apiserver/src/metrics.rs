//! `metrics.k8s.io/v1beta1`: what nodes and pods use now, for `kubectl top`, from the kubelets' `/metrics/resource`.
//!
//! Upstream serves this group by an add-on, metrics-server, of which this is the part that clients see (k8s.io/metrics v0.37
//! `pkg/apis/metrics/v1beta1`). Processor time is a counter, so a rate needs two looks: they are at least a second and at most
//! a minute apart, and are made when somebody asks, not all the time.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use apimachinery::kinds;
use apimachinery::quantity::{Format, Quantity};
use apimachinery::selector::field::FieldSelector;
use apimachinery::selector::label::LabelSelector;
use apimachinery::status::Status;
use futures::StreamExt as _;
use http::Response;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::api::Api;
use crate::lookup::{Lookup as _, text};
use crate::proxy::Kubelets;
use crate::reply::{self, Body};
use crate::request::{Query, RequestInfo};

/// The group that is served here.
pub const GROUP: &str = "metrics.k8s.io";
/// Its version.
pub const VERSION: &str = "v1beta1";

/// How far two looks are apart.
const WINDOW_MIN: Duration = Duration::from_secs(1);
const WINDOW_MAX: Duration = Duration::from_secs(60);
/// Kubelets that are asked at one time.
const ASKED_MAX: usize = 16;

/// Namespace, pod and container.
type Key = (String, String, String);

/// One counter, one gauge, and when they were read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Point {
    cpu_seconds: Option<f64>,
    memory_bytes: Option<f64>,
    at_ms: i64,
}

/// What one kubelet told at one time.
#[derive(Clone, Debug, Default, PartialEq)]
struct Look {
    node: Point,
    containers: BTreeMap<Key, Point>,
}

/// The last look at each node.
#[derive(Default)]
pub struct Looks(Mutex<HashMap<String, (Instant, Look)>>);

impl Looks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Instant, Look)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Two looks at a node, the second one new.
    async fn two(&self, kubelets: &Kubelets, node: &Value) -> Result<(Look, Look), Status> {
        let name = crate::object::name(node);
        let last = self.lock().get(name).filter(|(at, _)| at.elapsed() <= WINDOW_MAX).cloned();
        let (at, first) = match last {
            Some(last) => last,
            None => (Instant::now(), look(kubelets, node).await?),
        };
        tokio::time::sleep(WINDOW_MIN.saturating_sub(at.elapsed())).await;
        let second = look(kubelets, node).await?;
        let mut looks = self.lock();
        looks.retain(|_, (at, _)| at.elapsed() <= WINDOW_MAX);
        looks.insert(name.to_owned(), (Instant::now(), second.clone()));
        Ok((first, second))
    }
}

async fn look(kubelets: &Kubelets, node: &Value) -> Result<Look, Status> {
    Ok(parse(&kubelets.get_text(node, "/metrics/resource").await?))
}

/// Reads the metrics that are of use here; the rest, and what is no metric, is passed over.
fn parse(text: &str) -> Look {
    let mut look = Look::default();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let split = line.find('{').map(|at| (&line[..at], &line[at + 1..]));
        let (name, labels, rest) = match split.and_then(|(name, rest)| Some((name, rest.rsplit_once('}')?))) {
            Some((name, (labels, rest))) => (name, labels, rest),
            None => match line.split_once(' ') {
                Some((name, rest)) => (name, "", rest),
                None => continue,
            },
        };
        let mut numbers = rest.split_whitespace();
        let Some(value) = numbers.next().and_then(|word| word.parse::<f64>().ok()) else { continue };
        let at_ms = numbers.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let point = match name {
            "node_cpu_usage_seconds_total" | "node_memory_working_set_bytes" => &mut look.node,
            "container_cpu_usage_seconds_total" | "container_memory_working_set_bytes" => {
                let label = |wanted: &str| label(labels, wanted);
                let (Some(namespace), Some(pod), Some(container)) = (label("namespace"), label("pod"), label("container")) else {
                    continue;
                };
                look.containers.entry((namespace, pod, container)).or_default()
            }
            _ => continue,
        };
        if name.contains("_cpu_") {
            point.cpu_seconds = Some(value);
            point.at_ms = at_ms;
        } else {
            point.memory_bytes = Some(value);
        }
    }
    look
}

/// The value of a label. Names of objects have no characters that would be escaped.
fn label(labels: &str, wanted: &str) -> Option<String> {
    let pair = labels.split(',').find_map(|pair| pair.trim().strip_prefix(wanted)?.strip_prefix("=\""))?;
    pair.strip_suffix('"').map(str::to_owned)
}

/// What was used between two looks.
#[derive(Clone, Debug, PartialEq)]
struct Usage {
    cpu: String,
    memory: String,
    at_ms: i64,
    window_ms: i64,
}

/// `None` when there was no time between the looks, the counter was begun anew, or something is not known.
fn usage(first: Option<&Point>, second: &Point) -> Option<Usage> {
    let first = first?;
    let window_ms = second.at_ms.checked_sub(first.at_ms).filter(|window| *window > 0)?;
    let seconds = second.cpu_seconds? - first.cpu_seconds?;
    if seconds < 0.0 {
        return None;
    }
    // A rate in billionths of a processor; the casts saturate.
    let nanos = (seconds / window_ms as f64 * 1e12).round() as i64;
    let cpu = format!("{nanos}n").parse::<Quantity>().ok()?.to_string();
    let memory = Quantity::from_units(second.memory_bytes? as i64, Format::BinarySi).to_string();
    Some(Usage { cpu, memory, at_ms: second.at_ms, window_ms })
}

impl Usage {
    fn quantities(&self) -> Value {
        json!({"cpu": self.cpu, "memory": self.memory})
    }
}

/// `metav1.Duration` of less than some minutes, in Go's form.
fn go_duration(ms: i64) -> String {
    let (minutes, ms) = (ms / 60_000, ms % 60_000);
    let fraction = format!("{:03}", ms % 1000);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    let minutes = if minutes > 0 { format!("{minutes}m") } else { String::new() };
    format!("{minutes}{}{point}{fraction}s", ms / 1000)
}

fn measured(kind: &str, object: &Value, at_ms: i64, window_ms: i64) -> Value {
    let time = |at: Timestamp| apimachinery::time::format_seconds(at);
    let at = Timestamp::from_millisecond(at_ms).unwrap_or(Timestamp::UNIX_EPOCH);
    let mut metadata = json!({"name": crate::object::name(object), "creationTimestamp": time(Timestamp::now())});
    for (key, pointer) in [("namespace", "/metadata/namespace"), ("labels", "/metadata/labels")] {
        if let Some(value) = object.pointer(pointer) {
            metadata[key] = value.clone();
        }
    }
    json!({"kind": kind, "apiVersion": format!("{GROUP}/{VERSION}"), "metadata": metadata,
        "timestamp": time(at), "window": go_duration(window_ms)})
}

fn node_metrics(node: &Value, first: &Look, second: &Look) -> Option<Value> {
    let usage = usage(Some(&first.node), &second.node)?;
    let mut metrics = measured("NodeMetrics", node, usage.at_ms, usage.window_ms);
    metrics["usage"] = usage.quantities();
    Some(metrics)
}

fn pod_metrics(pod: &Value, first: &Look, second: &Look) -> Option<Value> {
    let (namespace, name) = (text(pod, "/metadata/namespace"), text(pod, "/metadata/name"));
    let own = second.containers.iter().filter(|((of, pod, _), _)| of == namespace && pod == name);
    let used: Vec<(&str, Usage)> =
        own.filter_map(|(key, point)| Some((key.2.as_str(), usage(first.containers.get(key), point)?))).collect();
    let earliest = used.iter().map(|(_, usage)| usage).min_by_key(|usage| usage.at_ms)?;
    let mut metrics = measured("PodMetrics", pod, earliest.at_ms, earliest.window_ms);
    metrics["containers"] = used.iter().map(|(name, usage)| json!({"name": name, "usage": usage.quantities()})).collect();
    Some(metrics)
}

/// Resources of the group: plural, singular name's default, kind, whether namespaced.
pub const RESOURCES: [(&str, &str, bool); 2] = [("nodes", "NodeMetrics", false), ("pods", "PodMetrics", true)];

/// Answers a GET of nodes or pods, or of one of them.
///
/// # Errors
/// 404 for what is not there or has no metrics (yet), 405 for other verbs, 400 for selectors that cannot be read.
pub async fn answer(api: &Api, info: &RequestInfo, query: &Query) -> Result<Response<Body>, Status> {
    let found = RESOURCES.iter().find(|(resource, ..)| *resource == info.resource && info.version == VERSION);
    let Some((resource, kind, namespaced)) = found.filter(|_| info.subresource.is_empty()) else { return Err(Status::no_such_path()) };
    if !matches!(info.verb.as_str(), "get" | "list") {
        let message = "the server does not allow this method on the requested resource".to_owned();
        return Err(Status { code: 405, reason: "MethodNotAllowed", message, details: Some(json!({})) });
    }
    if !namespaced && !info.namespace.is_empty() {
        return Err(Status::no_such_path());
    }
    let facts = kinds::by_resource("", "v1", resource).ok_or_else(|| Status::internal("pods and nodes are served"))?;
    let labels = LabelSelector::parse(query.get("labelSelector").unwrap_or("")).map_err(Status::bad_request)?;
    let fields = FieldSelector::parse(facts, query.get("fieldSelector").unwrap_or("")).map_err(Status::bad_request)?;
    let namespace = (*namespaced && !info.namespace.is_empty()).then_some(info.namespace.as_str());
    let mut objects = api.lookup.list(resource, namespace);
    objects.retain(|object| {
        let named = info.name.is_empty() || crate::object::name(object) == info.name;
        named && labels.matches_object(object) && fields.matches(facts, object)
    });
    let node_of =
        |object: &Value| if *namespaced { text(object, "/spec/nodeName").to_owned() } else { crate::object::name(object).to_owned() };
    let looks = look_at(api, objects.iter().map(|object| node_of(object)).collect()).await;
    let items = objects.iter().filter_map(|object| {
        let (first, second) = looks.get(&node_of(object))?;
        if *namespaced { pod_metrics(object, first, second) } else { node_metrics(object, first, second) }
    });
    let mut items: Vec<Value> = items.collect();
    if info.verb == "get" {
        let missing = || Status::not_found(GROUP, kind, &full_name(info));
        return Ok(reply::json(&items.pop().ok_or_else(missing)?));
    }
    Ok(reply::json(&json!({"kind": format!("{kind}List"), "apiVersion": format!("{GROUP}/{VERSION}"), "metadata": {}, "items": items})))
}

fn full_name(info: &RequestInfo) -> String {
    if info.namespace.is_empty() { info.name.clone() } else { format!("{}/{}", info.namespace, info.name) }
}

/// Looks at nodes, each once; one whose kubelet does not answer is left out.
async fn look_at(api: &Api, names: std::collections::BTreeSet<String>) -> HashMap<String, (Look, Look)> {
    let nodes = names.into_iter().filter_map(|name| api.lookup.get("nodes", "", &name));
    let asked = futures::stream::iter(nodes).map(|node| async move {
        match api.looks.two(&api.kubelets, &node).await {
            Ok(looks) => Some((crate::object::name(&node).to_owned(), looks)),
            Err(status) => {
                tracing::warn!(node = crate::object::name(&node), error = status.message, "no metrics of a node");
                None
            }
        }
    });
    asked.buffer_unordered(ASKED_MAX).filter_map(futures::future::ready).collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "# TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total 100 1000\n\
        node_memory_working_set_bytes 1.048576e+06 1000\n\
        container_cpu_usage_seconds_total{container=\"c\",namespace=\"n\",pod=\"p\"} 1.5 1000\n\
        container_memory_working_set_bytes{container=\"c\",namespace=\"n\",pod=\"p\"} 4096 1000\nrubbish\n";

    #[test]
    fn rates_of_two_looks() {
        let first = parse(FIRST);
        let second = parse(&FIRST.replace(" 100 1000", " 100.5 2500").replace(" 1.5 1000", " 1.503 2500"));
        let node = json!({"metadata": {"name": "a", "labels": {"x": "y"}}});
        let metrics = node_metrics(&node, &first, &second).expect("metrics");
        assert_eq!(metrics["usage"], json!({"cpu": "333333333n", "memory": "1Mi"}));
        assert_eq!((&metrics["window"], &metrics["timestamp"]), (&json!("1.5s"), &json!("1970-01-01T00:00:02Z")));
        let pod = json!({"metadata": {"name": "p", "namespace": "n"}});
        let metrics = pod_metrics(&pod, &first, &second).expect("metrics");
        assert_eq!(metrics["containers"], json!([{"name": "c", "usage": {"cpu": "2m", "memory": "4Ki"}}]));
    }

    #[test]
    fn no_rate_from_one_look_or_over_a_restart() {
        let first = parse(FIRST);
        assert_eq!(usage(Some(&first.node), &first.node), None);
        let again = Point { cpu_seconds: Some(1.0), at_ms: 2000, ..first.node };
        assert_eq!(usage(Some(&first.node), &again), None);
        assert_eq!(usage(None, &first.node), None);
        let other = json!({"metadata": {"name": "q", "namespace": "n"}});
        assert_eq!(pod_metrics(&other, &first, &first), None);
    }

    #[test]
    fn durations_as_go_writes_them() {
        for (ms, text) in [(1000, "1s"), (1500, "1.5s"), (1002, "1.002s"), (61_020, "1m1.02s"), (60_000, "1m0s")] {
            assert_eq!(go_duration(ms), text);
        }
    }
}
