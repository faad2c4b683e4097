//! Image references, normalised as Docker and containerd do. Facts: github.com/distribution/reference v0.6 (grammar, docker.io defaults).

use std::fmt;

use crate::error::Error;

const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_PREFIX: &str = "library/";
const NAME_LEN_MAX: usize = 255;

/// A digest of content: "sha256:" and 64 hex digits. Other algorithms are refused: no registry in the field uses them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    /// Parses "sha256:HEX".
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let fits = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        fits.then(|| Self(text.to_owned()))
    }

    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_hash(&sha2::Sha256::digest(bytes))
    }

    /// The digest with this SHA-256 hash.
    pub fn from_hash(hash: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(hash)))
    }

    /// "sha256:HEX".
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A normalised reference: registry, repository, tag and digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// "docker.io", "registry.example:5000".
    pub domain: String,
    /// "library/busybox".
    pub path: String,
    /// The tag; "latest" when neither tag nor digest was given.
    pub tag: Option<String>,
    /// The digest.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Parses and normalises a reference.
    ///
    /// # Errors
    /// [`Error::Reference`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why| Error::Reference { reference: text.to_owned(), why };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).ok_or_else(|| bad("digest is not sha256: and 64 hex digits"))?)),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(bad("tag is not 1 to 128 letters, digits, '_', '.' and '-'"));
        }
        let (domain, path) = split_domain(name);
        if !is_domain(domain) {
            return Err(bad("registry is not a host name with optional port"));
        }
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad("repository must be lowercase"));
        }
        let mut path = path.to_owned();
        if domain == DEFAULT_DOMAIN && !path.contains('/') {
            path.insert_str(0, DEFAULT_PREFIX);
        }
        if !path.split('/').all(is_component) {
            return Err(bad("repository is not lowercase words with single separators"));
        }
        if domain.len() + 1 + path.len() > NAME_LEN_MAX {
            return Err(bad("name is longer than 255 bytes"));
        }
        let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self { domain: domain.to_owned(), path, tag, digest })
    }

    /// Registry and repository: "docker.io/library/busybox".
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// "NAME:TAG", if there is a tag and no digest (which would overrule it).
    pub fn tagged(&self) -> Option<String> {
        let tag = self.tag.as_ref().filter(|_| self.digest.is_none())?;
        Some(format!("{}:{tag}", self.name()))
    }

    /// What a manifest is asked for by: the digest, else the tag.
    pub fn manifest(&self) -> &str {
        self.digest.as_ref().map(Digest::as_str).or(self.tag.as_deref()).unwrap_or("latest")
    }

    /// Host and port to connect to; Docker Hub's differs from its name.
    pub fn registry_host(&self) -> &str {
        if self.domain == DEFAULT_DOMAIN { "registry-1.docker.io" } else { &self.domain }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// The first part is a registry if it has a dot, a port or a capital letter, or is localhost.
fn split_domain(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" || first.chars().any(char::is_uppercase) => {
            (if first == "index.docker.io" { DEFAULT_DOMAIN } else { first }, rest)
        }
        _ => (DEFAULT_DOMAIN, name),
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, port)) if !v6.is_empty() && v6.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') => {
            if port.is_empty() {
                return true;
            }
            ("v6", port.strip_prefix(':').unwrap_or("x"))
        }
        Some(_) => return false,
        None => domain.split_once(':').unwrap_or((domain, "1")),
    };
    let label = |l: &str| {
        let inside = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !l.is_empty() && l.bytes().all(inside) && !l.starts_with('-') && !l.ends_with('-')
    };
    host.split('.').all(label) && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

fn is_tag(tag: &str) -> bool {
    let first = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first && tag.len() <= 128 && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Lowercase letters and digits, with '.', '_', '__' or any number of '-' between them.
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().copied().is_some_and(alphanumeric) || !bytes.last().copied().is_some_and(alphanumeric) {
        return false;
    }
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).filter(|s| !s.is_empty());
    separators.into_iter().all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_normalised() {
        let hex = "a".repeat(64);
        for (text, normal) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("a/b:1", "docker.io/a/b:1".into()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".into()),
            ("index.docker.io/x", "docker.io/library/x:latest".into()),
            ("localhost/x", "localhost/x:latest".into()),
            ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c:v1".into()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".into()),
            ("r.example/x:1@sha256:H", format!("r.example/x:1@sha256:{hex}")),
            ("x__y.z--w", "docker.io/library/x__y.z--w:latest".into()),
        ] {
            let text = text.replace("sha256:H", &format!("sha256:{hex}"));
            assert_eq!(Reference::parse(&text).unwrap().to_string(), normal, "{text}");
        }
    }

    #[test]
    fn bad_references_are_refused() {
        for text in ["", "Busybox", "a//b", "a/b:", "a/../b", "-a", "a@sha256:1", "a:b:c", "x___y", "r.example:99999/x", "r_x.y/z", "a b"] {
            assert!(Reference::parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_taken_is_normal_already(text in "[a-zA-Z0-9._:/@-]{1,60}") {
            if let Ok(reference) = Reference::parse(&text) {
                proptest::prop_assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
            }
        }
    }
}
