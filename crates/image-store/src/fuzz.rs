//! Mutated manifests, archives, whiteouts, references and challenges: an answer or an error, and nothing is written outside.

use std::path::Path;

use http::{HeaderMap, HeaderValue};
use testkit::fuzz::Fuzz;
use testkit::tar::Entry;

use crate::layer::Expected;
use crate::media::{chain_ids, image_config, parse_config, parse_manifest};
use crate::registry::challenge;
use crate::tar::Archive;
use crate::unpack::{Limits, complete, open_root, unpack};
use crate::{Digest, Platform, Reference};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 500 };

#[test]
fn documents() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/documents");
    let words =
        ["\"mediaType\"", "\"layers\"", "\"manifests\"", "\"digest\"", "sha256:", "\"platform\"", "\"diff_ids\"", "\"rootfs\"", "\"size\""];
    let platform = Platform::host();
    Fuzz::new("documents").folder(folder).words(&words).run(|input| {
        let _ = parse_manifest(input, &platform, "m");
        if let Ok(config) = parse_config(input, &platform, "c") {
            assert_eq!(chain_ids(&config.diff_ids).len(), config.diff_ids.len());
        }
        let _ = serde_json::from_slice(input).map(|value| image_config(&value));
    });
}

#[test]
fn names() {
    let digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let fuzz = Fuzz::new("references").seed("busybox").seed("localhost:5000/a/b-c_d.e:v1.2").seed(format!("[::1]:80/a@{digest}"));
    fuzz.seed(format!("registry.example/x:y@{digest}")).words(&["@", "sha256:", "__", "..", "a/"]).run(|input| {
        let text = String::from_utf8_lossy(input);
        if let Ok(reference) = Reference::parse(&text) {
            let name = reference.name();
            assert!(!name.contains("..") && !name.contains("//"), "{name}");
            let again = Reference::parse(&reference.tagged().unwrap_or(name)).expect("what was written is read");
            assert_eq!(again.name(), reference.name());
        }
        if let Some(digest) = Digest::parse(&text) {
            assert!(!digest.as_str().contains('/'), "{digest}");
        }
    });
}

#[test]
fn registry_hosts() {
    let seed = "server = 'https://own.example'\n[host.'http://127.0.0.1:5000']\ncapabilities = ['pull', 'resolve']\noverride_path = true\n\
                [host.'a.example/sub'.header]\nx-a = ['1', '2']\ny = 'z'\n";
    let reference = Reference::parse("r.example/a/b:1").expect("a reference");
    Fuzz::new("hosts.toml").seed(seed).words(&["[host.'", "']", "http://", "capabilities", "'push'", "skip_verify = true"]).run(|input| {
        for endpoint in crate::registry::hosts::parse(&String::from_utf8_lossy(input), &reference).unwrap_or_default() {
            assert!(endpoint.base.starts_with("http"), "{endpoint:?}");
        }
    });
}

#[test]
fn challenges() {
    let fuzz =
        Fuzz::new("challenges").seed("Bearer realm=\"https://a/token\",service=\"b\",scope=\"repository:c:pull\"").seed("Basic realm=x");
    fuzz.words(&["Bearer ", "Basic ", "=\"", "\\\"", ", "]).run(|input| {
        let Ok(value) = HeaderValue::from_bytes(input) else { return };
        let headers: HeaderMap = [(http::header::WWW_AUTHENTICATE, value)].into_iter().collect();
        let _ = challenge::parse(&headers);
    });
}

fn archives() -> Vec<Vec<u8>> {
    let plain = vec![Entry::dir("a"), Entry::file("a/f", "text"), Entry::symlink("a/l", "../../outside"), Entry::file("a/l/x", "y")];
    let whiteouts = vec![Entry::dir("a"), Entry::file("a/.wh.f", ""), Entry::file("a/.wh..wh..opq", ""), Entry::file(".wh..", "")];
    let links =
        vec![Entry::file("f", "text"), Entry::hardlink("h", "f"), Entry::hardlink("i", "../outside"), Entry::symlink("s", "/outside")];
    let long = vec![Entry::file(&"n".repeat(300), "long"), Entry::file("x", "y").mode(0o4755), Entry::symlink("d", "d")];
    [plain, whiteouts, links, long].iter().map(|entries| testkit::tar::archive(entries)).collect()
}

#[test]
fn layers_stay_inside() {
    let around = tempfile::tempdir().expect("a directory");
    let outside = around.path().join("outside");
    let root = around.path().join("deep/er/root");
    std::fs::write(&outside, "untouched").expect("a file");
    let fuzz = archives().into_iter().fold(Fuzz::new("layers"), Fuzz::seed);
    let words =
        ["../", "/", ".wh.", ".wh..wh..opq", "outside", "ustar\u{0}00", "SCHILY.xattr.user.x=y\n", "30 path=../../outside\n", "0000000"];
    fuzz.words(&words).runs(1500).run(|input| {
        std::fs::create_dir_all(&root).expect("a root");
        let fd = open_root(&root).expect("opened");
        if let Ok(mut done) = unpack(&mut Archive::new(input), fd, LIMITS, "layer") {
            let fd = open_root(&root).expect("opened");
            let _ = complete(&fd, &mut done, &[], "layer");
        }
        let beside: Vec<_> = std::fs::read_dir(around.path()).expect("listed").flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(beside.len(), 2, "{beside:?}");
        assert_eq!(std::fs::read_to_string(&outside).expect("still there"), "untouched");
        let above = std::fs::read_dir(around.path().join("deep")).expect("listed").count();
        assert_eq!((above, std::fs::read_dir(around.path().join("deep/er")).expect("listed").count()), (1, 1));
        std::fs::remove_dir_all(&root).expect("removed");
    });
}

/// What the mutated archives are packed in.
#[test]
fn packed_streams() {
    use std::io::Write;
    let plain = archives().concat();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&plain).expect("packed");
    let zstd = zstd::stream::encode_all(&plain[..], 3).expect("packed");
    let around = tempfile::tempdir().expect("a directory");
    let expected = Expected { packed: None, diff_id: Digest::of(&plain), limits: LIMITS };
    Fuzz::new("packed").seed(gzip.finish().expect("packed")).seed(zstd).runs(600).run(|mut input| {
        let root = around.path().join("root");
        std::fs::create_dir_all(&root).expect("a root");
        let fd = open_root(&root).expect("opened");
        let _ = crate::layer::unpack_stream(&mut input, fd, &expected, "layer");
        std::fs::remove_dir_all(&root).expect("removed");
    });
}
