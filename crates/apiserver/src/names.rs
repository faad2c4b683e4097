//! Generated names (upstream: `k8s.io/apiserver/pkg/storage/names`).

use ring::rand::{SecureRandom, SystemRandom};

/// The letters of generated names: no vowels and no digits that look like letters, so that no words come out
/// (upstream: `k8s.io/apimachinery/pkg/util/rand`).
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
/// A name's longest base: 63 characters less the suffix.
const BASE_LENGTH_MAX: usize = 63 - SUFFIX_LENGTH;

/// Five random characters.
pub fn random_suffix() -> String {
    let mut bytes = [0u8; SUFFIX_LENGTH];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        // No randomness: the time still makes names differ, and a clash is answered with 409.
        let nanos = jiff::Timestamp::now().as_nanosecond();
        bytes.copy_from_slice(&nanos.to_le_bytes()[..SUFFIX_LENGTH]);
    }
    bytes.iter().map(|byte| ALPHABET[usize::from(*byte) % ALPHABET.len()] as char).collect()
}

/// A name for `metadata.generateName`.
pub fn generate(base: &str) -> String {
    let mut end = base.len().min(BASE_LENGTH_MAX);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{}", &base[..end], random_suffix())
}
