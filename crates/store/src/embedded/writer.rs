//! The writer thread: takes what waits, evaluates it in order, writes one frame, syncs once, publishes, answers.
//!
//! ```text
//!            ┌───────────── wait (until the next lease ends) <────────────┐
//!            v                                                            │
//! collect ─> evaluate ─> write frame ─> fdatasync ─> publish ─> answer ───┤
//!                            │  failed: undo, answer the error ───────────┘
//!                            └─ fsync failed: refuse everything from now on
//! ```

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::log::{AppendError, Log};
use super::record::Record;
use super::watch::Signal;
use super::{Shared, txn};
use crate::{Error, LeaseInfo, Txn, TxnResponse};

/// Commands that may wait.
pub(crate) const QUEUE_MAX: usize = 1024;
/// When the end of a lease that the disk refused is tried again.
const LEASE_RETRY: Duration = Duration::from_secs(1);
/// A batch is closed once its frame is this large.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Records of a rewritten log per frame.
const REWRITE_FRAME_BYTES: usize = 1 << 20;

/// Where an answer goes; gives its place in the queue back when dropped.
#[derive(Debug)]
pub(crate) struct Reply<T> {
    pub(crate) sender: oneshot::Sender<Result<T, Error>>,
    pub(crate) _permit: OwnedSemaphorePermit,
}

impl<T> Reply<T> {
    fn send(self, answer: Result<T, Error>) {
        // Whoever asked may have gone; the effect stands all the same.
        let _ = self.sender.send(answer);
    }
}

/// What the thread is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    Txn(Txn, Reply<TxnResponse>),
    Compact(i64, Reply<()>),
    LeaseGrant {
        id: i64,
        ttl_seconds: i64,
        reply: Reply<LeaseInfo>,
    },
    /// Without a reply: the lease has expired.
    LeaseRevoke {
        id: i64,
        reply: Option<Reply<()>>,
    },
}

/// A log being rewritten by a thread of its own.
struct Rewrite {
    /// Where in the old log the frames start that the new one lacks.
    from: u64,
    done: mpsc::Receiver<Result<Log, Error>>,
}

pub(crate) struct Writer {
    dir: PathBuf,
    _lock: File,
    log: Log,
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Command>,
    /// A command taken off the queue that does not belong to the batch.
    carried: Option<Command>,
    failed: Option<Error>,
    rewrite: Option<Rewrite>,
    next_compaction: Option<Instant>,
    /// The revision of one interval ago, which is the next to be compacted.
    compact_at: i64,
}

impl Writer {
    pub(crate) fn new(dir: PathBuf, lock: File, log: Log, shared: Arc<Shared>, queue: mpsc::Receiver<Command>) -> Self {
        let compact_at = shared.read().visible;
        let next_compaction = shared.options.compaction_interval.map(|interval| Instant::now() + interval);
        Self { dir, _lock: lock, log, shared, queue, carried: None, failed: None, rewrite: None, next_compaction, compact_at }
    }

    /// Runs until every handle is gone and the queue is empty.
    pub(crate) fn run(mut self) {
        loop {
            match self.wait() {
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.expire_leases();
            self.compact_by_time();
            self.finish_rewrite();
        }
        if let Some(rewrite) = self.rewrite.take() {
            // Let the thread end before the lock is released; what it wrote is removed at the next start.
            let _ = rewrite.done.recv();
        }
        self.shared.signal.send_modify(|signal| signal.closed = true);
    }

    fn wait(&mut self) -> Result<Command, RecvTimeoutError> {
        if let Some(command) = self.carried.take() {
            return Ok(command);
        }
        let lease = self.shared.read().leases.next_deadline();
        let rewrite = self.rewrite.as_ref().map(|_| Instant::now() + Duration::from_millis(50));
        let deadline = [lease, rewrite, self.next_compaction].into_iter().flatten().min();
        match deadline {
            // A failed store has nothing to do by time.
            Some(deadline) if self.failed.is_none() => self.queue.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            _ => self.queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Txn(txn, reply) => self.commit_batch(txn, reply),
            Command::Compact(revision, reply) => {
                let answer = self.compact(revision);
                reply.send(answer);
            }
            Command::LeaseGrant { id, ttl_seconds, reply } => {
                let answer = self.grant(id, ttl_seconds);
                reply.send(answer);
            }
            Command::LeaseRevoke { id, reply } => {
                let answer = self.revoke(id);
                match reply {
                    Some(reply) => reply.send(answer),
                    None => {
                        if let Err(error) = answer {
                            tracing::error!(
                                lease = id,
                                error = &error as &dyn std::error::Error,
                                "failed to end an expired lease; trying again"
                            );
                            self.shared.write().leases.postpone(id, Instant::now() + LEASE_RETRY);
                        }
                    }
                }
            }
        }
    }

    fn commit_batch(&mut self, txn: Txn, reply: Reply<TxnResponse>) {
        let mut next = Some((txn, reply));
        let mut records = Vec::new();
        let mut payload = Vec::new();
        let mut answers = Vec::new();
        while let Some((txn, reply)) = next.take() {
            let answer = match &self.failed {
                // Reads within transactions are still good: they only show what is durable.
                Some(error) if txn::may_write(&txn) => Err(error.clone()),
                _ => {
                    let from = records.len();
                    let answer = txn::evaluate(&mut self.shared.write(), &txn, &mut records);
                    records[from..].iter().for_each(|record: &Record| record.encode(&mut payload));
                    answer
                }
            };
            answers.push((reply, answer));
            if payload.len() >= BATCH_BYTES_MAX || answers.len() >= QUEUE_MAX {
                break;
            }
            match self.queue.try_recv() {
                Ok(Command::Txn(txn, reply)) => next = Some((txn, reply)),
                Ok(other) => self.carried = Some(other),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
        }
        let durable = self.make_durable(&records, &payload);
        for (reply, answer) in answers {
            reply.send(durable.clone().and(answer));
        }
    }

    /// Writes, syncs and publishes records that are applied already, or undoes them.
    fn make_durable(&mut self, records: &[Record], payload: &[u8]) -> Result<(), Error> {
        if records.is_empty() {
            return Ok(());
        }
        self.append(payload).inspect_err(|_| self.shared.write().undo())?;
        let visible = {
            let mut state = self.shared.write();
            state.publish(records);
            state.visible
        };
        self.shared.signal.send_modify(|signal| signal.visible = visible);
        Ok(())
    }

    fn append(&mut self, payload: &[u8]) -> Result<(), Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let written = self.log.write(payload).and_then(|()| self.log.sync());
        self.shared.syncs.fetch_add(1, Ordering::Relaxed);
        written.map_err(|error| match error {
            AppendError::Undone(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a write was refused by the disk");
                error
            }
            AppendError::Fatal(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the store takes no more writes");
                self.failed = Some(Error::Failed { path: self.log.path().to_owned() });
                error
            }
        })
    }

    fn append_one(&mut self, record: &Record) -> Result<(), Error> {
        let mut payload = Vec::new();
        record.encode(&mut payload);
        self.append(&payload)
    }

    fn compact(&mut self, revision: i64) -> Result<(), Error> {
        let (visible, compacted) = {
            let state = self.shared.read();
            (state.visible, state.compacted)
        };
        if revision <= compacted {
            return Err(Error::Compacted { revision, compact_revision: compacted });
        }
        if revision > visible {
            return Err(Error::FutureRevision { revision, current: visible });
        }
        self.append_one(&Record::Compact { revision })?;
        self.shared.write().compact(revision);
        self.start_rewrite();
        Ok(())
    }

    fn grant(&mut self, id: i64, ttl_seconds: i64) -> Result<LeaseInfo, Error> {
        if self.shared.read().leases.contains(id) {
            return Err(Error::LeaseExists { id });
        }
        self.append_one(&Record::LeaseGrant { id, ttl_seconds })?;
        let mut state = self.shared.write();
        state.leases.grant(id, ttl_seconds);
        state.leases.keepalive(id, Instant::now())
    }

    fn revoke(&mut self, id: i64) -> Result<(), Error> {
        let mut records = Vec::new();
        {
            let mut state = self.shared.write();
            if !state.leases.contains(id) {
                return Err(Error::LeaseNotFound { id });
            }
            let keys = state.leases.keys(id);
            txn::delete_keys(&mut state, keys, &mut records);
        }
        records.push(Record::LeaseRevoke { id });
        let mut payload = Vec::new();
        records.iter().for_each(|record| record.encode(&mut payload));
        self.make_durable(&records, &payload)
    }

    fn expire_leases(&mut self) {
        if self.failed.is_some() {
            return;
        }
        let now = Instant::now();
        if self.shared.read().leases.next_deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let expired = self.shared.write().leases.tick(now);
        for id in expired {
            self.handle(Command::LeaseRevoke { id, reply: None });
        }
    }

    fn compact_by_time(&mut self) {
        let Some(interval) = self.shared.options.compaction_interval else {
            return;
        };
        let now = Instant::now();
        if self.failed.is_some() || self.next_compaction.is_none_or(|next| next > now) {
            return;
        }
        self.next_compaction = Some(now + interval);
        let (visible, compacted) = {
            let state = self.shared.read();
            (state.visible, state.compacted)
        };
        if self.compact_at > compacted
            && let Err(error) = self.compact(self.compact_at)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "compaction failed; trying again later");
        }
        self.compact_at = visible;
    }

    /// Starts to write what is live into a new log, where the old one is mostly garbage.
    fn start_rewrite(&mut self) {
        let state = self.shared.read();
        let large = self.shared.options.rewrite_bytes_min.max(2 * state.live_bytes);
        if self.rewrite.is_some() || self.log.length() <= large {
            return;
        }
        let records = state.snapshot();
        drop(state);
        let (sender, done) = mpsc::sync_channel(1);
        let dir = self.dir.clone();
        let spawned = std::thread::Builder::new().name("store-rewrite".to_owned()).spawn(move || {
            // The writer waits for the answer for as long as it lives.
            let _ = sender.send(write_snapshot(&dir, records));
        });
        match spawned {
            Ok(_) => self.rewrite = Some(Rewrite { from: self.log.length(), done }),
            Err(error) => {
                tracing::warn!(%error, "failed to start a thread that rewrites the log; trying again later")
            }
        }
    }

    fn finish_rewrite(&mut self) {
        let Some(rewrite) = &self.rewrite else { return };
        let written = match rewrite.done.try_recv() {
            Ok(written) => written,
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => {
                self.rewrite = None;
                return;
            }
        };
        let from = rewrite.from;
        self.rewrite = None;
        if self.failed.is_some() {
            return;
        }
        let replaced = written.and_then(|mut new| {
            new.copy_tail(&self.log, from)?;
            let before = self.log.length();
            match new.become_current(&self.dir) {
                Ok(()) => {
                    tracing::debug!(before, after = new.length(), "rewrote the log");
                    self.log = new;
                    Ok(())
                }
                // After the rename the old log is gone from the directory, whatever the sync said.
                Err(error) => {
                    if new.path().file_name() == self.log.path().file_name() {
                        self.failed = Some(Error::Failed { path: self.log.path().to_owned() });
                    }
                    Err(error)
                }
            }
        });
        if let Err(error) = replaced {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to rewrite the log; the old one stays");
        }
    }
}

/// Writes a whole state into a new log, in frames of bounded size, and syncs it.
fn write_snapshot(dir: &std::path::Path, records: Vec<Record>) -> Result<Log, Error> {
    let undone = |error| match error {
        AppendError::Undone(error) | AppendError::Fatal(error) => error,
    };
    let mut log = Log::create(dir)?;
    let mut payload = Vec::new();
    for record in records {
        record.encode(&mut payload);
        if payload.len() >= REWRITE_FRAME_BYTES {
            log.write(&payload).map_err(undone)?;
            payload.clear();
        }
    }
    log.write(&payload).map_err(undone)?;
    log.sync().map_err(undone)?;
    Ok(log)
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Also after a panic: watchers must not wait for ever.
        self.shared.signal.send_modify(|signal: &mut Signal| signal.closed = true);
    }
}
