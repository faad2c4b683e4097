//! The members of an etcd cluster: one connection to each, made when it is needed, and which of them is spoken to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use crate::Error;

/// How long connecting to a member may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an HTTP/2 connection is asked whether it lives, and how long it may be silent (kube-apiserver's etcd client has 30 s
/// and 10 s; a dead member is to be left sooner).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where an etcd is, and how to speak to it.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// `http://` or `https://` URLs of the members.
    pub endpoints: Vec<String>,
    /// PEM of the authority of the members' certificates; needed with `https`.
    pub ca: Option<String>,
    /// PEM of the client's certificate and its key.
    pub identity: Option<(String, String)>,
}

/// The members.
#[derive(Debug)]
pub(super) struct Members {
    channels: Vec<(String, Channel)>,
    /// The one that is spoken to.
    current: AtomicUsize,
}

/// A member that was chosen for a call.
#[derive(Debug, Clone)]
pub(super) struct Member {
    index: usize,
    /// Its URL.
    pub(super) url: String,
    /// The connection.
    pub(super) channel: Channel,
}

impl Members {
    /// Prepares the connections; none is made yet.
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let mut channels = Vec::new();
        for url in &config.endpoints {
            let wrong = |what: String| Error::Endpoint { endpoint: url.clone(), what };
            let secure = url.starts_with("https://");
            if !secure && !url.starts_with("http://") {
                return Err(wrong("it does not start with http:// or https://".to_owned()));
            }
            let endpoint = Endpoint::from_shared(url.clone()).map_err(|error| wrong(chain(&error)))?;
            let mut endpoint = endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true);
            if secure {
                let ca = config.ca.as_ref().ok_or_else(|| wrong("https needs the authority of its certificate".to_owned()))?;
                let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
                if let Some((certificate, key)) = &config.identity {
                    tls = tls.identity(Identity::from_pem(certificate, key));
                }
                endpoint = endpoint.tls_config(tls).map_err(|error| wrong(chain(&error)))?;
            }
            channels.push((url.clone(), endpoint.connect_lazy()));
        }
        if channels.is_empty() {
            return Err(Error::Endpoint { endpoint: String::new(), what: "none is given".to_owned() });
        }
        Ok(Self { channels, current: AtomicUsize::new(0) })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.channels.len()
    }

    /// The one to speak to.
    pub(super) fn current(&self) -> Member {
        let index = self.current.load(Ordering::Relaxed) % self.channels.len();
        let (url, channel) = self.channels[index].clone();
        Member { index, url, channel }
    }

    /// Speaks to another one from now on, unless somebody has changed already.
    pub(super) fn leave(&self, member: &Member) {
        let next = (member.index + 1) % self.channels.len();
        // Who comes second finds that the change has been made.
        let _ = self.current.compare_exchange(member.index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Whether another member may answer what this one did not.
pub(super) fn is_elsewhere(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
}

/// Whether the request surely has not reached the member, so that a write may be sent again.
pub(super) fn is_unsent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn members_take_turns_and_bad_ones_are_named() {
        let config = |urls: &[&str]| EtcdConfig { endpoints: urls.iter().map(|url| (*url).to_owned()).collect(), ..EtcdConfig::default() };
        let members = Members::new(&config(&["http://127.0.0.1:1", "http://127.0.0.1:2"])).expect("members");
        let first = members.current();
        members.leave(&first);
        members.leave(&first);
        assert_eq!(members.current().url, "http://127.0.0.1:2");
        for urls in [&["127.0.0.1:1"][..], &["https://127.0.0.1:1"], &["http://a b"], &[]] {
            assert!(matches!(Members::new(&config(urls)), Err(Error::Endpoint { .. })), "{urls:?}");
        }
    }
}
