//! Property tests: objects generated from the schema survive every codec.

use apimachinery::codec::protobuf;
use apimachinery::normalize::normalize;
use apimachinery::schema::{Container, Field, Item, Shape, TypeId, schema};
use apimachinery::tree::Tree;
use apimachinery::{defaulting, kinds, strategy, support, table, validation};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::{Map, Value, json};

/// A random value of a type: each field is there with a chance that falls with depth.
fn value(rng: &mut TestRng, id: TypeId, depth: u32) -> Value {
    let found = schema().get(id);
    match found.shape {
        Shape::Object => {
            let mut map = Map::new();
            for field in &found.fields {
                if field.number != 0 && rng.random_ratio(2, 3 + 2 * depth) {
                    map.insert(field.name.to_owned(), field_value(rng, field, depth));
                }
            }
            Value::Object(map)
        }
        Shape::Quantity => {
            let suffixes = ["", "m", "Ki", "Gi", "k", "n", "e3"];
            format!("{}{}", rng.random_range(0..5000), suffixes[rng.random_range(0..suffixes.len())]).into()
        }
        Shape::Time => format!("20{:02}-03-04T05:06:07Z", rng.random_range(10..60)).into(),
        Shape::MicroTime => format!("2026-03-04T05:06:07.{:06}Z", rng.random_range(0..1_000_000)).into(),
        Shape::IntOrString if rng.random_bool(0.5) => rng.random_range(-5..70_000).into(),
        Shape::IntOrString => "25%".into(),
        Shape::RawExtension | Shape::FieldsV1 => json!({"f:x": {}}),
        Shape::Free => json!({}),
    }
}

fn field_value(rng: &mut TestRng, field: &Field, depth: u32) -> Value {
    match field.container {
        Container::Single => item(rng, field, depth),
        Container::List => (0..rng.random_range(1..3)).map(|_| item(rng, field, depth)).collect(),
        Container::Map => Value::Object((0..rng.random_range(1..3)).map(|n| (format!("k{n}"), item(rng, field, depth))).collect()),
    }
}

fn item(rng: &mut TestRng, field: &Field, depth: u32) -> Value {
    match field.item {
        Item::String => ["", "a", "ünï", "x-y"][rng.random_range(0..4)].into(),
        Item::Bool => rng.random_bool(0.5).into(),
        Item::Int32 => rng.random_range(i32::MIN..=i32::MAX).into(),
        Item::Int64 => rng.random_range(i64::MIN..=i64::MAX).into(),
        Item::Double => 1.5.into(),
        Item::Bytes => ["", "YQ==", "AAEC"][rng.random_range(0..3)].into(),
        Item::Strings => json!(["a", ""]),
        Item::Type(id) => value(rng, id, depth + 1),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// normalize is idempotent; protobuf gives back what it was given (but that it cannot tell an empty list from none).
    #[test]
    fn protobuf_round_trip(seed in any::<[u8; 32]>()) {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        for (id, found) in schema().iter().filter(|(_, found)| !found.gvks.is_empty()) {
            let mut object = value(&mut rng, id, 0);
            normalize(id, &mut object).map_err(|error| TestCaseError::fail(format!("{}: {error}", found.name)))?;
            let once = object.clone();
            normalize(id, &mut object).expect("a normalized object fits");
            prop_assert_eq!(&once, &object);
            let bytes = protobuf::encode_raw(id, &object).expect("a normalized object encodes");
            let back = protobuf::decode_raw(id, &bytes).map_err(|error| TestCaseError::fail(format!("{}: {error}", found.name)))?;
            prop_assert_eq!(&back, &object, "{}", found.name);
            // The document read from the object's text is the object.
            let text = object.to_string();
            let tree = Tree::read(text.as_bytes()).expect("JSON");
            prop_assert_eq!(&tree.to_value(), &object);
            prop_assert_eq!(tree, Tree::from(&object));
        }
    }

    /// Defaults are idempotent and keep the canonical form; preparation, validation, tables and support take any object.
    #[test]
    fn pipeline_takes_anything(seed in any::<[u8; 32]>()) {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let now = "2026-01-01T00:00:00Z".parse().expect("a time");
        for kind in kinds::all() {
            let mut make = || {
                let mut object = value(&mut rng, kind.type_id, 0);
                normalize(kind.type_id, &mut object).expect("made to fit");
                object
            };
            let (mut object, mut old) = (make(), make());
            let _ = support::check_update(kind, &object, &old);
            for object in [&mut object, &mut old] {
                defaulting::default(kind, object);
                let once = object.clone();
                defaulting::default(kind, object);
                prop_assert_eq!(&once, &*object, "{}", kind.kind);
                normalize(kind.type_id, object).expect("defaults fit");
            }
            let mut created = object.clone();
            strategy::prepare_create(kind, &mut created);
            let _ = (validation::create(kind, &created), strategy::warnings_create(kind, &created));
            let mut updated = object.clone();
            strategy::prepare_update(kind, &mut updated, &old);
            let _ = validation::update(kind, &updated, &old);
            strategy::prepare_status_update(kind, &mut object, &old);
            let _ = validation::update_status(kind, &object, &old);
            let row = table::row(kind, &Tree::from(&created), now);
            prop_assert_eq!(row.cells.len(), table::columns(kind).len());
        }
    }

    /// Rubbish is an error or an object, never a panic.
    #[test]
    fn protobuf_takes_rubbish(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for (id, _) in schema().iter().filter(|(_, found)| !found.gvks.is_empty()) {
            let _ = protobuf::decode_raw(id, &bytes);
        }
        let mut enveloped = b"k8s\0".to_vec();
        enveloped.extend(bytes);
        let _ = protobuf::decode(&enveloped);
    }
}
