//! The real one is asked: every request of `e2e/differential/*.yaml` is played to kube-apiserver 1.37 on etcd and to ours, and the
//! answers are compared but for uids, times, versions, addresses, managedFields and the prose of table columns. What differs
//! stands in `known.toml` with its reason; an entry that no longer differs fails the test too.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::http::{Answer, Request};
use e2e::servers::{Server, make_keys, start_ours, start_real};
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
    /// Of a watch that goes on: the number of events that come, after which it is left.
    events: Option<usize>,
    /// Repeats the request until this is its status, for what a server learns of a change only a moment later.
    until: Option<u16>,
    /// Keeps the answer by this name: `{{NAME/POINTER}}` in later paths and bodies is what that server had there (a JSON pointer).
    save: Option<String>,
}

/// The headers that are compared.
const HEADERS: &[&str] = &["content-type", "warning"];
/// How long a request with `until` is repeated.
const EVENTUALLY: Duration = Duration::from_secs(60);
/// How often it is.
const PAUSE: Duration = Duration::from_millis(50);

/// One of the two servers, with the answers of it that are kept.
struct Side {
    server: Server,
    kept: BTreeMap<String, Value>,
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

/// What is wrong, as the end of a test's output: without a backtrace, which would leave no room for it.
struct Failure(String);

impl fmt::Debug for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[test]
fn answers_are_those_of_kube_apiserver() -> Result<(), Failure> {
    play().map_err(|error| Failure(format!("{error:#}")))
}

fn play() -> Result<()> {
    let folder = tempfile::tempdir()?;
    make_keys(folder.path())?;
    let Some(server) = start_real(folder.path())? else {
        e2e::skip("answers_are_those_of_kube_apiserver", "there is no kube-apiserver or etcd: they are built by Go");
        return Ok(());
    };
    let mut real = Side { server, kept: BTreeMap::new() };
    let mut ours = Side { server: start_ours(folder.path())?, kept: BTreeMap::new() };
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
            let difference = compare(&mut real, &mut ours, case).with_context(|| format!("failed to play '{}'", case.name))?;
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
fn compare(real: &mut Side, ours: &mut Side, case: &Case) -> Result<Option<String>> {
    let (wanted, got) = (real.play(case)?, ours.play(case)?);
    let (wanted, got) = (render(&wanted), render(&got));
    if wanted == got {
        return Ok(None);
    }
    Ok(Some(format!("{} {}\n{}", case.method, case.path, diff(&wanted, &got).join("\n"))))
}

/// `{{NAME/POINTER}}`.
static PLACEHOLDER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{\{([^{}/]+)(/[^{}]+)\}\}").ok());

impl Side {
    /// Sends the request of a case to this server.
    fn play(&mut self, case: &Case) -> Result<Answer> {
        let body = match (&case.body, &case.raw) {
            (Some(body), _) => self.fill(&serde_json::to_string(body)?),
            (None, Some(raw)) => self.fill(raw),
            (None, None) => String::new(),
        };
        let mut headers = case.headers.clone();
        let names = |name: &str| case.headers.iter().any(|header| header.to_lowercase().starts_with(name));
        if !names("accept:") {
            headers.push("Accept: application/json".to_owned());
        }
        if !body.is_empty() && !names("content-type:") {
            headers.push("Content-Type: application/json".to_owned());
        }
        let path = self.fill(&case.path);
        let request = Request { method: &case.method, path: &path, headers, body: body.into_bytes(), events: case.events };
        let deadline = Instant::now() + EVENTUALLY;
        let mut answer = self.server.ask(&request)?;
        while case.until.is_some_and(|status| status != answer.status) && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
            answer = self.server.ask(&request)?;
        }
        if let Some(name) = &case.save {
            self.kept.insert(name.clone(), serde_json::from_slice(&answer.body).unwrap_or_default());
        }
        Ok(answer)
    }

    fn fill(&self, text: &str) -> String {
        let Some(pattern) = PLACEHOLDER.as_ref() else { return text.to_owned() };
        let value = |groups: &regex::Captures| {
            let kept = self.kept.get(&groups[1]).and_then(|answer| answer.pointer(&groups[2])).and_then(Value::as_str);
            kept.unwrap_or("nothing-kept").to_owned()
        };
        pattern.replace_all(text, value).into_owned()
    }
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
    let mut text = format!("status {}\n", answer.status);
    for name in HEADERS {
        for value in answer.values(name) {
            text += &format!("{name} {}\n", scrub_text(value));
        }
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
        (r"^(\d+[smhdy])+$", "<age>"),
        (r"10\.96\.0\.\d+", "<cluster ip>"),
        (r"in record \(\d+\)", "in record (<version>)"),
        (r":3[0-2]\d{3}/(TCP|UDP)", ":<port>/$1"),
        (r"^192\.0\.2\.1:\d+$", "<address>"),
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
            // Members are compared whatever their order is.
            let sorted: BTreeMap<String, Value> = std::mem::take(map).into_iter().collect();
            map.extend(sorted);
            for (key, value) in map.iter_mut() {
                match key.as_str() {
                    "resourceVersion" | "continue" if value.as_str().is_some_and(|text| !text.is_empty()) => {
                        *value = Value::from("<version>")
                    }
                    "token" if value.as_str().is_some_and(|text| text.starts_with("ey")) => *value = Value::from("<token>"),
                    "nodePort" if value.as_i64().is_some_and(|port| port > 0) => *value = Value::from("<port>"),
                    // Prose of upstream's, which ours does not copy.
                    "columnDefinitions" => {
                        for column in value.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
                            column.remove("description");
                        }
                    }
                    _ => scrub(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(scrub),
        Value::String(text) => *text = scrub_text(text),
        _ => {}
    }
}
