//! Every instruction set of this CPU, every operation, many shapes: the bits of the scalar variant.
//!
//! An instruction set that the CPU lacks is named on standard error, past the capture of the test
//! harness, and its tests are then no evidence.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod attention;
mod dense;
mod support;
mod ternary;
mod vector;
