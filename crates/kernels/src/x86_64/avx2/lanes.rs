//! Reductions in virtual lanes: two registers of eight.

use std::arch::x86_64::{
    __m128, __m256, _mm_add_ps, _mm_cvtss_f32, _mm_movehl_ps, _mm_movelh_ps, _mm_shuffle_ps,
    _mm256_add_ps, _mm256_blendv_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_sub_ps,
};

use super::{
    exp::exp_lanes,
    memory::{first_lanes, load, load_some, store},
};
use crate::{
    LANES,
    scalar::{exp::exp_one, lanes},
};

/// The 16 lanes of one sum.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    pub(super) low: __m256,
    pub(super) high: __m256,
}

impl Lanes {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    pub(super) fn zero() -> Self {
        Self { low: _mm256_setzero_ps(), high: _mm256_setzero_ps() }
    }

    /// Returns the lanes as numbers, for what remains of a row.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    pub(super) fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        let (low, high) = halves_mut(&mut lanes);
        store(low, self.low);
        store(high, self.high);
        lanes
    }

    /// Folds the lanes as the specification says.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    pub(super) fn fold(self) -> f32 {
        let four = self.fold_to_four();
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let one = _mm_add_ps(two, _mm_shuffle_ps::<1>(two, two));
        _mm_cvtss_f32(one)
    }

    /// Adds the products of what remains of two rows: fewer numbers than there are lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    pub(super) fn add_tail(self, a: &[f32], b: &[f32]) -> Self {
        let (a, a_high) = a.split_at(a.len().min(8));
        let (b, b_high) = b.split_at(a.len());
        Self { low: add_some(self.low, a, b), high: add_some(self.high, a_high, b_high) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    fn fold_to_four(self) -> __m128 {
        let eight = _mm256_add_ps(self.low, self.high);
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
    }
}

/// Adds the products of up to eight numbers; the lanes behind them stay as they are, to the sign of
/// a zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn add_some(sum: __m256, a: &[f32], b: &[f32]) -> __m256 {
    let added = _mm256_fmadd_ps(load_some(a), load_some(b), sum);
    _mm256_blendv_ps(sum, added, _mm256_castsi256_ps(first_lanes(a.len())))
}

/// Folds four sums at once; the same additions as four times [`Lanes::fold`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn fold_four(sums: [Lanes; 4]) -> __m128 {
    let a = sums[0].fold_to_four();
    let b = sums[1].fold_to_four();
    let c = sums[2].fold_to_four();
    let d = sums[3].fold_to_four();
    // Lanes 0 and 1 plus lanes 2 and 3, of two sums in one register.
    let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    let even = _mm_shuffle_ps::<0b10_00_10_00>(ab, cd);
    let odd = _mm_shuffle_ps::<0b11_01_11_01>(ab, cd);
    _mm_add_ps(even, odd)
}

/// Splits 16 numbers into the registers of the low and the high lanes.
#[inline]
pub(super) fn halves(x: &[f32; LANES]) -> (&[f32; 8], &[f32; 8]) {
    let ([low, high], []) = x.as_chunks() else { unreachable!("16 is twice 8") };
    (low, high)
}

#[inline]
pub(super) fn halves_mut(x: &mut [f32; LANES]) -> (&mut [f32; 8], &mut [f32; 8]) {
    let ([low, high], []) = x.as_chunks_mut() else { unreachable!("16 is twice 8") };
    (low, high)
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = a.as_chunks();
    let (b, b_tail) = b.as_chunks();
    let mut sum = Lanes::zero();
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (halves(a), halves(b));
        sum.low = _mm256_fmadd_ps(load(a.0), load(b.0), sum.low);
        sum.high = _mm256_fmadd_ps(load(a.1), load(b.1), sum.high);
    }
    if a_tail.is_empty() { sum.fold() } else { sum.add_tail(a_tail, b_tail).fold() }
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn sum(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let mut sum = Lanes::zero();
    for x in chunks {
        let x = halves(x);
        sum.low = _mm256_add_ps(sum.low, load(x.0));
        sum.high = _mm256_add_ps(sum.high, load(x.1));
    }
    if tail.is_empty() {
        return sum.fold();
    }
    let mut sums = sum.to_array();
    for (x, sum) in tail.iter().zip(&mut sums) {
        *sum += x;
    }
    lanes::fold(sums)
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn sum_exp(x: &[f32], max: f32) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let maxima = _mm256_set1_ps(max);
    let mut sum = Lanes::zero();
    for x in chunks {
        let x = halves(x);
        sum.low = _mm256_add_ps(sum.low, exp_lanes(_mm256_sub_ps(load(x.0), maxima)));
        sum.high = _mm256_add_ps(sum.high, exp_lanes(_mm256_sub_ps(load(x.1), maxima)));
    }
    let mut sums = sum.to_array();
    for (x, sum) in tail.iter().zip(&mut sums) {
        *sum += exp_one(x - max);
    }
    lanes::fold(sums)
}
