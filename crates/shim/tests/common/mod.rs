//! A containerd for tests: starts the shim as containerd does, speaks ttrpc to it, and takes its events.

#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use linux::namespace::{self, Kind};
use prost::Message;
use protocols::shim::bootstrap::v1::{BootstrapParams, BootstrapResult};
use protocols::shim::coracle::{StartShimRequest, StartShimResponse};
use protocols::shim::events::ForwardRequest;
use protocols::shim::options::{RUNC_TYPE_URL, runc};
use protocols::shim::pod::{self, PodSandboxConfig};
use protocols::shim::sandbox::v1 as sandbox;
use protocols::shim::task::v3 as task;
use protocols::ttrpc::{self, FrameType, HEADER_BYTES, Request, Response, RpcError};
use testkit::host::pids_with;
pub use testkit::poll::until;

/// The shim under test: `CORACLE_TEST_SHIM`, or the static one of `CORACLE_BIN` (as `cargo xtask test` gives it), or
/// cargo's.
pub fn shim() -> PathBuf {
    let together = std::env::var_os("CORACLE_BIN").map(|dir| Path::new(&dir).join("containerd-shim-coracle-v2"));
    std::env::var_os("CORACLE_TEST_SHIM")
        .map(PathBuf::from)
        .or(together.filter(|path| path.exists()))
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_containerd-shim-coracle-v2")))
}

/// Whether the shim under test is static (it names no program interpreter).
pub fn is_static() -> bool {
    let bytes = std::fs::read(shim()).expect("the shim");
    let head = bytes.get(..4096).unwrap_or(&bytes);
    !head.windows(3).any(|window| window == b"ld-")
}

pub const NAMESPACE: &str = "coracle-test";
/// In the command line of every shim.
const SHIM: &str = "containerd-shim-coracle";

/// Why these tests cannot run here, if so.
pub fn cannot_run() -> Option<&'static str> {
    if std::fs::read_to_string("/proc/self/status").is_ok_and(|text| !text.contains("\nUid:\t0\t")) {
        return Some("not root");
    }
    if !Path::new("/sys/fs/cgroup").exists() { Some("no cgroups are mounted") } else { None }
}

/// The runtime that the containers are run by: `CORACLE_TEST_RUNTIME`, or the built-in one.
pub fn runtime() -> String {
    std::env::var("CORACLE_TEST_RUNTIME").unwrap_or_default()
}

/// Topics and encoded events, in the order of their coming.
pub type Events = Vec<(String, Vec<u8>)>;

/// A host of the test's own: mount and network namespaces, a directory, a cgroup. All is checked and removed at its end.
pub struct Host {
    pub dir: PathBuf,
    pub cgroup: String,
    pub events: Arc<Mutex<Events>>,
    pub keeper: Option<PathBuf>,
    pub keeper_process: Option<std::process::Child>,
}

impl Host {
    pub fn new(name: &str) -> Self {
        namespace::unshare(&[Kind::Mount]).expect("mount namespace");
        namespace::unshare(&[Kind::Net]).expect("network namespace");
        let status = Command::new("mount").args(["--make-rprivate", "/"]).status().expect("mount");
        assert!(status.success());
        let dir = std::env::temp_dir().join(format!("coracle-shim-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("s")).expect("directory");
        namespace::pin(0, Kind::Net, &dir.join("netns")).expect("pinned");
        let events = Arc::new(Mutex::new(Events::new()));
        let listener = UnixListener::bind(dir.join("events.sock")).expect("socket");
        let sink = Arc::clone(&events);
        std::thread::spawn(move || take_events(&listener, &sink));
        Self { dir, cgroup: format!("/coracle-test-{name}-{}", std::process::id()), events, keeper: None, keeper_process: None }
    }

    pub fn topics(&self) -> Vec<String> {
        self.events.lock().expect("events").iter().map(|(topic, _)| topic.clone()).collect()
    }

    /// Runs `start` in a new sandbox bundle; answers the shim's socket.
    pub fn start(&self, id: &str) -> Shim {
        let bundle = self.dir.join("sandboxes").join(id);
        std::fs::create_dir_all(&bundle).expect("bundle");
        let params = BootstrapParams {
            instance_id: id.into(),
            namespace: NAMESPACE.into(),
            socket_dir: Some(self.dir.join("s").display().to_string()),
            ..Default::default()
        };
        let output = run(&mut self.command("start", id, &bundle), &params.encode_to_vec());
        let result = BootstrapResult::decode(output.as_slice()).expect("BootstrapResult");
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        let socket = PathBuf::from(result.address.strip_prefix("unix://").expect("a unix address"));
        Shim { socket, id: id.to_owned(), bundle }
    }

    /// Runs a keeper; it is ended with the host.
    pub fn start_keeper(&mut self) -> PathBuf {
        let state = self.dir.join("keeper");
        let child = Command::new(shim()).args(["keeper", "--state"]).arg(&state).spawn().expect("keeper");
        let socket = state.join("keeper.sock");
        until("the keeper listens", || UnixStream::connect(&socket).is_ok());
        self.keeper_process = Some(child);
        self.keeper = Some(socket.clone());
        socket
    }

    /// Kills the keeper, and runs another one in its place.
    pub fn replace_keeper(&mut self) {
        let mut keeper = self.keeper_process.take().expect("a keeper");
        keeper.kill().expect("killed");
        keeper.wait().expect("waited for");
        self.start_keeper();
    }

    /// Starts a shim by the keeper, anew if it was there before.
    pub fn start_by_keeper(&self, id: &str) -> Shim {
        let bundle = self.dir.join("sandboxes").join(id);
        std::fs::create_dir_all(&bundle).expect("bundle");
        let params = BootstrapParams {
            instance_id: id.into(),
            namespace: NAMESPACE.into(),
            socket_dir: Some(self.dir.join("s").display().to_string()),
            ..Default::default()
        };
        let request = StartShimRequest {
            namespace: NAMESPACE.into(),
            id: id.into(),
            bundle: bundle.display().to_string(),
            address: self.dir.join("containerd.sock").display().to_string(),
            env: vec![format!("TTRPC_ADDRESS={}", self.dir.join("events.sock").display())],
            stdin: params.encode_to_vec(),
            ..Default::default()
        };
        let keeper = self.keeper.as_deref().expect("a keeper");
        let timeout = Duration::from_secs(60);
        let (payload, _) = shim::keeping::call(keeper, "StartShim", &request, timeout).expect("started");
        let response = StartShimResponse::decode(payload.as_slice()).expect("a message");
        assert_eq!(response.status, 0, "{}", String::from_utf8_lossy(&response.output));
        let result = BootstrapResult::decode(response.output.as_slice()).expect("BootstrapResult");
        let socket = PathBuf::from(result.address.strip_prefix("unix://").expect("a unix address"));
        Shim { socket, id: id.to_owned(), bundle }
    }

    pub fn command(&self, action: &str, id: &str, bundle: &Path) -> Command {
        let mut command = Command::new(shim());
        command.args(["-namespace", NAMESPACE, "-address"]).arg(self.dir.join("containerd.sock"));
        command.args(["-publish-binary", "/bin/false", "-id", id]);
        if action == "delete" {
            command.arg("-bundle").arg(bundle);
        }
        command.arg(action).current_dir(bundle).env("TTRPC_ADDRESS", self.dir.join("events.sock"));
        command.env("MAX_SHIM_VERSION", "2");
        if let Some(keeper) = &self.keeper {
            command.env("CORACLE_KEEPER", keeper);
        }
        command
    }

    /// Makes a bundle whose container runs `sh -c SCRIPT` on the host's programs.
    pub fn bundle(&self, id: &str, script: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
        let bundle = self.dir.join("tasks").join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).expect("bundle");
        let image = self.dir.join("image");
        for part in ["usr", "proc", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(image.join(part)).expect("image");
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            let _ = std::os::unix::fs::symlink(format!("usr/{link}"), image.join(link));
        }
        let mut config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": { "uid": 0, "gid": 0 },
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/usr/bin:/usr/sbin"],
                "cwd": "/",
                "noNewPrivileges": true
            },
            "root": { "path": "rootfs", "readonly": false },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
                { "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"] }
            ],
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.cgroup),
                "namespaces": [{ "type": "pid" }, { "type": "mount" }],
                "resources": { "devices": [{ "allow": true, "access": "rwm" }] }
            }
        });
        change(&mut config);
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("config.json");
        bundle
    }

    /// What is left of the test: processes, mounts, cgroups, sockets.
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let dir = self.dir.display().to_string();
        let lines = testkit::host::processes().expect("processes").into_iter().map(|(_, line)| line);
        left.extend(lines.filter(|line| line.contains(&dir) && line.contains(SHIM) && !line.contains(" keeper ")));
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        let netns = format!("{dir}/netns");
        left.extend(mounts.lines().filter(|line| line.contains(&dir) && !line.contains(&netns)).map(str::to_owned));
        left.extend(self.cgroup_dirs().into_iter().flat_map(|dir| children(&dir)));
        left.extend(children(&self.dir.join("s")));
        left
    }

    fn cgroup_dirs(&self) -> Vec<PathBuf> {
        let name = self.cgroup.trim_start_matches('/');
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()));
        roots.into_iter().map(|root| root.join(name)).filter(|dir| dir.is_dir()).collect()
    }
}

fn children(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name() != "cgroup.procs")
        .filter(|entry| !dir.starts_with("/sys") || entry.path().is_dir())
        .map(|entry| entry.path().display().to_string())
        .collect()
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper_process.take() {
            let _ = linux::child::send_signal(keeper.id(), 15);
            let _ = keeper.wait();
        }
        for pid in pids_with(&[&self.dir.display().to_string(), SHIM]) {
            let _ = linux::child::send_signal(pid, 9);
        }
        for dir in self.cgroup_dirs() {
            for child in children(&dir) {
                let procs = std::fs::read_to_string(Path::new(&child).join("cgroup.procs")).unwrap_or_default();
                for pid in procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0) {
                    let _ = linux::child::send_signal(pid, 9);
                }
                let deadline = Instant::now() + Duration::from_secs(2);
                while Path::new(&child).exists() && std::fs::remove_dir(&child).is_err() && Instant::now() < deadline {
                    std::thread::yield_now();
                }
            }
            let _ = std::fs::remove_dir(&dir);
        }
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let own = self.dir.display().to_string();
        for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| point.starts_with(&own)) {
            let _ = linux::mount::unmount_all(Path::new(point), true);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn run(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the shim");
    child.stdin.take().expect("piped").write_all(stdin).expect("written");
    let output = child.wait_with_output().expect("ended");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn take_events(listener: &UnixListener, events: &Mutex<Events>) {
    while let Ok((mut stream, _)) = listener.accept() {
        while let Some((header, data)) = read_frame(&mut stream) {
            let request = Request::decode(data.as_slice()).expect("a request");
            let envelope = ForwardRequest::decode(request.payload.as_slice()).expect("an event").envelope.expect("one");
            let event = envelope.event.expect("an event");
            events.lock().expect("events").push((envelope.topic, event.value));
            let mut out = Vec::new();
            ttrpc::encode_frame(&mut out, FrameType::Response, header.stream, &Response::of(Ok(Vec::new()))).expect("short");
            if stream.write_all(&out).is_err() {
                break;
            }
        }
    }
}

fn read_frame(stream: &mut UnixStream) -> Option<(ttrpc::Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    stream.read_exact(&mut head).ok()?;
    let header = ttrpc::Header::decode(&head).ok()?;
    let mut data = vec![0; header.length];
    stream.read_exact(&mut data).ok()?;
    Some((header, data))
}

/// A call that was sent and is to be answered.
pub struct Pending(UnixStream);

impl Pending {
    pub fn answer<T: Message + Default>(mut self) -> Result<T, RpcError> {
        self.0.set_read_timeout(Some(Duration::from_secs(120))).expect("timeout");
        let (_, data) = read_frame(&mut self.0).ok_or_else(|| RpcError::new(14, "connection closed"))?;
        let payload = Response::decode(data.as_slice()).expect("a response").into_result()?;
        Ok(T::decode(payload.as_slice()).expect("a message"))
    }
}

/// A shim that was started.
pub struct Shim {
    pub socket: PathBuf,
    pub id: String,
    pub bundle: PathBuf,
}

impl Shim {
    pub fn send(&self, service: &str, method: &str, message: &impl Message) -> Pending {
        let mut stream = UnixStream::connect(&self.socket).expect("the shim listens");
        let mut out = Vec::new();
        let request = Request::unary(service, method, message).with_namespace(NAMESPACE);
        ttrpc::encode_frame(&mut out, FrameType::Request, 1, &request).expect("short");
        stream.write_all(&out).expect("sent");
        Pending(stream)
    }

    pub fn task<T: Message + Default>(&self, method: &str, message: &impl Message) -> Result<T, RpcError> {
        self.send(task::SERVICE, method, message).answer()
    }

    pub fn sandbox<T: Message + Default>(&self, method: &str, message: &impl Message) -> Result<T, RpcError> {
        self.send(sandbox::SERVICE, method, message).answer()
    }

    pub fn create_sandbox(&self, host: &Host, config: &PodSandboxConfig) -> Result<(), RpcError> {
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.display().to_string(),
            netns_path: host.dir.join("netns").display().to_string(),
            options: Some(prost_types::Any { type_url: pod::TYPE_URL.into(), value: config.encode_to_vec() }),
            ..Default::default()
        };
        self.sandbox::<sandbox::CreateSandboxResponse>("CreateSandbox", &request).map(drop)
    }

    /// Creates a container that logs to LOG.
    pub fn create(&self, host: &Host, id: &str, bundle: &Path, change: impl FnOnce(&mut task::CreateTaskRequest)) -> Result<u32, RpcError> {
        let options = runc::Options { binary_name: runtime(), root: host.dir.join("oci").display().to_string(), ..Default::default() };
        let mut request = task::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![protocols::shim::types::Mount {
                r#type: "bind".into(),
                source: host.dir.join("image").display().to_string(),
                options: vec!["rbind".into(), "rw".into()],
                ..Default::default()
            }],
            options: Some(prost_types::Any { type_url: RUNC_TYPE_URL.into(), value: options.encode_to_vec() }),
            ..Default::default()
        };
        change(&mut request);
        self.task::<task::CreateTaskResponse>("Create", &request).map(|response| response.pid)
    }

    pub fn start(&self, id: &str, exec_id: &str) -> Result<u32, RpcError> {
        let request = task::StartRequest { id: id.into(), exec_id: exec_id.into() };
        self.task::<task::StartResponse>("Start", &request).map(|response| response.pid)
    }

    pub fn state(&self, id: &str, exec_id: &str) -> Result<task::StateResponse, RpcError> {
        self.task("State", &task::StateRequest { id: id.into(), exec_id: exec_id.into() })
    }

    pub fn wait(&self, id: &str, exec_id: &str) -> Pending {
        self.send(task::SERVICE, "Wait", &task::WaitRequest { id: id.into(), exec_id: exec_id.into() })
    }

    pub fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), RpcError> {
        self.task("Kill", &task::KillRequest { id: id.into(), exec_id: exec_id.into(), signal, all: false })
    }

    pub fn delete(&self, id: &str, exec_id: &str) -> Result<task::DeleteResponse, RpcError> {
        self.task("Delete", &task::DeleteRequest { id: id.into(), exec_id: exec_id.into() })
    }

    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        spec: &serde_json::Value,
        change: impl FnOnce(&mut task::ExecProcessRequest),
    ) -> Result<(), RpcError> {
        let mut request = task::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(prost_types::Any { type_url: protocols::shim::OCI_PROCESS_TYPE_URL.into(), value: spec.to_string().into_bytes() }),
            ..Default::default()
        };
        change(&mut request);
        self.task("Exec", &request)
    }

    /// The pid of the daemon.
    pub fn pid(&self) -> u32 {
        let request = task::ConnectRequest { id: "none".into() };
        self.task::<task::ConnectResponse>("Connect", &request).expect("connected").shim_pid
    }
}

/// An exec's OCI process.
pub fn process(script: &str) -> serde_json::Value {
    serde_json::json!({
        "user": { "uid": 0, "gid": 0 },
        "args": ["/bin/sh", "-c", script],
        "env": ["PATH=/usr/bin:/usr/sbin"],
        "cwd": "/"
    })
}

/// Reads a FIFO to its end, in the background.
pub fn read_fifo(path: &Path) -> std::thread::JoinHandle<String> {
    linux::pipes::make_fifo(path, 0o600).expect("fifo");
    let path = path.to_owned();
    std::thread::spawn(move || std::fs::read_to_string(path).unwrap_or_default())
}

/// The content of a log's entries of one stream.
pub fn entries(log: &Path, stream: &str) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(_, rest)| rest.strip_prefix(&format!("{stream} ")))
        .filter_map(|rest| rest.split_once(' '))
        .map(|(_, content)| content.to_owned())
        .collect()
}
