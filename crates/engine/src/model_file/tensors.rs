//! The tensors of a model by role, whatever file they are in.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;
use tercet_kernels::{DenseMatrix, DenseType, TERNARY_BLOCK, TernaryMatrix};

use super::config::{ActivationScheme, Architecture, ModelConfig};
use super::error::ModelError;
use super::folder::PackedScale;
use super::folder::shards::Entry;
use super::mapping::{Arena, FileBytes};
use super::ternary::{self, blocks, master};
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
    QNorm,
    KNorm,
    AttnSubNorm,
    O,
    FfnNorm,
    Gate,
    Up,
    FfnSubNorm,
    Down,
}

impl Part {
    /// The parts of every family, in order.
    pub(crate) const ALL: [Self; 13] = [
        Self::AttnNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::QNorm,
        Self::KNorm,
        Self::AttnSubNorm,
        Self::O,
        Self::FfnNorm,
        Self::Gate,
        Self::Up,
        Self::FfnSubNorm,
        Self::Down,
    ];

    /// Returns the parts a family has, in order.
    pub(crate) fn of(architecture: Architecture) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |part| match part {
            Self::AttnSubNorm | Self::FfnSubNorm => architecture == Architecture::BitNet,
            Self::QNorm | Self::KNorm => architecture == Architecture::Qwen3,
            _ => true,
        })
    }

    /// Whether the part is a matrix, not a norm.
    pub(crate) fn is_matrix(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V | Self::O | Self::Gate | Self::Up | Self::Down)
    }

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
            Self::QNorm | Self::KNorm => None,
        }
    }

    /// Returns the length of a norm's weight; for a matrix, its row length.
    pub(crate) fn width(self, config: &ModelConfig) -> usize {
        match self {
            Self::AttnSubNorm | Self::O => config.q_width(),
            Self::FfnSubNorm | Self::Down => config.intermediate,
            Self::AttnNorm | Self::FfnNorm => config.hidden,
            Self::Q | Self::K | Self::V | Self::Gate | Self::Up => config.hidden,
            Self::QNorm | Self::KNorm => config.head_dim,
        }
    }

    /// Returns the tensor's name in a GGUF file, after `blk.N.`.
    pub(crate) fn gguf_name(self) -> &'static str {
        match self {
            Self::AttnNorm => "attn_norm.weight",
            Self::Q => "attn_q.weight",
            Self::K => "attn_k.weight",
            Self::V => "attn_v.weight",
            Self::QNorm => "attn_q_norm.weight",
            Self::KNorm => "attn_k_norm.weight",
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
            Self::QNorm => "self_attn.q_norm.weight",
            Self::KNorm => "self_attn.k_norm.weight",
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
    /// Ternary, five to a byte in blocks of 256 with a scale each.
    Tq1_0,
    /// Ternary, four to a byte in blocks of 256 with a scale each.
    Tq2_0,
    /// Ternary, four to a byte in blocks with a scale each.
    Q2_0 {
        /// Weights of a block: 64, in older files 128.
        block: usize,
    },
    /// Ternary, four to a byte along the rows, the scale in a tensor of its own.
    Packed {
        /// The tensor with the scale.
        scale: Entry,
        /// How it enters the product.
        rule: PackedScale,
    },
    /// Numbers to be made ternary at load.
    Master(DenseType),
    /// Numbers that are ternary already, with one scale; numbers to be made ternary if they are
    /// not.
    MasterOrTernary(DenseType),
    /// Numbers that are ternary already, with a scale for each 64 along a row.
    Groups(DenseType),
}

impl Storage {
    /// Returns a name for tables.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Dense(kind) => kind.to_string(),
            Self::I2S => "I2_S".to_owned(),
            Self::Tq1_0 => "TQ1_0".to_owned(),
            Self::Tq2_0 => "TQ2_0".to_owned(),
            Self::Q2_0 { block } => format!("Q2_0 ({block})"),
            Self::Packed { .. } => "packed ternary".to_owned(),
            Self::Master(kind) | Self::MasterOrTernary(kind) => format!("{kind} master"),
            Self::Groups(kind) => format!("{kind} ternary"),
        }
    }

    /// Whether the tensor becomes ternary.
    pub(crate) fn is_ternary(&self) -> bool {
        !matches!(self, Self::Dense(_))
    }
}

/// Rows of a dense matrix that one thread checks at a time.
const DENSE_ROWS: usize = 1024;

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
    /// How the inputs of the product are quantised, which decides whether scales of blocks stay
    /// apart.
    pub(crate) activations: ActivationScheme,
    /// Width of the heads whose rows are stored pair by pair, as `llama` files do for the queries
    /// and keys.
    pub(crate) paired_heads: Option<usize>,
    /// A factor on all scales, from a tensor of its own.
    pub(crate) factor: Option<f32>,
    /// The scale of the whole matrix as it was before blocks rounded it to half precision.
    pub(crate) exact_scale: Option<f32>,
    /// Whether its values are believed to be valid.
    pub(crate) trusted: bool,
}

impl Tensor {
    /// Returns the bytes as stored.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }

    /// Returns the row of the file that holds a row of the matrix.
    ///
    /// Rotation pairs element `i` of a head with element `i + width / 2`; where pairs are stored
    /// side by side, they are rows `2 * i` and `2 * i + 1`.
    pub(crate) fn stored_row(&self, row: usize) -> usize {
        let Some(width) = self.paired_heads else { return row };
        let (head, inside) = (row / width, row % width);
        let (second, pair) = (inside / (width / 2), inside % (width / 2));
        head * width + 2 * pair + second
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

    /// Returns the matrix in place, with every number checked.
    pub(crate) fn read_dense(&self) -> Result<Arc<DenseMatrix>, ModelError> {
        let Storage::Dense(kind) = self.storage else {
            return Err(self.error(format!("has type {}, not dense", self.storage.name())));
        };
        let bytes = self.file.share(self.range.clone());
        let matrix = DenseMatrix::new(kind, self.rows, self.cols, bytes)
            .map_err(|error| self.error(format!("does not fit its shape: {error}")))?;
        if self.trusted {
            return Ok(Arc::new(matrix));
        }
        let starts: Vec<usize> = (0..self.rows).step_by(DENSE_ROWS).collect();
        let check = |start: usize| matrix.validate_rows(start..self.rows.min(start + DENSE_ROWS));
        // Gathered before any error is looked at, so that it is always the first.
        let checks: Vec<_> = starts.into_par_iter().map(check).collect();
        let checked: Result<(), _> = checks.into_iter().collect();
        checked.map_err(|error| self.error(format!("is damaged: {error}")))?;
        Ok(Arc::new(matrix))
    }

    /// Returns the matrix as [`Self::read_ternary`], copied to `arena` if there is one.
    fn read_ternary_to(&self, arena: Option<&Arc<Arena>>) -> Result<TernaryMatrix, ModelError> {
        let matrix = self.read_ternary()?;
        let Some(arena) = arena else { return Ok(matrix) };
        let matrix = matrix.moved(|bytes| arena.copy(bytes));
        self.file.forget(self.range.clone());
        Ok(matrix)
    }

    /// Returns the bytes of the ternary matrix in memory.
    fn packed_bytes(&self) -> usize {
        self.rows * self.cols.next_multiple_of(TERNARY_BLOCK) / 4
    }

    /// Returns the matrix, in place where its layout allows, and with every code checked.
    pub(crate) fn read_ternary(&self) -> Result<TernaryMatrix, ModelError> {
        match &self.storage {
            Storage::I2S => ternary::read_i2s(self),
            Storage::Tq1_0 => blocks::read_tq1_0(self),
            Storage::Tq2_0 => blocks::read_tq2_0(self),
            Storage::Q2_0 { block } => blocks::read_q2_0(self, *block),
            Storage::Packed { scale, rule } => ternary::read_packed(self, scale, *rule),
            Storage::Master(kind) => master::read(self, *kind),
            Storage::MasterOrTernary(kind) => match master::one_scale(self, *kind)? {
                Some(scale) => master::read_scaled(self, *kind, scale),
                None => master::read(self, *kind),
            },
            Storage::Groups(kind) => blocks::read_groups(self, *kind),
            Storage::Dense(_) => {
                Err(self.error(format!("has type {}, not ternary", self.storage.name())))
            }
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
        DenseType::Q8_0 | DenseType::Q4_0 | DenseType::Q6K => None,
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

    /// Sets whether the values of all matrices are believed to be valid.
    pub(crate) fn trust(&mut self, trusted: bool) {
        let layers = self.layers.iter_mut().flat_map(|layer| layer.0.iter_mut().flatten());
        for tensor in layers.chain([&mut self.embed]).chain(&mut self.head) {
            tensor.trusted = trusted;
        }
    }

    /// Returns all tensors in the order of the forward pass.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(|layer| layer.0.iter().flatten());
        std::iter::once(&self.embed)
            .chain(layers)
            .chain(std::iter::once(&self.norm))
            .chain(self.head.as_ref())
    }
}

/// The tensors of one layer, in the order of [`Part::ALL`]; those its family lacks are absent.
#[derive(Debug)]
pub(crate) struct LayerTensors([Option<Tensor>; Part::ALL.len()]);

impl LayerTensors {
    fn find(source: &impl Source, config: &ModelConfig, layer: usize) -> Result<Self, ModelError> {
        let mut found = [const { None }; Part::ALL.len()];
        for part in Part::of(config.architecture) {
            let role = Role::Layer(layer, part);
            found[part as usize] = Some(match part.matrix(config) {
                Some((rows, cols)) => source.ternary(role, rows, cols)?,
                None => source.vector(role, part.width(config))?,
            });
        }
        Ok(Self(found))
    }

    /// Returns one tensor, `None` if the family has no such part.
    pub(crate) fn get(&self, part: Part) -> Option<&Tensor> {
        self.0[part as usize].as_ref()
    }

    /// Returns the bytes of each ternary matrix in memory.
    pub(crate) fn packed_bytes(&self) -> impl Iterator<Item = usize> {
        let parts = Part::ALL.into_iter().filter(|part| part.is_matrix());
        parts.filter_map(|part| self.get(part)).map(Tensor::packed_bytes)
    }

    /// Returns the bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().flatten().map(|tensor| tensor.range.len() as u64).sum()
    }

    /// Reads the layer, its matrices side by side on the current rayon pool, into `arena` if there
    /// is one.
    pub(crate) fn load(&self, arena: Option<&Arc<Arena>>) -> Result<LayerWeights, ModelError> {
        let tensor = |part| self.get(part).expect("every family has this part");
        let vector = |part| tensor(part).read_vector();
        let optional = |part| self.get(part).map(Tensor::read_vector).transpose();
        let parts: Vec<Part> = Part::ALL.into_iter().filter(|part| part.is_matrix()).collect();
        // Gathered before any error is looked at, so that it is always that of the first part.
        let matrices: Vec<_> =
            parts.into_par_iter().map(|part| tensor(part).read_ternary_to(arena)).collect();
        let mut matrices = matrices.into_iter();
        let mut matrix = || matrices.next().expect("one result for each matrix");
        Ok(LayerWeights {
            attn_norm: vector(Part::AttnNorm)?,
            q: matrix()?,
            k: matrix()?,
            v: matrix()?,
            q_norm: optional(Part::QNorm)?,
            k_norm: optional(Part::KNorm)?,
            attn_sub_norm: optional(Part::AttnSubNorm)?,
            o: matrix()?,
            ffn_norm: vector(Part::FfnNorm)?,
            gate: matrix()?,
            up: matrix()?,
            ffn_sub_norm: optional(Part::FfnSubNorm)?,
            down: matrix()?,
        })
    }
}
