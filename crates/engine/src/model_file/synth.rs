//! Made-up models of real shapes, for measuring and for trying out clusters without a download.
//!
//! The same shape and seed give the same weights in every type, and the same bytes on every
//! machine: weights come from a counter-based generator keyed by seed and tensor name, scales are
//! exact in f16, and head values are exact in every type but Q4_0. Files are streamed: memory
//! use does not depend on the shape.
//!
//! How large the weights are is told at `shape::Gains`. The token just read has more say in the next
//! one than the context, so that greedy text soon repeats itself: measure drafts on sampled text.

mod encode;
mod random;
mod shape;
mod vocabulary;

use std::path::Path;

pub use self::shape::{HeadType, Shape, SizeOverrides};
pub use super::names::UnknownName;
pub use super::ternary::encode::TernaryType;

use super::convert::shape_metadata;
use super::error::ModelError;
use super::gguf::types;
use super::gguf::writer::{Layout, Metadata, TensorPlan};
use super::output::{OutputFile, Progress};
use super::ternary;
use super::tokenizer::TextParts;
use random::Stream;
use shape::{Family, Sizes};

/// Bytes gathered before they are written.
const BATCH: usize = 1 << 20;

/// Which model to make up.
#[derive(Clone, Copy, Debug)]
pub struct SynthOptions {
    /// Its shape.
    pub shape: Shape,
    /// Sizes other than those of the shape.
    pub sizes: SizeOverrides,
    /// Storage of the ternary matrices.
    pub ternary: TernaryType,
    /// Storage of the embedding and the head.
    pub head: HeadType,
    /// What its weights are drawn from.
    pub seed: u64,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
}

/// Writes a made-up model to `out` and returns the file's size.
///
/// BitNet shapes with I2_S are models this version runs. The other types and shapes are written
/// for other programs and later versions: TQ1_0, TQ2_0 and Q2_0 as llama.cpp reads them (BitNet
/// shapes under its architecture name `bitnet`), larger shapes as `llama` or `qwen3`.
///
/// # Errors
/// If the file exists and may not be overwritten, or cannot be written.
pub fn write(
    options: &SynthOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64, ModelError> {
    let like = if options.sizes == SizeOverrides::default() { "" } else { "like-" };
    let name = format!("{like}{}-{}", options.shape, options.ternary);
    write_sizes(&options.shape.sizes_with(&options.sizes)?, &name, options, out, progress)
}

/// [`write`] for any sizes.
fn write_sizes(
    sizes: &Sizes,
    name: &str,
    options: &SynthOptions,
    out: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64, ModelError> {
    let tensors = sizes.tensors();
    let plans: Vec<TensorPlan> = tensors
        .iter()
        .map(|tensor| TensorPlan {
            name: tensor.name.clone(),
            rows: tensor.rows,
            cols: tensor.cols,
            kind: match tensor.fill {
                Fill::Norm { .. } | Fill::SignedNorm { .. } => types::F32,
                Fill::Ternary { .. } => options.ternary.number(),
                Fill::Dense => options.head.number(),
            },
        })
        .collect();
    let metadata = metadata(sizes, name, options.ternary)?;
    let layout = Layout::new(&metadata, &plans)?;
    let file = OutputFile::create(out, options.overwrite, layout.total(), progress)?;
    layout.write(file, |index, out| {
        let tensor = &tensors[index];
        let stream = Stream::new(options.seed, &tensor.name);
        match tensor.fill {
            Fill::Norm { gain } => out.write(&encode::norm(&stream, tensor.cols, gain)),
            Fill::SignedNorm { gain } => {
                out.write(&encode::signed_norm(&stream, tensor.cols, gain))
            }
            Fill::Ternary { gain } => {
                let scale = scale(&stream, tensor.cols, gain);
                write_ternary(tensor, &stream, scale, options.ternary, out)
            }
            Fill::Dense => write_dense(tensor, &stream, options.head, out),
        }
    })
}

/// What a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// Around the gain.
    Norm { gain: f32 },
    /// Around the gain or its negation.
    SignedNorm { gain: f32 },
    /// Outputs spread by about the gain for inputs that spread by 1.
    Ternary { gain: f32 },
    /// Spread by about 0.77.
    Dense,
}

/// One tensor to make up.
#[derive(Clone, Debug)]
struct SynthTensor {
    name: String,
    rows: Option<usize>,
    cols: usize,
    fill: Fill,
}

fn metadata(sizes: &Sizes, name: &str, ternary: TernaryType) -> Result<Metadata, ModelError> {
    let architecture = match (sizes.family, ternary) {
        (Family::BitNet, TernaryType::I2S) => super::convert::ARCHITECTURE,
        (Family::BitNet, _) => "bitnet",
        (Family::Llama, _) => "llama",
        (Family::Qwen3, _) => "qwen3",
    };
    let mut metadata = Metadata::default();
    shape_metadata(&mut metadata, architecture, name, &sizes.config);
    metadata.u32("general.quantization_version", 2);
    metadata.u32("general.file_type", ternary.file_type());
    let text: TextParts = vocabulary::text(sizes.config.vocab)?;
    text.write(&mut metadata, sizes.config.vocab);
    Ok(metadata)
}

/// Returns the scale of a matrix: about what multiplies the spread of its input by `gain`,
/// different for every tensor so that mixed-up scales show, and exact in f16.
fn scale(stream: &Stream, cols: usize, gain: f32) -> half::f16 {
    // Two thirds of the weights are not zero.
    #[expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
    let spread = (cols as f32 * (2.0 / 3.0)).sqrt();
    half::f16::from_f32(gain * (0.9 + 0.2 * stream.unit(u64::MAX)) / spread)
}

fn write_ternary(
    tensor: &SynthTensor,
    stream: &Stream,
    scale: half::f16,
    kind: TernaryType,
    out: &mut OutputFile<'_>,
) -> Result<(), ModelError> {
    let mut codes = vec![0; tensor.cols];
    let mut bytes = Vec::with_capacity(BATCH + tensor.cols);
    // Blocks of I2_S run through the flattened tensor.
    let mut pending = Vec::with_capacity(ternary::BLOCK + tensor.cols);
    for row in 0..tensor.rows.unwrap_or(1) {
        stream.codes(row, &mut codes);
        if kind == TernaryType::I2S {
            pending.extend(&codes);
            let whole = pending.len() / ternary::BLOCK * ternary::BLOCK;
            ternary::encode::row(kind, &pending[..whole], |_| scale, &mut bytes);
            pending.drain(..whole);
        } else {
            ternary::encode::row(kind, &codes, |_| scale, &mut bytes);
        }
        if bytes.len() >= BATCH {
            out.write(&bytes)?;
            bytes.clear();
        }
    }
    if kind == TernaryType::I2S {
        bytes.extend(scale.to_f32().to_le_bytes());
        bytes.resize(bytes.len() + ternary::I2S_TAIL - 4, 0);
    }
    out.write(&bytes)
}

fn write_dense(
    tensor: &SynthTensor,
    stream: &Stream,
    kind: HeadType,
    out: &mut OutputFile<'_>,
) -> Result<(), ModelError> {
    let encoder = encode::DenseEncoder::new(kind);
    let mut groups = vec![random::Group::default(); tensor.cols / random::GROUP];
    let mut bytes = Vec::with_capacity(BATCH + tensor.cols * 2);
    for row in 0..tensor.rows.unwrap_or(1) {
        stream.groups(row, &mut groups);
        encoder.row(&groups, &mut bytes);
        if bytes.len() >= BATCH {
            out.write(&bytes)?;
            bytes.clear();
        }
    }
    out.write(&bytes)
}

#[cfg(test)]
mod tests;
