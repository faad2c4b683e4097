//! The real one is asked, for CRI: every case of `e2e/cri/*.yaml` is played to containerd 2.4 and to ours, and the gRPC codes of all calls and
//! what a case shows of the answers are compared. What differs stands in `known.toml` with its reason; an entry that no longer differs fails too.
//!
//! containerd says Unknown to most wrong requests. Ours then may say as well that the argument or the state is wrong: no client takes those for
//! anything else than a failure, as it would NotFound or Unimplemented.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::cri::Cri;
use e2e::node::{Node, on_node};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use testkit::containerd::{self as config, Config, ConfigVersion, Handler};
use testkit::image::ImageSpec;
use testkit::tar::Entry;
use tonic::Code;

/// How long a step may wait for a state.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file of the corpus.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Corpus {
    /// Values by name, for `$NAME`.
    #[serde(default)]
    values: BTreeMap<String, Value>,
    cases: Vec<Case>,
}

/// Steps that begin on a runtime without pods.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    case: String,
    steps: Vec<Step>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    /// The method.
    call: String,
    /// The request; a string `$NAME` is a value, or what was saved.
    #[serde(default)]
    with: Map<String, Value>,
    /// Fields that are set in it afterwards, by dotted path; null removes.
    #[serde(default)]
    set: BTreeMap<String, Value>,
    /// Fields of the answer that later steps use, by name.
    #[serde(default)]
    save: BTreeMap<String, String>,
    /// Fields of the answer that are compared, by dotted path; a number picks of a list, `#` is its length.
    #[serde(default)]
    show: Vec<String>,
    /// The call is repeated until this field has this value.
    until: Option<(String, Value)>,
    /// How often the call is made, one after another; all of their codes are compared.
    #[serde(default = "once")]
    times: usize,
}

fn once() -> usize {
    1
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    #[serde(default)]
    differs: BTreeMap<String, String>,
}

#[test]
fn calls_are_answered_as_by_containerd() -> Result<()> {
    let test = "calls_are_answered_as_by_containerd";
    let (Some(containerd), Some(_), Some(_)) = (e2e::peer("containerd"), e2e::peer("runc"), e2e::peer("containerd-shim-runc-v2")) else {
        e2e::skip(test, "there is no containerd or runc: they are built by Go");
        return Ok(());
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cri");
    let known: Known = toml::from_str(&fs::read_to_string(folder.join("known.toml"))?).context("failed to parse known.toml")?;
    let mut files: Vec<_> = fs::read_dir(&folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let corpora: Vec<Corpus> = files
        .iter()
        .map(|path| serde_yaml_ng::from_str(&fs::read_to_string(path)?).with_context(|| format!("failed to parse {}", path.display())))
        .collect::<Result<_>>()?;
    on_node(test, |node| {
        let images = serve_images(node)?;
        let theirs = start_theirs(node, &containerd, &images)?;
        node.start_ours(&[])?;
        let ours = Cri::connect(&node.socket())?;
        compare(&corpora, &known, (&theirs, &ours), &images, node)
    })
    .map(drop)
}

fn compare(corpora: &[Corpus], known: &Known, (theirs, ours): (&Cri, &Cri), image: &str, node: &Node<'_>) -> Result<()> {
    let only = std::env::var("CORACLE_CRI_CASE").unwrap_or_default();
    let (mut calls, mut failures) = (0, Vec::new());
    for corpus in corpora {
        for case in corpus.cases.iter().filter(|case| case.case.contains(&only)) {
            let play = |cri: &Cri, side: &str| -> Result<Vec<Played>> {
                let logs = node.folder().join(format!("logs-{side}"));
                let mut values = corpus.values.clone();
                values.insert("IMAGE".to_owned(), image.into());
                values.insert("LOGS".to_owned(), logs.display().to_string().into());
                values.insert("CGROUP".to_owned(), format!("{}/{side}", node.cgroup()).into());
                let played = play(cri, case, values).with_context(|| format!("{side}: failed to play '{}'", case.case));
                clear(cri).with_context(|| format!("{side}: failed to clear up after '{}'", case.case))?;
                played
            };
            let (expected, actual) = (play(theirs, "containerd")?, play(ours, "ours")?);
            calls += expected.len();
            let differences: Vec<String> = expected
                .iter()
                .zip(&actual)
                .filter(|(expected, actual)| !actual.is_as(expected))
                .map(|(expected, actual)| format!("{}:\n  containerd: {expected}\n  ours:       {actual}", case.case))
                .collect();
            match (differences.is_empty(), known.differs.get(&case.case)) {
                (true, None) | (false, Some(_)) => {}
                (true, Some(reason)) => failures.push(format!("{}: differs no more; delete it from known.toml ({reason})", case.case)),
                (false, None) => failures.extend(differences),
            }
        }
    }
    println!("{calls} calls were answered by containerd and by ours");
    ensure!(failures.is_empty(), "{} differences:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// A call that was answered.
struct Played {
    code: Code,
    /// Its code, and what is shown of its answer.
    compared: String,
    /// The refusal's message, for the reader of a difference.
    message: String,
}

impl Played {
    fn is_as(&self, theirs: &Played) -> bool {
        let said_more = theirs.code == Code::Unknown && matches!(self.code, Code::InvalidArgument | Code::FailedPrecondition);
        said_more || self.compared == theirs.compared
    }
}

impl std::fmt::Display for Played {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.compared, self.message)
    }
}

fn play(cri: &Cri, case: &Case, mut values: BTreeMap<String, Value>) -> Result<Vec<Played>> {
    let mut lines = Vec::new();
    for (number, step) in case.steps.iter().enumerate() {
        let mut request = Value::Object(step.with.clone());
        resolve(&mut request, &values)?;
        for (path, value) in &step.set {
            let mut value = value.clone();
            resolve(&mut value, &values)?;
            put(&mut request, path, value).with_context(|| format!("step {number}: no place {path} in the request"))?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut times = step.times;
        while times > 0 {
            let answer = cri.call(&step.call, &request)?;
            if let (Some((path, wanted)), Ok(body)) = (&step.until, &answer)
                && at(body, path) != Some(wanted)
            {
                if Instant::now() > deadline {
                    bail!("step {number}: {} never had {path} = {wanted}: {body}", step.call);
                }
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            times -= 1;
            lines.push(line(number, step, answer, &mut values));
        }
    }
    Ok(lines)
}

fn line(number: usize, step: &Step, answer: Result<Value, tonic::Status>, values: &mut BTreeMap<String, Value>) -> Played {
    let body = match answer {
        Err(status) => {
            for name in step.save.keys() {
                values.insert(name.clone(), "never-made".into());
            }
            let compared = format!("{number} {} {:?}", step.call, status.code());
            return Played { code: status.code(), compared, message: format!("({})", status.message()) };
        }
        Ok(body) => body,
    };
    for (name, path) in &step.save {
        values.insert(name.clone(), at(&body, path).cloned().unwrap_or_default());
    }
    let shown: Vec<String> = step.show.iter().map(|path| format!("{path}={}", show(&body, path, values))).collect();
    Played { code: Code::Ok, compared: format!("{number} {} Ok {}", step.call, shown.join(" ")), message: String::new() }
}

/// A value with what was saved written by its name.
fn show(body: &Value, path: &str, values: &BTreeMap<String, Value>) -> String {
    let value = match path.strip_suffix(".#") {
        Some(list) => at(body, list).and_then(Value::as_array).map_or(0, Vec::len).into(),
        None => at(body, path).cloned().unwrap_or_default(),
    };
    let saved = values.iter().find(|(name, saved)| **saved == value && name.starts_with(char::is_lowercase) && value.is_string());
    saved.map_or_else(|| value.to_string(), |(name, _)| format!("${name}"))
}

fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, part| match value {
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        other => other.get(part),
    })
}

fn put(value: &mut Value, path: &str, new: Value) -> Option<()> {
    let (parents, last) = path.rsplit_once('.').map_or((None, path), |(parents, last)| (Some(parents), last));
    let mut place = value;
    for part in parents.iter().flat_map(|parents| parents.split('.')) {
        place = match place {
            Value::Array(list) => list.get_mut(part.parse::<usize>().ok()?)?,
            other => other.as_object_mut()?.entry(part).or_insert_with(|| json!({})),
        };
    }
    if new.is_null() {
        place.as_object_mut()?.remove(last);
    } else {
        place.as_object_mut()?.insert(last.to_owned(), new);
    }
    Some(())
}

/// Puts values in the place of their names.
fn resolve(value: &mut Value, values: &BTreeMap<String, Value>) -> Result<()> {
    match value {
        Value::String(text) => {
            if let Some(name) = text.strip_prefix('$') {
                let mut found = values.get(name).cloned().with_context(|| format!("there is no value {name}"))?;
                resolve(&mut found, values)?;
                *value = found;
            }
            Ok(())
        }
        Value::Array(list) => list.iter_mut().try_for_each(|item| resolve(item, values)),
        Value::Object(map) => map.values_mut().try_for_each(|item| resolve(item, values)),
        _ => Ok(()),
    }
}

/// Removes all pods.
fn clear(cri: &Cri) -> Result<()> {
    let pods = cri.call("ListPodSandbox", &json!({}))??;
    for pod in pods["items"].as_array().into_iter().flatten() {
        let request = json!({ "pod_sandbox_id": pod["id"] });
        cri.call("StopPodSandbox", &request)??;
        cri.call("RemovePodSandbox", &request)??;
    }
    Ok(())
}

/// An image with a shell, which serves as containerd's sandbox image too.
fn serve_images(node: &Node<'_>) -> Result<String> {
    let busybox = fs::read("/bin/busybox").context("failed to read /bin/busybox (Debian's busybox-static)")?;
    let mut entries = vec![Entry::dir("bin"), Entry::dir("etc"), Entry::dir("tmp"), Entry::executable("bin/busybox", busybox)];
    entries.push(Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"));
    entries.push(Entry::file("etc/group", "root:x:0:\nuser:x:1000:\n"));
    entries.extend(["sh", "sleep", "echo", "cat", "true", "false"].map(|name| Entry::symlink(&format!("bin/{name}"), "busybox")));
    let image = ImageSpec::new().layer(entries).config("Cmd", json!(["sleep", "1000000"])).config("Env", json!(["PATH=/bin"])).build();
    Ok(node.registry.add("busybox", "1", &image))
}

/// containerd with runc and our registry; pods of the corpus are on the host's network, so that no CNI plugin is needed.
fn start_theirs(node: &mut Node<'_>, containerd: &Path, image: &str) -> Result<Cri> {
    let folder = node.folder().join("containerd");
    let (registry, _) = image.split_once('/').context("the image's name has no host")?;
    let peers = containerd.parent().context("containerd has no folder")?;
    let handlers = vec![Handler::runc("runc", peers.join("runc"))];
    let cri = config::Cri { sandbox_image: image.to_owned(), registry: registry.to_owned(), network: None, handlers };
    let config = Config::within(&folder, ConfigVersion::Three, Some(cri));
    let (socket, config) = (config.socket.clone(), config.write().context("failed to write containerd's configuration")?);
    let path = format!("{}:{}", peers.display(), std::env::var("PATH").unwrap_or_default());
    let arguments = [format!("PATH={path}"), containerd.display().to_string(), "--config".to_owned(), config.display().to_string()];
    node.start(Path::new("env"), &arguments, &socket)?;
    let cri = Cri::connect(&socket)?;
    let deadline = Instant::now() + PATIENCE;
    // It listens before its CRI plugin is ready.
    while let Err(status) = cri.call("Version", &json!({}))? {
        ensure!(Instant::now() < deadline, "containerd does not answer: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(cri)
}
