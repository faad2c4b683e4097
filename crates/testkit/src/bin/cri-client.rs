//! The CRI client of `cargo xtask bench`: makes pods of one container, one after another, and prints how long each call took.
//!
//! `cri-client SOCKET IMAGE LOGS CGROUP-PARENT pod|node prepare | pull | lives COUNT | up COUNT | down`, one JSON object a line on stdout. It is a
//! program of its own so that what it costs is counted on neither side, and no client's start is in a call's time.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use hyper_util::rt::TokioIo;
use protocols::cri::v1;
use protocols::cri::v1::image_service_client::ImageServiceClient;
use protocols::cri::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::json;
use tonic::transport::{Channel, Endpoint, Uri};

/// How long `true` may take in a container, in seconds.
const EXEC_TIMEOUT: i64 = 30;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(&words)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cri-client: {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> Result<()> {
    let [socket, image, logs, cgroup_parent, network, command @ ..] = words else {
        return Err("SOCKET, IMAGE, LOGS, CGROUP-PARENT and pod or node are wanted".into());
    };
    let channel = connect(socket).await?;
    let mut client = Client {
        runtime: RuntimeServiceClient::new(channel.clone()),
        images: ImageServiceClient::new(channel),
        image: v1::ImageSpec { image: (*image).to_owned(), ..Default::default() },
        logs: (*logs).to_owned(),
        cgroup_parent: (*cgroup_parent).to_owned(),
        network: if *network == "node" { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod },
    };
    match command {
        ["prepare"] => client.prepare().await,
        ["pull"] => client.pull().await,
        ["lives", count] => client.lives(count.parse()?).await,
        ["up", count] => client.up(count.parse()?).await,
        ["down"] => client.down().await,
        _ => Err("prepare, pull, lives COUNT, up COUNT or down is wanted".into()),
    }
}

async fn connect(socket: &str) -> Result<Channel> {
    let path = socket.to_owned();
    // The authority is never resolved: the connector goes to the socket.
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Ok(Endpoint::try_from("http://localhost")?.connect_with_connector(connector).await?)
}

struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    image: v1::ImageSpec,
    logs: String,
    cgroup_parent: String,
    network: v1::NamespaceMode,
}

impl Client {
    /// Says who answers, and pulls the image.
    async fn prepare(&mut self) -> Result<()> {
        let version = self.runtime.version(v1::VersionRequest::default()).await?.into_inner();
        self.pull_image().await?;
        println!("{}", json!({ "name": version.runtime_name, "version": version.runtime_version }));
        Ok(())
    }

    /// Pulls the image, and says how many milliseconds that took.
    async fn pull(&mut self) -> Result<()> {
        let mut clock = Clock(Instant::now());
        self.pull_image().await?;
        println!("{}", json!({ "pull": clock.lap() }));
        Ok(())
    }

    async fn pull_image(&mut self) -> Result<()> {
        let request = v1::PullImageRequest { image: Some(self.image.clone()), ..Default::default() };
        self.images.pull_image(request).await?;
        Ok(())
    }

    /// Whole lives: a line of milliseconds per pod.
    async fn lives(&mut self, count: u32) -> Result<()> {
        for number in 0..count {
            let mut clock = Clock(Instant::now());
            let (pod, container, times) = self.start(number, &mut clock).await?;
            let exec = v1::ExecSyncRequest { container_id: container, cmd: vec!["/bin/true".to_owned()], timeout: EXEC_TIMEOUT };
            let exit_code = self.runtime.exec_sync(exec).await?.into_inner().exit_code;
            let exec = clock.lap();
            if exit_code != 0 {
                return Err(format!("/bin/true ended with {exit_code}").into());
            }
            self.runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
            let stop = clock.lap();
            self.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
            let remove = clock.lap();
            let [run, create, start] = times;
            println!("{}", json!({ "run": run, "create": create, "start": start, "exec": exec, "stop": stop, "remove": remove }));
        }
        Ok(())
    }

    /// Starts pods and leaves them.
    async fn up(&mut self, count: u32) -> Result<()> {
        for number in 0..count {
            self.start(number, &mut Clock(Instant::now())).await?;
        }
        Ok(())
    }

    /// Stops and removes every pod there is.
    async fn down(&mut self) -> Result<()> {
        let pods = self.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await?.into_inner().items;
        for pod in pods {
            self.runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() }).await?;
            self.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: pod.id }).await?;
        }
        Ok(())
    }

    /// The ids of a new pod and its running container, and the milliseconds of the three calls.
    async fn start(&mut self, number: u32, clock: &mut Clock) -> Result<(String, String, [f64; 3])> {
        let config = self.pod(number);
        std::fs::create_dir_all(&config.log_directory)?;
        clock.lap();
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let pod = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        let run = clock.lap();
        let request =
            v1::CreateContainerRequest { pod_sandbox_id: pod.clone(), config: Some(self.container()), sandbox_config: Some(config) };
        let container = self.runtime.create_container(request).await?.into_inner().container_id;
        let create = clock.lap();
        self.runtime.start_container(v1::StartContainerRequest { container_id: container.clone() }).await?;
        Ok((pod, container, [run, create, clock.lap()]))
    }

    fn namespaces(&self) -> v1::NamespaceOption {
        v1::NamespaceOption { network: self.network.into(), pid: v1::NamespaceMode::Container.into(), ..Default::default() }
    }

    fn pod(&self, number: u32) -> v1::PodSandboxConfig {
        let uid = format!("{}-{number}", std::process::id());
        let security = v1::LinuxSandboxSecurityContext { namespace_options: Some(self.namespaces()), ..Default::default() };
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: format!("pod-{uid}"),
                uid: uid.clone(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: if self.network == v1::NamespaceMode::Pod { format!("pod-{uid}") } else { String::new() },
            log_directory: format!("{}/{uid}", self.logs),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn container(&self) -> v1::ContainerConfig {
        let security = v1::LinuxContainerSecurityContext { namespace_options: Some(self.namespaces()), ..Default::default() };
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "sleep".to_owned(), attempt: 0 }),
            image: Some(self.image.clone()),
            command: vec!["/bin/sleep".to_owned(), "1000000".to_owned()],
            log_path: "sleep.log".to_owned(),
            linux: Some(v1::LinuxContainerConfig { security_context: Some(security), ..Default::default() }),
            ..Default::default()
        }
    }
}

/// Time since it was last asked.
struct Clock(Instant);

impl Clock {
    /// Milliseconds.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now.duration_since(self.0).as_secs_f64() * 1000.0;
        self.0 = now;
        lap
    }
}
