//! CRI by direct calls, as a client that keeps no order: crictl's own checks stand in nobody's way here.
//!
//! Needs what `crictl.rs` needs.

mod common;

use common::{Node, on_node, processes_with};
use hyper_util::rt::TokioIo;
use protocols::cri::v1::runtime_service_client::RuntimeServiceClient;
use protocols::cri::v1::{
    ContainerState, ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, PodSandboxState, PodSandboxStatusRequest,
    RemovePodSandboxRequest, StopPodSandboxRequest,
};
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};

type Client = RuntimeServiceClient<Channel>;

fn with_client<T>(node: &Node, calls: impl AsyncFnOnce(Client) -> T) -> T {
    let path = node.address();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        // The authority is never resolved: the connector goes to the socket.
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::try_from("http://localhost").expect("a URI");
        let channel = endpoint.connect_with_connector(connector).await.expect("connected");
        calls(RuntimeServiceClient::new(channel)).await
    })
}

async fn stop(client: &mut Client, id: &str) -> Result<(), tonic::Status> {
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map(drop)
}

async fn remove(client: &mut Client, id: &str) -> Result<(), tonic::Status> {
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map(drop)
}

/// A pod with two running containers, one that has ended and one that was never started.
fn busy_pod(node: &Node, name: &str) -> (String, Vec<String>) {
    let pod = node.pod(name);
    let container = |part: &str, command: &[&str]| node.container(&pod, &format!("{name}-{part}"), command, |_| {});
    let deaf = "trap '' TERM; while true; do sleep 1; done";
    let all = vec![
        container("sleeps", &["sleep", "1000"]),
        container("deaf", &["sh", "-c", deaf]),
        container("ended", &["true"]),
        container("made", &["sleep", "1000"]),
    ];
    for id in &all[..3] {
        node.ok(&["start", id]);
    }
    node.wait_for_state(&all[2], "CONTAINER_EXITED");
    (pod.0, all)
}

#[test]
fn a_stopped_pod_has_no_process_and_can_be_stopped_again() {
    on_node("a_stopped_pod_has_no_process_and_can_be_stopped_again", |node| {
        node.ok(&["pull", &node.image()]);
        let (pod, containers) = busy_pod(node, "a");
        // What a command leaves behind holds its output open, and is not waited for.
        assert_eq!(node.ok(&["exec", "--sync", &containers[0], "sh", "-c", "sleep 1000 & echo left"]), "left");
        let netns = node.dir.join("state/netns").join(&pod);
        assert!(netns.exists());
        with_client(node, async |mut client| {
            for _ in 0..3 {
                stop(&mut client, &pod).await.expect("stopped");
            }
            // By a prefix as well, as by containerd's truncated index.
            stop(&mut client, &pod[..12]).await.expect("stopped");
            stop(&mut client, "nobody").await.expect("what is not there is stopped");
            let mut states = Vec::new();
            for id in &containers {
                let request = ContainerStatusRequest { container_id: id.clone(), verbose: false };
                let status = client.container_status(request).await.expect("a status").into_inner().status.expect("set");
                states.push((status.state(), status.exit_code));
            }
            use ContainerState::{ContainerCreated, ContainerExited};
            assert_eq!(states, [(ContainerExited, 137), (ContainerExited, 137), (ContainerExited, 0), (ContainerCreated, 0)]);
            let request = PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
            let status = client.pod_sandbox_status(request).await.expect("a status").into_inner().status.expect("set");
            assert_eq!(status.state(), PodSandboxState::SandboxNotready);
            assert!(!netns.exists(), "the network namespace is gone");
            assert!(node.fails(&["start", &containers[3]]).contains("not ready"));
            remove(&mut client, &pod).await.expect("removed");
        });
    });
}

#[test]
fn a_pod_is_removed_with_its_running_containers() {
    on_node("a_pod_is_removed_with_its_running_containers", |node| {
        node.ok(&["pull", &node.image()]);
        let (pod, _) = busy_pod(node, "a");
        let (other, kept) = busy_pod(node, "b");
        with_client(node, async |mut client| {
            // Two at once: one does the work, the other waits for it.
            let mut second = client.clone();
            let (first, second) = tokio::join!(remove(&mut client, &pod), remove(&mut second, &pod));
            first.expect("removed");
            second.expect("removed");
            for id in [pod.as_str(), "nobody", "0123456789ab"] {
                remove(&mut client, id).await.expect("what is not there is removed");
            }
            let request = PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
            assert_eq!(client.pod_sandbox_status(request).await.expect_err("gone").code(), Code::NotFound);
            let pods = client.list_pod_sandbox(ListPodSandboxRequest::default()).await.expect("a list").into_inner().items;
            assert_eq!(pods.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>(), [other.as_str()]);
            let left = client.list_containers(ListContainersRequest::default()).await.expect("a list").into_inner().containers;
            let mut left: Vec<_> = left.into_iter().map(|container| container.id).collect();
            let mut kept = kept;
            left.sort();
            kept.sort();
            assert_eq!(left, kept, "those of the other pod");
            assert_eq!(processes_with(&pod), Vec::<String>::new());
            for place in ["netns", "sandboxes"] {
                assert!(!node.dir.join("state").join(place).join(&pod).exists(), "{place}");
            }
            remove(&mut client, &other).await.expect("removed");
        });
    });
}
