//! Power cuts for any program: strace writes down what it does to its files, and that is played back up to any moment, with any of what was not
//! synced by then: writes torn at 512 bytes, lengths without data, names and attributes whose directory or file was not synced.
//!
//! ```text
//! program --strace--> calls (trace.rs) --> steps on a model (tree.rs) --cut, seed--> a directory as the next start finds it
//! ```
//!
//! What a sync covers is as POSIX has it: a file's or directory's own content and attributes, begun after them; nothing else but `syncfs`.
//! At the end of the recording the model must be what is really on disk: a call that was misread is found.

mod trace;
mod tree;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tree::{Inode, ROOT, Tree};
pub use tree::{describe, describe_below};

/// How long strace may take to be there.
const ATTACH: Duration = Duration::from_secs(60);
/// Calls that change files, and those that make it impossible to see how. A name that this machine's kernel lacks is passed over.
const CALLS: &str = "trace=?open,?creat,openat,openat2,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,splice,fallocate,truncate,\
ftruncate,?rename,?renameat,renameat2,?link,linkat,?unlink,unlinkat,?rmdir,?mkdir,mkdirat,?symlink,symlinkat,?mknod,mknodat,?chmod,fchmod,fchmodat,\
?fchmodat2,?chown,?lchown,fchown,fchownat,setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,fremovexattr,fsync,fdatasync,sync,syncfs,io_uring_setup";

/// One change, or what makes changes durable.
#[derive(Clone, Debug)]
enum Effect {
    /// An inode that nothing names yet, with its first attributes.
    Make {
        inode: Inode,
        node: tree::Node,
    },
    /// A name comes, changes or goes.
    Name {
        dir: Inode,
        name: Vec<u8>,
        inode: Option<Inode>,
    },
    Rename {
        from: (Inode, Vec<u8>),
        to: (Inode, Vec<u8>),
        inode: Inode,
    },
    Write {
        inode: Inode,
        offset: usize,
        bytes: Vec<u8>,
    },
    SetLength {
        inode: Inode,
        length: usize,
    },
    SetMode {
        inode: Inode,
        mode: u32,
    },
    SetOwner {
        inode: Inode,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    SetXattr {
        inode: Inode,
        name: Vec<u8>,
        value: Option<Vec<u8>>,
    },
    Sync {
        inode: Inode,
    },
    SyncAll,
    /// What the test says here.
    Mark(String),
}

/// An effect, and between which lines of the trace it happened.
#[derive(Clone, Debug)]
struct Step {
    began: usize,
    ended: usize,
    effect: Effect,
}

/// Writes down what this process and its children do below a directory.
#[derive(Debug)]
pub struct Recorder {
    strace: Child,
    root: PathBuf,
    trace: PathBuf,
    marks: File,
    marks_path: PathBuf,
}

impl Recorder {
    /// Begins. `root` must be empty, `scratch` elsewhere. Threads must be made after this. `None`, told on stderr, where there is no strace.
    ///
    /// # Errors
    /// When strace does not attach.
    pub fn attach(test: &str, root: &Path, scratch: &Path) -> io::Result<Option<Self>> {
        if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
            eprintln!("SKIPPED: {test}: no strace");
            return Ok(None);
        }
        let (trace, marks_path) = (scratch.join("trace"), scratch.join("marks"));
        let marks = File::create(&marks_path)?;
        let mut command = Command::new("strace");
        command.args(["-f", "-q", "-y", "-xx", "-s", "16777216", "-e", "signal=none", "-e", CALLS, "-o"]).arg(&trace);
        let mut strace = command.args(["-p", &std::process::id().to_string()]).spawn()?;
        let end = Instant::now() + ATTACH;
        while !std::fs::read_to_string("/proc/self/status")?.contains(&format!("TracerPid:\t{}", strace.id())) {
            if let Some(status) = strace.try_wait()? {
                return Err(io::Error::other(format!("strace ended with {status}")));
            }
            if Instant::now() > end {
                return Err(io::Error::other("strace does not attach"));
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        Ok(Some(Self { strace, root: root.to_owned(), trace, marks, marks_path }))
    }

    /// Notes that something was acknowledged.
    ///
    /// # Errors
    /// `write(2)`'s.
    pub fn mark(&self, text: &str) -> io::Result<()> {
        (&self.marks).write_all(text.as_bytes())
    }

    /// Ends the recording.
    ///
    /// # Errors
    /// A trace that cannot be understood, or that does not explain what is on disk.
    pub fn finish(mut self) -> io::Result<Tape> {
        // It detaches.
        linux::process::kill(i32::try_from(self.strace.id()).map_err(io::Error::other)?, 15).map_err(io::Error::other)?;
        self.strace.wait()?;
        let text = std::fs::read_to_string(&self.trace)?;
        let tape = Tape { steps: trace::steps(&text, &self.root, &self.marks_path)? };
        let (played, found) = (tape.whole().describe(), describe(&self.root)?);
        let differs = |(path, what): &(&PathBuf, &String)| found.get(*path) != Some(*what);
        if let Some((path, what)) = played.iter().find(differs) {
            return Err(io::Error::other(format!("{} is {:?}, by the trace {what:?}", path.display(), found.get(path))));
        }
        match found.keys().find(|path| !played.contains_key(*path)) {
            Some(path) => Err(io::Error::other(format!("the trace does not tell of {}", path.display()))),
            None => Ok(tape),
        }
    }
}

/// A recording.
#[derive(Clone, Debug)]
pub struct Tape {
    steps: Vec<Step>,
}

/// What is on disk after a power cut.
#[derive(Clone, Debug)]
pub struct Cut {
    tree: Tree,
    /// What was marked before it.
    pub marks: Vec<String>,
    /// What was marked next, if anything was.
    pub next: Option<String>,
    /// After which step it came.
    pub step: usize,
}

impl Tape {
    /// How many changes there were: so many moments there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether nothing was recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// How many syncs there were.
    #[must_use]
    pub fn syncs(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step.effect, Effect::Sync { .. } | Effect::SyncAll)).count()
    }

    /// The same, as a program would have done it that never synced: what the judge must find wrong.
    #[must_use]
    pub fn without_syncs(&self) -> Self {
        let keep = |step: &&Step| !matches!(step.effect, Effect::Sync { .. } | Effect::SyncAll);
        Self { steps: self.steps.iter().filter(keep).cloned().collect() }
    }

    fn whole(&self) -> Cut {
        let mut tree = Tree::default();
        self.steps.iter().for_each(|step| tree.apply(&step.effect, |_| true));
        Cut { tree, marks: Vec::new(), next: None, step: self.steps.len() }
    }

    /// The disk after a power cut at step `step` (modulo their number). The seed chooses what is there of what was not synced.
    #[must_use]
    pub fn cut(&self, step: usize, seed: u64) -> Cut {
        let step = step % (self.steps.len() + 1);
        let now = self.steps.get(..step).and_then(<[Step]>::last).map_or(0, |step| step.ended);
        let mut random = Random::new(seed);
        // How much of the rest is there differs from cut to cut: nothing, all, and everything between.
        let share = [0, 20, 50, 90, 100][random.below(5)];
        let mut synced: BTreeMap<Inode, usize> = BTreeMap::new();
        let mut all = 0;
        let (mut marks, mut next) = (Vec::new(), None);
        for (at, played) in self.steps.iter().enumerate() {
            match &played.effect {
                Effect::Sync { inode } if at < step => drop(synced.insert(*inode, played.began)),
                Effect::SyncAll if at < step => all = played.began,
                Effect::Mark(text) if at < step => marks.push(text.clone()),
                Effect::Mark(text) if next.is_none() && at >= step => next = Some(text.clone()),
                _ => {}
            }
        }
        let covered = |inode: Inode, ended: usize| ended < all.max(synced.get(&inode).copied().unwrap_or(0));
        let mut tree = Tree::default();
        for (at, played) in self.steps.iter().enumerate() {
            // What was under way at the cut may have reached the disk as well.
            if at >= step && played.began > now {
                continue;
            }
            let durable = played.effect.holders().is_some_and(|holders| holders.iter().all(|inode| covered(*inode, played.ended)));
            tree.apply(&played.effect, |_| durable || random.below(100) < share);
        }
        Cut { tree, marks, next, step }
    }
}

impl Effect {
    /// The inodes whose sync makes it durable; `None` for what is no content of anything.
    fn holders(&self) -> Option<Vec<Inode>> {
        Some(match self {
            Self::Name { dir, .. } => vec![*dir],
            Self::Rename { from, to, .. } => vec![from.0, to.0],
            Self::Write { inode, .. }
            | Self::SetLength { inode, .. }
            | Self::SetMode { inode, .. }
            | Self::SetOwner { inode, .. }
            | Self::SetXattr { inode, .. } => vec![*inode],
            Self::Make { .. } | Self::Sync { .. } | Self::SyncAll | Self::Mark(_) => return None,
        })
    }
}

impl Cut {
    /// Writes it into an empty directory.
    ///
    /// # Errors
    /// Those of making files; only root may make devices and give files away.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        self.tree.write_to(ROOT, dir, &mut BTreeMap::new())
    }

    /// All that is there, by path.
    #[must_use]
    pub fn describe(&self) -> BTreeMap<PathBuf, String> {
        self.tree.describe()
    }
}

/// Numbers of a seed (splitmix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one, below `limit` (0 for a limit of 0).
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit.max(1) as u64).unwrap_or(0)
    }
}
