//! The trait's words as etcd's messages, and back.

use bytes::Bytes;
use protocols::etcd::{etcdserverpb as pb, mvccpb};

use crate::{
    Compare, CompareOp, CompareTarget, DeleteRequest, DeleteResponse, Event, EventKind, KeyValue, Op, OpResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, Txn, TxnResponse,
};

/// The revision in an answer's header.
pub(super) fn revision(header: Option<&pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

pub(super) fn key_value(kv: mvccpb::KeyValue) -> KeyValue {
    let mvccpb::KeyValue { key, value, create_revision, mod_revision, version, lease } = kv;
    KeyValue { key, value, create_revision, mod_revision, version, lease }
}

pub(super) fn range_request(request: RangeRequest) -> pb::RangeRequest {
    let RangeRequest { key, range_end, limit, revision, keys_only, count_only } = request;
    pb::RangeRequest { key, range_end, limit, revision, keys_only, count_only, ..Default::default() }
}

pub(super) fn range_response(answer: pb::RangeResponse) -> RangeResponse {
    let revision = revision(answer.header.as_ref());
    RangeResponse { kvs: answer.kvs.into_iter().map(key_value).collect(), more: answer.more, count: answer.count, revision }
}

fn compare(compare: Compare) -> pb::Compare {
    use pb::compare::{CompareResult, CompareTarget as Target, TargetUnion};
    let (target, union) = match compare.target {
        CompareTarget::Version(version) => (Target::Version, TargetUnion::Version(version)),
        CompareTarget::CreateRevision(revision) => (Target::Create, TargetUnion::CreateRevision(revision)),
        CompareTarget::ModRevision(revision) => (Target::Mod, TargetUnion::ModRevision(revision)),
        CompareTarget::Value(value) => (Target::Value, TargetUnion::Value(value)),
        CompareTarget::Lease(lease) => (Target::Lease, TargetUnion::Lease(lease)),
    };
    let result = match compare.op {
        CompareOp::Equal => CompareResult::Equal,
        CompareOp::NotEqual => CompareResult::NotEqual,
        CompareOp::Less => CompareResult::Less,
        CompareOp::Greater => CompareResult::Greater,
    };
    pb::Compare { result: result.into(), target: target.into(), key: compare.key, range_end: compare.range_end, target_union: Some(union) }
}

fn operation(op: Op) -> pb::RequestOp {
    use pb::request_op::Request;
    let request = match op {
        Op::Range(request) => Request::RequestRange(range_request(request)),
        Op::Put(PutRequest { key, value, lease, prev_kv }) => {
            Request::RequestPut(pb::PutRequest { key, value, lease, prev_kv, ..Default::default() })
        }
        Op::Delete(DeleteRequest { key, range_end, prev_kv }) => {
            Request::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end, prev_kv })
        }
        Op::Txn(inner) => Request::RequestTxn(txn_request(inner)),
    };
    pb::RequestOp { request: Some(request) }
}

pub(super) fn txn_request(txn: Txn) -> pb::TxnRequest {
    pb::TxnRequest {
        compare: txn.compare.into_iter().map(compare).collect(),
        success: txn.success.into_iter().map(operation).collect(),
        failure: txn.failure.into_iter().map(operation).collect(),
    }
}

/// The lease that a transaction names first; 0 for none.
pub(super) fn first_lease(txn: &Txn) -> i64 {
    let lease = |op: &Op| match op {
        Op::Put(put) if put.lease != 0 => Some(put.lease),
        Op::Txn(inner) => Some(first_lease(inner)).filter(|lease| *lease != 0),
        _ => None,
    };
    txn.success.iter().chain(&txn.failure).find_map(lease).unwrap_or(0)
}

/// An answer without an operation, which no etcd sends, is left out; callers match what they asked.
pub(super) fn txn_response(answer: pb::TxnResponse) -> TxnResponse {
    use pb::response_op::Response;
    let revision = revision(answer.header.as_ref());
    let response = |response| match response {
        Response::ResponseRange(range) => OpResponse::Range(RangeResponse { revision, ..range_response(range) }),
        Response::ResponsePut(put) => OpResponse::Put(PutResponse { prev_kv: put.prev_kv.map(key_value) }),
        Response::ResponseDeleteRange(delete) => {
            OpResponse::Delete(DeleteResponse { deleted: delete.deleted, prev_kvs: delete.prev_kvs.into_iter().map(key_value).collect() })
        }
        Response::ResponseTxn(inner) => OpResponse::Txn(TxnResponse { revision, ..txn_response(inner) }),
    };
    let responses = answer.responses.into_iter().filter_map(|op| op.response).map(response).collect();
    TxnResponse { succeeded: answer.succeeded, responses, revision }
}

pub(super) fn event(event: mvccpb::Event) -> Event {
    let kind = match event.r#type() {
        mvccpb::event::EventType::Put => EventKind::Put,
        mvccpb::event::EventType::Delete => EventKind::Delete,
    };
    Event { kind, kv: event.kv.map(key_value).unwrap_or_default(), prev_kv: event.prev_kv.map(key_value) }
}

/// Whether a key is in the half-open range of a request.
pub(super) fn in_range(key: &Bytes, from: &Bytes, end: &Bytes) -> bool {
    match &end[..] {
        b"" => key == from,
        b"\0" => key >= from,
        _ => key >= from && key < end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_half_open() {
        let bytes = |text: &'static [u8]| Bytes::from_static(text);
        assert!(in_range(&bytes(b"/a"), &bytes(b"/a"), &bytes(b"")) && !in_range(&bytes(b"/ab"), &bytes(b"/a"), &bytes(b"")));
        assert!(in_range(&bytes(b"/a/x"), &bytes(b"/a/"), &bytes(b"/a0")) && !in_range(&bytes(b"/a0"), &bytes(b"/a/"), &bytes(b"/a0")));
        assert!(in_range(&bytes(b"z"), &bytes(b"/"), &bytes(b"\0")));
    }

    #[test]
    fn a_transaction_keeps_its_shape() {
        let txn = Txn {
            compare: vec![Compare::mod_revision("/a", 7)],
            success: vec![Op::Txn(Txn { failure: vec![Op::Range(RangeRequest::prefix("/"))], ..Txn::default() })],
            failure: vec![],
        };
        let wire = txn_request(txn);
        assert_eq!(wire.compare[0].target_union, Some(pb::compare::TargetUnion::ModRevision(7)));
        assert_eq!((wire.success.len(), wire.failure.len()), (1, 0));
    }
}
