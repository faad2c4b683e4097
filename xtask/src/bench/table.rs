//! Tables: a row for each figure, a column for each side, and how many times better ours is.

/// Which of two figures is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The smaller: times, memory.
    Less,
    /// The larger: rates.
    More,
}

/// The head of a table of these sides, ours first.
pub fn head(sides: &[&str]) {
    let names = sides.iter().map(|side| format!(" {side:>22}")).collect::<String>();
    println!("{:<48}{names} {:>12}", "", if sides.len() == 2 { "times better" } else { "" });
}

/// One row: the cells, and the figures that are compared.
pub fn row(what: &str, cells: &[String], values: &[f64], better: Better) {
    let cells = cells.iter().map(|cell| format!(" {cell:>22}")).collect::<String>();
    println!("{what:<48}{cells} {:>12}", times_better(values, better).map(|times| format!("{times:.1}")).unwrap_or_default());
}

/// A row of times: the smallest and the middle one, which is compared.
pub fn spread(what: &str, taken: impl Iterator<Item = (f64, f64)>) {
    let taken: Vec<(f64, f64)> = taken.collect();
    let cells: Vec<String> = taken.iter().map(|(min, median)| format!("{min:.1} / {median:.1}")).collect();
    row(what, &cells, &taken.iter().map(|(_, median)| *median).collect::<Vec<_>>(), Better::Less);
}

/// A row of one figure of which less is better.
pub fn figure(what: &str, digits: usize, values: impl Iterator<Item = f64>) {
    let values: Vec<f64> = values.collect();
    row(what, &values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>(), &values, Better::Less);
}

/// How many times better the first of two figures is; `None` unless there are two that can be compared.
fn times_better(values: &[f64], better: Better) -> Option<f64> {
    let [ours, theirs] = *values else { return None };
    let (dividend, divisor) = if better == Better::Less { (theirs, ours) } else { (ours, theirs) };
    (divisor > 0.0).then(|| dividend / divisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_one_is_always_better() {
        assert_eq!(times_better(&[2.0, 8.0], Better::Less), Some(4.0));
        assert_eq!(times_better(&[8.0, 2.0], Better::More), Some(4.0));
        assert_eq!(times_better(&[8.0], Better::More), None);
        assert_eq!(times_better(&[0.0, 2.0], Better::Less), None);
    }
}
