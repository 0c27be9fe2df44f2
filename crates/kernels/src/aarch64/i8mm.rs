//! The matrix product of bytes, `smmla`: two rows of eight times two rows of eight, 32 products a
//! register, into four sums. A lone last row or token is left to `sdot`.

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::{
    dotprod::{NeonDot, sdot},
    neon::{Neon, Packed, activations, codes, load_packed, products_of_neon, totals},
};
use crate::{
    LANES, TERNARY_BLOCK,
    pack::BLOCK_BYTES,
    vector::{Product, Products, Tile, methods, pair},
};

/// Proof that NEON, the dot product and the matrix product may be executed on this CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonI8mm(NeonDot);

impl NeonI8mm {
    /// Returns the proof if the CPU has all of them.
    pub(crate) fn detect() -> Option<Self> {
        let dot = NeonDot::detect()?;
        is_aarch64_feature_detected!("i8mm").then_some(Self(dot))
    }

    pub(crate) fn multiply<P: Product>(self, product: P) {
        #[target_feature(enable = "neon,dotprod,i8mm")]
        fn enabled<P: Product>(i8mm: NeonI8mm, product: P) {
            product.run(i8mm);
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { enabled(self, product) }
    }
}

/// Adds the products of two rows of codes with two rows of activations to their four sums, row by
/// row. The intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the instruction works on these registers only, and the CPU has it.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Adds the products of two rows of 16 codes with two rows of activations.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn add_pairs(sums: int32x4_t, codes: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    let sums = smmla(sums, low_halves(codes), low_halves(x));
    smmla(sums, high_halves(codes), high_halves(x))
}

#[inline]
#[target_feature(enable = "neon")]
fn low_halves(rows: [int8x16_t; 2]) -> int8x16_t {
    let [first, second] = [vreinterpretq_s64_s8(rows[0]), vreinterpretq_s64_s8(rows[1])];
    vreinterpretq_s8_s64(vzip1q_s64(first, second))
}

#[inline]
#[target_feature(enable = "neon")]
fn high_halves(rows: [int8x16_t; 2]) -> int8x16_t {
    let [first, second] = [vreinterpretq_s64_s8(rows[0]), vreinterpretq_s64_s8(rows[1])];
    vreinterpretq_s8_s64(vzip2q_s64(first, second))
}

impl Products for NeonI8mm {
    products_of_neon!();

    type Run = int32x4_t;

    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Paired;

    #[inline(always)]
    fn lanes(self) -> Neon {
        self.0.lanes()
    }

    methods! { "neon,dotprod"
        fn empty_run() -> int32x4_t {
            vdupq_n_s32(0)
        }

        fn dot(run: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
            sdot(run, codes, x)
        }

        fn add_run(sums: int32x4_t, run: int32x4_t) -> int32x4_t {
            vaddq_s32(sums, run)
        }

        fn totals_of_rows(runs: &[int32x4_t; LANES]) -> [int32x4_t; 4] {
            totals(runs)
        }
    }

    /// The register of the first row and token of a pair of pairs has the sums of all four.
    #[inline(always)]
    fn multiply<const R: usize, const T: usize>(
        self,
        runs: &mut [[int32x4_t; T]; R],
        codes: [int8x16_t; R],
        x: [int8x16_t; T],
    ) {
        for r in 0..R {
            for t in 0..T {
                match pair::<R, T>(r, t) {
                    None => runs[r][t] = self.dot(runs[r][t], codes[r], x[t]),
                    Some(0) => {
                        let (codes, x) = ([codes[r], codes[r + 1]], [x[t], x[t + 1]]);
                        // SAFETY: `self` exists, so the CPU has the features.
                        runs[r][t] = unsafe { add_pairs(runs[r][t], codes, x) };
                    }
                    Some(_) => {}
                }
            }
        }
    }

    #[inline(always)]
    fn totals<const R: usize, const T: usize>(self, sums: [[int32x4_t; T]; R]) -> [[i32; T]; R] {
        let mut totals = [[0; T]; R];
        for r in 0..R {
            for t in 0..T {
                match pair::<R, T>(r, t) {
                    None => totals[r][t] = self.total(sums[r][t]),
                    Some(0) => {
                        let mut lanes = [0; 4];
                        // SAFETY: the array has room for 16 bytes; the store needs no alignment.
                        unsafe { vst1q_s32(lanes.as_mut_ptr(), sums[r][t]) }
                        (totals[r][t], totals[r][t + 1]) = (lanes[0], lanes[1]);
                        (totals[r + 1][t], totals[r + 1][t + 1]) = (lanes[2], lanes[3]);
                    }
                    Some(_) => {}
                }
            }
        }
        totals
    }
}
