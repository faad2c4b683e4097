//! ttrpc frames and messages, without I/O: shared by the shim's epoll loop and cri-server's async client.
//!
//! Source: containerd/ttrpc v1.2.9, `PROTOCOL.md`, `request.proto`. Unary calls only; no service of seam 5 streams.

use prost::Message;

pub use crate::shim::ttrpc_messages::{KeyValue, Request, Response, Status};

/// Bytes of a frame's header: length and stream, each 4 bytes big endian, then type and flags.
pub const HEADER_BYTES: usize = 10;
/// The most data that a frame may carry, in bytes.
pub const DATA_BYTES_MAX: usize = 4 << 20;
/// Metadata key of containerd's namespace, on every request.
pub const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// gRPC status codes, as ttrpc has them in `Status.code`.
pub mod code {
    /// No error.
    pub const OK: i32 = 0;
    /// The call was given up by its caller.
    pub const CANCELLED: i32 = 1;
    /// Any error without a code of its own (runc's errors, for one).
    pub const UNKNOWN: i32 = 2;
    /// The request is wrong in itself.
    pub const INVALID_ARGUMENT: i32 = 3;
    /// The time was up.
    pub const DEADLINE_EXCEEDED: i32 = 4;
    /// No such container, exec or sandbox.
    pub const NOT_FOUND: i32 = 5;
    /// There is one of that id.
    pub const ALREADY_EXISTS: i32 = 6;
    /// The caller may not.
    pub const PERMISSION_DENIED: i32 = 7;
    /// A bound was reached.
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    /// Not in this state.
    pub const FAILED_PRECONDITION: i32 = 9;
    /// No such service or method.
    pub const UNIMPLEMENTED: i32 = 12;
    /// The other side broke an invariant.
    pub const INTERNAL: i32 = 13;
    /// Not now.
    pub const UNAVAILABLE: i32 = 14;
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// Begins a stream.
    Request = 1,
    /// Ends a stream.
    Response = 2,
    /// Data of a stream that is not unary.
    Data = 3,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of data behind the header.
    pub length: usize,
    /// Odd for streams that a client began.
    pub stream: u32,
    /// The type's byte: of [`FrameType`], or one that is to be passed over.
    pub kind: u8,
    /// Flags; 0 for unary calls.
    pub flags: u8,
}

/// A frame that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Longer than [`DATA_BYTES_MAX`].
    #[error("ttrpc frame of {length} bytes is longer than {DATA_BYTES_MAX}")]
    TooLong {
        /// The length in the header, in bytes.
        length: usize,
    },
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]: the connection cannot be used any more.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let [a, b, c, d, e, f, g, h, kind, flags] = *bytes;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > DATA_BYTES_MAX {
            return Err(FrameError::TooLong { length });
        }
        Ok(Self { length, stream: u32::from_be_bytes([e, f, g, h]), kind, flags })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [e, f, g, h] = self.stream.to_be_bytes();
        [a, b, c, d, e, f, g, h, self.kind, self.flags]
    }
}

/// Appends a frame with the message to `out`.
///
/// # Errors
/// [`FrameError::TooLong`], and `out` is as it was.
pub fn encode_frame(out: &mut Vec<u8>, kind: FrameType, stream: u32, message: &impl Message) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > DATA_BYTES_MAX {
        return Err(FrameError::TooLong { length });
    }
    out.reserve(HEADER_BYTES + length);
    out.extend_from_slice(&Header { length, stream, kind: kind as u8, flags: 0 }.encode());
    message.encode_raw(out);
    Ok(())
}

/// Takes the first whole frame off `input`.
///
/// Answers `None`, and leaves `input` alone, if the frame is not there in full. The data is a slice of `input`; the caller
/// drops `HEADER_BYTES + header.length` bytes from its front when done with it.
///
/// # Errors
/// [`FrameError::TooLong`]: the connection cannot be used any more.
pub fn split_frame(input: &[u8]) -> Result<Option<(Header, &[u8])>, FrameError> {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let header = Header::decode(head)?;
    Ok(rest.get(..header.length).map(|data| (header, data)))
}

impl Request {
    /// A unary request with the message as payload.
    #[must_use]
    pub fn unary(service: &str, method: &str, message: &impl Message) -> Self {
        Self { service: service.to_owned(), method: method.to_owned(), payload: message.encode_to_vec(), ..Self::default() }
    }

    /// With containerd's namespace in the metadata.
    #[must_use]
    pub fn with_namespace(mut self, namespace: &str) -> Self {
        self.metadata.push(KeyValue { key: NAMESPACE_KEY.to_owned(), value: namespace.to_owned() });
        self
    }

    /// With a deadline, in nanoseconds from now; 0 is none.
    #[must_use]
    pub fn with_timeout_nanos(mut self, nanos: i64) -> Self {
        self.timeout_nano = nanos;
        self
    }

    /// The first value of a metadata key.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
    }
}

/// A status that is an error: the code (see [`code`]) and the text that the other side's user reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// A gRPC code, not 0.
    pub code: i32,
    /// The text.
    pub message: String,
}

impl RpcError {
    /// An error of that code and text.
    #[must_use]
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl Response {
    /// The answer to a call.
    #[must_use]
    pub fn of(result: Result<Vec<u8>, RpcError>) -> Self {
        match result {
            Ok(payload) => Self { status: None, payload },
            Err(error) => {
                Self { status: Some(Status { code: error.code, message: error.message, details: Vec::new() }), payload: Vec::new() }
            }
        }
    }

    /// The payload, or the error of the status.
    ///
    /// # Errors
    /// [`RpcError`] with the status' code and message.
    pub fn into_result(self) -> Result<Vec<u8>, RpcError> {
        match self.status {
            Some(status) if status.code != code::OK => Err(RpcError::new(status.code, status.message)),
            _ => Ok(self.payload),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_big_endian() {
        let header = Header { length: 0x0102, stream: 0x0304_0506, kind: 1, flags: 0 };
        assert_eq!(header.encode(), [0, 0, 1, 2, 3, 4, 5, 6, 1, 0]);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn request_goes_round() {
        let request =
            Request::unary("s", "m", &KeyValue { key: "k".into(), value: "v".into() }).with_namespace("k8s.io").with_timeout_nanos(7);
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, FrameType::Request, 3, &request).expect("short");
        let (header, data) = split_frame(&bytes).expect("short").expect("whole");
        assert_eq!((header.stream, header.kind, header.flags), (3, 1, 0));
        let back = Request::decode(data).expect("own encoding");
        assert_eq!(back, request);
        assert_eq!(back.metadata(NAMESPACE_KEY), Some("k8s.io"));
        assert_eq!(back.metadata("other"), None);
    }

    #[test]
    fn partial_frames_wait() {
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, FrameType::Response, 1, &Response::of(Ok(vec![1, 2, 3]))).expect("short");
        for end in 0..bytes.len() {
            assert_eq!(split_frame(&bytes[..end]), Ok(None), "{end}");
        }
        bytes.push(9);
        let (header, data) = split_frame(&bytes).expect("short").expect("whole");
        assert_eq!(HEADER_BYTES + header.length, bytes.len() - 1);
        assert_eq!(Response::decode(data).expect("own encoding").into_result(), Ok(vec![1, 2, 3]));
    }

    #[test]
    fn too_long_is_refused() {
        assert_eq!(split_frame(&[255; HEADER_BYTES]), Err(FrameError::TooLong { length: u32::MAX as usize }));
        let mut out = vec![7];
        let big = Response { status: None, payload: vec![0; DATA_BYTES_MAX + 1] };
        assert!(encode_frame(&mut out, FrameType::Response, 1, &big).is_err());
        assert_eq!(out, [7]);
    }

    #[test]
    fn errors_carry_code_and_text() {
        let response = Response::of(Err(RpcError::new(code::NOT_FOUND, "no such container")));
        let error = response.into_result().expect_err("a status");
        assert_eq!((error.code, error.to_string().as_str()), (5, "no such container"));
        assert_eq!(Response::default().into_result(), Ok(vec![]));
    }
}
