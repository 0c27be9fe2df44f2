//! Element by element, and the search for the largest.

use std::arch::x86_64::{
    _CMP_GT_OQ, _CMP_LT_OQ, _mm256_add_epi32, _mm256_add_ps, _mm256_andnot_ps, _mm256_blendv_ps,
    _mm256_castps_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_div_ps, _mm256_mul_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_sub_ps,
    _mm256_xor_ps,
};

use super::{
    exp::exp_lanes,
    memory::{load, store, store_ints},
};
use crate::scalar::vector as scalar;

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    let (x, x_tail) = x.as_chunks();
    let (weight, weight_tail) = weight.as_chunks();
    let (out, out_tail) = out.as_chunks_mut();
    let factors = _mm256_set1_ps(factor);
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        store(out, _mm256_mul_ps(_mm256_mul_ps(load(x), factors), load(weight)));
    }
    scalar::scale(x_tail, factor, weight_tail, out_tail);
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn relu2_mul(gate: &mut [f32], up: &[f32]) {
    let (gate, gate_tail) = gate.as_chunks_mut();
    let (up, up_tail) = up.as_chunks();
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = load(gate);
        // NaN is not less than zero: it stays.
        let negative = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_setzero_ps());
        let positive = _mm256_andnot_ps(negative, x);
        store(gate, _mm256_mul_ps(_mm256_mul_ps(positive, positive), load(up)));
    }
    scalar::relu2_mul(gate_tail, up_tail);
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    let (gate, gate_tail) = gate.as_chunks_mut();
    let (up, up_tail) = up.as_chunks();
    let one = _mm256_set1_ps(1.0);
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = load(gate);
        let negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0));
        let kept = _mm256_div_ps(x, _mm256_add_ps(one, exp_lanes(negated)));
        store(gate, _mm256_mul_ps(kept, load(up)));
    }
    scalar::silu_mul(gate_tail, up_tail);
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn add(acc: &mut [f32], x: &[f32]) {
    let (acc, acc_tail) = acc.as_chunks_mut();
    let (x, x_tail) = x.as_chunks();
    for (acc, x) in acc.iter_mut().zip(x) {
        store(acc, _mm256_add_ps(load(acc), load(x)));
    }
    scalar::add(acc_tail, x_tail);
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    let ((first, first_tail), (second, second_tail)) =
        (first.as_chunks_mut(), second.as_chunks_mut());
    let ((cos, cos_tail), (sin, sin_tail)) = (cos.as_chunks(), sin.as_chunks());
    let pairs = first.iter_mut().zip(second);
    for ((a, b), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
        let (x, y, cos, sin) = (load(a), load(b), load(cos), load(sin));
        store(a, _mm256_sub_ps(_mm256_mul_ps(x, cos), _mm256_mul_ps(y, sin)));
        store(b, _mm256_add_ps(_mm256_mul_ps(y, cos), _mm256_mul_ps(x, sin)));
    }
    let pairs = first_tail.iter_mut().zip(second_tail);
    for ((a, b), (cos, sin)) in pairs.zip(cos_tail.iter().zip(sin_tail)) {
        scalar::turn(a, b, *cos, *sin);
    }
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn argmax(x: &[f32]) -> usize {
    if i32::try_from(x.len()).is_err() {
        return scalar::argmax(x);
    }
    let (chunks, tail) = x.as_chunks();
    let mut best = _mm256_set1_ps(f32::NEG_INFINITY);
    let mut best_index = _mm256_setzero_ps();
    let mut index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for x in chunks {
        let x = load(x);
        let larger = _mm256_cmp_ps::<_CMP_GT_OQ>(x, best);
        best = _mm256_blendv_ps(best, x, larger);
        best_index = _mm256_blendv_ps(best_index, _mm256_castsi256_ps(index), larger);
        index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
    }
    let (mut values, mut indices) = ([0.0; 8], [0; 8]);
    store(&mut values, best);
    store_ints(&mut indices, _mm256_castps_si256(best_index));
    // Each lane has its first largest element, so among equal lanes the lowest index is the first.
    let mut found = (f32::NEG_INFINITY, 0);
    for (value, index) in values.into_iter().zip(indices) {
        let index = usize::try_from(index).expect("lane indices count up from 0");
        if value > found.0 || (value == found.0 && index < found.1) {
            found = (value, index);
        }
    }
    for (i, &value) in (chunks.len() * 8..).zip(tail) {
        if value > found.0 {
            found = (value, i);
        }
    }
    found.1
}
