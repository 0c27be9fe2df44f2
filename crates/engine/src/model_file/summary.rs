//! What a model file holds, for people and for scripts.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;
use tercet_kernels::SCALE_BLOCK;
use tercet_text::TokenizerSource;

use super::tensors::Tensor;
use super::{ActivationScheme, GenerationDefaults, ModelConfig, ModelFile, ModelFormat};

/// What a model file holds. Serialises to JSON; displays as text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The model's label.
    pub name: String,
    /// The file format.
    pub format: ModelFormat,
    /// Digest of configuration and tokenizer, in hexadecimal.
    pub header_digest: String,
    /// The model's shape.
    pub config: ModelConfig,
    /// Recommended sampling settings.
    pub generation: GenerationDefaults,
    /// The tokenizer.
    pub tokenizer: TokenizerSummary,
    /// Sums over all tensors.
    pub totals: Totals,
    /// What one token costs in memory traffic.
    pub decode: DecodeBytes,
    /// Every tensor, in the order of the forward pass.
    pub tensors: Vec<TensorSummary>,
}

/// A model's tokenizer in short.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenizerSummary {
    /// `tokenizer.json`, or the kind and pre-tokenizer of a GGUF vocabulary.
    pub kind: String,
    /// Id that begins text.
    pub bos: Option<u32>,
    /// Ids that end text.
    pub eos: Vec<u32>,
    /// Whether prompts begin with `bos`.
    pub add_bos: bool,
    /// Whether the model has a chat format.
    pub chat_template: bool,
}

/// Sums over a model's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Number of tensors.
    pub tensors: usize,
    /// Weights.
    pub parameters: u64,
    /// Weights that are ternary once loaded.
    pub ternary_parameters: u64,
    /// Bytes of all tensors in the file.
    pub bytes: u64,
    /// Bytes of the ternary tensors in the file.
    pub ternary_bytes: u64,
}

/// Bytes that computing one token of one sequence reads, which bounds its rate. Norms and the token's
/// row of the embedding are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DecodeBytes {
    /// The ternary weights of all layers, two bits each.
    pub ternary: u64,
    /// Their scales of blocks, if the model's scheme has them. Where a file of another scheme has
    /// blocks that differ, known only once it is loaded, these come on top.
    pub scales: u64,
    /// The head, as it is stored.
    pub head: u64,
    /// Keys and values, for each position before the token.
    pub kv_per_position: u64,
}

/// One tensor in short.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorSummary {
    /// Its name in the file.
    pub name: String,
    /// How its elements are stored.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its dimensions once loaded, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: u64,
}

impl ModelFile {
    /// Returns what the file holds.
    pub fn summary(&self) -> Summary {
        let tensors: Vec<TensorSummary> = self.tensors.iter().map(summarize).collect();
        let mut totals = Totals { tensors: tensors.len(), ..Totals::default() };
        for tensor in self.tensors.iter() {
            let parameters = (tensor.rows as u64) * (tensor.cols as u64);
            totals.parameters += parameters;
            totals.bytes += tensor.range.len() as u64;
            if tensor.storage.is_ternary() {
                totals.ternary_parameters += parameters;
                totals.ternary_bytes += tensor.range.len() as u64;
            }
        }
        let kind = match &self.tokenizer {
            TokenizerSource::Json(_) => "tokenizer.json".to_owned(),
            TokenizerSource::Vocabulary(vocabulary) => {
                format!("{} ({})", vocabulary.model, vocabulary.pre)
            }
        };
        Summary {
            name: self.name.clone(),
            format: self.format,
            header_digest: blake3::Hash::from_bytes(self.header_digest()).to_hex().to_string(),
            config: self.config.clone(),
            generation: self.generation,
            tokenizer: TokenizerSummary {
                kind,
                bos: self.special.bos,
                eos: self.special.eos.clone(),
                add_bos: self.special.add_bos,
                chat_template: self.chat_template.is_some(),
            },
            totals,
            decode: self.decode_bytes(),
            tensors,
        }
    }

    fn decode_bytes(&self) -> DecodeBytes {
        let head = self.tensors.head.as_ref().unwrap_or(&self.tensors.embed);
        let mut decode = DecodeBytes {
            head: head.range.len() as u64,
            kv_per_position: self.config.kv_bytes_per_position() as u64,
            ..DecodeBytes::default()
        };
        for Tensor { rows, cols, .. } in self.tensors.iter().filter(|t| t.storage.is_ternary()) {
            decode.ternary += (*rows as u64) * (*cols as u64) / 4;
            if self.config.activations == ActivationScheme::Block64 {
                let blocks = (*rows as u64) * (cols.div_ceil(SCALE_BLOCK) as u64);
                decode.scales += blocks * size_of::<f32>() as u64;
            }
        }
        decode
    }

    /// Returns how the file stores most of its ternary weights; empty if it has none.
    pub fn quantization(&self) -> String {
        let mut weights: BTreeMap<String, usize> = BTreeMap::new();
        for tensor in self.tensors.iter().filter(|tensor| tensor.storage.is_ternary()) {
            *weights.entry(tensor.storage.name()).or_default() += tensor.rows * tensor.cols;
        }
        let most = weights.into_iter().max_by_key(|(_, count)| *count);
        most.map(|(name, _)| name).unwrap_or_default()
    }
}

fn summarize(tensor: &Tensor) -> TensorSummary {
    let (rows, cols) = (tensor.rows, tensor.cols);
    TensorSummary {
        name: tensor.name.clone(),
        kind: tensor.storage.name(),
        shape: if rows == 1 { vec![cols] } else { vec![rows, cols] },
        bytes: tensor.range.len() as u64,
    }
}

/// Returns a byte count in the largest binary unit that leaves at least one.
fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelConfig { architecture, hidden, intermediate, layers, heads, .. } = &self.config;
        let ModelConfig { kv_heads, head_dim, vocab, context, .. } = &self.config;
        let ModelConfig { rope_theta, rms_eps, tied_head, .. } = &self.config;
        let GenerationDefaults { temperature, top_k, top_p, .. } = self.generation;
        let GenerationDefaults { min_p, repetition_penalty, .. } = self.generation;
        let ModelConfig { activation, activations, rope_scaling, .. } = &self.config;
        let Totals { tensors, parameters, ternary_parameters, .. } = self.totals;
        let format = match self.format {
            ModelFormat::FolderPacked => "Hugging Face folder, packed ternary",
            ModelFormat::FolderMaster => "Hugging Face folder, training weights",
            ModelFormat::FolderTernary => "Hugging Face folder, ternary weights as numbers",
            ModelFormat::Gguf => "GGUF",
        };
        let tokenizer = &self.tokenizer;
        writeln!(f, "name        {}", self.name)?;
        writeln!(f, "format      {format}")?;
        writeln!(f, "header      {}", self.header_digest)?;
        writeln!(
            f,
            "shape       {architecture}, {layers} layers, hidden {hidden}, MLP {intermediate}"
        )?;
        writeln!(f, "attention   {heads} heads, {kv_heads} key-value heads of {head_dim}")?;
        writeln!(f, "positions   {context}, rotary base {rope_theta}, norm epsilon {rms_eps:e}")?;
        writeln!(
            f,
            "arithmetic  {activation}, int8 per {activations}, rotary scaling {rope_scaling}"
        )?;
        let head = if *tied_head { "head tied to the embedding" } else { "separate head" };
        writeln!(f, "vocabulary  {vocab}, {head}")?;
        writeln!(
            f,
            "tokenizer   {}, chat template: {}",
            tokenizer.kind,
            yes(tokenizer.chat_template)
        )?;
        let bos = tokenizer.bos.map_or_else(|| "none".to_owned(), |id| id.to_string());
        writeln!(
            f,
            "ids         begin {bos} (added: {}), end {:?}",
            yes(tokenizer.add_bos),
            tokenizer.eos
        )?;
        writeln!(
            f,
            "sampling    temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, \
             repetition penalty {repetition_penalty}"
        )?;
        writeln!(
            f,
            "weights     {parameters} ({ternary_parameters} ternary) in {tensors} tensors, {}",
            bytes(self.totals.bytes)
        )?;
        let DecodeBytes { ternary, scales, head, kv_per_position } = self.decode;
        writeln!(
            f,
            "a token     reads {} of ternary weights, {} of scales, {} of head, {} for each \
             position before it",
            bytes(ternary),
            bytes(scales),
            bytes(head),
            bytes(kv_per_position)
        )?;
        writeln!(f)?;
        let width = |column: fn(&TensorSummary) -> usize| {
            self.tensors.iter().map(column).max().unwrap_or_default()
        };
        let (names, kinds) = (width(|t| t.name.len()), width(|t| t.kind.len()));
        for tensor in &self.tensors {
            let TensorSummary { name, kind, shape, bytes: count } = tensor;
            let shape = shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
            let size = bytes(*count);
            writeln!(f, "{name:names$}  {kind:kinds$}  {shape:>15}  {size:>11}")?;
        }
        Ok(())
    }
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}
