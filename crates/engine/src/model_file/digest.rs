//! What makes two models the same: digests that do not depend on the file layout.
//!
//! ```text
//! identity = blake3(header digest, part digests: embed, layer.0, layer.1, .., head)
//! part     = blake3(tensor digests, in the order of the forward pass)
//! ternary  = blake3(rows, columns, scale or scales of blocks, weights packed as in memory)
//! dense    = blake3(rows, columns, digests of 4096 rows of f32 values each)
//! ```

use std::sync::Arc;

use blake3::Hasher;
use rayon::prelude::*;
use tercet_kernels::{DenseMatrix, Kernels, NUMERICS, TernaryMatrix};
use tercet_text::{TokenType, TokenizerSource, Vocabulary};

use super::error::ModelError;
use super::tokenizer::derive;
use super::weights::{HeadWeights, LayerWeights, StageWeights};
use super::{GenerationDefaults, ModelConfig, ModelFile, RopeScaling};

/// Rows of a dense matrix hashed together, so that threads can share one matrix.
const DENSE_CHUNK: usize = 4096;

/// Layers, or chunks of a dense matrix, hashed at once by all threads.
const BATCH: usize = 4;
/// Bytes of a page of memory, or fewer.
const PAGE: usize = 4096;

/// A digest.
type Digest = [u8; 32];

/// The digest of each part: `embed`, `layer.N`, `head`.
pub(crate) type PartDigests = Vec<(String, Digest)>;

/// Hashes fields with their lengths, so that no two sequences of fields look alike.
struct Fields(Hasher);

impl Fields {
    /// Starts a digest of one kind of thing.
    fn new(kind: &str) -> Self {
        let mut fields = Self(Hasher::new());
        fields.bytes(kind.as_bytes());
        fields
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn size(&mut self, size: usize) {
        self.number(size as u64);
    }

    fn float(&mut self, value: f32) {
        self.number(value.to_bits().into());
    }

    fn texts(&mut self, texts: &[String]) {
        self.size(texts.len());
        for text in texts {
            self.bytes(text.as_bytes());
        }
    }

    fn finish(&self) -> Digest {
        self.0.finalize().into()
    }
}

impl ModelFile {
    /// Returns the digest of everything but the weights that decides an answer: the shape, the
    /// tokenizer, special ids, chat template, sampling settings, and the version of the
    /// arithmetic.
    ///
    /// It is equal for every file layout of the same model: a `tokenizer.json` that GGUF keys can
    /// express counts as those keys. The model's name is a label and does not enter.
    pub fn header_digest(&self) -> [u8; 32] {
        let mut fields = Fields::new("tercet model header 1");
        fields.number(NUMERICS.into());
        hash_config(&mut fields, &self.config);
        hash_tokenizer(&mut fields, &self.tokenizer);
        fields.number(self.special.bos.map_or(0, |id| u64::from(id) + 1));
        fields.number(self.special.add_bos.into());
        fields.size(self.special.eos.len());
        for id in &self.special.eos {
            fields.number((*id).into());
        }
        fields.number(self.chat_template.is_some().into());
        fields.bytes(self.chat_template.as_deref().unwrap_or_default().as_bytes());
        let GenerationDefaults { temperature, top_k, top_p, min_p, repetition_penalty } =
            self.generation;
        fields.number(top_k.into());
        for value in [temperature, top_p, min_p, repetition_penalty] {
            fields.float(value);
        }
        fields.finish()
    }
}

fn hash_config(fields: &mut Fields, config: &ModelConfig) {
    // Destructured so that a new field cannot be forgotten.
    let ModelConfig {
        architecture,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context,
        activation,
        activations,
        rope_theta,
        rope_scaling,
        rms_eps,
        tied_head,
    } = config;
    fields.bytes(architecture.to_string().as_bytes());
    for size in [hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, context] {
        fields.size(*size);
    }
    fields.bytes(activation.to_string().as_bytes());
    fields.bytes(activations.to_string().as_bytes());
    fields.float(*rope_theta);
    hash_rope_scaling(fields, rope_scaling);
    fields.float(*rms_eps);
    fields.number((*tied_head).into());
}

fn hash_rope_scaling(fields: &mut Fields, scaling: &RopeScaling) {
    let mut hash = |kind: &str, values: &[f32], context: usize| {
        fields.bytes(kind.as_bytes());
        fields.size(values.len());
        for value in values {
            fields.float(*value);
        }
        fields.size(context);
    };
    match scaling {
        RopeScaling::None => hash("none", &[], 0),
        RopeScaling::Linear { factor } => hash("linear", &[*factor], 0),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            hash("llama3", &[*factor, *low_freq_factor, *high_freq_factor], *original_context);
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_context } => {
            let values = [*factor, *beta_fast, *beta_slow, *attention_factor];
            hash("yarn", &values, *original_context);
        }
        RopeScaling::Factors(factors) => hash("factors", factors, 0),
    }
}

fn hash_tokenizer(fields: &mut Fields, tokenizer: &TokenizerSource) {
    let derived;
    let vocabulary = match tokenizer {
        TokenizerSource::Vocabulary(vocabulary) => vocabulary,
        TokenizerSource::Json(json) => match derive::vocabulary(json) {
            Some(vocabulary) => {
                derived = vocabulary;
                &derived
            }
            None => {
                fields.bytes(b"json");
                fields.bytes(json.as_bytes());
                return;
            }
        },
    };
    fields.bytes(b"vocabulary");
    let Vocabulary { model, pre, tokens, token_types, merges, scores, add_space_prefix } =
        vocabulary;
    fields.bytes(model.as_bytes());
    // Names of one and the same rule.
    let pre = match pre.as_str() {
        "llama3" | "llama-v3" | "falcon3" | "falcon-h1" => "llama-bpe",
        "" => "default",
        other => other,
    };
    fields.bytes(pre.as_bytes());
    // Some converters fill the rows without a token, others end the list before them.
    let kind = |id: usize| token_types.get(id).copied().unwrap_or_default();
    let used = (0..tokens.len()).rfind(|id| kind(*id) != TokenType::Unused).map_or(0, |id| id + 1);
    fields.size(used);
    for (id, token) in tokens.iter().enumerate().take(used) {
        fields.number(u64::from(kind(id).to_gguf().unsigned_abs()));
        fields.bytes(token.as_bytes());
    }
    fields.texts(merges);
    fields.size(scores.len());
    for score in scores {
        fields.float(*score);
    }
    // Absent and true are one rule, and every digest before the key was known is of that.
    if *add_space_prefix == Some(false) {
        fields.bytes(b"no space prefix");
    }
}

/// Does a piece of hashing that reads so many bytes, now, and says whether the rest is wanted.
pub(crate) type HashPiece<'a> =
    &'a mut dyn FnMut(u64, &mut (dyn FnMut() + Send)) -> Result<(), ModelError>;

impl StageWeights {
    /// Returns the digests of the parts held: `embed`, `layer.N`, `head`.
    ///
    /// They are equal for every file layout of the same values. The work is spread over the
    /// current rayon pool and reads every weight once.
    pub fn part_digests(&self) -> Vec<(String, [u8; 32])> {
        self.part_digests_by(&mut |_, piece| {
            piece();
            Ok(())
        })
        .expect("the pieces above never fail")
    }

    /// As [`Self::part_digests`], in pieces that `run` does.
    pub(crate) fn part_digests_by(
        &self,
        run: HashPiece<'_>,
    ) -> Result<Vec<(String, [u8; 32])>, ModelError> {
        let embed_matrix = self.embed.as_deref().map(|embed| dense(embed, run)).transpose()?;
        let mut parts = Vec::with_capacity(self.layers.len() + 2);
        parts.extend(embed_matrix.map(|digest| ("embed".to_owned(), digest)));
        let mut layers: Vec<Digest> = Vec::with_capacity(self.layers.len());
        for batch in self.layers.chunks(BATCH) {
            let bytes = batch.iter().map(layer_bytes).sum();
            run(bytes, &mut || layers.par_extend(batch.par_iter().map(layer)))?;
        }
        parts.extend(self.range.clone().map(|n| format!("layer.{n}")).zip(layers));
        if let Some(HeadWeights { norm, matrix }) = &self.head {
            let matrix = match embed_matrix.filter(|_| self.head_is_embed()) {
                Some(digest) => digest,
                None => dense(matrix, run)?,
            };
            parts.push(("head".to_owned(), part([vector(norm), matrix])));
        }
        Ok(parts)
    }

    /// Compares what the file says of its parts with what they are, in pieces that `run` does.
    pub(crate) fn verify_by(&self, run: HashPiece<'_>) -> Result<(), ModelError> {
        let Some(claims) = &self.claims else { return Ok(()) };
        claims.check(&self.part_digests_by(run)?)
    }

    /// Returns how many bytes [`Self::part_digests_by`] reads.
    pub(crate) fn hashed_bytes(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(layer_bytes).sum();
        let head = self.head.as_ref().filter(|_| !self.head_is_embed()).map(|head| &head.matrix);
        let dense = self.embed.iter().chain(head);
        layers + dense.map(|matrix| matrix.bytes().len() as u64).sum::<u64>()
    }

    fn head_is_embed(&self) -> bool {
        let (Some(embed), Some(head)) = (&self.embed, &self.head) else { return false };
        Arc::ptr_eq(embed, &head.matrix)
    }
}

fn layer_bytes(layer: &LayerWeights) -> u64 {
    let LayerWeights { q, k, v, o, gate, up, down, .. } = layer;
    [q, k, v, o, gate, up, down].map(|matrix| matrix.packed().len() as u64).iter().sum()
}

/// Returns the identity of a model from its header digest and the digests of all its parts, in
/// hexadecimal.
///
/// The order of `parts` does not matter, and parts named twice with equal digests count once, so
/// the lists of a pipeline's stages may simply be joined.
pub fn identity(header: &[u8; 32], parts: &[(String, [u8; 32])]) -> String {
    let mut ordered: Vec<_> =
        parts.iter().map(|(name, digest)| (part_order(name), name, digest)).collect();
    ordered.sort_unstable();
    ordered.dedup();
    let mut fields = Fields::new("tercet model identity 1");
    fields.bytes(header);
    for (_, name, digest) in ordered {
        fields.bytes(name.as_bytes());
        fields.bytes(digest);
    }
    blake3::Hash::from_bytes(fields.finish()).to_hex().to_string()
}

/// Returns the place of a part in the forward pass.
fn part_order(name: &str) -> (u8, u64) {
    match name.strip_prefix("layer.").map(str::parse) {
        Some(Ok(layer)) => (1, layer),
        _ if name == "embed" => (0, 0),
        _ => (2, 0),
    }
}

fn part(tensors: impl IntoIterator<Item = Digest>) -> Digest {
    let mut fields = Fields::new("part");
    for digest in tensors {
        fields.bytes(&digest);
    }
    fields.finish()
}

fn layer(layer: &LayerWeights) -> Digest {
    let LayerWeights {
        attn_norm,
        q,
        k,
        v,
        q_norm,
        k_norm,
        attn_sub_norm,
        o,
        ffn_norm,
        gate,
        up,
        ffn_sub_norm,
        down,
    } = layer;
    // A part its family lacks takes no place, so that new parts leave old digests as they are; the
    // architecture is in the header.
    let optional = |values: &Option<Vec<f32>>| values.as_deref().map(vector);
    let tensors = [
        Some(vector(attn_norm)),
        Some(ternary(q)),
        Some(ternary(k)),
        Some(ternary(v)),
        optional(q_norm),
        optional(k_norm),
        optional(attn_sub_norm),
        Some(ternary(o)),
        Some(vector(ffn_norm)),
        Some(ternary(gate)),
        Some(ternary(up)),
        optional(ffn_sub_norm),
        Some(ternary(down)),
    ];
    part(tensors.into_iter().flatten())
}

fn vector(values: &[f32]) -> Digest {
    let mut fields = Fields::new("vector");
    fields.size(values.len());
    for value in values {
        fields.0.update(&value.to_le_bytes());
    }
    fields.finish()
}

fn ternary(matrix: &TernaryMatrix) -> Digest {
    let mut fields = Fields::new("ternary");
    fields.size(matrix.rows());
    fields.size(matrix.cols());
    match (matrix.scale(), matrix.block_scales()) {
        (None, Some(scales)) => {
            fields.bytes(b"blocks");
            for scale in scales {
                fields.float(*scale);
            }
        }
        (scale, _) => fields.float(scale.unwrap_or_default()),
    }
    fields.bytes(matrix.packed());
    fields.finish()
}

fn dense(matrix: &DenseMatrix, run: HashPiece<'_>) -> Result<Digest, ModelError> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let kernels = Kernels::detect();
    let chunk = |start: &usize| -> Digest {
        let mut hasher = Hasher::new();
        let mut values = vec![0.0_f32; cols];
        let mut bytes = vec![0_u8; cols * 4];
        for row in *start..rows.min(start + DENSE_CHUNK) {
            kernels.dense_row(matrix, row, &mut values);
            for (bytes, value) in bytes.chunks_exact_mut(4).zip(&values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            hasher.update(&bytes);
        }
        hasher.finalize().into()
    };
    let starts: Vec<usize> = (0..rows).step_by(DENSE_CHUNK).collect();
    let mut digests: Vec<Digest> = Vec::with_capacity(starts.len());
    for batch in starts.chunks(BATCH) {
        let row_bytes = matrix.bytes().len() / rows;
        let end = rows.min(batch[0] + batch.len() * DENSE_CHUNK);
        let held = &matrix.bytes()[batch[0] * row_bytes..end * row_bytes];
        // Waits for the disk here, where nobody else waits for a turn.
        std::hint::black_box(held.iter().step_by(PAGE).fold(0, |all, byte| all ^ byte));
        run(held.len() as u64, &mut || digests.par_extend(batch.par_iter().map(chunk)))?;
    }
    let mut fields = Fields::new("dense");
    fields.size(rows);
    fields.size(cols);
    for digest in digests {
        fields.bytes(&digest);
    }
    Ok(fields.finish())
}
