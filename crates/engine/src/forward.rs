//! The forward pass of a stage over the rows of one step, inside one parallel region.
//!
//! ```text
//! x -> norm -> int8 -> Wq Wk Wv -> (norm) -> rope -> attention -> (norm) -> int8 -> Wo -> + x
//!   -> norm -> int8 -> Wgate Wup -> activation(gate) * up -> (norm) -> int8 -> Wdown -> + x
//! ```
//! Norms in brackets exist in some families only.
//!
//! Threads own ranges of output columns in the products and ranges of (row, kv head) pairs in the
//! attention. Nothing that is summed is ever split between them, so their number changes no bit.

mod head;

use tercet_kernels::{
    AttentionScratch, ColumnsMut, Int8Rows, Kernels, Lead, MatrixMut, TernaryMatrix, TernaryScratch,
};

use crate::{
    kv::{KvCache, PAGE_POSITIONS},
    model_file::{Activation, ActivationScheme, LayerWeights, ModelConfig, StageWeights},
    plan::SequenceId,
    rotary::{Rotary, round},
};

/// A row of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) sequence: SequenceId,
    pub(crate) position: usize,
}

/// Output columns come in whole cache lines of f32, so that threads do not share one.
const COLUMN_UNIT: usize = 16;

/// Buffers of the forward pass, kept from step to step.
#[derive(Debug)]
pub(crate) struct Workspace {
    hidden_size: usize,
    rows: usize,
    hidden: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attention: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    product: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    int8_hidden: Int8Rows,
    int8_attention: Int8Rows,
    int8_ffn: Int8Rows,
    scratch: Vec<Scratch>,
    rotary: Rotary,
    scheme: ActivationScheme,
    widths: Widths,
    pub(crate) logits: Vec<f32>,
}

/// Working memory of one thread.
#[derive(Debug, Default)]
struct Scratch {
    attention: AttentionScratch,
    ternary: TernaryScratch,
}

/// Row lengths of the buffers.
#[derive(Clone, Copy, Debug)]
struct Widths {
    q: usize,
    kv: usize,
    ffn: usize,
    half_head: usize,
}

impl Workspace {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let widths = Widths {
            q: config.heads * config.head_dim,
            kv: config.kv_heads * config.head_dim,
            ffn: config.intermediate,
            half_head: config.head_dim / 2,
        };
        Self {
            hidden_size: config.hidden,
            rows: 0,
            hidden: Vec::new(),
            normed: Vec::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            attention: Vec::new(),
            gate: Vec::new(),
            up: Vec::new(),
            product: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
            scheme: config.activations,
            int8_hidden: int8_rows(config.activations, 0, config.hidden),
            int8_attention: int8_rows(config.activations, 0, widths.q),
            int8_ffn: int8_rows(config.activations, 0, widths.ffn),
            scratch: Vec::new(),
            rotary: Rotary::new(config),
            widths,
            logits: Vec::new(),
        }
    }

    /// Grows the buffers to `rows` rows.
    pub(crate) fn fit(&mut self, rows: usize) {
        if rows <= self.rows {
            return;
        }
        let Widths { q, kv, ffn, half_head } = self.widths;
        let hidden = self.hidden_size;
        for (buffer, width) in [
            (&mut self.hidden, hidden),
            (&mut self.normed, hidden.max(q).max(ffn)),
            (&mut self.q, q),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.attention, q),
            (&mut self.gate, ffn),
            (&mut self.up, ffn),
            (&mut self.product, hidden),
            (&mut self.cos, half_head),
            (&mut self.sin, half_head),
        ] {
            buffer.resize(rows * width, 0.0);
        }
        self.int8_hidden = int8_rows(self.scheme, rows, hidden);
        self.int8_attention = int8_rows(self.scheme, rows, q);
        self.int8_ffn = int8_rows(self.scheme, rows, ffn);
        self.rows = rows;
    }

    /// Returns the hidden state of the first `rows` rows.
    pub(crate) fn hidden_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.hidden[..rows * self.hidden_size]
    }
}

/// One step's pass through the layers of a stage.
pub(crate) struct Forward<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a StageWeights,
    pub(crate) kernels: Kernels,
    pub(crate) lead: &'a Lead<'a>,
    pub(crate) kv: &'a mut KvCache,
    pub(crate) work: &'a mut Workspace,
}

impl Forward<'_> {
    /// Fills the hidden state with the embeddings of `ids`.
    pub(crate) fn embed(&mut self, ids: &[u32]) {
        let embed = self.weights.embed.as_ref().expect("the first stage holds the embedding");
        for (id, out) in ids.iter().zip(self.work.hidden.chunks_exact_mut(self.config.hidden)) {
            self.kernels.dense_row(embed, *id as usize, out);
        }
    }

    /// Takes the hidden state of `rows` through all layers of the stage. Returns, for each row,
    /// whether its activations ceased to be finite.
    pub(crate) fn layers(&mut self, rows: &[Row]) -> Vec<bool> {
        let mut failed = vec![false; rows.len()];
        if rows.is_empty() {
            return failed;
        }
        self.work.scratch.resize_with(self.lead.threads(), Scratch::default);
        self.rotations(rows);
        let weights = self.weights;
        for (index, layer) in weights.layers.iter().enumerate() {
            self.attention(layer, index, rows, &mut failed);
            self.feed_forward(layer, rows.len(), &mut failed);
        }
        failed
    }

    /// Fills the rotation of each row, the same for all layers and heads.
    fn rotations(&mut self, rows: &[Row]) {
        let Workspace { cos, sin, rotary, widths, .. } = &mut *self.work;
        let rotations = cos
            .chunks_exact_mut(widths.half_head)
            .zip(sin.chunks_exact_mut(widths.half_head))
            .zip(rows);
        for ((cos, sin), row) in rotations {
            #[expect(clippy::cast_precision_loss, reason = "contexts are far below 2^24")]
            let position = row.position as f32;
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&rotary.frequencies) {
                let angle = f64::from(position * frequency);
                *cos = round(libm::cos(angle)) * rotary.magnitude;
                *sin = round(libm::sin(angle)) * rotary.magnitude;
            }
        }
    }

    fn attention(&mut self, layer: &LayerWeights, index: usize, rows: &[Row], failed: &mut [bool]) {
        let n = rows.len();
        let config = self.config;
        let Workspace { hidden, normed, q, k, v, int8_hidden, scratch, .. } = &mut *self.work;
        let norm = NormQuantize {
            kernels: self.kernels,
            weight: Some(&layer.attn_norm),
            eps: config.rms_eps,
        };
        norm.run(self.lead, hidden, normed, int8_hidden, failed);
        let kernels = self.kernels;
        let int8 = &*int8_hidden;
        let parts: Vec<_> = split(self.lead, q, n, config.q_width())
            .into_iter()
            .zip(split(self.lead, k, n, config.kv_width()))
            .zip(split(self.lead, v, n, config.kv_width()))
            .zip(scratch)
            .collect();
        self.lead.run(parts, |_, (((q, k), v), Scratch { ternary, .. })| {
            kernels.ternary_matmul(&layer.q, int8, n, q, ternary);
            kernels.ternary_matmul(&layer.k, int8, n, k, ternary);
            kernels.ternary_matmul(&layer.v, int8, n, v, ternary);
        });
        self.rotate_and_store(layer, index, rows);
        self.attend(index, rows);
        self.project(
            Projection {
                norm: layer.attn_sub_norm.as_deref(),
                matrix: &layer.o,
                from: Source::Attention,
            },
            n,
            failed,
        );
    }

    /// Norms queries and keys if the model does, turns them by their positions, and writes keys and
    /// values to the cache.
    fn rotate_and_store(&mut self, weights: &LayerWeights, layer: usize, rows: &[Row]) {
        let Workspace { q, k, v, cos, sin, widths, normed, .. } = &mut *self.work;
        let (kernels, eps) = (self.kernels, self.config.rms_eps);
        let mut norm = |heads: &mut [f32], weight: Option<&[f32]>| {
            let Some(weight) = weight else { return };
            for head in heads.chunks_exact_mut(weight.len()) {
                let normed = &mut normed[..head.len()];
                kernels.rms_norm(head, weight, eps, normed);
                head.copy_from_slice(normed);
            }
        };
        let head_dim = self.config.head_dim;
        for (index, row) in rows.iter().enumerate() {
            let turn = index * widths.half_head..(index + 1) * widths.half_head;
            let (cos, sin) = (&cos[turn.clone()], &sin[turn]);
            let q = &mut q[index * widths.q..(index + 1) * widths.q];
            let k = &mut k[index * widths.kv..(index + 1) * widths.kv];
            norm(q, weights.q_norm.as_deref());
            norm(k, weights.k_norm.as_deref());
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                self.kernels.rope(head, cos, sin);
            }
            let v = &v[index * widths.kv..(index + 1) * widths.kv];
            self.kv.write(row.sequence, layer, row.position, k, v);
        }
    }

    fn attend(&mut self, layer: usize, rows: &[Row]) {
        let config = self.config;
        let bounds = self.attention_bounds(rows);
        let Workspace { q, attention, scratch, widths, .. } = &mut *self.work;
        let group = config.heads / config.kv_heads * config.head_dim;
        let tables: Vec<_> = rows.iter().map(|row| self.kv.table(row.sequence)).collect();
        let mut parts = Vec::with_capacity(bounds.len());
        let mut rest = &mut attention[..rows.len() * widths.q];
        for (bound, scratch) in bounds.windows(2).zip(scratch) {
            let (mine, others) = rest.split_at_mut((bound[1] - bound[0]) * group);
            rest = others;
            parts.push((bound[0], mine, &mut scratch.attention));
        }
        let (kv, kernels) = (&*self.kv, self.kernels);
        let scale = 1.0 / head_dim_root(config.head_dim);
        let q = &q[..rows.len() * widths.q];
        self.lead.run(parts, |_, (first, out, scratch)| {
            for (unit, out) in (first..).zip(out.chunks_exact_mut(group)) {
                let (row, kv_head) = (unit / config.kv_heads, unit % config.kv_heads);
                kernels.attend(
                    &q[unit * group..(unit + 1) * group],
                    |block| kv.block(tables[row], block, layer, kv_head),
                    rows[row].position + 1,
                    scale,
                    scratch,
                    out,
                );
            }
        });
    }

    /// Cuts the (row, kv head) pairs into one range for each thread, of about equal cost: a row
    /// costs as much as it has blocks before it.
    fn attention_bounds(&self, rows: &[Row]) -> Vec<usize> {
        let threads = self.lead.threads();
        let kv_heads = self.config.kv_heads;
        let cost = |row: &Row| row.position / PAGE_POSITIONS + 1;
        let total: usize = rows.iter().map(|row| cost(row) * kv_heads).sum();
        let mut bounds = vec![0];
        let mut spent = 0;
        for (index, row) in rows.iter().enumerate() {
            for kv_head in 0..kv_heads {
                if spent * threads >= total * bounds.len() && bounds.len() < threads {
                    bounds.push(index * kv_heads + kv_head);
                }
                spent += cost(row);
            }
        }
        bounds.push(rows.len() * kv_heads);
        bounds
    }

    fn feed_forward(&mut self, layer: &LayerWeights, n: usize, failed: &mut [bool]) {
        let config = self.config;
        let Workspace { hidden, normed, gate, up, int8_hidden, scratch, .. } = &mut *self.work;
        let norm = NormQuantize {
            kernels: self.kernels,
            weight: Some(&layer.ffn_norm),
            eps: config.rms_eps,
        };
        norm.run(self.lead, hidden, normed, int8_hidden, failed);
        let (kernels, activation) = (self.kernels, config.activation);
        let int8 = &*int8_hidden;
        let parts: Vec<_> = split(self.lead, gate, n, config.intermediate)
            .into_iter()
            .zip(split(self.lead, up, n, config.intermediate))
            .zip(scratch)
            .collect();
        self.lead.run(parts, |_, ((mut gate, mut up), Scratch { ternary, .. })| {
            kernels.ternary_matmul(&layer.gate, int8, n, gate.reborrow(), ternary);
            kernels.ternary_matmul(&layer.up, int8, n, up.reborrow(), ternary);
            for row in 0..n {
                let (gate, up) = (gate.row_mut(row), up.row_mut(row));
                match activation {
                    Activation::Relu2 => kernels.relu2_mul(gate, up),
                    Activation::Silu => kernels.silu_mul(gate, up),
                }
            }
        });
        self.project(
            Projection {
                norm: layer.ffn_sub_norm.as_deref(),
                matrix: &layer.down,
                from: Source::FeedForward,
            },
            n,
            failed,
        );
    }

    /// Norm, product, and addition to the hidden state.
    fn project(&mut self, projection: Projection<'_>, n: usize, failed: &mut [bool]) {
        let Workspace {
            hidden,
            normed,
            attention,
            gate,
            product,
            int8_attention,
            int8_ffn,
            scratch,
            ..
        } = &mut *self.work;
        let (input, int8) = match projection.from {
            Source::Attention => (attention, int8_attention),
            Source::FeedForward => (gate, int8_ffn),
        };
        let norm = NormQuantize {
            kernels: self.kernels,
            weight: projection.norm,
            eps: self.config.rms_eps,
        };
        norm.run(self.lead, input, normed, int8, failed);
        let kernels = self.kernels;
        let parts: Vec<_> = split(self.lead, product, n, self.config.hidden)
            .into_iter()
            .zip(split(self.lead, hidden, n, self.config.hidden))
            .zip(scratch)
            .collect();
        self.lead.run(parts, |_, ((mut product, mut hidden), Scratch { ternary, .. })| {
            kernels.ternary_matmul(projection.matrix, int8, n, product.reborrow(), ternary);
            for row in 0..n {
                kernels.add(hidden.row_mut(row), product.row_mut(row));
            }
        });
    }
}

/// A product that adds to the hidden state.
struct Projection<'a> {
    /// Absent where the input is quantised as it is.
    norm: Option<&'a [f32]>,
    matrix: &'a TernaryMatrix,
    from: Source,
}

#[derive(Clone, Copy)]
enum Source {
    Attention,
    FeedForward,
}

/// RMS norm, if there is one, and int8 quantisation of rows.
struct NormQuantize<'a> {
    kernels: Kernels,
    weight: Option<&'a [f32]>,
    eps: f32,
}

impl NormQuantize<'_> {
    /// Quantises the first `failed.len()` rows of `input`, by threads if there are several rows
    /// each. A row that is not finite becomes zeros and is marked.
    fn run(
        &self,
        lead: &Lead<'_>,
        input: &[f32],
        normed: &mut [f32],
        out: &mut Int8Rows,
        failed: &mut [bool],
    ) {
        let n = failed.len();
        let width = out.cols();
        let threads = if n >= 2 * lead.threads() { lead.threads() } else { 1 };
        let per_thread = n.div_ceil(threads);
        let parts: Vec<_> = input[..n * width]
            .chunks(per_thread * width)
            .zip(normed.chunks_mut(per_thread * width))
            .zip(out.chunks_mut(per_thread))
            .zip(failed.chunks_mut(per_thread))
            .collect();
        lead.run(parts, |_, (((input, normed), out), failed)| {
            let rows = input.chunks_exact(width).zip(normed.chunks_exact_mut(width));
            for (((input, normed), row), failed) in rows.zip(out.into_rows()).zip(failed) {
                let input = match self.weight {
                    Some(weight) => {
                        self.kernels.rms_norm(input, weight, self.eps, normed);
                        normed
                    }
                    None => input,
                };
                *failed |= self.kernels.quantize(input, row).is_err();
            }
        });
    }
}

fn int8_rows(scheme: ActivationScheme, rows: usize, cols: usize) -> Int8Rows {
    match scheme {
        ActivationScheme::Token => Int8Rows::new(rows, cols),
        ActivationScheme::Block64 => Int8Rows::with_blocks(rows, cols),
    }
}

/// Splits n x width outputs by columns, one part for each thread.
pub(crate) fn split<'a>(
    lead: &Lead<'_>,
    buffer: &'a mut [f32],
    n: usize,
    width: usize,
) -> Vec<ColumnsMut<'a>> {
    let units = width.div_ceil(COLUMN_UNIT);
    let threads = lead.threads();
    let cuts: Vec<usize> =
        (1..threads).map(|thread| (units * thread / threads * COLUMN_UNIT).min(width)).collect();
    MatrixMut::new(&mut buffer[..n * width], n, width).split_columns(&cuts)
}

fn head_dim_root(head_dim: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "head sizes are small")]
    let head_dim = head_dim as f32;
    head_dim.sqrt()
}

#[cfg(test)]
mod tests;
