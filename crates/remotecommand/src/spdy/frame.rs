//! SPDY/3.1 frames: the eight-byte head, and header blocks that one zlib stream per direction compresses.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{FRAME_BYTES_MAX, StreamError};

/// The zlib dictionary that both sides start from (SPDY/3, section 2.6.10.1).
const DICTIONARY: &[u8] = include_bytes!("../spdy_dictionary.bin");

const VERSION: u16 = 3;
const CONTROL: u16 = 0x8000;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const FLAG_FIN: u8 = 1;
const STATUS_REFUSED_STREAM: u32 = 3;
const STATUS_CANCEL: u32 = 5;
const STREAM_ID_MASK: u32 = 0x7fff_ffff;
const HEAD_BYTES: usize = 8;

/// Header blocks larger than this, in bytes after decompression, are refused.
const HEADER_BLOCK_BYTES_MAX: usize = 64 * 1024;

/// A frame as far as remote commands need it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SpdyFrame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Vec<(String, String)>,
    },
    Data {
        id: u32,
        fin: bool,
        bytes: Bytes,
    },
    Reset {
        id: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Replies, settings and what else needs no answer.
    Other,
}

fn broken(detail: impl Into<String>) -> StreamError {
    StreamError::Protocol { protocol: "SPDY/3.1", detail: detail.into() }
}

pub(crate) struct FrameReader<R> {
    io: R,
    buffer: BytesMut,
    inflate: Decompress,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(io: R) -> Self {
        FrameReader { io, buffer: BytesMut::with_capacity(HEAD_BYTES), inflate: Decompress::new(true) }
    }

    /// The next frame; `None` at the end of the connection, also in the middle of a frame: the peer is gone.
    pub(crate) async fn next(&mut self) -> Result<Option<SpdyFrame>, StreamError> {
        if !self.fill(HEAD_BYTES).await? {
            return Ok(None);
        }
        let length = usize::from(self.buffer[5]) << 16 | usize::from(self.buffer[6]) << 8 | usize::from(self.buffer[7]);
        if length > FRAME_BYTES_MAX {
            return Err(broken(format!("frame of {length} bytes, the limit is {FRAME_BYTES_MAX}")));
        }
        if !self.fill(HEAD_BYTES + length).await? {
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(HEAD_BYTES + length).freeze();
        let word = frame.get_u32();
        let flags = frame.get_u8();
        frame.advance(3);
        let fin = flags & FLAG_FIN != 0;
        if word & 0x8000_0000 == 0 {
            return Ok(Some(SpdyFrame::Data { id: word & STREAM_ID_MASK, fin, bytes: frame }));
        }
        self.control((word & 0xffff) as u16, fin, frame).map(Some)
    }

    fn control(&mut self, kind: u16, fin: bool, mut body: Bytes) -> Result<SpdyFrame, StreamError> {
        let needed = match kind {
            SYN_STREAM => 10,
            SYN_REPLY | HEADERS | RST_STREAM | PING => 4,
            _ => 0,
        };
        if body.len() < needed {
            return Err(broken(format!("control frame of type {kind} with {} bytes", body.len())));
        }
        Ok(match kind {
            SYN_STREAM => {
                let id = body.get_u32() & STREAM_ID_MASK;
                body.advance(6);
                SpdyFrame::SynStream { id, fin, headers: self.headers(&body)? }
            }
            SYN_REPLY | HEADERS => {
                body.advance(4);
                // Decompressed though unused: the zlib stream runs through every header block.
                self.headers(&body)?;
                SpdyFrame::Other
            }
            RST_STREAM => SpdyFrame::Reset { id: body.get_u32() & STREAM_ID_MASK },
            PING => SpdyFrame::Ping { id: body.get_u32() },
            GOAWAY => SpdyFrame::GoAway,
            _ => SpdyFrame::Other,
        })
    }

    fn headers(&mut self, compressed: &[u8]) -> Result<Vec<(String, String)>, StreamError> {
        let block = self.decompress(compressed)?;
        let Some((count, mut rest)) = block.split_first_chunk::<4>() else {
            return Err(broken("empty header block"));
        };
        let count = u32::from_be_bytes(*count);
        let mut text = |what: &str| -> Result<String, StreamError> {
            let length = rest.try_get_u32().map_err(|_| broken(format!("header block ends before {what}")))? as usize;
            if rest.len() < length {
                return Err(broken(format!("header block ends inside {what}")));
            }
            let (value, tail) = rest.split_at(length);
            rest = tail;
            Ok(String::from_utf8_lossy(value).into_owned())
        };
        let mut headers = Vec::new();
        for _ in 0..count {
            headers.push((text("a name")?, text("a value")?));
        }
        Ok(headers)
    }

    fn decompress(&mut self, mut compressed: &[u8]) -> Result<Vec<u8>, StreamError> {
        let mut block = Vec::with_capacity(1024);
        while !compressed.is_empty() {
            if block.len() == block.capacity() {
                block.reserve(1024);
            }
            if block.len() > HEADER_BLOCK_BYTES_MAX {
                return Err(broken("header block too large"));
            }
            let (before_in, before_out) = (self.inflate.total_in(), block.len());
            match self.inflate.decompress_vec(compressed, &mut block, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(broken("header compression ended")),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY).map_err(|error| broken(format!("header dictionary: {error}")))?;
                }
                Err(error) => return Err(broken(format!("header compression: {error}"))),
            }
            let taken = (self.inflate.total_in() - before_in) as usize;
            compressed = &compressed[taken..];
            if taken == 0 && block.len() == before_out && block.len() < block.capacity() {
                return Err(broken("header compression makes no progress"));
            }
        }
        Ok(block)
    }

    async fn fill(&mut self, length: usize) -> Result<bool, StreamError> {
        while self.buffer.len() < length {
            self.buffer.reserve(length - self.buffer.len());
            match self.io.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(false),
                Err(source) => return Err(StreamError::Io { act: "read", source }),
            }
        }
        Ok(true)
    }
}

pub(crate) struct FrameWriter<W> {
    pub(crate) io: W,
    deflate: Compress,
    primed: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(crate) fn new(io: W) -> Self {
        FrameWriter { io, deflate: Compress::new(Compression::default(), true), primed: false }
    }

    pub(crate) async fn syn_stream(&mut self, id: u32, headers: &[(&str, &str)]) -> Result<(), StreamError> {
        let mut body = BytesMut::new();
        body.put_u32(id);
        body.put_u32(0);
        body.put_u16(0);
        body.extend_from_slice(&self.compress(headers)?);
        self.control(SYN_STREAM, &body).await
    }

    pub(crate) async fn syn_reply(&mut self, id: u32) -> Result<(), StreamError> {
        let mut body = BytesMut::new();
        body.put_u32(id);
        body.extend_from_slice(&self.compress(&[])?);
        self.control(SYN_REPLY, &body).await
    }

    pub(crate) async fn refuse(&mut self, id: u32) -> Result<(), StreamError> {
        self.rst_stream(id, STATUS_REFUSED_STREAM).await
    }

    pub(crate) async fn reset(&mut self, id: u32) -> Result<(), StreamError> {
        self.rst_stream(id, STATUS_CANCEL).await
    }

    async fn rst_stream(&mut self, id: u32, status: u32) -> Result<(), StreamError> {
        let mut body = BytesMut::new();
        body.put_u32(id);
        body.put_u32(status);
        self.control(RST_STREAM, &body).await
    }

    pub(crate) async fn ping(&mut self, id: u32) -> Result<(), StreamError> {
        self.control(PING, &id.to_be_bytes()).await
    }

    pub(crate) async fn go_away(&mut self) -> Result<(), StreamError> {
        self.control(GOAWAY, &[0; 8]).await
    }

    pub(crate) async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) -> Result<(), StreamError> {
        let flags = if fin { FLAG_FIN } else { 0 };
        self.frame(id & STREAM_ID_MASK, flags, bytes).await
    }

    async fn control(&mut self, kind: u16, body: &[u8]) -> Result<(), StreamError> {
        self.frame(u32::from(CONTROL | VERSION) << 16 | u32::from(kind), 0, body).await
    }

    async fn frame(&mut self, word: u32, flags: u8, body: &[u8]) -> Result<(), StreamError> {
        let mut frame = BytesMut::with_capacity(HEAD_BYTES + body.len());
        frame.put_u32(word);
        frame.put_u32(u32::from(flags) << 24 | body.len() as u32);
        frame.extend_from_slice(body);
        self.io.write_all(&frame).await.map_err(|source| StreamError::Io { act: "write", source })
    }

    fn compress(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>, StreamError> {
        if !self.primed {
            self.deflate.set_dictionary(DICTIONARY).map_err(|error| broken(format!("header dictionary: {error}")))?;
            self.primed = true;
        }
        let mut block = BytesMut::new();
        block.put_u32(headers.len() as u32);
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.put_u32(text.len() as u32);
            block.extend_from_slice(text.as_bytes());
        }
        // A sync flush adds a few bytes; header blocks here are tens of bytes long.
        let mut compressed = Vec::with_capacity(block.len() * 2 + 256);
        self.deflate
            .compress_vec(&block, &mut compressed, FlushCompress::Sync)
            .map_err(|error| broken(format!("header compression: {error}")))?;
        Ok(compressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn header_blocks_share_one_compression_stream() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let mut writer = FrameWriter::new(near);
        let mut reader = FrameReader::new(far);
        for id in [1, 3, 5] {
            writer.syn_stream(id, &[("streamtype", "stdin"), ("port", "80")]).await.unwrap();
            writer.syn_reply(id).await.unwrap();
            let headers = vec![("streamtype".to_owned(), "stdin".to_owned()), ("port".to_owned(), "80".to_owned())];
            assert_eq!(reader.next().await.unwrap(), Some(SpdyFrame::SynStream { id, fin: false, headers }));
            assert_eq!(reader.next().await.unwrap(), Some(SpdyFrame::Other));
        }
        writer.data(7, b"x", true).await.unwrap();
        assert_eq!(reader.next().await.unwrap(), Some(SpdyFrame::Data { id: 7, fin: true, bytes: Bytes::from_static(b"x") }));
    }

    #[tokio::test]
    async fn rubbish_is_an_error_and_a_torn_frame_an_end() {
        let mut rubbish: &[u8] = &[0x80, 3, 0, 1, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        assert!(matches!(FrameReader::new(&mut rubbish).next().await, Err(StreamError::Protocol { .. })));
        let mut short: &[u8] = &[0x80, 3, 0, 1, 0, 0, 0, 1, 0];
        assert!(matches!(FrameReader::new(&mut short).next().await, Err(StreamError::Protocol { .. })));
        let mut torn: &[u8] = &[0, 0, 0, 1, 0, 0, 0, 9, 1];
        assert_eq!(FrameReader::new(&mut torn).next().await.unwrap(), None);
    }
}
