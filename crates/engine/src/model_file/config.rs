//! The shape of a model, and the checks every source of it goes through.

use std::ops::RangeInclusive;

use serde::Serialize;

use super::error::ModelError;
use crate::kv::{KvShape, PAGE_POSITIONS};

/// Architectures this version runs, as named in error messages.
pub(crate) const SUPPORTED: &str = "BitNetForCausalLM, BitnetForCausalLM, LlamaForCausalLM and \
                                    Qwen3ForCausalLM (Hugging Face folder), bitnet-b1.58, \
                                    bitnet-25, bitnet, llama and qwen3 (GGUF)";

/// Upper bound for hidden and intermediate sizes.
///
/// 127 * 2 * 2^20 stays below 2^31, so integer sums of a row cannot overflow 32 bits.
const MAX_WIDTH: usize = 1 << 20;
/// Upper bound for the number of layers; the largest known model has 126.
const MAX_LAYERS: usize = 1 << 12;
/// Upper bound for the vocabulary; the largest known one has 262 144 entries.
const MAX_VOCAB: usize = 1 << 22;
/// Upper bound for the context length, 16 Mi positions.
const MAX_CONTEXT: usize = 1 << 24;
/// Upper bound for one attention head's width.
const MAX_HEAD_DIM: usize = 1 << 12;
/// Bounds of the rotary base; the largest in use is a hundred million. Below 1, angles would grow
/// with the dimension, and at 1 be equal.
const ROPE_THETA: RangeInclusive<f32> = 1.001..=1e15;
/// Bounds of the numbers of a rotary scaling: beyond them, angles overflow or vanish.
const ROPE_FACTOR: RangeInclusive<f32> = 1e-3..=1e6;
/// Bounds of the epsilon of RMS norms; 0 would divide by zero where all is zero.
const RMS_EPS: RangeInclusive<f32> = f32::MIN_POSITIVE..=1.0;

/// Model families with their own layer formula.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Architecture {
    /// BitNet b1.58: norms before the attention output and the down projection.
    BitNet,
    /// Llama: no norms but the two at the start of attention and MLP.
    Llama,
    /// Qwen 3: as Llama, with a norm over each query and key head before the rotation.
    Qwen3,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BitNet => "bitnet",
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
        })
    }
}

/// What the MLP does to its gate.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Squared ReLU: `max(x, 0)^2`.
    Relu2,
    /// SiLU: `x / (1 + exp(-x))`.
    Silu,
}

impl std::fmt::Display for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
        })
    }
}

/// How the inputs of ternary products become 8-bit integers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationScheme {
    /// One scale per token, as BitNet models are trained.
    Token,
    /// One scale per 64 inputs, for ternary models trained with floating-point activations.
    Block64,
}

impl std::fmt::Display for ActivationScheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Token => "token",
            Self::Block64 => "block of 64",
        })
    }
}

/// How the rotary frequencies are changed for contexts beyond those of the first training.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All are divided by one factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Low frequencies are divided by a factor, high ones kept, those between interpolated.
    Llama3 {
        /// The factor.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Positions of the first training.
        original_context: usize,
    },
    /// YaRN: as Llama 3 with a linear ramp over the dimensions, and scaled attention.
    Yarn {
        /// The factor.
        factor: f32,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which a frequency is divided.
        beta_slow: f32,
        /// Factor on cosines and sines.
        attention_factor: f32,
        /// Positions of the first training.
        original_context: usize,
    },
    /// Each frequency is divided by its own factor (`rope_freqs.weight` of a GGUF file).
    Factors(
        /// One factor per pair of a head.
        Vec<f32>,
    ),
}

impl std::fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Linear { factor } => write!(f, "linear by {factor}"),
            Self::Llama3 { factor, original_context, .. } => {
                write!(f, "llama3 by {factor} from {original_context}")
            }
            Self::Yarn { factor, original_context, .. } => {
                write!(f, "yarn by {factor} from {original_context}")
            }
            Self::Factors(factors) => write!(f, "{} factors of its own", factors.len()),
        }
    }
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    /// Layer formula.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Positions the model was made for.
    pub context: usize,
    /// Gate function of the MLP.
    pub activation: Activation,
    /// Quantisation of the inputs of ternary products.
    pub activations: ActivationScheme,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Whether the head is the embedding matrix.
    pub tied_head: bool,
}

impl ModelConfig {
    /// Returns the width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the bytes that one position takes in the KV cache, in all layers.
    pub fn kv_bytes_per_position(&self) -> usize {
        KvShape::new(self, self.layers).page_bytes() / PAGE_POSITIONS
    }

    /// Refuses shapes no model of this kind can have.
    pub(crate) fn check(&self, file: &str, names: &FieldNames) -> Result<(), ModelError> {
        let sizes = [
            (names.hidden, self.hidden, MAX_WIDTH),
            (names.intermediate, self.intermediate, MAX_WIDTH),
            (names.layers, self.layers, MAX_LAYERS),
            (names.heads, self.heads, MAX_WIDTH),
            (names.kv_heads, self.kv_heads, MAX_WIDTH),
            (names.head_dim, self.head_dim, MAX_HEAD_DIM),
            (names.vocab, self.vocab, MAX_VOCAB),
            (names.context, self.context, MAX_CONTEXT),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return Err(ModelError::config(file, name, value, format!("1 to {limit}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::config(
                file,
                names.kv_heads,
                self.kv_heads,
                format!("a divisor of the {} query heads", self.heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            let expected = "an even number, rotary embedding works on pairs";
            return Err(ModelError::config(file, names.head_dim, self.head_dim, expected));
        }
        if self.q_width() > MAX_WIDTH {
            return Err(ModelError::config(
                file,
                names.heads,
                self.heads,
                format!("at most {MAX_WIDTH} columns in all heads of {}", self.head_dim),
            ));
        }
        check_range(file, names.rope_theta, self.rope_theta, &ROPE_THETA)?;
        check_range(file, names.rms_eps, self.rms_eps, &RMS_EPS)?;
        self.check_rope(file)
    }

    /// Refuses scalings that give no frequencies.
    fn check_rope(&self, file: &str) -> Result<(), ModelError> {
        let factor_in_range = |name: &str, value: f32| check_range(file, name, value, &ROPE_FACTOR);
        let original = |context: usize| {
            if (1..=MAX_CONTEXT).contains(&context) {
                return Ok(());
            }
            let expected = format!("1 to {MAX_CONTEXT}");
            Err(ModelError::config(file, "original context length", context, expected))
        };
        match &self.rope_scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => factor_in_range("rope scaling factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                factor_in_range("rope scaling factor", *factor)?;
                factor_in_range("low_freq_factor", *low_freq_factor)?;
                factor_in_range("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("above low_freq_factor {low_freq_factor}");
                    let found = high_freq_factor;
                    return Err(ModelError::config(file, "high_freq_factor", found, expected));
                }
                original(*original_context)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                original_context,
            } => {
                factor_in_range("rope scaling factor", *factor)?;
                factor_in_range("beta_fast", *beta_fast)?;
                factor_in_range("beta_slow", *beta_slow)?;
                factor_in_range("attention_factor", *attention_factor)?;
                original(*original_context)
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != self.head_dim / 2 {
                    let expected = format!("{}, one per pair of a head", self.head_dim / 2);
                    let found = format!("{} factors", factors.len());
                    return Err(ModelError::config(file, "rope_freqs.weight", found, expected));
                }
                factors.iter().try_for_each(|factor| factor_in_range("rope_freqs.weight", *factor))
            }
        }
    }
}

/// Refuses a number out of its range, and NaN.
fn check_range(
    file: &str,
    name: &str,
    value: f32,
    range: &RangeInclusive<f32>,
) -> Result<(), ModelError> {
    if range.contains(&value) {
        return Ok(());
    }
    let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
    Err(ModelError::config(file, name, value, expected))
}

/// What the source calls each field, for messages a reader can act on.
#[derive(Debug)]
pub(crate) struct FieldNames {
    pub(crate) hidden: &'static str,
    pub(crate) intermediate: &'static str,
    pub(crate) layers: &'static str,
    pub(crate) heads: &'static str,
    pub(crate) kv_heads: &'static str,
    pub(crate) head_dim: &'static str,
    pub(crate) vocab: &'static str,
    pub(crate) context: &'static str,
    pub(crate) rope_theta: &'static str,
    pub(crate) rms_eps: &'static str,
}

/// Sampling settings a model's authors recommend, used when a request leaves them out.
///
/// From a folder, `generation_config.json` decides: without `do_sample: true` the model is greedy
/// (temperature 0), as in transformers; settings it leaves out are off (transformers would apply
/// its library-wide `top_k` of 50, which is nobody's recommendation for a particular model). A
/// GGUF file written by `tercet model convert` carries the same values; any other GGUF file has no
/// recommendation and samples the plain distribution, see [`GenerationDefaults::PLAIN`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GenerationDefaults {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Most probable tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Probability mass kept; 1 keeps all.
    pub top_p: f32,
    /// Least probability kept, relative to the most probable token; 0 keeps all.
    pub min_p: f32,
    /// Divides the logits of tokens already seen; 1 changes nothing.
    pub repetition_penalty: f32,
}

impl GenerationDefaults {
    /// The model's distribution as it is.
    pub const PLAIN: Self =
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 };
    /// The most probable token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, ..Self::PLAIN };

    /// Refuses settings no sampler can follow.
    pub(crate) fn check(&self, file: &str) -> Result<(), ModelError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(ModelError::config(file, "temperature", self.temperature, expected));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let expected = "above 0 and at most 1";
            return Err(ModelError::config(file, "top_p", self.top_p, expected));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(ModelError::config(file, "min_p", self.min_p, "0 to 1"));
        }
        let penalty = self.repetition_penalty;
        if !(penalty.is_finite() && penalty > 0.0) {
            let expected = "a positive finite number";
            return Err(ModelError::config(file, "repetition_penalty", penalty, expected));
        }
        Ok(())
    }
}
