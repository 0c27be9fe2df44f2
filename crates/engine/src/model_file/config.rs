//! The shape of a model, and the checks every source of it goes through.

use serde::Serialize;

use super::error::ModelError;

/// Architectures this version runs, as named in error messages.
pub(crate) const SUPPORTED: &str =
    "BitNetForCausalLM (Hugging Face folder), bitnet-b1.58 and bitnet-25 (GGUF)";

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

/// Model families with their own layer formula.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Architecture {
    /// BitNet b1.58: squared ReLU, gated MLP, norms before the attention output and the down
    /// projection, one scale per ternary matrix, 8-bit activations per token.
    BitNet,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BitNet => f.write_str("bitnet"),
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
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
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
        for (name, value) in [(names.rope_theta, self.rope_theta), (names.rms_eps, self.rms_eps)] {
            if !(value.is_finite() && value > 0.0) {
                let expected = "a positive finite number";
                return Err(ModelError::config(file, name, value, expected));
            }
        }
        Ok(())
    }
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
}

impl GenerationDefaults {
    /// The model's distribution as it is.
    pub const PLAIN: Self = Self { temperature: 1.0, top_k: 0, top_p: 1.0 };
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
        Ok(())
    }
}
