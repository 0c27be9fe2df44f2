//! Low-rank adapters, as the PEFT library saves them, merged into training weights.
//!
//! ```text
//! adapter_config.json        r, lora_alpha, use_rslora, target_modules ..
//! adapter_model.safetensors  base_model.model.model.layers.N.<module>.lora_A.weight  [r, inputs]
//!                            base_model.model.model.layers.N.<module>.lora_B.weight  [outputs, r]
//! merged = W + s * (B A), s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
//! ```
//! Products and the sum over `r`, ascending, are in f64; the result is rounded once to f32.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tercet_kernels::{DenseType, TernaryMatrix};

use crate::model_file::ModelFile;
use crate::model_file::error::ModelError;
use crate::model_file::folder::json::Json;
use crate::model_file::folder::model::dense_type;
use crate::model_file::folder::narrow;
use crate::model_file::folder::shards::{Entry, Shards};
use crate::model_file::tensors::{Part, Storage, Tensor, read_floats};
use crate::model_file::ternary::master;

/// Largest rank of an adapter; the largest in use are some hundreds.
const MAX_RANK: usize = 1 << 14;
/// What PEFT puts before the names of the model's tensors.
const PREFIX: &str = "base_model.model.model.layers.";
/// What this version merges, for messages.
const SUPPORTED: &str =
    "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj of the layers";

/// An adapter whose shapes fit a model.
#[derive(Debug)]
pub(super) struct Adapter {
    rank: usize,
    scale: f64,
    /// A and B of each module.
    modules: BTreeMap<(usize, usize), Pair>,
}

/// The two matrices of a module; each may be missing until all names are read.
#[derive(Debug, Default)]
struct Pair {
    a: Option<(String, Entry)>,
    b: Option<(String, Entry)>,
}

impl Adapter {
    /// Opens the adapter in a folder and checks that it is one for `model`.
    pub(super) fn open(folder: &Path, model: &ModelFile) -> Result<Self, ModelError> {
        let json = Json::read(&folder.join("adapter_config.json"))?;
        let (rank, scale) = settings(&json)?;
        let shards = Shards::open_file(&folder.join("adapter_model.safetensors"))?;
        let mut modules: BTreeMap<(usize, usize), Pair> = BTreeMap::new();
        for (name, entry) in shards.iter() {
            let Some((layer, part, is_a)) =
                place(name).filter(|(at, ..)| *at < model.config.layers)
            else {
                return Err(ModelError::tensor(
                    entry.file.label(),
                    name,
                    format!(
                        "belongs to nothing this version merges: {SUPPORTED} 0 to {}",
                        model.config.layers - 1
                    ),
                ));
            };
            let (rows, cols) = part.matrix(&model.config).unwrap_or_default();
            let expected = if is_a { [rank, cols] } else { [rows, rank] };
            if entry.shape != expected {
                let problem = format!(
                    "has shape {:?}, expected {expected:?} for rank {rank} and this model",
                    entry.shape
                );
                return Err(ModelError::tensor(entry.file.label(), name, problem));
            }
            dense_type(name, entry)?;
            let pair = modules.entry((layer, part as usize)).or_default();
            let half = if is_a { &mut pair.a } else { &mut pair.b };
            if half.replace((name.to_owned(), entry.clone())).is_some() {
                let problem = "is there under two names";
                return Err(ModelError::tensor(entry.file.label(), name, problem));
            }
        }
        for pair in modules.values() {
            if let (Some((name, entry)), None) | (None, Some((name, entry))) = (&pair.a, &pair.b) {
                let problem = "has no counterpart: lora_A and lora_B come in pairs";
                return Err(ModelError::tensor(entry.file.label(), name, problem));
            }
        }
        if modules.is_empty() {
            return Err(ModelError::damaged(shards.label(), "it holds no adapter"));
        }
        Ok(Self { rank, scale, modules })
    }

    /// Returns the merged and quantised matrix, `None` if the adapter leaves this one alone.
    pub(super) fn merge(
        &self,
        layer: usize,
        part: Part,
        tensor: &Tensor,
    ) -> Result<Option<TernaryMatrix>, ModelError> {
        let Some(Pair { a: Some(a), b: Some(b) }) = self.modules.get(&(layer, part as usize))
        else {
            return Ok(None);
        };
        let kind = master_type(tensor)?;
        let (a, b) = (values(a)?, values(b)?);
        master::read_rows(tensor, |row| {
            let mut sums = vec![0.0_f64; tensor.cols];
            let factors = &b[row * self.rank..][..self.rank];
            for (factor, a) in factors.iter().zip(a.chunks_exact(tensor.cols)) {
                for (sum, value) in sums.iter_mut().zip(a) {
                    *sum += f64::from(*factor) * f64::from(*value);
                }
            }
            let mut weights = master::floats(tensor, kind, tensor.stored_row(row))?;
            for (weight, sum) in weights.iter_mut().zip(sums) {
                *weight = narrow(f64::from(*weight) + self.scale * sum);
            }
            Ok(weights)
        })
        .map(Some)
    }
}

/// Returns the type of training weights, refusing a matrix that is ternary already.
fn master_type(tensor: &Tensor) -> Result<DenseType, ModelError> {
    let kind = match tensor.storage {
        Storage::Master(kind) => Some(kind),
        Storage::MasterOrTernary(kind) if master::one_scale(tensor, kind)?.is_none() => Some(kind),
        _ => None,
    };
    kind.ok_or_else(|| {
        tensor.error(format!(
            "is {}, ternary already: an adapter is merged into training weights before they are \
             quantised; give the folder of the training weights, in BF16, F16 or F32",
            tensor.storage.name()
        ))
    })
}

/// Reads rank and scale, refusing what this version does not merge.
fn settings(json: &Json) -> Result<(usize, f64), ModelError> {
    let unsupported = |field: &str, found: &Value, expected: &str| {
        Err(ModelError::config(json.label(), field, found, expected))
    };
    if let Some(kind) = json.text("peft_type")?.filter(|kind| *kind != "LORA") {
        return unsupported("peft_type", &kind.into(), "LORA");
    }
    if let Some(bias) = json.text("bias")?.filter(|bias| *bias != "none") {
        return unsupported("bias", &bias.into(), "none, the models have no biases");
    }
    for (field, expected) in [
        ("use_dora", "false, this version merges plain LoRA"),
        ("fan_in_fan_out", "false, the models' matrices have a row for each output"),
        ("lora_bias", "false, the models have no biases"),
    ] {
        if json.flag(field)? == Some(true) {
            return unsupported(field, &true.into(), expected);
        }
    }
    for field in ["rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"] {
        let is_empty = |value: &Value| match value {
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            _ => false,
        };
        if let Some(value) = json.value(field).filter(|value| !is_empty(value)) {
            return Err(json.wrong(field, value, "none, this version merges one rank and scale"));
        }
    }
    if let Some(Value::Array(names)) = json.value("target_modules") {
        for name in names {
            let last = name.as_str().and_then(|name| name.rsplit('.').next());
            let known = |part: &Part| part.is_matrix() && last == Some(module(*part));
            if !Part::ALL.iter().any(known) {
                return Err(json.wrong("target_modules", name, SUPPORTED));
            }
        }
    }
    let rank = json.size("r")?;
    if !(1..=MAX_RANK).contains(&rank) {
        return unsupported("r", &rank.into(), &format!("1 to {MAX_RANK}"));
    }
    let alpha = json.number("lora_alpha")?;
    let alpha = alpha.ok_or_else(|| json.missing("lora_alpha", "a number"))?;
    #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
    let divisor = rank as f64;
    let divisor = if json.flag("use_rslora")? == Some(true) { divisor.sqrt() } else { divisor };
    Ok((rank, alpha / divisor))
}

/// Returns a module's name without those of its parents.
fn module(part: Part) -> &'static str {
    let name = part.folder_name().trim_end_matches(".weight");
    name.rsplit('.').next().unwrap_or(name)
}

/// Returns layer, part and whether it is A, of an adapter's tensor.
fn place(name: &str) -> Option<(usize, Part, bool)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let part = Part::ALL.into_iter().find(|part| {
        let module = part.folder_name().trim_end_matches("weight");
        part.is_matrix() && rest.starts_with(module)
    })?;
    let half = &rest[part.folder_name().len() - "weight".len()..];
    let is_a = match half {
        // Adapters saved with their name have it between.
        "lora_A.weight" | "lora_A.default.weight" => true,
        "lora_B.weight" | "lora_B.default.weight" => false,
        _ => return None,
    };
    Some((layer.parse().ok()?, part, is_a))
}

fn values((name, entry): &(String, Entry)) -> Result<Vec<f32>, ModelError> {
    let kind = dense_type(name, entry)?;
    let values = read_floats(kind, &entry.file.bytes()[entry.range.clone()]).unwrap_or_default();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let problem = format!("holds {} at {at}, not finite", values[at]);
            Err(ModelError::tensor(entry.file.label(), name, problem))
        }
    }
}
