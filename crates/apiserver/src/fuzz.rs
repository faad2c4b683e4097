//! Mutated request lines, headers, tokens and certificates: an answer or an error, never a panic, and no credential by chance.

use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use rcgen::{CertificateParams, DnType, KeyPair};
use testkit::fuzz::Fuzz;

use crate::authn::token::Verifier;
use crate::authn::x509;
use crate::lookup::fake::Fake;
use crate::negotiate;
use crate::request::{self, Query};

#[test]
fn paths_and_queries() {
    let fuzz = [
        "/api/v1/namespaces/default/pods/x/log?container=c&follow=true&tailLines=10",
        "/apis/apps/v1/watch/namespaces/a/deployments/b?resourceVersion=0&allowWatchBookmarks",
        "/api/v1/nodes/n/proxy/a/b%2Fc?x=%zz+%41&labelSelector=a%3Db&fieldSelector=metadata.name%3Dx",
        "/livez/ping?exclude=store&verbose",
    ];
    let fuzz = fuzz.into_iter().fold(Fuzz::new("request-line"), |fuzz, seed| fuzz.seed(seed));
    fuzz.words(&["/api", "/apis", "/namespaces/", "/watch/", "/proxy", "/status", "?watch=1", "%2F", "%00", "%", "&&", "/../"]).run(
        |input| {
            let text = String::from_utf8_lossy(input);
            let (path, query) = text.split_once('?').unwrap_or((&text, ""));
            let query = Query::parse(query);
            let _ = (query.flag("watch"), query.get("fieldSelector"), query.all("command").count());
            for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE] {
                let info = request::parse(&method, path, &query);
                assert!(!info.is_resource || path.contains("api"), "{path:?} is {info:?}");
                assert_eq!(info.path, path);
            }
        },
    );
}

#[test]
fn headers() {
    let fuzz = [
        "application/json;as=Table;v=v1;g=meta.k8s.io, application/json;q=0.8, */*",
        "application/vnd.kubernetes.protobuf;type=\"x;y\",application/yaml",
        "application/strategic-merge-patch+json; charset=utf-8",
    ];
    let fuzz = fuzz.into_iter().fold(Fuzz::new("headers"), |fuzz, seed| fuzz.seed(seed));
    fuzz.words(&["application/", ";as=Table", ";q=", "*/*", "stream=watch", "\"", "\\"]).run(|input| {
        let Ok(value) = HeaderValue::from_bytes(input) else { return };
        let headers: HeaderMap = [(ACCEPT, value.clone()), (CONTENT_TYPE, value)].into_iter().collect();
        let _ = (negotiate::accept(&headers, true, false).is_ok(), negotiate::accept(&headers, false, true).is_ok());
        let _ = (negotiate::accept_or_json(&headers), negotiate::content_type(&headers), negotiate::body_media(&headers).is_ok());
        let _ = negotiate::clauses(&negotiate::accept_header(&headers));
    });
}

#[test]
fn tokens() {
    let key = KeyPair::generate().expect("a key");
    let public = key.public_key_pem();
    let verifier = Verifier::new([public.as_str()], "https://i".to_owned(), vec!["https://i".to_owned()]).expect("a key");
    let now = "2026-11-23T00:00:00Z".parse().expect("a time");
    let lookup = Fake::default();
    // {"alg":"ES256"} . {"iss":"https://i","aud":["https://i"],"sub":"system:serviceaccount:a:b","exp":9999999999,"nbf":0}
    let claims = "eyJpc3MiOiJodHRwczovL2kiLCJhdWQiOlsiaHR0cHM6Ly9pIl0sInN1YiI6InN5c3RlbTpzZXJ2aWNlYWNjb3VudDphOmIiLCJleHAiOjk5OTk5OTk5OTksIm5iZiI6MH0";
    let token = format!("eyJhbGciOiJFUzI1NiJ9.{claims}.{}", "A".repeat(86));
    let none = format!("eyJhbGciOiJub25lIn0.{claims}.");
    Fuzz::new("tokens").seed(token).seed(none).words(&[".", "eyJ", "=", "-", "_", "eyJhbGciOiJIUzI1NiJ9"]).run(|input| {
        let text = String::from_utf8_lossy(input);
        assert!(verifier.verify(&text, &[], now, &lookup).is_err(), "{text} is taken for a token");
    });
}

#[test]
fn certificates() {
    let mut params = CertificateParams::new(vec!["a.example".to_owned()]).expect("a name");
    params.distinguished_name.push(DnType::CommonName, "system:node:n");
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    let der = params.self_signed(&KeyPair::generate().expect("a key")).expect("signed").der().to_vec();
    Fuzz::new("certificates").seed(der).words(&["system:masters", "\u{0}"]).run(|input| {
        if let Ok(user) = x509::user(input) {
            assert!(!user.name.is_empty() && user.is_in("system:authenticated"));
        }
    });
}
