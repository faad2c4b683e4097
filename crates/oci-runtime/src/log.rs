//! The runtime's own log: one line of JSON (or text) an event, appended to the caller's file.
//!
//! Callers take the last line of level "error" for the reason of a failure (seams/oci-runtime.md), so nothing but the
//! final error of a command is ever written with that level.

use std::io::Write;

use crate::cli::Global;

/// Writes one line to the log, or to standard error when there is none. Failures are not reported: there is nowhere to.
pub fn write(global: &Global, level: &str, message: &str) {
    let time = crate::time::now_rfc3339();
    let line = if global.log_json {
        serde_json::json!({ "level": level, "msg": message, "time": time }).to_string()
    } else {
        format!("time={time:?} level={level} msg={message:?}")
    };
    let file = global.log.as_ref().map(|path| std::fs::File::options().append(true).create(true).open(path));
    match file {
        Some(Ok(mut file)) => {
            // One write, so that lines of commands that run side by side do not mix.
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
        Some(Err(_)) | None => {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// Writes a line of level "debug" if they are asked for.
pub fn debug(global: &Global, message: &str) {
    if global.debug {
        write(global, "debug", message);
    }
}
