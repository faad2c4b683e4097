//! Selectors of lists and watches: by labels and by fields.

pub mod field;
pub mod label;
