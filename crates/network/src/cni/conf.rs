//! Configuration lists: found, parsed, and cut into what each plugin gets on stdin.

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Map, Value, json};

use super::Error;

const VERSIONS: [(u32, u32, u32); 7] = [(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 3, 1), (0, 4, 0), (1, 0, 0), (1, 1, 0)];

/// A network configuration list, checked.
#[derive(Debug, Clone)]
pub(crate) struct ConfList {
    pub name: String,
    pub version: (u32, u32, u32),
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<Value>,
    /// The list as JSON, for the record of a sandbox.
    pub raw: Value,
}

/// The network that the directory asks for: its first file by name of `*.conflist`, `*.conf` and `*.json`. `None` when there is none.
///
/// # Errors
/// When the first file is not a usable configuration; no other is taken in its place.
pub(crate) fn load(dir: &Utf8Path) -> Result<Option<ConfList>, Error> {
    let read = |source| Error::Read { path: dir.to_owned(), source };
    let entries = match dir.read_dir_utf8() {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(read(e)),
    };
    let mut paths: Vec<Utf8PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.into_path();
        if matches!(path.extension(), Some("conflist" | "conf" | "json")) && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    let Some(path) = paths.into_iter().next() else {
        return Ok(None);
    };
    let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|source| Error::Parse { path: path.clone(), source })?;
    let value = if path.extension() != Some("conflist") && value.get("plugins").is_none() { wrap(value) } else { value };
    ConfList::parse(value, &path).map(Some)
}

/// A list of the one plugin of a `.conf` file.
fn wrap(plugin: Value) -> Value {
    json!({"name": plugin["name"], "cniVersion": plugin["cniVersion"], "plugins": [plugin]})
}

/// The executable's name; [`ConfList::parse`] has seen that it is there.
pub(crate) fn plugin_type(plugin: &Value) -> &str {
    plugin["type"].as_str().unwrap_or_default()
}

impl ConfList {
    /// Checks a list; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn parse(raw: Value, path: &Utf8Path) -> Result<Self, Error> {
        let invalid = |what: String| Error::Invalid { path: path.to_owned(), what };
        let name = raw["name"].as_str().unwrap_or_default().to_owned();
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(fits) {
            return Err(invalid(format!("name {name:?} is not letters, digits, '_', '.' and '-'")));
        }
        let version = pick_version(&raw).map_err(&invalid)?;
        let plugins = raw["plugins"].as_array().cloned().unwrap_or_default();
        if plugins.is_empty() {
            return Err(invalid("it has no plugins".into()));
        }
        for plugin in &plugins {
            let kind = plugin_type(plugin);
            if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
                return Err(invalid(format!("plugin type {kind:?} is no file name")));
            }
        }
        let flag = |key: &str| match &raw[key] {
            Value::Null => Ok(false),
            Value::Bool(on) => Ok(*on),
            Value::String(s) if s.eq_ignore_ascii_case("true") => Ok(true),
            Value::String(s) if s.eq_ignore_ascii_case("false") => Ok(false),
            other => Err(invalid(format!("{key} is {other}, expected true or false"))),
        };
        let (disable_check, disable_gc) = (flag("disableCheck")?, flag("disableGC")?);
        Ok(Self { name, version, disable_check, disable_gc, plugins, raw })
    }

    /// What a plugin gets on stdin: its own configuration with name, version, the capability arguments that it declares, and the previous result.
    pub fn plugin_conf(&self, plugin: &Value, capabilities: &Map<String, Value>, previous: Option<&Value>) -> Value {
        let mut conf = plugin.clone();
        conf["name"] = self.name.clone().into();
        let (major, minor, patch) = self.version;
        conf["cniVersion"] = format!("{major}.{minor}.{patch}").into();
        let declared = |name: &str| plugin["capabilities"][name].as_bool() == Some(true);
        let wanted: Map<_, _> = capabilities.iter().filter(|(name, _)| declared(name)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !wanted.is_empty() {
            conf["runtimeConfig"] = wanted.into();
        }
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        conf
    }

    /// Whether some plugin of the list takes the capability.
    pub fn has_capability(&self, name: &str) -> bool {
        self.plugins.iter().any(|p| p["capabilities"][name].as_bool() == Some(true))
    }
}

/// The highest version that both the list and we know, of `cniVersion` and (since 1.1) `cniVersions`.
fn pick_version(raw: &Value) -> Result<(u32, u32, u32), String> {
    let mut offered: Vec<String> = Vec::new();
    offered.extend(raw["cniVersion"].as_str().filter(|v| !v.is_empty()).map(str::to_owned));
    offered.extend(raw["cniVersions"].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)));
    if offered.is_empty() {
        return Ok((0, 1, 0));
    }
    let known = offered.iter().filter_map(|text| parse_version(text)).filter(|v| VERSIONS.contains(v)).max();
    known.ok_or_else(|| format!("none of its versions {offered:?} is known (0.1.0 to 1.1.0)"))
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    let version = (parts.next()??, parts.next().unwrap_or(Some(0))?, parts.next().unwrap_or(Some(0))?);
    parts.next().is_none().then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<ConfList, Error> {
        ConfList::parse(value, Utf8Path::new("/x.conflist"))
    }

    #[test]
    fn versions_are_negotiated() {
        let list =
            |version: Value, more: Value| parse(json!({"name":"a","cniVersion":version,"cniVersions":more,"plugins":[{"type":"p"}]}));
        assert_eq!(list(json!("1.0.0"), json!(["0.4.0", "1.1.0", "9.0.0"])).unwrap().version, (1, 1, 0));
        assert_eq!(list(Value::Null, Value::Null).unwrap().version, (0, 1, 0));
        assert!(list(json!("2.0.0"), Value::Null).is_err());
    }

    #[test]
    fn only_declared_capabilities_are_passed() {
        let list = parse(json!({"name":"a","cniVersion":"1.0.0","plugins":[
            {"type":"p","capabilities":{"portMappings":true,"bandwidth":false}}]}))
        .unwrap();
        let mut offered = Map::new();
        offered.insert("portMappings".into(), json!([1]));
        offered.insert("bandwidth".into(), json!({}));
        let conf = list.plugin_conf(&list.plugins[0], &offered, Some(&json!({"ips":[]})));
        assert_eq!(conf["runtimeConfig"], json!({"portMappings":[1]}));
        assert_eq!(conf["prevResult"], json!({"ips":[]}));
        assert_eq!((&conf["name"], &conf["cniVersion"]), (&json!("a"), &json!("1.0.0")));
    }

    #[test]
    fn bad_lists_name_what_is_wrong() {
        for bad in [
            json!({"name":"","plugins":[{"type":"p"}]}),
            json!({"name":"../x","plugins":[{"type":"p"}]}),
            json!({"name":"a","plugins":[]}),
            json!({"name":"a","plugins":[{"type":"../sh"}]}),
            json!({"name":"a","disableCheck":"perhaps","plugins":[{"type":"p"}]}),
        ] {
            assert!(parse(bad.clone()).is_err(), "{bad}");
        }
    }
}
