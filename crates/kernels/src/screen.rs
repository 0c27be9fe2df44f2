//! A compressed copy of a dense matrix whose products come with proven bounds.
//!
//! The head of a model has a row for every token, and choosing a token needs the exact products of
//! very few of them. A [`Screen`] keeps 6 bits a weight. Its products are estimates, and each comes
//! with a bound on how far the exact one, the sum that [`dense_matmul`](crate::Kernels::dense_matmul)
//! makes in f32, can be from it. Rows that cannot matter are known by that without being read.
//!
//! # The bound
//!
//! Let `w` be a row as f32 numbers, `v = s * c` what the screen keeps of it (codes `c` of -32 to 31,
//! one scale `s`), and `e = w - v`. Let `x` be the activations, `y` what the query keeps of them, and
//! `d = x - y`. The exact product is `fl(w . x)`, in f32 with rounding; the estimate is `fl(v . y)`,
//! whose sum is exact in integers and which is rounded three times, by the unit `u = 2^-24` each. Then
//!
//! ```text
//! fl(w . x) - fl(v . y) = [fl(w . x) - w . x] + e . x + v . d + [v . y - fl(v . y)]
//!
//! |fl(w . x) - w . x| <= g |w| |x|     g = m u / (1 - m u), m roundings on the way of each product
//! |e . x|             <= |e| |x|       Cauchy-Schwarz
//! |v . d|             <= |v| |d|       Cauchy-Schwarz
//! |v . y - fl(v . y)| <= 4 u |v| |y|
//! ```
//!
//! where `|a|` of a vector is its Euclidean norm. The first line is the standard bound of a sum of
//! products (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: `g` is his
//! gamma_m, and the order of the sum does not matter to it), with Cauchy-Schwarz once more:
//! `sum |w_i x_i| <= |w| |x|`. In the lanes of this crate `m = ceil(cols / 16) + 4`. So with
//! `n >= max(|v|, |w|)`:
//!
//! ```text
//! |exact - estimate| <= |e| X + n Y     X = |x|, Y = |d| + (g + 4 u) |x|   and a little more
//! ```
//!
//! The little more pays for the roundings of this formula itself. Norms are computed in f64 and
//! rounded up. Numbers so small or large that a product might underflow or overflow are kept out:
//! rows by [`Screen::is_sound`], activations by [`ScreenQuery::push`].

use std::ops::Range;

use crate::{AlignedBytes, DenseMatrix, LANES};

/// Weights that are stored together.
pub(crate) const BLOCK: usize = 128;

/// Bytes of a block: 64 with the four low bits of each code, 32 with the two high ones.
pub(crate) const BLOCK_BYTES: usize = 96;

/// Code of weight 0.
pub(crate) const ZERO: i32 = 32;

/// Most columns: sums of 2^13 a column fit 32 bits.
const MAX_COLS: usize = 1 << 17;

/// Scales and activations beyond 2^-40 to 2^40 are kept out: products of two and a quotient of 2^14
/// are normal numbers.
const SMALLEST: f32 = 9.094_947e-13;
const LARGEST: f32 = 1.099_511_6e12;

/// More than all that underflow can do to a product of [`MAX_COLS`] columns: 2^-149 each.
const UNDERFLOW: f32 = 1e-36;

/// Steps of the largest activation: [`ScreenQuery`] keeps 14 bits, next to no error of its own.
const STEPS_OF_X: f32 = 8127.0;

/// Half of the distance between 1 and the next number.
const UNIT: f64 = 1.0 / 16_777_216.0;

/// What the screen knows of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct RowBound {
    /// Multiplies the codes.
    pub(crate) scale: f32,
    /// At least the norm of what the codes miss.
    pub(crate) error: f32,
    /// At least the norm of the row, and of what the codes say.
    pub(crate) norm: f32,
}

/// A compressed copy of a [`DenseMatrix`] whose products come with proven bounds on how far the
/// exact ones can be.
///
/// ```text
/// one block: 128 codes of one row in 96 bytes; a row: columns padded to whole blocks
/// byte  0..32: codes   0.. 32 in the low nibble (four low bits),  32.. 64 in the high one
/// byte 32..64: codes  64.. 96                                     96..128
/// byte 64..96: two high bits of codes 0..32 in bits 1-0, of 32..64 in bits 3-2, ...
/// ```
pub struct Screen {
    rows: usize,
    cols: usize,
    bytes: AlignedBytes,
    scales: Vec<f32>,
    errors: Vec<f32>,
    norms: Vec<f32>,
}

/// Rows of a [`Screen`] that are being filled.
#[derive(Debug)]
pub struct ScreenPart<'a> {
    pub(crate) first: usize,
    row_bytes: usize,
    bytes: &'a mut [u8],
    scales: &'a mut [f32],
    errors: &'a mut [f32],
    norms: &'a mut [f32],
}

impl Screen {
    /// Returns a screen for `w`, whose [`parts`](Self::parts_mut) are to be filled. `None` if `w`
    /// has more columns than a screen can sum.
    pub fn new(w: &DenseMatrix) -> Option<Self> {
        let (rows, cols) = (w.rows(), w.cols());
        let bytes = rows.checked_mul(cols.div_ceil(BLOCK) * BLOCK_BYTES)?;
        (cols <= MAX_COLS).then(|| Self {
            rows,
            cols,
            bytes: AlignedBytes::zeroed(bytes),
            scales: vec![0.0; rows],
            errors: vec![0.0; rows],
            norms: vec![0.0; rows],
        })
    }

    /// Returns `n` parts of about equal size, to be filled with
    /// [`fill_screen`](crate::Kernels::fill_screen) by as many threads.
    pub fn parts_mut(&mut self, n: usize) -> Vec<ScreenPart<'_>> {
        let row_bytes = self.row_bytes();
        let rows = self.rows.div_ceil(n.max(1)).max(1);
        self.bytes
            .chunks_mut(rows * row_bytes)
            .zip(self.scales.chunks_mut(rows))
            .zip(self.errors.chunks_mut(rows).zip(self.norms.chunks_mut(rows)))
            .enumerate()
            .map(|(index, ((bytes, scales), (errors, norms)))| ScreenPart {
                first: index * rows,
                row_bytes,
                bytes,
                scales,
                errors,
                norms,
            })
            .collect()
    }

    /// Returns whether every row has a bound, once all parts are filled. A matrix with numbers that
    /// are not finite, or whose products might overflow, has not.
    pub fn is_sound(&self) -> bool {
        self.norms.iter().chain(&self.errors).all(|norm| *norm <= LARGEST)
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the bytes that a pass over all rows reads.
    pub fn size(&self) -> usize {
        self.bytes.len() + 3 * size_of::<f32>() * self.rows
    }

    fn row_bytes(&self) -> usize {
        self.cols.div_ceil(BLOCK) * BLOCK_BYTES
    }

    /// Returns the blocks of a row.
    pub(crate) fn blocks(&self, row: usize) -> &[[u8; BLOCK_BYTES]] {
        let bytes = self.row_bytes();
        self.bytes[row * bytes..][..bytes].as_chunks().0
    }

    pub(crate) fn scale(&self, row: usize) -> f32 {
        self.scales[row]
    }

    /// Returns the bound of a row's product with token `token` of `query`.
    ///
    /// # Panics
    /// If there is no such row or token.
    pub fn bound(&self, query: &ScreenQuery, token: usize, row: usize) -> f32 {
        let facts = &query.tokens[token];
        self.errors[row] * facts.norm + self.norms[row] * facts.error + UNDERFLOW
    }

    /// Calls `take` with every row of `rows` whose exact product with token `token` of `query` may
    /// reach `least`; `estimates` has the estimates of these rows.
    ///
    /// # Panics
    /// If there are no such rows or token, or not as many estimates.
    pub fn reaching(
        &self,
        query: &ScreenQuery,
        token: usize,
        rows: Range<usize>,
        estimates: &[f32],
        least: f32,
        mut take: impl FnMut(usize),
    ) {
        assert_eq!(rows.len(), estimates.len(), "rows and their estimates");
        let facts = &query.tokens[token];
        let (errors, norms) = (&self.errors[rows.clone()], &self.norms[rows.clone()]);
        let reaches = |estimate: f32, error: f32, norm: f32| {
            estimate + (error * facts.norm + norm * facts.error + UNDERFLOW) >= least
        };
        let chunks = estimates.chunks(LANES).zip(errors.chunks(LANES)).zip(norms.chunks(LANES));
        for (index, ((estimates, errors), norms)) in chunks.enumerate() {
            let each = || estimates.iter().zip(errors).zip(norms);
            // Without an early end, so that it is done in vectors: few chunks have any.
            if each().fold(false, |any, ((e, r), n)| any | reaches(*e, *r, *n)) {
                for (offset, ((estimate, error), norm)) in each().enumerate() {
                    if reaches(*estimate, *error, *norm) {
                        take(rows.start + index * LANES + offset);
                    }
                }
            }
        }
    }
}

impl ScreenPart<'_> {
    /// Fills the rows from their numbers, which `row` puts into a buffer.
    #[inline(always)]
    pub(crate) fn fill(self, cols: usize, mut row: impl FnMut(usize, &mut [f32])) {
        let mut weights = vec![0.0; cols.div_ceil(BLOCK) * BLOCK];
        let rows = self.bytes.chunks_exact_mut(self.row_bytes);
        let facts = self.scales.iter_mut().zip(self.errors).zip(self.norms);
        for (index, (bytes, ((scale, error), norm))) in (self.first..).zip(rows.zip(facts)) {
            row(index, &mut weights[..cols]);
            let bound = encode(&weights, bytes.as_chunks_mut().0);
            (*scale, *error, *norm) = (bound.scale, bound.error, bound.norm);
        }
    }
}

/// Steps that are tried for a row, in root mean squares of its numbers: around the best of a
/// uniform quantiser of 64 levels for normally distributed ones, 0.104 (Max, "Quantizing for minimum
/// distortion", 1960), for lighter tails and for heavier ones.
const STEPS: [f32; 4] = [0.085, 0.104, 0.125, 0.155];

/// Encodes a row, padded with zeros to whole blocks.
#[inline(always)]
fn encode(weights: &[f32], blocks: &mut [[u8; BLOCK_BYTES]]) -> RowBound {
    let (mut squares, mut largest) = ([0.0_f64; 8], [0.0_f32; 8]);
    for eight in weights.as_chunks::<8>().0 {
        for lane in 0..8 {
            squares[lane] += f64::from(eight[lane]) * f64::from(eight[lane]);
            largest[lane] = largest[lane].max(eight[lane].abs());
        }
    }
    let norm = squares.iter().sum::<f64>().sqrt();
    let largest = largest.into_iter().fold(0.0, f32::max);
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a guess")]
    let mean = (norm / (weights.len() as f64).sqrt()) as f32;
    let mut best = (f32::INFINITY, 0.0);
    for step in STEPS.map(|step| step * mean).into_iter().chain([largest / 31.0]) {
        // Also skips what is not a number.
        if (SMALLEST..=LARGEST).contains(&step) {
            let missed = missed(weights, step);
            if missed < best.0 {
                best = (missed, step);
            }
        }
    }
    let scale = best.1;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (mut missed, mut kept) = ([0.0_f64; 8], [0.0_f64; 8]);
    for (weights, block) in weights.as_chunks::<BLOCK>().0.iter().zip(blocks) {
        let mut codes = [0_u8; BLOCK];
        for (eight, codes) in weights.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<8>().0) {
            for lane in 0..8 {
                let code = code(eight[lane], inverse);
                let error = f64::from(code.mul_add(-scale, eight[lane]));
                missed[lane] += error * error;
                kept[lane] += f64::from(code) * f64::from(code);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "codes are whole numbers of 0 to 63"
                )]
                let stored = (code + 32.0) as i32 as u8;
                codes[lane] = stored;
            }
        }
        pack(&codes, block);
    }
    let kept = kept.iter().sum::<f64>().sqrt() * f64::from(scale);
    // Each error was rounded once, to 24 bits; the rest is f64, where 2^17 additions lose nothing
    // that counts here.
    let error = missed.iter().sum::<f64>().sqrt() * (1.0 + 4.0 * UNIT) + f64::from(UNDERFLOW);
    RowBound { scale, error: above(error), norm: above(norm.max(kept) * (1.0 + 4.0 * UNIT)) }
}

/// Returns about what a step misses of a row.
#[inline(always)]
fn missed(weights: &[f32], step: f32) -> f32 {
    let inverse = 1.0 / step;
    let mut missed = [0.0_f32; LANES];
    for weights in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let error = code(weights[lane], inverse).mul_add(-step, weights[lane]) * inverse;
            missed[lane] += error * error;
        }
    }
    missed.iter().sum::<f32>() * step * step
}

/// Returns the code of a weight, from -32 to 31.
#[inline(always)]
fn code(weight: f32, inverse: f32) -> f32 {
    (weight * inverse).round_ties_even().clamp(-32.0, 31.0)
}

#[inline(always)]
fn pack(codes: &[u8; BLOCK], block: &mut [u8; BLOCK_BYTES]) {
    let (a, b, c, d) = (&codes[..32], &codes[32..64], &codes[64..96], &codes[96..]);
    for i in 0..32 {
        block[i] = a[i] & 15 | b[i] << 4;
        block[32 + i] = c[i] & 15 | d[i] << 4;
        block[64 + i] = a[i] >> 4 | b[i] >> 4 << 2 | c[i] >> 4 << 4 | d[i] >> 4 << 6;
    }
}

/// Returns the codes of a block.
#[inline(always)]
pub(crate) fn unpack(block: &[u8; BLOCK_BYTES]) -> [u8; BLOCK] {
    let mut codes = [0; BLOCK];
    for i in 0..32 {
        let (low, high, top) = (block[i], block[32 + i], block[64 + i]);
        codes[i] = low & 15 | (top & 3) << 4;
        codes[32 + i] = low >> 4 | (top >> 2 & 3) << 4;
        codes[64 + i] = high & 15 | (top >> 4 & 3) << 4;
        codes[96 + i] = high >> 4 | (top >> 6) << 4;
    }
    codes
}

/// Activations in the form that a [`Screen`] is multiplied with.
#[derive(Debug)]
pub struct ScreenQuery {
    cols: usize,
    padded: usize,
    /// `y = scale * (128 * high + low)`.
    high: Vec<u8>,
    low: Vec<u8>,
    tokens: Vec<Token>,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    scale: f32,
    /// Sum of the integers times [`ZERO`].
    offset: i64,
    /// `X` and `Y` of the bound.
    norm: f32,
    error: f32,
}

/// Integers of one token, as a kernel reads them.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    pub(crate) high: &'a [[u8; BLOCK]],
    pub(crate) low: &'a [[u8; BLOCK]],
}

impl ScreenQuery {
    /// Returns a query of no token, for matrices of `cols` columns.
    pub fn new(cols: usize) -> Self {
        Self {
            cols,
            padded: cols.div_ceil(BLOCK) * BLOCK,
            high: Vec::new(),
            low: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Returns the number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Adds a token. Returns false, and adds nothing, if its activations are not finite, all 0, or
    /// of a size for which the bound does not hold.
    ///
    /// # Panics
    /// If there are not as many activations as columns.
    pub fn push(&mut self, x: &[f32]) -> bool {
        assert_eq!(x.len(), self.cols, "activations and columns of the screen");
        let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        if x.iter().any(|x| !x.is_finite()) || !(SMALLEST..=LARGEST).contains(&largest) {
            return false;
        }
        let (scale, inverse) = (largest / STEPS_OF_X, STEPS_OF_X / largest);
        let (mut norm, mut kept, mut missed, mut sum) = (0.0, 0.0, 0.0, 0_i64);
        for x in x {
            let value = (x * inverse).round_ties_even().clamp(-STEPS_OF_X, STEPS_OF_X);
            let (exact, y) = (f64::from(*x), f64::from(value) * f64::from(scale));
            norm += exact * exact;
            kept += y * y;
            missed += (exact - y) * (exact - y);
            #[expect(clippy::cast_possible_truncation, reason = "a whole number below 2^14")]
            let value = value as i32;
            sum += i64::from(value);
            // From -63 to 63, and from -64 to 63.
            let high = (value + 64) >> 7;
            self.high.push(low_byte(high));
            self.low.push(low_byte(value - 128 * high));
        }
        let padded = self.padded * (self.tokens.len() + 1);
        self.high.resize(padded, 0);
        self.low.resize(padded, 0);
        let (norm, kept, missed): (f64, f64, f64) = (norm.sqrt(), kept.sqrt(), missed.sqrt());
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let roundings = (self.cols.div_ceil(LANES) + 4) as f64 * UNIT;
        let gamma = roundings / (1.0 - roundings);
        // 4 roundings of the estimate, and 8 of the comparisons, each of at most
        // |estimate| + |e| X + n Y, where |estimate| is about n |y| at most. f64 rounds far less.
        let slack = 16.0 * UNIT;
        self.tokens.push(Token {
            scale,
            offset: i64::from(ZERO) * sum,
            norm: above(norm * (1.0 + slack)),
            error: above((missed + gamma * norm + slack * (norm + kept)) * (1.0 + slack)),
        });
        true
    }

    pub(crate) fn factors(&self, token: usize) -> Factors<'_> {
        let at = token * self.padded..(token + 1) * self.padded;
        Factors { high: self.high[at.clone()].as_chunks().0, low: self.low[at].as_chunks().0 }
    }

    /// Returns the estimate of a product from the sums of codes times `high` and `low`.
    #[inline]
    pub(crate) fn estimate(&self, token: usize, scale: f32, high: i32, low: i32) -> f32 {
        let facts = &self.tokens[token];
        #[expect(clippy::cast_precision_loss, reason = "one of the three roundings")]
        let sum = (128 * i64::from(high) + i64::from(low) - facts.offset) as f32;
        sum * (scale * facts.scale)
    }
}

fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}

/// Returns an f32 that is not below `value`.
fn above(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "corrected in the next line")]
    let near = value as f32;
    if f64::from(near) < value { near.next_up() } else { near }
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Screen({} x {})", self.rows, self.cols)
    }
}
