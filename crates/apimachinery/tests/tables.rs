//! Columns and rows of tables against those of kube-apiserver v1.37.2.
//!
//! A line of `data/tables.jsonl` is an object with its `cells` (and `conditions`), or a kind's `columns`. Ages depend on when they were asked
//! for, and are compared as ages.

use apimachinery::kinds::{self, Gvk};
use apimachinery::table;
use apimachinery::tree::Tree;
use serde_json::Value;

/// Replaces durations by `AGE`.
fn ageless(cell: &Value) -> Value {
    let Some(text) = cell.as_str() else { return cell.clone() };
    let is_age = |word: &str| {
        let word = word.trim_start_matches('(');
        !word.is_empty()
            && word.starts_with(|letter: char| letter.is_ascii_digit())
            && word.ends_with(['s', 'm', 'h', 'd', 'y'])
            && word.chars().all(|letter| letter.is_ascii_digit() || "smhdy".contains(letter))
    };
    let words: Vec<String> = text.split(' ').map(|word| if is_age(word) { "AGE".to_owned() } else { word.to_owned() }).collect();
    words.join(" ").into()
}

#[test]
fn as_upstream() {
    let now = "2026-11-23T03:00:00Z".parse().expect("a time");
    let mut wrong = Vec::new();
    let mut rows = 0;
    for line in include_str!("data/tables.jsonl").lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        let gvk = Gvk::new(case["kind"][0].as_str().expect("a text"), case["kind"][1].as_str().expect("a text"));
        let kind = kinds::by_gvk(&gvk).expect("served");
        if let Some(columns) = case.get("columns") {
            let ours: Vec<Value> = table::columns(kind)
                .into_iter()
                .map(|column| serde_json::json!([column["name"], column["type"], column["format"], column["priority"]]))
                .collect();
            if Value::from(ours.clone()) != *columns {
                wrong.push(format!("{gvk}: columns {ours:?} {columns}"));
            }
            continue;
        }
        rows += 1;
        let row = serde_json::to_value(table::row(kind, &Tree::from(&case["object"]), now)).expect("a row");
        let plain = |cells: &Value| cells.as_array().expect("cells").iter().map(ageless).collect::<Vec<_>>();
        if plain(&row["cells"]) != plain(&case["cells"]) || row.get("conditions") != case.get("conditions") {
            wrong.push(format!("{gvk}\n  ours:   {row}\n  theirs: {}", case["cells"]));
        }
    }
    assert!(rows > 40, "{rows}");
    assert!(wrong.is_empty(), "{} of {rows} differ:\n{}", wrong.len(), wrong.join("\n"));
}
