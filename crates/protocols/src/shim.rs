//! Seam 5: shim v2 as containerd v2.4.2 speaks it (containerd/api v1.12.0, containerd/cgroups v3.1.3), and our
//! one extension of it, `coracle.io.v1`.
//!
//! Services are names and methods in [`ttrpc`](crate::ttrpc) requests; no stub code is generated.

#[allow(missing_docs, clippy::all)]
mod packages {
    include!(concat!(env!("OUT_DIR"), "/shim_packages.rs"));
}

pub(crate) use packages::ttrpc as ttrpc_messages;

/// Task v2 and v3: the messages are the same, only the service's name differs.
pub mod task {
    /// Task v3 (containerd 2.0 and later).
    pub mod v3 {
        pub use super::super::packages::containerd::task::v3::*;
        /// The service's name on the wire.
        pub const SERVICE: &str = "containerd.task.v3.Task";
    }
    /// Task v2 (containerd 1.3 and later).
    pub mod v2 {
        pub use super::super::packages::containerd::task::v3::*;
        /// The service's name on the wire.
        pub const SERVICE: &str = "containerd.task.v2.Task";
    }
    pub use super::packages::containerd::v1::types::{Process, ProcessInfo, Status};
}

/// Sandbox v1.
pub mod sandbox {
    /// Sandbox v1 (containerd 1.7 and later).
    pub mod v1 {
        pub use super::super::packages::containerd::runtime::sandbox::v1::*;
        /// The service's name on the wire.
        pub const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
        /// `SandboxStatusResponse.state` of a sandbox that runs.
        pub const STATE_READY: &str = "SANDBOX_READY";
        /// `SandboxStatusResponse.state` of a sandbox that was stopped or has never been started.
        pub const STATE_NOTREADY: &str = "SANDBOX_NOTREADY";
    }
}

/// Events that a shim forwards to its daemon's ttrpc socket.
pub mod events {
    pub use super::packages::containerd::events::*;
    pub use super::packages::containerd::services::events::ttrpc::v1::ForwardRequest;
    /// The service's name on the wire; its one method is `Forward`.
    pub const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
}

/// Types shared by the services: mounts, platform, envelope, runtime info.
pub mod types {
    pub use super::packages::containerd::types::*;
}

/// What `start` reads and writes from containerd 2.3 on.
pub mod bootstrap {
    /// BootstrapParams and BootstrapResult.
    pub mod v1 {
        pub use super::super::packages::containerd::runtime::bootstrap::v1::*;
    }
}

/// Runtime options of containerd's tables.
pub mod options {
    pub use super::packages::containerd::runc::v1 as runc;
    pub use super::packages::runtimeoptions::v1 as generic;
    /// Type URL of [`runc::Options`], without a host part.
    pub const RUNC_TYPE_URL: &str = "containerd.runc.v1.Options";
    /// Type URL of [`generic::Options`].
    pub const GENERIC_TYPE_URL: &str = "runtimeoptions.v1.Options";
}

/// What Task.Stats answers.
pub mod cgroups {
    /// Metrics of cgroup v1 and hybrid hosts.
    pub mod v1 {
        pub use super::super::packages::io::containerd::cgroups::v1::*;
        /// Type URL, without a host part.
        pub const TYPE_URL: &str = "io.containerd.cgroups.v1.Metrics";
    }
    /// Metrics of cgroup v2 hosts.
    pub mod v2 {
        pub use super::super::packages::io::containerd::cgroups::v2::*;
        /// Type URL, without a host part.
        pub const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";
    }
}

/// The few fields of CRI's `runtime.v1.PodSandboxConfig` that a shim reads, with CRI's field numbers: the shim links
/// no gRPC. cri-server sends the whole message.
pub mod pod {
    pub use super::packages::coracle::pod::*;
    /// Type URL of `CreateSandboxRequest.options`.
    pub const TYPE_URL: &str = "runtime.v1.PodSandboxConfig";
}

/// `coracle.io.v1`: our extension on a shim's socket, and the keeper's service.
pub mod coracle {
    pub use super::packages::coracle::io::v1::*;
    /// The extension on the shim's socket.
    pub const SHIM_SERVICE: &str = "coracle.io.v1.Shim";
    /// The service on the keeper's socket.
    pub const KEEPER_SERVICE: &str = "coracle.io.v1.Keeper";
}

/// Type URL of an OCI process in `ExecProcessRequest.spec`; the value is JSON.
pub const OCI_PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// Type URL of OCI resources in `UpdateTaskRequest.resources`; the value is JSON.
pub const OCI_RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// Type URL of OCI features in `RuntimeInfo.features`; the value is JSON.
pub const OCI_FEATURES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Seconds since 1970 of Go's zero time (year 1), which stands for "not yet" in `exited_at`.
pub const GO_ZERO_TIME_SECONDS: i64 = -62_135_596_800;
