//! BitNet models in GGUF files: configuration and tensors.
//!
//! `bitnet-b1.58` is what bitnet.cpp writes (`bitnet-25` an older name for the same layers): query
//! and key rows are in the order of the original model, not permuted as for `llama`.

use tercet_kernels::DenseType;

use super::{Gguf, types};
use crate::model_file::config::{
    Architecture, FieldNames, GenerationDefaults, ModelConfig, SUPPORTED,
};
use crate::model_file::error::ModelError;
use crate::model_file::folder::narrow;
use crate::model_file::tensors::{Role, Source, Storage, Tensor};

/// Names of the architecture.
const ARCHITECTURES: [&str; 2] = ["bitnet-b1.58", "bitnet-25"];
/// Keys of sampling settings, as llama.cpp reads them.
pub(crate) mod sampling {
    pub(crate) const TEMPERATURE: &str = "general.sampling.temp";
    pub(crate) const TOP_K: &str = "general.sampling.top_k";
    pub(crate) const TOP_P: &str = "general.sampling.top_p";
}

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
    architecture: String,
}

impl GgufModel {
    /// Accepts a file whose architecture is supported.
    pub(crate) fn new(gguf: Gguf) -> Result<Self, ModelError> {
        let label = gguf.file().label();
        let Some(value) = gguf.value("general.architecture") else {
            let expected = format!("one of {SUPPORTED}");
            return Err(ModelError::config(label, "general.architecture", "missing", expected));
        };
        match value.as_str() {
            Some(name) if ARCHITECTURES.contains(&name) => {
                let architecture = name.to_owned();
                Ok(Self { gguf, architecture })
            }
            _ => Err(ModelError::Architecture {
                file: label.to_owned(),
                found: value.as_str().map_or_else(|| value.to_string(), str::to_owned),
                supported: SUPPORTED,
            }),
        }
    }

    /// Returns the parsed header.
    pub(crate) fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    fn label(&self) -> &str {
        self.gguf.file().label()
    }

    fn key(&self, field: &str) -> String {
        format!("{}.{field}", self.architecture)
    }

    fn size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        let key = self.key(field);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some)
            .ok_or_else(|| ModelError::config(self.label(), &key, value, "a whole number"))
    }

    fn required_size(&self, field: &str) -> Result<usize, ModelError> {
        self.size(field)?.ok_or_else(|| self.missing(field, "a whole number"))
    }

    fn number(&self, field: &str) -> Result<Option<f64>, ModelError> {
        let key = self.key(field);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| ModelError::config(self.label(), &key, value, "a number"))
    }

    fn missing(&self, field: &str, expected: &str) -> ModelError {
        ModelError::config(self.label(), &self.key(field), "missing", expected)
    }

    /// Reads the model's shape.
    pub(crate) fn config(&self) -> Result<ModelConfig, ModelError> {
        let hidden = self.required_size(NAMES.hidden)?;
        let heads = self.required_size(NAMES.heads)?;
        let head_dim = match self.size(NAMES.head_dim)? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a divisor of the hidden size {hidden}");
                let key = self.key(NAMES.heads);
                return Err(ModelError::config(self.label(), &key, heads, expected));
            }
        };
        for field in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.size(field)?.filter(|found| *found != head_dim) {
                let expected = format!("the head width {head_dim}");
                return Err(ModelError::config(self.label(), &self.key(field), found, expected));
            }
        }
        self.refuse_rope_scaling()?;
        let config = ModelConfig {
            architecture: Architecture::BitNet,
            hidden,
            intermediate: self.required_size(NAMES.intermediate)?,
            layers: self.required_size(NAMES.layers)?,
            heads,
            kv_heads: self.size(NAMES.kv_heads)?.unwrap_or(heads),
            head_dim,
            vocab: self.vocab()?,
            context: self.required_size(NAMES.context)?,
            // llama.cpp's value for files without the key.
            rope_theta: narrow(self.number(NAMES.rope_theta)?.unwrap_or(10_000.0)),
            rms_eps: narrow(
                self.number(NAMES.rms_eps)?
                    .ok_or_else(|| self.missing(NAMES.rms_eps, "a number"))?,
            ),
            tied_head: self.gguf.tensor("output.weight").is_none(),
        };
        config.check(self.label(), &NAMES)?;
        Ok(config)
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

    /// bitnet.cpp's converter writes linear scaling by 1, which changes nothing.
    fn refuse_rope_scaling(&self) -> Result<(), ModelError> {
        let key = self.key("rope.scaling.type");
        let factor = self.number("rope.scaling.factor")?.unwrap_or(1.0);
        match self.gguf.value(&key) {
            None => Ok(()),
            Some(value) if value.as_str() == Some("none") => Ok(()),
            Some(value) if value.as_str() == Some("linear") && factor == 1.0 => Ok(()),
            Some(value) => Err(ModelError::unsupported(
                self.label(),
                format!("`{key}` is {value} by {factor}; this version supports no rotary scaling"),
            )),
        }
    }

    /// Reads sampling settings; see [`GenerationDefaults`].
    pub(crate) fn generation(&self) -> Result<GenerationDefaults, ModelError> {
        let mut defaults = GenerationDefaults::PLAIN;
        let wrong = |key: &str, value| ModelError::config(self.label(), key, value, "a number");
        for (key, target) in [
            (sampling::TEMPERATURE, &mut defaults.temperature),
            (sampling::TOP_P, &mut defaults.top_p),
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
        Ok(Tensor { name, file, range, rows: rows.unwrap_or(1), cols, storage })
    }
}

impl Source for GgufModel {
    fn vector(&self, role: Role, length: usize) -> Result<Tensor, ModelError> {
        self.find(role, None, length, |kind| match kind {
            types::F32 => Ok(Storage::Dense(DenseType::F32)),
            types::F16 => Ok(Storage::Dense(DenseType::F16)),
            types::BF16 => Ok(Storage::Dense(DenseType::Bf16)),
            _ => Err("F32, F16 or BF16"),
        })
    }

    fn ternary(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.find(role, Some(rows), cols, |kind| match kind {
            types::I2_S => Ok(Storage::I2S),
            _ => Err("I2_S, the only ternary type this version runs"),
        })
    }

    fn dense(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        self.find(role, Some(rows), cols, |kind| match kind {
            types::F32 => Ok(Storage::Dense(DenseType::F32)),
            types::F16 => Ok(Storage::Dense(DenseType::F16)),
            types::BF16 => Ok(Storage::Dense(DenseType::Bf16)),
            types::Q8_0 => Ok(Storage::Dense(DenseType::Q8_0)),
            types::Q6_K => Ok(Storage::Dense(DenseType::Q6K)),
            _ => Err("F32, F16, BF16, Q8_0 or Q6_K"),
        })
    }
}
