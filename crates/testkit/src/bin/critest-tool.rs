//! The programs of critest's images that Debian's busybox has not: one static executable, told by the name it is run by.
//!
//! `nginx` and `httpd` answer every HTTP request on port `$PORT` (80); nginx has a pid file and a process title, httpd talks of itself on
//! stderr, as the real ones do. `nnp` tells its effective uid. `pause` sleeps. `pgrep NAME` and `ipcs -m` are what their names say.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// How long a client may take to send its request.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// What nginx calls its first process.
const MASTER: &str = "nginx: master process nginx -g daemon off;";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let own = arguments.first().map(String::as_str).unwrap_or_default();
    let done = match own.rsplit('/').next().unwrap_or_default() {
        "pause" => loop {
            std::thread::park();
        },
        _ if own == MASTER => serve(),
        "nginx" => become_master(),
        "httpd" => {
            eprintln!("AH00558: httpd: Could not reliably determine the server's fully qualified domain name");
            serve()
        }
        "nnp" => tell_uid(),
        "pgrep" => return pgrep(arguments.last().map(String::as_str).unwrap_or_default()),
        "ipcs" => shared_memory(),
        other => Err(std::io::Error::other(format!("{other} is none of its names"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{own}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn become_master() -> std::io::Result<()> {
    std::fs::create_dir_all("/var/run")?;
    std::fs::write("/var/run/nginx.pid", format!("{}\n", std::process::id()))?;
    // By its own path: the kernel names the process by it.
    Err(Command::new(std::fs::read_link("/proc/self/exe")?).arg0(MASTER).exec())
}

fn serve() -> std::io::Result<()> {
    let port = std::env::var("PORT").unwrap_or_else(|_| "80".to_owned());
    let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
    for stream in listener.incoming() {
        if let Err(error) = stream.and_then(answer) {
            eprintln!("failed to answer: {error}");
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = "It works!\n";
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn tell_uid() -> std::io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    println!("Effective uid: {}", line.split_whitespace().nth(1).unwrap_or("?"));
    Ok(())
}

fn pgrep(wanted: &str) -> ExitCode {
    let mut found = false;
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let is_process = entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if is_process && name.contains(wanted) && entry.file_name() != *std::process::id().to_string() {
            println!("{}", entry.file_name().display());
            found = true;
        }
    }
    if found { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Keys and ids of the segments of shared memory in this IPC namespace.
fn shared_memory() -> std::io::Result<()> {
    println!("key        shmid");
    for line in std::fs::read_to_string(Path::new("/proc/sysvipc/shm"))?.lines().skip(1) {
        let mut words = line.split_whitespace();
        println!("{:<10} {}", words.next().unwrap_or_default(), words.next().unwrap_or_default());
    }
    Ok(())
}
