//! Seam 2: etcd v3, as go.etcd.io/etcd/api/v3 v3.7.3 declares it: KV, Watch, Lease, and the version of a member.

/// Keys and events.
#[allow(missing_docs, clippy::all)]
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// Requests, answers and the clients of the services.
#[allow(missing_docs, clippy::all)]
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}
