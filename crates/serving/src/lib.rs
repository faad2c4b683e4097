//! The server's side of HTTPS, as the API server and the kubelet have it (upstream: `k8s.io/apiserver/pkg/server/secure_serving.go`):
//! TLS that takes any client certificate and lets the request be refused ([`tls`]), and an end to connections whose client is slow to
//! ask ([`head`]).

#![forbid(unsafe_code)]

pub mod head;
pub mod tls;
