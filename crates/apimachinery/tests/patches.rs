//! Property tests of patches, quantities, selectors and the strict parser.

use apimachinery::codec::{Media, decode, strict};
use apimachinery::kinds::Gvk;
use apimachinery::patch;
use apimachinery::quantity::Quantity;
use apimachinery::schema::schema;
use apimachinery::selector::label::LabelSelector;
use proptest::prelude::*;
use serde_json::{Map, Value};

/// JSON whose keys often are those of pods and of patch directives.
fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        prop_oneof![Just("a"), Just("delete"), Just("replace"), Just("Always"), Just("")].prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "spec",
        "metadata",
        "containers",
        "name",
        "labels",
        "$patch",
        "$retainKeys",
        "$setElementOrder/containers",
        "$deleteFromPrimitiveList/finalizers",
        "finalizers",
        "volumes",
        "env",
        "image",
    ]);
    leaf.prop_recursive(5, 48, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..5).prop_map(|entries| {
                Value::Object(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>())
            }),
        ]
    })
}

proptest! {
    /// Any patch of any object is a result or an error, never a panic; directives never survive in what is new.
    #[test]
    fn strategic_takes_anything(target in json_value(), change in json_value()) {
        let id = schema().by_kind("", "v1", "Pod").expect("a kind");
        let mut patched = target;
        let _ = patch::strategic::apply(id, &mut patched, change);
    }

    /// RFC 7386: applying a patch twice is applying it once.
    #[test]
    fn merge_is_idempotent(target in json_value(), change in json_value()) {
        let mut once = target;
        patch::merge::apply(&mut once, change.clone());
        let mut twice = once.clone();
        patch::merge::apply(&mut twice, change);
        prop_assert_eq!(once, twice);
    }

    /// A whole-document JSON patch gives the document; any patch is a result or an error.
    #[test]
    fn json_patch_takes_anything(target in json_value(), value in json_value(), path in "(/(spec|containers|-|0|1|a~1b)){0,4}") {
        let mut whole = target.clone();
        patch::json::apply(&mut whole, serde_json::json!([{"op": "replace", "path": "", "value": value}])).expect("the root is there");
        prop_assert_eq!(&whole, &value);
        for op in ["add", "remove", "replace", "test", "move", "copy"] {
            let mut patched = target.clone();
            let _ = patch::json::apply(&mut patched, serde_json::json!([{"op": op, "path": path, "from": path, "value": value}]));
        }
    }

    /// The canonical text parses to the same quantity and is its own canonical text; order is that of the numbers.
    #[test]
    fn quantities(left in -1_000_000_000i64..1_000_000_000, right in -1_000_000_000i64..1_000_000_000, suffix in "(n|u|m||k|M|G|Ki|Mi|Gi|e3)") {
        let parse = |number: i64| format!("{number}{suffix}").parse::<Quantity>().expect("well-formed");
        let (left_quantity, right_quantity) = (parse(left), parse(right));
        let text = left_quantity.to_string();
        let back: Quantity = text.parse().expect("canonical");
        prop_assert_eq!(back, left_quantity);
        prop_assert_eq!(back.to_string(), text);
        prop_assert_eq!(left_quantity.cmp(&right_quantity), left.cmp(&right));
        prop_assert_eq!(left_quantity.plus(right_quantity).minus(right_quantity), left_quantity);
    }

    #[test]
    fn text_parsers_take_anything(text in "[ -~]{0,40}", bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        let _ = LabelSelector::parse(&text);
        let _ = text.parse::<Quantity>();
        for media in [Media::Json, Media::Yaml, Media::Protobuf] {
            let _ = decode(media, &bytes, &Gvk::new("v1", "Pod"));
            let _ = decode(media, text.as_bytes(), &Gvk::new("v1", "Pod"));
        }
    }

    /// The strict parser reads what serde_json reads (whose maps also keep the last of duplicates).
    #[test]
    fn strict_parser_agrees(value in json_value()) {
        let id = schema().by_kind("", "v1", "Pod").expect("a kind");
        let parsed = strict::parse_json(value.to_string().as_bytes(), id).expect("JSON");
        prop_assert_eq!(parsed.value, value);
    }
}
