//! Rotary scaling in GGUF files: keys, and a tensor of factors.

use super::Gguf;
use super::model::{GgufModel, floats};
use crate::model_file::config::RopeScaling;
use crate::model_file::error::ModelError;
use crate::model_file::folder::narrow;

/// Name of the tensor of factors.
pub(crate) const FACTORS: &str = "rope_freqs.weight";

/// Keys of the rule behind [`FACTORS`], which other programs leave alone.
pub(crate) mod llama3 {
    pub(crate) const FACTOR: &str = "tercet.rope.llama3.factor";
    pub(crate) const LOW: &str = "tercet.rope.llama3.low_freq_factor";
    pub(crate) const HIGH: &str = "tercet.rope.llama3.high_freq_factor";
    pub(crate) const CONTEXT: &str = "tercet.rope.llama3.original_context_length";
}

impl GgufModel {
    /// Reads `rope.scaling.*` and `rope_freqs.weight`.
    ///
    /// bitnet.cpp's converter writes linear scaling by 1, which changes nothing.
    pub(super) fn rope_scaling(
        &self,
        context: usize,
        head_dim: usize,
    ) -> Result<RopeScaling, ModelError> {
        let key = self.key("rope.scaling.type");
        let factor = self.number("rope.scaling.factor")?;
        let unscaled = factor.is_none_or(|factor| factor.to_bits() == 1.0_f64.to_bits());
        let kind = match self.gguf().value(&key) {
            None => None,
            Some(value) => Some(
                value
                    .as_str()
                    .ok_or_else(|| ModelError::config(self.label(), &key, value, "text"))?,
            ),
        };
        let factors = self.gguf().tensor(FACTORS).map(|_| self.factors(head_dim)).transpose()?;
        match (kind, factors) {
            (None | Some("none"), None) => Ok(RopeScaling::None),
            (Some("linear"), None) if unscaled => Ok(RopeScaling::None),
            (Some("linear"), None) => {
                Ok(RopeScaling::Linear { factor: narrow(factor.unwrap_or(1.0)) })
            }
            (Some("yarn"), None) => self.yarn(context, factor),
            (None | Some("none"), Some(factors)) => {
                let rule = rule(self.gguf(), &factors, self.rope_theta()?, head_dim);
                Ok(rule.unwrap_or(RopeScaling::Factors(factors)))
            }
            (Some("linear"), Some(factors)) if unscaled => Ok(RopeScaling::Factors(factors)),
            (Some(kind), factors) => {
                let also = if factors.is_some() { " beside rope_freqs.weight" } else { "" };
                let problem = format!(
                    "`{key}` is \"{kind}\"{also}; this version supports \"none\", \"linear\" and \
                     \"yarn\", or rope_freqs.weight alone"
                );
                Err(ModelError::unsupported(self.label(), problem))
            }
        }
    }

    /// Defaults are llama.cpp's, which scales attention by `0.1 ln(factor) + 1` besides.
    fn yarn(&self, context: usize, factor: Option<f64>) -> Result<RopeScaling, ModelError> {
        let factor = factor.ok_or_else(|| self.missing("rope.scaling.factor", "a number"))?;
        let number = |field: &str, otherwise: f64| -> Result<f64, ModelError> {
            Ok(self.number(&format!("rope.scaling.{field}"))?.unwrap_or(otherwise))
        };
        let extrapolation = number("yarn_ext_factor", 1.0)?;
        if extrapolation.to_bits() != 1.0_f64.to_bits() {
            let key = self.key("rope.scaling.yarn_ext_factor");
            return Err(ModelError::config(self.label(), &key, extrapolation, "1"));
        }
        let attention = number("yarn_attn_factor", number("attn_factor", 1.0)?)?;
        Ok(RopeScaling::Yarn {
            factor: narrow(factor),
            beta_fast: narrow(number("yarn_beta_fast", 32.0)?),
            beta_slow: narrow(number("yarn_beta_slow", 1.0)?),
            attention_factor: narrow(attention * yarn_attention(factor)),
            original_context: self.size("rope.scaling.original_context_length")?.unwrap_or(context),
        })
    }

    /// Reads the factors of the rotary frequencies.
    fn factors(&self, head_dim: usize) -> Result<Vec<f32>, ModelError> {
        self.find_named(FACTORS.to_owned(), None, head_dim / 2, floats)?.read_vector()
    }
}

/// Returns the rule of the [`llama3`] keys, if it gives the factors of the file.
fn rule(gguf: &Gguf, factors: &[f32], theta: f32, head_dim: usize) -> Option<RopeScaling> {
    let number = |key: &str| Some(narrow(gguf.value(key)?.as_f64()?));
    let scaling = RopeScaling::Llama3 {
        factor: number(llama3::FACTOR)?,
        low_freq_factor: number(llama3::LOW)?,
        high_freq_factor: number(llama3::HIGH)?,
        original_context: usize::try_from(gguf.value(llama3::CONTEXT)?.as_u64()?).ok()?,
    };
    let known = llama3_factors(&scaling, theta, head_dim)?;
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    (known.len() == factors.len() && known.iter().zip(factors).all(same)).then_some(scaling)
}

/// Returns llama.cpp's factor on cosines and sines for YaRN.
pub(crate) fn yarn_attention(factor: f64) -> f64 {
    0.1 * factor.max(1.0).ln() + 1.0
}

/// Returns what each rotary frequency of a head is divided by, as llama.cpp's converter writes it;
/// `None` for another rule.
pub(crate) fn llama3_factors(
    scaling: &RopeScaling,
    theta: f32,
    head_dim: usize,
) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } =
        scaling
    else {
        return None;
    };
    let (factor, low, high) =
        (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
    #[expect(clippy::cast_precision_loss, reason = "contexts and heads are far below 2^53")]
    let (context, width) = (*original_context as f64, head_dim as f64);
    let pairs = u32::try_from(head_dim / 2).ok()?;
    let of_pair = |pair: u32| {
        let exponent = 2.0 * f64::from(pair) / width;
        let wavelength = std::f64::consts::TAU * libm::pow(theta.into(), exponent);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..pairs).map(|pair| narrow(of_pair(pair))).collect())
}
