//! The dot product of bytes, `sdot`: 16 products a register, added four by four in 32 bits.

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::neon::{Neon, Packed, activations, codes, load_packed, products_of_neon, totals};
use crate::{
    LANES, TERNARY_BLOCK,
    pack::BLOCK_BYTES,
    vector::{Product, Products, Tile, methods},
};

/// Proof that NEON and the dot product may be executed on this CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonDot(Neon);

impl NeonDot {
    /// Returns the proof if the CPU has both.
    pub(crate) fn detect() -> Option<Self> {
        let neon = Neon::detect()?;
        is_aarch64_feature_detected!("dotprod").then_some(Self(neon))
    }

    pub(crate) fn multiply<P: Product>(self, product: P) {
        #[target_feature(enable = "neon,dotprod")]
        fn enabled<P: Product>(dot: NeonDot, product: P) {
            product.run(dot);
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { enabled(self, product) }
    }
}

/// Adds products to the lanes. The intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn sdot(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: the instruction works on these registers only, and the CPU has it.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

impl Products for NeonDot {
    products_of_neon!();

    type Run = int32x4_t;

    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Large;

    #[inline(always)]
    fn lanes(self) -> Neon {
        self.0
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
}
