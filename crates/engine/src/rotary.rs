//! Rotary frequencies and the scalings of them.

use std::f64::consts::{PI, TAU};

use crate::model_file::{ModelConfig, RopeScaling};

/// What turns queries and keys.
#[derive(Debug)]
pub(crate) struct Rotary {
    /// Angle per position, one for each pair of a head.
    pub(crate) frequencies: Vec<f32>,
    /// Factor on cosines and sines; 1 unless the scaling says otherwise.
    pub(crate) magnitude: f32,
}

impl Rotary {
    /// Computes `theta^(-2i / d)` and the model's scaling of it in f64, rounded once.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let (theta, head_dim) = (f64::from(config.rope_theta), float(config.head_dim));
        let plain =
            (0..config.head_dim / 2).map(|i| 1.0 / libm::pow(theta, float(2 * i) / head_dim));
        let mut magnitude = 1.0;
        let frequencies = match &config.rope_scaling {
            RopeScaling::None => plain.map(round).collect(),
            RopeScaling::Linear { factor } => {
                plain.map(|frequency| round(frequency / f64::from(*factor))).collect()
            }
            RopeScaling::Factors(factors) => {
                let pairs = plain.zip(factors);
                pairs.map(|(frequency, factor)| round(frequency / f64::from(*factor))).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (factor, original) = (f64::from(*factor), float(*original_context));
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let scaled = plain.map(|frequency| {
                    // Rotations over the original context.
                    let rotations = original * frequency / TAU;
                    if rotations < low {
                        frequency / factor
                    } else if rotations > high {
                        frequency
                    } else {
                        let kept = (rotations - low) / (high - low);
                        (1.0 - kept) * frequency / factor + kept * frequency
                    }
                });
                scaled.map(round).collect()
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                original_context,
            } => {
                magnitude = *attention_factor;
                let (factor, original) = (f64::from(*factor), float(*original_context));
                // The dimension that rotates `rotations` times over the original context.
                let dimension = |rotations: f32| {
                    let wavelength = original / (f64::from(rotations) * 2.0 * PI);
                    head_dim * libm::log(wavelength) / (2.0 * libm::log(theta))
                };
                let low = libm::floor(dimension(*beta_fast)).max(0.0);
                let high = libm::ceil(dimension(*beta_slow)).min(head_dim - 1.0);
                let span = if high == low { 0.001 } else { high - low };
                let scaled = plain.enumerate().map(|(i, frequency)| {
                    let divided = ((float(i) - low) / span).clamp(0.0, 1.0);
                    divided * frequency / factor + (1.0 - divided) * frequency
                });
                scaled.map(round).collect()
            }
        };
        Self { frequencies, magnitude }
    }
}

#[expect(clippy::cast_precision_loss, reason = "head sizes and contexts are far below 2^53")]
fn float(size: usize) -> f64 {
    size as f64
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
pub(crate) fn round(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(head_dim: usize, rope_theta: f32, rope_scaling: RopeScaling) -> Rotary {
        let config = crate::demo::model().unwrap().config;
        Rotary::new(&ModelConfig { head_dim, rope_theta, rope_scaling, ..config })
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let Rotary { frequencies, magnitude } = rotary(8, 10_000.0, RopeScaling::None);
        assert_eq!(frequencies, [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(magnitude.to_bits(), 1.0_f32.to_bits());
        let halved = rotary(8, 10_000.0, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(halved.frequencies, [0.5, 0.05, 0.005, 0.0005]);
        let factors = RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0]);
        assert_eq!(rotary(8, 10_000.0, factors).frequencies, [1.0, 0.05, 0.0025, 0.000_125]);
    }

    #[test]
    fn llama3_keeps_high_divides_low_and_interpolates_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 128,
        };
        let scaled = rotary(8, 10_000.0, scaling).frequencies;
        // 128 / 2 pi = 20.4 rotations, then 2.04, then 0.2 and 0.02.
        let kept = (128.0 * 0.1 / TAU - 1.0) / 3.0;
        let between = round((1.0 - kept) * 0.1 / 8.0 + kept * 0.1);
        assert_eq!(scaled, [1.0, between, 0.001_25, 0.000_125]);
    }

    #[test]
    fn yarn_ramps_over_the_dimensions() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.138_629_4,
            original_context: 32_768,
        };
        let Rotary { frequencies, magnitude } = rotary(128, 1_000_000.0, scaling);
        let plain = rotary(128, 1_000_000.0, RopeScaling::None).frequencies;
        assert_eq!(magnitude.to_bits(), 1.138_629_4_f32.to_bits());
        // 128 * ln(32768 / (32 * 2 pi)) / (2 ln 1e6) = 23.6 and, for one rotation, 39.6.
        assert_eq!(frequencies[..=23], plain[..=23]);
        for i in 40..64 {
            assert_eq!(frequencies[i].to_bits(), (plain[i] / 4.0).to_bits(), "{i}");
        }
        let at_31 = frequencies[31] / plain[31];
        assert!((at_31 - (1.0 - 0.75 * 8.0 / 17.0)).abs() < 1e-6, "{at_31}");
    }
}
