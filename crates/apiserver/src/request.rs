//! What a request asks for, read from its method and path (`apiserver/pkg/endpoints/request/requestinfo.go`, v1.37).

use std::borrow::Cow;

use http::Method;

/// Decoded query parameters, in order.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Parses `a=b&c=d` (percent-encoding and `+`).
    pub fn parse(text: &str) -> Self {
        let pair = |part: &str| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            (decode(key, true).into_owned(), decode(value, true).into_owned())
        };
        Self(text.split('&').filter(|part| !part.is_empty()).map(pair).collect())
    }

    /// The first value of a parameter; empty counts as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// Whether a boolean parameter is on: Go's conversion, where all but `false` and `0` is true and a bare name is true.
    pub fn flag(&self, name: &str) -> bool {
        self.0.iter().find(|(key, _)| key == name).is_some_and(|(_, value)| !matches!(value.to_ascii_lowercase().as_str(), "false" | "0"))
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// Percent-decodes; what is no valid escape stays as it is.
pub fn decode(text: &str, plus: bool) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| Some((hex(*bytes.get(at + 1)?)? << 4) | hex(*bytes.get(at + 2)?)?)).flatten();
        match escape {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if plus && bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// What a request is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// The path.
    pub path: String,
    /// `get`, `list`, `watch`, `create`, ... or the lower-case method for non-resource requests.
    pub verb: String,
    /// Whether the path has the form of a resource.
    pub is_resource: bool,
    /// API group; empty for core.
    pub group: String,
    /// API version.
    pub version: String,
    /// Plural name.
    pub resource: String,
    /// Subresource; empty for none.
    pub subresource: String,
    /// Namespace; empty for none.
    pub namespace: String,
    /// Object name; empty for collections.
    pub name: String,
    /// What follows the subresource (of `proxy`); with no leading slash.
    pub rest: String,
}

/// Subresources of namespaces; any other segment after a namespace's name is a resource in it.
const NAMESPACE_SUBRESOURCES: &[&str] = &["status", "finalize"];

/// Reads method, path and query.
pub fn parse(method: &Method, path: &str, query: &Query) -> RequestInfo {
    let mut info = RequestInfo { path: path.to_owned(), verb: method.as_str().to_ascii_lowercase(), ..RequestInfo::default() };
    let segments: Vec<Cow<'_, str>> = path.trim_matches('/').split('/').map(|part| decode(part, false)).collect();
    let mut rest: &[Cow<'_, str>] = match segments.first().map(|first| first.as_ref()) {
        Some("api") if segments.len() >= 3 => {
            info.version = segments[1].to_string();
            &segments[2..]
        }
        Some("apis") if segments.len() >= 4 => {
            info.group = segments[1].to_string();
            info.version = segments[2].to_string();
            &segments[3..]
        }
        _ => return info,
    };
    info.is_resource = true;
    let mut watch_prefix = false;
    if rest[0] == "watch" && rest.len() > 1 {
        watch_prefix = true;
        rest = &rest[1..];
    }
    if rest[0] == "namespaces" && rest.len() > 1 {
        info.namespace = rest[1].to_string();
        if rest.len() > 2 && !NAMESPACE_SUBRESOURCES.contains(&rest[2].as_ref()) {
            rest = &rest[2..];
        }
    }
    info.resource = rest[0].to_string();
    info.name = rest.get(1).map(ToString::to_string).unwrap_or_default();
    info.subresource = rest.get(2).map(ToString::to_string).unwrap_or_default();
    info.rest = rest.get(3..).map(|parts| parts.join("/")).unwrap_or_default();
    info.verb = verb(method, &info, watch_prefix, query).to_owned();
    info
}

fn verb(method: &Method, info: &RequestInfo, watch_prefix: bool, query: &Query) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if info.name.is_empty() => "deletecollection",
        Method::DELETE => "delete",
        Method::GET | Method::HEAD if watch_prefix => "watch",
        Method::GET | Method::HEAD if info.name.is_empty() && query.flag("watch") => "watch",
        Method::GET | Method::HEAD if info.name.is_empty() => "list",
        Method::GET | Method::HEAD => "get",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(method: Method, uri: &str) -> [String; 7] {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let info = parse(&method, path, &Query::parse(query));
        [info.verb, info.group, info.version, info.namespace, info.resource, info.name, info.subresource]
    }

    #[test]
    fn paths() {
        for (method, uri, want) in [
            (Method::GET, "/api/v1/pods", ["list", "", "v1", "", "pods", "", ""]),
            (Method::GET, "/api/v1/pods?watch=true", ["watch", "", "v1", "", "pods", "", ""]),
            (Method::GET, "/api/v1/namespaces/a/pods/b/log", ["get", "", "v1", "a", "pods", "b", "log"]),
            (Method::PUT, "/api/v1/namespaces/a/finalize", ["update", "", "v1", "a", "namespaces", "a", "finalize"]),
            (Method::GET, "/api/v1/namespaces/a", ["get", "", "v1", "a", "namespaces", "a", ""]),
            (Method::DELETE, "/apis/apps/v1/namespaces/a/deployments", ["deletecollection", "apps", "v1", "a", "deployments", "", ""]),
            (Method::GET, "/apis/apps/v1", ["get", "", "", "", "", "", ""]),
            (
                Method::GET,
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
                ["get", "rbac.authorization.k8s.io", "v1", "", "clusterroles", "system:node", ""],
            ),
        ] {
            assert_eq!(read(method, uri), want, "{uri}");
        }
    }

    #[test]
    fn queries() {
        let query = Query::parse("a=b%3Dc+d&watch&x=false&command=1&command=2");
        assert_eq!(query.get("a"), Some("b=c d"));
        assert!(query.flag("watch") && !query.flag("x") && !query.flag("y"));
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["1", "2"]);
    }
}
