//! Mutated ttrpc streams and messages, as a shim and a runtime read them from each other's sockets.
#![cfg(feature = "shim")]

use prost::Message;
use protocols::shim::coracle::AttachRequest;
use protocols::shim::sandbox::v1::CreateSandboxRequest;
use protocols::shim::task::v2;
use protocols::ttrpc::{FrameType, HEADER_BYTES, Request, Response, RpcError, encode_frame, split_frame};
use testkit::fuzz::Fuzz;

#[test]
fn frames_and_what_is_in_them() {
    let create = v2::CreateTaskRequest { id: "c".into(), bundle: "/b".into(), stdout: "cri-log:///l".into(), ..Default::default() };
    let request = Request::unary("containerd.task.v2.Task", "Create", &create).with_namespace("k8s.io").with_timeout_nanos(1_000_000);
    let sandbox = CreateSandboxRequest { sandbox_id: "s".into(), bundle_path: "/b".into(), ..Default::default() };
    let mut stream = Vec::new();
    encode_frame(&mut stream, FrameType::Request, 1, &request).expect("small");
    encode_frame(&mut stream, FrameType::Request, 3, &Request::unary("containerd.runtime.sandbox.v1.Sandbox", "CreateSandbox", &sandbox))
        .expect("small");
    let mut answers = Vec::new();
    encode_frame(&mut answers, FrameType::Response, 1, &Response::of(Ok(create.encode_to_vec()))).expect("small");
    encode_frame(&mut answers, FrameType::Response, 3, &Response::of(Err(RpcError::new(5, "no such container")))).expect("small");
    Fuzz::new("ttrpc").seed(stream).seed(answers).words(&["Create", "containerd.task.v3.Task", "Shim"]).run(|input| {
        let mut rest = input;
        while let Ok(Some((header, data))) = split_frame(rest) {
            assert_eq!(data.len(), header.length);
            if let Ok(request) = Request::decode(data) {
                let _ = request.metadata("containerd-namespace-ttrpc");
                let _ = v2::CreateTaskRequest::decode(&request.payload[..]);
                let _ = v2::ExecProcessRequest::decode(&request.payload[..]);
                let _ = CreateSandboxRequest::decode(&request.payload[..]);
                let _ = AttachRequest::decode(&request.payload[..]);
            }
            let _ = Response::decode(data).map(Response::into_result);
            rest = &rest[HEADER_BYTES + header.length..];
        }
    });
}
