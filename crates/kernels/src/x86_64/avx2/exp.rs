//! The exponential function, eight at a time: step by step the scalar one.

use std::arch::x86_64::{
    __m256, __m256i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_add_epi32,
    _mm256_castsi256_ps, _mm256_cvtps_epi32, _mm256_fmadd_ps, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32,
    _mm256_srai_epi32, _mm256_sub_epi32,
};

use super::memory::{load, store};
use crate::scalar::exp::{HIGH, LN2, LOW, POLYNOMIAL, exp_one};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn exp_lanes(x: __m256) -> __m256 {
    // Both instructions return their second operand if one is NaN.
    let x = _mm256_max_ps(_mm256_set1_ps(LOW), x);
    let x = _mm256_min_ps(_mm256_set1_ps(HIGH), x);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2[0]), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2[1]), r);
    let mut p = _mm256_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let p = _mm256_mul_ps(p, power_of_two(half));
    _mm256_mul_ps(p, power_of_two(_mm256_sub_epi32(n, half)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn exp(x: &mut [f32]) {
    let (chunks, tail) = x.as_chunks_mut();
    for x in chunks {
        store(x, exp_lanes(load(x)));
    }
    for x in tail {
        *x = exp_one(*x);
    }
}
