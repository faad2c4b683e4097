//! CRI by data: calls are written as JSON, made by the messages' descriptions, and answered as JSON. No generated client stands between a
//! corpus and the wire, so that it can say what a generated client would not.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use prost_reflect::bytes::{Buf, BufMut};
use prost_reflect::prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor, SerializeOptions};
use serde_json::Value;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// How long a call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to a CRI server.
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    pool: DescriptorPool,
}

impl Cri {
    /// Connects to the unix socket.
    ///
    /// # Errors
    /// When the server does not answer, or the description of CRI cannot be read.
    pub fn connect(socket: &Path) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/protocols/proto");
        let files = protox::compile([root.join("cri/api.proto")], [&root]).context("failed to compile CRI's description")?;
        let pool = DescriptorPool::from_file_descriptor_set(files).context("failed to read CRI's description")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start the async runtime")?;
        let path = socket.to_owned();
        // The authority is never resolved: the connector goes to the socket.
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::try_from("http://localhost")?.timeout(CALL_TIMEOUT);
        let channel = runtime.block_on(endpoint.connect_with_connector(connector)).context("failed to connect")?;
        Ok(Self { runtime, channel, pool })
    }

    /// Makes a unary call; the server's refusal is the inner error.
    ///
    /// # Errors
    /// When there is no such method, or `request` is no message of it.
    pub fn call(&self, method: &str, request: &Value) -> Result<Result<Value, Status>> {
        let method = self.method(method)?;
        let request = DynamicMessage::deserialize(method.input(), request)
            .with_context(|| format!("{} cannot be made of {request}", method.name()))?;
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let path = http::uri::PathAndQuery::try_from(path).context("the method's name is no path")?;
        let codec = Dynamic(method.output());
        let answer = self.runtime.block_on(async {
            let mut client = tonic::client::Grpc::new(self.channel.clone());
            client.ready().await.map_err(|error| Status::new(Code::Unavailable, error.to_string()))?;
            client.unary(tonic::Request::new(request), path, codec).await
        });
        let options = SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false).skip_default_fields(false);
        match answer {
            Err(status) => Ok(Err(status)),
            Ok(answer) => {
                let json = answer.into_inner().serialize_with_options(serde_json::value::Serializer, &options);
                Ok(Ok(json.context("the answer is no JSON")?))
            }
        }
    }

    fn method(&self, name: &str) -> Result<MethodDescriptor> {
        let mut methods = self.pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
        methods.find(|method| method.name() == name).with_context(|| format!("CRI has no method {name}"))
    }
}

/// Messages by their description.
struct Dynamic(MessageDescriptor);

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Write;
    type Decoder = Read;

    fn encoder(&mut self) -> Write {
        Write
    }

    fn decoder(&mut self) -> Read {
        Read(self.0.clone())
    }
}

struct Write;

impl Encoder for Write {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item.encode_to_vec().as_slice());
        Ok(())
    }
}

struct Read(MessageDescriptor);

impl Decoder for Read {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        DynamicMessage::decode(self.0.clone(), bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
