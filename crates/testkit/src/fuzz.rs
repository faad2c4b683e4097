//! A small deterministic fuzzer: mutations of a corpus, from a seed, for a bounded number of runs.
//!
//! `cargo-fuzz` needs a nightly compiler; this one runs in every `cargo test`. What is found is printed as bytes, with the seed and the
//! number of the run that found it, and belongs into the corpus from then on. `CORACLE_FUZZ_RUNS` makes a longer search of the same
//! targets, `CORACLE_FUZZ_SEED` another one.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Runs of a target in a test.
const RUNS: u64 = 3000;
/// The longest input that is made, in bytes.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// Mutations of one input at most.
const MUTATIONS_MAX: u64 = 6;
/// How often a piece is repeated at most: deep nesting, long lists.
const REPEATS_MAX: u64 = 4000;
/// Numbers at which arithmetic goes wrong.
const NUMBERS: [u64; 14] =
    [0, 1, 2, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, i64::MAX as u64, u64::MAX];
/// The same for numbers in text.
const TEXT_NUMBERS: [&str; 8] =
    ["0", "-1", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e999", "-0"];
/// Pieces that have a meaning to some parser.
const WORDS: [&str; 32] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    ":",
    ",",
    "\n",
    "\r\n",
    "\0",
    "- ",
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
    "%",
    "..",
    "../",
    "/",
    "//",
    "\u{feff}",
    "\u{202e}",
    "=",
    "!",
    "(",
    ")",
    "null",
    "true",
    "#",
];

/// Pseudo-random numbers (SplitMix64): the same ones for the same seed, on every machine.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall as this seed says.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number of the sequence.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 for 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.roll() % end }
    }

    fn index(&mut self, end: usize) -> usize {
        // What is below an usize is one.
        usize::try_from(self.below(end as u64)).unwrap_or(0)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.index(from.len()))
    }
}

/// A target's corpus.
#[derive(Clone, Debug)]
pub struct Fuzz {
    name: String,
    corpus: Vec<Vec<u8>>,
    words: Vec<Vec<u8>>,
    runs: u64,
}

impl Fuzz {
    /// A target with a corpus that is still empty.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), corpus: Vec::new(), words: WORDS.iter().map(|word| word.as_bytes().to_vec()).collect(), runs: RUNS }
    }

    /// Adds an input.
    #[must_use]
    pub fn seed(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.corpus.push(input.into());
        self
    }

    /// Adds the files of a folder, in the order of their names.
    ///
    /// # Panics
    /// If it cannot be read or is empty: a corpus that is gone would make a test that proves little.
    #[must_use]
    pub fn folder(mut self, path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("corpus {}: {error}", path.display()));
        let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
        assert!(!files.is_empty(), "corpus {} is empty", path.display());
        self.corpus.extend(files.iter().map(|file| fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))));
        self
    }

    /// Adds pieces that mean something to the target: keywords, field names, tags.
    #[must_use]
    pub fn words(mut self, words: &[&str]) -> Self {
        self.words.extend(words.iter().map(|word| word.as_bytes().to_vec()));
        self
    }

    /// Another number of runs, for targets that are slow.
    #[must_use]
    pub fn runs(mut self, runs: u64) -> Self {
        self.runs = runs;
        self
    }

    /// Runs the target on every input of the corpus, then on mutations of them.
    ///
    /// # Panics
    /// If the target does; the input is printed first.
    pub fn run(self, mut target: impl FnMut(&[u8])) {
        assert!(!self.corpus.is_empty(), "{}: no corpus", self.name);
        let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
        let runs = number("CORACLE_FUZZ_RUNS").unwrap_or(self.runs);
        let seed =
            number("CORACLE_FUZZ_SEED").unwrap_or_else(|| self.name.bytes().fold(1, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte)));
        let mut dice = Dice::new(seed);
        let mut try_one = |run: &str, input: &[u8]| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
                let shown = String::from_utf8_lossy(&input[..input.len().min(2000)]).into_owned();
                eprintln!("fuzz {}: {run} of seed {seed}: {} bytes: {shown:?}\nhex: {}", self.name, input.len(), hex::encode(input));
                resume_unwind(panic);
            }
        };
        for (at, input) in self.corpus.iter().enumerate() {
            try_one(&format!("corpus entry {at}"), input);
        }
        for run in 0..runs {
            let input = self.mutated(&mut dice);
            try_one(&format!("run {run}"), &input);
        }
    }

    fn mutated(&self, dice: &mut Dice) -> Vec<u8> {
        let mut input = dice.pick(&self.corpus).cloned().unwrap_or_default();
        for _ in 0..=dice.below(MUTATIONS_MAX) {
            self.mutate(&mut input, dice);
            input.truncate(INPUT_BYTES_MAX);
        }
        input
    }

    fn mutate(&self, input: &mut Vec<u8>, dice: &mut Dice) {
        let at = dice.index(input.len() + 1);
        let end = (at + dice.index(64)).min(input.len());
        match dice.below(11) {
            0 => flip(input, at, dice),
            1 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte = u8::try_from(dice.below(256)).unwrap_or(0)),
            2 => drop(input.drain(at..end)),
            3 => input.truncate(at),
            4 => insert(input, at, dice.pick(&self.words).cloned().unwrap_or_default()),
            5 => number(input, at, dice),
            6 => text_number(input, dice),
            7 => {
                // The end of another input after the beginning of this one.
                let other = dice.pick(&self.corpus).cloned().unwrap_or_default();
                input.truncate(at);
                input.extend_from_slice(&other[dice.index(other.len() + 1)..]);
            }
            8 => {
                let piece = input[at..end].to_vec();
                let into = dice.index(input.len() + 1);
                insert(input, into, piece);
            }
            9 => {
                let piece = if dice.below(2) == 0 { input[at..end].to_vec() } else { dice.pick(&self.words).cloned().unwrap_or_default() };
                let times = usize::try_from(dice.below(REPEATS_MAX)).unwrap_or(0).min(INPUT_BYTES_MAX / piece.len().max(1));
                insert(input, at, piece.repeat(times));
            }
            _ => {
                let bytes: Vec<u8> = (0..dice.below(16)).map(|_| u8::try_from(dice.below(256)).unwrap_or(0)).collect();
                insert(input, at, bytes);
            }
        }
    }
}

fn flip(input: &mut [u8], at: usize, dice: &mut Dice) {
    if let Some(byte) = input.get_mut(at) {
        *byte ^= 1 << dice.below(8);
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: Vec<u8>) {
    input.splice(at..at, piece);
}

/// Overwrites one, two, four or eight bytes, in either order.
fn number(input: &mut [u8], at: usize, dice: &mut Dice) {
    let number = NUMBERS[dice.index(NUMBERS.len())];
    let length = 1 << dice.below(4);
    let little = number.to_le_bytes();
    let mut bytes = little[..length].to_vec();
    if dice.below(2) == 0 {
        bytes.reverse();
    }
    for (target, byte) in input.iter_mut().skip(at).zip(bytes) {
        *target = byte;
    }
}

/// Replaces digits of a text by a number that is hard to take.
fn text_number(input: &mut Vec<u8>, dice: &mut Dice) {
    let starts: Vec<usize> =
        (0..input.len()).filter(|at| input[*at].is_ascii_digit() && (*at == 0 || !input[at - 1].is_ascii_digit())).collect();
    let Some(start) = dice.pick(&starts).copied() else { return };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let text = TEXT_NUMBERS[dice.index(TEXT_NUMBERS.len())];
    input.splice(start..start + length, text.bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_inputs() {
        let fuzz = || Fuzz::new("t").seed("{\"a\": 12}").words(&["b"]);
        let inputs = |seed| {
            let mut dice = Dice::new(seed);
            (0..200).map(|_| fuzz().mutated(&mut dice)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(7), inputs(7));
        assert_ne!(inputs(7), inputs(8));
        let mut different = inputs(7);
        different.sort();
        different.dedup();
        assert!(different.len() > 100 && different.iter().all(|input| input.len() <= INPUT_BYTES_MAX));
    }

    #[test]
    fn a_parser_that_breaks_is_found() {
        let found = catch_unwind(|| {
            Fuzz::new("breaks").seed("length=5;hello").run(|input| {
                let text = String::from_utf8_lossy(input);
                if let Some(Ok(length)) = text.split_once('=').and_then(|(_, rest)| rest.split(';').next()).map(str::parse::<u64>) {
                    assert!(length < 1 << 32, "a length that is too large");
                }
            });
        });
        assert!(found.is_err());
    }
}
