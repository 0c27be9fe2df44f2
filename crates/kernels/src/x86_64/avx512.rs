//! AVX-512 with VNNI: the 16 virtual lanes are one register, and a register of codes is half of a
//! packed block.

use std::arch::x86_64::*;

use super::avx2::{Avx2, totals_of_eight};
use crate::{
    LANES, TERNARY_BLOCK,
    pack::BLOCK_BYTES,
    vector::{Lanes, Operation, Product, Products, Tile, methods},
};

/// Proof that AVX-512 F, BW, DQ, VL and VNNI may be executed on this CPU, and all of AVX2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Returns the proof if the CPU and the operating system support every feature.
    pub(crate) fn detect() -> Option<Self> {
        Avx2::detect()?;
        let supported = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        supported.then_some(Self(()))
    }

    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(
            enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        )]
        fn enabled<O: Operation>(avx512: Avx512, operation: O) -> O::Output {
            operation.run(avx512)
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { enabled(self, operation) }
    }

    pub(crate) fn multiply<P: Product>(self, product: P) {
        #[target_feature(
            enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        )]
        fn enabled<P: Product>(avx512: Avx512, product: P) {
            product.run(avx512);
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { enabled(self, product) }
    }
}

impl Lanes for Avx512 {
    type Floats = __m512;
    type Ints = __m512i;

    const MANY: bool = true;

    methods! { "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }

        fn load(x: &[f32; LANES]) -> __m512 {
            // SAFETY: the reference is valid for 64 bytes; the load needs no alignment.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }

        fn store(to: &mut [f32; LANES], x: __m512) {
            // SAFETY: the reference is valid for 64 bytes; the store needs no alignment.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }

        fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }

        fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }

        fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }

        fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }

        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }

        fn larger(a: __m512, b: __m512) -> __m512 {
            // The instruction returns its second operand if one is NaN, or both are zero.
            _mm512_max_ps(a, b)
        }

        fn smaller(a: __m512, b: __m512) -> __m512 {
            _mm512_min_ps(a, b)
        }

        fn larger_magnitude(largest: __m512, x: __m512) -> __m512 {
            let bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), bits))
        }

        fn round(x: __m512) -> __m512 {
            // No scale: to whole numbers.
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }

        fn powers_of_two(n: __m512) -> [__m512; 2] {
            let n = _mm512_cvtps_epi32(n);
            let half = _mm512_srai_epi32::<1>(n);
            [power_of_two(half), power_of_two(_mm512_sub_epi32(n, half))]
        }

        fn fold(x: __m512) -> f32 {
            let high = _mm512_extractf32x8_ps::<1>(x);
            let eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
            let high = _mm256_extractf128_ps::<1>(eight);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ps(two, _mm_shuffle_ps::<1>(two, two)))
        }

        fn splat_int(x: i32) -> __m512i {
            _mm512_set1_epi32(x)
        }

        fn add_ints(a: __m512i, b: __m512i) -> __m512i {
            _mm512_add_epi32(a, b)
        }

        fn sub_ints(a: __m512i, b: __m512i) -> __m512i {
            _mm512_sub_epi32(a, b)
        }

        fn store_ints(to: &mut [i32; LANES], x: __m512i) {
            // SAFETY: the reference is valid for 64 bytes; the store needs no alignment.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
        }

        fn to_ints(x: __m512) -> __m512i {
            _mm512_cvtps_epi32(x)
        }

        fn to_floats(x: __m512i) -> __m512 {
            _mm512_cvtepi32_ps(x)
        }

        fn store_as_bytes(to: &mut [u8; LANES], x: __m512i) {
            let bytes = _mm512_cvtepi32_epi8(x);
            // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
        }

        fn widen_bytes(x: &[u8; LANES]) -> __m512 {
            // SAFETY: the reference is valid for 16 bytes; the load needs no alignment.
            let bytes = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        }

        fn widen_f16(x: &[u8; 2 * LANES]) -> __m512 {
            _mm512_cvtph_ps(load_half(x))
        }

        fn widen_bf16(x: &[u8; 2 * LANES]) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_half(x))))
        }

        fn prefetch(bytes: &[u8], offset: usize) {
            // Whatever the address, a prefetch does not fault and reads nothing the program can see.
            _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(offset).cast());
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn power_of_two(n: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(n, _mm512_set1_epi32(127))))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_half(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is valid for 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

impl Products for Avx512 {
    type Lanes = Self;
    /// The block twice, so that each half can be shifted by its own number of bits.
    type Packed = __m512i;
    type Bytes = __m512i;
    type Run = __m512i;
    type Sums = __m512i;

    const PARTS: usize = TERNARY_BLOCK / 64;
    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Large;

    #[inline(always)]
    fn lanes(self) -> Self {
        self
    }

    #[inline(always)]
    fn codes<const PART: usize>(self, packed: __m512i) -> __m512i {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { codes::<PART>(packed) }
    }

    #[inline(always)]
    fn activations<const PART: usize>(self, block: &[u8; TERNARY_BLOCK]) -> __m512i {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { load(&block.as_chunks().0[PART]) }
    }

    methods! { "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        fn load_packed(block: &[u8; BLOCK_BYTES]) -> __m512i {
            _mm512_broadcast_i64x4(load_half(block))
        }

        fn empty_run() -> __m512i {
            _mm512_setzero_si512()
        }

        fn dot(run: __m512i, codes: __m512i, x: __m512i) -> __m512i {
            _mm512_dpbusd_epi32(run, codes, x)
        }

        fn empty_sums() -> __m512i {
            _mm512_setzero_si512()
        }

        fn add_run(sums: __m512i, run: __m512i) -> __m512i {
            _mm512_add_epi32(sums, run)
        }

        fn total(sums: __m512i) -> i32 {
            _mm512_reduce_add_epi32(sums)
        }

        fn totals_of_rows(runs: &[__m512i; LANES]) -> __m512i {
            let mut halves = [_mm256_setzero_si256(); LANES];
            for (half, run) in halves.iter_mut().zip(runs) {
                let high = _mm512_extracti64x4_epi64::<1>(*run);
                *half = _mm256_add_epi32(_mm512_castsi512_si256(*run), high);
            }
            let halves = halves.as_chunks().0;
            let low = _mm512_castsi256_si512(totals_of_eight(halves[0]));
            _mm512_inserti64x4::<1>(low, totals_of_eight(halves[1]))
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is valid for 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Returns the codes of 64 columns: those of two pairs of bits, one in each half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn codes<const PART: usize>(packed: __m512i) -> __m512i {
    let first = _mm512_castsi256_si512(_mm256_set1_epi16(if PART == 0 { 6 } else { 2 }));
    let shifts = _mm512_inserti64x4::<1>(first, _mm256_set1_epi16(if PART == 0 { 4 } else { 0 }));
    _mm512_and_si512(_mm512_srlv_epi16(packed, shifts), _mm512_set1_epi8(3))
}
