//! Element by element, and the search for the largest.

use super::exp::exp_one;

pub(crate) fn scale(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        *out = x * factor * weight;
    }
}

pub(crate) fn relu2_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let positive = if *gate < 0.0 { 0.0 } else { *gate };
        *gate = positive * positive * up;
    }
}

pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp_one(-*gate)) * up;
    }
}

pub(crate) fn add(acc: &mut [f32], x: &[f32]) {
    for (acc, x) in acc.iter_mut().zip(x) {
        *acc += x;
    }
}

pub(crate) fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        turn(a, b, *cos, *sin);
    }
}

/// Turns one pair; inlined into the other variants.
#[inline(always)]
pub(crate) fn turn(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
}

pub(crate) fn argmax(x: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, &x) in x.iter().enumerate() {
        if x > best.0 {
            best = (x, i);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_index() {
        let nan = f32::NAN;
        for (x, index) in [
            (&[][..], 0),
            (&[nan, nan], 0),
            (&[f32::NEG_INFINITY; 3], 0),
            (&[1.0, 3.0, 3.0, 2.0], 1),
            (&[nan, -1.0, nan, -1.0], 1),
            (&[0.0, -0.0], 0),
            (&[-0.0, 0.0], 0),
        ] {
            assert_eq!(argmax(x), index, "{x:?}");
        }
    }

    #[test]
    fn relu_squares_and_keeps_nan() {
        let mut gate = [-2.0, -0.0, 3.0, f32::NAN];
        relu2_mul(&mut gate, &[5.0, 5.0, 5.0, 5.0]);
        assert_eq!(gate[..3], [0.0, 0.0, 45.0]);
        assert!(gate[3].is_nan());
    }

    #[test]
    fn silu_is_close_to_its_definition_and_keeps_its_limits() {
        for x in [-30.0_f32, -2.5, -0.0, 0.3, 7.0] {
            let mut gate = [x];
            silu_mul(&mut gate, &[2.0]);
            let exact = 2.0 * f64::from(x) / (1.0 + f64::from(-x).exp());
            let error = (f64::from(gate[0]) - exact).abs();
            assert!(error <= exact.abs() * 1e-6, "{x}: {} {exact}", gate[0]);
        }
        let mut gate = [-200.0, 200.0, f32::NAN];
        silu_mul(&mut gate, &[1.0; 3]);
        assert_eq!(gate[..2], [-0.0, 200.0]);
        assert!(gate[2].is_nan());
    }

    #[test]
    fn rope_turns_pairs_half_a_head_apart() {
        // A quarter turn: (a, b) becomes (-b, a).
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rope(&mut head, &[0.0, 0.0], &[1.0, 1.0]);
        assert_eq!(head, [-3.0, -4.0, 1.0, 2.0]);
    }
}
