//! Shapes and storage types by name.

use std::fmt;
use std::str::FromStr;

use super::encode::DENSE_SPREAD;
use super::random::GROUP;
use super::{Fill, SynthTensor};
use crate::model_file::config::{
    Activation, ActivationScheme, Architecture, FieldNames, ModelConfig, RopeScaling,
};
use crate::model_file::error::ModelError;
use crate::model_file::gguf::types;
use crate::model_file::names::{UnknownName, parse};
use crate::model_file::tensors::Part;

/// Sizes that replace those of a shape.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SizeOverrides {
    /// Width of the residual stream.
    pub hidden: Option<usize>,
    /// Width of the MLP.
    pub intermediate: Option<usize>,
    /// Number of layers.
    pub layers: Option<usize>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key and value heads.
    pub kv_heads: Option<usize>,
    /// Width of one head.
    pub head_dim: Option<usize>,
    /// Tokens.
    pub vocab: Option<usize>,
    /// Positions.
    pub context: Option<usize>,
}

/// What the command line calls the sizes.
const NAMES: FieldNames = FieldNames {
    hidden: "--hidden",
    intermediate: "--mlp",
    layers: "--layers",
    heads: "--heads",
    kv_heads: "--kv-heads",
    head_dim: "--head-dim",
    vocab: "--vocab",
    context: "--context",
    rope_theta: "rotary base",
    rms_eps: "norm epsilon",
};

/// Shapes of known models.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Shape {
    /// A BitNet of 124 million weights, for quick trials.
    Small125M,
    /// microsoft/bitnet-b1.58-2B-4T.
    BitNet2B4T,
    /// Llama 3 8B.
    Llama3B8,
    /// Ternary Bonsai 4B, a Qwen 3.
    BonsaiB4,
    /// Llama 3 70B.
    B70,
    /// A Llama of 100 billion weights.
    B100,
    /// Llama 3.1 405B.
    B405,
}

impl Shape {
    /// All shapes, smallest first.
    pub const ALL: [Self; 7] = [
        Self::Small125M,
        Self::BitNet2B4T,
        Self::BonsaiB4,
        Self::Llama3B8,
        Self::B70,
        Self::B100,
        Self::B405,
    ];

    /// Returns the sizes with some of them replaced.
    pub(super) fn sizes_with(self, replaced: &SizeOverrides) -> Result<Sizes, ModelError> {
        let mut sizes = self.sizes();
        let SizeOverrides { hidden, intermediate, layers, heads, kv_heads, head_dim, .. } =
            replaced;
        let config = &mut sizes.config;
        for (given, size) in [
            (hidden, &mut config.hidden),
            (intermediate, &mut config.intermediate),
            (layers, &mut config.layers),
            (heads, &mut config.heads),
            (kv_heads, &mut config.kv_heads),
            (head_dim, &mut config.head_dim),
            (&replaced.vocab, &mut config.vocab),
            (&replaced.context, &mut config.context),
        ] {
            *size = given.unwrap_or(*size);
        }
        config.check("the made-up model", &NAMES)?;
        if !config.hidden.is_multiple_of(GROUP) {
            let expected = format!("a multiple of {GROUP}, embeddings are made up in groups");
            let label = "the made-up model";
            return Err(ModelError::config(label, NAMES.hidden, config.hidden, expected));
        }
        Ok(sizes)
    }

    /// Returns the sizes.
    pub(super) fn sizes(self) -> Sizes {
        let sizes = |family, numbers: [usize; 8]| {
            let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, context] = numbers;
            let config = ModelConfig {
                architecture: match family {
                    Family::BitNet => Architecture::BitNet,
                    Family::Llama => Architecture::Llama,
                    Family::Qwen3 => Architecture::Qwen3,
                },
                activation: if family == Family::BitNet {
                    Activation::Relu2
                } else {
                    Activation::Silu
                },
                activations: ActivationScheme::Token,
                rope_scaling: RopeScaling::None,
                hidden,
                intermediate,
                layers,
                heads,
                kv_heads,
                head_dim,
                vocab,
                context,
                rope_theta: if family == Family::Qwen3 { 1_000_000.0 } else { 500_000.0 },
                rms_eps: if family == Family::Qwen3 { 1e-6 } else { 1e-5 },
                tied_head: family != Family::Llama,
            };
            Sizes { family, config }
        };
        match self {
            Self::Small125M => sizes(Family::BitNet, [768, 2048, 12, 12, 12, 64, 50_304, 2048]),
            Self::BitNet2B4T => sizes(Family::BitNet, [2560, 6912, 30, 20, 5, 128, 128_256, 4096]),
            Self::BonsaiB4 => sizes(Family::Qwen3, [2560, 9728, 36, 32, 8, 128, 151_936, 32_768]),
            Self::Llama3B8 => sizes(Family::Llama, [4096, 14_336, 32, 32, 8, 128, 128_256, 8192]),
            Self::B70 => sizes(Family::Llama, [8192, 28_672, 80, 64, 8, 128, 128_256, 8192]),
            Self::B100 => sizes(Family::Llama, [10_240, 28_672, 88, 80, 8, 128, 128_256, 8192]),
            Self::B405 => sizes(Family::Llama, [16_384, 53_248, 126, 128, 8, 128, 128_256, 8192]),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small125M => "125m",
            Self::BitNet2B4T => "bitnet-2b-4t",
            Self::BonsaiB4 => "bonsai-4b",
            Self::Llama3B8 => "llama3-8b",
            Self::B70 => "70b",
            Self::B100 => "100b",
            Self::B405 => "405b",
        })
    }
}

impl FromStr for Shape {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        parse("shape", &Self::ALL, name)
    }
}

/// Storage of the embedding and the head.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum HeadType {
    /// 32 bits a weight.
    F32,
    /// 16 bits a weight.
    F16,
    /// 16 bits a weight, with the exponents of F32.
    Bf16,
    /// 8.5 bits a weight.
    Q8_0,
    /// 6.6 bits a weight.
    Q6K,
    /// 4.5 bits a weight: too few for the values of the others, which are rounded.
    Q4_0,
}

impl HeadType {
    /// All types.
    pub const ALL: [Self; 6] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q6K, Self::Q4_0];

    /// Returns the type number of tensors.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => types::F32,
            Self::F16 => types::F16,
            Self::Bf16 => types::BF16,
            Self::Q8_0 => types::Q8_0,
            Self::Q6K => types::Q6_K,
            Self::Q4_0 => types::Q4_0,
        }
    }
}

impl fmt::Display for HeadType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q4_0 => "q4_0",
        })
    }
}

impl FromStr for HeadType {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        parse("head type", &Self::ALL, name)
    }
}

/// Families with their own set of tensors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Family {
    BitNet,
    Llama,
    Qwen3,
}

/// A family and the numbers of a shape; the architecture inside `config` says nothing here.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub(super) family: Family,
    pub(super) config: ModelConfig,
}

impl Sizes {
    /// Returns the tensors in the order of the forward pass.
    ///
    /// The signs of the last norm keep a tied head from naming the token just read.
    pub(super) fn tensors(&self) -> Vec<SynthTensor> {
        let config = &self.config;
        let dense = |name: &str| SynthTensor {
            name: name.to_owned(),
            rows: Some(config.vocab),
            cols: config.hidden,
            fill: Fill::Dense,
        };
        let gains = Gains::of(config);
        let vector = |name, cols, fill| SynthTensor { name, rows: None, cols, fill };
        let mut tensors = vec![dense("token_embd.weight")];
        for layer in 0..config.layers {
            for part in Part::of(config.architecture) {
                let name = format!("blk.{layer}.{}", part.gguf_name());
                match part.matrix(config) {
                    Some((rows, cols)) => {
                        let rows = Some(rows);
                        let fill = Fill::Ternary { gain: gains.matrix(part) };
                        tensors.push(SynthTensor { name, rows, cols, fill });
                    }
                    None => {
                        let fill = Fill::Norm { gain: gains.norm(part) };
                        tensors.push(vector(name, part.width(config), fill));
                    }
                }
            }
        }
        let fill = Fill::SignedNorm { gain: gains.last_norm };
        tensors.push(vector("output_norm.weight".to_owned(), config.hidden, fill));
        if !config.tied_head {
            tensors.push(dense("output.weight"));
        }
        tensors
    }
}

/// How large the outputs of matrices and norms are.
///
/// Where every matrix keeps the spread of its input, layers drown the embedding and each other. The
/// rounding of activations to int8 then moves log-probabilities by some hundredths, and so does a
/// difference in the last bit of one activation, so that no two programs agree on them. Layers that
/// add to a larger embedding bound that for any depth.
#[derive(Clone, Copy, Debug)]
struct Gains {
    /// What a layer's attention or MLP adds to the residual stream.
    branch: f32,
    /// The norm before the head.
    last_norm: f32,
}

impl Gains {
    /// Queries and keys, so that attention scores spread by 2: attention prefers some positions.
    const QUERY_KEY: f32 = std::f32::consts::SQRT_2;
    /// Logits.
    const LOGITS: f32 = 1.5;

    #[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^24")]
    fn of(config: &ModelConfig) -> Self {
        // As in GPT-2, 1 / sqrt(branches) for each of them, so that they add up to the same for
        // any depth: here to half of the embedding.
        let branches = (2 * config.layers) as f32;
        Self {
            branch: 0.5 * DENSE_SPREAD / branches.sqrt(),
            last_norm: Self::LOGITS / DENSE_SPREAD / (config.hidden as f32).sqrt(),
        }
    }

    fn matrix(&self, part: Part) -> f32 {
        match part {
            Part::Q | Part::K => Self::QUERY_KEY,
            Part::O | Part::Down => self.branch,
            _ => 1.0,
        }
    }

    fn norm(&self, part: Part) -> f32 {
        match part {
            Part::QNorm | Part::KNorm => Self::QUERY_KEY,
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_file::ternary::encode::TernaryType;

    #[test]
    fn names_round_trip() {
        for shape in Shape::ALL {
            assert_eq!(shape.to_string().parse(), Ok(shape));
        }
        let error = "q4".parse::<HeadType>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown head type `q4`, expected one of f32, f16, bf16, q8_0, q6_k, q4_0"
        );
        assert!("i2s".parse::<TernaryType>().is_err());
    }

    #[test]
    fn shapes_have_the_weights_their_names_say() {
        let billions = |shape: Shape| {
            let weights = shape.sizes().tensors().into_iter();
            let weights: usize = weights.map(|t| t.rows.unwrap_or(1) * t.cols).sum();
            weights as f64 / 1e9
        };
        let expected = [0.124, 2.41, 4.02, 8.03, 70.6, 100.3, 405.9];
        for (shape, expected) in Shape::ALL.into_iter().zip(expected) {
            let found = billions(shape);
            assert!((found / expected - 1.0).abs() < 0.01, "{shape}: {found}, not {expected}");
        }
    }
}
