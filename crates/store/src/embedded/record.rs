//! What the log says: records, and their bytes.
//!
//! Integers are little-endian, byte strings are prefixed by a `u32` length. A record carries all metadata of its
//! key, so a log rewritten without history replays by the same code.

use bytes::Bytes;

/// One fact of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// A key's new version.
    Put { revision: i64, sub: u32, create_revision: i64, version: i64, lease: i64, key: Bytes, value: Bytes },
    /// A key's deletion.
    Delete { revision: i64, sub: u32, key: Bytes },
    /// History before this revision is gone.
    Compact { revision: i64 },
    /// The revision that the store is at (a rewritten log may hold no key of it).
    Revision { revision: i64 },
    /// A lease.
    LeaseGrant { id: i64, ttl_seconds: i64 },
    /// The end of a lease.
    LeaseRevoke { id: i64 },
}

const PUT: u8 = 1;
const DELETE: u8 = 2;
const COMPACT: u8 = 3;
const REVISION: u8 = 4;
const LEASE_GRANT: u8 = 5;
const LEASE_REVOKE: u8 = 6;

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // Requests are bounded to a few MiB, so a length always fits.
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(bytes);
}

impl Record {
    /// Appends the record's bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Put { revision, sub, create_revision, version, lease, key, value } => {
                out.push(PUT);
                out.extend_from_slice(&revision.to_le_bytes());
                out.extend_from_slice(&sub.to_le_bytes());
                for number in [create_revision, version, lease] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                put_bytes(out, key);
                put_bytes(out, value);
            }
            Self::Delete { revision, sub, key } => {
                out.push(DELETE);
                out.extend_from_slice(&revision.to_le_bytes());
                out.extend_from_slice(&sub.to_le_bytes());
                put_bytes(out, key);
            }
            Self::Compact { revision } => {
                out.push(COMPACT);
                out.extend_from_slice(&revision.to_le_bytes());
            }
            Self::Revision { revision } => {
                out.push(REVISION);
                out.extend_from_slice(&revision.to_le_bytes());
            }
            Self::LeaseGrant { id, ttl_seconds } => {
                out.push(LEASE_GRANT);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&ttl_seconds.to_le_bytes());
            }
            Self::LeaseRevoke { id } => {
                out.push(LEASE_REVOKE);
                out.extend_from_slice(&id.to_le_bytes());
            }
        }
    }
}

/// Reads records off a frame's payload; `None` at its end.
pub(crate) fn decode(input: &mut &[u8]) -> Result<Option<Record>, String> {
    if input.is_empty() {
        return Ok(None);
    }
    let record = match take::<1>(input)?[0] {
        PUT => Record::Put {
            revision: take_i64(input)?,
            sub: take_u32(input)?,
            create_revision: take_i64(input)?,
            version: take_i64(input)?,
            lease: take_i64(input)?,
            key: take_bytes(input)?,
            value: take_bytes(input)?,
        },
        DELETE => Record::Delete { revision: take_i64(input)?, sub: take_u32(input)?, key: take_bytes(input)? },
        COMPACT => Record::Compact { revision: take_i64(input)? },
        REVISION => Record::Revision { revision: take_i64(input)? },
        LEASE_GRANT => lease_grant(take_i64(input)?, take_i64(input)?)?,
        LEASE_REVOKE => Record::LeaseRevoke { id: take_i64(input)? },
        other => return Err(format!("unknown record {other}")),
    };
    Ok(Some(record))
}

/// None was ever granted for no time; one that ends when it is read would be gone without its keys.
fn lease_grant(id: i64, ttl_seconds: i64) -> Result<Record, String> {
    if ttl_seconds < 1 {
        return Err(format!("lease {id} has a time of {ttl_seconds} s"));
    }
    Ok(Record::LeaseGrant { id, ttl_seconds })
}

fn take<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], String> {
    let (head, tail) = input.split_first_chunk::<N>().ok_or("a record is cut short")?;
    *input = tail;
    Ok(*head)
}

fn take_i64(input: &mut &[u8]) -> Result<i64, String> {
    Ok(i64::from_le_bytes(take(input)?))
}

fn take_u32(input: &mut &[u8]) -> Result<u32, String> {
    Ok(u32::from_le_bytes(take(input)?))
}

fn take_bytes(input: &mut &[u8]) -> Result<Bytes, String> {
    let length = take_u32(input)? as usize;
    if input.len() < length {
        return Err("a record is cut short".to_owned());
    }
    let (head, tail) = input.split_at(length);
    *input = tail;
    Ok(Bytes::copy_from_slice(head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_record() -> impl Strategy<Value = Record> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        prop_oneof![
            (any::<i64>(), any::<u32>(), any::<i64>(), any::<i64>(), any::<i64>(), bytes(), bytes()).prop_map(
                |(revision, sub, create_revision, version, lease, key, value)| Record::Put {
                    revision,
                    sub,
                    create_revision,
                    version,
                    lease,
                    key,
                    value
                }
            ),
            (any::<i64>(), any::<u32>(), bytes()).prop_map(|(revision, sub, key)| Record::Delete { revision, sub, key }),
            any::<i64>().prop_map(|revision| Record::Compact { revision }),
            any::<i64>().prop_map(|revision| Record::Revision { revision }),
            (any::<i64>(), 1..=i64::MAX).prop_map(|(id, ttl_seconds)| Record::LeaseGrant { id, ttl_seconds }),
            any::<i64>().prop_map(|id| Record::LeaseRevoke { id }),
        ]
    }

    proptest! {
        #[test]
        fn records_survive_their_bytes(records in proptest::collection::vec(any_record(), 0..8)) {
            let mut bytes = Vec::new();
            records.iter().for_each(|record| record.encode(&mut bytes));
            let mut input = &bytes[..];
            let mut read = Vec::new();
            while let Some(record) = decode(&mut input).expect("decode") {
                read.push(record);
            }
            prop_assert_eq!(read, records);
        }

        #[test]
        fn rubbish_is_an_error_not_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut input = &bytes[..];
            while let Ok(Some(_)) = decode(&mut input) {}
        }
    }
}
