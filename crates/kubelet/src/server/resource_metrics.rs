//! `/metrics/resource`: processor time and working set of the node, its pods and their containers, for metrics-server and
//! Prometheus (upstream pkg/kubelet/metrics/collectors/resource_metrics.go, v1.37), as Prometheus' text format 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1 as cri;

use crate::kubelet::Kubelet;
use crate::model::{self, labels};
use crate::node::host;

/// The text's media type.
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is known of one container, pod or node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sample {
    cpu_seconds: Option<f64>,
    memory_bytes: Option<u64>,
    start_seconds: Option<f64>,
    at_ms: i64,
}

impl Sample {
    /// Whether this one says more of what is running now.
    fn is_newer_than(&self, other: &Sample) -> bool {
        (self.cpu_seconds.is_some(), self.at_ms) > (other.cpu_seconds.is_some(), other.at_ms)
    }
}

/// The labels of a sample, as they are written.
type Labels = String;

/// All metrics; a runtime that does not answer is told by `scrape_error 1`.
pub async fn text(kubelet: &Kubelet, pods: &client::Informer<Pod>) -> String {
    let stats = kubelet.runtime.container_stats().await;
    let failed = stats.as_ref().err().map(crate::runtime::go_error);
    if let Some(error) = &failed {
        tracing::warn!(error, "the runtime gives no stats");
    }
    let containers = containers(&stats.unwrap_or_default(), pods);
    let memory = kubelet.facts.memory_bytes - host::memory_available_bytes();
    let node = Sample {
        cpu_seconds: host::cpu_seconds(),
        memory_bytes: u64::try_from(memory).ok(),
        start_seconds: None,
        at_ms: Timestamp::now().as_millisecond(),
    };
    render(node, &containers, failed.is_some())
}

/// Samples by namespace, pod and container.
fn containers(stats: &[cri::ContainerStats], pods: &client::Informer<Pod>) -> BTreeMap<(String, String, String), Sample> {
    let started: std::collections::HashMap<(String, String), f64> = pods.list().iter().flat_map(|pod| starts(pod)).collect();
    let mut found = BTreeMap::new();
    for stat in stats {
        let Some(attributes) = stat.attributes.as_ref() else { continue };
        let label = |name: &str| attributes.labels.get(name).cloned().unwrap_or_default();
        let key = (label(labels::POD_NAMESPACE), label(labels::POD_NAME), label(labels::CONTAINER_NAME));
        if key.1.is_empty() || key.2.is_empty() {
            continue;
        }
        let cpu = stat.cpu.as_ref();
        let memory = stat.memory.as_ref();
        let at_ns = cpu.map(|cpu| cpu.timestamp).or(memory.map(|memory| memory.timestamp)).unwrap_or(0);
        let sample = Sample {
            cpu_seconds: cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map(|nanos| nanos.value as f64 / 1e9),
            memory_bytes: memory.and_then(|memory| memory.working_set_bytes).map(|bytes| bytes.value),
            start_seconds: started.get(&(label(labels::POD_UID), key.2.clone())).copied(),
            at_ms: at_ns / 1_000_000,
        };
        // A runtime also lists the ended attempts of a container, without figures or with old ones.
        if found.get(&key).is_none_or(|known: &Sample| sample.is_newer_than(known)) {
            found.insert(key, sample);
        }
    }
    found
}

/// Since when each running container of a pod runs, by the pod's uid and its name.
fn starts(pod: &Pod) -> Vec<((String, String), f64)> {
    let status = pod.status.iter();
    let all = status.flat_map(|s| {
        let lists = [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses];
        lists.into_iter().flat_map(|list| list.iter().flatten())
    });
    let started = all.filter_map(|container| {
        let at = container.state.as_ref()?.running.as_ref()?.started_at.as_ref()?;
        Some(((model::uid(pod).to_owned(), container.name.clone()), at.0.as_millisecond() as f64 / 1e3))
    });
    started.collect()
}

fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn render(node: Sample, containers: &BTreeMap<(String, String, String), Sample>, failed: bool) -> String {
    let mut pods: BTreeMap<Labels, Sample> = BTreeMap::new();
    let mut lines: Vec<(Labels, Sample)> = Vec::new();
    for ((namespace, pod, container), sample) in containers {
        let of_pod = format!("namespace=\"{}\",pod=\"{}\"", quoted(namespace), quoted(pod));
        lines.push((format!("{{container=\"{}\",{of_pod}}}", quoted(container)), *sample));
        let sum = pods.entry(format!("{{{of_pod}}}")).or_default();
        sum.cpu_seconds = add(sum.cpu_seconds, sample.cpu_seconds);
        sum.memory_bytes = sum.memory_bytes.map_or(sample.memory_bytes, |sum| Some(sum + sample.memory_bytes.unwrap_or(0)));
        sum.at_ms = sum.at_ms.max(sample.at_ms);
    }
    let pods: Vec<(Labels, Sample)> = pods.into_iter().collect();
    let node = [(Labels::new(), node)];
    let cpu = |sample: &Sample| sample.cpu_seconds;
    let memory = |sample: &Sample| sample.memory_bytes.map(|bytes| bytes as f64);
    let mut out = String::new();
    family(&mut out, "container_cpu_usage_seconds_total", "counter", &lines, cpu);
    family(&mut out, "container_memory_working_set_bytes", "gauge", &lines, memory);
    family(&mut out, "container_start_time_seconds", "gauge", &lines, |sample| sample.start_seconds);
    family(&mut out, "node_cpu_usage_seconds_total", "counter", &node, cpu);
    family(&mut out, "node_memory_working_set_bytes", "gauge", &node, memory);
    family(&mut out, "pod_cpu_usage_seconds_total", "counter", &pods, cpu);
    family(&mut out, "pod_memory_working_set_bytes", "gauge", &pods, memory);
    for name in ["resource_scrape_error", "scrape_error"] {
        let _ = writeln!(out, "# TYPE {name} gauge\n{name} {}", u8::from(failed));
    }
    out
}

fn add(sum: Option<f64>, more: Option<f64>) -> Option<f64> {
    match (sum, more) {
        (Some(sum), Some(more)) => Some(sum + more),
        (one, other) => one.or(other),
    }
}

fn family(out: &mut String, name: &str, kind: &str, samples: &[(Labels, Sample)], value: impl Fn(&Sample) -> Option<f64>) {
    let mut is_first = true;
    for (labels, sample) in samples {
        let Some(number) = value(sample) else { continue };
        if std::mem::take(&mut is_first) {
            // Writing to a string does not fail.
            let _ = writeln!(out, "# TYPE {name} {kind}");
        }
        let _ = writeln!(out, "{name}{labels} {number} {}", sample.at_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_attempt_is_newer_than_an_ended_one() {
        let running = Sample { cpu_seconds: Some(0.1), at_ms: 7, ..Sample::default() };
        for ended in [Sample { cpu_seconds: Some(9.0), at_ms: 6, ..running }, Sample { cpu_seconds: None, at_ms: 8, ..running }] {
            assert!(running.is_newer_than(&ended) && !ended.is_newer_than(&running));
        }
    }

    #[test]
    fn containers_add_up_to_pods() {
        let sample = |cpu, memory| Sample { cpu_seconds: Some(cpu), memory_bytes: Some(memory), start_seconds: Some(1.5), at_ms: 7 };
        let key = |name: &str| ("ns".to_owned(), "p\"".to_owned(), name.to_owned());
        let containers = BTreeMap::from([(key("a"), sample(0.25, 10)), (key("b"), sample(0.5, 20))]);
        let text = render(Sample { cpu_seconds: Some(9.0), at_ms: 8, ..Sample::default() }, &containers, false);
        for line in [
            "# TYPE container_cpu_usage_seconds_total counter",
            "container_cpu_usage_seconds_total{container=\"a\",namespace=\"ns\",pod=\"p\\\"\"} 0.25 7",
            "container_start_time_seconds{container=\"b\",namespace=\"ns\",pod=\"p\\\"\"} 1.5 7",
            "node_cpu_usage_seconds_total 9 8",
            "pod_cpu_usage_seconds_total{namespace=\"ns\",pod=\"p\\\"\"} 0.75 7",
            "pod_memory_working_set_bytes{namespace=\"ns\",pod=\"p\\\"\"} 30 7",
            "scrape_error 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
        assert!(!text.contains("node_memory_working_set_bytes"), "what is not known is not told");
    }
}
