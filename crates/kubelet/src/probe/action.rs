//! One execution of a probe or hook action: exec, HTTP, TCP, gRPC
//! (upstream pkg/probe, pkg/kubelet/prober/prober.go, pkg/kubelet/lifecycle/handlers.go, v1.37).

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::env;
use crate::probe::http;
use crate::runtime::{self, Runtime};

/// Result of one execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Passed.
    Success,
    /// Passed with a warning (a redirect to another host).
    Warning(String),
    /// Failed, with the text of the event.
    Failure(String),
    /// Could not be carried out; counts for nothing.
    Error(String),
}

/// Bytes of an exec probe's or an HTTP answer's output that an event shows (upstream `maxReadLength`).
const OUTPUT_BYTES_MAX: usize = 10 << 10;

/// Carries out a probe once.
pub async fn probe(runtime: &Runtime, container_id: &str, container: &Container, probe: &Probe, pod_ip: &str) -> Verdict {
    let timeout = Duration::from_secs(u64::try_from(probe.timeout_seconds.unwrap_or(1)).unwrap_or(1).max(1));
    if let Some(exec) = &probe.exec {
        let command = expand_static(exec.command.as_deref().unwrap_or_default(), container);
        return exec_probe(runtime, container_id, &command, timeout).await;
    }
    if let Some(get) = &probe.http_get {
        return http_probe(get, container, pod_ip, timeout).await;
    }
    if let Some(tcp) = &probe.tcp_socket {
        return tcp_probe(tcp, container, pod_ip, timeout).await;
    }
    if let Some(grpc) = &probe.grpc {
        let service = grpc.service.as_deref().unwrap_or("");
        return http::grpc_health(pod_ip, grpc.port, service, timeout).await;
    }
    Verdict::Error(format!("missing probe handler for {}", container.name))
}

async fn exec_probe(runtime: &Runtime, container_id: &str, command: &[String], timeout: Duration) -> Verdict {
    match runtime.exec_sync(container_id, command, timeout).await {
        Ok(answer) => {
            let mut output = answer.stdout;
            output.extend_from_slice(&answer.stderr);
            output.truncate(OUTPUT_BYTES_MAX);
            if answer.exit_code == 0 { Verdict::Success } else { Verdict::Failure(String::from_utf8_lossy(&output).into_owned()) }
        }
        Err(error) if error.code() == Some(tonic::Code::DeadlineExceeded) => {
            Verdict::Failure(format!("command timed out: {:?} timed out after {}s", command.join(" "), timeout.as_secs()))
        }
        Err(error) => Verdict::Error(runtime::message(&error)),
    }
}

async fn http_probe(get: &HTTPGetAction, container: &Container, pod_ip: &str, timeout: Duration) -> Verdict {
    let request = match http::Request::from_action(get, container, pod_ip, "kube-probe/1.37") {
        Ok(request) => request,
        Err(error) => return Verdict::Error(error),
    };
    match http::get(&request, timeout).await {
        Ok(answer) if (200..400).contains(&answer.status) => match answer.redirected_away {
            Some(to) => Verdict::Warning(format!("Probe terminated redirects, Response body: {to}")),
            None => Verdict::Success,
        },
        Ok(answer) => Verdict::Failure(format!("HTTP probe failed with statuscode: {}", answer.status)),
        Err(error) => Verdict::Failure(error),
    }
}

async fn tcp_probe(tcp: &TCPSocketAction, container: &Container, pod_ip: &str, timeout: Duration) -> Verdict {
    let port = match resolve_port(&tcp.port, container) {
        Ok(port) => port,
        Err(error) => return Verdict::Error(error),
    };
    let host = tcp.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod_ip);
    let address = http::join_host_port(host, port);
    match tokio::time::timeout(timeout, tokio::net::TcpStream::connect(&address)).await {
        Ok(Ok(_)) => Verdict::Success,
        Ok(Err(error)) => Verdict::Failure(format!("dial tcp {address}: {}", http::io_text(&error))),
        Err(_) => Verdict::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

/// A port by number, or by name of one of the container's ports.
pub fn resolve_port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let ports = container.ports.iter().flatten();
            let named = ports.clone().find(|p| p.name.as_deref() == Some(name));
            match (named, name.parse()) {
                (Some(port), _) => port.container_port,
                (None, Ok(number)) => number,
                (None, Err(_)) => return Err(format!("couldn't find port: {name}")),
            }
        }
    };
    u16::try_from(number).ok().filter(|n| *n > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

/// Expands `$(VAR)` with the plain values of the container's own `env`, as probes and hooks may.
pub fn expand_static(command: &[String], container: &Container) -> Vec<String> {
    let variables: Vec<(String, String)> =
        container.env.iter().flatten().filter_map(|e| Some((e.name.clone(), e.value.clone()?))).collect();
    command.iter().map(|word| env::expand_with(word, &variables)).collect()
}
