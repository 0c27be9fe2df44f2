//! Reductions in virtual lanes.

use crate::{LANES, scalar::exp::exp_one};

/// Folds the lanes: `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let lane = &mut lanes[i % LANES];
        *lane = a.mul_add(*b, *lane);
    }
    fold(lanes)
}

pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (i, x) in x.iter().enumerate() {
        lanes[i % LANES] += x;
    }
    fold(lanes)
}

pub(crate) fn sum_exp(x: &[f32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for (i, x) in x.iter().enumerate() {
        lanes[i % LANES] += exp_one(x - max);
    }
    fold(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_fold_as_a_tree_of_8_4_2_1() {
        // Each number is lost when it meets 2^24 alone and kept when it has met its partner first.
        let big = 16_777_216.0;
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[1], lanes[9]) = (big, 1.0, 1.0);
        assert_eq!(fold(lanes), big + 2.0);
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[8], lanes[1]) = (big, 1.0, 1.0);
        assert_eq!(fold(lanes), big);
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[2], lanes[6]) = (big, 1.0, 1.0);
        assert_eq!(fold(lanes), big + 2.0);
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[1], lanes[3]) = (big, 1.0, 1.0);
        assert_eq!(fold(lanes), big + 2.0);
    }

    #[test]
    fn missing_elements_are_skipped_not_added() {
        // The product underflows to -0; adding +0 afterwards would make it +0.
        let tiny = f32::from_bits(1);
        assert_eq!(dot(&[-tiny; 16], &[tiny; 16]).to_bits(), (-0.0_f32).to_bits());
    }
}
