//! The field table's word: what it says to be done names modules and tests that are there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use apimachinery::support::{Row, table};

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate stands in crates/").to_owned()
}

/// Whether `crate::module::path` is a module of the workspace.
fn module_exists(path: &str) -> bool {
    let mut parts = path.split("::");
    let mut folder = crates().join(parts.next().unwrap_or("")).join("src");
    for part in parts {
        if folder.join(format!("{part}.rs")).is_file() || folder.join(part).join("mod.rs").is_file() {
            folder = folder.join(part);
        } else {
            return false;
        }
    }
    folder.exists() || folder.with_extension("rs").is_file()
}

/// Whether some source of the crate has a test function of that name.
fn test_exists(path: &str) -> bool {
    let (package, name) = (path.split("::").next().unwrap_or(""), path.rsplit("::").next().unwrap_or(""));
    let mut queue = vec![crates().join(package)];
    while let Some(folder) = queue.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                queue.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && std::fs::read_to_string(&path).is_ok_and(|text| text.contains(&format!("fn {name}(")))
            {
                return true;
            }
        }
    }
    false
}

#[test]
fn what_is_done_is_there() {
    let mut claims = BTreeSet::new();
    for row in table().expect("TOML").into_values().flat_map(std::collections::HashMap::into_values) {
        if let Row::Done(text) = row {
            claims.insert(text);
        }
    }
    let mut wrong = Vec::new();
    for claim in &claims {
        let text = claim.strip_prefix("done: ").expect("checked by a unit test");
        let text = text.split(" (").next().unwrap_or(text);
        if text == "stored as given" {
            continue;
        }
        for word in text.split(", ") {
            let there = match word.strip_prefix("test ") {
                Some(test) => test_exists(test),
                None => module_exists(word),
            };
            if !there {
                wrong.push(word.to_owned());
            }
        }
    }
    assert!(wrong.is_empty(), "data/fields.toml names what is not there: {wrong:?}");
}
