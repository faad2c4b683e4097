//! A tar reader: POSIX ustar and PAX, GNU long names. Sequential, every length bounded, nothing kept but one header.
//!
//! Facts: POSIX.1-2017 pax "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format"; Go's archive/tar for the limit of
//! extension headers (1 MiB).

use std::collections::BTreeMap;
use std::io::{self, Read};

const BLOCK: usize = 512;
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
const XATTR_PREFIX: &str = "SCHILY.xattr.";

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// An entry's header; its content is read from the [`Archive`] before the next header.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    pub major: u32,
    pub minor: u32,
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// A tar archive being read.
pub(crate) struct Archive<R> {
    input: R,
    /// Bytes of the present entry's content and padding that are still unread.
    content: u64,
    padding: u64,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl<R: Read> Archive<R> {
    pub fn new(input: R) -> Self {
        Self { input, content: 0, padding: 0 }
    }

    /// The next entry, or `None` at the archive's end (an empty block, or the input's end between entries).
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut pax = BTreeMap::new();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            self.skip()?;
            let Some(block) = self.block()? else {
                return if pax.is_empty() && long_name.is_none() { Ok(None) } else { Err(bad("it ends behind an extension header")) };
            };
            let size = number(&block[124..136])?;
            match block[156] {
                b'x' => pax = parse_pax(&self.extension(size)?)?,
                b'g' => drop(self.extension(size)?),
                b'L' => long_name = Some(cut(&self.extension(size)?).to_vec()),
                b'K' => long_link = Some(cut(&self.extension(size)?).to_vec()),
                _ => return self.entry(&block, size, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        size: u64,
        mut pax: BTreeMap<String, Vec<u8>>,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let kind = match block[156] {
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => return Err(bad(&format!("entry type {:?} is not supported", char::from(other)))),
        };
        if pax.keys().any(|key| key.starts_with("GNU.sparse.")) {
            return Err(bad("sparse files are not supported"));
        }
        let path = pax.remove("path").or(long_name).unwrap_or_else(|| ustar_path(block));
        // Old archives mark a directory by its slash alone.
        let kind = if kind == Kind::File && block[156] == 0 && path.ends_with(b"/") { Kind::Dir } else { kind };
        let size = match pax.remove("size") {
            Some(text) => decimal(&text)?,
            None => size,
        };
        // Only files have content, whatever the size field of the others says.
        let size = if kind == Kind::File { size } else { 0 };
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        let id = |pax: Option<Vec<u8>>, field: &[u8]| -> io::Result<u32> {
            let id = pax.map_or_else(|| number(field), |text| decimal(&text))?;
            u32::try_from(id).map_err(|_| bad("owner is above 32 bits"))
        };
        Ok(Entry {
            uid: id(pax.remove("uid"), &block[108..116])?,
            gid: id(pax.remove("gid"), &block[116..124])?,
            mode: (number(&block[100..108])? & 0o7777) as u32,
            mtime: match pax.remove("mtime") {
                Some(text) => parse_time(&text)?,
                None => (i64::try_from(number(&block[136..148])?).unwrap_or(0), 0),
            },
            link: pax.remove("linkpath").or(long_link).unwrap_or_else(|| cut(&block[157..257]).to_vec()),
            major: device(kind, &block[329..337])?,
            minor: device(kind, &block[337..345])?,
            xattrs: pax.into_iter().filter_map(|(k, v)| Some((k.strip_prefix(XATTR_PREFIX)?.to_owned(), v))).collect(),
            path,
            kind,
            size,
        })
    }

    /// One header block with a right checksum; `None` at the end.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(bad("it ends within a header")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u64 = block.iter().enumerate().map(|(n, b)| if (148..156).contains(&n) { 32 } else { u64::from(*b) }).sum();
        if number(&block[148..156])? != sum {
            return Err(bad("a header has a wrong checksum: this is no tar archive"));
        }
        Ok(Some(block))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > EXTENSION_BYTES_MAX {
            return Err(bad("an extension header is above 1 MiB"));
        }
        let mut bytes = vec![0; size as usize];
        self.input.read_exact(&mut bytes)?;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        self.skip()?;
        Ok(bytes)
    }

    /// Reads over what is left of the present entry.
    fn skip(&mut self) -> io::Result<()> {
        let left = self.content + self.padding;
        let skipped = io::copy(&mut (&mut self.input).take(left), &mut io::sink())?;
        // Some writers leave out the padding of the last entry.
        if skipped < self.content {
            return Err(bad("it ends within a file"));
        }
        (self.content, self.padding) = (0, 0);
        Ok(())
    }

    /// The input, to ask where it stands.
    pub fn get_ref(&self) -> &R {
        &self.input
    }

    /// The input, to read what is behind the archive's end.
    pub fn into_inner(self) -> R {
        self.input
    }
}

/// The content of the present entry.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let read = self.input.read(&mut buffer[..len])?;
        if read == 0 {
            return Err(bad("it ends within a file"));
        }
        self.content -= read as u64;
        Ok(read)
    }
}

fn cut(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|b| *b == 0).map_or(bytes, |end| &bytes[..end])
}

fn ustar_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = cut(&block[..100]);
    let prefix = cut(&block[345..500]);
    // GNU's old format ("ustar  ") has other fields where POSIX has the prefix.
    if &block[257..263] != b"ustar\0" || prefix.is_empty() {
        return name.to_vec();
    }
    [prefix, b"/", name].concat()
}

fn device(kind: Kind, field: &[u8]) -> io::Result<u32> {
    if !matches!(kind, Kind::Char | Kind::Block) {
        return Ok(0);
    }
    u32::try_from(number(field)?).map_err(|_| bad("device number is above 32 bits"))
}

/// An octal field, or GNU's base-256 one. A negative time counts as 0.
fn number(field: &[u8]) -> io::Result<u64> {
    if field[0] & 0x80 != 0 {
        if field[0] & 0x40 != 0 {
            return Ok(0);
        }
        let bytes = field.iter().enumerate().map(|(n, b)| if n == 0 { b & 0x7f } else { *b });
        return bytes
            .into_iter()
            .try_fold(0u64, |all, b| all.checked_mul(256)?.checked_add(u64::from(b)))
            .ok_or_else(|| bad("a number is too large"));
    }
    let text = cut(field).trim_ascii();
    let digits = text.iter().try_fold(0u64, |all, b| {
        matches!(b, b'0'..=b'7').then_some(())?;
        all.checked_mul(8)?.checked_add(u64::from(b - b'0'))
    });
    digits.ok_or_else(|| bad("a number field of a header is not octal"))
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).ok_or_else(|| bad("a number of an extension header is not decimal"))
}

/// "SECONDS" or "SECONDS.FRACTION"; before 1970 counts as 0.
fn parse_time(text: &[u8]) -> io::Result<(i64, u32)> {
    let text = std::str::from_utf8(text).map_err(|_| bad("a time is not decimal"))?;
    if text.starts_with('-') {
        return Ok((0, 0));
    }
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = seconds.parse().map_err(|_| bad("a time is not decimal"))?;
    let nanoseconds: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Ok((seconds, nanoseconds.parse().map_err(|_| bad("a time is not decimal"))?))
}

/// Records of "LENGTH KEY=VALUE\n"; an empty value deletes the key.
fn parse_pax(mut bytes: &[u8]) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let broken = || bad("an extension header is broken");
    let mut records = BTreeMap::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|b| *b == b' ').ok_or_else(broken)?;
        let len = usize::try_from(decimal(&bytes[..space])?).map_err(|_| broken())?;
        if len <= space + 1 || len > bytes.len() || bytes[len - 1] != b'\n' {
            return Err(broken());
        }
        let record = &bytes[space + 1..len - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
        let key = String::from_utf8(record[..equals].to_vec()).map_err(|_| broken())?;
        let value = &record[equals + 1..];
        if value.is_empty() && !key.starts_with(XATTR_PREFIX) {
            records.remove(&key);
        } else {
            records.insert(key, value.to_vec());
        }
        bytes = &bytes[len..];
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::tar::{Entry as Made, archive};

    #[test]
    fn what_the_builder_writes_is_read() {
        let long = format!("{}/file", "d".repeat(150));
        let bytes = archive(&[
            Made::file(&long, "hello").owner(1000, 100).mode(0o4755).xattr("user.a", b"\x00\n=b".to_vec()),
            Made::symlink("l", "/etc/passwd"),
            Made::char_device("null", 1, 3),
        ]);
        let mut reader = Archive::new(&bytes[..]);
        let file = reader.next().unwrap().unwrap();
        assert_eq!((file.path, file.uid, file.gid, file.mode, file.size), (long.into_bytes(), 1000, 100, 0o4755, 5));
        assert_eq!(file.xattrs, [("user.a".to_owned(), b"\x00\n=b".to_vec())]);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let link = reader.next().unwrap().unwrap();
        assert_eq!((link.kind, link.link), (Kind::Symlink, b"/etc/passwd".to_vec()));
        let device = reader.next().unwrap().unwrap();
        assert_eq!((device.kind, device.major, device.minor), (Kind::Char, 1, 3));
        assert!(reader.next().unwrap().is_none());
    }

    #[test]
    fn every_cut_is_an_end_or_an_error_never_a_panic() {
        let bytes = archive(&[Made::file("a", vec![7; 700]).xattr("user.x", b"1".to_vec()), Made::dir("b")]);
        for cut in 0..bytes.len() {
            let mut reader = Archive::new(&bytes[..cut]);
            while let Ok(Some(_)) = reader.next() {}
        }
        for flip in 0..bytes.len().min(2048) {
            let mut broken = bytes.clone();
            broken[flip] ^= 0xff;
            let mut reader = Archive::new(&broken[..]);
            while let Ok(Some(_)) = reader.next() {}
        }
    }

    #[test]
    fn numbers_of_all_forms() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b" 644 \0\0\0").unwrap(), 0o644);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]).unwrap(), 2 << 32);
        assert!(number(b"9999999\0").is_err());
        assert_eq!(parse_time(b"12.5").unwrap(), (12, 500_000_000));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..3000), fix in proptest::prelude::any::<bool>()) {
            if fix && bytes.len() >= BLOCK {
                // A right checksum lets rubbish through to the fields behind it.
                let sum: u64 = bytes[..BLOCK].iter().enumerate().map(|(n, b)| if (148..156).contains(&n) { 32 } else { u64::from(*b) }).sum();
                bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            let mut reader = Archive::new(&bytes[..]);
            while let Ok(Some(mut entry)) = reader.next() {
                entry.path.clear();
                let _ = io::copy(&mut reader, &mut io::sink());
            }
        }

        #[test]
        fn pax_records_round_trip(name in "[a-z/]{101,300}", value in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..200)) {
            let bytes = archive(&[Made::file(&name, "x").xattr("user.v", value.clone())]);
            let entry = Archive::new(&bytes[..]).next().unwrap().unwrap();
            proptest::prop_assert_eq!(entry.path, name.into_bytes());
            proptest::prop_assert_eq!(entry.xattrs, [("user.v".to_owned(), value)]);
        }
    }
}
