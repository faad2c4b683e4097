//! What strace wrote (`-f -y -xx`), call by call, as steps on the model. What cannot be understood is an error, never passed over.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::tree::{Inode, Kind, Node, ROOT, Tree};
use super::{Effect, Step};

/// A call that succeeded: its name, arguments, and what it answered.
struct Call<'a> {
    thread: &'a str,
    name: &'a str,
    arguments: Vec<&'a str>,
    answer: &'a str,
    began: usize,
    ended: usize,
}

/// The steps below `root`, in the order in which the calls ended; what is written to the file `marks` is a mark.
pub(super) fn steps(text: &str, root: &Path, marks: &Path) -> io::Result<Vec<Step>> {
    let mut reader = Reader {
        root: root.as_os_str().as_bytes().to_vec(),
        marks: marks.as_os_str().as_bytes().to_vec(),
        umask: umask()?,
        tree: Tree::default(),
        made: ROOT,
        places: BTreeMap::new(),
        descriptors: BTreeMap::new(),
        steps: Vec::new(),
    };
    let mut begun: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        if rest.starts_with("+++") || rest.starts_with("---") {
            continue;
        }
        if let Some(head) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, (number, head));
            continue;
        }
        let joined;
        let (began, whole) = match rest.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>")) {
            Some((_, tail)) => {
                let Some((began, head)) = begun.remove(thread) else { continue };
                joined = format!("{head}{tail}");
                (began, joined.as_str())
            }
            None => (number, rest),
        };
        // Lines count from 1, so that 0 is before all.
        if let Some(call) = parse(thread, whole, began + 1, number + 1) {
            reader.read(&call).map_err(|error| io::Error::other(format!("line {} of the trace: {error}: {whole}", number + 1)))?;
        }
    }
    Ok(reader.steps)
}

fn umask() -> io::Result<u32> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask.and_then(|text| u32::from_str_radix(text.trim(), 8).ok()).ok_or_else(|| io::Error::other("no umask in /proc/self/status"))
}

/// `None` for a call that failed, or that never answered.
fn parse<'a>(thread: &'a str, line: &'a str, began: usize, ended: usize) -> Option<Call<'a>> {
    let (call, answer) = line.rsplit_once(" = ")?;
    if answer.starts_with("-1") || answer.starts_with('?') {
        return None;
    }
    let (name, arguments) = call.trim_end().strip_suffix(')')?.split_once('(')?;
    Some(Call { thread, name, arguments: split(arguments), answer, began, ended })
}

/// Splits at the commas of the outermost level. Strings are hexadecimal, so that they hold none.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b',' if depth == 0 => {
                parts.push(text[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[from..].trim());
    parts
}

/// `\x41\x42` as bytes.
fn unhex(text: &str) -> Vec<u8> {
    text.split("\\x").skip(1).filter_map(|digits| u8::from_str_radix(digits.get(..2)?, 16).ok()).collect()
}

/// The string of an argument: `"\x41"`, and what strace puts around it.
fn string(argument: &str) -> Option<Vec<u8>> {
    let (_, rest) = argument.split_once('"')?;
    let (inside, rest) = rest.split_once('"')?;
    // Dots: it was cut short.
    (!rest.starts_with("...")).then(|| unhex(inside))
}

/// The path of a descriptor: `5<\x2f\x61>`; none of what has no name any more.
fn path_of(argument: &str) -> Option<Vec<u8>> {
    let (_, rest) = argument.split_once('<')?;
    let (inside, rest) = rest.split_once('>')?;
    (inside.starts_with("\\x2f") && !rest.contains("(deleted)")).then(|| unhex(inside))
}

fn number(argument: &str, radix: u32) -> Option<u32> {
    let digits: String = argument.chars().take_while(|c| c.is_digit(radix)).collect();
    u32::from_str_radix(&digits, radix).ok()
}

/// An owner to be set; -1 leaves it.
fn owner(argument: &str) -> Option<u32> {
    argument.parse::<u32>().ok().filter(|id| *id != u32::MAX)
}

type Read<T> = Result<T, String>;

struct Reader {
    root: Vec<u8>,
    marks: Vec<u8>,
    umask: u32,
    tree: Tree,
    made: Inode,
    /// Where the next write to a file goes.
    places: BTreeMap<Inode, usize>,
    /// What a thread's descriptor was last.
    descriptors: BTreeMap<(String, u32), Vec<u8>>,
    steps: Vec<Step>,
}

impl Reader {
    /// The path below the root; `None` if it is elsewhere.
    fn below<'a>(&self, path: &'a [u8]) -> Option<&'a [u8]> {
        match path.strip_prefix(self.root.as_slice())? {
            [] => Some(&[]),
            [b'/', rest @ ..] => Some(rest),
            _ => None,
        }
    }

    /// The whole path of a directory's descriptor and a name in it.
    fn absolute(&self, call: &Call<'_>, dir: &str, name: &str) -> Option<Vec<u8>> {
        let name = string(name)?;
        let path = if name.starts_with(b"/") { name } else { [path_of(dir)?.as_slice(), b"/", &name].concat() };
        // `/proc/self/fd/5/name` is how attributes are set without following a link.
        let Some(rest) = path.strip_prefix(b"/proc/self/fd/") else { return Some(path) };
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        let base = self.descriptors.get(&(call.thread.to_owned(), number))?;
        Some([base.as_slice(), &rest[digits..]].concat())
    }

    /// The directory and the name in it that a path means; `None` if it is elsewhere.
    fn place(&self, path: &[u8]) -> Read<Option<(Inode, Vec<u8>)>> {
        let Some(below) = self.below(path) else { return Ok(None) };
        let mut parts: Vec<&[u8]> = below.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
        let Some(name) = parts.pop() else { return Ok(None) };
        let dir = self.tree.find(&parts.join(&b'/')).ok_or("a directory that is not known")?;
        Ok(Some((dir, name.to_vec())))
    }

    /// None of what is elsewhere, nor of what the kernel made itself (overlayfs does, in its upper and work directories).
    fn inode(&self, path: Option<Vec<u8>>) -> Option<Inode> {
        let path = path?;
        self.tree.find(self.below(&path)?)
    }

    fn push(&mut self, call: &Call<'_>, effect: Effect) {
        self.tree.apply(&effect, |()| true);
        self.steps.push(Step { began: call.began, ended: call.ended, effect });
    }

    fn make(&mut self, call: &Call<'_>, path: &[u8], kind: Kind, mode: u32) -> Read<()> {
        let Some((dir, name)) = self.place(path)? else { return Ok(()) };
        self.made += 1;
        let inode = self.made;
        self.push(call, Effect::Make { inode, node: Node::new(kind, mode) });
        self.push(call, Effect::Name { dir, name, inode: Some(inode) });
        Ok(())
    }

    fn read(&mut self, call: &Call<'_>) -> Read<()> {
        for argument in call.arguments.iter().chain([&call.answer]) {
            if let (Some(number), Some(path)) = (number(argument, 10), path_of(argument)) {
                self.descriptors.insert((call.thread.to_owned(), number), path);
            }
        }
        let argument = |at: usize| call.arguments.get(at).copied().unwrap_or_default();
        let here = "0<\\x2f>";
        match call.name {
            "open" | "openat" | "openat2" | "creat" => self.open(call),
            "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" => self.write(call),
            "ftruncate" => self.set_length(call, path_of(argument(0)), argument(1)),
            "truncate" => self.set_length(call, self.absolute(call, here, argument(0)), argument(1)),
            "rename" => self.rename(call, [here, argument(0)], [here, argument(1)]),
            "renameat" | "renameat2" if argument(4).contains("EXCHANGE") => Err("names are exchanged".to_owned()),
            "renameat" | "renameat2" => self.rename(call, [argument(0), argument(1)], [argument(2), argument(3)]),
            "link" => self.link(call, [here, argument(0)], [here, argument(1)]),
            "linkat" => self.link(call, [argument(0), argument(1)], [argument(2), argument(3)]),
            "unlink" | "rmdir" => self.unlink(call, here, argument(0)),
            "unlinkat" => self.unlink(call, argument(0), argument(1)),
            "mkdir" => self.make_at(call, here, argument(0), Kind::Dir(BTreeMap::new()), argument(1)),
            "mkdirat" => self.make_at(call, argument(0), argument(1), Kind::Dir(BTreeMap::new()), argument(2)),
            "symlink" => self.make_at(call, here, argument(1), Kind::Symlink(string(argument(0)).unwrap_or_default()), "0777"),
            "symlinkat" => self.make_at(call, argument(1), argument(2), Kind::Symlink(string(argument(0)).unwrap_or_default()), "0777"),
            "mknod" => self.make_special(call, [here, argument(0)], argument(1), argument(2)),
            "mknodat" => self.make_special(call, [argument(0), argument(1)], argument(2), argument(3)),
            "chmod" => self.set_mode(call, self.absolute(call, here, argument(0)), argument(1)),
            "fchmod" => self.set_mode(call, path_of(argument(0)), argument(1)),
            "fchmodat" | "fchmodat2" => self.set_mode(call, self.absolute(call, argument(0), argument(1)), argument(2)),
            "chown" | "lchown" => self.set_owner(call, self.absolute(call, here, argument(0)), argument(1), argument(2)),
            "fchown" => self.set_owner(call, path_of(argument(0)), argument(1), argument(2)),
            "fchownat" => self.set_owner(call, self.absolute(call, argument(0), argument(1)), argument(2), argument(3)),
            "setxattr" | "lsetxattr" => self.set_xattr(call, self.absolute(call, here, argument(0)), argument(1), Some(argument(2))),
            "fsetxattr" => self.set_xattr(call, path_of(argument(0)), argument(1), Some(argument(2))),
            "removexattr" | "lremovexattr" => self.set_xattr(call, self.absolute(call, here, argument(0)), argument(1), None),
            "fremovexattr" => self.set_xattr(call, path_of(argument(0)), argument(1), None),
            "fsync" | "fdatasync" => {
                if let Some(inode) = self.inode(path_of(argument(0))) {
                    self.push(call, Effect::Sync { inode });
                }
                Ok(())
            }
            "sync" | "syncfs" => {
                self.push(call, Effect::SyncAll);
                Ok(())
            }
            "sendfile" | "copy_file_range" | "splice" | "fallocate" | "io_uring_setup" => {
                let known = call.arguments.iter().any(|argument| path_of(argument).is_some_and(|path| self.below(&path).is_some()));
                if known || call.name == "io_uring_setup" { Err("this call hides what is written".to_owned()) } else { Ok(()) }
            }
            _ => Err("a call that was not asked for".to_owned()),
        }
    }

    fn open(&mut self, call: &Call<'_>) -> Read<()> {
        let Some(path) = path_of(call.answer) else { return Ok(()) };
        let Some(below) = self.below(&path) else { return Ok(()) };
        let flags = call.arguments.join(",");
        if flags.contains("O_TMPFILE") {
            return Err("a file without a name".to_owned());
        }
        match self.tree.find(below) {
            None if flags.contains("O_CREAT") || call.name == "creat" => {
                let mode = match flags.split_once("mode=") {
                    Some((_, mode)) => number(mode, 8),
                    None => number(call.arguments.last().copied().unwrap_or_default(), 8),
                };
                self.make(call, &path, Kind::File(Vec::new()), mode.ok_or("a file without a mode")? & !self.umask)?;
                self.places.insert(self.made, 0);
                Ok(())
            }
            // Reading changes nothing.
            None if !flags.contains("O_WRONLY") && !flags.contains("O_RDWR") => Ok(()),
            None => Err("a file that is not known".to_owned()),
            Some(inode) => {
                if flags.contains("O_TRUNC") || call.name == "creat" {
                    self.push(call, Effect::SetLength { inode, length: 0 });
                }
                if flags.contains("O_APPEND") {
                    self.places.remove(&inode);
                } else if flags.contains("O_WRONLY") || flags.contains("O_RDWR") {
                    self.places.insert(inode, 0);
                }
                Ok(())
            }
        }
    }

    fn write(&mut self, call: &Call<'_>) -> Read<()> {
        let argument = |at: usize| call.arguments.get(at).copied().unwrap_or_default();
        let Some(path) = path_of(argument(0)) else { return Ok(()) };
        let is_mark = path == self.marks;
        if !is_mark && self.below(&path).is_none() {
            return Ok(());
        }
        let mut bytes: Vec<u8> = if call.name.contains("writev") {
            argument(1).split("iov_base=").skip(1).filter_map(string).flatten().collect()
        } else {
            string(argument(1)).ok_or("bytes that were cut short")?
        };
        let length = number(call.answer, 10).ok_or("no answer")? as usize;
        if bytes.len() < length {
            return Err(format!("{} bytes of {length}", bytes.len()));
        }
        bytes.truncate(length);
        if is_mark {
            self.push(call, Effect::Mark(String::from_utf8_lossy(&bytes).into_owned()));
            return Ok(());
        }
        let inode = self.inode(Some(path)).ok_or("a file that is not known")?;
        let offset = if call.name.starts_with('p') {
            number(argument(3), 10).ok_or("no offset")? as usize
        } else {
            let end = match self.tree.0.get(&inode).map(|node| &node.kind) {
                Some(Kind::File(bytes)) => bytes.len(),
                // A FIFO keeps nothing.
                _ => return Ok(()),
            };
            let offset = self.places.get(&inode).copied().unwrap_or(end);
            self.places.entry(inode).and_modify(|place| *place = offset + length);
            offset
        };
        self.push(call, Effect::Write { inode, offset, bytes });
        Ok(())
    }

    fn set_length(&mut self, call: &Call<'_>, path: Option<Vec<u8>>, length: &str) -> Read<()> {
        if let Some(inode) = self.inode(path) {
            let length = number(length, 10).ok_or("no length")? as usize;
            self.push(call, Effect::SetLength { inode, length });
        }
        Ok(())
    }

    fn rename(&mut self, call: &Call<'_>, from: [&str; 2], to: [&str; 2]) -> Read<()> {
        let from = self.absolute(call, from[0], from[1]).unwrap_or_default();
        let to = self.absolute(call, to[0], to[1]).unwrap_or_default();
        match (self.place(&from)?, self.place(&to)?) {
            (None, None) => Ok(()),
            (Some(from), Some(to)) => {
                let inode = self.tree.0.get(&from.0).and_then(|node| match &node.kind {
                    Kind::Dir(entries) => entries.get(&from.1).copied(),
                    _ => None,
                });
                let inode = inode.ok_or("a file that is not known")?;
                self.push(call, Effect::Rename { from, to, inode });
                Ok(())
            }
            _ => Err("a rename over the edge".to_owned()),
        }
    }

    fn link(&mut self, call: &Call<'_>, from: [&str; 2], to: [&str; 2]) -> Read<()> {
        let to = self.absolute(call, to[0], to[1]).unwrap_or_default();
        let Some((dir, name)) = self.place(&to)? else { return Ok(()) };
        let inode = self.inode(self.absolute(call, from[0], from[1])).ok_or("a link to elsewhere")?;
        self.push(call, Effect::Name { dir, name, inode: Some(inode) });
        Ok(())
    }

    fn unlink(&mut self, call: &Call<'_>, dir: &str, name: &str) -> Read<()> {
        let Some(path) = self.absolute(call, dir, name) else { return Ok(()) };
        if self.inode(Some(path.clone())).is_some()
            && let Some((dir, name)) = self.place(&path)?
        {
            self.push(call, Effect::Name { dir, name, inode: None });
        }
        Ok(())
    }

    fn make_at(&mut self, call: &Call<'_>, dir: &str, name: &str, kind: Kind, mode: &str) -> Read<()> {
        let Some(path) = self.absolute(call, dir, name) else { return Ok(()) };
        let mode = number(mode, 8).ok_or("no mode")? & !self.umask;
        self.make(call, &path, kind, mode)
    }

    fn make_special(&mut self, call: &Call<'_>, at: [&str; 2], mode: &str, device: &str) -> Read<()> {
        let Some(path) = self.absolute(call, at[0], at[1]) else { return Ok(()) };
        let (kind, mode) = mode.split_once('|').ok_or("no mode")?;
        let kind = match kind {
            "S_IFCHR" => 0o020_000,
            "S_IFBLK" => 0o060_000,
            "S_IFIFO" => 0o010_000,
            "S_IFSOCK" => 0o140_000,
            _ => return Err("a kind of file that is not known".to_owned()),
        };
        // `makedev(0x1, 0x3)`
        let inner = device.strip_prefix("makedev(").and_then(|rest| rest.strip_suffix(')')).unwrap_or("0, 0");
        let part = |text: &str| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0);
        let (major, minor) = inner.split_once(',').ok_or("no device")?;
        let mode = number(mode, 8).ok_or("no mode")? & !self.umask;
        self.make(call, &path, Kind::Special(kind, part(major), part(minor)), mode)
    }

    fn set_mode(&mut self, call: &Call<'_>, path: Option<Vec<u8>>, mode: &str) -> Read<()> {
        if let Some(inode) = self.inode(path) {
            let mode = number(mode, 8).ok_or("no mode")? & 0o7777;
            self.push(call, Effect::SetMode { inode, mode });
        }
        Ok(())
    }

    fn set_owner(&mut self, call: &Call<'_>, path: Option<Vec<u8>>, uid: &str, gid: &str) -> Read<()> {
        if let Some(inode) = self.inode(path) {
            self.push(call, Effect::SetOwner { inode, uid: owner(uid), gid: owner(gid) });
        }
        Ok(())
    }

    fn set_xattr(&mut self, call: &Call<'_>, path: Option<Vec<u8>>, name: &str, value: Option<&str>) -> Read<()> {
        if let Some(inode) = self.inode(path) {
            let name = string(name).ok_or("no name")?;
            let value = value.map(|value| string(value).ok_or("no value")).transpose()?;
            self.push(call, Effect::SetXattr { inode, name, value });
        }
        Ok(())
    }
}
