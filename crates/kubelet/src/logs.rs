//! CRI log files: lines `TIME STREAM F|P TEXT` in `NAME/ATTEMPT.log`, rotated ones beside it
//! (upstream k8s.io/cri-client/pkg/logs, pkg/kubelet/logs, v1.37).

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use jiff::Timestamp;

/// A line of a log, without its newline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was written.
    pub at: Timestamp,
    /// The time as it stands in the file.
    pub stamp: &'a [u8],
    /// `stdout` or `stderr`.
    pub stderr: bool,
    /// The line goes on in the next entry of its stream.
    pub partial: bool,
    /// Content.
    pub text: &'a [u8],
}

/// Reads an entry; `None` for what is none.
pub fn parse(entry: &[u8]) -> Option<Line<'_>> {
    let entry = entry.strip_suffix(b"\n").unwrap_or(entry);
    let mut parts = entry.splitn(4, |b| *b == b' ');
    let stamp = parts.next()?;
    let at = std::str::from_utf8(stamp).ok()?.parse().ok()?;
    let stderr = match parts.next()? {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    let tag = parts.next()?.split(|b| *b == b':').next()?;
    let text = parts.next().unwrap_or(b"");
    Some(Line { at, stamp, stderr, partial: tag == b"P", text })
}

/// The text of the last `lines` lines of a log, each cut off at its front beyond `line_bytes_max`. Blocks on disk.
pub fn tail_text(path: &Path, lines: usize, line_bytes_max: usize) -> io::Result<String> {
    let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
    let mut open = false;
    let mut reader = BufReader::new(std::fs::File::open(path)?);
    let mut entry = Vec::new();
    while reader.read_until(b'\n', &mut entry)? > 0 {
        if let Some(line) = parse(&entry) {
            if !open {
                kept.push_back(Vec::new());
            }
            if let Some(last) = kept.back_mut() {
                last.extend_from_slice(line.text);
                if !line.partial {
                    last.push(b'\n');
                }
                last.drain(..last.len().saturating_sub(line_bytes_max));
            }
            open = line.partial;
            while kept.len() > lines {
                kept.pop_front();
            }
        }
        entry.clear();
    }
    let all: Vec<u8> = kept.into_iter().flatten().collect();
    Ok(String::from_utf8_lossy(&all).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_entries() {
        let line = parse(b"2026-11-23T01:02:03.000000004Z stderr P half\n").expect("an entry");
        assert!(line.stderr && line.partial);
        assert_eq!(line.text, b"half");
        let empty = parse(b"2026-11-23T01:02:03.000000004Z stdout F \n").expect("an entry");
        assert_eq!(empty.text, b"");
        assert_eq!(parse(b"rubbish"), None);
    }
}
