//! The protobuf codec against upstream's golden bytes, and against itself with generated objects.
//!
//! The golden files (`GROUP.VERSION.KIND.json` and `.pb`, every field set) are those of the module k8s.io/api v0.37, folder `testdata/HEAD`; set
//! `CORACLE_K8S_API_TESTDATA` to that folder.

use std::path::PathBuf;

use apimachinery::codec::protobuf::{self, ListEncoder};
use apimachinery::kinds::Gvk;
use apimachinery::schema::schema;
use apimachinery::tree::Tree;
use serde_json::{Value, json};

fn golden_folder() -> Option<PathBuf> {
    std::env::var_os("CORACLE_K8S_API_TESTDATA").map(PathBuf::from)
}

#[test]
fn golden_bytes_decode_and_encode() {
    let Some(folder) = golden_folder() else {
        eprintln!("SKIPPED: golden_bytes_decode_and_encode: CORACLE_K8S_API_TESTDATA is not set");
        return;
    };
    let mut seen = 0;
    for (_, found) in schema().iter() {
        let Some((group, kind)) = found.name.split_once(".v1.") else { continue };
        let group = match group {
            "rbac" => "rbac.authorization.k8s.io",
            "discovery" => "discovery.k8s.io",
            "coordination" => "coordination.k8s.io",
            "events" => "events.k8s.io",
            "scheduling" => "scheduling.k8s.io",
            "authentication" => "authentication.k8s.io",
            "authorization" => "authorization.k8s.io",
            other => other,
        };
        let stem = format!("{group}.v1.{kind}");
        let Ok(bytes) = std::fs::read(folder.join(format!("{stem}.pb"))) else { continue };
        let json: Value =
            serde_json::from_slice(&std::fs::read(folder.join(format!("{stem}.json"))).expect("json beside pb")).expect("JSON");
        let (gvk, decoded) = protobuf::decode(&bytes).unwrap_or_else(|error| panic!("{stem}: {error}"));
        assert_eq!(decoded, json, "{stem}: decoded");
        let encoded = protobuf::encode(&gvk, &json).unwrap_or_else(|error| panic!("{stem}: {error}"));
        assert!(encoded == bytes, "{stem}: encoded bytes differ");
        seen += 1;
    }
    assert!(seen >= 24, "only {seen} kinds had golden bytes");
}

/// A list encoded item by item is the list encoded whole.
#[test]
fn lists_item_by_item() {
    let gvk = Gvk::new("v1", "ConfigMapList");
    let item = |name: &str| json!({"metadata": {"name": name, "labels": {"a": "b"}}, "data": {"k": "v", "a": ""}});
    let metadata = json!({"resourceVersion": "7", "continue": "x"});
    for names in [&["a", "b", "c"][..], &[]] {
        let items: Vec<Value> = names.iter().map(|name| item(name)).collect();
        let whole = protobuf::encode(&gvk, &json!({"metadata": metadata, "items": items})).expect("a list");
        // Without and with room.
        for bytes in [0, 10_000] {
            let mut list = ListEncoder::new(&gvk, bytes).expect("a list's kind");
            for item in items.iter().rev() {
                list.push_front(&Tree::from(item)).expect("a ConfigMap");
            }
            assert_eq!(list.finish(&metadata).expect("a list"), whole);
        }
    }
    assert!(ListEncoder::new(&Gvk::new("v1", "ConfigMap"), 0).is_err());
}
