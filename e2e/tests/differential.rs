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
use apimachinery::{Gvk, codec};
use e2e::http::{Answer, Request, frames};
use e2e::servers::{Server, make_keys, start_ours, start_ours_on_etcd, start_real};
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
/// The binary media type; a body with it is written as JSON in the corpus and encoded before it is sent.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
/// How long a request with `until` is repeated.
const EVENTUALLY: Duration = Duration::from_secs(60);
/// How often it is.
const PAUSE: Duration = Duration::from_millis(50);

/// One of the servers, with the answers of it that are kept.
struct Side {
    name: &'static str,
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
    let mut ours = vec![
        Side { name: "ours", server: start_ours(folder.path())?, kept: BTreeMap::new() },
        Side { name: "ours on etcd", server: start_ours_on_etcd(folder.path(), &server)?, kept: BTreeMap::new() },
    ];
    let mut real = Side { name: "upstream", server, kept: BTreeMap::new() };
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
            let differences = compare(&mut real, &mut ours, case).with_context(|| format!("failed to play '{}'", case.name))?;
            match known.differs.get(&case.name) {
                Some(reason) if differences.is_empty() => {
                    failures.push(format!("{}: differs no more; delete it from known.toml ({reason})", case.name));
                }
                Some(_) => {}
                None => failures.extend(differences.into_iter().map(|difference| format!("{}: {difference}", case.name))),
            }
        }
    }
    println!("{asked} requests, {} known differences", known.differs.len());
    if !failures.is_empty() {
        bail!("{} of {asked} requests are answered otherwise:\n{}", failures.len(), failures.join("\n\n"));
    }
    Ok(())
}

/// How the answers differ, if they do. What the two of ours have in common is told once.
fn compare(real: &mut Side, ours: &mut [Side], case: &Case) -> Result<Vec<String>> {
    let wanted = render(&real.play(case)?);
    let mut differences = BTreeMap::<String, Vec<&str>>::new();
    for side in ours {
        let got = render(&side.play(case)?);
        if wanted != got {
            differences.entry(diff(&wanted, &got).join("\n")).or_default().push(side.name);
        }
    }
    let told = |(difference, sides): (String, Vec<&str>)| format!("{} {} ({})\n{difference}", case.method, case.path, sides.join(", "));
    Ok(differences.into_iter().map(told).collect())
}

/// `{{NAME/POINTER}}`.
static PLACEHOLDER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\{\{([^{}/]+)(/[^{}]+)\}\}").ok());

impl Side {
    /// Sends the request of a case to this server.
    fn play(&mut self, case: &Case) -> Result<Answer> {
        let body = match (&case.body, &case.raw) {
            (Some(body), _) if case.headers.iter().any(|header| *header == format!("Content-Type: {PROTOBUF}")) => {
                let gvk = Gvk::of(body).context("a body for protobuf names its kind")?;
                codec::protobuf::encode(&gvk, body)?
            }
            (Some(body), _) => self.fill(&serde_json::to_string(body)?).into_bytes(),
            (None, Some(raw)) => self.fill(raw).into_bytes(),
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
        let path = self.fill(&case.path);
        let request = Request { method: &case.method, path: &path, headers, body, events: case.events };
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
    if let Some(found) = protobuf(answer) {
        let documents: Vec<String> = found
            .into_iter()
            .map(|mut document| {
                scrub(&mut document);
                serde_json::to_string_pretty(&document).unwrap_or_default()
            })
            .collect();
        return text + &documents.join("\n");
    }
    let body = String::from_utf8_lossy(&answer.body);
    let mut documents: Vec<Value> = Vec::new();
    // What is quoted in YAML, and how, is a matter of taste.
    if answer.values("content-type").contains(&"application/yaml") {
        documents.extend(serde_yaml_ng::from_str::<Value>(&body));
    }
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

/// The objects of an answer in protobuf; `None` for another one.
fn protobuf(answer: &Answer) -> Option<Vec<Value>> {
    let kind = answer.values("content-type").first().copied().unwrap_or_default();
    if !kind.starts_with(PROTOBUF) {
        return None;
    }
    let decode = |bytes: &[u8]| match codec::protobuf::decode(bytes) {
        Ok((gvk, mut object)) => {
            object["decoded as"] = Value::from(gvk.to_string());
            object
        }
        Err(error) => Value::from(format!("no protobuf: {error}")),
    };
    if kind.contains("stream=watch") {
        let event = |bytes: &[u8]| match codec::protobuf::decode_watch_event(bytes) {
            Ok((kind, object)) => serde_json::json!({"type": kind, "object": object}),
            Err(error) => Value::from(format!("no event: {error}")),
        };
        return Some(frames(&answer.body).into_iter().map(event).collect());
    }
    Some(vec![decode(&answer.body)])
}

/// What differs from run to run.
static VOLATILE: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<uid>"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "<time>"),
        (r"kube-api-access-[a-z0-9]{5}", "kube-api-access-<random>"),
        (r"\b([Gg])en-[a-z0-9]{5}\b", "${1}en-<random>"),
        (r"^(\d+[smhdy])+$", "<age>"),
        (r"10\.96\.0\.\d+", "<cluster ip>"),
        (r"in record \(\d+\)", "in record (<version>)"),
        (r":3[0-2]\d{3}/(TCP|UDP)", ":<port>/$1"),
        (r"^192\.0\.2\.1:\d+$", "<address>"),
        (r"resourceVersion=\d+", "resourceVersion=<version>"),
        (r"current: \d+", "current: <version>"),
        (r"Key: /coracle/", "Key: /registry/"),
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
