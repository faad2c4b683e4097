//! The quality of service class of a pod. Source: kubernetes v1.37 `pkg/apis/core/helper/qos/qos.go`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::quantity::Quantity;

/// `Guaranteed`, `Burstable` or `BestEffort`, of a pod's spec.
pub fn class(spec: &Value) -> &'static str {
    if spec.get("resources").is_some_and(|resources| resources.get("limits").is_some() || resources.get("requests").is_some()) {
        return class_of(&[&spec["resources"]]);
    }
    let list = |key: &str| spec.get(key).and_then(Value::as_array).into_iter().flatten();
    let resources: Vec<&Value> =
        list("containers").chain(list("initContainers")).map(|container| container.get("resources").unwrap_or(&Value::Null)).collect();
    class_of(&resources)
}

fn class_of(all: &[&Value]) -> &'static str {
    let (mut requests, mut limits) = (BTreeMap::new(), BTreeMap::new());
    let mut guaranteed = true;
    for resources in all {
        add(&mut requests, resources.get("requests"));
        let found = add(&mut limits, resources.get("limits"));
        guaranteed &= found == 2;
    }
    if requests.is_empty() && limits.is_empty() {
        return "BestEffort";
    }
    if guaranteed && requests == limits { "Guaranteed" } else { "Burstable" }
}

/// Adds cpu and memory that are above zero; returns how many of the two there were.
fn add(total: &mut BTreeMap<&'static str, Quantity>, list: Option<&Value>) -> usize {
    let mut found = 0;
    for name in ["cpu", "memory"] {
        let quantity = list.and_then(|list| list.get(name)).and_then(Value::as_str).and_then(|text| text.parse::<Quantity>().ok());
        if let Some(quantity) = quantity.filter(|quantity| quantity.sign() > 0) {
            found += 1;
            let sum = total.get(name).map_or(quantity, |sum: &Quantity| sum.plus(quantity));
            total.insert(name, sum);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn classes() {
        for (containers, want) in [
            (json!([{}]), "BestEffort"),
            (json!([{"resources": {"requests": {"cpu": "1"}}}]), "Burstable"),
            (json!([{"resources": {"requests": {"cpu": "1", "memory": "1"}, "limits": {"cpu": "1000m", "memory": "1"}}}]), "Guaranteed"),
            (json!([{"resources": {"requests": {"cpu": "1", "memory": "1"}, "limits": {"cpu": "1", "memory": "1"}}}, {}]), "Burstable"),
            (json!([{"resources": {"limits": {"cpu": "0"}}}]), "BestEffort"),
        ] {
            assert_eq!(class(&json!({"containers": containers})), want);
        }
    }
}
