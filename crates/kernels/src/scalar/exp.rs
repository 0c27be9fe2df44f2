//! The exponential function.
//!
//! ```text
//! x clamped to [LOW, HIGH]
//! n = round(x * log2(e)), ties to even
//! r = x - n * ln(2), in two steps      |r| <= ln(2) / 2, the first step is exact but for one fma
//! p = 1 + r * (1 + r * (1/2 + ...))    polynomial of Cephes' expf, degree 7
//! p * 2^(n / 2) * 2^(n - n / 2)        two factors: neither overflows nor is subnormal by itself
//! ```

/// Below this, the result rounds to 0: less than half of the smallest subnormal, 2^-150.
pub(crate) const LOW: f32 = -104.0;

/// Above `ln(f32::MAX)` = 88.72 the result overflows; the last step makes infinity of it.
pub(crate) const HIGH: f32 = 89.0;

/// ln(2) as the nearest f32, and what is missing to the true value.
pub(crate) const LN2: [f32; 2] = [std::f32::consts::LN_2, -1.904_654_2e-9];

/// Coefficients of r^7 to 1, highest first (Cephes, `expf.c`).
pub(crate) const POLYNOMIAL: [f32; 8] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0];

/// Returns `e^x`; inlined into the other variants, for single numbers.
#[inline(always)]
pub(crate) fn exp_one(x: f32) -> f32 {
    // NaN passes through a clamp.
    let x = x.clamp(LOW, HIGH);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2[0], x);
    let r = n.mul_add(-LN2[1], r);
    let mut p = POLYNOMIAL[0];
    for c in &POLYNOMIAL[1..] {
        p = p.mul_add(r, *c);
    }
    #[expect(clippy::cast_possible_truncation, reason = "|n| < 151, and 0 for NaN")]
    let n = n as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

/// Returns `2^n` for `n` from -126 to 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23).cast_unsigned())
}

pub(crate) fn exp(x: &mut [f32]) {
    for x in x {
        *x = exp_one(*x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_values_are_exact() {
        for (x, y) in [
            (0.0, 1.0),
            (-0.0, 1.0),
            (f32::NEG_INFINITY, 0.0),
            (f32::INFINITY, f32::INFINITY),
            (f32::MIN, 0.0),
            (f32::MAX, f32::INFINITY),
            (88.8, f32::INFINITY),
            (-104.1, 0.0),
            (f32::MIN_POSITIVE, 1.0),
        ] {
            assert_eq!(exp_one(x).to_bits(), f32::to_bits(y), "exp({x})");
        }
        assert!(exp_one(f32::NAN).is_nan());
    }

    #[test]
    fn errors_stay_below_one_unit_in_the_last_place() {
        let mut worst = 0.0_f64;
        // Every 97th float of both signs between 2^-30 and the overflow, then of the subnormal
        // results.
        for bits in (0x3080_0000..=88.72_f32.to_bits()).step_by(97) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let exact = f64::from(x).exp();
                if exact < f64::from(f32::MIN_POSITIVE) {
                    continue;
                }
                #[expect(clippy::cast_possible_truncation, reason = "the reference, rounded")]
                let rounded = exact as f32;
                let unit = f64::from(rounded.next_up()) - f64::from(rounded);
                worst = worst.max((f64::from(exp_one(x)) - exact).abs() / unit);
            }
        }
        assert!(worst < 0.9, "worst error {worst} units");
        let subnormal = f64::from(f32::from_bits(1));
        for bits in ((-87.34_f32).to_bits()..=(-104.0_f32).to_bits()).step_by(13) {
            let x = f32::from_bits(bits);
            let error = (f64::from(exp_one(x)) - f64::from(x).exp()).abs() / subnormal;
            assert!(error < 1.0, "exp({x}) errs by {error} of the smallest subnormal");
        }
    }
}
