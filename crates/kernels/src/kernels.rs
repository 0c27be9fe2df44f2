//! The operations, and the choice of a variant for each.

#[cfg(target_arch = "x86_64")]
use crate::x86_64::avx2::Avx2;
use crate::{
    AttentionScratch, BLOCK_POSITIONS, ColumnsMut, DenseMatrix, Int8RowMut, Int8Rows, Isa,
    NonFinite, SCALE_BLOCK, Screen, ScreenPart, ScreenQuery, TernaryMatrix, TernaryScratch,
    attention::Shape,
    rows::RowFacts,
    scalar,
    vector::{self, Vectors},
};

/// All arithmetic, in one variant that this CPU is known to have.
///
/// The value is the proof: it exists only for an instruction set that was detected. Every method
/// gives the same bits in every variant, see the [crate] documentation.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    variant: Variant,
}

#[derive(Clone, Copy, Debug)]
enum Variant {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Vectors(Vectors),
}

impl Kernels {
    /// Returns the fastest variant of this CPU.
    pub fn detect() -> Self {
        Isa::ALL.into_iter().rev().find_map(Self::new).unwrap_or(Self { variant: Variant::Scalar })
    }

    /// Returns the variant of an instruction set, `None` if this CPU lacks it.
    pub fn new(isa: Isa) -> Option<Self> {
        let variant = match isa {
            Isa::Scalar => Variant::Scalar,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Variant::Avx2(Avx2::detect()?),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Variant::Avx2(Avx2::detect_vnni()?),
            _ => Variant::Vectors(Vectors::detect(isa)?),
        };
        Some(Self { variant })
    }

    /// Returns a stand-in for the variant of an instruction set, on any CPU: the same algorithms on
    /// plain arrays, of the width and with the arithmetic of its vectors. `None` for the scalar one,
    /// which has none.
    ///
    /// It is for tests, and slow.
    #[cfg(feature = "emulated")]
    pub fn emulated(isa: Isa) -> Option<Self> {
        (isa != Isa::Scalar).then_some(Self { variant: Variant::Vectors(Vectors::Emulated(isa)) })
    }

    /// Returns the instruction set of the variant.
    pub fn isa(&self) -> Isa {
        match self.variant {
            Variant::Scalar => Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.isa(),
            Variant::Vectors(vectors) => vectors.isa(),
        }
    }

    /// Quantises a row of activations: `m = max(|x|.., 1e-5)`, `q = round(x * (127 / m))` with
    /// ties to even, scale `m / 127`; block by block if the row has a scale for each. If a value is
    /// not finite, the row becomes zeros.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn quantize(&self, x: &[f32], mut row: Int8RowMut<'_>) -> Result<(), NonFinite> {
        assert_eq!(x.len(), row.cols(), "activations and the row for them");
        let (values, facts, block_scales) = row.parts();
        let quantized = if block_scales.is_empty() {
            self.quantize_values(x, values)
        } else {
            let mut whole = Some(RowFacts::default());
            let blocks = x.chunks(SCALE_BLOCK).zip(values.chunks_mut(SCALE_BLOCK));
            for ((x, values), scale) in blocks.zip(block_scales.iter_mut()) {
                let block = self.quantize_values(x, values);
                *scale = block.map_or(0.0, |facts| facts.scale);
                whole = whole
                    .zip(block)
                    .map(|(whole, block)| RowFacts { scale: 0.0, sum: whole.sum + block.sum });
            }
            whole
        };
        *facts = quantized.unwrap_or_default();
        if quantized.is_none() {
            values.fill(0);
            let index = x.iter().position(|value| !value.is_finite()).unwrap_or(x.len());
            return Err(NonFinite { index });
        }
        Ok(())
    }

    fn quantize_values(&self, x: &[f32], values: &mut [u8]) -> Option<RowFacts> {
        match self.variant {
            Variant::Scalar => scalar::ternary::quantize(x, values),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.quantize(x, values),
            Variant::Vectors(vectors) => vectors.run(vector::Quantize { x, values }),
        }
    }

    /// Multiplies the first `n` rows of `x` with the rows of `w` that `out` has columns for:
    /// `out[t][r] = (sum of w[r] * x[t]) as f32 * (w.scale * x[t].scale)`; with a scale for each
    /// block, `out = fma(sum of the block as f32, scale of the block * x[t].scale, out)` from 0.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn ternary_matmul(
        &self,
        w: &TernaryMatrix,
        x: &Int8Rows,
        n: usize,
        out: ColumnsMut<'_>,
        #[cfg_attr(
            not(target_arch = "x86_64"),
            expect(unused_variables, reason = "the variants there have no tables")
        )]
        scratch: &mut TernaryScratch,
    ) {
        assert_eq!(w.cols(), x.cols(), "columns of the weights and of the activations");
        assert!(n <= x.rows() && n <= out.rows(), "{n} rows of {} in {}", x.rows(), out.rows());
        assert!(out.columns().end <= w.rows(), "columns {:?} of {}", out.columns(), w.rows());
        if let Some(scales) = w.block_scales() {
            return match self.variant {
                Variant::Scalar => scalar::ternary::matmul_blocks(w, scales, x, n, out),
                #[cfg(target_arch = "x86_64")]
                Variant::Avx2(avx2) => avx2.ternary_matmul_blocks(w, scales, x, n, out),
                Variant::Vectors(vectors) => {
                    vectors.multiply(vector::TernaryMatmulBlocks { w, scales, x, n, out });
                }
            };
        }
        let one = n == 0 || x.block_scales(0).is_none();
        assert!(one, "activations with block scales and a matrix with one scale");
        let scale = w.scale().expect("a matrix without block scales has one scale");
        match self.variant {
            Variant::Scalar => scalar::ternary::matmul(w, scale, x, n, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.ternary_matmul(w, scale, x, n, out, scratch),
            Variant::Vectors(vectors) => {
                vectors.multiply(vector::TernaryMatmul { w, scale, x, n, out });
            }
        }
    }

    /// Multiplies the rows of `x` with the rows of `w` that `out` has columns for, each a
    /// [`dot`](Self::dot) with the dequantised row.
    ///
    /// # Panics
    /// If `x` is not whole rows of `w.cols()`, or the shapes do not fit.
    pub fn dense_matmul(&self, w: &DenseMatrix, x: &[f32], out: ColumnsMut<'_>) {
        assert!(
            x.len().is_multiple_of(w.cols()),
            "{} activations in rows of {}",
            x.len(),
            w.cols()
        );
        assert!(x.len() / w.cols() <= out.rows(), "{} activations, {} rows", x.len(), out.rows());
        assert!(out.columns().end <= w.rows(), "columns {:?} of {}", out.columns(), w.rows());
        match self.variant {
            Variant::Scalar => scalar::dense::matmul(w, x, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.dense_matmul(w, x, out),
            Variant::Vectors(vectors) => vectors.run(vector::DenseMatmul { w, x, out }),
        }
    }

    /// Dequantises one row, such as a token's embedding.
    ///
    /// # Panics
    /// If the row does not exist or `out` is not `w.cols()` long.
    pub fn dense_row(&self, w: &DenseMatrix, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), w.cols(), "room for a row");
        match self.variant {
            Variant::Scalar => scalar::dense::row(w.kind(), w.row_bytes(row), out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.dense_row(w.kind(), w.row_bytes(row), out),
            Variant::Vectors(vectors) => {
                vectors.run(vector::DenseRow { kind: w.kind(), bytes: w.row_bytes(row), out });
            }
        }
    }

    /// Multiplies some rows of `w` with one row of activations: the same bits as
    /// [`dense_matmul`](Self::dense_matmul).
    ///
    /// # Panics
    /// If a row does not exist, or the lengths do not fit.
    pub fn dense_rows(&self, w: &DenseMatrix, rows: &[u32], x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), w.cols(), "activations and columns");
        assert_eq!(rows.len(), out.len(), "rows and room for their products");
        match self.variant {
            Variant::Scalar | Variant::Vectors(_) => scalar::dense::rows(w, rows, x, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.dense_rows(w, rows, x, out),
        }
    }

    /// Returns whether this variant multiplies with a [`Screen`] as fast as memory delivers it.
    pub fn is_quick_to_screen(&self) -> bool {
        match self.variant {
            Variant::Scalar | Variant::Vectors(_) => false,
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(_) => true,
        }
    }

    /// Fills a part of the screen of `w`.
    ///
    /// # Panics
    /// If the part is of the screen of a matrix of another shape.
    pub fn fill_screen(&self, w: &DenseMatrix, part: ScreenPart<'_>) {
        match self.variant {
            Variant::Scalar | Variant::Vectors(_) => scalar::screen::fill(w, part),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.fill_screen(w, part),
        }
    }

    /// Estimates the products of the tokens of `x` with the rows of `w` that `out` has columns for.
    /// [`Screen::bound`] says how far those of [`dense_matmul`](Self::dense_matmul) can be.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn screen_matmul(&self, w: &Screen, x: &ScreenQuery, out: ColumnsMut<'_>) {
        assert_eq!(w.cols(), x.cols(), "columns of the screen and of the activations");
        assert!(x.tokens() <= out.rows(), "{} tokens in {} rows", x.tokens(), out.rows());
        assert!(out.columns().end <= w.rows(), "columns {:?} of {}", out.columns(), w.rows());
        match self.variant {
            Variant::Scalar | Variant::Vectors(_) => scalar::screen::estimate(w, x, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.screen_matmul(w, x, out),
        }
    }

    /// Returns the product of two rows, summed in [`LANES`](crate::LANES) lanes.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "factors of a product");
        match self.variant {
            Variant::Scalar => scalar::lanes::dot(a, b),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.dot(a, b),
            Variant::Vectors(vectors) => vectors.run(vector::Dot { a, b }),
        }
    }

    /// Divides a row by its root mean square and multiplies it with a weight:
    /// `out = x * (1 / sqrt(dot(x, x) / len + eps)) * weight`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), weight.len(), "activations and norm weights");
        assert_eq!(x.len(), out.len(), "activations and results");
        #[expect(clippy::cast_precision_loss, reason = "the rounding is part of the formula")]
        let mean = self.dot(x, x) / x.len() as f32;
        let inverse = 1.0 / (mean + eps).sqrt();
        match self.variant {
            Variant::Scalar => scalar::vector::scale(x, inverse, weight, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.scale(x, inverse, weight, out),
            Variant::Vectors(vectors) => {
                vectors.run(vector::Scale { x, factor: inverse, weight, out });
            }
        }
    }

    /// Replaces `gate` by `relu(gate)^2 * up`; NaN stays NaN.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn relu2_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        match self.variant {
            Variant::Scalar => scalar::vector::relu2_mul(gate, up),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.relu2_mul(gate, up),
            Variant::Vectors(vectors) => vectors.run(vector::Relu2Mul { gate, up }),
        }
    }

    /// Replaces `gate` by `gate / (1 + exp(-gate)) * up`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up");
        match self.variant {
            Variant::Scalar => scalar::vector::silu_mul(gate, up),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.silu_mul(gate, up),
            Variant::Vectors(vectors) => vectors.run(vector::SiluMul { gate, up }),
        }
    }

    /// Adds `x` to `acc`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "terms of a sum");
        match self.variant {
            Variant::Scalar => scalar::vector::add(acc, x),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.add(acc, x),
            Variant::Vectors(vectors) => vectors.run(vector::Add { acc, x }),
        }
    }

    /// Turns the pairs `(i, i + len / 2)` of a head by the angles whose cosines and sines are
    /// given: `a * cos - b * sin`, `b * cos + a * sin`, every operation rounded.
    ///
    /// # Panics
    /// If `head` is not twice as long as `cos` and `sin`.
    pub fn rope(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert_eq!(cos.len(), sin.len(), "cosines and sines");
        assert_eq!(head.len(), 2 * cos.len(), "a head and its angles");
        match self.variant {
            Variant::Scalar => scalar::vector::rope(head, cos, sin),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.rope(head, cos, sin),
            Variant::Vectors(vectors) => vectors.run(vector::Rope { head, cos, sin }),
        }
    }

    /// Computes the attention of a group of query heads that share keys and values over positions
    /// `0..positions`, in the order that depends on positions only.
    ///
    /// `q` and `out` hold one head after the other; `kv(block)` returns the keys and the values of
    /// positions `64 * block..64 * (block + 1)`, each 64 rows of one head. Rows at or beyond
    /// `positions` are not read.
    ///
    /// # Panics
    /// If `positions` is zero or the shapes do not fit.
    pub fn attend<'a>(
        &self,
        q: &[f32],
        kv: impl Fn(usize) -> (&'a [f32], &'a [f32]),
        positions: usize,
        scale: f32,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        assert!(positions > 0, "attention over no position");
        assert_eq!(q.len(), out.len(), "queries and results");
        let head_dim = kv(0).0.len() / BLOCK_POSITIONS;
        assert!(
            head_dim > 0 && q.len().is_multiple_of(head_dim),
            "{} numbers are no heads of {head_dim}",
            q.len()
        );
        let kv = |block| {
            let (keys, values) = kv(block);
            assert_eq!(keys.len(), BLOCK_POSITIONS * head_dim, "a block of keys");
            assert_eq!(values.len(), BLOCK_POSITIONS * head_dim, "a block of values");
            (keys, values)
        };
        let shape = Shape { group: q.len() / head_dim, head_dim, positions, scale };
        scratch.reset(shape.group, head_dim);
        match self.variant {
            Variant::Scalar => scalar::attention::attend(q, kv, shape, scratch, out),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.attend(q, kv, shape, scratch, out),
            Variant::Vectors(vectors) => {
                vectors.run(vector::Attend { q, kv, shape, scratch, out });
            }
        }
    }

    /// Returns the sum of `exp(x - max)`, in [`LANES`](crate::LANES) lanes.
    pub fn sum_exp(&self, x: &[f32], max: f32) -> f32 {
        match self.variant {
            Variant::Scalar => scalar::lanes::sum_exp(x, max),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.sum_exp(x, max),
            Variant::Vectors(vectors) => vectors.run(vector::SumExp { x, max }),
        }
    }

    /// Replaces every element by its exponential, within 1 unit in the last place.
    ///
    /// Subnormal results and overflow to infinity follow IEEE 754; `exp(-inf)` is 0, `exp(0)` is
    /// 1, and NaN stays NaN.
    pub fn exp(&self, x: &mut [f32]) {
        match self.variant {
            Variant::Scalar => scalar::exp::exp(x),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.exp(x),
            Variant::Vectors(vectors) => vectors.run(vector::Exp(x)),
        }
    }

    /// Returns the index of the largest element, the lowest index among equals. NaN is never the
    /// largest; without any element above negative infinity the answer is 0.
    pub fn argmax(&self, x: &[f32]) -> usize {
        match self.variant {
            Variant::Scalar => scalar::vector::argmax(x),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2(avx2) => avx2.argmax(x),
            Variant::Vectors(vectors) => vectors.run(vector::Argmax(x)),
        }
    }
}
