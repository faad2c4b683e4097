//! Real etcds, each in a folder and on ports of its own.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use store::{Etcd, EtcdConfig};

/// How long a member may take to listen.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Other ports are tried when somebody else has taken one meanwhile.
const STARTS_MAX: usize = 5;

/// The program of this name, where it could be had.
pub fn peer(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("CORACLE_PEERS").map(|folder| PathBuf::from(folder).join(name.replace('_', "-")));
    let found = path.filter(|path| path.is_file());
    if found.is_none() {
        println!("SKIPPED: {name}: there is no {name} in CORACLE_PEERS");
    }
    found
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// A running etcd; killed when dropped.
pub struct Member {
    program: PathBuf,
    folder: PathBuf,
    pub port: u16,
    process: Child,
    _guard: Option<tempfile::TempDir>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

fn config(folder: &Path, name: &str, scheme: &str, port: u16, internal: u16, cluster: &str, more: &str) -> String {
    format!(
        "name: {name}\ndata-dir: {folder}/data\nlisten-client-urls: {scheme}://127.0.0.1:{port}\n\
         advertise-client-urls: {scheme}://127.0.0.1:{port}\nlisten-peer-urls: http://127.0.0.1:{internal}\n\
         initial-advertise-peer-urls: http://127.0.0.1:{internal}\ninitial-cluster: {cluster}\n{more}",
        folder = folder.display()
    )
}

fn run(program: &Path, folder: &Path) -> Child {
    let log = File::options().create(true).append(true).open(folder.join("log")).expect("a log");
    let config = format!("--config-file={}", folder.join("config").display());
    let mut command = Command::new(program);
    command.arg(config).stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
    command.spawn().expect("etcd runs")
}

impl Member {
    /// A cluster of one.
    pub fn start(program: &Path) -> Member {
        Member::start_with(program, "http", "")
    }

    /// A cluster of one with further lines of its configuration.
    pub fn start_with(program: &Path, scheme: &str, more: &str) -> Member {
        for _ in 0..STARTS_MAX {
            let guard = tempfile::tempdir().expect("tempdir");
            let (port, internal) = (free_port(), free_port());
            let cluster = format!("m0=http://127.0.0.1:{internal}");
            let text = config(guard.path(), "m0", scheme, port, internal, &cluster, more);
            fs::write(guard.path().join("config"), text).expect("a configuration");
            let process = run(program, guard.path());
            let mut member = Member { program: program.to_owned(), folder: guard.path().to_owned(), port, process, _guard: Some(guard) };
            if member.listens() {
                return member;
            }
        }
        panic!("etcd does not start");
    }

    /// A cluster of three.
    pub fn start_three(program: &Path) -> Vec<Member> {
        for _ in 0..STARTS_MAX {
            let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
            let urls: Vec<String> =
                ports.iter().enumerate().map(|(number, (_, internal))| format!("m{number}=http://127.0.0.1:{internal}")).collect();
            let member = |(number, (port, internal)): (usize, &(u16, u16))| {
                let guard = tempfile::tempdir().expect("tempdir");
                let text = config(guard.path(), &format!("m{number}"), "http", *port, *internal, &urls.join(","), "");
                fs::write(guard.path().join("config"), text).expect("a configuration");
                let process = run(program, guard.path());
                Member { program: program.to_owned(), folder: guard.path().to_owned(), port: *port, process, _guard: Some(guard) }
            };
            let mut members: Vec<Member> = ports.iter().enumerate().map(member).collect();
            if members.iter_mut().all(Member::listens) {
                return members;
            }
        }
        panic!("three etcds do not start");
    }

    /// Whether it listens before it ends.
    fn listens(&mut self) -> bool {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            if self.process.try_wait().expect("a process").is_some() {
                return false;
            }
            if std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("etcd does not listen: {}", fs::read_to_string(self.folder.join("log")).unwrap_or_default());
    }

    /// Kills it; its data stay.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again on the same data and ports.
    pub fn restart(&mut self) {
        self.process = run(&self.program, &self.folder);
        assert!(self.listens(), "etcd starts again");
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub async fn client(&self) -> Etcd {
        client(vec![self.url()]).await
    }
}

/// A client of these members.
pub async fn client(endpoints: Vec<String>) -> Etcd {
    Etcd::connect(&EtcdConfig { endpoints, ..EtcdConfig::default() }).await.expect("connect")
}
