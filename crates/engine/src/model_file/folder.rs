//! Hugging Face folders of `BitNetForCausalLM`: `config.json` and safetensors weights.
//!
//! Two kinds exist. Packed ones (`microsoft/bitnet-b1.58-2B-4T`) hold ternary matrices four to a
//! byte along the output rows, with a `weight_scale` beside each; masters (`...-bf16`) hold the
//! floating-point weights of training and are quantised at load.

pub(crate) mod json;
pub(crate) mod model;
pub(crate) mod shards;

use std::path::Path;

use super::config::{Architecture, FieldNames, GenerationDefaults, ModelConfig, SUPPORTED};
use super::error::ModelError;
use json::Json;

/// The one architecture read from folders.
const ARCHITECTURE: &str = "BitNetForCausalLM";

const NAMES: FieldNames = FieldNames {
    hidden: "hidden_size",
    intermediate: "intermediate_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    kv_heads: "num_key_value_heads",
    head_dim: "head_dim",
    vocab: "vocab_size",
    context: "max_position_embeddings",
    rope_theta: "rope_theta",
    rms_eps: "rms_norm_eps",
};

/// How `weight_scale` enters a packed matrix.
///
/// transformers' `AutoBitLinear` multiplies the product by it, its older `BitLinear` divides:
/// <https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/bitnet.py>.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PackedScale {
    /// The scale is `weight_scale`.
    Multiplier,
    /// The scale is `1 / weight_scale`.
    Divisor,
}

/// What kind of ternary matrices a folder holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Quantization {
    /// Ternary values packed four to a byte.
    Packed(PackedScale),
    /// Training weights, quantised at load.
    Master,
}

/// Everything `config.json` decides.
#[derive(Debug)]
pub(crate) struct FolderConfig {
    pub(crate) config: ModelConfig,
    pub(crate) quantization: Quantization,
}

impl FolderConfig {
    /// Interprets `config.json`; `has_head` tells whether the weights have a head of their own.
    pub(crate) fn read(json: &Json, has_head: bool) -> Result<Self, ModelError> {
        check_architecture(json)?;
        let unsupported = |field: &str, expected: &str| {
            let found = json.value(field).map_or_else(|| "missing".to_owned(), ToString::to_string);
            ModelError::unsupported(
                json.label(),
                format!("`{field}` is {found}, this version supports only {expected}"),
            )
        };
        if json.text("hidden_act")?.is_some_and(|act| act != "relu2") {
            return Err(unsupported("hidden_act", "\"relu2\""));
        }
        if json.flag("attention_bias")? == Some(true) {
            return Err(unsupported("attention_bias", "false"));
        }
        let heads = json.size(NAMES.heads)?;
        let hidden = json.size(NAMES.hidden)?;
        let head_dim = match json.optional_size(NAMES.head_dim)? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a divisor of the hidden size {hidden}");
                return Err(ModelError::config(json.label(), NAMES.heads, heads, expected));
            }
        };
        let config = ModelConfig {
            architecture: Architecture::BitNet,
            hidden,
            intermediate: json.size(NAMES.intermediate)?,
            layers: json.size(NAMES.layers)?,
            heads,
            kv_heads: json.optional_size(NAMES.kv_heads)?.unwrap_or(heads),
            head_dim,
            vocab: json.size(NAMES.vocab)?,
            context: json.size(NAMES.context)?,
            rope_theta: narrow(rope_theta(json)?),
            rms_eps: narrow(
                json.number(NAMES.rms_eps)?
                    .ok_or_else(|| json.missing(NAMES.rms_eps, "a number"))?,
            ),
            tied_head: json.flag("tie_word_embeddings")?.unwrap_or(!has_head),
        };
        config.check(json.label(), &NAMES)?;
        Ok(Self { config, quantization: quantization(json)? })
    }
}

/// Refuses folders of other architectures, before anything else is asked of them.
pub(crate) fn check_architecture(json: &Json) -> Result<(), ModelError> {
    let architecture = json.value("architectures").and_then(|names| names[0].as_str());
    match architecture.or(json.text("model_type")?) {
        Some(ARCHITECTURE) => Ok(()),
        other => Err(ModelError::Architecture {
            file: json.label().to_owned(),
            found: other.unwrap_or("none").to_owned(),
            supported: SUPPORTED,
        }),
    }
}

/// Returns the rotary base: a field of its own, or inside `rope_parameters` in newer files.
fn rope_theta(json: &Json) -> Result<f64, ModelError> {
    for field in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = json.object(field)? else { continue };
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        if kind.is_some_and(|kind| kind != "default") {
            let problem = format!(
                "`{field}` asks for rotary scaling {kind:?}, this version supports only \"default\""
            );
            return Err(ModelError::unsupported(json.label(), problem));
        }
        if let Some(theta) = rope.number(NAMES.rope_theta)? {
            return Ok(theta);
        }
    }
    json.number(NAMES.rope_theta)?.ok_or_else(|| json.missing(NAMES.rope_theta, "a number"))
}

/// Returns the kind of weights, refusing what transformers would compute differently.
fn quantization(json: &Json) -> Result<Quantization, ModelError> {
    let Some(settings) = json.object("quantization_config")? else {
        let expected = "an object with \"quant_method\": \"bitnet\"; without it the weights are \
                        meant for floating-point layers";
        return Err(json.missing("quantization_config", expected));
    };
    let unsupported = |field: &str, found: &str, expected: &str| {
        let problem = format!(
            "`quantization_config.{field}` is \"{found}\", this version supports {expected}"
        );
        ModelError::unsupported(json.label(), problem)
    };
    match settings.text("quant_method")? {
        Some("bitnet") => {}
        other => {
            return Err(unsupported("quant_method", other.unwrap_or("missing"), "\"bitnet\""));
        }
    }
    if settings.flag("use_rms_norm")? == Some(true) {
        return Err(unsupported("use_rms_norm", "true", "false"));
    }
    // Both defaults are those of transformers' BitNetQuantConfig.
    let class = settings.text("linear_class")?.unwrap_or("bitlinear");
    match (class, settings.text("quantization_mode")?.unwrap_or("offline")) {
        ("autobitlinear", "online") => Ok(Quantization::Master),
        ("autobitlinear", "offline") => Ok(Quantization::Packed(PackedScale::Multiplier)),
        ("bitlinear", "offline") => Ok(Quantization::Packed(PackedScale::Divisor)),
        (class, mode) => Err(unsupported(
            "linear_class",
            &format!("{class}, {mode}"),
            "autobitlinear (online or offline) and bitlinear (offline)",
        )),
    }
}

/// Reads sampling settings from `generation_config.json`.
pub(crate) fn generation(json: Option<&Json>) -> Result<GenerationDefaults, ModelError> {
    let Some(json) = json else { return Ok(GenerationDefaults::GREEDY) };
    if json.flag("do_sample")? != Some(true) {
        return Ok(GenerationDefaults::GREEDY);
    }
    let plain = GenerationDefaults::PLAIN;
    let top_k = json.optional_size("top_k")?.map(u32::try_from);
    let defaults = GenerationDefaults {
        temperature: json.number("temperature")?.map_or(plain.temperature, narrow),
        top_p: json.number("top_p")?.map_or(plain.top_p, narrow),
        top_k: match top_k {
            None => plain.top_k,
            Some(Ok(top_k)) => top_k,
            Some(Err(_)) => {
                let expected = format!("at most {}", u32::MAX);
                return Err(ModelError::config(json.label(), "top_k", "too large", expected));
            }
        },
    };
    defaults.check(json.label())?;
    Ok(defaults)
}

/// Rounds a configuration number to the precision the engine computes in.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
pub(crate) fn narrow(value: f64) -> f32 {
    value as f32
}

/// Whether `folder` looks like a model folder.
pub(crate) fn is_model(folder: &Path) -> bool {
    folder.join("config.json").is_file()
}
