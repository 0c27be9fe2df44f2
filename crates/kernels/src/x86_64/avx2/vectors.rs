//! The traits of the algorithms: the 16 virtual lanes are two registers.

use std::arch::x86_64::*;

use super::{Avx2, memory};
use crate::{
    LANES,
    vector::{Lanes, methods},
};

type Floats = [__m256; 2];
type Ints = [__m256i; 2];

impl Lanes for Avx2 {
    type Floats = Floats;
    type Ints = Ints;

    const MANY: bool = false;

    methods! { "avx2,fma,f16c,bmi1,bmi2"
        fn splat(x: f32) -> Floats {
            [_mm256_set1_ps(x); 2]
        }

        fn load(x: &[f32; LANES]) -> Floats {
            let x = x.as_chunks().0;
            [memory::load(&x[0]), memory::load(&x[1])]
        }

        fn store(to: &mut [f32; LANES], x: Floats) {
            for (to, x) in to.as_chunks_mut().0.iter_mut().zip(x) {
                memory::store(to, x);
            }
        }

        fn add(a: Floats, b: Floats) -> Floats {
            [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
        }

        fn sub(a: Floats, b: Floats) -> Floats {
            [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
        }

        fn mul(a: Floats, b: Floats) -> Floats {
            [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
        }

        fn div(a: Floats, b: Floats) -> Floats {
            [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
        }

        fn fma(a: Floats, b: Floats, c: Floats) -> Floats {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }

        fn larger(a: Floats, b: Floats) -> Floats {
            // The instruction returns its second operand if one is NaN, or both are zero.
            [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
        }

        fn smaller(a: Floats, b: Floats) -> Floats {
            [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
        }

        fn larger_magnitude(largest: Floats, x: Floats) -> Floats {
            [larger_magnitude(largest[0], x[0]), larger_magnitude(largest[1], x[1])]
        }

        fn round(x: Floats) -> Floats {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            [_mm256_round_ps::<NEAREST>(x[0]), _mm256_round_ps::<NEAREST>(x[1])]
        }

        fn powers_of_two(n: Floats) -> [Floats; 2] {
            let [low, high] = [_mm256_cvtps_epi32(n[0]), _mm256_cvtps_epi32(n[1])];
            let half = [_mm256_srai_epi32::<1>(low), _mm256_srai_epi32::<1>(high)];
            let rest = [_mm256_sub_epi32(low, half[0]), _mm256_sub_epi32(high, half[1])];
            [
                [power_of_two(half[0]), power_of_two(half[1])],
                [power_of_two(rest[0]), power_of_two(rest[1])],
            ]
        }

        fn fold(x: Floats) -> f32 {
            let eight = _mm256_add_ps(x[0], x[1]);
            let high = _mm256_extractf128_ps::<1>(eight);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ps(two, _mm_shuffle_ps::<1>(two, two)))
        }

        fn splat_int(x: i32) -> Ints {
            [_mm256_set1_epi32(x); 2]
        }

        fn add_ints(a: Ints, b: Ints) -> Ints {
            [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
        }

        fn sub_ints(a: Ints, b: Ints) -> Ints {
            [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])]
        }

        fn store_ints(to: &mut [i32; LANES], x: Ints) {
            for (to, x) in to.as_chunks_mut().0.iter_mut().zip(x) {
                memory::store_ints(to, x);
            }
        }

        fn to_ints(x: Floats) -> Ints {
            [_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1])]
        }

        fn to_floats(x: Ints) -> Floats {
            [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])]
        }

        fn store_as_bytes(to: &mut [u8; LANES], x: Ints) {
            // Packing works in 128-bit halves: fours 0 and 2, then 1 and 3.
            let shorts = _mm256_packs_epi32(x[0], x[1]);
            let shorts = _mm256_permute4x64_epi64::<0b11_01_10_00>(shorts);
            let high = _mm256_extracti128_si256::<1>(shorts);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), high);
            // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
            unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), bytes) }
        }

        fn widen_bytes(x: &[u8; LANES]) -> Floats {
            let x = memory::load_half(x);
            let high = _mm_srli_si128::<8>(x);
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            ]
        }

        fn widen_f16(x: &[u8; 2 * LANES]) -> Floats {
            let x = x.as_chunks().0;
            [_mm256_cvtph_ps(memory::load_half(&x[0])), _mm256_cvtph_ps(memory::load_half(&x[1]))]
        }

        fn widen_bf16(x: &[u8; 2 * LANES]) -> Floats {
            let x = x.as_chunks().0;
            [upper_halves(memory::load_half(&x[0])), upper_halves(memory::load_half(&x[1]))]
        }

        fn prefetch(bytes: &[u8], offset: usize) {
            // Whatever the address, a prefetch does not fault and reads nothing the program can see.
            _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(offset).cast());
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn larger_magnitude(largest: __m256, x: __m256) -> __m256 {
    let bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX));
    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), bits))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn upper_halves(x: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
}

/// Returns the totals of eight registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(in super::super) fn totals_of_eight(sums: [__m256i; 8]) -> __m256i {
    let [a, b, c, d, e, f, g, h] = sums;
    let first = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let second = _mm256_hadd_epi32(_mm256_hadd_epi32(e, f), _mm256_hadd_epi32(g, h));
    // Each half has four totals of half of the lanes.
    let low = _mm256_permute2x128_si256::<0x20>(first, second);
    _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(first, second))
}
