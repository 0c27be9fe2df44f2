//! Ternary packing and arithmetic, one variant per instruction set.
//!
//! A ternary weight is -1, 0 or 1. A matrix of them keeps four weights in a byte, in the bit order
//! of I2_S files: 128 weights of a row share 32 bytes, and byte `p` holds the four that are 32
//! apart, so that one vector of 32 bytes yields four vectors of 32 consecutive weights with three
//! shifts and four masks, and nothing ever crosses a lane:
//!
//! ```text
//! one block: 128 weights of one row in 32 bytes          a row: cols padded to full blocks
//!          bits 7-6   5-4     3-2     1-0                +---------+---------+--     --+
//! byte  0: [ w0   |  w32  |  w64  |  w96  ]              | block 0 | block 1 |   ...   |
//! byte  1: [ w1   |  w33  |  w65  |  w97  ]              +---------+---------+--     --+
//!   ...                                                  stored code = weight + 1: 0, 1, 2
//! byte 31: [ w31  |  w63  |  w95  |  w127 ]              padding is code 1 (weight 0)
//! ```
//!
//! Activations are quantised to int8, one scale a row ([`Int8Rows`]); products of both are summed
//! exactly in integers. With `code = weight + 1`, a row's product is
//! `sum(code * q) - sum(q)`, and the second sum is known since quantisation.
//!
//! # One answer
//!
//! Every operation has one result, to the bit, in every variant. The [`Isa::Scalar`] variant is
//! the specification: slow, plain, always compiled. The rules it spells out:
//!
//! - Integer sums cannot wrap, so their order is free.
//! - An f32 reduction has [`LANES`] virtual lanes. Lane `i` takes elements `i`, `i + 16`, ... in
//!   order with fused multiply-add; elements that do not exist are skipped, not added as zeros;
//!   the lanes are folded as a tree: lane `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
//! - Where a product is fused into a sum it is written `mul_add`; nothing else is contracted.
//! - [`exp`](Kernels::exp) is a polynomial of ours; `sqrt` and division are the exact ones of
//!   IEEE 754; approximate instructions are never used.
//! - Attention folds positions in an order that depends on positions only.
//!
//! NaN is the one value whose bits are not promised; a row that holds one is refused by
//! [`Kernels::quantize`].
//!
//! # Variants
//!
//! | [`Isa`] | CPU | lanes of f32 | products of bytes |
//! |---|---|---|---|
//! | `scalar` | any | one by one | one by one |
//! | `neon` | aarch64 | 4 registers | `smlal`, 16 bits |
//! | `dotprod` | aarch64 | as `neon` | `sdot`, 32 bits |
//! | `i8mm` | aarch64 | as `neon` | `smmla`, two rows times two, 32 bits |
//! | `avx2` | x86-64 | 2 registers | `vpmaddubsw`, 16 bits; tables for many tokens |
//! | `avx-vnni` | x86-64 | as `avx2` | `vpdpbusd`, 32 bits |
//! | `avx512` | x86-64 | 1 register | `vpdpbusd` of 64 bytes, 32 bits |
//!
//! The module `vector` has every algorithm once, generic over two small traits that an instruction
//! set implements in a thin file of intrinsics; the kernels of AVX2 alone, tuned by hand, came before
//! it. With the feature `emulated`, `Kernels::emulated` runs the algorithms of each instruction set
//! in plain arrays of its width, so that tests reach what the CPU at hand lacks. The tests in
//! `tests/battery` hold every variant and every stand-in to the bits of `scalar`, and name each
//! instruction set that only its stand-in ran; they also run on an emulated aarch64.
//!
//! # Reading order
//!
//! [`Isa`] and [`Kernels`] choose a variant; [`TernaryMatrix`], [`DenseMatrix`] and [`Int8Rows`]
//! are the operands; [`Screen`] is a smaller copy of one; [`MatrixMut`] hands disjoint columns of a result to threads; [`Crew`] is the
//! meeting point of those threads. This crate creates no thread, reads no file and depends on
//! nothing.

#![expect(
    unsafe_code,
    reason = "vector loads, disjoint columns of one buffer and the hand-over between threads"
)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod attention;
mod bytes;
mod crew;
mod dense;
mod error;
mod isa;
mod kernels;
mod matrix;
mod pack;
mod rows;
mod scalar;
mod scratch;
mod screen;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use self::{
    attention::{AttentionScratch, BLOCK_POSITIONS, SEGMENT_POSITIONS},
    bytes::{AlignedBytes, WeightBytes},
    crew::{Crew, Lead},
    dense::{DenseMatrix, DenseType},
    error::{NonFinite, ShapeError},
    isa::{Isa, UnknownIsa},
    kernels::Kernels,
    matrix::{ColumnsMut, MatrixMut},
    pack::{SCALE_BLOCK, TERNARY_BLOCK, TernaryMatrix},
    rows::{Int8RowMut, Int8Rows, Int8RowsMut},
    scratch::TernaryScratch,
    screen::{Screen, ScreenPart, ScreenQuery},
};

/// Virtual lanes of every f32 reduction.
pub const LANES: usize = 16;

/// Version of the arithmetic rules; it changes whenever any result's bits may change.
pub const NUMERICS: u32 = 1;
