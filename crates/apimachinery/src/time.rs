//! Times on the wire: `meta.v1.Time` and `meta.v1.MicroTime`, and the short durations of tables.

use jiff::Timestamp;

/// Parses RFC 3339, with or without fraction and with any offset. `None` when it is no time.
pub fn parse(text: &str) -> Option<Timestamp> {
    // RFC 3339 wants an offset and `T`; jiff alone would take more.
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes[10] != b'T' {
        return None;
    }
    text.parse().ok()
}

/// `2006-01-02T15:04:05Z`: how `meta.v1.Time` is written (seconds, UTC).
pub fn format_seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2006-01-02T15:04:05.000000Z`: how `meta.v1.MicroTime` is written.
pub fn format_micros(time: Timestamp) -> String {
    let micros = time.as_microsecond().rem_euclid(1_000_000);
    format!("{}.{micros:06}Z", time.strftime("%Y-%m-%dT%H:%M:%S"))
}

/// A duration in seconds as tables show ages: `5s`, `2m5s`, `47h`, `3d4h`, `2y10d`.
///
/// Source: k8s.io/apimachinery `pkg/util/duration`, `HumanDuration`.
pub fn human_duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let seconds = seconds.max(0);
    let minutes = seconds / 60;
    let hours = seconds / 3600;
    let days = hours / 24;
    let years = hours / (24 * 365);
    let pair = |large: i64, large_unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{large}{large_unit}") } else { format!("{large}{large_unit}{small}{small_unit}") }
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => pair(minutes, "m", seconds % 60, "s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => pair(hours, "h", minutes % 60, "m"),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 192 => pair(days, "d", hours % 24, "h"),
        () if hours < 24 * 365 * 2 => format!("{days}d"),
        () if hours < 24 * 365 * 8 => pair(years, "y", days % 365, "d"),
        () => format!("{years}y"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_as_kubectl_shows_them() {
        for (seconds, want) in [
            (-2, "<invalid>"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (11_000, "3h3m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (180_000, "2d2h"),
            (700_000, "8d"),
            (63_072_000, "2y"),
            (63_072_000 + 86_400, "2y1d"),
            (252_288_000, "8y"),
        ] {
            assert_eq!(human_duration(seconds), want, "{seconds}");
        }
    }

    #[test]
    fn times() {
        let time = parse("2026-11-23T01:02:03.123456+01:00").expect("RFC 3339");
        assert_eq!(format_seconds(time), "2026-11-23T00:02:03Z");
        assert_eq!(format_micros(time), "2026-11-23T00:02:03.123456Z");
        assert!(parse("2026-11-23").is_none());
    }
}
