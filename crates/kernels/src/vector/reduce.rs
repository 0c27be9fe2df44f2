//! Reductions in the virtual lanes.

use super::{Lanes, Operation, exp::exp_lanes};
use crate::{
    LANES,
    scalar::{exp::exp_one, lanes},
};

/// [`Kernels::dot`](crate::Kernels::dot).
pub(crate) struct Dot<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
}

impl Operation for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) -> f32 {
        dot(v, self.a, self.b)
    }
}

#[inline(always)]
pub(super) fn dot<V: Lanes>(v: V, a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = a.as_chunks();
    let (b, b_tail) = b.as_chunks();
    let mut sum = v.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = v.fma(v.load(a), v.load(b), sum);
    }
    fold_with_tail(v, sum, a_tail, b_tail)
}

/// Adds the products of what remains of two rows, fewer numbers than there are lanes, and folds.
#[inline(always)]
pub(super) fn fold_with_tail<V: Lanes>(v: V, sum: V::Floats, a: &[f32], b: &[f32]) -> f32 {
    if a.is_empty() {
        return v.fold(sum);
    }
    let mut sums = [0.0; LANES];
    v.store(&mut sums, sum);
    for ((a, b), sum) in a.iter().zip(b).zip(&mut sums) {
        *sum = a.mul_add(*b, *sum);
    }
    lanes::fold(sums)
}

#[inline(always)]
pub(super) fn sum<V: Lanes>(v: V, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks();
    let mut sum = v.splat(0.0);
    for x in chunks {
        sum = v.add(sum, v.load(x));
    }
    let mut sums = [0.0; LANES];
    v.store(&mut sums, sum);
    for (x, sum) in tail.iter().zip(&mut sums) {
        *sum += x;
    }
    lanes::fold(sums)
}

/// [`Kernels::sum_exp`](crate::Kernels::sum_exp).
pub(crate) struct SumExp<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) max: f32,
}

impl Operation for SumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) -> f32 {
        let (chunks, tail) = self.x.as_chunks();
        let max = v.splat(self.max);
        let mut sum = v.splat(0.0);
        for x in chunks {
            sum = v.add(sum, exp_lanes(v, v.sub(v.load(x), max)));
        }
        let mut sums = [0.0; LANES];
        v.store(&mut sums, sum);
        for (x, sum) in tail.iter().zip(&mut sums) {
            *sum += exp_one(x - self.max);
        }
        lanes::fold(sums)
    }
}
