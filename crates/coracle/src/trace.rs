//! `coracle trace`: the road of a pod as a waterfall.
//!
//! Every part reports its hops as `tracing` events with the target `coracle::span` and the fields `pod_uid`, `hop`, `start_us`
//! (Unix time, microseconds) and `duration_us`. [`SpanLayer`] keeps them in one file of bounded size; `trace pod` asks the API
//! server for the pod's UID and draws what is there.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use camino::Utf8PathBuf;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context as LayerContext;

/// The target of the events that are spans.
const TARGET: &str = "coracle::span";
/// When the file is this large, in bytes, it becomes `spans.jsonl.1` and a new one begins.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// The width of the bars, in characters.
const BAR_WIDTH: usize = 50;

/// One hop of one pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Span {
    pod_uid: String,
    hop: String,
    start_us: u64,
    duration_us: u64,
}

impl Visit for Span {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "start_us" => self.start_us = value,
            "duration_us" => self.duration_us = value,
            _ => {}
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.record_u64(field, u64::try_from(value).unwrap_or(0));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "pod_uid" => self.pod_uid = value.to_owned(),
            "hop" => self.hop = value.to_owned(),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Keeps span events in a file. A file that cannot be written costs the trace, never the program.
#[derive(Debug)]
pub struct SpanLayer {
    path: Utf8PathBuf,
    file: Mutex<Option<File>>,
}

impl SpanLayer {
    /// A layer that appends to `path`; the file is opened with the first span.
    pub fn new(path: Utf8PathBuf) -> Self {
        SpanLayer { path, file: Mutex::new(None) }
    }

    fn append(&self, span: &Span) -> std::io::Result<()> {
        let Ok(mut guard) = self.file.lock() else { return Ok(()) };
        if guard.as_ref().is_some_and(|file| file.metadata().is_ok_and(|metadata| metadata.len() > FILE_BYTES_MAX)) {
            *guard = None;
            fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
        }
        if guard.is_none() {
            if let Some(directory) = self.path.parent() {
                fs::create_dir_all(directory)?;
            }
            *guard = Some(OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?);
        }
        let mut line = serde_json::to_vec(span)?;
        line.push(b'\n');
        match guard.as_mut() {
            Some(file) => file.write_all(&line),
            None => Ok(()),
        }
    }
}

impl<S: Subscriber> Layer<S> for SpanLayer {
    fn enabled(&self, _metadata: &Metadata<'_>, _context: LayerContext<'_, S>) -> bool {
        true
    }

    fn on_event(&self, event: &Event<'_>, _context: LayerContext<'_, S>) {
        if event.metadata().target() == TARGET {
            let mut span = Span::default();
            event.record(&mut span);
            let _ = self.append(&span);
        }
    }
}

/// The flags of `coracle trace`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to trace: only `pod` so far.
    #[arg(value_parser = ["pod"])]
    kind: String,
    /// The pod's name.
    name: String,
    /// The pod's namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Where the cluster's data are.
    #[arg(long, default_value = "/var/lib/coracle")]
    data_dir: Utf8PathBuf,
    /// `json` prints the spans, one a line.
    #[arg(short, long, value_parser = ["json"])]
    output: Option<String>,
}

/// Prints the waterfall of a pod.
pub async fn run(args: Args) -> Result<()> {
    let settings = crate::settings::Settings::load(&args.data_dir)?
        .with_context(|| format!("--data-dir: there is no Coracle in {}", args.data_dir))?;
    let client = crate::apply::admin(&args.data_dir).await?;
    let pod = Api::<Pod>::namespaced(client, &args.namespace)
        .get(&args.name)
        .await
        .with_context(|| format!("failed to get pod {}/{}", args.namespace, args.name))?;
    let uid = pod.metadata.uid.context("the pod has no UID")?;
    let mut spans = Vec::new();
    for path in [settings.spans().with_extension("jsonl.1"), settings.spans()] {
        spans.extend(read(&path, &uid)?);
    }
    if spans.is_empty() {
        bail!("no spans of pod {}/{} are kept; it is older than what {} holds", args.namespace, args.name, settings.spans());
    }
    spans.sort_by_key(|span| (span.start_us, std::cmp::Reverse(span.duration_us)));
    let mut stdout = std::io::stdout().lock();
    if args.output.is_some() {
        for span in &spans {
            writeln!(stdout, "{}", serde_json::to_string(span)?)?;
        }
    } else {
        write!(stdout, "{}", waterfall(&spans))?;
    }
    Ok(())
}

fn read(path: &Utf8PathBuf, uid: &str) -> Result<Vec<Span>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("failed to read {path}")),
    };
    let mut spans = Vec::new();
    for line in BufReader::new(file).lines() {
        // A line that a kill tore is passed over.
        if let Ok(span) = serde_json::from_str::<Span>(&line.with_context(|| format!("failed to read {path}"))?)
            && span.pod_uid == uid
        {
            spans.push(span);
        }
    }
    Ok(spans)
}

/// A line per hop: when it began and how long it took, in milliseconds since the first, and a bar to scale.
fn waterfall(spans: &[Span]) -> String {
    let start = spans.iter().map(|span| span.start_us).min().unwrap_or(0);
    // The road ends where the first status says Running; what comes later (restarts) is drawn but not to scale.
    let end = spans.iter().map(|span| span.start_us + span.duration_us).max().unwrap_or(0);
    let total = (end - start).max(1);
    let width = spans.iter().map(|span| span.hop.len()).max().unwrap_or(0).max("hop".len());
    let cell = |us: u64| (us as usize * BAR_WIDTH) / total as usize;
    let mut text = format!("{:width$}  {:>9}  {:>9}\n", "hop", "at ms", "took ms");
    for span in spans {
        let from = cell(span.start_us - start).min(BAR_WIDTH - 1);
        let length = cell(span.duration_us).clamp(1, BAR_WIDTH - from);
        text += &format!(
            "{:width$}  {:>9.2}  {:>9.2}  {}{}\n",
            span.hop,
            (span.start_us - start) as f64 / 1000.0,
            span.duration_us as f64 / 1000.0,
            " ".repeat(from),
            "█".repeat(length),
        );
    }
    text += &format!("{:width$}  {:>9}  {:>9.2}\n", "total", "", total as f64 / 1000.0);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(hop: &str, start_us: u64, duration_us: u64) -> Span {
        Span { pod_uid: "u".into(), hop: hop.into(), start_us, duration_us }
    }

    #[test]
    fn bars_are_to_scale() {
        let text = waterfall(&[span("apiserver.create", 1_000, 2_000), span("cri.RunPodSandbox", 6_000, 5_000)]);
        let bars: Vec<usize> = text.lines().skip(1).map(|line| line.matches('█').count()).collect();
        assert_eq!(bars, [10, 25, 0]);
        assert!(text.lines().last().unwrap().ends_with("10.00"));
    }

    #[test]
    fn spans_are_kept_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("trace/spans.jsonl")).unwrap();
        let layer = SpanLayer::new(path.clone());
        layer.append(&span("scheduler.bind", 5, 6)).unwrap();
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"pod_uid\":\"u\",\"ho").unwrap();
        assert_eq!(read(&path, "u").unwrap(), [span("scheduler.bind", 5, 6)]);
        assert_eq!(read(&path, "other").unwrap(), []);
    }
}
