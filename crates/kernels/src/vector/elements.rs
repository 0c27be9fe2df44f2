//! Element by element, and the search for the largest.

use super::{Lanes, Operation, exp::exp_lanes};
use crate::{LANES, scalar::vector as scalar};

/// `out = x * factor * weight`.
pub(crate) struct Scale<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) factor: f32,
    pub(crate) weight: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Operation for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (x, x_tail) = self.x.as_chunks();
        let (weight, weight_tail) = self.weight.as_chunks();
        let (out, out_tail) = self.out.as_chunks_mut();
        let factor = v.splat(self.factor);
        for ((x, weight), out) in x.iter().zip(weight).zip(out) {
            v.store(out, v.mul(v.mul(v.load(x), factor), v.load(weight)));
        }
        scalar::scale(x_tail, self.factor, weight_tail, out_tail);
    }
}

/// [`Kernels::relu2_mul`](crate::Kernels::relu2_mul).
pub(crate) struct Relu2Mul<'a> {
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
}

impl Operation for Relu2Mul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (gate, gate_tail) = self.gate.as_chunks_mut();
        let (up, up_tail) = self.up.as_chunks();
        for (gate, up) in gate.iter_mut().zip(up) {
            // Zero is not larger than NaN: it stays.
            let positive = v.larger(v.splat(0.0), v.load(gate));
            v.store(gate, v.mul(v.mul(positive, positive), v.load(up)));
        }
        scalar::relu2_mul(gate_tail, up_tail);
    }
}

/// [`Kernels::silu_mul`](crate::Kernels::silu_mul).
pub(crate) struct SiluMul<'a> {
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
}

impl Operation for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (gate, gate_tail) = self.gate.as_chunks_mut();
        let (up, up_tail) = self.up.as_chunks();
        let one = v.splat(1.0);
        for (gate, up) in gate.iter_mut().zip(up) {
            let x = v.load(gate);
            let negated = v.mul(x, v.splat(-1.0));
            let kept = v.div(x, v.add(one, exp_lanes(v, negated)));
            v.store(gate, v.mul(kept, v.load(up)));
        }
        scalar::silu_mul(gate_tail, up_tail);
    }
}

/// [`Kernels::add`](crate::Kernels::add).
pub(crate) struct Add<'a> {
    pub(crate) acc: &'a mut [f32],
    pub(crate) x: &'a [f32],
}

impl Operation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (acc, acc_tail) = self.acc.as_chunks_mut();
        let (x, x_tail) = self.x.as_chunks();
        for (acc, x) in acc.iter_mut().zip(x) {
            v.store(acc, v.add(v.load(acc), v.load(x)));
        }
        scalar::add(acc_tail, x_tail);
    }
}

/// [`Kernels::rope`](crate::Kernels::rope).
pub(crate) struct Rope<'a> {
    pub(crate) head: &'a mut [f32],
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

impl Operation for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let (first, second) = self.head.split_at_mut(self.cos.len());
        let (first, first_tail) = first.as_chunks_mut();
        let (second, second_tail) = second.as_chunks_mut();
        let ((cos, cos_tail), (sin, sin_tail)) = (self.cos.as_chunks(), self.sin.as_chunks());
        let pairs = first.iter_mut().zip(second);
        for ((a, b), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
            let (x, y, cos, sin) = (v.load(a), v.load(b), v.load(cos), v.load(sin));
            v.store(a, v.sub(v.mul(x, cos), v.mul(y, sin)));
            v.store(b, v.add(v.mul(y, cos), v.mul(x, sin)));
        }
        let pairs = first_tail.iter_mut().zip(second_tail);
        for ((a, b), (cos, sin)) in pairs.zip(cos_tail.iter().zip(sin_tail)) {
            scalar::turn(a, b, *cos, *sin);
        }
    }
}

/// [`Kernels::argmax`](crate::Kernels::argmax).
pub(crate) struct Argmax<'a>(pub(crate) &'a [f32]);

/// Elements whose largest is found before it is compared with the best so far.
const STRETCH: usize = 32 * LANES;

impl Operation for Argmax<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) -> usize {
        let mut best = (f32::NEG_INFINITY, 0);
        let mut start = 0;
        for stretch in self.0.chunks(STRETCH) {
            let (chunks, tail) = stretch.as_chunks();
            let mut largest = v.splat(f32::NEG_INFINITY);
            for x in chunks {
                // What is there already is never NaN, so no NaN comes in.
                largest = v.larger(v.load(x), largest);
            }
            let mut lanes = [0.0; LANES];
            v.store(&mut lanes, largest);
            let mut max = best.0;
            for &x in lanes.iter().chain(tail) {
                if x > max {
                    max = x;
                }
            }
            if max > best.0 {
                let at = stretch.iter().position(|&x| x == max);
                best = (max, start + at.expect("the largest is one of them"));
            }
            start += stretch.len();
        }
        best.1
    }
}
