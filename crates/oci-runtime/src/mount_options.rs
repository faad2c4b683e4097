//! Mount options: fstab's words, and the specification's own, to what the kernel takes (`config.md`, "Mounts").

use linux::mount::attr;

use crate::error::{Result, refuse};

/// What the options of one mount ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A bind mount; with all below it.
    pub bind: bool,
    /// See `bind`.
    pub recursive_bind: bool,
    /// Attributes of the mount to set (`attr::*`).
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// The same for all mounts below (`rro`...).
    pub set_recursive: u64,
    /// See `set_recursive`.
    pub clear_recursive: u64,
    /// Propagations (`MS_*`), each with whether all mounts below are meant, in order.
    pub propagation: Vec<(u64, bool)>,
    /// Flags of the superblock (`sync`, `dirsync`, `lazytime`, `mand`...), passed as parameters.
    pub flags: Vec<&'static str>,
    /// What the file system itself is to read: `key=value` or `key`.
    pub data: Vec<String>,
    /// Map owners by the container's user namespace; with all mounts below.
    pub idmap: Option<bool>,
    /// Fill the new tmpfs with what it covers.
    pub copy_up: bool,
}

/// An attribute word: name, attribute, whether it sets it.
const ATTRIBUTES: [(&str, u64, bool); 18] = [
    ("ro", attr::RDONLY, true),
    ("rw", attr::RDONLY, false),
    ("nosuid", attr::NOSUID, true),
    ("suid", attr::NOSUID, false),
    ("nodev", attr::NODEV, true),
    ("dev", attr::NODEV, false),
    ("noexec", attr::NOEXEC, true),
    ("exec", attr::NOEXEC, false),
    ("nodiratime", attr::NODIRATIME, true),
    ("diratime", attr::NODIRATIME, false),
    ("noatime", attr::NOATIME, true),
    ("atime", attr::NOATIME, false),
    ("strictatime", attr::STRICTATIME, true),
    ("nostrictatime", attr::STRICTATIME, false),
    ("relatime", 0, true),
    ("norelatime", 0, false),
    ("nosymfollow", attr::NOSYMFOLLOW, true),
    ("symfollow", attr::NOSYMFOLLOW, false),
];

const PROPAGATIONS: [(&str, u64); 4] = [
    ("private", linux::mount::flags::MS_PRIVATE),
    ("shared", linux::mount::flags::MS_SHARED),
    ("slave", linux::mount::flags::MS_SLAVE),
    ("unbindable", linux::mount::flags::MS_UNBINDABLE),
];

/// Superblock flags that are parameters of the new mount API.
const FLAGS: [&str; 6] = ["sync", "dirsync", "lazytime", "mand", "iversion", "silent"];

/// Words that ask for what is so anyway.
const NOTHING: [&str; 8] = ["async", "nolazytime", "nomand", "noiversion", "loud", "defaults", "acl", "remount"];

impl Options {
    /// Reads the options of a mount of this type.
    ///
    /// # Errors
    /// When a word cannot be carried out.
    pub fn parse(kind: &str, words: &[String]) -> Result<Self> {
        let mut options = Self { bind: kind == "bind" || kind == "rbind", recursive_bind: kind == "rbind", ..Self::default() };
        for word in words {
            options.read(word)?;
        }
        if options.bind && !options.data.is_empty() {
            // A bind mount has no file system of its own to read them; runc, too, drops them.
            options.data.clear();
        }
        Ok(options)
    }

    fn read(&mut self, word: &str) -> Result<()> {
        match word {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive_bind) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            "" => {}
            _ if NOTHING.contains(&word) => {}
            _ if self.read_attribute(word, false) => {}
            _ if word.strip_prefix('r').is_some_and(|rest| self.read_attribute(rest, true)) => {}
            _ if self.read_propagation(word) => {}
            _ => match FLAGS.iter().find(|flag| **flag == word) {
                Some(flag) => self.flags.push(flag),
                None => self.data.push(word.to_owned()),
            },
        }
        if word.contains('\0') {
            return refuse(format!("mount option {word:?} has a NUL byte"));
        }
        Ok(())
    }

    fn read_attribute(&mut self, word: &str, recursive: bool) -> bool {
        let Some((name, attribute, on)) = ATTRIBUTES.iter().find(|(name, ..)| *name == word) else { return false };
        let (set, clear) = if recursive { (&mut self.set_recursive, &mut self.clear_recursive) } else { (&mut self.set, &mut self.clear) };
        let is_time = attribute & attr::ATIME_MASK != 0 || name.ends_with("relatime");
        if is_time {
            // One field with three values: any word about it clears the field, and sets its value.
            *set &= !attr::ATIME_MASK;
            *clear |= attr::ATIME_MASK;
            if *on {
                *set |= attribute;
            }
        } else if *on {
            *set |= attribute;
            *clear &= !attribute;
        } else {
            *set &= !attribute;
            *clear |= attribute;
        }
        true
    }

    fn read_propagation(&mut self, word: &str) -> bool {
        let find = |name: &str| PROPAGATIONS.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
        let found = find(word).map(|flag| (flag, false)).or_else(|| Some((find(word.strip_prefix('r')?)?, true)));
        if let Some(found) = found {
            self.propagation.push(found);
        }
        found.is_some()
    }
}

/// The propagation of a word such as `rslave`, and whether it is for all mounts below.
pub fn propagation(word: &str) -> Option<(u64, bool)> {
    let mut options = Options::default();
    options.read_propagation(word).then(|| options.propagation[0])
}

/// All words that are known, for `features`.
pub fn known() -> Vec<String> {
    let mut words: Vec<String> = ["bind", "rbind", "tmpcopyup", "idmap", "ridmap"].map(str::to_owned).into();
    for (name, ..) in &ATTRIBUTES {
        words.push((*name).to_owned());
        words.push(format!("r{name}"));
    }
    for (name, _) in &PROPAGATIONS {
        words.push((*name).to_owned());
        words.push(format!("r{name}"));
    }
    words.extend(FLAGS.iter().chain(&NOTHING).map(|word| (*word).to_owned()));
    words.sort();
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: &str, words: &str) -> Options {
        let words: Vec<String> = words.split(',').map(str::to_owned).collect();
        Options::parse(kind, &words).expect("valid options")
    }

    #[test]
    fn words() {
        let options = parse("tmpfs", "nosuid,strictatime,mode=755,size=65536k,ro,rw");
        assert_eq!(options.set, attr::NOSUID | attr::STRICTATIME);
        assert_eq!(options.clear, attr::ATIME_MASK | attr::RDONLY);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        let options = parse("none", "rbind,rro,rprivate,slave");
        assert!(options.bind && options.recursive_bind);
        assert_eq!(options.set_recursive, attr::RDONLY);
        assert_eq!(options.propagation, [(linux::mount::flags::MS_PRIVATE, true), (linux::mount::flags::MS_SLAVE, false)]);
        assert_eq!(propagation("rshared"), Some((linux::mount::flags::MS_SHARED, true)));
        assert_eq!(propagation("rrshared"), None);
        assert_eq!(parse("proc", "relatime").clear, attr::ATIME_MASK);
        assert_eq!(parse("proc", "sync").flags, ["sync"]);
    }
}
