//! The web server of the demo's image: answers every request with the name of its pod. One static executable, no shell beside it.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

/// How long a client may take to send its request.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> std::io::Result<()> {
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".to_owned());
    let name = std::env::var("POD_NAME").unwrap_or_else(|_| "nobody".to_owned());
    let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
    println!("{name} listens on port {port}");
    for stream in listener.incoming() {
        if let Err(error) = stream.and_then(|stream| answer(stream, &name)) {
            eprintln!("failed to answer: {error}");
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    println!("{}", request.trim_end());
    let body = format!("Hello from {name}\n");
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}
