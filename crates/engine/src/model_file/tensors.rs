//! The tensors of a BitNet model by role, whatever file they are in.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use tercet_kernels::{DenseMatrix, DenseType, TernaryMatrix};

use super::config::ModelConfig;
use super::error::ModelError;
use super::folder::PackedScale;
use super::folder::shards::Entry;
use super::mapping::FileBytes;
use super::ternary;
use super::weights::LayerWeights;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    Embed,
    OutputNorm,
    Head,
    Layer(usize, Part),
}

/// The tensors of one layer, in the order they are used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    AttnNorm,
    Q,
    K,
    V,
    AttnSubNorm,
    O,
    FfnNorm,
    Gate,
    Up,
    FfnSubNorm,
    Down,
}

impl Part {
    /// All parts, in order.
    pub(crate) const ALL: [Self; 11] = [
        Self::AttnNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::AttnSubNorm,
        Self::O,
        Self::FfnNorm,
        Self::Gate,
        Self::Up,
        Self::FfnSubNorm,
        Self::Down,
    ];

    /// Returns rows and columns of a matrix, `None` for a norm.
    pub(crate) fn matrix(self, config: &ModelConfig) -> Option<(usize, usize)> {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        match self {
            Self::Q => Some((config.q_width(), hidden)),
            Self::K | Self::V => Some((config.kv_width(), hidden)),
            Self::O => Some((hidden, config.q_width())),
            Self::Gate | Self::Up => Some((intermediate, hidden)),
            Self::Down => Some((hidden, intermediate)),
            Self::AttnNorm | Self::AttnSubNorm | Self::FfnNorm | Self::FfnSubNorm => None,
        }
    }

    /// Returns the length of a norm's weight; for a matrix, its row length.
    pub(crate) fn width(self, config: &ModelConfig) -> usize {
        match self {
            Self::AttnSubNorm | Self::O => config.q_width(),
            Self::FfnSubNorm | Self::Down => config.intermediate,
            Self::AttnNorm | Self::FfnNorm => config.hidden,
            Self::Q | Self::K | Self::V | Self::Gate | Self::Up => config.hidden,
        }
    }

    /// Returns the tensor's name in a GGUF file, after `blk.N.`.
    pub(crate) fn gguf_name(self) -> &'static str {
        match self {
            Self::AttnNorm => "attn_norm.weight",
            Self::Q => "attn_q.weight",
            Self::K => "attn_k.weight",
            Self::V => "attn_v.weight",
            Self::AttnSubNorm => "attn_sub_norm.weight",
            Self::O => "attn_output.weight",
            Self::FfnNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Up => "ffn_up.weight",
            Self::FfnSubNorm => "ffn_sub_norm.weight",
            Self::Down => "ffn_down.weight",
        }
    }

    /// Returns the tensor's name in a Hugging Face folder, after `model.layers.N.`.
    pub(crate) fn folder_name(self) -> &'static str {
        match self {
            Self::AttnNorm => "input_layernorm.weight",
            Self::Q => "self_attn.q_proj.weight",
            Self::K => "self_attn.k_proj.weight",
            Self::V => "self_attn.v_proj.weight",
            Self::AttnSubNorm => "self_attn.attn_sub_norm.weight",
            Self::O => "self_attn.o_proj.weight",
            Self::FfnNorm => "post_attention_layernorm.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::FfnSubNorm => "mlp.ffn_sub_norm.weight",
            Self::Down => "mlp.down_proj.weight",
        }
    }
}

/// How a tensor's elements are stored.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// Numbers, plain or in blocks.
    Dense(DenseType),
    /// Ternary, four to a byte in blocks of 128 through the flattened tensor, scale at the end.
    I2S,
    /// Ternary, four to a byte along the rows, the scale in a tensor of its own.
    Packed {
        /// The tensor with the scale.
        scale: Entry,
        /// How it enters the product.
        rule: PackedScale,
    },
    /// Numbers to be made ternary at load.
    Master(DenseType),
}

impl Storage {
    /// Returns a name for tables.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Dense(kind) => kind.to_string(),
            Self::I2S => "I2_S".to_owned(),
            Self::Packed { .. } => "packed ternary".to_owned(),
            Self::Master(kind) => format!("{kind} master"),
        }
    }

    /// Whether the tensor becomes ternary.
    pub(crate) fn is_ternary(&self) -> bool {
        !matches!(self, Self::Dense(_))
    }
}

/// One tensor: where it is and what it holds. Shape, type and place have been checked; its values
/// have not been touched.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Its name in the file.
    pub(crate) name: String,
    /// The file.
    pub(crate) file: FileBytes,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
    /// Outputs; 1 for a vector.
    pub(crate) rows: usize,
    /// Inputs, or a vector's length.
    pub(crate) cols: usize,
    /// How elements are stored.
    pub(crate) storage: Storage,
}

impl Tensor {
    /// Returns the bytes as stored.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }

    /// Returns an error about this tensor.
    pub(crate) fn error(&self, problem: impl Into<String>) -> ModelError {
        ModelError::tensor(self.file.label(), &self.name, problem)
    }

    /// Reads a norm's weights, refusing any that are not finite.
    pub(crate) fn read_vector(&self) -> Result<Vec<f32>, ModelError> {
        let values = match &self.storage {
            Storage::Dense(kind) => read_floats(*kind, self.bytes()),
            _ => None,
        };
        let values = values.ok_or_else(|| {
            self.error(format!("has type {}, expected F32, F16 or BF16", self.storage.name()))
        })?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(self.error(format!("holds {} at {at}, not finite", values[at]))),
            None => Ok(values),
        }
    }

    /// Returns the matrix, in place.
    pub(crate) fn read_dense(&self) -> Result<Arc<DenseMatrix>, ModelError> {
        let Storage::Dense(kind) = &self.storage else {
            return Err(self.error(format!("has type {}, not dense", self.storage.name())));
        };
        let bytes = self.file.share(self.range.clone());
        DenseMatrix::new(*kind, self.rows, self.cols, bytes)
            .map(Arc::new)
            .map_err(|error| self.error(format!("does not fit its shape: {error}")))
    }

    /// Returns the matrix, in place where its layout allows, and with every code checked.
    pub(crate) fn read_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        match &self.storage {
            Storage::I2S => ternary::read_i2s(self),
            Storage::Packed { scale, rule } => ternary::read_packed(self, scale, *rule),
            Storage::Master(kind) => ternary::read_master(self, *kind),
            Storage::Dense(kind) => Err(self.error(format!("has type {kind}, not ternary"))),
        }
    }
}

/// Reads plain floating-point numbers, `None` if the type is a block format.
pub(crate) fn read_floats(kind: DenseType, bytes: &[u8]) -> Option<Vec<f32>> {
    let pair = |c: &[u8]| -> [u8; 2] { c.try_into().expect("chunks of two") };
    let quad = |c: &[u8]| -> [u8; 4] { c.try_into().expect("chunks of four") };
    match kind {
        DenseType::F32 => {
            Some(bytes.chunks_exact(4).map(|c| f32::from_le_bytes(quad(c))).collect())
        }
        DenseType::F16 => {
            Some(bytes.chunks_exact(2).map(|c| f16::from_le_bytes(pair(c)).to_f32()).collect())
        }
        DenseType::Bf16 => {
            Some(bytes.chunks_exact(2).map(|c| bf16::from_le_bytes(pair(c)).to_f32()).collect())
        }
        DenseType::Q8_0 | DenseType::Q6K => None,
    }
}

/// A file format that can find tensors by role and check their type and shape.
pub(crate) trait Source {
    /// Finds a norm's weight of `length` elements.
    fn vector(&self, role: Role, length: usize) -> Result<Tensor, ModelError>;
    /// Finds a matrix that is or becomes ternary.
    fn ternary(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError>;
    /// Finds the embedding or the head.
    fn dense(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError>;
}

/// All tensors of a model.
#[derive(Debug)]
pub(crate) struct Tensors {
    pub(crate) embed: Tensor,
    pub(crate) layers: Vec<LayerTensors>,
    pub(crate) norm: Tensor,
    /// Absent if the head is the embedding.
    pub(crate) head: Option<Tensor>,
}

impl Tensors {
    /// Finds every tensor the configuration needs.
    pub(crate) fn find(source: &impl Source, config: &ModelConfig) -> Result<Self, ModelError> {
        let embed = source.dense(Role::Embed, config.vocab, config.hidden)?;
        // Not reserved ahead: the layer count is only a claim until the tensors are found.
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            layers.push(LayerTensors::find(source, config, layer)?);
        }
        let norm = source.vector(Role::OutputNorm, config.hidden)?;
        let head = if config.tied_head {
            None
        } else {
            Some(source.dense(Role::Head, config.vocab, config.hidden)?)
        };
        Ok(Self { embed, layers, norm, head })
    }

    /// Returns all tensors in the order of the forward pass.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(|layer| layer.0.iter());
        std::iter::once(&self.embed)
            .chain(layers)
            .chain(std::iter::once(&self.norm))
            .chain(self.head.as_ref())
    }
}

/// The tensors of one layer, in the order of [`Part::ALL`].
#[derive(Debug)]
pub(crate) struct LayerTensors([Tensor; Part::ALL.len()]);

impl LayerTensors {
    fn find(source: &impl Source, config: &ModelConfig, layer: usize) -> Result<Self, ModelError> {
        let mut found = Vec::with_capacity(Part::ALL.len());
        for part in Part::ALL {
            let role = Role::Layer(layer, part);
            found.push(match part.matrix(config) {
                Some((rows, cols)) => source.ternary(role, rows, cols)?,
                None => source.vector(role, part.width(config))?,
            });
        }
        Ok(Self(found.try_into().expect("one tensor per part")))
    }

    /// Returns one tensor.
    pub(crate) fn get(&self, part: Part) -> &Tensor {
        &self.0[part as usize]
    }

    /// Returns the bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|tensor| tensor.range.len() as u64).sum()
    }

    /// Reads the layer.
    pub(crate) fn load(&self) -> Result<LayerWeights, ModelError> {
        let vector = |part| self.get(part).read_vector();
        let matrix = |part| self.get(part).read_ternary();
        Ok(LayerWeights {
            attn_norm: vector(Part::AttnNorm)?,
            q: matrix(Part::Q)?,
            k: matrix(Part::K)?,
            v: matrix(Part::V)?,
            attn_sub_norm: vector(Part::AttnSubNorm)?,
            o: matrix(Part::O)?,
            ffn_norm: vector(Part::FfnNorm)?,
            gate: matrix(Part::Gate)?,
            up: matrix(Part::Up)?,
            ffn_sub_norm: vector(Part::FfnSubNorm)?,
            down: matrix(Part::Down)?,
        })
    }
}
