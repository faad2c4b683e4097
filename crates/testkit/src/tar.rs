//! A tar writer that does as it is told: paths that escape, device nodes, extended attributes, whiteouts, broken headers.

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with this content.
    File(Vec<u8>),
    /// A directory.
    Dir,
    /// A symbolic link to this target.
    Symlink(String),
    /// A hard link to another entry's path.
    Hardlink(String),
    /// A character device, major and minor.
    Char(u32, u32),
    /// A block device, major and minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// One entry of a layer. Paths are written as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path in the archive.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Extended attributes, written as PAX `SCHILY.xattr.` records.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    fn new(path: &str, kind: Kind, mode: u32) -> Self {
        Self { path: path.into(), kind, mode, uid: 0, gid: 0, mtime: 1_700_000_000, xattrs: Vec::new() }
    }

    /// A file of mode 0644.
    pub fn file(path: &str, content: impl Into<Vec<u8>>) -> Self {
        Self::new(path, Kind::File(content.into()), 0o644)
    }

    /// A file of mode 0755.
    pub fn executable(path: &str, content: impl Into<Vec<u8>>) -> Self {
        Self::new(path, Kind::File(content.into()), 0o755)
    }

    /// A directory of mode 0755.
    pub fn dir(path: &str) -> Self {
        Self::new(path, Kind::Dir, 0o755)
    }

    /// A symbolic link.
    pub fn symlink(path: &str, target: &str) -> Self {
        Self::new(path, Kind::Symlink(target.into()), 0o777)
    }

    /// A hard link.
    pub fn hardlink(path: &str, target: &str) -> Self {
        Self::new(path, Kind::Hardlink(target.into()), 0o644)
    }

    /// A character device.
    pub fn char_device(path: &str, major: u32, minor: u32) -> Self {
        Self::new(path, Kind::Char(major, minor), 0o666)
    }

    /// A whiteout: hides `path` of lower layers.
    pub fn whiteout(path: &str) -> Self {
        let (dir, name) = path.rsplit_once('/').map_or(("", path), |(dir, name)| (dir, name));
        let slash = if dir.is_empty() { "" } else { "/" };
        Self::new(&format!("{dir}{slash}.wh.{name}"), Kind::File(Vec::new()), 0o644)
    }

    /// An opaque mark: hides all that lower layers have in `dir`.
    pub fn opaque(dir: &str) -> Self {
        Self::new(&format!("{dir}/.wh..wh..opq"), Kind::File(Vec::new()), 0o644)
    }

    /// With other permission bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// With another owner.
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// With another modification time.
    pub fn mtime(mut self, seconds: u64) -> Self {
        self.mtime = seconds;
        self
    }

    /// With an extended attribute.
    pub fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.into(), value.into()));
        self
    }
}

/// The archive of these entries, ended by two empty blocks.
pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        put(&mut out, entry);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn put(out: &mut Vec<u8>, entry: &Entry) {
    let (flag, content, link, device): (u8, &[u8], &str, (u32, u32)) = match &entry.kind {
        Kind::File(content) => (b'0', content, "", (0, 0)),
        Kind::Hardlink(target) => (b'1', &[], target, (0, 0)),
        Kind::Symlink(target) => (b'2', &[], target, (0, 0)),
        Kind::Char(major, minor) => (b'3', &[], "", (*major, *minor)),
        Kind::Block(major, minor) => (b'4', &[], "", (*major, *minor)),
        Kind::Dir => (b'5', &[], "", (0, 0)),
        Kind::Fifo => (b'6', &[], "", (0, 0)),
    };
    let mut pax = Vec::new();
    if entry.path.len() > 100 {
        put_record(&mut pax, "path", entry.path.as_bytes());
    }
    if link.len() > 100 {
        put_record(&mut pax, "linkpath", link.as_bytes());
    }
    for (name, value) in &entry.xattrs {
        put_record(&mut pax, &format!("SCHILY.xattr.{name}"), value);
    }
    if !pax.is_empty() {
        let header = Header { name: "PaxHeaders/0", flag: b'x', size: pax.len(), link: "", device: (0, 0) };
        put_member(out, &header, &Entry::file("", ""), &pax);
    }
    let header = Header { name: &entry.path, flag, size: content.len(), link, device };
    put_member(out, &header, entry, content);
}

struct Header<'a> {
    name: &'a str,
    flag: u8,
    size: usize,
    link: &'a str,
    device: (u32, u32),
}

fn put_member(out: &mut Vec<u8>, header: &Header<'_>, entry: &Entry, content: &[u8]) {
    let mut block = [0u8; 512];
    let mut text = |at: usize, len: usize, text: &str| {
        let bytes = &text.as_bytes()[..text.len().min(len)];
        block[at..at + bytes.len()].copy_from_slice(bytes);
    };
    text(0, 100, header.name);
    text(100, 8, &format!("{:07o}", entry.mode));
    text(108, 8, &format!("{:07o}", entry.uid));
    text(116, 8, &format!("{:07o}", entry.gid));
    text(124, 12, &format!("{:011o}", header.size));
    text(136, 12, &format!("{:011o}", entry.mtime));
    text(148, 8, "        ");
    text(157, 100, header.link);
    text(257, 8, "ustar\x0000");
    text(329, 8, &format!("{:07o}", header.device.0));
    text(337, 8, &format!("{:07o}", header.device.1));
    block[156] = header.flag;
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&block);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// A PAX record counts its own length.
fn put_record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    out.extend_from_slice(format!("{len} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}
