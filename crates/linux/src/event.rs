//! Event sources of a single-threaded loop: epoll, signalfd, timerfd, eventfd.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;

/// What a descriptor is watched for. Hang-up and error are always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(epoll::EventFlags);

impl Interest {
    /// Nothing but hang-up and error.
    pub const HANGUP: Self = Self(epoll::EventFlags::ET);
    /// Readable, level-triggered.
    pub const READ: Self = Self(epoll::EventFlags::IN);
    /// Readable, told once for each arrival of data.
    pub const READ_EDGE: Self = Self(epoll::EventFlags::IN.union(epoll::EventFlags::ET));
    /// Writable, told once for each time that room appears.
    pub const WRITE_EDGE: Self = Self(epoll::EventFlags::OUT.union(epoll::EventFlags::ET));
    /// Both, each told once.
    pub const BOTH_EDGE: Self = Self(epoll::EventFlags::IN.union(epoll::EventFlags::OUT).union(epoll::EventFlags::ET));
    /// Exceptional condition (kernfs' change notification), told once for each.
    pub const PRIORITY_EDGE: Self = Self(epoll::EventFlags::PRI.union(epoll::EventFlags::ET));
}

/// What happened to the descriptor of `token`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// The value given to [`Epoll::add`].
    pub token: u64,
    /// There is something to read, or the end.
    pub read: bool,
    /// There is room to write.
    pub write: bool,
    /// The other side is gone, or the descriptor is in error.
    pub hangup: bool,
    /// An exceptional condition.
    pub priority: bool,
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes an instance, closed on exec.
    ///
    /// # Errors
    /// `epoll_create1(2)`'s.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `fd`.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s; EPERM for regular files.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(token), interest.0)?)
    }

    /// Changes what `fd` is watched for.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, epoll::EventData::new_u64(token), interest.0)?)
    }

    /// Watches `fd` no more. A descriptor that another process or number shares must be taken out before it is closed.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s.
    pub fn delete(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for at least one event, at most for `timeout` (`None`: for ever), and appends what there is to `out`.
    ///
    /// # Errors
    /// `epoll_wait(2)`'s but EINTR, which is answered with no events.
    pub fn wait(&self, timeout: Option<Duration>, out: &mut Vec<Ready>) -> io::Result<()> {
        let timeout = match timeout {
            None => None,
            Some(time) => Some(rustix::event::Timespec::try_from(time).map_err(io::Error::other)?),
        };
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); 32];
        let events = match epoll::wait(&self.0, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        out.extend(events.iter().map(|event| {
            let flags = event.flags;
            Ready {
                token: event.data.u64(),
                read: flags.contains(epoll::EventFlags::IN),
                write: flags.contains(epoll::EventFlags::OUT),
                hangup: flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
                priority: flags.contains(epoll::EventFlags::PRI),
            }
        }));
        Ok(())
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Signals as a descriptor.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks the signals for this thread and opens a non-blocking descriptor that tells of them.
    ///
    /// # Errors
    /// `signalfd(2)`'s.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset makes the set whole before it is used; sigaddset and sigprocmask only read and write it.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just answered this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of the next signal that came, if any.
    ///
    /// # Errors
    /// `read(2)`'s but EAGAIN.
    pub fn read(&self) -> io::Result<Option<i32>> {
        let mut buffer = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut buffer) {
            Ok(_) => Ok(buffer.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes))),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A counter that the kernel raises (cgroup v1's notifications).
///
/// # Errors
/// `eventfd(2)`'s.
pub fn eventfd() -> io::Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Asks cgroup v1 to raise `event` when memory runs out in the cgroup at `dir` (`cgroups-v1/memory.rst`, section 10).
///
/// # Errors
/// Opening `memory.oom_control` or `cgroup.event_control`, or writing the latter.
pub fn watch_oom_v1(dir: &std::path::Path, event: BorrowedFd<'_>) -> io::Result<()> {
    let control = std::fs::File::open(dir.join("memory.oom_control"))?;
    std::fs::write(dir.join("cgroup.event_control"), format!("{} {}", event.as_raw_fd(), control.as_raw_fd()))
}
