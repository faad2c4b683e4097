//! Build, gate, test, demonstrate and measure Coracle.
fn main() {}
