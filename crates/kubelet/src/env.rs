//! A container's environment: `env`, `envFrom`, downward API, ConfigMap and Secret keys, service variables, `$(VAR)`
//! (upstream pkg/kubelet/kubelet_pods.go `makeEnvironmentVariables`, pkg/kubelet/envvars, v1.37). Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource, Pod, Service};

use crate::downward;
use crate::model;
use crate::objects::Lookup;

/// Why an environment cannot be made. The texts are upstream's; they become `CreateContainerConfigError`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A ConfigMap or Secret is absent and not optional, or could not be read.
    #[error("{0}")]
    Object(String),
    /// A key is absent and not optional.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    Key {
        /// The key.
        key: String,
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Namespace of the object.
        namespace: String,
        /// Name of the object.
        name: String,
    },
    /// A field that the downward API does not offer.
    #[error(transparent)]
    Downward(#[from] downward::Error),
    /// A source that this kubelet does not carry out.
    #[error("environment variable {0}: fileKeyRef is not supported by this kubelet")]
    FileKeyRef(String),
}

/// What the environment is made from, beside the container.
pub struct Sources<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// What the downward API needs of the node and the pod's network.
    pub facts: &'a downward::Facts,
    /// ConfigMaps and Secrets that the pod names.
    pub lookup: &'a Lookup,
    /// All services with a cluster IP of all namespaces.
    pub services: &'a [std::sync::Arc<Service>],
}

/// The variables in order: the container's own first, then service variables that it does not set.
pub fn environment(container: &Container, sources: &Sources<'_>) -> Result<Vec<(String, String)>, Error> {
    let services = service_variables(sources.pod, sources.services);
    let mut variables: Vec<(String, String)> = Vec::new();
    for source in container.env_from.iter().flatten() {
        for (name, value) in env_from(source, sources)? {
            set(&mut variables, name, value);
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            Some(source) => match value_from(&variable.name, source, container, sources)? {
                Some(value) => value,
                None => continue,
            },
            None => {
                let text = variable.value.as_deref().unwrap_or("");
                expand(text, |name| find(&variables, name).or_else(|| services.get(name).map(String::as_str)))
            }
        };
        set(&mut variables, variable.name.clone(), value);
    }
    for (name, value) in services {
        if find(&variables, &name).is_none() {
            variables.push((name, value));
        }
    }
    Ok(variables)
}

fn set(variables: &mut Vec<(String, String)>, name: String, value: String) {
    match variables.iter_mut().find(|(n, _)| *n == name) {
        Some(slot) => slot.1 = value,
        None => variables.push((name, value)),
    }
}

fn find<'a>(variables: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = variables.iter().find(|(n, _)| n == name);
    found.map(|(_, value)| value.as_str())
}

fn env_from(source: &EnvFromSource, s: &Sources<'_>) -> Result<Vec<(String, String)>, Error> {
    let prefix = source.prefix.as_deref().unwrap_or("");
    let mut variables = Vec::new();
    if let Some(reference) = &source.config_map_ref {
        let optional = reference.optional.unwrap_or(false);
        if let Some(map) = s.lookup.config_map(&reference.name, optional).map_err(Error::Object)? {
            for (key, value) in map.data.iter().flatten() {
                variables.push((format!("{prefix}{key}"), value.clone()));
            }
        }
    }
    if let Some(reference) = &source.secret_ref {
        let optional = reference.optional.unwrap_or(false);
        if let Some(secret) = s.lookup.secret(&reference.name, optional).map_err(Error::Object)? {
            for (key, value) in secret.data.iter().flatten() {
                let text = String::from_utf8_lossy(&value.0).into_owned();
                variables.push((format!("{prefix}{key}"), text));
            }
        }
    }
    variables.retain(|(name, _)| !name.is_empty() && !name.contains(['=', '\0']));
    Ok(variables)
}

/// The value, or `None` when an optional source is absent.
fn value_from(variable: &str, source: &EnvVarSource, container: &Container, s: &Sources<'_>) -> Result<Option<String>, Error> {
    let missing = |kind, key: &str, name: &str| Error::Key {
        key: key.to_owned(),
        kind,
        namespace: model::namespace(s.pod).to_owned(),
        name: name.to_owned(),
    };
    if let Some(field) = &source.field_ref {
        return Ok(Some(downward::field(s.pod, s.facts, &field.field_path)?));
    }
    if let Some(resource) = &source.resource_field_ref {
        let value = downward::resource(s.pod, Some(container), s.facts, resource)?;
        return Ok(Some(value));
    }
    if let Some(reference) = &source.config_map_key_ref {
        let optional = reference.optional.unwrap_or(false);
        let map = s.lookup.config_map(&reference.name, optional).map_err(Error::Object)?;
        let value = map.and_then(|m| m.data.as_ref()?.get(&reference.key).cloned());
        return match value {
            None if !optional => Err(missing("ConfigMap", &reference.key, &reference.name)),
            value => Ok(value),
        };
    }
    if let Some(reference) = &source.secret_key_ref {
        let optional = reference.optional.unwrap_or(false);
        let secret = s.lookup.secret(&reference.name, optional).map_err(Error::Object)?;
        let value = secret.and_then(|m| m.data.as_ref()?.get(&reference.key).cloned());
        return match value {
            None if !optional => Err(missing("Secret", &reference.key, &reference.name)),
            value => Ok(value.map(|v| String::from_utf8_lossy(&v.0).into_owned())),
        };
    }
    if source.file_key_ref.is_some() {
        return Err(Error::FileKeyRef(variable.to_owned()));
    }
    Ok(None)
}

/// Expands `$(NAME)`; `$$` is a dollar; an unknown name stays as it is written.
pub fn expand<'a>(text: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|t| t.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Expands with a finished environment.
pub fn expand_with(text: &str, variables: &[(String, String)]) -> String {
    expand(text, |name| find(variables, name))
}

/// Variables of the services of the pod's namespace, and always of `default/kubernetes`.
fn service_variables(pod: &Pod, services: &[std::sync::Arc<Service>]) -> BTreeMap<String, String> {
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let own = model::namespace(pod);
    let mut variables = BTreeMap::new();
    for only_master in [true, false] {
        for service in services {
            let namespace = service.metadata.namespace.as_deref().unwrap_or("");
            let name = service.metadata.name.as_deref().unwrap_or("");
            let master = namespace == "default" && name == "kubernetes";
            let wanted = if only_master { master } else { links && namespace == own };
            if wanted {
                variables.extend(variables_of(name, service));
            }
        }
    }
    variables
}

fn variables_of(name: &str, service: &Service) -> Vec<(String, String)> {
    let spec = service.spec.as_ref();
    let ip = spec.and_then(|s| s.cluster_ip.as_deref()).unwrap_or("");
    let ports = spec.and_then(|s| s.ports.as_deref()).unwrap_or_default();
    if ip.is_empty() || ip == "None" || ports.is_empty() {
        return Vec::new();
    }
    let upper = |s: &str| s.to_uppercase().replace('-', "_");
    let prefix = upper(name);
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    let mut all = vec![(format!("{prefix}_SERVICE_HOST"), ip.to_owned()), (format!("{prefix}_SERVICE_PORT"), ports[0].port.to_string())];
    for port in ports {
        if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
            let key = format!("{prefix}_SERVICE_PORT_{}", upper(port_name));
            all.push((key, port.port.to_string()));
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            all.push((format!("{prefix}_PORT"), url.clone()));
        }
        let key = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
        all.push((format!("{key}_PROTO"), protocol.to_lowercase()));
        all.push((format!("{key}_PORT"), port.port.to_string()));
        all.push((format!("{key}_ADDR"), ip.to_owned()));
        all.push((key, url));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expands_as_upstream() {
        let lookup = |name: &str| (name == "A").then_some("x");
        for (text, expected) in [
            ("$(A)", "x"),
            ("a$(A)b", "axb"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("$$$$", "$$"),
        ] {
            assert_eq!(expand(text, lookup), expected, "{text}");
        }
    }
}
