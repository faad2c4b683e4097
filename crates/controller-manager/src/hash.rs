//! Names the pods of one template: `pod-template-hash`.
//!
//! Upstream hashes the text that a Go pretty-printer makes of its Go structs (`pkg/controller/controller_utils.go`,
//! ComputeHash), which only Go can make. Ours hashes the template's JSON with the same FNV-32a and renders it with the
//! same alphabet. So the names look alike but are other names. Nothing depends on the value: an existing ReplicaSet is
//! found by comparing templates, so a cluster can change hands between the two controllers.

use k8s_openapi::api::core::v1::PodTemplateSpec;

const OFFSET: u32 = 0x811c_9dc5;
const PRIME: u32 = 0x0100_0193;
/// Upstream's `rand.SafeEncodeString`: no vowels and no look-alikes.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

fn fnv32a(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(PRIME))
}

/// The hash of a template; `collisions` tells apart two templates of the same hash.
pub fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    // Typed objects always serialize; field order is fixed by the type, map order by BTreeMap.
    let json = serde_json::to_vec(template).unwrap_or_default();
    let mut hash = fnv32a(OFFSET, &json);
    if let Some(count) = collisions {
        hash = fnv32a(hash, &u64::from(count.unsigned_abs()).to_le_bytes());
    }
    safe_encode(&hash.to_string())
}

fn safe_encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_and_the_alphabet_are_upstreams() {
        assert_eq!(fnv32a(OFFSET, b"foobar"), 0xbf9c_f968);
        assert!(safe_encode("0123456789").chars().all(|c| ALPHABET.contains(&(c as u8))));
    }

    #[test]
    fn stable_and_moved_by_collisions() {
        let template = PodTemplateSpec::default();
        assert_eq!(template_hash(&template, None), template_hash(&template, None));
        assert_ne!(template_hash(&template, None), template_hash(&template, Some(1)));
    }
}
