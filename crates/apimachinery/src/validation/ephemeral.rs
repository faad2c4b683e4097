//! Ephemeral containers. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `validateEphemeralContainers`,
//! `ValidatePodEphemeralContainersUpdate`.

use serde_json::Value;

use super::container::{self, Context};
use super::pod;
use super::support::{Errors, Path, get, list, text};
use crate::field_error::FieldError;

/// Fields of a container that an ephemeral one may not have, in the order of the Go struct.
const FORBIDDEN: &[&str] = &[
    "ports",
    "resources",
    "resizePolicy",
    "restartPolicy",
    "restartPolicyRules",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
];
const CANNOT: &str = "cannot be set for an Ephemeral Container";

/// The pod's ephemeral containers.
pub(super) fn containers(errors: &mut Errors, spec: &Value, context: &Context<'_>, path: &Path<'_>) {
    let of = |key| list(spec, key).iter().map(|container| text(container, "name"));
    let others: Vec<&str> = of("containers").chain(of("initContainers")).collect();
    let mut names = others.clone();
    for (index, container) in list(spec, "ephemeralContainers").iter().enumerate() {
        let path = &path.index(index);
        container::common(errors, container, context, path);
        let image = text(container, "image");
        if image.trim() != image {
            errors.invalid(&path.child("image"), image, "must not have leading or trailing whitespace");
        }
        let name = text(container, "name");
        if names.contains(&name) {
            errors.duplicate(&path.child("name"), name);
        } else {
            names.push(name);
        }
        let target = text(container, "targetContainerName");
        if !target.is_empty() && !others.contains(&target) {
            errors.push(FieldError::not_found(path.child("targetContainerName"), target));
        }
        for key in FORBIDDEN.iter().filter(|key| is_set(container, key)) {
            errors.forbidden(&path.child(key), CANNOT);
        }
        for (index, mount) in list(container, "volumeMounts").iter().enumerate() {
            for key in ["subPath", "subPathExpr"].iter().filter(|key| !text(mount, key).is_empty()) {
                errors.forbidden(&path.child("volumeMounts").index(index).child(key), CANNOT);
            }
        }
    }
}

fn is_set(container: &Value, key: &str) -> bool {
    match get(container, key) {
        None => false,
        Some(Value::Array(items)) => !items.is_empty(),
        // `resources` is no pointer: empty is not set.
        Some(Value::Object(map)) => key != "resources" || !map.is_empty(),
        Some(_) => true,
    }
}

/// An update through `ephemeralcontainers`; metadata is checked before.
pub(super) fn update(errors: &mut Errors, pod: &Value, old: &Value) {
    pod::metadata_and_spec(errors, pod);
    if old.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some() {
        errors.forbidden(&Path::new(""), "static pods do not support ephemeral containers");
        return;
    }
    let of = |pod: &'_ Value| -> Vec<Value> { get(pod, "spec").map(|spec| list(spec, "ephemeralContainers").to_vec()).unwrap_or_default() };
    let present = of(pod);
    let path = Path::new("spec");
    for before in of(old) {
        let name = text(&before, "name");
        match present.iter().find(|container| text(container, "name") == name) {
            None => {
                let detail = format!("existing ephemeral containers {name:?} may not be removed\n");
                errors.forbidden(&path.child("ephemeralContainers"), &detail);
            }
            Some(now) if *now != before => {
                let detail = format!("existing ephemeral containers {name:?} may not be changed\n");
                errors.forbidden(&path.child("ephemeralContainers"), &detail);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{defaulting, kinds, normalize};
    use serde_json::json;

    fn pod(ephemeral: Value) -> Value {
        let kind = kinds::by_kind("", "v1", "Pod").expect("served");
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [{"name": "main", "image": "i"}], "ephemeralContainers": ephemeral}});
        normalize::normalize(kind.type_id, &mut pod).expect("fits");
        defaulting::default(kind, &mut pod);
        pod
    }

    fn check(new: Value, old: Value) -> Vec<String> {
        let mut errors = Errors::default();
        update(&mut errors, &pod(new), &pod(old));
        errors.into_list().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_additions_of_plain_containers() {
        let first = json!({"name": "first", "image": "i", "targetContainerName": "main", "stdin": true, "tty": true});
        assert_eq!(check(json!([first]), json!([])), [""; 0]);
        assert_eq!(check(json!([{"name": "second", "image": "i"}, first]), json!([first])), [""; 0]);
        let at = "spec.ephemeralContainers";
        assert_eq!(
            check(json!([]), json!([first])),
            [format!("{at}: Forbidden: existing ephemeral containers \"first\" may not be removed\n")]
        );
        let changed = json!({"name": "first", "image": "other"});
        assert_eq!(
            check(json!([changed]), json!([first])),
            [format!("{at}: Forbidden: existing ephemeral containers \"first\" may not be changed\n")]
        );
        let wrong = json!({"name": "main", "image": "i", "targetContainerName": "none", "ports": [{"containerPort": 1}],
            "resources": {"limits": {"cpu": "1"}}, "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}});
        assert_eq!(
            check(json!([wrong]), json!([])),
            [
                format!("{at}[0].name: Duplicate value: \"main\""),
                format!("{at}[0].targetContainerName: Not found: \"none\""),
                format!("{at}[0].ports: Forbidden: {CANNOT}"),
                format!("{at}[0].resources: Forbidden: {CANNOT}"),
                format!("{at}[0].lifecycle: Forbidden: {CANNOT}"),
            ]
        );
    }
}
