//! The SPDY/3.1 framing: a stream per channel, named by its `streamtype` header.
//!
//! Source: SPDY protocol, draft 3.1. As in client-go's peers, `WINDOW_UPDATE` is neither sent nor heeded: TCP's own window
//! bounds what is in flight, and bounded queues bound what is here.

pub(crate) mod frame;

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::frame::{FrameReader, FrameWriter, SpdyFrame};
use crate::{CHUNK_BYTES_MAX, Channel, Channels, Frame, LINGER_SECONDS, Role, StreamError};

/// The header that names a stream's channel.
const STREAM_TYPE: &str = "streamtype";

/// How long a client has to open all its streams (kubelet's `streamCreationTimeout`), in seconds.
const OPEN_SECONDS: u64 = 30;

/// Control messages of the reader that wait for the writer, at most.
const CONTROLS_MAX: usize = 16;

/// What the reader asks of the writer.
enum Control {
    /// The client opened a stream: answer, and use it for this channel from now on.
    Opened(u32, Channel),
    /// Echo a ping.
    Pong(u32),
    /// Refuse a stream that is of no use here.
    Refuse(u32),
}

pub(crate) async fn run<T>(
    io: T,
    role: Role,
    channels: Channels,
    inbound: mpsc::Sender<Frame>,
    outbound: mpsc::Receiver<Frame>,
) -> Result<(), StreamError>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (read_half, write_half) = tokio::io::split(io);
    let (controls_tx, controls) = mpsc::channel(CONTROLS_MAX);
    let mut writer = Writer { frames: FrameWriter::new(write_half), ids: [None; 5], finished: [false; 5] };
    let mut reader = Reader { frames: FrameReader::new(read_half), channels: Vec::new(), inbound, controls: controls_tx };
    if role == Role::Client {
        for (channel, id) in wanted(channels).zip((1u32..).step_by(2)) {
            writer.frames.syn_stream(id, &[(STREAM_TYPE, channel.stream_type())]).await?;
            writer.ids[channel as usize] = Some(id);
            reader.channels.push((id, channel));
        }
    }
    let mut reading = std::pin::pin!(reader.run(role));
    let mut writing = std::pin::pin!(writer.run(role, channels, outbound, controls));
    tokio::select! {
        result = &mut reading => return result,
        result = &mut writing => result?,
    }
    // All was sent: the peer reads it and closes.
    tokio::time::timeout(Duration::from_secs(LINGER_SECONDS), reading).await.unwrap_or(Ok(()))
}

/// The streams of a command with these channels, in the order in which client-go opens them.
fn wanted(channels: Channels) -> impl Iterator<Item = Channel> {
    [
        (Channel::Error, true),
        (Channel::Stdin, channels.stdin),
        (Channel::Stdout, channels.stdout),
        (Channel::Stderr, channels.stderr && !channels.tty),
        (Channel::Resize, channels.tty),
    ]
    .into_iter()
    .filter_map(|(channel, wanted)| wanted.then_some(channel))
}

struct Reader<R> {
    frames: FrameReader<R>,
    channels: Vec<(u32, Channel)>,
    inbound: mpsc::Sender<Frame>,
    controls: mpsc::Sender<Control>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(&mut self, role: Role) -> Result<(), StreamError> {
        while let Some(frame) = self.frames.next().await? {
            match frame {
                SpdyFrame::SynStream { id, fin, headers } if role == Role::Server => self.opened(id, fin, &headers).await,
                SpdyFrame::Data { id, fin, bytes } => {
                    if !bytes.is_empty() {
                        self.deliver(id, |channel| Frame::Data(channel, bytes)).await;
                    }
                    if fin {
                        self.deliver(id, Frame::Close).await;
                    }
                }
                SpdyFrame::Reset { id } => self.deliver(id, Frame::Close).await,
                // Only a client's pings (odd) are to be echoed; our side sends none.
                SpdyFrame::Ping { id } => self.control(Control::Pong(id)).await,
                SpdyFrame::GoAway => return Ok(()),
                SpdyFrame::SynStream { id, .. } => self.control(Control::Refuse(id)).await,
                SpdyFrame::Other => {}
            }
        }
        Ok(())
    }

    async fn opened(&mut self, id: u32, fin: bool, headers: &[(String, String)]) {
        let name = headers.iter().find(|(name, _)| name == STREAM_TYPE).map(|(_, value)| value.as_str());
        let channel = Channel::ALL.into_iter().find(|channel| Some(channel.stream_type()) == name);
        let taken = channel.is_none_or(|channel| self.channels.iter().any(|(_, open)| *open == channel));
        let Some(channel) = channel.filter(|_| !taken) else { return self.control(Control::Refuse(id)).await };
        self.channels.push((id, channel));
        self.control(Control::Opened(id, channel)).await;
        if fin {
            self.deliver(id, Frame::Close).await;
        }
    }

    /// Nobody listening is no error: the rest is read and dropped, so that pings and the end still work.
    async fn deliver(&mut self, id: u32, frame: impl FnOnce(Channel) -> Frame) {
        if let Some((_, channel)) = self.channels.iter().find(|(open, _)| *open == id) {
            let _ = self.inbound.send(frame(*channel)).await;
        }
    }

    /// The writer being gone means that the connection is ending.
    async fn control(&mut self, control: Control) {
        let _ = self.controls.send(control).await;
    }
}

struct Writer<W> {
    frames: FrameWriter<W>,
    /// The stream of each channel, by channel number.
    ids: [Option<u32>; 5],
    /// Channels on which this side has said its last.
    finished: [bool; 5],
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    async fn run(
        &mut self,
        role: Role,
        channels: Channels,
        mut outbound: mpsc::Receiver<Frame>,
        mut controls: mpsc::Receiver<Control>,
    ) -> Result<(), StreamError> {
        // A client opens its streams one by one, each after the answer to the one before. A command that ends sooner than
        // that must not end the connection under it.
        if role == Role::Server && !self.all_open(channels, &mut controls).await? {
            return Ok(());
        }
        loop {
            tokio::select! {
                biased;
                Some(control) = controls.recv() => self.control(control).await?,
                frame = outbound.recv() => match frame {
                    Some(frame) => self.send(frame).await?,
                    None => break,
                },
            }
        }
        for channel in Channel::ALL {
            self.finish(channel).await?;
        }
        if role == Role::Server {
            self.frames.go_away().await?;
        }
        self.frames.shutdown().await
    }

    /// Answers until the client has opened every stream of the command; false when it has gone before.
    async fn all_open(&mut self, channels: Channels, controls: &mut mpsc::Receiver<Control>) -> Result<bool, StreamError> {
        let deadline = Instant::now() + Duration::from_secs(OPEN_SECONDS);
        while let Some(missing) = wanted(channels).find(|channel| self.ids[*channel as usize].is_none()) {
            tokio::select! {
                control = controls.recv() => match control {
                    Some(control) => self.control(control).await?,
                    None => return Ok(false),
                },
                () = tokio::time::sleep_until(deadline) => {
                    return Err(StreamError::StreamsMissing { missing: missing.stream_type(), seconds: OPEN_SECONDS });
                }
            }
        }
        Ok(true)
    }

    async fn control(&mut self, control: Control) -> Result<(), StreamError> {
        match control {
            Control::Opened(id, channel) => {
                self.ids[channel as usize] = Some(id);
                self.frames.syn_reply(id).await
            }
            Control::Pong(id) => self.frames.ping(id).await,
            Control::Refuse(id) => self.frames.refuse(id).await,
        }
    }

    /// Sends; what is for a channel that this command does not have is dropped.
    async fn send(&mut self, frame: Frame) -> Result<(), StreamError> {
        match frame {
            Frame::Data(channel, bytes) => {
                if let Some(id) = self.ids[channel as usize] {
                    for chunk in bytes.chunks(CHUNK_BYTES_MAX) {
                        self.frames.data(id, chunk, false).await?;
                    }
                }
                Ok(())
            }
            Frame::Close(channel) => self.finish(channel).await,
        }
    }

    async fn finish(&mut self, channel: Channel) -> Result<(), StreamError> {
        let finished = &mut self.finished[channel as usize];
        match self.ids[channel as usize] {
            Some(id) if !*finished => {
                *finished = true;
                self.frames.data(id, &[], true).await
            }
            _ => Ok(()),
        }
    }
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    async fn shutdown(&mut self) -> Result<(), StreamError> {
        match self.io.shutdown().await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotConnected => Ok(()),
            Err(source) => Err(StreamError::Io { act: "close", source }),
        }
    }
}
