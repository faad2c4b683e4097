//! Client and server of this crate against each other, in every framing.

use bytes::Bytes;
use remotecommand::{Channels, Input, Output, Protocol, Status, TerminalSize, accept, attach};

const PROTOCOLS: [Protocol; 3] = [Protocol::SpdyV4, Protocol::WebSocketV5, Protocol::WebSocketV4];

#[tokio::test]
async fn a_command_echoes_until_stdin_ends() {
    for protocol in [Protocol::SpdyV4, Protocol::WebSocketV5] {
        let channels = Channels { stdin: true, stdout: true, stderr: true, tty: false };
        let (near, far) = tokio::io::duplex(4096);
        let (mut server, server_driver) = accept(near, protocol, channels);
        let (mut client, client_driver) = attach(far, protocol, channels);
        let command = async move {
            let mut bytes = 0;
            while let Some(Input::Stdin(chunk)) = server.input.recv().await {
                bytes += chunk.len();
                server.output.send(Output::Stdout(chunk)).await.unwrap();
            }
            server.output.send(Output::Stderr(Bytes::from(bytes.to_string()))).await.unwrap();
            server.output.send(Output::Status(Status::exited(3))).await.unwrap();
        };
        let (input, total) = (client.input, 1_000_000);
        let user = async move {
            input.send(Input::Stdin(Bytes::from(vec![7; total]))).await.unwrap();
            input.send(Input::StdinClosed).await.unwrap();
        };
        let watcher = async move {
            let (mut out, mut err, mut status) = (0, Vec::new(), None);
            while let Some(item) = client.output.recv().await {
                match item {
                    Output::Stdout(chunk) => out += chunk.len(),
                    Output::Stderr(chunk) => err.extend_from_slice(&chunk),
                    Output::Status(end) => status = Some(end),
                }
            }
            (out, String::from_utf8(err).unwrap(), status.unwrap().exit_code())
        };
        let (served, driven, (), (), seen) = tokio::join!(server_driver, client_driver, command, user, watcher);
        served.unwrap();
        driven.unwrap();
        assert_eq!(seen, (total, total.to_string(), Some(3)), "{protocol:?}");
    }
}

#[tokio::test]
async fn a_terminal_is_resized() {
    for protocol in PROTOCOLS {
        let channels = Channels { stdin: true, stdout: true, stderr: false, tty: true };
        let (near, far) = tokio::io::duplex(4096);
        let (mut server, server_driver) = accept(near, protocol, channels);
        let (mut client, client_driver) = attach(far, protocol, channels);
        let size = TerminalSize { width: 120, height: 40 };
        let talk = async move {
            client.input.send(Input::Resize(size)).await.unwrap();
            assert_eq!(server.input.recv().await, Some(Input::Resize(size)), "{protocol:?}");
            server.output.send(Output::Status(Status::failed("no such container"))).await.unwrap();
            assert_eq!(client.output.recv().await, Some(Output::Status(Status::failed("no such container"))));
            assert_eq!(client.output.recv().await, None);
        };
        let (served, driven, ()) = tokio::join!(server_driver, client_driver, talk);
        served.unwrap();
        driven.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_goes_ends_the_server() {
    for protocol in PROTOCOLS {
        let channels = Channels { stdin: true, stdout: true, stderr: true, tty: false };
        let (near, far) = tokio::io::duplex(4096);
        let (mut server, server_driver) = accept(near, protocol, channels);
        let (client, client_driver) = attach(far, protocol, channels);
        drop(client);
        let (served, driven, input) = tokio::join!(server_driver, client_driver, async {
            while let Some(item) = server.input.recv().await {
                assert_eq!(item, Input::StdinClosed);
            }
        });
        served.unwrap();
        driven.unwrap();
        input
    }
}

#[tokio::test]
async fn a_command_may_end_before_the_client_has_opened_its_streams() {
    let channels = Channels { stdin: true, stdout: true, stderr: false, tty: true };
    let (near, far) = tokio::io::duplex(4096);
    let (server, server_driver) = accept(near, Protocol::SpdyV4, channels);
    let server_driver = tokio::spawn(server_driver);
    server.output.send(Output::Stdout(Bytes::from_static(b"done"))).await.unwrap();
    server.output.send(Output::Status(Status::exited(0))).await.unwrap();
    // The driver has had every chance to end the connection by now.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let (mut client, client_driver) = attach(far, Protocol::SpdyV4, channels);
    let client_driver = tokio::spawn(client_driver);
    assert_eq!(client.output.recv().await, Some(Output::Stdout(Bytes::from_static(b"done"))));
    assert_eq!(client.output.recv().await, Some(Output::Status(Status::exited(0))));
    assert_eq!(client.output.recv().await, None);
    client_driver.await.unwrap().unwrap();
    server_driver.await.unwrap().unwrap();
}
