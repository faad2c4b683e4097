//! A client that creates, patches and deletes while the server dies, and remembers what was acknowledged.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::api::Api;
use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// The objects of the client.
const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

/// What the client knows of an object: the last write, and whether it was answered.
#[derive(Clone, Debug)]
struct Known {
    /// The value that the last acknowledged write gave it; none before the creation and after the deletion.
    acknowledged: Option<Written>,
    /// What a write that got no answer would have made of it, if there was one after that.
    unanswered: Option<Option<&'static str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    value: String,
    revision: String,
}

/// All objects that the client tried to write.
pub struct Ledger(BTreeMap<String, Known>);

/// Creates, patches and deletes objects until `over`. The first write without an answer ends the work on an object.
pub fn write_until(api: &Api, over: &AtomicBool) -> Ledger {
    let mut ledger = BTreeMap::new();
    let mut number = 0;
    while !over.load(Ordering::Relaxed) {
        let name = format!("object-{number}");
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": "created"}});
        let patch = json!({"data": {"value": "patched"}});
        let path = format!("{CONFIGMAPS}/{name}");
        let mut writes = vec![
            ("POST", CONFIGMAPS, "application/json", object.to_string(), Some("created")),
            ("PATCH", path.as_str(), "application/merge-patch+json", patch.to_string(), Some("patched")),
        ];
        if number % 3 == 0 {
            writes.push(("DELETE", &path, "", String::new(), None));
        }
        let mut known = Known { acknowledged: None, unanswered: None };
        for (method, path, content_type, body, becomes) in writes {
            match api.ask(method, path, content_type, &body) {
                Ok((200 | 201, answer)) => known.acknowledged = becomes.and_then(|_| written(&answer)),
                _ => {
                    known.unanswered = Some(becomes);
                    break;
                }
            }
        }
        ledger.insert(name, known);
        number += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ledger(ledger)
}

fn written(object: &str) -> Option<Written> {
    let object: Value = serde_json::from_str(object).ok()?;
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).map(str::to_owned);
    Some(Written { value: text("/data/value")?, revision: text("/metadata/resourceVersion")? })
}

impl Ledger {
    /// Compares with what the server has now. Gives how many objects were written with every answer.
    pub fn check(&self, api: &Api) -> Result<usize> {
        let list = api.object(CONFIGMAPS)?;
        let mut found = BTreeMap::new();
        for item in list["items"].as_array().into_iter().flatten() {
            let name = item.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            found.insert(name.to_owned(), written(&item.to_string()));
        }
        for (name, known) in &self.0 {
            let now = found.get(name).cloned().flatten();
            let as_acknowledged = now == known.acknowledged;
            let value = now.as_ref().map(|written| written.value.as_str());
            let as_unanswered = known.unanswered.is_some_and(|becomes| value == becomes);
            ensure!(as_acknowledged || as_unanswered, "{name} is {now:?}, but the client knows {known:?}");
        }
        let answered = self.0.values().filter(|known| known.unanswered.is_none()).count();
        println!("{answered} of {} objects were written with every answer", self.0.len());
        Ok(answered)
    }
}
