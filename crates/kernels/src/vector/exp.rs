//! The exponential function: step by step the scalar one.

use super::{Lanes, Operation};
use crate::scalar::exp::{HIGH, LN2, LOW, POLYNOMIAL, exp_one};

/// Returns the exponential of each lane.
#[inline(always)]
pub(super) fn exp_lanes<V: Lanes>(v: V, x: V::Floats) -> V::Floats {
    // Both return their second operand if it is NaN.
    let x = v.larger(v.splat(LOW), x);
    let x = v.smaller(v.splat(HIGH), x);
    let n = v.round(v.mul(x, v.splat(std::f32::consts::LOG2_E)));
    let r = v.fma(n, v.splat(-LN2[0]), x);
    let r = v.fma(n, v.splat(-LN2[1]), r);
    let mut p = v.splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = v.fma(p, r, v.splat(*c));
    }
    let [half, rest] = v.powers_of_two(n);
    v.mul(v.mul(p, half), rest)
}

/// [`Kernels::exp`](crate::Kernels::exp).
pub(crate) struct Exp<'a>(pub(crate) &'a mut [f32]);

impl Operation for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (chunks, tail) = self.0.as_chunks_mut();
        for x in chunks {
            v.store(x, exp_lanes(v, v.load(x)));
        }
        for x in tail {
            *x = exp_one(*x);
        }
    }
}
