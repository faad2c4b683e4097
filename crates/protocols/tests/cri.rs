//! Wire facts of CRI v1, checked on the generated code.
#![cfg(feature = "cri")]

use prost::Message;
use protocols::cri::v1::{DnsConfig, NamespaceMode, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, runtime_service_server};

#[test]
fn the_service_has_upstreams_name() {
    assert_eq!(runtime_service_server::SERVICE_NAME, "runtime.v1.RuntimeService");
}

#[test]
fn zero_values_are_not_on_the_wire() {
    assert_eq!(PodSandboxState::SandboxReady as i32, 0);
    assert_eq!(NamespaceMode::Pod as i32, 0);
    assert_eq!(PodSandboxMetadata::default().encode_to_vec(), Vec::<u8>::new());
}

#[test]
fn a_sandbox_config_has_upstreams_field_numbers() {
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata { name: "a".into(), uid: "b".into(), namespace: "c".into(), attempt: 1 }),
        hostname: "h".into(),
        dns_config: Some(DnsConfig { servers: vec!["1".into()], ..DnsConfig::default() }),
        ..PodSandboxConfig::default()
    };
    let bytes = config.encode_to_vec();
    assert_eq!(
        bytes,
        [&[0x0a, 11, 0x0a, 1, b'a', 0x12, 1, b'b', 0x1a, 1, b'c', 0x20, 1][..], &[0x12, 1, b'h', 0x22, 3, 0x0a, 1, b'1'][..],].concat()
    );
}
