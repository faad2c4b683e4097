//! Lines of a container's log in CRI's format: `TIME STREAM TAG CONTENT\n`.
//!
//! Source: kubernetes `design-proposals/node/kubelet-cri-logging.md`; splitting as containerd v2.4.2
//! `internal/cri/io/logger.go`: at most 16 KiB of content in an entry, tag P where a line goes on, F at its end,
//! a final line without an end is P.

/// The most content of one entry, in bytes.
pub const CONTENT_BYTES_MAX: usize = 16 * 1024;

/// Formats what is complete in `input` and appends it to `out`; answers how many bytes of `input` that was.
///
/// What is left begins a line that is not longer than [`CONTENT_BYTES_MAX`] and has no end yet. With `ended` nothing is left.
pub fn format(input: &[u8], ended: bool, stream: &str, time: &str, out: &mut Vec<u8>) -> usize {
    let mut taken = 0;
    loop {
        let rest = input.get(taken..).unwrap_or_default();
        if rest.is_empty() {
            return taken;
        }
        let window = rest.get(..=CONTENT_BYTES_MAX).unwrap_or(rest);
        match window.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                let line = rest.get(..end).unwrap_or_default();
                entry(line.strip_suffix(b"\r").unwrap_or(line), b'F', stream, time, out);
                taken += end + 1;
            }
            None if rest.len() > CONTENT_BYTES_MAX => {
                entry(rest.get(..CONTENT_BYTES_MAX).unwrap_or(rest), b'P', stream, time, out);
                taken += CONTENT_BYTES_MAX;
            }
            None if ended => {
                entry(rest, b'P', stream, time, out);
                return input.len();
            }
            None => return taken,
        }
    }
}

fn entry(content: &[u8], tag: u8, stream: &str, time: &str, out: &mut Vec<u8>) {
    out.reserve(time.len() + stream.len() + content.len() + 5);
    out.extend_from_slice(time.as_bytes());
    out.push(b' ');
    out.extend_from_slice(stream.as_bytes());
    out.extend_from_slice(&[b' ', tag, b' ']);
    out.extend_from_slice(content);
    out.push(b'\n');
}

/// RFC 3339 in UTC with nine digits of the second's fraction.
#[must_use]
pub fn rfc3339_nanos(seconds: i64, nanos: u32) -> String {
    let days = seconds.div_euclid(86_400);
    let time = seconds.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// Year, month and day of a day since 1970-01-01, in the proleptic Gregorian calendar (years that begin in March,
/// in eras of 400 years).
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8], ended: bool) -> (String, usize) {
        let mut out = Vec::new();
        let taken = format(input, ended, "stdout", "T", &mut out);
        (String::from_utf8(out).expect("ascii"), taken)
    }

    #[test]
    fn whole_lines_are_full_entries() {
        assert_eq!(lines(b"a\n\nb\r\nrest", false), ("T stdout F a\nT stdout F \nT stdout F b\n".into(), 6));
        assert_eq!(lines(b"rest", true), ("T stdout P rest\n".into(), 4));
        assert_eq!(lines(b"", true), (String::new(), 0));
    }

    #[test]
    fn long_lines_are_split() {
        let mut input = vec![b'x'; CONTENT_BYTES_MAX];
        assert_eq!(lines(&input, false).1, 0);
        input.push(b'\n');
        let (text, taken) = lines(&input, false);
        assert_eq!((taken, text.matches(" F ").count(), text.matches(" P ").count()), (input.len(), 1, 0));
        input.insert(0, b'x');
        let (text, taken) = lines(&input, false);
        assert_eq!((taken, text.matches(" F ").count(), text.matches(" P ").count()), (input.len(), 1, 1));
        assert!(text.ends_with("F x\n"));
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339_nanos(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339_nanos(951_782_400, 5), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(rfc3339_nanos(1_795_394_737, 123_456_789), "2026-11-23T00:45:37.123456789Z");
        assert_eq!(rfc3339_nanos(-1, 0), "1969-12-31T23:59:59.000000000Z");
    }
}
