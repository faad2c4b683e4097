//! One layer from a stream of packed bytes to files on disk: hashed, unpacked and hashed again in a single pass.

use std::io::{self, BufRead, BufReader, Read};

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::disk::{Disk, Staging};
use crate::error::{Error, file, is_full};
use crate::reference::Digest;
use crate::tar::Archive;
use crate::unpack::{self, Limits, Unpacked};

const READ_BUFFER_BYTES: usize = 128 * 1024;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What a layer must be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest of the packed bytes, where they have one (not in `docker save` archives).
    pub packed: Option<Digest>,
    /// Digest of the unpacked archive.
    pub diff_id: Digest,
    pub limits: Limits,
}

/// A layer that is unpacked and has the right digests, but no name yet.
#[derive(Debug)]
pub(crate) struct Staged {
    pub staging: Staging,
    pub unpacked: Unpacked,
}

/// Unpacks `packed` into a new staging directory. Runs on a thread that may block.
pub(crate) fn stage(disk: &Disk, number: u64, packed: impl Read, expected: &Expected) -> Result<Staged, Error> {
    let staging = disk.stage(number)?;
    let name = expected.packed.as_ref().unwrap_or(&expected.diff_id).to_string();
    let root = unpack::open_root(&staging.fs()).map_err(file("open", &staging.fs()))?;
    let mut packed = Hashing::new(packed, u64::MAX);
    let done = match unpack_stream(&mut packed, root, expected, &name) {
        // That is this host's fault, whatever the archive is.
        Err(Error::Unpack { source, .. }) if is_full(&source) => return Err(file("unpack a layer into", &staging.fs())(source)),
        done => done,
    };
    // Whatever is wrong with the archive, first it must be known whether it is the right one; so the stream is read to its end.
    io::copy(&mut packed, &mut io::sink()).map_err(|e| Error::Unavailable { object: name.clone(), why: e.to_string() })?;
    if let Some(wanted) = &expected.packed {
        compare(&name, wanted, &packed.digest())?;
    }
    let (unpacked, diff_id) = done?;
    compare(&format!("the archive in layer {name}"), &expected.diff_id, &diff_id)?;
    Ok(Staged { staging, unpacked })
}

fn compare(object: &str, expected: &Digest, actual: &Digest) -> Result<(), Error> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::Digest { object: object.to_owned(), expected: expected.to_string(), actual: actual.to_string() })
}

pub(crate) fn unpack_stream(
    packed: &mut impl Read,
    root: std::os::fd::OwnedFd,
    expected: &Expected,
    name: &str,
) -> Result<(Unpacked, Digest), Error> {
    let refuse = |e: io::Error| Error::Layer { layer: name.to_owned(), why: e.to_string() };
    let mut packed = BufReader::with_capacity(READ_BUFFER_BYTES, packed);
    let head = packed.fill_buf().map_err(refuse)?;
    let plain: Box<dyn Read + '_> = if head.starts_with(&GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(packed))
    } else if head.starts_with(&ZSTD) {
        Box::new(zstd::stream::read::Decoder::with_buffer(packed).map_err(refuse)?)
    } else {
        Box::new(packed)
    };
    let mut archive = Archive::new(Hashing::new(plain, expected.limits.bytes));
    let unpacked = unpack::unpack(&mut archive, root, expected.limits, name)?;
    let mut plain = archive.into_inner();
    // Padding behind the archive's end belongs to its digest.
    io::copy(&mut plain, &mut io::sink()).map_err(refuse)?;
    Ok((unpacked, plain.digest()))
}

/// Hashes what is read through it, and refuses to go beyond a limit.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    left: u64,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self { inner, hash: Sha256::new(), left: limit }
    }

    fn digest(self) -> Digest {
        Digest::from_hash(&self.hash.finalize())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(len as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it unpacks to more bytes than is allowed"))?;
        self.hash.update(&buffer[..len]);
        Ok(len)
    }
}

/// The blocking end of a bounded channel of bytes.
pub(crate) struct ChannelReader {
    channel: mpsc::Receiver<Bytes>,
    present: Bytes,
}

impl ChannelReader {
    pub fn new(channel: mpsc::Receiver<Bytes>) -> Self {
        Self { channel, present: Bytes::new() }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.present.is_empty() {
            match self.channel.blocking_recv() {
                Some(bytes) => self.present = bytes,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.present.len());
        self.present.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}
