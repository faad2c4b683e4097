//! Registry credentials from a pod's image pull secrets (upstream pkg/credentialprovider, v1.37). Pure.

use base64::Engine as _;
use k8s_openapi::api::core::v1::{Pod, Secret};
use protocols::cri::v1::AuthConfig;
use serde_json::Value;

use crate::objects::{Lookup, Names};

/// Credentials by registry pattern, the most specific first.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    entries: Vec<(String, AuthConfig)>,
    /// Pull secrets that could not be read.
    pub missing: Vec<String>,
}

impl Credentials {
    /// Reads the pod's pull secrets from what was fetched.
    pub fn of_pod(pod: &Pod, lookup: &Lookup) -> Self {
        let mut credentials = Self::default();
        for name in Names::of_pull_secrets(pod).secrets {
            match lookup.secret(&name, false) {
                Ok(Some(secret)) => credentials.entries.extend(entries(secret)),
                _ => credentials.missing.push(name),
            }
        }
        credentials.entries.sort_by(|a, b| b.0.cmp(&a.0));
        credentials
    }

    /// What to try for an image, in order: each credential that fits, else none at all.
    pub fn for_image(&self, image: &str) -> Vec<Option<AuthConfig>> {
        let image = canonical(image);
        let fitting: Vec<Option<AuthConfig>> =
            self.entries.iter().filter(|(pattern, _)| matches(pattern, &image)).map(|(_, auth)| Some(auth.clone())).collect();
        if fitting.is_empty() { vec![None] } else { fitting }
    }
}

/// The image's name with the registry that an unqualified one means.
fn canonical(image: &str) -> String {
    match image.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => image.to_owned(),
        Some(_) => format!("docker.io/{image}"),
        None => format!("docker.io/library/{image}"),
    }
}

/// `HOST[:PORT][/PATH]`, a `*` in the host standing for one label's part; the path is a prefix.
fn matches(pattern: &str, image: &str) -> bool {
    let (host, path) = pattern.split_once('/').unwrap_or((pattern, ""));
    let (image_host, image_path) = image.split_once('/').unwrap_or((image, ""));
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    let labels: Vec<&str> = host.split('.').collect();
    let image_labels: Vec<&str> = image_host.split('.').collect();
    labels.len() == image_labels.len() && labels.iter().zip(&image_labels).all(|(p, l)| glob(p, l)) && image_path.starts_with(path)
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text.len() >= before.len() + after.len() && text.starts_with(before) && text.ends_with(after),
    }
}

fn entries(secret: &Secret) -> Vec<(String, AuthConfig)> {
    let data = secret.data.as_ref();
    let json = |key: &str| -> Option<Value> { serde_json::from_slice(&data?.get(key)?.0).ok() };
    let auths = match json(".dockerconfigjson") {
        Some(mut config) => config["auths"].take(),
        None => json(".dockercfg").unwrap_or(Value::Null),
    };
    let Value::Object(auths) = auths else {
        return Vec::new();
    };
    auths.into_iter().filter_map(|(registry, auth)| Some((pattern(&registry), auth_config(&auth)?))).collect()
}

/// A registry key without scheme and API version path.
fn pattern(registry: &str) -> String {
    let rest = registry.split_once("://").map_or(registry, |(_, rest)| rest);
    let rest = rest.trim_end_matches('/');
    let rest = rest.strip_suffix("/v1").or_else(|| rest.strip_suffix("/v2")).unwrap_or(rest);
    rest.to_owned()
}

fn auth_config(auth: &Value) -> Option<AuthConfig> {
    let text = |key: &str| auth[key].as_str().unwrap_or("").to_owned();
    let mut config = AuthConfig {
        username: text("username"),
        password: text("password"),
        identity_token: text("identitytoken"),
        registry_token: text("registrytoken"),
        ..Default::default()
    };
    if let Some(encoded) = auth["auth"].as_str().filter(|a| !a.is_empty()) {
        let decoded = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.split_once(':')?;
        config.username = username.to_owned();
        config.password = password.to_owned();
    }
    Some(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_upstream() {
        for (pattern, image, expected) in [
            ("localhost:5000", "localhost:5000/a:1", true),
            ("*.example.com", "r.example.com/a", true),
            ("*.example.com", "example.com/a", false),
            ("r.example.com/team", "r.example.com/team/a", true),
            ("r.example.com/team", "r.example.com/other/a", false),
            ("index.docker.io", "docker.io/library/a", true),
        ] {
            assert_eq!(matches(pattern, image), expected, "{pattern} {image}");
        }
    }

    #[test]
    fn pull_secrets_are_read() {
        let config = serde_json::json!({"auths": {
            "https://r.example/v1/": {"auth": base64::engine::general_purpose::STANDARD.encode("user:word")},
            "other.example": {"username": "u", "password": "p"}}});
        let secret: Secret =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "pull"}, "type": "kubernetes.io/dockerconfigjson",
            "data": {".dockerconfigjson": base64::engine::general_purpose::STANDARD.encode(config.to_string())}}))
            .expect("a secret");
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "p"},
            "spec": {"containers": [], "imagePullSecrets": [{"name": "pull"}, {"name": "gone"}]}}))
        .expect("a pod");
        let credentials = Credentials::of_pod(&pod, &Lookup::of_secret("pull", secret));
        let user = |image: &str| credentials.for_image(image)[0].as_ref().map(|auth| format!("{}:{}", auth.username, auth.password));
        assert_eq!(user("r.example/a:1").as_deref(), Some("user:word"));
        assert_eq!(user("other.example/a:1").as_deref(), Some("u:p"));
        assert_eq!(user("third.example/a:1"), None);
        assert_eq!(credentials.missing, ["gone"]);
    }
}
