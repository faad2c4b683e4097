//! The real one is asked: every request of `e2e/differential/*.yaml` is played to kube-apiserver 1.37 on etcd and to ours, and the
//! answers are compared but for uids, times, versions, addresses and managedFields. What differs stands in `known.toml` with its
//! reason; an entry that no longer differs fails the test too.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use e2e::servers::{Answer, Request, Server, make_keys, start_ours, start_real};
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

/// A request of the corpus.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default = "get")]
    method: String,
    path: String,
    #[serde(default)]
    headers: Vec<String>,
    /// The body, sent as JSON.
    body: Option<Value>,
    /// The body as it is.
    raw: Option<String>,
    /// For how many seconds to listen.
    seconds: Option<u32>,
}

fn get() -> String {
    "GET".to_owned()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    #[serde(default)]
    differs: BTreeMap<String, String>,
}

#[test]
fn answers_are_those_of_kube_apiserver() -> Result<()> {
    let folder = tempfile::tempdir()?;
    make_keys(folder.path())?;
    let Some(real) = start_real(folder.path())? else {
        e2e::skip("answers_are_those_of_kube_apiserver", "there is no kube-apiserver or etcd: they are built by Go");
        return Ok(());
    };
    let ours = start_ours(folder.path())?;
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("differential");
    let known: Known = toml::from_str(&fs::read_to_string(corpus.join("known.toml"))?).context("failed to parse known.toml")?;
    let mut files: Vec<_> = fs::read_dir(&corpus)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let (mut asked, mut failures) = (0, Vec::new());
    for path in files {
        let text = fs::read_to_string(&path)?;
        let cases: Vec<Case> = serde_yaml_ng::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?;
        for case in &cases {
            asked += 1;
            let difference = compare(&real, &ours, case)?;
            match (difference, known.differs.get(&case.name)) {
                (None, None) | (Some(_), Some(_)) => {}
                (None, Some(reason)) => failures.push(format!("{}: differs no more; delete it from known.toml ({reason})", case.name)),
                (Some(difference), None) => failures.push(format!("{}: {difference}", case.name)),
            }
        }
    }
    println!("{asked} requests, {} known differences", known.differs.len());
    if !failures.is_empty() {
        bail!("{} of {asked} requests are answered otherwise:\n{}", failures.len(), failures.join("\n\n"));
    }
    Ok(())
}

/// How the answers differ, if they do.
fn compare(real: &Server, ours: &Server, case: &Case) -> Result<Option<String>> {
    let body = match (&case.body, &case.raw) {
        (Some(body), _) => serde_json::to_vec(body)?,
        (None, Some(raw)) => raw.clone().into_bytes(),
        (None, None) => Vec::new(),
    };
    let mut headers = case.headers.clone();
    let names = |name: &str| case.headers.iter().any(|header| header.to_lowercase().starts_with(name));
    if !names("accept:") {
        headers.push("Accept: application/json".to_owned());
    }
    if !body.is_empty() && !names("content-type:") {
        headers.push("Content-Type: application/json".to_owned());
    }
    let request = Request { method: &case.method, path: &case.path, headers, body, seconds: case.seconds };
    let (wanted, got) = (real.ask(&request)?, ours.ask(&request)?);
    let (wanted, got) = (render(&wanted), render(&got));
    if wanted == got {
        return Ok(None);
    }
    let differ: Vec<String> = diff(&wanted, &got);
    Ok(Some(format!("{} {}\n{}", case.method, case.path, differ.join("\n"))))
}

/// The lines that only one side has.
fn diff(wanted: &str, got: &str) -> Vec<String> {
    let (wanted, got): (Vec<&str>, Vec<&str>) = (wanted.lines().collect(), got.lines().collect());
    let only = |these: &[&str], those: &[&str], sign: &str| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).take(20).map(|line| format!("  {sign} {line}")).collect()
    };
    let mut lines = only(&wanted, &got, "upstream:");
    lines.extend(only(&got, &wanted, "    ours:"));
    if lines.is_empty() {
        lines.push("  the same lines in another order or number".to_owned());
    }
    lines
}

/// An answer as comparable text.
fn render(answer: &Answer) -> String {
    let mut text = format!("status {}\ncontent-type {}\n", answer.status, answer.content_type);
    for warning in &answer.warnings {
        text += &format!("warning {warning}\n");
    }
    let body = String::from_utf8_lossy(&answer.body);
    let mut documents: Vec<Value> = Vec::new();
    for document in serde_json::Deserializer::from_str(&body).into_iter::<Value>() {
        match document {
            Ok(document) => documents.push(document),
            Err(_) => break,
        }
    }
    if documents.is_empty() {
        text += &scrub_text(&body);
    }
    for mut document in documents {
        scrub(&mut document);
        text += &serde_json::to_string_pretty(&document).unwrap_or_default();
        text.push('\n');
    }
    text
}

/// What differs from run to run.
static VOLATILE: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<uid>"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "<time>"),
        (r"kube-api-access-[a-z0-9]{5}", "kube-api-access-<random>"),
        (r"^gen-[a-z0-9]{5}$", "gen-<random>"),
        (r"^\d+[smhd]$", "<age>"),
        (r"10\.96\.0\.\d+", "<cluster ip>"),
        (r"resourceVersion=\d+", "resourceVersion=<version>"),
        (r"^ey[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$", "<token>"),
    ]
    .into_iter()
    // The patterns are constants; a test that cannot compile them compares them unscrubbed and fails.
    .filter_map(|(pattern, name)| Some((Regex::new(pattern).ok()?, name)))
    .collect()
});

fn scrub_text(text: &str) -> String {
    VOLATILE.iter().fold(text.to_owned(), |text, (pattern, name)| pattern.replace_all(&text, *name).into_owned())
}

fn scrub(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("managedFields");
            for (key, value) in map.iter_mut() {
                match key.as_str() {
                    "resourceVersion" | "continue" if value.as_str().is_some_and(|text| !text.is_empty()) => {
                        *value = Value::from("<version>")
                    }
                    "nodePort" if value.as_i64().is_some_and(|port| port > 0) => *value = Value::from("<port>"),
                    _ => scrub(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(scrub),
        Value::String(text) => *text = scrub_text(text),
        _ => {}
    }
}
