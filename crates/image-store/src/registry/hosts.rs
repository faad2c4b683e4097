//! Which endpoints stand for a registry: itself, or what containerd's `hosts.toml` names.
//!
//! Facts: containerd v2.4.2, `docs/hosts.md` and `core/remotes/docker/config/{hosts.go,config_unix.go}`: the directory's name, the order of
//! hosts, the query parameter `ns`. A setting of the file that is not carried out here is an error, and so is a file that cannot be read: a
//! registry that was meant to be replaced is not asked by mistake.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::transport::is_loopback;
use crate::error::Error;
use crate::reference::Reference;

/// One place that serves a registry's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// "https://registry.example/v2".
    pub base: String,
    /// The registry that it stands for, if it is not that one: told it as `?ns=`.
    pub stands_for: Option<String>,
    /// Names may be asked of it.
    pub resolves: bool,
    /// Content may be taken from it.
    pub pulls: bool,
    /// Sent with every request.
    pub headers: Vec<(String, String)>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    header: BTreeMap<String, Header>,
    #[serde(default)]
    override_path: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Header {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<String>,
    /// In the file's order.
    #[serde(default)]
    host: toml::Table,
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    header: BTreeMap<String, Header>,
    #[serde(default)]
    override_path: bool,
}

/// The endpoints of a reference's registry, in the order in which they are asked.
///
/// # Errors
/// [`Error::Hosts`] for a file that cannot be read, or asks for what is not carried out.
pub(crate) fn endpoints(directory: Option<&Path>, reference: &Reference) -> Result<Vec<Endpoint>, Error> {
    let Some(path) = directory.and_then(|directory| find(directory, &reference.domain)) else {
        return Ok(vec![itself(reference)]);
    };
    let fail = |why: String| Error::Hosts { path: path.clone(), why };
    let text = std::fs::read_to_string(&path).map_err(|error| fail(error.to_string()))?;
    parse(&text, reference).map_err(fail)
}

/// The `hosts.toml` of a registry: `HOST_PORT_`, `HOST:PORT` or `_default`.
fn find(directory: &Path, domain: &str) -> Option<PathBuf> {
    let underscored = domain.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = underscored.as_deref().into_iter().chain([domain, "_default"]);
    // The first directory is the registry's, whether it has the file or not.
    let found = names.map(|name| directory.join(name)).find(|path| path.is_dir())?;
    Some(found.join("hosts.toml")).filter(|path| path.exists())
}

fn itself(reference: &Reference) -> Endpoint {
    let host = reference.registry_host();
    let scheme = if is_loopback(host) { "http" } else { "https" };
    Endpoint { base: format!("{scheme}://{host}/v2"), stands_for: None, resolves: true, pulls: true, headers: Vec::new() }
}

pub(crate) fn parse(text: &str, reference: &Reference) -> Result<Vec<Endpoint>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut endpoints = Vec::new();
    for (server, settings) in file.host {
        let settings: Settings = settings.try_into().map_err(|error: toml::de::Error| format!("host {server:?}: {error}"))?;
        endpoints.push(endpoint(Some(&server), settings, reference)?);
    }
    let last = Settings { capabilities: file.capabilities, header: file.header, override_path: file.override_path };
    endpoints.push(endpoint(file.server.as_deref(), last, reference)?);
    Ok(endpoints)
}

fn endpoint(server: Option<&str>, settings: Settings, reference: &Reference) -> Result<Endpoint, String> {
    let mut endpoint = itself(reference);
    if let Some(server) = server.filter(|server| !server.is_empty()) {
        endpoint.base = base(server, settings.override_path)?;
        let host = endpoint.base.split_once("://").map_or("", |(_, rest)| rest).split('/').next().unwrap_or_default();
        endpoint.stands_for = (host != reference.registry_host()).then(|| reference.domain.clone());
    }
    if let Some(capabilities) = settings.capabilities.filter(|words| !words.is_empty()) {
        (endpoint.pulls, endpoint.resolves) = (false, false);
        for word in &capabilities {
            match word.to_ascii_lowercase().as_str() {
                "pull" => endpoint.pulls = true,
                "resolve" => endpoint.resolves = true,
                "push" | "referrers" => {}
                _ => return Err(format!("capability {word:?} is not known")),
            }
        }
    }
    for (name, value) in settings.header {
        let values = match value {
            Header::One(value) => vec![value],
            Header::Many(values) => values,
        };
        endpoint.headers.extend(values.into_iter().map(|value| (name.clone(), value)));
    }
    Ok(endpoint)
}

/// "https://HOST/PATH/v2" of an address; with `override_path` the path is taken as it is.
fn base(server: &str, override_path: bool) -> Result<String, String> {
    let server = if server.starts_with("http") { server.to_owned() } else { format!("https://{server}") };
    let uri: http::Uri = server.parse().map_err(|error| format!("server {server:?}: {error}"))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(format!("server {server:?} is no URL")) };
    if !matches!(scheme, "http" | "https") || uri.query().is_some() {
        return Err(format!("server {server:?} is not http://HOST/PATH or https://HOST/PATH"));
    }
    let path = uri.path().trim_end_matches('/');
    let path = if override_path || path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") };
    Ok(format!("{scheme}://{authority}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<Endpoint>, String> {
        parse(text, &Reference::parse("r.example/a/b:1").expect("a reference"))
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let found = of("server = 'https://own.example'\n[host.'http://127.0.0.1:5000']\ncapabilities = ['pull', 'resolve']\n\
                        [host.'a.example/sub']\ncapabilities = ['pull']\n[host.'a.example/sub'.header]\nx-a = ['1', '2']\ny = 'z'\n\
                        [host.'https://b.example/odd']\noverride_path = true\n")
        .expect("good");
        let bases: Vec<&str> = found.iter().map(|endpoint| endpoint.base.as_str()).collect();
        assert_eq!(bases, ["http://127.0.0.1:5000/v2", "https://a.example/sub/v2", "https://b.example/odd", "https://own.example/v2"]);
        assert!(found.iter().all(|endpoint| endpoint.pulls && endpoint.stands_for.as_deref() == Some("r.example")));
        assert!(!found[1].resolves && found[0].resolves && found[2].resolves);
        assert_eq!(found[1].headers.len(), 3);
    }

    #[test]
    fn without_a_server_the_registry_itself_is_last() {
        let found = of("[host.'https://m.example']\n").expect("good");
        assert_eq!((found[1].base.as_str(), &found[1].stands_for), ("https://r.example/v2", &None));
    }

    #[test]
    fn what_is_not_carried_out_is_refused() {
        for text in ["skip_verify = true", "[host.x]\nca = 'x'", "[host.x]\ncapabilities = ['fly']", "server = 'https:///x'", "[host"] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_directory_of_a_registry_is_found_by_each_of_its_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str| {
            std::fs::create_dir(dir.path().join(name)).expect("made");
            std::fs::write(dir.path().join(name).join("hosts.toml"), "").expect("written");
        };
        assert_eq!(find(dir.path(), "r:5000"), None);
        for name in ["_default", "r:5000", "r_5000_"] {
            write(name);
            assert_eq!(find(dir.path(), "r:5000"), Some(dir.path().join(name).join("hosts.toml")));
        }
        assert_eq!(find(dir.path(), "other"), Some(dir.path().join("_default/hosts.toml")));
    }
}
