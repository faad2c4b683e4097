//! Stop signals: CRI's enum and the image's words as numbers, and back. Pure.

use protocols::cri::v1::Signal;

use super::SpecError;

/// What `StopContainer` sends when neither the request nor the image says otherwise.
pub const SIGTERM: u32 = 15;
/// What ends a process for certain.
pub const SIGKILL: u32 = 9;

/// Names without `SIG`, and numbers, of x86_64 and arm64 (`signal(7)`).
const NAMED: [(&str, u32); 36] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("RTMIN", 34),
    ("RTMAX", 64),
];
const MAX: u32 = 64;

/// A signal as images name it: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
///
/// # Errors
/// [`SpecError::Signal`] with the word.
pub fn parse(word: &str) -> Result<u32, SpecError> {
    let unknown = || SpecError::Signal(word.to_owned());
    if let Ok(number) = word.parse::<u32>() {
        return if (1..=MAX).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = word.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset = |text: &str, base: u32, sign: i64| {
        let offset = text.parse::<u32>().ok().filter(|offset| *offset <= 15)?;
        u32::try_from(i64::from(base) + sign * i64::from(offset)).ok()
    };
    name.strip_prefix("RTMIN+")
        .and_then(|text| offset(text, 34, 1))
        .or_else(|| name.strip_prefix("RTMAX-").and_then(|text| offset(text, 64, -1)))
        .ok_or_else(unknown)
}

/// The number of CRI's enum; none for `SIGNAL_RUNTIME_DEFAULT`.
///
/// # Errors
/// [`SpecError::Signal`] for a number that the enum does not have.
pub fn of_cri(signal: i32) -> Result<Option<u32>, SpecError> {
    let signal = Signal::try_from(signal).map_err(|_| SpecError::Signal(signal.to_string()))?;
    if signal == Signal::RuntimeDefault {
        return Ok(None);
    }
    let name = signal.as_str_name().trim_start_matches("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-");
    parse(&name).map(Some)
}

/// CRI's enum for a number; `SIGNAL_SIGTERM` for one that it lacks.
pub fn to_cri(number: u32) -> Signal {
    (1..=65)
        .filter_map(|value| Signal::try_from(value).ok())
        .find(|signal| of_cri(*signal as i32) == Ok(Some(number)))
        .unwrap_or(Signal::Sigterm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        for (word, number) in [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("SIGQUIT", 3)] {
            assert_eq!(parse(word), Ok(number), "{word}");
        }
        for word in ["", "0", "65", "SIGNONE", "SIGRTMIN+99", "-1"] {
            assert!(parse(word).is_err(), "{word}");
        }
    }

    #[test]
    fn every_word_of_cri_has_a_number() {
        assert_eq!(of_cri(0), Ok(None));
        for value in 1..=65 {
            let number = of_cri(value).expect("known").expect("not the default");
            assert_eq!(of_cri(to_cri(number) as i32), Ok(Some(number)), "{value}");
        }
        assert!(of_cri(66).is_err());
    }
}
