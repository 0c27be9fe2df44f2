//! The dot product of bytes in AVX registers, `vpdpbusd`: 32 products, added four by four in 32
//! bits. Everything else is as with AVX2.

use std::arch::x86_64::*;

use super::avx2::{Avx2, totals_of_eight};
use crate::{
    LANES, TERNARY_BLOCK,
    pack::BLOCK_BYTES,
    vector::{Product, Products, Tile, methods},
};

/// Proof that AVX-VNNI may be executed on this CPU, and all of AVX2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(());

impl AvxVnni {
    /// Returns the proof if the CPU has AVX-VNNI; that of AVX2 is given.
    pub(crate) fn detect(_: Avx2) -> Option<Self> {
        is_x86_feature_detected!("avxvnni").then_some(Self(()))
    }

    pub(crate) fn multiply<P: Product>(self, product: P) {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avxvnni")]
        fn enabled<P: Product>(vnni: AvxVnni, product: P) {
            product.run(vnni);
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { enabled(self, product) }
    }
}

impl Products for AvxVnni {
    type Lanes = Avx2;
    type Packed = __m256i;
    type Bytes = __m256i;
    type Run = __m256i;
    type Sums = __m256i;

    const PARTS: usize = TERNARY_BLOCK / 32;
    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Small;

    #[inline(always)]
    fn lanes(self) -> Avx2 {
        Avx2::of(self)
    }

    #[inline(always)]
    fn codes<const PART: usize>(self, packed: __m256i) -> __m256i {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { codes::<PART>(packed) }
    }

    #[inline(always)]
    fn activations<const PART: usize>(self, block: &[u8; TERNARY_BLOCK]) -> __m256i {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { load(&block.as_chunks().0[PART]) }
    }

    methods! { "avx2,fma,f16c,bmi1,bmi2,avxvnni"
        fn load_packed(block: &[u8; BLOCK_BYTES]) -> __m256i {
            load(block)
        }

        fn empty_run() -> __m256i {
            _mm256_setzero_si256()
        }

        fn dot(run: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            _mm256_dpbusd_avx_epi32(run, codes, x)
        }

        fn empty_sums() -> __m256i {
            _mm256_setzero_si256()
        }

        fn add_run(sums: __m256i, run: __m256i) -> __m256i {
            _mm256_add_epi32(sums, run)
        }

        fn total(sums: __m256i) -> i32 {
            let high = _mm256_extracti128_si256::<1>(sums);
            let four = _mm_add_epi32(_mm256_castsi256_si128(sums), high);
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
        }

        fn totals_of_rows(runs: &[__m256i; LANES]) -> [__m256i; 2] {
            let runs = runs.as_chunks().0;
            [totals_of_eight(runs[0]), totals_of_eight(runs[1])]
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is valid for 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn codes<const PART: usize>(packed: __m256i) -> __m256i {
    let shifted = match PART {
        0 => _mm256_srli_epi16::<6>(packed),
        1 => _mm256_srli_epi16::<4>(packed),
        2 => _mm256_srli_epi16::<2>(packed),
        _ => packed,
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(3))
}
