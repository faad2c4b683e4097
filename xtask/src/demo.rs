//! `cargo xtask demo`: the road seen with one's own eyes. Builds the release executables, brings up a cluster in network and mount
//! namespaces of its own with a registry beside it, applies `examples/hello.yaml`, asks a pod over HTTP, and draws its waterfall.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testkit::host::Lists;
use testkit::image::{Image, ImageSpec};
use testkit::registry::Registry;
use testkit::tar::Entry;

use crate::{build, setup, sh};

/// How long the cluster may take to be up, and the Deployment to be available.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Where the registry listens, inside the demo's own network namespace; `examples/hello.yaml` names it.
const REGISTRY: &str = "127.0.0.1:5000";
/// The port of the web server in the image.
const WEB_PORT: u16 = 8080;

/// The flags of `cargo xtask demo`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Tear everything down when it has worked, instead of staying until Ctrl-C.
    #[arg(long)]
    once: bool,
    /// The folder of the executables: set by the command itself when it enters its namespaces.
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

/// Runs the demo. Succeeds only if every step was seen to work and nothing is left behind.
pub fn run(args: Args) -> Result<()> {
    if let Some(executables) = &args.inside {
        return inside(executables, args.once);
    }
    let host = setup::prepare(setup::Need::Demo)?;
    for missing in &host.missing {
        eprintln!("missing: {missing}");
    }
    let executables = build::all(build::Profile::Release)?;
    let before = Lists::take(&testkit::host::ALL).context("failed to list what is on the machine")?;

    // The network and the mounts of the demo are its own: nothing of the machine is changed, and nothing of it can be left.
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--propagation", "private", "--"]);
    command.arg(std::env::current_exe().context("failed to find this executable")?);
    command.args(["demo", "--inside"]).arg(&executables.directory);
    if args.once {
        command.arg("--once");
    }
    // Blocked here and so in what this starts: only the innermost command waits for it, and tears down in order.
    linux::signal::block(&interrupt()).context("failed to block SIGINT")?;
    let status = command.status().context("failed to run unshare")?;

    // Some things end a little later than who made them: a network namespace's links.
    let left = before.expect_nothing_left(&[], Duration::from_secs(10));
    if let Err(left) = &left {
        eprintln!("left behind:\n{left}");
    }
    if !status.success() || left.is_err() {
        bail!("the demo failed");
    }
    Ok(())
}

/// What runs in the demo's own namespaces.
fn inside(executables: &Path, once: bool) -> Result<()> {
    loopback_up()?;
    let folder = std::env::temp_dir().join(format!("coracle-demo-{}", std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let mut demo = Demo { executables: executables.to_owned(), folder, up: None };
    let result = demo.play(once);
    let torn_down = demo.tear_down();
    result.and(torn_down)
}

/// SIGINT and SIGTERM.
fn interrupt() -> Vec<i32> {
    ["INT", "TERM"].into_iter().filter_map(linux::signal::parse).collect()
}

fn loopback_up() -> Result<()> {
    const LOOPBACK: u32 = 1;
    let mut route = linux::rtnl::Route::open().context("failed to open netlink")?;
    route.set_up(LOOPBACK).context("failed to bring up the loopback interface")
}

struct Demo {
    executables: PathBuf,
    folder: PathBuf,
    up: Option<Child>,
}

impl Demo {
    fn play(&mut self, once: bool) -> Result<()> {
        step("a web image of our own, served from a registry on loopback");
        let registry = Registry::start_on(REGISTRY.parse()?).context("failed to start the registry")?;
        registry.add("hello", "v1", &hello_image(&self.executables.join("hello-web"))?);

        step("coracle up");
        self.start()?;

        step("kubectl apply -f examples/hello.yaml");
        let manifest = sh::root().join("examples/hello.yaml");
        match sh::find("kubectl") {
            Some(kubectl) => {
                self.run(Command::new(&kubectl).arg("apply").arg("-f").arg(&manifest))?;
                self.run(Command::new(&kubectl).args(["rollout", "status", "deployment/hello", "--timeout=120s"]))?;
                self.run(Command::new(&kubectl).args(["get", "deployments,pods", "-o", "wide"]))?;
            }
            None => self.run(self.coracle("apply").arg("--filename").arg(&manifest))?,
        }

        let (name, address) = self.a_pod()?;
        step(&format!("GET http://{address}:{WEB_PORT}/ from pod {name}"));
        let answer = ask(&address)?;
        println!("{answer}");
        if !answer.contains(&name) {
            bail!("pod {name} answered {answer:?}");
        }

        step(&format!("coracle trace pod {name}"));
        self.run(self.coracle("trace").args(["pod", &name]))?;
        if once {
            return Ok(());
        }
        self.wait()
    }

    fn start(&mut self) -> Result<()> {
        let mut command = self.coracle("up");
        for (flag, name) in [("--state-dir", "run"), ("--pod-log-dir", "logs"), ("--cni-conf-dir", "cni"), ("--cni-bin-dir", "cni")] {
            command.arg(flag).arg(self.folder.join(name));
        }
        command.arg("--cgroup-root").arg(format!("/coracle-demo-{}", std::process::id()));
        // In a process group of its own, so that Ctrl-C reaches it only from here, in order.
        let mut up = command.stderr(Stdio::piped()).process_group(0).spawn().context("failed to run coracle up")?;
        let stderr = up.stderr.take().context("coracle up has no stderr")?;
        self.up = Some(up);
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(std::io::Result::ok) {
                eprintln!("{line}");
                if line.starts_with("Coracle is up") {
                    let _ = tell.try_send(());
                }
            }
        });
        told.recv_timeout(TIMEOUT).map_err(|_| anyhow::anyhow!("coracle up did not come up within {} s", TIMEOUT.as_secs()))
    }

    /// The name and address of a pod of the example.
    fn a_pod(&self) -> Result<(String, String)> {
        let json = sh::output(self.coracle("get").arg("/api/v1/namespaces/default/pods?labelSelector=app%3Dhello"))?;
        let pods: serde_json::Value = serde_json::from_str(&json).context("the pods are no JSON")?;
        let running: Vec<&serde_json::Value> =
            pods["items"].as_array().into_iter().flatten().filter(|pod| pod["status"]["phase"] == "Running").collect();
        if running.len() != 3 {
            bail!("{} pods are running, 3 are wanted", running.len());
        }
        let text = |pointer: &str| running[0].pointer(pointer).and_then(serde_json::Value::as_str).map(str::to_owned);
        Ok((text("/metadata/name").context("a pod has no name")?, text("/status/podIP").context("a pod has no address")?))
    }

    fn wait(&mut self) -> Result<()> {
        let pid = std::process::id();
        println!();
        println!("The cluster runs in namespaces of its own. In another terminal, as root:");
        println!(
            "  nsenter --net=/proc/{pid}/ns/net --mount=/proc/{pid}/ns/mnt kubectl --kubeconfig {} get pods",
            self.kubeconfig().display()
        );
        println!("Ctrl-C tears everything down.");
        linux::signal::wait_for(&interrupt()).context("failed to wait for SIGINT")?;
        Ok(())
    }

    fn tear_down(&mut self) -> Result<()> {
        step("coracle down");
        let mut down = Ok(());
        if self.up.is_some() {
            down = self.run(&mut self.coracle("down"));
        }
        if let Some(mut up) = self.up.take() {
            // `down` has asked it to stop; what did not stop by then is ended, for the demo leaves nothing behind.
            if down.is_err() {
                let _ = up.kill();
            }
            up.wait().context("failed to wait for coracle up")?;
        }
        let removed = fs::remove_dir_all(&self.folder).with_context(|| format!("failed to remove {}", self.folder.display()));
        down.and(removed)
    }

    fn coracle(&self, command: &str) -> Command {
        let mut coracle = Command::new(self.executables.join("coracle"));
        coracle.arg(command).arg("--data-dir").arg(self.folder.join("data"));
        coracle
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.join("data/kubeconfig")
    }

    fn run(&self, command: &mut Command) -> Result<()> {
        let status = command.env("KUBECONFIG", self.kubeconfig()).env("HOME", &self.folder).status();
        let status = status.with_context(|| format!("failed to run {:?}", command.get_program()))?;
        if !status.success() {
            bail!("{:?} ended with {status}", command.get_program());
        }
        Ok(())
    }
}

fn step(what: &str) {
    println!("\n==> {what}");
    let _ = std::io::stdout().flush();
}

/// An image whose only file is the static web server.
fn hello_image(server: &Path) -> Result<Image> {
    let executable = fs::read(server).with_context(|| format!("failed to read {}", server.display()))?;
    let image = ImageSpec::new().layer([Entry::executable("hello-web", executable)]);
    Ok(image.config("Entrypoint", serde_json::json!(["/hello-web"])).build())
}

fn ask(address: &str) -> Result<String> {
    let address: SocketAddr = format!("{address}:{WEB_PORT}").parse().with_context(|| format!("{address} is no address"))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&address, deadline - Instant::now()).context("failed to connect to the pod")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: hello\r\nConnection: close\r\n\r\n").context("failed to ask the pod")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("failed to read the pod's answer")?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.trim().to_owned()),
        _ => bail!("the pod answered {answer:?}"),
    }
}
