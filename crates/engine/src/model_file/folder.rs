//! Hugging Face folders: `config.json` and safetensors weights.
//!
//! Three kinds of ternary matrices exist. Packed ones (`microsoft/bitnet-b1.58-2B-4T`,
//! `HF1BitLLM/Llama3-8B-1.58-100B-tokens`, `tiiuae/Falcon3-*-1.58bit`, `tiiuae/Falcon-E-*`) hold
//! them four to a byte along the output rows, with a `weight_scale` beside each. Masters
//! (`microsoft/...-2B-4T-bf16`, `1bitLLM/bitnet_b1_58-*`) hold the floating-point weights of
//! training and are quantised at load. Folders of Llama or Qwen 3 without a quantisation hold
//! numbers that are ternary already, in groups with a scale each.

pub(crate) mod json;
pub(crate) mod model;
mod rope;
pub(crate) mod shards;

use std::path::Path;

use super::config::{
    Activation, ActivationScheme, Architecture, FieldNames, GenerationDefaults, ModelConfig,
    SUPPORTED,
};
use super::error::ModelError;
use json::Json;

/// What differs between the classes read from folders.
#[derive(Clone, Copy, Debug)]
struct Class {
    /// The name in `architectures`.
    name: &'static str,
    architecture: Architecture,
    /// Names of the two norms that only BitNet has.
    sub_norms: [&'static str; 2],
    /// Defaults of the class's configuration in transformers.
    hidden_act: Activation,
    rope_theta: f64,
    head_dim: Option<usize>,
}

const CLASSES: [Class; 4] = [
    Class {
        name: "BitNetForCausalLM",
        architecture: Architecture::BitNet,
        sub_norms: ["self_attn.attn_sub_norm.weight", "mlp.ffn_sub_norm.weight"],
        hidden_act: Activation::Relu2,
        rope_theta: 500_000.0,
        head_dim: None,
    },
    // The class of the code that comes with 1bitLLM's models.
    Class {
        name: "BitnetForCausalLM",
        architecture: Architecture::BitNet,
        sub_norms: ["self_attn.inner_attn_ln.weight", "mlp.ffn_layernorm.weight"],
        hidden_act: Activation::Silu,
        rope_theta: 10_000.0,
        head_dim: None,
    },
    Class {
        name: "LlamaForCausalLM",
        architecture: Architecture::Llama,
        sub_norms: [""; 2],
        hidden_act: Activation::Silu,
        rope_theta: 10_000.0,
        head_dim: None,
    },
    Class {
        name: "Qwen3ForCausalLM",
        architecture: Architecture::Qwen3,
        sub_norms: [""; 2],
        hidden_act: Activation::Silu,
        rope_theta: 10_000.0,
        head_dim: Some(128),
    },
];

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
/// `linear_class` in `quantization_config` decides, whatever the architecture: transformers'
/// `autobitlinear` multiplies the product by it, `bitlinear`, the default, divides:
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
    /// Numbers that are ternary already, with a scale for each group.
    Groups,
}

/// Everything `config.json` decides.
#[derive(Debug)]
pub(crate) struct FolderConfig {
    pub(crate) config: ModelConfig,
    pub(crate) quantization: Quantization,
    /// Names of the two norms that only BitNet has.
    pub(crate) sub_norms: [&'static str; 2],
}

impl FolderConfig {
    /// Interprets `config.json`; `has_head` tells whether the weights have a head of their own.
    pub(crate) fn read(json: &Json, has_head: bool) -> Result<Self, ModelError> {
        let class = class(json)?;
        let unsupported = |field: &str, expected: &str| {
            let found = json.value(field).map_or_else(|| "missing".to_owned(), ToString::to_string);
            ModelError::unsupported(
                json.label(),
                format!("`{field}` is {found}, this version supports only {expected}"),
            )
        };
        let activation = match json.text("hidden_act")? {
            None => class.hidden_act,
            Some("relu2") => Activation::Relu2,
            Some("silu" | "swish") => Activation::Silu,
            Some(_) => return Err(unsupported("hidden_act", "\"relu2\" and \"silu\"")),
        };
        for field in ["attention_bias", "mlp_bias", "use_sliding_window"] {
            if json.flag(field)? == Some(true) {
                return Err(unsupported(field, "false"));
            }
        }
        let rotated = json.number("partial_rotary_factor")?;
        if rotated.is_some_and(|factor| factor.to_bits() != 1.0_f64.to_bits()) {
            return Err(unsupported("partial_rotary_factor", "1.0"));
        }
        let heads = json.size(NAMES.heads)?;
        let hidden = json.size(NAMES.hidden)?;
        let head_dim = match json.optional_size(NAMES.head_dim)?.or(class.head_dim) {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a divisor of the hidden size {hidden}");
                return Err(ModelError::config(json.label(), NAMES.heads, heads, expected));
            }
        };
        let context = json.size(NAMES.context)?;
        let (rope_theta, rope_scaling) = rope::read(json, context, class.rope_theta)?;
        let quantization = quantization(json, class)?;
        let config = ModelConfig {
            architecture: class.architecture,
            hidden,
            intermediate: json.size(NAMES.intermediate)?,
            layers: json.size(NAMES.layers)?,
            heads,
            kv_heads: json.optional_size(NAMES.kv_heads)?.unwrap_or(heads),
            head_dim,
            vocab: json.size(NAMES.vocab)?,
            context,
            activation,
            activations: match quantization {
                Quantization::Groups => ActivationScheme::Block64,
                Quantization::Packed(_) | Quantization::Master => ActivationScheme::Token,
            },
            rope_theta,
            rope_scaling,
            rms_eps: narrow(
                json.number(NAMES.rms_eps)?
                    .ok_or_else(|| json.missing(NAMES.rms_eps, "a number"))?,
            ),
            tied_head: json.flag("tie_word_embeddings")?.unwrap_or(!has_head),
        };
        config.check(json.label(), &NAMES)?;
        Ok(Self { config, quantization, sub_norms: class.sub_norms })
    }
}

/// Refuses folders of other architectures, before anything else is asked of them.
pub(crate) fn check_architecture(json: &Json) -> Result<(), ModelError> {
    class(json).map(drop)
}

fn class(json: &Json) -> Result<Class, ModelError> {
    let architecture = json.value("architectures").and_then(|names| names[0].as_str());
    let found = architecture.or(json.text("model_type")?).unwrap_or("none");
    CLASSES.into_iter().find(|class| class.name == found).ok_or_else(|| ModelError::Architecture {
        file: json.label().to_owned(),
        found: found.to_owned(),
        supported: SUPPORTED,
    })
}

/// Returns the kind of weights, refusing what transformers would compute differently.
///
/// Without a `quantization_config`, 1bitLLM's code quantises its masters on the fly; a
/// `BitNetForCausalLM` would run its masters unquantised, which nobody means; other classes run
/// the numbers as they are, so these must be ternary already.
fn quantization(json: &Json, class: Class) -> Result<Quantization, ModelError> {
    let Some(settings) = json.object("quantization_config")? else {
        if class.name == "BitnetForCausalLM" {
            return Ok(Quantization::Master);
        }
        if class.architecture != Architecture::BitNet {
            return Ok(Quantization::Groups);
        }
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
        let penalty = json.number("repetition_penalty")?.map_or(1.0, narrow);
        let defaults =
            GenerationDefaults { repetition_penalty: penalty, ..GenerationDefaults::GREEDY };
        defaults.check(json.label())?;
        return Ok(defaults);
    }
    let plain = GenerationDefaults::PLAIN;
    let top_k = json.optional_size("top_k")?.map(u32::try_from);
    let number = |field: &str, otherwise: f32| -> Result<f32, ModelError> {
        Ok(json.number(field)?.map_or(otherwise, narrow))
    };
    let defaults = GenerationDefaults {
        temperature: number("temperature", plain.temperature)?,
        top_p: number("top_p", plain.top_p)?,
        min_p: number("min_p", plain.min_p)?,
        repetition_penalty: number("repetition_penalty", plain.repetition_penalty)?,
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
