//! Mutated user files of images and requests to the stream server: an answer or an error, never a panic, and no user by chance.

use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue};
use protocols::cri::v1::LinuxContainerSecurityContext;
use testkit::fuzz::Fuzz;

use crate::spec::user::{UserFiles, resolve};
use crate::streaming::{Tokens, route};

#[test]
fn user_files() {
    let fuzz = Fuzz::new("passwd").seed("www:log\nroot:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/:\n#c:x:1:1\nbad\n");
    let fuzz = fuzz.seed("33\nroot:x:0:\nwww:x:34:www\nlog:x:50:root,www\nmine:x:60:other\n");
    fuzz.words(&[":", ",", "www", "x", "4294967295", "-1", "+0", "\u{0}"]).run(|input| {
        let text = String::from_utf8_lossy(input);
        // The first line is the image's user, the others are both files.
        let (user, lines) = text.split_once('\n').unwrap_or((&text, ""));
        let files = UserFiles { passwd: Some(lines.to_owned()), group: Some(lines.to_owned()) };
        let Ok(found) = resolve(&LinuxContainerSecurityContext::default(), user, &files) else { return };
        let ids = found.additional_gids.iter().chain([&found.uid, &found.gid]);
        assert!(ids.into_iter().all(|id| *id <= i32::MAX as u32), "{user:?} is {found:?}");
    });
}

#[test]
fn stream_requests() {
    let fuzz = Fuzz::new("streams")
        .seed("/exec/0123456789abcdef\nconnection: Upgrade\nupgrade: SPDY/3.1\nx-stream-protocol-version: v4.channel.k8s.io");
    let fuzz = fuzz.seed(
        "/portforward/x\nconnection: upgrade, keep-alive\nupgrade: websocket\nsec-websocket-version: 13\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\nsec-websocket-protocol: v5.channel.k8s.io, v4.channel.k8s.io",
    );
    let tokens = Tokens::default();
    fuzz.words(&["/exec/", "/attach/", "//", "%2f", "upgrade", "websocket", "channel.k8s.io", ", "]).run(|input| {
        let text = String::from_utf8_lossy(input);
        let (path, headers) = text.split_once('\n').unwrap_or((&text, ""));
        if let Some((_, token)) = route(path) {
            assert!(!token.contains('/') && tokens.take(token, Instant::now()).is_none(), "{path:?} has a session");
        }
        let pair = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_bytes(value.as_bytes()).ok()?))
        };
        let headers: HeaderMap = headers.lines().filter_map(pair).collect();
        let _ = (remotecommand::negotiate(&headers).is_ok(), remotecommand::negotiate_port_forward(&headers).is_ok());
    });
}
