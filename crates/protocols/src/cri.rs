//! Seam 4: the Container Runtime Interface, as k8s.io/cri-api v0.37.2 declares it.

/// CRI v1: messages, [`runtime_service_client`](v1::runtime_service_client) and
/// [`image_service_client`](v1::image_service_client), and the servers of both (43 RPCs).
///
/// Zero values are not on the wire: an absent enum is its first word (`READY`, `POD`, `PRIVATE`, `RuntimeDefault`).
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");

    /// The largest message either side accepts, in bytes (kubelet's `maxMsgSize`).
    pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
}
