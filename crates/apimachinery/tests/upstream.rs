//! What kube-apiserver v1.37.2 answered to creations and updates, against what we make of the same requests.
//!
//! A line of `data/upstream.jsonl`: `kind` (apiVersion, kind), `body`, for updates `old` (as stored) and `sub` (subresource), and `answer`
//! without uid, creationTimestamp, resourceVersion and managedFields. All were dry runs with the ServiceAccount admission off.

use apimachinery::codec::{Media, decode};
use apimachinery::kinds::{self, Gvk, KindFacts};
use apimachinery::status::Status;
use apimachinery::{codec, defaulting, patch, strategy, validation};
use serde_json::{Value, json};

fn ours(kind: &KindFacts, case: &Value) -> Result<Value, Status> {
    let body = case["body"].to_string();
    let mut object = decode(Media::Json, body.as_bytes(), &kind.gvk())?.object;
    if kind.namespaced {
        object["metadata"]["namespace"] = "default".into();
    }
    defaulting::default(kind, &mut object);
    let errors = match case.get("old") {
        None => {
            generate_name(&mut object);
            strategy::prepare_create(kind, &mut object);
            validation::create(kind, &object)
        }
        Some(old) => {
            let mut old = old.clone();
            if let Some(version) = object["metadata"].get("resourceVersion") {
                old["metadata"]["resourceVersion"] = version.clone();
            } else {
                for object in [&mut old, &mut object] {
                    object["metadata"]["resourceVersion"] = "5".into();
                }
            }
            if case["sub"] == "status" {
                strategy::prepare_status_update(kind, &mut object, &old);
                validation::update_status(kind, &object, &old)
            } else {
                admit(&mut object, &old);
                strategy::prepare_update(kind, &mut object, &old);
                validation::update(kind, &object, &old)
            }
        }
    };
    let name = object["metadata"]["name"].as_str().unwrap_or("");
    if errors.is_empty() { Ok(object) } else { Err(Status::invalid(&kind.group, &kind.kind, name, &errors)) }
}

/// The server's part: a name from generateName.
fn generate_name(object: &mut Value) {
    if object["metadata"]["name"].as_str().unwrap_or("").is_empty()
        && let Some(prefix) = object["metadata"]["generateName"].as_str().map(str::to_owned)
    {
        object["metadata"]["name"] = format!("{prefix}abcde").into();
    }
}

/// Admission's part: an update of a pod keeps what admission set.
fn admit(object: &mut Value, old: &Value) {
    if object["kind"] != "Pod" {
        return;
    }
    for key in ["priority", "preemptionPolicy"] {
        object["spec"][key] = old["spec"][key].clone();
    }
    let mut tolerations = object["spec"]["tolerations"].as_array().cloned().unwrap_or_default();
    tolerations.extend(old["spec"]["tolerations"].as_array().cloned().unwrap_or_default());
    object["spec"]["tolerations"] = tolerations.into();
}

/// Takes away what admission and the server's allocators add.
fn strip(object: &mut Value) {
    let kind = object["kind"].as_str().unwrap_or("").to_owned();
    for key in ["resourceVersion", "uid", "creationTimestamp", "managedFields"] {
        object["metadata"].as_object_mut().map(|metadata| metadata.remove(key));
    }
    if object["metadata"].get("generateName").is_some() {
        object["metadata"]["name"] = "generated".into();
    }
    for condition in object.pointer_mut("/status/conditions").and_then(Value::as_array_mut).into_iter().flatten() {
        condition["lastTransitionTime"] = Value::Null;
    }
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    match kind.as_str() {
        "Pod" => {
            for key in ["priority", "preemptionPolicy", "priorityClassName"] {
                spec.remove(key);
            }
            if let Some(Value::Array(tolerations)) = spec.get_mut("tolerations") {
                tolerations.retain(|toleration| toleration["tolerationSeconds"] != 300);
                if tolerations.is_empty() {
                    spec.remove("tolerations");
                }
            }
        }
        "Service" => {
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.remove(key);
            }
            for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                port.as_object_mut().map(|port| port.remove("nodePort"));
            }
        }
        "Node" => {
            if let Some(Value::Array(taints)) = spec.get_mut("taints") {
                taints.retain(|taint| taint["key"] != "node.kubernetes.io/not-ready");
                if taints.is_empty() {
                    spec.remove("taints");
                }
            }
        }
        _ => {}
    }
}

fn judge(case: &Value) -> Option<String> {
    let gvk = Gvk::new(case["kind"][0].as_str()?, case["kind"][1].as_str()?);
    let kind = kinds::by_gvk(&gvk)?;
    let mut theirs = case["answer"].clone();
    let show = |ours: &Value, theirs: &Value| Some(format!("{}\n  ours:   {ours}\n  theirs: {theirs}", case["body"]));
    match ours(kind, case) {
        Ok(mut object) => {
            if theirs["kind"] == "Status" {
                // What admission or an allocator refuses is not ours to find.
                let message = theirs["message"].to_string();
                let allocation = message.contains("failed to allocate") || message.contains("on this cluster");
                let by_others = (theirs["code"] != 422 && theirs["code"] != 400) || allocation;
                return if by_others { None } else { show(&json!("accepted"), &theirs["message"]) };
            }
            strip(&mut object);
            strip(&mut theirs);
            if object == theirs { None } else { show(&object, &theirs) }
        }
        Err(status) => {
            let ours = status.to_value();
            if theirs["kind"] != "Status" {
                return show(&ours["message"], &json!("accepted"));
            }
            // Go's maps have no order, and what differs in a pod's spec is shown otherwise by upstream.
            let causes = |status: &Value| {
                let causes = status["details"]["causes"].as_array().cloned().unwrap_or_default();
                let text = |cause: &Value| cause.to_string().split("\\n").next().unwrap_or("").to_owned();
                let mut texts: Vec<String> = causes.iter().map(text).collect();
                texts.sort_unstable();
                texts
            };
            let by_others = theirs["code"] != 422 || theirs["message"].to_string().contains("on this cluster");
            let same = ours == theirs || (causes(&ours) == causes(&theirs) && ours["code"] == theirs["code"]);
            if same || by_others { None } else { show(&ours["message"], &theirs["message"]) }
        }
    }
}

#[test]
fn as_upstream() {
    let cases: Vec<Value> = include_str!("data/upstream.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let wrong: Vec<String> = cases.iter().filter_map(judge).collect();
    assert!(cases.len() > 300);
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// A line of `data/patches.jsonl`: the object as stored, the patch and its type, and the answer.
fn patched(kind: &KindFacts, case: &Value) -> Result<Value, Status> {
    let mut old = case["old"].clone();
    old["metadata"]["resourceVersion"] = "5".into();
    let mut object = old.clone();
    let change = case["patch"].clone();
    match case["type"].as_str().unwrap_or("") {
        "json-patch" => patch::json::apply(&mut object, change)?,
        "merge-patch" => {
            if !change.is_object() {
                return Err(Status::bad_request(
                    "error decoding patch: json: cannot unmarshal array into Go value of type map[string]interface {}",
                ));
            }
            patch::merge::apply(&mut object, change);
        }
        _ => patch::strategic::apply(kind.type_id, &mut object, change)?,
    }
    let unknown = apimachinery::fields::check(kind, &object);
    if !unknown.is_empty() {
        return Err(Status::invalid_patch("", &format!("strict decoding error: {}", unknown.join(", "))));
    }
    codec::refit(kind.type_id, &mut object, "")?;
    if object["metadata"]["name"] != old["metadata"]["name"] {
        return Err(Status::bad_request("the name of the object does not match the name on the URL"));
    }
    object["kind"] = old["kind"].clone();
    object["apiVersion"] = old["apiVersion"].clone();
    defaulting::default(kind, &mut object);
    strategy::prepare_update(kind, &mut object, &old);
    let errors = validation::update(kind, &object, &old);
    let name = old["metadata"]["name"].as_str().unwrap_or("");
    if errors.is_empty() { Ok(object) } else { Err(Status::invalid(&kind.group, &kind.kind, name, &errors)) }
}

fn judge_patch(case: &Value) -> Option<String> {
    let gvk = Gvk::new(case["kind"][0].as_str()?, case["kind"][1].as_str()?);
    let kind = kinds::by_gvk(&gvk)?;
    let mut theirs = case["answer"].clone();
    let show = |ours: &Value, theirs: &Value| Some(format!("{} {}\n  ours:   {ours}\n  theirs: {theirs}", case["type"], case["patch"]));
    match patched(kind, case) {
        Ok(mut ours) => {
            strip(&mut ours);
            strip(&mut theirs);
            if ours == theirs { None } else { show(&ours, &theirs) }
        }
        Err(status) => {
            // Texts that quote a Go map or the whole object are not compared.
            let quotes = |text: &str| text.contains("patch: Invalid value") || text.contains("map") || text.contains("name on the URL");
            let their_text = theirs["message"].as_str().unwrap_or("accepted");
            let same = status.code == theirs["code"].as_u64().unwrap_or(0) as u16 && (status.message == their_text || quotes(their_text));
            if same { None } else { show(&status.to_value(), &theirs) }
        }
    }
}

#[test]
fn patches_as_upstream() {
    let cases: Vec<Value> = include_str!("data/patches.jsonl").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let wrong: Vec<String> = cases.iter().filter_map(judge_patch).collect();
    assert!(cases.len() > 70);
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
