//! Any model this version opens, written as one GGUF file.
//!
//! | model | architecture | ternary matrices |
//! |---|---|---|
//! | BitNet, ReLU^2 | `bitnet-b1.58` | I2_S |
//! | BitNet, SiLU | `bitnet` | I2_S |
//! | Llama | `llama`, query and key rows pair by pair | TQ2_0 |
//! | Qwen 3 | `qwen3` | TQ2_0; Q2_0 if inputs are quantised in blocks |
//!
//! I2_S, TQ1_0 and TQ2_0 hold the same weights and can be chosen among. I2_S keeps scales in single
//! precision; the others round them, and a key of our own keeps the scale of each matrix exactly.

mod lora;
mod matrix;

use std::path::{Path, PathBuf};

use tercet_kernels::DenseType;

use super::digest::PartDigests;
use super::error::ModelError;
use super::folder::narrow;
use super::gguf::model::{SCALES_KEY, SCALES_PER_LAYER, sampling};
use super::gguf::rope::{FACTORS, llama3, llama3_factors, yarn_attention};
use super::gguf::types;
use super::gguf::writer::{Layout, Metadata, TensorPlan};
use super::native;
use super::output::{OutputFile, Progress};
use super::tensors::{Part, Storage, Tensor};
use super::ternary::encode::TernaryType;
use super::tokenizer::TextParts;
use super::{
    Activation, ActivationScheme, Architecture, GenerationDefaults, ModelConfig, ModelFile,
    RopeScaling,
};
use lora::Adapter;

/// Architecture name of BitNet with ReLU^2, as bitnet.cpp knows it.
pub(crate) const ARCHITECTURE: &str = "bitnet-b1.58";

/// How a conversion behaves.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// Name of the model in the file; the source's name if absent.
    pub name: Option<String>,
    /// Storage of the ternary matrices; what suits the model if absent.
    pub ternary: Option<TernaryType>,
    /// Folder of an adapter to merge into training weights.
    pub lora: Option<PathBuf>,
    /// Whether the file shall tell the digests of its parts, so that it loads fast; its ternary
    /// matrices then have the layout of memory.
    pub native: bool,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
}

/// What a conversion wrote.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Converted {
    /// Size of the file.
    pub bytes: u64,
    /// Storage of the ternary matrices.
    pub ternary: TernaryType,
    /// Scales of blocks that half precision cannot hold and that were rounded; then the result is
    /// not quite the source's model.
    pub rounded_scales: u64,
    /// Whether shape, tokenizer and settings read back as those of the source.
    pub same_header: bool,
}

/// Writes `model` to `out`.
///
/// The file holds everything the source does: shape, tokenizer, chat template, end ids and
/// sampling settings. Dense matrices keep their type and norms become F32, which is exact; so are
/// ternary matrices, except where [`Converted`] says otherwise: apart from that, the result has the
/// digests of its source, with the adapter merged if there is one. It appears under its name only
/// when it is complete and durable.
///
/// # Errors
/// If the file exists and may not be overwritten, cannot be written, the source's weights are
/// damaged, the adapter does not fit, or a matrix does not fit the storage.
pub fn to_gguf(
    model: &ModelFile,
    out: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Converted, ModelError> {
    let ternary = if options.native {
        choose_native(model, options)?
    } else {
        choose(model, options.ternary)?
    };
    let adapter = options.lora.as_ref().map(|folder| Adapter::open(folder, model)).transpose()?;
    let mut metadata = metadata(model, options.name.as_deref().unwrap_or(&model.name), ternary);
    if options.native {
        metadata.string(native::KEY, &native::encode(&digests(model)?));
    }
    let keeps_scales = matches!(ternary, TernaryType::Tq1_0 | TernaryType::Tq2_0);
    if keeps_scales {
        // Known when all matrices are written.
        metadata.f32s(SCALES_KEY, &vec![0.0; model.config.layers * SCALES_PER_LAYER]);
    }
    let items = plan(model, ternary);
    let plans: Vec<TensorPlan> = items.iter().map(|item| item.plan.clone()).collect();
    let layout = Layout::new(&metadata, &plans)?;
    let file = OutputFile::create(out, options.overwrite, layout.total(), progress)?;
    let mut rounded_scales = 0;
    let bytes = layout.write_with_last(file, |index, out, scales| {
        let Item { plan, content } = &items[index];
        match content {
            Content::Ternary { tensor, layer, part } => {
                let merged = match &adapter {
                    Some(adapter) => adapter.merge(*layer, *part, tensor)?,
                    None => None,
                };
                let matrix = merged.map_or_else(|| tensor.read_ternary(), Ok)?;
                let paired = is_paired(model, *part).then_some(model.config.head_dim);
                rounded_scales += matrix::write(&plan.name, &matrix, ternary, paired, out)?;
                if keeps_scales {
                    scales.push(matrix.scale().unwrap_or(0.0));
                }
                Ok(())
            }
            Content::Dense(tensor) => out.write(tensor.bytes()),
            Content::Vector(tensor) => out.write(&floats(&tensor.read_vector()?)),
            Content::Numbers(values) => out.write(&floats(values)),
        }
    })?;
    if options.native && rounded_scales > 0 {
        return Err(unwritable(
            model,
            &format!("{rounded_scales} scales do not fit half precision"),
        ));
    }
    let same_header = ModelFile::open(out)?.header_digest() == model.header_digest();
    Ok(Converted { bytes, ternary, rounded_scales, same_header })
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Whether the rows of a matrix are written pair by pair.
fn is_paired(model: &ModelFile, part: Part) -> bool {
    model.config.architecture == Architecture::Llama && matches!(part, Part::Q | Part::K)
}

/// Returns the storage of the ternary matrices, refusing one that would make it another model.
fn choose(model: &ModelFile, asked: Option<TernaryType>) -> Result<TernaryType, ModelError> {
    let in_blocks = model.config.activations == ActivationScheme::Block64;
    let fits_256 = || {
        let mut matrices = Part::ALL.into_iter().filter_map(|part| part.matrix(&model.config));
        matrices.all(|(_, cols)| cols.is_multiple_of(256))
    };
    let chosen = asked.unwrap_or_else(|| match model.config.architecture {
        _ if in_blocks => TernaryType::Q2_0,
        Architecture::Llama | Architecture::Qwen3 if fits_256() => TernaryType::Tq2_0,
        _ => TernaryType::I2S,
    });
    if in_blocks == (chosen == TernaryType::Q2_0) {
        return Ok(chosen);
    }
    let fitting = if in_blocks { "q2_0" } else { "i2_s, tq1_0 or tq2_0" };
    Err(ModelError::Unwritable {
        what: format!("{} as {chosen}", model.name),
        problem: format!(
            "the inputs of its matrices are quantised per {}, which {chosen} does not stand for; \
             use {fitting}",
            model.config.activations
        ),
    })
}

/// Returns the storage of the ternary matrices that is their layout in memory.
fn choose_native(model: &ModelFile, options: &ConvertOptions) -> Result<TernaryType, ModelError> {
    let chosen = match model.config.activations {
        ActivationScheme::Block64 => TernaryType::Q2_0,
        _ => TernaryType::I2S,
    };
    match options {
        ConvertOptions { lora: Some(_), .. } => Err(unwritable(
            model,
            "its digests are known only when the adapter is merged; merge it in a conversion \
             before this one",
        )),
        ConvertOptions { ternary: Some(asked), .. } if *asked != chosen => {
            Err(unwritable(model, &format!("{asked} is not the layout of memory, {chosen} is")))
        }
        _ => Ok(chosen),
    }
}

fn unwritable(model: &ModelFile, problem: &str) -> ModelError {
    let what = format!("{} as a native file", model.name);
    ModelError::Unwritable { what, problem: problem.to_owned() }
}

/// Returns the digests of all parts, one layer in memory at a time.
fn digests(model: &ModelFile) -> Result<PartDigests, ModelError> {
    let mut parts = Vec::new();
    for layer in 0..model.config.layers {
        parts.extend(model.load(layer..layer + 1)?.part_digests());
    }
    Ok(parts)
}

/// Returns the metadata of a converted model.
fn metadata(model: &ModelFile, name: &str, ternary: TernaryType) -> Metadata {
    let mut metadata = Metadata::default();
    let architecture = architecture(&model.config);
    shape_metadata(&mut metadata, architecture, name, &model.config);
    if (model.config.activation == Activation::Relu2) != (architecture == ARCHITECTURE) {
        let key = format!("{architecture}.hidden_activation");
        metadata.string(&key, &model.config.activation.to_string());
    }
    rope_metadata(&mut metadata, architecture, &model.config.rope_scaling);
    metadata.u32("general.file_type", ternary.file_type());
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
    text.write(&mut metadata, model.config.vocab);
    metadata
}

/// Returns the name of the architecture written.
fn architecture(config: &ModelConfig) -> &'static str {
    match (config.architecture, config.activation) {
        (Architecture::BitNet, Activation::Relu2) => ARCHITECTURE,
        (Architecture::BitNet, Activation::Silu) => "bitnet",
        (Architecture::Llama, _) => "llama",
        (Architecture::Qwen3, _) => "qwen3",
    }
}

/// Adds the keys of rotary scaling; that of Llama 3 is a tensor for other programs.
fn rope_metadata(metadata: &mut Metadata, architecture: &str, scaling: &RopeScaling) {
    let key = |field: &str| format!("{architecture}.rope.scaling.{field}");
    // Contexts were checked to be far below 2^32.
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    match scaling {
        RopeScaling::None | RopeScaling::Factors(_) => {}
        RopeScaling::Linear { factor } => {
            metadata.string(&key("type"), "linear");
            metadata.f32(&key("factor"), *factor);
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            metadata.f32(llama3::FACTOR, *factor);
            metadata.f32(llama3::LOW, *low_freq_factor);
            metadata.f32(llama3::HIGH, *high_freq_factor);
            metadata.u32(llama3::CONTEXT, number(*original_context));
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_context } => {
            metadata.string(&key("type"), "yarn");
            metadata.f32(&key("factor"), *factor);
            metadata.u32(&key("original_context_length"), number(*original_context));
            metadata.f32(&key("yarn_beta_fast"), *beta_fast);
            metadata.f32(&key("yarn_beta_slow"), *beta_slow);
            // What readers apply besides their own function of the factor.
            let usual = yarn_attention(f64::from(*factor));
            let attention = narrow(f64::from(*attention_factor) / usual);
            if attention.to_bits() != 1.0_f32.to_bits() {
                metadata.f32(&key("attn_factor"), attention);
            }
        }
    }
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

/// A tensor to be written and where it comes from.
struct Item<'a> {
    plan: TensorPlan,
    content: Content<'a>,
}

/// What a tensor to be written holds.
enum Content<'a> {
    Ternary { tensor: &'a Tensor, layer: usize, part: Part },
    Dense(&'a Tensor),
    Vector(&'a Tensor),
    Numbers(Vec<f32>),
}

/// Returns every tensor to be written, in the order of the forward pass.
fn plan(model: &ModelFile, ternary: TernaryType) -> Vec<Item<'_>> {
    fn dense<'a>(name: &str, tensor: &'a Tensor) -> Option<Item<'a>> {
        let Storage::Dense(kind) = tensor.storage else { return None };
        let (rows, cols) = (Some(tensor.rows), tensor.cols);
        let plan = TensorPlan { name: name.to_owned(), rows, cols, kind: dense_number(kind) };
        Some(Item { plan, content: Content::Dense(tensor) })
    }
    let vector =
        |name: String, cols: usize| TensorPlan { name, rows: None, cols, kind: types::F32 };
    let tensors = &model.tensors;
    let config = &model.config;
    let mut items = Vec::new();
    items.extend(dense("token_embd.weight", &tensors.embed));
    let factors = match &config.rope_scaling {
        RopeScaling::Factors(factors) => Some(factors.clone()),
        scaling => llama3_factors(scaling, config.rope_theta, config.head_dim),
    };
    if let Some(factors) = factors {
        let plan = vector(FACTORS.to_owned(), factors.len());
        items.push(Item { plan, content: Content::Numbers(factors) });
    }
    for (index, layer) in tensors.layers.iter().enumerate() {
        for part in Part::of(config.architecture) {
            let Some(tensor) = layer.get(part) else { continue };
            let name = format!("blk.{index}.{}", part.gguf_name());
            items.push(match part.matrix(config) {
                Some((rows, cols)) => Item {
                    plan: TensorPlan { name, rows: Some(rows), cols, kind: ternary.number() },
                    content: Content::Ternary { tensor, layer: index, part },
                },
                None => {
                    let plan = vector(name, tensor.cols);
                    Item { plan, content: Content::Vector(tensor) }
                }
            });
        }
    }
    let plan = vector("output_norm.weight".to_owned(), tensors.norm.cols);
    items.push(Item { plan, content: Content::Vector(&tensors.norm) });
    items.extend(tensors.head.iter().filter_map(|head| dense("output.weight", head)));
    items
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
