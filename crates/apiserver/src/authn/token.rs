//! Service account tokens: JWTs, signed with ES256, bound to an object whose deletion ends them
//! (upstream: `pkg/serviceaccount/claims.go`, `pkg/registry/core/serviceaccount/storage/token.go`).

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{AUTHENTICATED, AuthnError, User};
use crate::lookup::{Lookup, text};
use apimachinery::status::Status;

/// How long a token goes on after its object was marked for deletion, and how far clocks may differ, in seconds.
const LEEWAY_SECONDS: i64 = 60;
/// What admission asks for pods; such a token is made to last longer, and warned of after this time, in seconds.
const WARN_ONLY_SECONDS: i64 = 3607;
/// How long such a token lasts, in seconds.
const EXTENDED_SECONDS: i64 = 365 * 24 * 3600;

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    iss: String,
    jti: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Bound,
    nbf: i64,
    sub: String,
}

#[derive(Serialize, Deserialize)]
struct Bound {
    namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Reference>,
    serviceaccount: Reference,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    warnafter: Option<i64>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Reference {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    uid: String,
}

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not PEM, or of another kind.
    #[error("no {0} key in PEM form")]
    Pem(&'static str),
    /// A kind of key that is not supported.
    #[error("the key is neither ECDSA P-256 nor RSA of 2048 to 8192 bits")]
    Kind,
}

/// A public key, as raw bytes for `ring`, with its id.
struct PublicKey {
    id: String,
    algorithm: &'static str,
    bytes: Vec<u8>,
}

/// The id of a key: the hash of its DER form (upstream: `keyIDFromPublicKey`).
fn key_id(spki: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(spki))
}

fn public_key(spki: &[u8]) -> Result<PublicKey, KeyError> {
    let (_, info) = SubjectPublicKeyInfo::from_der(spki).map_err(|_| KeyError::Pem("public"))?;
    let bytes = info.subject_public_key.data.to_vec();
    let algorithm = match info.parsed() {
        Ok(x509_parser::public_key::PublicKey::EC(point)) if point.key_size() == 256 => "ES256",
        Ok(x509_parser::public_key::PublicKey::RSA(_)) => "RS256",
        _ => return Err(KeyError::Kind),
    };
    Ok(PublicKey { id: key_id(spki), algorithm, bytes })
}

/// Checks tokens.
pub struct Verifier {
    keys: Vec<PublicKey>,
    issuer: String,
    audiences: Vec<String>,
}

impl Verifier {
    /// A verifier for tokens of `issuer` that any of the keys (PEM, several per text) signed; `audiences` are the API server's.
    pub fn new<'a>(pems: impl IntoIterator<Item = &'a str>, issuer: String, audiences: Vec<String>) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for pem in pems {
            for spki in SubjectPublicKeyInfoDer::pem_slice_iter(pem.as_bytes()) {
                keys.push(public_key(&spki.map_err(|_| KeyError::Pem("public"))?)?);
            }
        }
        if keys.is_empty() {
            return Err(KeyError::Pem("public"));
        }
        Ok(Verifier { keys, issuer, audiences })
    }

    /// The audiences of the API server itself.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The user of a token. It must be meant for one of `audiences` (the API server's own where the list is empty), be valid
    /// at `now`, and its service account and bound object must still be there.
    pub fn verify(&self, token: &str, audiences: &[String], now: Timestamp, lookup: &dyn Lookup) -> Result<User, AuthnError> {
        let refused = |why: &str| AuthnError::Token(why.to_owned());
        let claims = self.claims(token)?;
        let wanted = if audiences.is_empty() { &self.audiences } else { audiences };
        if !claims.aud.iter().any(|audience| wanted.contains(audience)) {
            return Err(refused("token audiences are not the expected ones"));
        }
        if now.as_second() > claims.exp + LEEWAY_SECONDS {
            return Err(refused("service account token has expired"));
        }
        if now.as_second() + LEEWAY_SECONDS < claims.nbf {
            return Err(refused("service account token is not valid yet"));
        }
        let bound = &claims.kubernetes;
        let account = &bound.serviceaccount;
        still_there(lookup, "serviceaccounts", &bound.namespace, account, now)?;
        if let Some(pod) = &bound.pod {
            still_there(lookup, "pods", &bound.namespace, pod, now)?;
        }
        if let Some(secret) = &bound.secret {
            still_there(lookup, "secrets", &bound.namespace, secret, now)?;
        }
        if let (Some(node), None) = (&bound.node, &bound.pod) {
            still_there(lookup, "nodes", "", node, now)?;
        }
        Ok(service_account_user(&claims))
    }

    /// The claims of a token whose signature and issuer are right.
    fn claims(&self, token: &str) -> Result<Claims, AuthnError> {
        let refused = |why: &str| AuthnError::Token(why.to_owned());
        let (signed, signature) = token.rsplit_once('.').ok_or_else(|| refused("no JWT"))?;
        let (header, payload) = signed.split_once('.').ok_or_else(|| refused("no JWT"))?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| refused("no base64"));
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| refused("bad header"))?;
        let signature = decode(signature)?;
        let verified =
            self.keys.iter().filter(|key| key.algorithm == header.alg && (header.kid.is_empty() || key.id == header.kid)).any(|key| {
                let result = match key.algorithm {
                    "ES256" => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &key.bytes).verify(signed.as_bytes(), &signature),
                    _ => UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &key.bytes).verify(signed.as_bytes(), &signature),
                };
                result.is_ok()
            });
        if !verified {
            return Err(refused("the signature is wrong"));
        }
        let claims: Claims = serde_json::from_slice(&decode(payload)?).map_err(|_| refused("bad claims"))?;
        if claims.iss != self.issuer {
            return Err(refused("another issuer"));
        }
        Ok(claims)
    }
}

/// Checks that an object with this UID exists and was not deleted a while ago.
fn still_there(lookup: &dyn Lookup, resource: &str, namespace: &str, wanted: &Reference, now: Timestamp) -> Result<(), AuthnError> {
    let gone = || AuthnError::Token(format!("{resource} {namespace}/{} is gone", wanted.name));
    let object = lookup.get(resource, namespace, &wanted.name).ok_or_else(gone)?;
    if text(&object, "/metadata/uid") != wanted.uid {
        return Err(gone());
    }
    let deleted: Option<Timestamp> = text(&object, "/metadata/deletionTimestamp").parse().ok();
    match deleted {
        Some(deleted) if deleted + SignedDuration::from_secs(LEEWAY_SECONDS) < now => Err(gone()),
        _ => Ok(()),
    }
}

fn service_account_user(claims: &Claims) -> User {
    let bound = &claims.kubernetes;
    let mut extra = BTreeMap::new();
    let mut add = |key: &str, value: &str| {
        extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
    };
    add("credential-id", &format!("JTI={}", claims.jti));
    if let Some(pod) = &bound.pod {
        add("pod-name", &pod.name);
        add("pod-uid", &pod.uid);
    }
    if let Some(node) = &bound.node {
        add("node-name", &node.name);
        if !node.uid.is_empty() {
            add("node-uid", &node.uid);
        }
    }
    User {
        name: format!("system:serviceaccount:{}:{}", bound.namespace, bound.serviceaccount.name),
        uid: bound.serviceaccount.uid.clone(),
        groups: vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{}", bound.namespace), AUTHENTICATED.to_owned()],
        extra,
    }
}

/// Makes tokens.
pub struct Issuer {
    key: EcdsaKeyPair,
    id: String,
    issuer: String,
    random: SystemRandom,
}

impl Issuer {
    /// An issuer that signs with an ECDSA P-256 key (PKCS#8, PEM); `public_pem` is its public half.
    pub fn new(private_pem: &str, public_pem: &str, issuer: String) -> Result<Self, KeyError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(private_pem.as_bytes()).map_err(|_| KeyError::Pem("private"))?;
        let random = SystemRandom::new();
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der(), &random).map_err(|_| KeyError::Kind)?;
        for spki in SubjectPublicKeyInfoDer::pem_slice_iter(public_pem.as_bytes()).flatten() {
            let public = public_key(&spki)?;
            if public.bytes == key.public_key().as_ref() {
                return Ok(Issuer { key, id: public.id, issuer, random });
            }
        }
        Err(KeyError::Pem("matching public"))
    }

    /// Answers a `TokenRequest` (defaulted and validated) for a service account. `audiences` are the API server's own.
    ///
    /// Errors: 404 where the bound object is missing, 409 where it has another UID, 400 where it cannot be bound to.
    pub fn issue(
        &self,
        request: &Value,
        account: &Value,
        audiences: &[String],
        now: Timestamp,
        lookup: &dyn Lookup,
    ) -> Result<Value, Status> {
        let (namespace, name) = (text(account, "/metadata/namespace"), text(account, "/metadata/name"));
        let asked: Vec<String> =
            crate::lookup::items(request, "/spec/audiences").iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let for_server = asked.is_empty() || asked.iter().all(|audience| audiences.contains(audience));
        let asked = if asked.is_empty() { audiences.to_vec() } else { asked };
        let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(3600);

        let mut bound = Bound {
            namespace: namespace.to_owned(),
            node: None,
            pod: None,
            secret: None,
            serviceaccount: Reference { name: name.to_owned(), uid: text(account, "/metadata/uid").to_owned() },
            warnafter: None,
        };
        if let Some(reference) = request.pointer("/spec/boundObjectRef").filter(|reference| !reference.is_null()) {
            bind(&mut bound, reference, name, lookup)?;
        }
        let mut lasts = seconds;
        if bound.pod.is_some() && seconds == WARN_ONLY_SECONDS && for_server {
            bound.warnafter = Some(now.as_second() + seconds);
            lasts = EXTENDED_SECONDS;
        }
        let claims = Claims {
            aud: asked.clone(),
            exp: now.as_second() + lasts,
            iat: now.as_second(),
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: format!("system:serviceaccount:{namespace}:{name}"),
            nbf: now.as_second(),
            kubernetes: bound,
        };
        let token = self.sign(&claims)?;
        let expires = Timestamp::from_second(now.as_second() + seconds).unwrap_or(now);
        let mut answer = request.clone();
        answer["metadata"] =
            json!({ "name": name, "namespace": namespace, "uid": text(account, "/metadata/uid"), "creationTimestamp": seconds_text(now) });
        answer["spec"]["audiences"] = json!(asked);
        answer["spec"]["expirationSeconds"] = json!(seconds);
        answer["status"] = json!({ "token": token, "expirationTimestamp": seconds_text(expires) });
        Ok(answer)
    }

    fn sign(&self, claims: &Claims) -> Result<String, Status> {
        let failed = |what: &str| Status::internal(format!("failed to generate token: {what}"));
        let header = Header { alg: "ES256".into(), kid: self.id.clone() };
        let encode = |value: Vec<u8>| URL_SAFE_NO_PAD.encode(value);
        let header = serde_json::to_vec(&header).map_err(|_| failed("header"))?;
        let payload = serde_json::to_vec(claims).map_err(|_| failed("claims"))?;
        let signed = format!("{}.{}", encode(header), encode(payload));
        let signature = self.key.sign(&self.random, signed.as_bytes()).map_err(|_| failed("signature"))?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())))
    }
}

/// A time as the API writes it: whole seconds, UTC.
fn seconds_text(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

/// Fills in the object that a token is bound to.
fn bind(bound: &mut Bound, reference: &Value, account: &str, lookup: &dyn Lookup) -> Result<(), Status> {
    let (kind, name, uid) = (text(reference, "/kind"), text(reference, "/name"), text(reference, "/uid"));
    let (resource, namespace) = match (text(reference, "/apiVersion"), kind) {
        ("v1", "Pod") => ("pods", bound.namespace.as_str()),
        ("v1", "Secret") => ("secrets", bound.namespace.as_str()),
        ("v1", "Node") => ("nodes", ""),
        (version, kind) => {
            let version = if version.contains('/') { version.to_owned() } else { format!("/{version}") };
            return Err(Status::bad_request(format!("cannot bind token to object of type {version}, Kind={kind}")));
        }
    };
    let object = lookup.get(resource, namespace, name).ok_or_else(|| Status::not_found("", resource, name))?;
    let found = text(&object, "/metadata/uid");
    if resource == "pods" && text(&object, "/spec/serviceAccountName") != account {
        return Err(Status::bad_request(format!(
            "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
        )));
    }
    if !uid.is_empty() && uid != found {
        let detail = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict("", kind, name, &detail));
    }
    let own = Reference { name: name.to_owned(), uid: found.to_owned() };
    match resource {
        "pods" => {
            let node = text(&object, "/spec/nodeName");
            if !node.is_empty() {
                let uid = lookup.get("nodes", "", node).map(|node| text(&node, "/metadata/uid").to_owned()).unwrap_or_default();
                bound.node = Some(Reference { name: node.to_owned(), uid });
            }
            bound.pod = Some(own);
        }
        "secrets" => bound.secret = Some(own),
        _ => bound.node = Some(own),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup::fake::Fake;

    fn cluster() -> Fake {
        Fake::default()
            .with("serviceaccounts", json!({ "metadata": { "namespace": "ns", "name": "web", "uid": "sa-1" } }))
            .with(
                "pods",
                json!({ "metadata": { "namespace": "ns", "name": "p", "uid": "pod-1" },
                "spec": { "serviceAccountName": "web", "nodeName": "n1" } }),
            )
            .with("nodes", json!({ "metadata": { "name": "n1", "uid": "node-1" } }))
    }

    fn parts() -> (Issuer, Verifier, Vec<String>) {
        let audiences = vec!["https://issuer".to_owned()];
        let key = rcgen::KeyPair::generate().unwrap();
        let public = key.public_key_pem();
        let issuer = Issuer::new(&key.serialize_pem(), &public, "https://issuer".into()).unwrap();
        (issuer, Verifier::new([public.as_str()], "https://issuer".into(), audiences.clone()).unwrap(), audiences)
    }

    fn issue((issuer, _, audiences): &(Issuer, Verifier, Vec<String>), spec: Value, now: Timestamp) -> Result<String, Status> {
        let account = cluster().get("serviceaccounts", "ns", "web").unwrap();
        let answer = issuer.issue(&json!({ "spec": spec }), &account, audiences, now, &cluster())?;
        Ok(text(&answer, "/status/token").to_owned())
    }

    #[test]
    fn a_bound_token_names_its_pod_and_ends_with_it() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let reference = json!({ "apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "pod-1" });
        let parts = parts();
        let token = issue(&parts, json!({ "boundObjectRef": reference, "expirationSeconds": 600 }), now).unwrap();
        let verifier = &parts.1;
        let user = verifier.verify(&token, &[], now, &cluster()).unwrap();
        assert_eq!(user.name, "system:serviceaccount:ns:web");
        assert_eq!(user.extra["authentication.kubernetes.io/node-uid"], ["node-1"]);
        let mut without = cluster();
        without.0.retain(|(resource, _)| *resource != "pods");
        assert!(verifier.verify(&token, &[], now, &without).is_err());
        assert!(verifier.verify(&token, &["other".into()], now, &cluster()).is_err());
        assert!(verifier.verify(&token, &[], now + SignedDuration::from_secs(661), &cluster()).is_err());
        let mut forged = token.into_bytes();
        let last = forged.len() - 2;
        forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
        assert!(verifier.verify(std::str::from_utf8(&forged).unwrap(), &[], now, &cluster()).is_err());
    }

    #[test]
    fn what_cannot_be_bound_is_refused() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let parts = parts();
        let refused = |reference: Value| issue(&parts, json!({ "boundObjectRef": reference }), now).is_err();
        assert!(refused(json!({ "apiVersion": "v1", "kind": "Pod", "name": "missing" })));
        assert!(refused(json!({ "apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "other" })));
        assert!(refused(json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "d" })));
    }
}
