//! Resource quantities as integers: whole units and thousandths, rounded up as upstream rounds
//! (k8s.io/apimachinery/pkg/api/resource, `Value` and `MilliValue`).

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Whole units, rounded up; `None` when the text is no quantity or does not fit.
pub fn value(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1)
}

/// Thousandths of a unit, rounded up; `None` when the text is no quantity or does not fit.
pub fn milli_value(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1000)
}

/// The quantity in `unit`s (1 for whole units, 1000 for thousandths), rounded up.
fn scaled(text: &str, unit: i128) -> Option<i64> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (numerator, denominator) = suffix_factor(suffix)?;
    let fraction_scale = 10i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = mantissa.checked_mul(numerator)?.checked_mul(unit)?;
    let denominator = denominator.checked_mul(fraction_scale)?;
    let rounded = numerator.checked_add(denominator - 1)? / denominator;
    i64::try_from(if negative { -rounded } else { rounded }).ok()
}

/// A suffix as (numerator, denominator).
fn suffix_factor(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1i128 << (10 * power), 1));
    let decimal = |power: u32| Some((10i128.pow(power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = 10i128.checked_pow(power.unsigned_abs())?;
            Some(if power < 0 { (1, factor) } else { (factor, 1) })
        }
    }
}

/// The field `name` of a resource list, in whole units; absent or unreadable is 0.
pub fn list_value(list: Option<&std::collections::BTreeMap<String, Quantity>>, name: &str) -> i64 {
    list.and_then(|l| l.get(name)).and_then(value).unwrap_or(0)
}

/// The field `name` of a resource list, in thousandths; absent or unreadable is 0.
pub fn list_milli(list: Option<&std::collections::BTreeMap<String, Quantity>>, name: &str) -> i64 {
    list.and_then(|l| l.get(name)).and_then(milli_value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_suffix_and_rounds_up() {
        let q = |s: &str| Quantity(s.to_owned());
        for (text, whole, milli) in [
            ("0", 0, 0),
            ("100m", 1, 100),
            ("1", 1, 1000),
            ("1.5", 2, 1500),
            ("64Mi", 64 << 20, (64 << 20) * 1000),
            ("1e3", 1000, 1_000_000),
            ("5E-1", 1, 500),
            ("0.5Gi", 512 << 20, (512 << 20) * 1000),
            ("1n", 1, 1),
        ] {
            assert_eq!(value(&q(text)), Some(whole), "{text}");
            assert_eq!(milli_value(&q(text)), Some(milli), "{text}");
        }
        assert_eq!(value(&q("")), None);
        assert_eq!(value(&q("1Q")), None);
    }
}
