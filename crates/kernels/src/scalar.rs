//! The specification: every operation in plain Rust, as obvious as it can be.
//!
//! Other variants give the same bits. Functions that are inlined into them are marked so; they are
//! the ones that work on single numbers.

pub(crate) mod attention;
pub(crate) mod dense;
pub(crate) mod exp;
pub(crate) mod lanes;
pub(crate) mod screen;
pub(crate) mod ternary;
pub(crate) mod vector;
