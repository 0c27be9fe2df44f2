//! Any model this version opens, written as one GGUF file with I2_S matrices.

use std::path::Path;

use tercet_kernels::{DenseType, TernaryMatrix};

use super::error::ModelError;
use super::gguf::model::sampling;
use super::gguf::types;
use super::gguf::writer::{Layout, Metadata, TensorPlan};
use super::output::{OutputFile, Progress};
use super::tensors::{Part, Storage, Tensor};
use super::ternary::{BLOCK, BLOCK_BYTES, I2S_TAIL, pack_codes, unpack_codes};
use super::tokenizer::TextParts;
use super::{
    Activation, ActivationScheme, Architecture, GenerationDefaults, ModelConfig, ModelFile,
    RopeScaling,
};

/// Architecture name of the files written, as bitnet.cpp knows it.
pub(crate) const ARCHITECTURE: &str = "bitnet-b1.58";
/// `general.file_type` of bitnet.cpp for I2_S.
const FILE_TYPE: u32 = 40;

/// How a conversion behaves.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// Name of the model in the file; the source's name if absent.
    pub name: Option<String>,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
}

/// Writes `model` to `out` and returns the file's size.
///
/// The file holds everything the source does: shape, tokenizer, chat template, end ids and
/// sampling settings. Dense matrices keep their type, norms become F32, ternary matrices I2_S,
/// all of which is exact: the result has the digests of its source. It appears under its name only
/// when it is complete and durable.
///
/// # Errors
/// If the file exists and may not be overwritten, cannot be written, the source's weights are
/// damaged, or a matrix has no whole number of 128-weight blocks.
pub fn to_gguf(
    model: &ModelFile,
    out: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64, ModelError> {
    check_expressible(model)?;
    let metadata = metadata(model, options.name.as_deref().unwrap_or(&model.name));
    let (plans, sources): (Vec<_>, Vec<_>) = plan(model).into_iter().unzip();
    let layout = Layout::new(&metadata, &plans)?;
    let file = OutputFile::create(out, options.overwrite, layout.total(), progress)?;
    layout.write(file, |index, out| {
        let source: &Tensor = sources[index];
        match (&source.storage, plans[index].rows) {
            (storage, _) if storage.is_ternary() => write_i2s(&source.read_ternary()?, out),
            (_, Some(_)) => out.write(source.bytes()),
            (_, None) => {
                let values = source.read_vector()?;
                out.write(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
            }
        }
    })
}

/// Refuses what a file with the architecture written would not say.
fn check_expressible(model: &ModelFile) -> Result<(), ModelError> {
    let ModelConfig { architecture, activation, rope_scaling, activations, .. } = &model.config;
    let written = (*architecture, *activation, *activations, rope_scaling);
    let expected =
        (Architecture::BitNet, Activation::Relu2, ActivationScheme::Token, &RopeScaling::None);
    if written == expected {
        return Ok(());
    }
    Err(ModelError::Unwritable {
        what: format!(
            "{architecture} with {activation}, int8 per {activations}, rotary scaling \
             {rope_scaling}"
        ),
        problem: "converting supports BitNet with relu2 and no rotary scaling; the model can be \
                  used as it is"
            .to_owned(),
    })
}

/// Returns the metadata of a converted model.
fn metadata(model: &ModelFile, name: &str) -> Metadata {
    let mut metadata = Metadata::default();
    shape_metadata(&mut metadata, ARCHITECTURE, name, &model.config);
    metadata.u32("general.file_type", FILE_TYPE);
    metadata.f32(sampling::TEMPERATURE, model.generation.temperature);
    // llama.cpp reads this one as signed; beyond its range all tokens are kept anyway.
    metadata.i32(sampling::TOP_K, i32::try_from(model.generation.top_k).unwrap_or(i32::MAX));
    metadata.f32(sampling::TOP_P, model.generation.top_p);
    // Left out where they are off, as other programs do.
    let plain = GenerationDefaults::PLAIN;
    for (key, value, off) in [
        (sampling::MIN_P, model.generation.min_p, plain.min_p),
        (
            sampling::REPETITION_PENALTY,
            model.generation.repetition_penalty,
            plain.repetition_penalty,
        ),
    ] {
        if value.to_bits() != off.to_bits() {
            metadata.f32(key, value);
        }
    }
    let text = TextParts {
        tokenizer: model.tokenizer.clone(),
        special: model.special.clone(),
        chat_template: model.chat_template.clone(),
    };
    text.write(&mut metadata);
    metadata
}

/// Adds the keys of a model's shape.
pub(crate) fn shape_metadata(
    metadata: &mut Metadata,
    architecture: &str,
    name: &str,
    config: &ModelConfig,
) {
    // Every size was checked to be far below 2^32 when the configuration was made.
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    metadata.string("general.architecture", architecture);
    metadata.string("general.name", name);
    for (field, size) in [
        ("context_length", config.context),
        ("embedding_length", config.hidden),
        ("block_count", config.layers),
        ("feed_forward_length", config.intermediate),
        ("attention.head_count", config.heads),
        ("attention.head_count_kv", config.kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab),
    ] {
        metadata.u32(&format!("{architecture}.{field}"), number(size));
    }
    metadata.f32(&format!("{architecture}.rope.freq_base"), config.rope_theta);
    let epsilon = format!("{architecture}.attention.layer_norm_rms_epsilon");
    metadata.f32(&epsilon, config.rms_eps);
}

/// Pairs every tensor to be written with its source, in the order of the forward pass.
fn plan(model: &ModelFile) -> Vec<(TensorPlan, &Tensor)> {
    let tensors = &model.tensors;
    let matrix = |name: &str, tensor: &Tensor| TensorPlan {
        name: name.to_owned(),
        rows: Some(tensor.rows),
        cols: tensor.cols,
        kind: match tensor.storage {
            Storage::Dense(kind) => dense_number(kind),
            _ => types::I2_S,
        },
    };
    let vector = |name: String, tensor: &Tensor| TensorPlan {
        name,
        rows: None,
        cols: tensor.cols,
        kind: types::F32,
    };
    let mut plans = vec![(matrix("token_embd.weight", &tensors.embed), &tensors.embed)];
    for (index, layer) in tensors.layers.iter().enumerate() {
        for part in Part::of(model.config.architecture) {
            let Some(tensor) = layer.get(part) else { continue };
            let name = format!("blk.{index}.{}", part.gguf_name());
            let plan = match part.matrix(&model.config) {
                Some(_) => matrix(&name, tensor),
                None => vector(name, tensor),
            };
            plans.push((plan, tensor));
        }
    }
    plans.push((vector("output_norm.weight".to_owned(), &tensors.norm), &tensors.norm));
    plans.extend(tensors.head.iter().map(|head| (matrix("output.weight", head), head)));
    plans
}

/// Returns the GGUF type number of a dense type.
pub(crate) fn dense_number(kind: DenseType) -> u32 {
    match kind {
        DenseType::F32 => types::F32,
        DenseType::F16 => types::F16,
        DenseType::Bf16 => types::BF16,
        DenseType::Q8_0 => types::Q8_0,
        DenseType::Q4_0 => types::Q4_0,
        DenseType::Q6K => types::Q6_K,
    }
}

/// Writes a matrix as I2_S: blocks through the flattened tensor, then the scale.
fn write_i2s(matrix: &TernaryMatrix, out: &mut OutputFile<'_>) -> Result<(), ModelError> {
    let cols = matrix.cols();
    if cols.is_multiple_of(BLOCK) {
        out.write(matrix.packed())?;
    } else {
        let padded = cols.next_multiple_of(BLOCK);
        let mut row = vec![0; padded];
        let mut pending: Vec<u8> = Vec::with_capacity(BLOCK + padded);
        let mut packed = vec![0; padded.div_ceil(BLOCK) * BLOCK_BYTES + BLOCK_BYTES];
        for bytes in matrix.packed().chunks_exact(padded / 4) {
            unpack_codes(bytes, &mut row);
            pending.extend(&row[..cols]);
            let whole = pending.len() / BLOCK * BLOCK;
            let packed = &mut packed[..whole / 4];
            pack_codes(&pending[..whole], packed);
            out.write(packed)?;
            pending.drain(..whole);
        }
    }
    let mut tail = [0; I2S_TAIL];
    let scale = matrix.scale().ok_or_else(|| ModelError::Unwritable {
        what: format!("{matrix:?} as I2_S"),
        problem: "I2_S has one scale for a matrix; use the model as it is".to_owned(),
    })?;
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    out.write(&tail)
}
