//! Evaluates transactions against the state, into records. The records are applied at once, above `visible`.

use bytes::Bytes;

use super::record::Record;
use super::state::{State, in_range};
use crate::{DeleteRequest, DeleteResponse, Error, Op, OpResponse, PutRequest, PutResponse, Txn, TxnResponse};

/// Most operations of one transaction, as etcd's `--max-txn-ops` has it by default.
pub(crate) const OPS_MAX: usize = 128;

/// A transaction at work.
struct Evaluation<'a> {
    state: &'a mut State,
    records: &'a mut Vec<Record>,
    /// The revision that the transaction started from.
    base: i64,
    sub: u32,
    wrote: bool,
}

/// Checks what can be known without the state (`etcd/server/etcdserver/api/v3rpc/key.go`, checkTxnRequest).
pub(crate) fn check(txn: &Txn, request_bytes_max: usize) -> Result<(), Error> {
    let bytes = txn_bytes(txn);
    if bytes > request_bytes_max {
        return Err(Error::RequestTooLarge { bytes, max: request_bytes_max });
    }
    check_branches(txn, OPS_MAX)
}

fn check_branches(txn: &Txn, ops_max: usize) -> Result<(), Error> {
    let ops = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    if ops > ops_max {
        return Err(Error::TooManyOps { ops, max: ops_max });
    }
    if txn.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Error::EmptyKey);
    }
    for branch in [&txn.success, &txn.failure] {
        for op in branch {
            match op {
                Op::Range(request) if request.key.is_empty() => return Err(Error::EmptyKey),
                Op::Put(request) if request.key.is_empty() => return Err(Error::EmptyKey),
                Op::Delete(request) if request.key.is_empty() => return Err(Error::EmptyKey),
                Op::Txn(inner) => check_branches(inner, ops_max - ops)?,
                _ => {}
            }
        }
        writes_of(branch)?;
    }
    Ok(())
}

/// Keys put, and ranges deleted.
type Writes = (Vec<Bytes>, Vec<(Bytes, Bytes)>);

/// The keys that a branch may put and the ranges that it may delete; refuses a key written twice.
fn writes_of(branch: &[Op]) -> Result<Writes, Error> {
    let mut puts: Vec<Bytes> = Vec::new();
    let mut deletes: Vec<(Bytes, Bytes)> = Vec::new();
    for op in branch {
        let (new_puts, new_deletes) = match op {
            Op::Range(_) => continue,
            Op::Put(request) => (vec![request.key.clone()], Vec::new()),
            Op::Delete(request) => (Vec::new(), vec![(request.key.clone(), request.range_end.clone())]),
            Op::Txn(inner) => {
                // Only one branch of it runs, so its two branches may share keys.
                let (mut puts, mut deletes) = writes_of(&inner.success)?;
                let (more_puts, more_deletes) = writes_of(&inner.failure)?;
                puts.extend(more_puts);
                deletes.extend(more_deletes);
                (puts, deletes)
            }
        };
        let deleted = |key: &Bytes, ranges: &[(Bytes, Bytes)]| ranges.iter().any(|(start, end)| in_range(key, start, end));
        let twice = new_puts
            .iter()
            .find(|key| puts.contains(key) || deleted(key, &deletes))
            .or_else(|| puts.iter().find(|key| deleted(key, &new_deletes)));
        if let Some(key) = twice {
            return Err(Error::DuplicateKey { key: String::from_utf8_lossy(key).into_owned() });
        }
        puts.extend(new_puts);
        deletes.extend(new_deletes);
    }
    Ok((puts, deletes))
}

fn txn_bytes(txn: &Txn) -> usize {
    let ops = txn.success.iter().chain(&txn.failure).map(|op| match op {
        Op::Range(request) => request.key.len() + request.range_end.len(),
        Op::Put(request) => request.key.len() + request.value.len(),
        Op::Delete(request) => request.key.len() + request.range_end.len(),
        Op::Txn(inner) => txn_bytes(inner),
    });
    ops.sum::<usize>() + txn.compare.iter().map(|compare| compare.key.len() + compare.range_end.len()).sum::<usize>()
}

/// Whether a transaction can write at all.
pub(crate) fn may_write(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match op {
        Op::Range(_) => false,
        Op::Put(_) | Op::Delete(_) => true,
        Op::Txn(inner) => may_write(inner),
    })
}

/// Evaluates and applies a checked transaction; on an error nothing of it remains.
pub(crate) fn evaluate(state: &mut State, txn: &Txn, records: &mut Vec<Record>) -> Result<TxnResponse, Error> {
    let base = state.applied;
    let path = choose(state, txn, base);
    validate(state, txn, &mut path.iter().copied(), base)?;
    let mut evaluation = Evaluation { state, records, base, sub: 0, wrote: false };
    let mut response = evaluation.run(txn, &mut path.into_iter());
    let revision = if evaluation.wrote { base + 1 } else { base };
    set_revision(&mut response, revision);
    Ok(response)
}

/// etcd's responses within a transaction all carry its final revision.
fn set_revision(response: &mut TxnResponse, revision: i64) {
    response.revision = revision;
    for response in &mut response.responses {
        match response {
            OpResponse::Txn(inner) => set_revision(inner, revision),
            OpResponse::Range(range) => range.revision = revision,
            OpResponse::Put(_) | OpResponse::Delete(_) => {}
        }
    }
}

/// The branches taken, outermost first: all comparisons are made before anything is applied.
fn choose(state: &State, txn: &Txn, revision: i64) -> Vec<bool> {
    let succeeded = txn.compare.iter().all(|compare| state.holds(compare, revision));
    let mut path = vec![succeeded];
    for op in branch(txn, succeeded) {
        if let Op::Txn(inner) = op {
            path.extend(choose(state, inner, revision));
        }
    }
    path
}

fn branch(txn: &Txn, succeeded: bool) -> &[Op] {
    if succeeded { &txn.success } else { &txn.failure }
}

/// Refuses what would fail half-way: unknown leases and revisions that cannot be read.
fn validate(state: &State, txn: &Txn, path: &mut dyn Iterator<Item = bool>, base: i64) -> Result<(), Error> {
    let succeeded = path.next().unwrap_or_default();
    for op in branch(txn, succeeded) {
        match op {
            Op::Put(put) if put.lease != 0 && !state.leases.contains(put.lease) => {
                return Err(Error::LeaseNotFound { id: put.lease });
            }
            Op::Range(range) if range.revision > base => {
                return Err(Error::FutureRevision { revision: range.revision, current: base });
            }
            Op::Range(range) if range.revision > 0 && range.revision < state.compacted => {
                return Err(Error::Compacted { revision: range.revision, compact_revision: state.compacted });
            }
            Op::Txn(inner) => validate(state, inner, path, base)?,
            _ => {}
        }
    }
    Ok(())
}

impl Evaluation<'_> {
    fn run(&mut self, txn: &Txn, path: &mut dyn Iterator<Item = bool>) -> TxnResponse {
        let succeeded = path.next().unwrap_or_default();
        let mut responses = Vec::new();
        for op in branch(txn, succeeded) {
            responses.push(match op {
                Op::Range(request) => {
                    // Validated above: the revision asked for exists, so this cannot fail.
                    OpResponse::Range(self.state.range(request, self.state.applied).unwrap_or_default())
                }
                Op::Put(request) => OpResponse::Put(self.put(request)),
                Op::Delete(request) => OpResponse::Delete(self.delete(request)),
                Op::Txn(inner) => OpResponse::Txn(self.run(inner, path)),
            });
        }
        TxnResponse { succeeded, responses, revision: 0 }
    }

    fn write(&mut self, record: Record) {
        self.state.apply(&record);
        self.records.push(record);
        self.sub += 1;
        self.wrote = true;
    }

    fn put(&mut self, request: &PutRequest) -> PutResponse {
        let revision = self.base + 1;
        let before = self.state.get(&request.key, revision);
        self.write(Record::Put {
            revision,
            sub: self.sub,
            create_revision: before.as_ref().map_or(revision, |before| before.create_revision),
            version: before.as_ref().map_or(1, |before| before.version + 1),
            lease: request.lease,
            key: request.key.clone(),
            value: request.value.clone(),
        });
        PutResponse { prev_kv: before.filter(|_| request.prev_kv) }
    }

    fn delete(&mut self, request: &DeleteRequest) -> DeleteResponse {
        let revision = self.base + 1;
        let keys: Vec<Bytes> = self.state.live(&request.key, &request.range_end, revision).map(|(key, _)| key.clone()).collect();
        let mut response = DeleteResponse { deleted: keys.len() as i64, prev_kvs: Vec::new() };
        for key in keys {
            if request.prev_kv {
                response.prev_kvs.extend(self.state.get(&key, revision));
            }
            self.write(Record::Delete { revision, sub: self.sub, key });
        }
        response
    }
}

/// Deletes keys in one revision, as the end of a lease does; those that are gone already are passed over.
pub(crate) fn delete_keys(state: &mut State, keys: Vec<Bytes>, records: &mut Vec<Record>) {
    let revision = state.applied + 1;
    let mut sub = 0;
    for key in keys {
        if state.get(&key, revision).is_some() {
            let record = Record::Delete { revision, sub, key };
            state.apply(&record);
            records.push(record);
            sub += 1;
        }
    }
}
