//! What policy reads of the cluster: objects by name, from memory.

use std::sync::Arc;

use serde_json::Value;

/// Reads stored objects. Implemented over the watch caches, so a look-up costs no I/O.
pub trait Lookup: Send + Sync {
    /// An object of a resource (plural name, e.g. `pods`); `namespace` is empty for cluster-scoped ones.
    fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Value>>;

    /// All objects of a resource, in one namespace or in all.
    fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Value>>;
}

/// The string at a JSON pointer, or the empty string.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The list at a JSON pointer, or an empty one.
pub(crate) fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
pub(crate) mod fake {
    //! A [`Lookup`] over a list.

    use super::*;

    /// Objects with the resource that each belongs to.
    #[derive(Default)]
    pub(crate) struct Fake(pub(crate) Vec<(&'static str, Arc<Value>)>);

    impl Fake {
        pub(crate) fn with(mut self, resource: &'static str, object: Value) -> Self {
            self.0.push((resource, Arc::new(object)));
            self
        }
    }

    impl Lookup for Fake {
        fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
            let is = |(kept, object): &&(&str, Arc<Value>)| {
                *kept == resource && text(object, "/metadata/namespace") == namespace && text(object, "/metadata/name") == name
            };
            self.0.iter().find(is).map(|(_, object)| object.clone())
        }

        fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
            let is = |(kept, object): &&(&str, Arc<Value>)| {
                *kept == resource && namespace.is_none_or(|namespace| text(object, "/metadata/namespace") == namespace)
            };
            self.0.iter().filter(is).map(|(_, object)| object.clone()).collect()
        }
    }
}
