//! Every instruction set of this CPU and the stand-in of every other, every operation, many shapes:
//! the bits of the scalar variant.
//!
//! What ran, and what did not because the CPU lacks it, is told on standard error, past the capture
//! of the test harness; see `report`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod attention;
mod dense;
mod report;
mod screen;
mod support;
mod ternary;
mod vector;
