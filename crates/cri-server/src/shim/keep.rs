//! Descriptors that are to outlive this server: the keeper holds them by name.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use prost::Message;
use protocols::shim::coracle::{DropRequest, DropResponse, KEEPER_SERVICE, PutRequest};
use protocols::ttrpc::{self, FrameType, Request, Response};
use tokio::net::UnixStream;

use super::client::read_frame;
use super::{CallError, Launcher};

/// The keeper answers at once.
const ANSWER: Duration = Duration::from_secs(5);

impl Launcher {
    /// Has the keeper hold these descriptors too, each by a name.
    ///
    /// # Errors
    /// No keeper answers, or it holds too many.
    pub async fn keep(&self, descriptors: &[(String, OwnedFd)]) -> io::Result<()> {
        self.ensure_keeper().await.map_err(|error| io::Error::other(error.chain()))?;
        // A connection for this alone: on the shared one a descriptor would go with whatever frame is being written.
        let stream = linux::scm::connect(self.keeper_socket().as_std_path())?;
        let frames = descriptors.iter().zip((1u32..).step_by(2));
        for ((name, descriptor), number) in frames {
            let request = Request::unary(KEEPER_SERVICE, "Put", &PutRequest { name: name.clone() });
            let mut frame = Vec::new();
            ttrpc::encode_frame(&mut frame, FrameType::Request, number, &request).map_err(io::Error::other)?;
            // An empty socket takes so small a message whole.
            if linux::scm::send(&stream, &frame, &[descriptor.as_fd()])? != frame.len() {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        let (mut answers, _stream) = UnixStream::from_std(stream)?.into_split();
        for _ in descriptors {
            let answered = tokio::time::timeout(ANSWER, read_frame(&mut answers)).await;
            let (_, data) = answered?.ok_or(io::ErrorKind::UnexpectedEof)?;
            Response::decode(data.as_slice()).map_err(io::Error::other)?.into_result().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Has the keeper close what it holds under names that begin so.
    pub async fn let_go(&self, prefix: &str) {
        let dropped: Result<DropResponse, CallError> = match self.ensure_keeper().await {
            Ok(keeper) => {
                let request = DropRequest { name: prefix.to_owned(), prefix: true };
                keeper.call(KEEPER_SERVICE, "Drop", &request, Some(ANSWER)).await
            }
            // One that has ended holds nothing.
            Err(_) => return,
        };
        if let Err(error) = dropped {
            tracing::warn!(prefix, %error, "the keeper does not let descriptors go");
        }
    }
}
