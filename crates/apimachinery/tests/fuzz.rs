//! Mutated input for every parser of objects, patches, selectors and quantities: an answer or an error, never a panic, and never more
//! than was given.

use std::path::Path;

use apimachinery::codec::{protobuf, strict};
use apimachinery::normalize::normalize;
use apimachinery::selector::{field::FieldSelector, label::LabelSelector};
use apimachinery::tree::Tree;
use apimachinery::{defaulting, fields, formats, kinds, patch, quantity, strategy, support, table, time, validation};
use serde_json::Value;
use testkit::fuzz::Fuzz;

/// Field names and words that objects are made of.
const WORDS: [&str; 16] = [
    "\"apiVersion\"",
    "\"kind\"",
    "\"metadata\"",
    "\"name\"",
    "\"$patch\"",
    "\"labels\"",
    "\"containers\"",
    "\"op\"",
    "\"path\"",
    "~1",
    "/-",
    "25%",
    "1Ki",
    "2026-01-02T03:04:05Z",
    "metadata.name",
    " in (",
];

fn corpus(name: &str) -> Fuzz {
    Fuzz::new(name).folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)).words(&WORDS)
}

fn kind_of(object: &Value) -> &'static kinds::KindFacts {
    let pod = || kinds::by_kind("", "v1", "Pod").expect("there are pods");
    kinds::Gvk::of(object).and_then(|gvk| kinds::by_gvk(&gvk)).unwrap_or_else(pod)
}

/// The whole way of an object through the server.
fn pipeline(mut object: Value) {
    let kind = kind_of(&object);
    let _ = fields::check(kind, &object);
    if normalize(kind.type_id, &mut object).is_err() {
        return;
    }
    let old = object.clone();
    defaulting::default(kind, &mut object);
    strategy::prepare_create(kind, &mut object);
    let _ = (validation::create(kind, &object), strategy::warnings_create(kind, &object), support::check_update(kind, &object, &old));
    let _ = (validation::update(kind, &object, &old), validation::update_status(kind, &object, &old));
    let _ = table::row(kind, &Tree::from(&object), "2026-01-01T00:00:00Z".parse().expect("a time"));
    if let Ok(bytes) = protobuf::encode(&kind.gvk(), &object) {
        let (_, back) = protobuf::decode(&bytes).expect("what was encoded is decoded");
        let _ = protobuf::encode(&kind.gvk(), &back).expect("what was decoded is encoded");
    }
}

#[test]
fn json() {
    corpus("json").runs(1000).run(|input| {
        let _ = strict::check_json_object(input);
        let id = kind_of(&serde_json::from_slice(input).unwrap_or_default()).type_id;
        if let Ok(parsed) = strict::parse_json(input, id) {
            assert!(parsed.value.to_string().len() <= input.len() * 8 + 64, "an object that is larger than its text");
            pipeline(parsed.value);
        }
    });
}

#[test]
fn yaml() {
    let pod = kinds::by_kind("", "v1", "Pod").expect("there are pods").type_id;
    corpus("yaml").runs(200).run(|input| {
        if let Ok(parsed) = strict::parse_yaml(input, pod) {
            assert!(parsed.value.to_string().len() <= input.len() * 80 + 1_000_000, "an object that is larger than its text");
            assert!(parsed.errors.len() <= 100);
            pipeline(parsed.value);
        }
    });
}

#[test]
fn protobuf_bodies() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/json");
    let mut fuzz = Fuzz::new("protobuf").words(&["k8s\0", "v1", "Pod"]);
    for entry in std::fs::read_dir(folder).expect("a corpus").flatten() {
        let mut object: Value = serde_json::from_slice(&std::fs::read(entry.path()).expect("a file")).expect("JSON");
        let kind = kind_of(&object);
        if normalize(kind.type_id, &mut object).is_ok() {
            fuzz = fuzz.seed(protobuf::encode(&kind.gvk(), &object).expect("a normalized object encodes"));
        }
    }
    fuzz.runs(1000).run(|input| {
        if let Ok((gvk, object)) = protobuf::decode(input) {
            let _ = protobuf::encode(&gvk, &object);
            pipeline(object);
        }
        let _ = protobuf::decode_watch_event(input);
    });
}

#[test]
fn selectors() {
    let pod = kinds::by_kind("", "v1", "Pod").expect("there are pods");
    let object: Value = serde_json::from_str(include_str!("corpus/json/pod.json")).expect("the corpus' own pod");
    corpus("selectors").run(|input| {
        let text = String::from_utf8_lossy(input);
        if let Ok(selector) = LabelSelector::parse(&text) {
            let _ = selector.matches_object(&object);
        }
        if let Ok(selector) = FieldSelector::parse(pod, &text) {
            let _ = selector.matches(pod, &object);
        }
    });
}

#[test]
fn quantities_times_and_names() {
    corpus("quantities").run(|input| {
        let text = String::from_utf8_lossy(input);
        if let Ok(parsed) = text.parse::<quantity::Quantity>() {
            let written = parsed.to_string();
            let again = written.parse::<quantity::Quantity>().expect("what was written is read");
            assert_eq!(again.to_string(), written, "{text:?}");
            let _ = (parsed.value(), parsed.milli_value(), parsed.plus(parsed).minus(again).sign());
        }
        let _ = time::parse(&text).map(time::format_micros);
        let _ = (formats::dns1123_subdomain(&text), formats::label_key(&text), formats::label_value(&text), formats::go_quote(&text));
        let _ = (formats::percent(&text), formats::env_name(&text), formats::http_header_name(&text), formats::path_segment(&text));
    });
}

#[test]
fn patches() {
    let pod = kinds::by_kind("", "v1", "Pod").expect("there are pods");
    let object: Value = serde_json::from_str(include_str!("corpus/json/pod.json")).expect("the corpus' own pod");
    corpus("patches").runs(1000).run(|input| {
        let Ok(change) = serde_json::from_slice::<Value>(input) else { return };
        let mut target = object.clone();
        if patch::json::apply(&mut target, change.clone()).is_ok() {
            pipeline(target);
        }
        let mut target = object.clone();
        patch::merge::apply(&mut target, change.clone());
        pipeline(target);
        let mut target = object.clone();
        if patch::strategic::apply(pod.type_id, &mut target, change).is_ok() {
            pipeline(target);
        }
    });
}

/// Found by fuzzing: aliases of a long text, and long paths in front of many duplicates, were gigabytes.
#[test]
fn small_documents_that_were_large() {
    let pod = kinds::by_kind("", "v1", "Pod").expect("there are pods").type_id;
    let aliases = format!("a: &a \"{}\"\nb: [{}]\n", "x".repeat(100_000), "*a, ".repeat(5000));
    let refused = strict::parse_yaml(aliases.as_bytes(), pod).expect_err("an alias bomb");
    assert!(refused.contains("excessive aliasing"), "{refused}");
    let duplicates = format!("{{\"{}\":{{{}\"b\":1}}}}", "k".repeat(10_000), "\"a\":1,".repeat(20_000));
    let parsed = strict::parse_json(duplicates.as_bytes(), pod).expect("JSON");
    assert_eq!(parsed.errors.len(), 100);
}
