//! Mutated sessions in every framing, towards the server and towards the client: they end, with or without an error, and hand on no
//! more than a bounded queue at a time.

use std::time::Duration;

use bytes::Bytes;
use remotecommand::{Channels, Input, Output, Protocol, Status, StreamError, TerminalSize, accept, attach};
use testkit::fuzz::Fuzz;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const CHANNELS: Channels = Channels { stdin: true, stdout: true, stderr: true, tty: false };
/// Room for all that one side says.
const PIPE_BYTES: usize = 1 << 20;
/// In paused time: a session that does not end is found at once.
const TIMEOUT: Duration = Duration::from_secs(3600);

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime")
}

/// Passes bytes on and keeps a copy.
async fn tap(mut from: DuplexStream, mut to: DuplexStream) -> (Vec<u8>, Vec<u8>) {
    let (mut there, mut back) = (Vec::new(), Vec::new());
    let (mut one, mut two) = ([0; 4096], [0; 4096]);
    loop {
        tokio::select! {
            read = from.read(&mut one) => match read {
                Ok(count) if count > 0 && to.write_all(&one[..count]).await.is_ok() => there.extend_from_slice(&one[..count]),
                _ => return (there, back),
            },
            read = to.read(&mut two) => match read {
                Ok(count) if count > 0 && from.write_all(&two[..count]).await.is_ok() => back.extend_from_slice(&two[..count]),
                _ => return (there, back),
            },
        }
    }
}

/// What client and server say in a short session.
async fn record(protocol: Protocol) -> (Vec<u8>, Vec<u8>) {
    let (client_io, client_far) = tokio::io::duplex(PIPE_BYTES);
    let (server_io, server_far) = tokio::io::duplex(PIPE_BYTES);
    let (mut server, server_driver) = accept(server_io, protocol, CHANNELS);
    let (mut client, client_driver) = attach(client_io, protocol, CHANNELS);
    let talk = async move {
        client.input.send(Input::Resize(TerminalSize { width: 80, height: 25 })).await.expect("open");
        client.input.send(Input::Stdin(Bytes::from_static(b"hello"))).await.expect("open");
        client.input.send(Input::StdinClosed).await.expect("open");
        while let Some(event) = server.input.recv().await {
            if event == Input::StdinClosed || matches!(event, Input::Stdin(_)) {
                break;
            }
        }
        server.output.send(Output::Stdout(Bytes::from_static(b"out"))).await.expect("open");
        server.output.send(Output::Stderr(Bytes::from_static(b"err"))).await.expect("open");
        server.output.send(Output::Status(Status::exited(3))).await.expect("open");
        drop(server);
        while client.output.recv().await.is_some() {}
    };
    let (said, ..) = tokio::join!(tap(client_far, server_far), server_driver, client_driver, talk);
    said
}

async fn feed(mut io: DuplexStream, bytes: &[u8]) {
    // Whoever refuses the first bytes does not read the others.
    let _ = io.write_all(bytes).await;
    let _ = io.shutdown().await;
    let _ = io.read_to_end(&mut Vec::new()).await;
}

async fn to_server(protocol: Protocol, bytes: &[u8]) {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let (mut server, driver) = accept(near, protocol, CHANNELS);
    let take = async move {
        let mut taken = 0;
        while let Some(event) = server.input.recv().await {
            if let Input::Stdin(chunk) = event {
                taken += chunk.len();
            }
        }
        taken
    };
    let all = async { tokio::join!(feed(far, bytes), driver, take) };
    let ((), _outcome, taken): ((), Result<(), StreamError>, usize) = tokio::time::timeout(TIMEOUT, all).await.expect("the session ends");
    assert!(taken <= bytes.len(), "{taken} bytes of {}", bytes.len());
}

async fn to_client(protocol: Protocol, bytes: &[u8]) {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let (mut client, driver) = attach(near, protocol, CHANNELS);
    let take = async move {
        drop(client.input);
        while client.output.recv().await.is_some() {}
    };
    let all = async { tokio::join!(feed(far, bytes), driver, take) };
    let ((), _outcome, ()) = tokio::time::timeout(TIMEOUT, all).await.expect("the session ends");
}

fn fuzz(name: &str, protocol: Protocol) {
    let (client, server) = paused().block_on(record(protocol));
    assert!(!client.is_empty() && !server.is_empty(), "nothing was recorded");
    let one = |name: String, seed: Vec<u8>| Fuzz::new(&name).seed(seed).runs(600);
    one(format!("{name}-server"), client).run(|input| paused().block_on(to_server(protocol, input)));
    one(format!("{name}-client"), server).run(|input| paused().block_on(to_client(protocol, input)));
}

#[test]
fn spdy() {
    fuzz("spdy", Protocol::SpdyV4);
}

#[test]
fn websocket_v5() {
    fuzz("websocket-v5", Protocol::WebSocketV5);
}

#[test]
fn websocket_v4() {
    fuzz("websocket-v4", Protocol::WebSocketV4);
}
