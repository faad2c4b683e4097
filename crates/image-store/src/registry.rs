//! A registry's pull side over HTTP and TLS: challenges, tokens, redirects, retries. One connection per request.
//!
//! Facts: OCI distribution-spec 1.1 "Pull"; distribution's token authentication (docs/content/spec/auth/{token,oauth}.md); RFC 9110 (Range,
//! WWW-Authenticate).

pub(crate) mod challenge;
pub(crate) mod hosts;
mod transport;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;

use challenge::Challenge;
use hosts::Endpoint;
pub(crate) use transport::Transport;

use crate::error::Error;
use crate::media::ACCEPT;
use crate::reference::{Digest, Reference};
use crate::types::{Auth, Options};

const REDIRECTS_MAX: usize = 5;
/// Manifests and configurations above this are refused (as containerd does).
const DOCUMENT_BYTES_MAX: usize = 8 << 20;
const TOKEN_BYTES_MAX: usize = 1 << 20;

/// One repository of one registry, for the time of one pull.
pub(crate) struct Repository<'a> {
    transport: &'a Transport,
    options: &'a Options,
    reference: &'a Reference,
    auth: Option<Auth>,
    /// Where it is asked for, in this order.
    places: Vec<Place>,
}

/// An endpoint, and the Authorization header that works there at present.
struct Place {
    endpoint: Endpoint,
    authorization: Mutex<Option<String>>,
}

/// A body that is arriving, from byte `start` of the content.
pub(crate) struct Arriving {
    pub body: Incoming,
    pub start: u64,
}

/// A manifest with its media type and digest.
pub(crate) struct Document {
    pub bytes: Bytes,
    pub digest: Digest,
}

/// What is asked of one endpoint.
struct Asked<'a> {
    uri: &'a str,
    headers: &'a [(String, String)],
    /// The first byte that is wanted.
    start: u64,
    /// For errors.
    object: &'a str,
}

impl Place {
    fn authorization(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // A string is replaced whole: nothing can be half done by a thread that panicked.
        self.authorization.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<'a> Repository<'a> {
    /// The repository of a reference, behind the endpoints that are configured for its registry.
    ///
    /// # Errors
    /// [`Error::Hosts`].
    pub fn new(transport: &'a Transport, options: &'a Options, reference: &'a Reference, auth: Option<Auth>) -> Result<Self, Error> {
        let endpoints = hosts::endpoints(options.hosts_dir.as_deref(), reference)?;
        let places = endpoints.into_iter().map(|endpoint| Place { endpoint, authorization: Mutex::new(None) }).collect();
        Ok(Self { transport, options, reference, auth, places })
    }

    /// Fetches a manifest by tag or digest; a digest is checked.
    pub async fn manifest(&self, by: &str) -> Result<Document, Error> {
        let object = format!("manifest {by} of {}", self.reference.name());
        let bytes = self.document(&format!("manifests/{by}"), &object).await?;
        let digest = Digest::of(&bytes);
        match Digest::parse(by) {
            Some(expected) if expected != digest => {
                Err(Error::Digest { object, expected: expected.to_string(), actual: digest.to_string() })
            }
            _ => Ok(Document { bytes, digest }),
        }
    }

    /// Fetches a small blob whole, and checks it.
    pub async fn small_blob(&self, expected: &Digest) -> Result<Bytes, Error> {
        let object = format!("blob {expected} of {}", self.reference.name());
        let bytes = self.document(&format!("blobs/{expected}"), &object).await?;
        let actual = Digest::of(&bytes);
        if actual != *expected {
            return Err(Error::Digest { object, expected: expected.to_string(), actual: actual.to_string() });
        }
        Ok(bytes)
    }

    /// Begins to fetch a blob from byte `start`; the registry may begin earlier.
    pub async fn blob(&self, digest: &Digest, start: u64) -> Result<Arriving, Error> {
        let object = format!("blob {digest} of {}", self.reference.name());
        let (status, headers, body) = self.get(&format!("blobs/{digest}"), start, &object).await?;
        let start = match status {
            StatusCode::PARTIAL_CONTENT => range_start(&headers)
                .filter(|from| *from <= start)
                .ok_or_else(|| Error::BadAnswer { object, why: "partial content without a fitting Content-Range".into() })?,
            _ => 0,
        };
        Ok(Arriving { body, start })
    }

    async fn document(&self, path: &str, object: &str) -> Result<Bytes, Error> {
        let mut pause = self.options.retry_pause;
        let mut tries = 0;
        loop {
            let fetched = match self.get(path, 0, object).await {
                Ok((_, _, body)) => self.collect(body, object, DOCUMENT_BYTES_MAX).await,
                Err(e) => Err(e),
            };
            match fetched {
                Err(Error::Unavailable { .. }) if tries < self.options.retries_max => {
                    tokio::time::sleep(pause).await;
                    (tries, pause) = (tries + 1, pause * 2);
                }
                other => return other,
            }
        }
    }

    async fn collect(&self, body: Incoming, object: &str, limit: usize) -> Result<Bytes, Error> {
        let collected = tokio::time::timeout(self.options.stall_timeout, Limited::new(body, limit).collect());
        match collected.await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
                Err(Error::BadAnswer { object: object.to_owned(), why: format!("it is larger than {limit} bytes") })
            }
            Ok(Err(e)) => Err(unavailable(object, e.to_string())),
            Err(_) => Err(unavailable(object, "nothing arrives any more".into())),
        }
    }

    /// GET below `/v2/NAME/` of the first endpoint that has it; a success, or the last one's error.
    async fn get(&self, path: &str, start: u64, object: &str) -> Result<(StatusCode, HeaderMap, Incoming), Error> {
        // A tag is a name; what is asked for by digest is checked, wherever it comes from.
        let resolves = path.strip_prefix("manifests/").is_some_and(|by| Digest::parse(by).is_none());
        let mut last = None;
        for place in self.places.iter().filter(|place| if resolves { place.endpoint.resolves } else { place.endpoint.pulls }) {
            match self.get_from(place, path, start, object).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    tracing::debug!(endpoint = place.endpoint.base, %error, "an endpoint does not serve");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| denied(object, "no endpoint in hosts.toml has the capability")))
    }

    /// GET from one endpoint, authenticated and redirected as it wants it.
    async fn get_from(&self, place: &Place, path: &str, start: u64, object: &str) -> Result<(StatusCode, HeaderMap, Incoming), Error> {
        let endpoint = &place.endpoint;
        let query = endpoint.stands_for.as_ref().map(|registry| format!("?ns={}", encode(registry))).unwrap_or_default();
        let uri = format!("{}/{}/{path}{query}", endpoint.base, self.reference.path);
        let present = place.authorization().clone();
        let present = match (&self.auth, present) {
            (Some(Auth::RegistryToken(token)), None) => Some(format!("Bearer {token}")),
            (_, present) => present,
        };
        let asked = Asked { uri: &uri, headers: &endpoint.headers, start, object };
        let answer = self.follow(&asked, present.clone()).await?;
        if answer.0 != StatusCode::UNAUTHORIZED {
            return check_status(answer, object);
        }
        let challenges = challenge::parse(&answer.1);
        let authorization = self.answer_challenge(&challenges, object).await?;
        if present.as_ref() == Some(&authorization) {
            return Err(denied(object, "credentials are refused"));
        }
        *place.authorization() = Some(authorization.clone());
        check_status(self.follow(&asked, Some(authorization)).await?, object)
    }

    async fn follow(&self, asked: &Asked<'_>, authorization: Option<String>) -> Result<(StatusCode, HeaderMap, Incoming), Error> {
        let Asked { start, object, .. } = *asked;
        let first: Uri =
            asked.uri.parse().map_err(|_| Error::BadAnswer { object: object.to_owned(), why: format!("{} is no URL", asked.uri) })?;
        let mut uri = first.clone();
        let accept = if uri.path().contains("/manifests/") { ACCEPT } else { "*/*" };
        for _ in 0..=REDIRECTS_MAX {
            // Credentials are for the registry alone, not for the storage that it points to.
            let own = uri.authority() == first.authority() && uri.scheme() == first.scheme();
            let mut request = http::Request::builder().method(Method::GET).uri(&uri).header("accept", accept);
            if let Some(authorization) = authorization.as_ref().filter(|_| own) {
                request = request.header("authorization", authorization);
            }
            for (name, value) in asked.headers.iter().filter(|_| own) {
                request = request.header(name, value);
            }
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            let request = request.body(Full::default()).map_err(|e| Error::BadAnswer { object: object.to_owned(), why: e.to_string() })?;
            let response = self.transport.send(request, self.options.stall_timeout).await.map_err(|why| unavailable(object, why))?;
            let (parts, body) = response.into_parts();
            if !parts.status.is_redirection() {
                return Ok((parts.status, parts.headers, body));
            }
            uri = redirect(&uri, &parts.headers).ok_or_else(|| Error::BadAnswer {
                object: object.to_owned(),
                why: "it redirects to nowhere, or from https to http".into(),
            })?;
        }
        Err(Error::BadAnswer { object: object.to_owned(), why: format!("more than {REDIRECTS_MAX} redirects") })
    }

    /// The Authorization header that answers one of the challenges.
    async fn answer_challenge(&self, challenges: &[Challenge], object: &str) -> Result<String, Error> {
        if let Some(bearer) = challenges.iter().find(|c| c.scheme == "bearer") {
            if matches!(self.auth, Some(Auth::RegistryToken(_))) {
                return Err(denied(object, "the registry token is refused"));
            }
            return self.token(&bearer.parameters, object).await.map(|token| format!("Bearer {token}"));
        }
        match (&self.auth, challenges.iter().any(|c| c.scheme == "basic")) {
            (Some(Auth::Basic { username, password }), true) => Ok(basic(username, password)),
            (None, true) => Err(denied(object, "user name and password are needed")),
            (_, true) => Err(denied(object, "it wants a user name and password, not a token")),
            (_, false) => Err(denied(object, "it names no way to authenticate that is known here")),
        }
    }

    /// A token from the server that the challenge names: GET with basic authentication, or POST for an identity token (OAuth2).
    async fn token(&self, challenge: &HashMap<String, String>, object: &str) -> Result<String, Error> {
        let realm = challenge.get("realm").map(String::as_str).unwrap_or_default();
        let uri: Uri = realm.parse().map_err(|_| denied(object, "the token server's address is no URL"))?;
        let host = uri.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        if uri.scheme_str() != Some("https") && !transport::is_loopback(&host) {
            return Err(denied(object, "the token server would see the credentials in plain text"));
        }
        let service = challenge.get("service").map(String::as_str).unwrap_or_default();
        let own_scope = format!("repository:{}:pull", self.reference.path);
        let scope = challenge.get("scope").unwrap_or(&own_scope);
        let query = format!("service={}&scope={}", encode(service), encode(scope));
        let request = match &self.auth {
            Some(Auth::IdentityToken(token)) => {
                let form = format!("grant_type=refresh_token&client_id=coracle&refresh_token={}&{query}", encode(token));
                http::Request::post(realm).header("content-type", "application/x-www-form-urlencoded").body(Full::new(Bytes::from(form)))
            }
            auth => {
                let joint = if uri.query().is_some() { '&' } else { '?' };
                let mut request = http::Request::get(format!("{realm}{joint}{query}"));
                if let Some(Auth::Basic { username, password }) = auth {
                    request = request.header("authorization", basic(username, password));
                }
                request.body(Full::default())
            }
        };
        let request = request.map_err(|_| denied(object, "the token server's address is no URL"))?;
        let response = self.transport.send(request, self.options.stall_timeout).await.map_err(|why| unavailable(object, why))?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(unavailable(object, format!("token server answers {status}")));
        }
        if !status.is_success() {
            return Err(denied(object, &format!("token server answers {status}")));
        }
        let body = self.collect(response.into_body(), object, TOKEN_BYTES_MAX).await?;
        let answer: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let token = answer["token"].as_str().or(answer["access_token"].as_str()).filter(|t| !t.is_empty());
        token.map(str::to_owned).ok_or_else(|| denied(object, "token server gives no token"))
    }

    /// How long a transfer may stand still.
    pub fn stall_timeout(&self) -> Duration {
        self.options.stall_timeout
    }
}

fn check_status(answer: (StatusCode, HeaderMap, Incoming), object: &str) -> Result<(StatusCode, HeaderMap, Incoming), Error> {
    let why = |status: StatusCode| format!("registry answers {status}");
    match answer.0 {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(answer),
        StatusCode::NOT_FOUND => Err(Error::NotInRegistry { object: object.to_owned() }),
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Err(denied(object, &why(status))),
        status if status.is_server_error() => Err(unavailable(object, why(status))),
        status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => Err(unavailable(object, why(status))),
        status => Err(Error::BadAnswer { object: object.to_owned(), why: why(status) }),
    }
}

/// Where a redirect leads: absolute or on the same host, never from TLS to plain text.
fn redirect(from: &Uri, headers: &HeaderMap) -> Option<Uri> {
    let location = headers.get("location")?.to_str().ok()?;
    let to: Uri = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok()?
    } else {
        location.parse().ok()?
    };
    let downgrade = from.scheme_str() == Some("https") && to.scheme_str() != Some("https");
    (to.authority().is_some() && !downgrade).then_some(to)
}

/// The first byte of "bytes FIRST-LAST/SIZE".
fn range_start(headers: &HeaderMap) -> Option<u64> {
    headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b',') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn unavailable(object: &str, why: String) -> Error {
    Error::Unavailable { object: object.to_owned(), why }
}

fn denied(object: &str, why: &str) -> Error {
    Error::Denied { object: object.to_owned(), why: why.to_owned() }
}
