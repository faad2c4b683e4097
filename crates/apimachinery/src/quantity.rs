//! `resource.Quantity`: parsing, comparison, arithmetic and the canonical form.
//!
//! A quantity is a whole number of nano units (10⁻⁹) within ±(2⁶³−1) whole units, and the format it was written in. Finer fractions are
//! rounded away from zero, larger values are capped. Source: k8s.io/apimachinery v0.37 `pkg/api/resource/quantity.go`.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

const NANO: i128 = 1_000_000_000;
/// Largest whole value.
const MAX: i128 = i64::MAX as i128;

/// How a quantity is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `12e6`.
    DecimalExponent,
    /// `12Mi`.
    BinarySi,
    /// `12M`.
    DecimalSi,
}

/// Why a text is no quantity; the texts are upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not of the form number and suffix.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    /// The number is malformed.
    #[error("unable to parse numeric part of quantity")]
    Numeric,
    /// The suffix is unknown.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// A fixed-point number with a unit suffix.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    /// A whole number of units.
    pub fn from_units(units: i64, format: Format) -> Self {
        Self { nanos: i128::from(units) * NANO, format }
    }

    /// Thousandths of a unit (cpu).
    pub fn from_millis(millis: i64) -> Self {
        Self { nanos: i128::from(millis) * (NANO / 1000), format: Format::DecimalSi }
    }

    /// The format it was written in.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whole units, rounded away from zero (upstream's `Value`).
    pub fn value(&self) -> i64 {
        clamp(round_up(self.nanos, NANO))
    }

    /// Thousandths, rounded away from zero (upstream's `MilliValue`).
    pub fn milli_value(&self) -> i64 {
        clamp(round_up(self.nanos, NANO / 1000))
    }

    /// The next multiple of a thousandth, away from zero.
    pub fn rounded_to_millis(self) -> Self {
        let milli = NANO / 1000;
        Self { nanos: cap(round_up(self.nanos, milli) * milli), format: self.format }
    }

    /// -1, 0 or 1.
    pub fn sign(&self) -> i32 {
        self.nanos.signum() as i32
    }

    /// Whether it is a whole number of units.
    pub fn is_integer(&self) -> bool {
        self.nanos % NANO == 0
    }

    /// The sum, in this quantity's format (the other's when this is zero).
    pub fn plus(self, other: Self) -> Self {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Self { nanos: cap(self.nanos + other.nanos), format }
    }

    /// The difference, in this quantity's format.
    pub fn minus(self, other: Self) -> Self {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Self { nanos: cap(self.nanos - other.nanos), format }
    }
}

fn clamp(value: i128) -> i64 {
    value.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

fn cap(nanos: i128) -> i128 {
    nanos.clamp(-MAX * NANO, MAX * NANO)
}

/// Division rounding away from zero.
fn round_up(value: i128, by: i128) -> i128 {
    let whole = value / by;
    if value % by == 0 { whole } else { whole + value.signum() }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

/// A suffix's base (10 or 2), exponent and format.
fn suffix(text: &str) -> Option<(u32, i32, Format)> {
    let decimal = |exponent| Some((10, exponent, Format::DecimalSi));
    let binary = |exponent| Some((2, exponent, Format::BinarySi));
    match text {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = text.strip_prefix(['e', 'E']).filter(|digits| !digits.is_empty())?;
            exponent.parse().ok().map(|exponent| (10, exponent, Format::DecimalExponent))
        }
    }
}

/// Splits into sign, whole digits, fraction digits and suffix.
fn split(text: &str) -> Result<(bool, &str, &str, &str), ParseError> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let negative = text.starts_with('-');
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let whole_length = digits(unsigned);
    let (whole, rest) = unsigned.split_at(whole_length);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() && !unsigned.starts_with('.') {
        return Err(ParseError::Format);
    }
    let letters = rest.bytes().take_while(|byte| b"eEinumkKMGTP".contains(byte)).count();
    let exponent = rest[letters..].strip_prefix(['+', '-']).unwrap_or(&rest[letters..]);
    if digits(exponent) != exponent.len() {
        return Err(ParseError::Format);
    }
    if whole.is_empty() && fraction.is_empty() {
        return Err(ParseError::Numeric);
    }
    Ok((negative, whole, fraction, rest))
}

impl FromStr for Quantity {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.is_empty() {
            return Err(ParseError::Format);
        }
        if text == "0" {
            return Ok(Self { nanos: 0, format: Format::DecimalSi });
        }
        let (negative, whole, fraction, rest) = split(text)?;
        let (base, exponent, format) = suffix(rest).ok_or(ParseError::Suffix)?;
        let nanos = if base == 10 { decimal_nanos(whole, fraction, exponent) } else { binary_nanos(whole, fraction, exponent as u32) };
        // Fractions of one are never binary.
        let format = if format == Format::BinarySi && nanos > 0 && nanos < NANO { Format::DecimalSi } else { format };
        Ok(Self { nanos: if negative { -nanos } else { nanos }, format })
    }
}

/// `WHOLE.FRACTION × 10^exponent` in nanos, rounded up and capped.
fn decimal_nanos(whole: &str, fraction: &str, exponent: i32) -> i128 {
    // Digits before this position count whole nanos; what follows only rounds.
    let point = whole.len() as i64 + i64::from(exponent) + 9;
    let digits = || whole.bytes().chain(fraction.bytes());
    let mut nanos: i128 = 0;
    for (position, digit) in digits().enumerate() {
        if (position as i64) < point {
            nanos = nanos.saturating_mul(10).saturating_add(i128::from(digit - b'0')).min(MAX * NANO * 10);
        } else if digit != b'0' {
            return (nanos + 1).min(MAX * NANO);
        }
    }
    let missing = point - (whole.len() + fraction.len()) as i64;
    for _ in 0..missing.clamp(0, 64) {
        nanos = nanos.saturating_mul(10).min(MAX * NANO * 10);
    }
    nanos.min(MAX * NANO)
}

/// `WHOLE.FRACTION × 2^exponent` in nanos, rounded up and capped.
fn binary_nanos(whole: &str, fraction: &str, exponent: u32) -> i128 {
    let mut units: i128 = 0;
    for digit in whole.bytes() {
        units = (units * 10 + i128::from(digit - b'0')).min(MAX + 1);
    }
    let mut nanos = units.checked_mul(NANO << exponent).unwrap_or(MAX * NANO).min(MAX * NANO);
    // The fraction is below 2^60 units: 18 digits of it are kept exactly, the rest only rounds.
    let mut numerator: i128 = 0;
    let mut denominator: i128 = 1;
    let mut rest = false;
    for (position, digit) in fraction.bytes().enumerate() {
        if position < 18 {
            numerator = numerator * 10 + i128::from(digit - b'0');
            denominator *= 10;
        } else {
            rest |= digit != b'0';
        }
    }
    // numerator × 2^exponent fits: 10^18 × 2^60 < 2^120.
    let scaled = numerator << exponent;
    let units = scaled / denominator;
    let remainder = (scaled % denominator) * NANO;
    nanos += units * NANO + remainder / denominator;
    if remainder % denominator != 0 || rest {
        nanos += 1;
    }
    nanos.min(MAX * NANO)
}

impl fmt::Display for Quantity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return out.write_str("0");
        }
        let small = self.nanos.abs() < 1024 * NANO;
        if self.format == Format::BinarySi && !small && self.is_integer() {
            let mut number = self.nanos / NANO;
            let mut power = 0;
            while number % 1024 == 0 && power < 6 {
                number /= 1024;
                power += 1;
            }
            return write!(out, "{number}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power]);
        }
        let mut number = self.nanos;
        let mut exponent = -9;
        while number % 1000 == 0 && exponent < 18 {
            number /= 1000;
            exponent += 3;
        }
        match self.format {
            Format::DecimalExponent if exponent == 0 => write!(out, "{number}"),
            Format::DecimalExponent => write!(out, "{number}e{exponent}"),
            _ => {
                let suffixes = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
                write!(out, "{number}{}", suffixes[((exponent + 9) / 3) as usize])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_forms() {
        for (text, want) in [
            ("0", "0"),
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1.5Gi", "1536Mi"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("1000Ki", "1000Ki"),
            ("100Mi", "100Mi"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("12e6", "12e6"),
            ("1500M", "1500M"),
            ("1000k", "1M"),
            ("-1.5", "-1500m"),
            ("0.5Ki", "512"),
            ("1Ki", "1Ki"),
            ("0.1n", "1n"),
            ("1.0000000001", "1000000001n"),
            ("9223372036854775807", "9223372036854775807"),
            ("99E", "9223372036854775807"),
            ("+1", "1"),
            (".5", "500m"),
            ("5.", "5"),
            ("0.0001Ki", "102400u"),
            ("100n", "100n"),
            ("1e-3", "1e-3"),
            ("0Mi", "0"),
        ] {
            let quantity: Quantity = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(quantity.to_string(), want, "{text}");
        }
    }

    #[test]
    fn errors() {
        for (text, want) in [
            ("", ParseError::Format),
            ("abc", ParseError::Format),
            ("1x", ParseError::Format),
            ("1Kii", ParseError::Suffix),
            ("1K", ParseError::Suffix),
            ("1e", ParseError::Suffix),
            (" 1", ParseError::Format),
            ("1 ", ParseError::Format),
            (".", ParseError::Numeric),
        ] {
            assert_eq!(text.parse::<Quantity>().expect_err(text), want, "{text}");
        }
    }

    #[test]
    fn rounding() {
        let quantity: Quantity = "1.1m".parse().expect("valid");
        assert_eq!((quantity.value(), quantity.milli_value()), (1, 2));
        let quantity: Quantity = "-1.1".parse().expect("valid");
        assert_eq!(quantity.value(), -2);
    }
}
