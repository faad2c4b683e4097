//! Forwarded ports: connections to `localhost` in a pod's network namespace.
//!
//! As containerd 2.x does (`internal/cri/server/sandbox_portforward_linux.go`): IPv4 first, then IPv6.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use linux::namespace::{self, Kind};
use tokio::sync::{Semaphore, oneshot};

use crate::state::Sandbox;

/// How long a connection within a namespace may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Threads that connect at one time.
const DIALS_MAX: usize = 64;

static DIALS: Semaphore = Semaphore::const_new(DIALS_MAX);

/// Connects to a port of the pod. The error is for the user.
///
/// # Errors
/// The namespace is gone, or nobody listens.
pub async fn dial(sandbox: Arc<Sandbox>, port: u16) -> Result<tokio::net::TcpStream, String> {
    let failed = |why: String| format!("failed to connect to localhost:{port} inside pod sandbox {}: {why}", sandbox.id);
    let _place = DIALS.acquire().await.map_err(|error| failed(error.to_string()))?;
    let netns = match &sandbox.netns {
        Some(path) => Some(namespace::open(path.as_std_path(), Kind::Net).map_err(|error| failed(error.to_string()))?),
        None => None,
    };
    let (answer, answered) = oneshot::channel();
    // A thread of its own: whoever entered a namespace must not serve anything else afterwards.
    let thread = std::thread::Builder::new().name("port-forward".to_owned());
    let spawned = thread.spawn(move || {
        let _ = answer.send(connect(netns, port));
    });
    spawned.map_err(|error| failed(error.to_string()))?;
    let connected = answered.await.map_err(|error| failed(error.to_string()))?;
    connected.and_then(tokio::net::TcpStream::from_std).map_err(|error| failed(error.to_string()))
}

fn connect(netns: Option<OwnedFd>, port: u16) -> io::Result<TcpStream> {
    if let Some(netns) = netns {
        namespace::join(netns.as_fd(), Kind::Net).map_err(io::Error::other)?;
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&address, CONNECT).or_else(|first| {
        let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        // Of the two answers the first is the one that users know.
        TcpStream::connect_timeout(&address, CONNECT).map_err(|_| first)
    })?;
    // What is forwarded is often small and waited for.
    let _ = stream.set_nodelay(true);
    stream.set_nonblocking(true)?;
    Ok(stream)
}
