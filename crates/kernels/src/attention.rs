//! What the attention of every variant shares: the order of positions and the working memory.
//!
//! ```text
//! for each query head
//!     total = (max -inf, sum 0, values 0)
//!     for each segment of 512 positions, ascending
//!         part = (max -inf, sum 0, values 0)
//!         for each block of 64 positions, ascending
//!             s[j]  = dot(q, k[j]) * scale             one 16-lane dot each
//!             m     = max(part.max, s[..])
//!             shrink = exp(part.max - m)               0 in the first block
//!             e[j]  = exp(s[j] - m)
//!             part.sum    = fma(part.sum, shrink, lanes_sum(e))
//!             part.values = part.values * shrink, then one fma a position: fma(e[j], v[j], ..)
//!             part.max    = m
//!         m = max(total.max, part.max); a = exp(total.max - m); b = exp(part.max - m)
//!         total.sum    = fma(total.sum, a, part.sum * b)
//!         total.values = fma(total.values, a, part.values * b)
//!         total.max    = m
//!     out = total.values / total.sum
//! ```

/// Positions of one block of keys and values.
pub const BLOCK_POSITIONS: usize = 64;

/// Positions whose blocks are summed before they are merged into the total.
pub const SEGMENT_POSITIONS: usize = 512;

pub(crate) const SEGMENT_BLOCKS: usize = SEGMENT_POSITIONS / BLOCK_POSITIONS;

/// Working memory of [`Kernels::attend`](crate::Kernels::attend), kept from call to call.
#[derive(Clone, Debug, Default)]
pub struct AttentionScratch {
    /// Scores, then weights, of one block: one row of [`BLOCK_POSITIONS`] a head.
    pub(crate) scores: Vec<f32>,
    /// The open segment.
    pub(crate) part: Partial,
    /// Everything before the open segment.
    pub(crate) total: Partial,
}

/// The softmax-weighted sum over some positions, for each head of a group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Partial {
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl AttentionScratch {
    /// Makes room for a group of heads and starts both sums empty.
    pub(crate) fn reset(&mut self, group: usize, head_dim: usize) {
        self.scores.clear();
        self.scores.resize(group * BLOCK_POSITIONS, 0.0);
        self.part.reset(group, head_dim);
        self.total.reset(group, head_dim);
    }
}

impl Partial {
    pub(crate) fn reset(&mut self, group: usize, head_dim: usize) {
        self.max.clear();
        self.max.resize(group, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(group, 0.0);
        self.values.clear();
        self.values.resize(group * head_dim, 0.0);
    }
}

/// The shape of one call, derived from its slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) positions: usize,
    pub(crate) scale: f32,
}

impl Shape {
    /// Returns the number of positions of a block that are not masked.
    pub(crate) fn live(&self, block: usize) -> usize {
        (self.positions - block * BLOCK_POSITIONS).min(BLOCK_POSITIONS)
    }
}
