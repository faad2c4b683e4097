//! One boot of Debian's kernel in QEMU, whose only cgroups are those of v2: this machine's own root, read-only by virtiofs, is its root too.
//!
//! Nothing is built for it and nothing is copied: a test's executable runs there by the path that it has here, with the same libraries,
//! peers and programs. QEMU emulates the processors (TCG), so that it runs wherever these tests do.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::sh;

/// Until the guest's first line; a quiet machine needs about 10 s.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);

/// For one executable; the guest's own `timeout` ends it.
const EXECUTABLE_SECONDS: u64 = 600;

/// For everything.
const PATIENCE: Duration = Duration::from_secs(1800);

/// How many of the console's last lines an error shows.
const TAIL_LINES: usize = 60;

/// What a guest's own lines begin with.
const MARK: &str = "GUEST ";

/// Between QEMU and virtiofsd, relative to the directory that both run in: a path of a socket has 108 bytes at most.
const SOCKET: &str = "root.sock";

/// Where virtiofsd can be: Debian 12 has it beside QEMU, later ones in a package of its own.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// An executable to run in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// What its lines are counted for.
    pub suite: String,
    /// Its path.
    pub executable: PathBuf,
    /// Where it runs.
    pub directory: PathBuf,
}

/// What the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The guest's kernel is of this release.
    Kernel(String),
    /// The next lines are of the program with this index.
    Begin(usize),
    /// A line of a program, or of the kernel.
    Text(String),
    /// The program has ended with this status.
    End(usize, i32),
}

impl Line {
    fn parse(line: &str) -> Option<Line> {
        let mut words = line.strip_prefix(MARK)?.split(' ');
        let (word, first) = (words.next()?, words.next()?);
        match word {
            "kernel" => Some(Line::Kernel(first.to_owned())),
            "begin" => Some(Line::Begin(first.parse().ok()?)),
            "end" => Some(Line::End(first.parse().ok()?, words.next()?.parse().ok()?)),
            _ => None,
        }
    }
}

/// What a boot needs.
#[derive(Clone, Debug)]
pub struct Guest {
    kernel: PathBuf,
    virtiofsd: PathBuf,
}

impl Guest {
    /// Finds QEMU, virtiofsd and the kernel, which `setup` keeps among the peers; an error says what is missing.
    pub fn find(peers: Option<&Path>) -> Result<Guest> {
        let kernel = peers.map(|peers| peers.join("vmlinuz")).filter(|path| path.exists()).context("there is no kernel for the guest")?;
        let virtiofsd = VIRTIOFSD.iter().map(PathBuf::from).find(|path| path.exists()).context("there is no virtiofsd")?;
        if !sh::on_path("qemu-system-x86_64") {
            bail!("there is no qemu-system-x86_64");
        }
        Ok(Guest { kernel, virtiofsd })
    }

    /// Boots, runs the programs with these arguments one after the other, and hands every line on. `scratch` is a directory for what the boot needs.
    ///
    /// # Errors
    /// When it does not boot, dies, or is not done in time: with the end of its console.
    pub fn run(
        &self,
        scratch: &Path,
        programs: &[Program],
        variables: &[(&str, &Path)],
        arguments: &[&str],
        mut take: impl FnMut(Line),
    ) -> Result<()> {
        let _ = fs::remove_dir_all(scratch);
        fs::create_dir_all(scratch).with_context(|| format!("failed to make {}", scratch.display()))?;
        let script = scratch.join("init");
        fs::write(&script, init(programs, variables, arguments)).context("failed to write the guest's init")?;
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).context("failed to make init executable")?;
        let _root = self.serve_root(scratch)?;
        let mut machine = Ended(self.boot(scratch, &script)?);
        let lines = lines_of(&mut machine.0)?;
        follow(&lines, &mut take)
    }

    /// Serves this machine's root, which is read-only to virtiofsd itself: but for its socket and a /run of its own (for its lock) it can
    /// change nothing.
    fn serve_root(&self, scratch: &Path) -> Result<Ended> {
        let serve =
            "mount --bind \"$1\" \"$1\" && mount -t tmpfs tmpfs /run && mount -o remount,bind,ro / && cd \"$1\" && shift && exec \"$@\"";
        let mut command = dies_with_us("unshare");
        command.args(["--mount", "sh", "-c", serve, "sh"]).arg(scratch).arg(&self.virtiofsd);
        command.arg(format!("--socket-path={SOCKET}")).args(["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"]);
        command.args(["--rlimit-nofile=0", "-o", "log_level=err"]);
        let log = fs::File::create(scratch.join("virtiofsd.log")).context("failed to make virtiofsd's log")?;
        let mut child = Ended(command.stdin(Stdio::null()).stderr(log).spawn().context("failed to run virtiofsd")?);
        let deadline = Instant::now() + BOOT_PATIENCE;
        while !scratch.join(SOCKET).exists() {
            let ended = child.0.try_wait().context("failed to look for virtiofsd")?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("virtiofsd does not serve: {}", fs::read_to_string(scratch.join("virtiofsd.log")).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(child)
    }

    fn boot(&self, scratch: &Path, init: &Path) -> Result<Child> {
        let mut command = dies_with_us("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        // One processor: with two threads of TCG one can run what the other has just patched. The kernel patches itself whenever the first
        // device program comes and the last one goes, and died of it.
        command.args(["-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1", "-m", MEMORY]);
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY},share=on")]);
        command.args(["-chardev", &format!("socket,id=root,path={SOCKET}")]);
        command.args(["-device", "vhost-user-fs-pci,chardev=root,tag=root"]);
        command.args(["-chardev", "stdio,id=console", "-serial", "chardev:console"]);
        command.arg("-kernel").arg(&self.kernel);
        // A panic, which tells all, and a reboot end QEMU. The kernel's other lines would stand in the midst of the tests'.
        let words =
            "console=ttyS0 loglevel=1 panic=-1 reboot=t root=root rootfstype=virtiofs ro no_timer_check rcupdate.rcu_cpu_stall_suppress=1";
        command.arg("-append").arg(format!("{words} init={}", init.display()));
        command.current_dir(scratch).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("failed to run QEMU")
    }
}

/// The guest's memory: what the tests need (the largest fills 64 MiB) and the cache of the host's files.
const MEMORY: &str = "768M";

/// A program that is ended when this process is, even by SIGKILL.
fn dies_with_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// A process that is ended, and waited for, with its handle.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The console's lines; the channel is closed when QEMU ends.
fn lines_of(machine: &mut Child) -> Result<Receiver<String>> {
    let console = machine.stdout.take().context("QEMU has no stdout")?;
    let (sender, receiver) = sync_channel(1024);
    std::thread::spawn(move || {
        // Neither programs nor the kernel promise UTF-8.
        let mut reader = BufReader::new(console);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

fn follow(lines: &Receiver<String>, take: &mut impl FnMut(Line)) -> Result<()> {
    let begun = Instant::now();
    let (mut tail, mut up, mut done) = (Vec::new(), false, false);
    let show = |tail: &[String]| tail[tail.len().saturating_sub(TAIL_LINES)..].join("\n");
    loop {
        let patience = if up { PATIENCE } else { BOOT_PATIENCE };
        let line = match lines.recv_timeout(patience.saturating_sub(begun.elapsed())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest is not {} after {} s; its console:\n{}", if up { "done" } else { "up" }, patience.as_secs(), show(&tail));
            }
            Err(RecvTimeoutError::Disconnected) if done => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest died; its console:\n{}", show(&tail)),
        };
        match line.strip_prefix(MARK) {
            Some("up") => {
                up = true;
                eprintln!("    guest: up after {:.0} s", begun.elapsed().as_secs_f64());
            }
            Some("done") => done = true,
            _ => take(Line::parse(&line).unwrap_or_else(|| Line::Text(line.clone()))),
        }
        tail.push(line);
        if tail.len() > 4 * TAIL_LINES {
            tail.drain(..3 * TAIL_LINES);
        }
    }
}

/// Where the guest's temporary files can be: an empty file system lies over it there, which must not hide what is run.
const TEMPORARY: [&str; 3] = ["/tmp", "/mnt", "/srv"];

/// The first process of the guest.
fn init(programs: &[Program], variables: &[(&str, &Path)], arguments: &[&str]) -> String {
    let quote = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let paths = || programs.iter().map(|program| program.executable.as_path()).chain(variables.iter().map(|(_, path)| *path));
    let temporary = TEMPORARY.into_iter().find(|dir| !paths().any(|path| path.starts_with(dir))).unwrap_or("/opt");
    let mut script = include_str!("guest.sh").to_owned();
    script += &format!("mount -t tmpfs tmpfs {temporary}\nexport TMPDIR={temporary}\necho '{MARK}up'\necho \"{MARK}kernel $(uname -r)\"\n");
    for (name, value) in variables {
        script += &format!("export {name}={}\n", quote(&value.display().to_string()));
    }
    let arguments = arguments.iter().map(|argument| quote(argument)).collect::<Vec<_>>().join(" ");
    for (index, program) in programs.iter().enumerate() {
        let [directory, executable] = [&program.directory, &program.executable].map(|path| quote(&path.display().to_string()));
        script += &format!(
            "echo '{MARK}begin {index}'\ncd {directory}; timeout -s KILL {EXECUTABLE_SECONDS} {executable} {arguments} 2>&1\n\
             echo \"{MARK}end {index} $?\"\n"
        );
    }
    script + &format!("echo '{MARK}done'\necho b > /proc/sysrq-trigger\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_lines_are_told_from_those_of_programs() {
        assert_eq!(Line::parse("GUEST kernel 6.12.1-x"), Some(Line::Kernel("6.12.1-x".to_owned())));
        assert_eq!(Line::parse("GUEST begin 3"), Some(Line::Begin(3)));
        assert_eq!(Line::parse("GUEST end 3 101"), Some(Line::End(3, 101)));
        assert_eq!(Line::parse("test a ... ok"), None);
    }

    #[test]
    fn a_guest_that_dies_or_hangs_is_an_error_with_its_last_words() {
        let (sender, lines) = sync_channel(8);
        for line in ["GUEST up", "GUEST begin 0", "hello", "Kernel panic"] {
            sender.send(line.to_owned()).expect("room");
        }
        drop(sender);
        let mut taken = Vec::new();
        let error = follow(&lines, &mut |line| taken.push(line)).expect_err("it was not done");
        assert!(error.to_string().ends_with("hello\nKernel panic"), "{error}");
        assert_eq!(taken[0], Line::Begin(0));
    }

    #[test]
    fn words_of_the_script_are_quoted() {
        let program = Program { suite: "s".into(), executable: "/a b/c'd".into(), directory: "/".into() };
        let script = init(&[program], &[("A", Path::new("/tmp/x y"))], &["a", "b c"]);
        assert!(script.contains(r"'/a b/c'\''d' 'a' 'b c' 2>&1") && script.contains("export A='/tmp/x y'\n"), "{script}");
        assert!(script.contains("export TMPDIR=/mnt\n"), "an empty /tmp would hide what is below it: {script}");
    }
}
