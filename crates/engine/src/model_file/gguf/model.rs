//! Models in GGUF files: configuration and tensors.
//!
//! `bitnet-b1.58` is what bitnet.cpp writes (`bitnet-25` an older name for the same layers),
//! `bitnet` what llama.cpp writes for the older BitNet models, whose gate is SiLU unless
//! `bitnet.hidden_activation` says otherwise. Query and key rows are in the order of the original
//! model, but for `llama`, where the two of a rotated pair are neighbours.

use tercet_kernels::DenseType;

use super::value::Value;
use super::{Gguf, types};
use crate::model_file::config::{
    Activation, ActivationScheme, Architecture, FieldNames, GenerationDefaults, ModelConfig,
    SUPPORTED,
};
use crate::model_file::error::ModelError;
use crate::model_file::folder::narrow;
use crate::model_file::tensors::{Part, Role, Source, Storage, Tensor};

/// Keys of sampling settings, as llama.cpp reads them.
pub(crate) mod sampling {
    pub(crate) const TEMPERATURE: &str = "general.sampling.temp";
    pub(crate) const TOP_K: &str = "general.sampling.top_k";
    pub(crate) const TOP_P: &str = "general.sampling.top_p";
    pub(crate) const MIN_P: &str = "general.sampling.min_p";
    pub(crate) const REPETITION_PENALTY: &str = "general.sampling.penalty_repeat";
}

/// Key of the scale of every matrix of the layers before blocks rounded it to half precision, in the
/// order of the forward pass; 0 where a matrix has no single one. Other programs leave it alone.
pub(crate) const SCALES_KEY: &str = "tercet.ternary_scales";
/// Entries of [`SCALES_KEY`] for a layer.
pub(crate) const SCALES_PER_LAYER: usize = 7;

/// Keys after the architecture's name; the two without a name of their own follow from others.
const NAMES: FieldNames = FieldNames {
    hidden: "embedding_length",
    intermediate: "feed_forward_length",
    layers: "block_count",
    heads: "attention.head_count",
    kv_heads: "attention.head_count_kv",
    head_dim: "attention.key_length",
    vocab: "vocab_size",
    context: "context_length",
    rope_theta: "rope.freq_base",
    rms_eps: "attention.layer_norm_rms_epsilon",
};

/// A GGUF file of a supported architecture.
#[derive(Debug)]
pub(crate) struct GgufModel {
    gguf: Gguf,
    /// The architecture's name in the file.
    name: String,
    architecture: Architecture,
    activations: ActivationScheme,
    /// Width of the heads whose rows are stored pair by pair.
    paired_heads: Option<usize>,
}

impl GgufModel {
    /// Accepts a file whose architecture is supported.
    pub(crate) fn new(gguf: Gguf) -> Result<Self, ModelError> {
        let label = gguf.file().label();
        let Some(value) = gguf.value("general.architecture") else {
            let expected = format!("one of {SUPPORTED}");
            return Err(ModelError::config(label, "general.architecture", "missing", expected));
        };
        let architecture = match value.as_str() {
            Some("bitnet-b1.58" | "bitnet-25" | "bitnet") => Architecture::BitNet,
            Some("llama") => Architecture::Llama,
            Some("qwen3") => Architecture::Qwen3,
            _ => {
                return Err(ModelError::Architecture {
                    file: label.to_owned(),
                    found: value.as_str().map_or_else(|| value.to_string(), str::to_owned),
                    supported: SUPPORTED,
                });
            }
        };
        let name = value.as_str().unwrap_or_default().to_owned();
        let activations = scheme(&gguf, architecture)?;
        let mut model = Self { gguf, name, architecture, activations, paired_heads: None };
        if architecture == Architecture::Llama {
            model.paired_heads = Some(model.head_dim()?);
        }
        Ok(model)
    }

    /// Returns the parsed header.
    pub(crate) fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    pub(super) fn label(&self) -> &str {
        self.gguf.file().label()
    }

    pub(super) fn key(&self, field: &str) -> String {
        format!("{}.{field}", self.name)
    }

    pub(super) fn size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        let key = self.key(field);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some)
            .ok_or_else(|| ModelError::config(self.label(), &key, value, "a whole number"))
    }

    fn required_size(&self, field: &str) -> Result<usize, ModelError> {
        self.size(field)?.ok_or_else(|| self.missing(field, "a whole number"))
    }

    pub(super) fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let key = self.key(field);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| ModelError::config(self.label(), &key, value, "a number"))
    }

    pub(super) fn missing(&self, field: &str, expected: &str) -> ModelError {
        ModelError::config(self.label(), &self.key(field), "missing", expected)
    }

    /// Reads the model's shape.
    pub(crate) fn config(&self) -> Result<ModelConfig, ModelError> {
        let hidden = self.required_size(NAMES.hidden)?;
        let heads = self.required_size(NAMES.heads)?;
        let head_dim = self.head_dim()?;
        let experts = self.size("expert_count")?.unwrap_or(0);
        if experts > 0 {
            let key = self.key("expert_count");
            return Err(ModelError::config(self.label(), &key, experts, "0, no experts"));
        }
        for field in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.size(field)?.filter(|found| *found != head_dim) {
                let expected = format!("the head width {head_dim}");
                return Err(ModelError::config(self.label(), &self.key(field), found, expected));
            }
        }
        let context = self.required_size(NAMES.context)?;
        let config = ModelConfig {
            architecture: self.architecture,
            hidden,
            intermediate: self.required_size(NAMES.intermediate)?,
            layers: self.required_size(NAMES.layers)?,
            heads,
            kv_heads: self.size(NAMES.kv_heads)?.unwrap_or(heads),
            head_dim,
            vocab: self.vocab()?,
            context,
            activation: self.activation()?,
            activations: self.activations,
            rope_theta: self.rope_theta()?,
            rope_scaling: self.rope_scaling(context, head_dim)?,
            rms_eps: narrow(
                self.number(NAMES.rms_eps)?
                    .ok_or_else(|| self.missing(NAMES.rms_eps, "a number"))?,
            ),
            tied_head: self.gguf.tensor("output.weight").is_none(),
        };
        config.check(self.label(), &NAMES)?;
        Ok(config)
    }

    fn head_dim(&self) -> Result<usize, ModelError> {
        let hidden = self.required_size(NAMES.hidden)?;
        let heads = self.required_size(NAMES.heads)?;
        match self.size(NAMES.head_dim)? {
            Some(0) => {
                let key = self.key(NAMES.head_dim);
                Err(ModelError::config(self.label(), &key, 0, "at least 2"))
            }
            Some(head_dim) => Ok(head_dim),
            None if heads > 0 && hidden >= heads && hidden.is_multiple_of(heads) => {
                Ok(hidden / heads)
            }
            None => {
                let expected = format!("a divisor of the hidden size {hidden}");
                Err(ModelError::config(self.label(), &self.key(NAMES.heads), heads, expected))
            }
        }
    }

    /// Returns llama.cpp's value for files without the key.
    pub(super) fn rope_theta(&self) -> Result<f32, ModelError> {
        Ok(narrow(self.number(NAMES.rope_theta)?.unwrap_or(10_000.0)))
    }

    fn activation(&self) -> Result<Activation, ModelError> {
        let plain = match self.name.as_str() {
            "bitnet-b1.58" | "bitnet-25" => Activation::Relu2,
            _ => Activation::Silu,
        };
        let key = self.key("hidden_activation");
        let Some(value) = self.gguf.value(&key) else { return Ok(plain) };
        match value.as_str() {
            Some("relu2" | "relu_sqr") => Ok(Activation::Relu2),
            Some("silu" | "swish") => Ok(Activation::Silu),
            _ => Err(ModelError::config(self.label(), &key, value, "\"relu2\" or \"silu\"")),
        }
    }

    /// The embedding has the last word on the vocabulary size; it is checked against this.
    fn vocab(&self) -> Result<usize, ModelError> {
        if let Some(vocab) = self.size(NAMES.vocab)? {
            return Ok(vocab);
        }
        let rows = self.gguf.tensor("token_embd.weight").and_then(|t| t.dimensions.get(1));
        rows.and_then(|rows| usize::try_from(*rows).ok()).ok_or_else(|| {
            self.missing(NAMES.vocab, "a whole number, or the matrix token_embd.weight")
        })
    }

    /// Reads sampling settings; see [`GenerationDefaults`].
    pub(crate) fn generation(&self) -> Result<GenerationDefaults, ModelError> {
        let mut defaults = GenerationDefaults::PLAIN;
        let wrong = |key: &str, value| ModelError::config(self.label(), key, value, "a number");
        for (key, target) in [
            (sampling::TEMPERATURE, &mut defaults.temperature),
            (sampling::TOP_P, &mut defaults.top_p),
            (sampling::MIN_P, &mut defaults.min_p),
            (sampling::REPETITION_PENALTY, &mut defaults.repetition_penalty),
        ] {
            if let Some(value) = self.gguf.value(key) {
                *target = narrow(value.as_f64().ok_or_else(|| wrong(key, value))?);
            }
        }
        if let Some(value) = self.gguf.value(sampling::TOP_K) {
            let top_k = value.as_u64().and_then(|top_k| u32::try_from(top_k).ok());
            defaults.top_k = top_k.ok_or_else(|| wrong(sampling::TOP_K, value))?;
        }
        defaults.check(self.label())?;
        Ok(defaults)
    }

    /// Finds a tensor of `rows` by `cols` (a vector if `rows` is `None`) and reads its storage.
    fn find(
        &self,
        role: Role,
        rows: Option<usize>,
        cols: usize,
        storage: impl Fn(u32) -> Result<Storage, &'static str>,
    ) -> Result<Tensor, ModelError> {
        let name = match role {
            Role::Embed => "token_embd.weight".to_owned(),
            Role::OutputNorm => "output_norm.weight".to_owned(),
            Role::Head => "output.weight".to_owned(),
            Role::Layer(layer, part) => format!("blk.{layer}.{}", part.gguf_name()),
        };
        self.find_named(name, rows, cols, storage)
    }

    /// [`Self::find`] for a tensor of that name.
    pub(super) fn find_named(
        &self,
        name: String,
        rows: Option<usize>,
        cols: usize,
        storage: impl Fn(u32) -> Result<Storage, &'static str>,
    ) -> Result<Tensor, ModelError> {
        let Some(info) = self.gguf.tensor(&name) else {
            return Err(ModelError::MissingTensor { file: self.label().to_owned(), tensor: name });
        };
        let mut expected = vec![cols as u64];
        expected.extend(rows.map(|rows| rows as u64));
        // Trailing dimensions of 1 add no elements.
        let significant =
            1 + info.dimensions.iter().skip(1).rposition(|size| *size != 1).map_or(0, |at| at + 1);
        let matches = info.dimensions[..significant] == expected
            || (rows == Some(1) && info.dimensions[..significant] == expected[..1]);
        if !matches {
            let problem = format!(
                "has dimensions {:?}, the configuration asks for {expected:?} (innermost first)",
                info.dimensions
            );
            return Err(ModelError::tensor(self.label(), &name, problem));
        }
        let storage = storage(info.kind).map_err(|expected| {
            let problem = format!("has type {}, expected {expected}", types::name(info.kind));
            ModelError::tensor(self.label(), &name, problem)
        })?;
        let range = self.gguf.range(&name, info)?;
        let file = self.gguf.file().clone();
        Ok(Tensor {
            name,
            file,
            range,
            rows: rows.unwrap_or(1),
            cols,
            storage,
            activations: self.activations,
            paired_heads: None,
            factor: None,
            exact_scale: None,
            trusted: false,
        })
    }

    /// Returns what [`SCALES_KEY`] says about a matrix.
    fn exact_scale(&self, role: Role) -> Option<f32> {
        let (Some(Value::Floats(scales)), Role::Layer(layer, part)) =
            (self.gguf.value(SCALES_KEY), role)
        else {
            return None;
        };
        let mut matrices = Part::ALL.into_iter().filter(|part| part.is_matrix());
        let place = matrices.position(|matrix| matrix == part)?;
        let scale = scales.get(layer.checked_mul(SCALES_PER_LAYER)?.checked_add(place)?)?;
        (scale.is_finite() && *scale > 0.0).then_some(*scale)
    }

    /// Reads the factor that some files put beside a matrix: `attn_q.scale` for `attn_q.weight`.
    fn scale_of(&self, matrix: &str) -> Result<Option<f32>, ModelError> {
        let name = format!("{}.scale", matrix.strip_suffix(".weight").unwrap_or(matrix));
        if self.gguf.tensor(&name).is_none() {
            return Ok(None);
        }
        let tensor = self.find_named(name, None, 1, floats)?;
        let scale = tensor.read_vector()?.first().copied().unwrap_or_default();
        if scale <= 0.0 {
            return Err(tensor.error(format!("is {scale}, expected a positive number")));
        }
        Ok(Some(scale))
    }
}

/// Accepts plain numbers only.
pub(super) fn floats(kind: u32) -> Result<Storage, &'static str> {
    float_type(kind).map(Storage::Dense).ok_or("F32, F16 or BF16")
}

fn float_type(kind: u32) -> Option<DenseType> {
    match kind {
        types::F32 => Some(DenseType::F32),
        types::F16 => Some(DenseType::F16),
        types::BF16 => Some(DenseType::Bf16),
        _ => None,
    }
}

/// Decides how inputs are quantised, from the types of the layers' matrices.
///
/// Q2_0 is what models trained with floating-point activations are written in, and so are plain
/// numbers; the other types, and plain numbers beside them, belong to BitNet-trained models.
fn scheme(gguf: &Gguf, architecture: Architecture) -> Result<ActivationScheme, ModelError> {
    let mut tokens = None;
    let mut blocks = None;
    for (name, tensor) in gguf.tensors() {
        let is_matrix = |part: &Part| {
            part.is_matrix()
                && name.strip_suffix(part.gguf_name()).is_some_and(|n| n.ends_with('.'))
        };
        if !name.starts_with("blk.") || !Part::ALL.iter().any(is_matrix) {
            continue;
        }
        match tensor.kind {
            types::Q2_0 => blocks = Some(name),
            types::I2_S | types::TQ1_0 | types::TQ2_0 => tokens = Some(name),
            _ => {}
        }
    }
    match (tokens, blocks) {
        (Some(token), Some(block)) => {
            let problem = format!(
                "is of type Q2_0 but `{token}` is not; expected all matrices of the layers to be"
            );
            Err(ModelError::tensor(gguf.file().label(), block, problem))
        }
        (None, Some(_)) => Ok(ActivationScheme::Block64),
        (Some(_), None) => Ok(ActivationScheme::Token),
        (None, None) if architecture == Architecture::BitNet => Ok(ActivationScheme::Token),
        (None, None) => Ok(ActivationScheme::Block64),
    }
}

impl Source for GgufModel {
    fn vector(&self, role: Role, length: usize) -> Result<Tensor, ModelError> {
        self.find(role, None, length, floats)
    }

    fn ternary(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let mut tensor = self.find(role, Some(rows), cols, |kind| match kind {
            types::I2_S => Ok(Storage::I2S),
            types::TQ1_0 => Ok(Storage::Tq1_0),
            types::TQ2_0 => Ok(Storage::Tq2_0),
            types::Q2_0 => Ok(Storage::Q2_0 { block: self.gguf.q2_0_block() }),
            other => match (float_type(other), self.architecture) {
                (Some(kind), Architecture::BitNet) => Ok(Storage::MasterOrTernary(kind)),
                (Some(kind), _) => Ok(Storage::Groups(kind)),
                (None, _) => {
                    Err("I2_S, TQ1_0, TQ2_0, Q2_0, or ternary weights as F32, F16 or BF16")
                }
            },
        })?;
        tensor.factor = self.scale_of(&tensor.name)?;
        tensor.exact_scale = self.exact_scale(role);
        if matches!(role, Role::Layer(_, Part::Q | Part::K)) {
            tensor.paired_heads = self.paired_heads;
        }
        Ok(tensor)
    }

    fn dense(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.find(role, Some(rows), cols, |kind| match kind {
            types::F32 => Ok(Storage::Dense(DenseType::F32)),
            types::F16 => Ok(Storage::Dense(DenseType::F16)),
            types::BF16 => Ok(Storage::Dense(DenseType::Bf16)),
            types::Q4_0 => Ok(Storage::Dense(DenseType::Q4_0)),
            types::Q8_0 => Ok(Storage::Dense(DenseType::Q8_0)),
            types::Q6_K => Ok(Storage::Dense(DenseType::Q6K)),
            _ => Err("F32, F16, BF16, Q8_0, Q6_K or Q4_0 for the embedding and the head; write \
                      the file again with one of these (llama-quantize --token-embedding-type)"),
        })
    }
}
