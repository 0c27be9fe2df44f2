//! The product with one token: rows are read once and never stored dequantised.

use std::arch::x86_64::{__m256, _mm256_fmadd_ps, _mm256_mul_ps, _mm256_set1_ps};

use super::{
    super::{
        lanes::{Lanes, halves},
        memory::{load, load_half},
    },
    decode::{bf16, f16, int8, split_q8_0, unpack_q6_k},
};
use crate::{
    ColumnsMut, DenseMatrix, DenseType, LANES,
    dense::{q6_k, q8_0},
    scalar,
};

/// Rows at once: their eight sums hide the latency of the additions.
const ROWS: usize = 4;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn matvec(w: &DenseMatrix, x: &[f32], mut out: ColumnsMut<'_>) {
    let columns = out.columns();
    let out = out.row_mut(0);
    let (fours, rest) = out.as_chunks_mut::<ROWS>();
    let mut row = columns.start;
    for out in fours {
        let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
        for (r, bytes) in rows.iter_mut().enumerate() {
            *bytes = w.row_bytes(row + r);
        }
        *out = products(w.kind(), rows, x);
        row += ROWS;
    }
    for out in rest {
        [*out] = products(w.kind(), [w.row_bytes(row)], x);
        row += 1;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn products<const R: usize>(kind: DenseType, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    let sums = match kind {
        DenseType::F32 => plain::<F32, 64, R>(rows, x),
        DenseType::F16 => plain::<F16, 32, R>(rows, x),
        DenseType::Bf16 => plain::<BF16, 32, R>(rows, x),
        DenseType::Q8_0 => q8_0(rows, x),
        DenseType::Q6K => q6_k(rows, x),
    };
    let tail = &x[x.len() / LANES * LANES..];
    let mut products = [0.0; R];
    for ((product, sum), row) in products.iter_mut().zip(sums).zip(rows) {
        *product = if tail.is_empty() { sum.fold() } else { finish(kind, sum, row, tail) };
    }
    products
}

/// Adds the weights that fill no register, which only formats without blocks have.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn finish(kind: DenseType, sum: Lanes, row: &[u8], tail: &[f32]) -> f32 {
    let mut weights = [0.0; LANES];
    let weights = &mut weights[..tail.len()];
    scalar::dense::row(kind, &row[row.len() - kind.row_bytes(tail.len())..], weights);
    let mut lanes = sum.to_array();
    for ((w, x), lane) in weights.iter().zip(tail).zip(&mut lanes) {
        *lane = w.mul_add(*x, *lane);
    }
    scalar::lanes::fold(lanes)
}

/// Sums a format without blocks, whose 16 weights take `BYTES`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn plain<const KIND: u8, const BYTES: usize, const R: usize>(
    rows: [&[u8]; R],
    x: &[f32],
) -> [Lanes; R] {
    let (x, _) = x.as_chunks::<LANES>();
    let mut chunks: [&[[u8; BYTES]]; R] = [&[]; R];
    for (chunks, row) in chunks.iter_mut().zip(rows) {
        *chunks = &row.as_chunks().0[..x.len()];
    }
    let mut sums = [Lanes::zero(); R];
    for (i, x) in x.iter().enumerate() {
        let x = halves(x);
        let (low, high) = (load(x.0), load(x.1));
        for (sum, chunks) in sums.iter_mut().zip(chunks) {
            sum.low = _mm256_fmadd_ps(plain_eight::<KIND, BYTES>(&chunks[i], 0), low, sum.low);
            sum.high = _mm256_fmadd_ps(plain_eight::<KIND, BYTES>(&chunks[i], 1), high, sum.high);
        }
    }
    sums
}

/// Returns the low or the high eight of 16 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn plain_eight<const KIND: u8, const BYTES: usize>(bytes: &[u8; BYTES], half: usize) -> __m256 {
    match KIND {
        F32 => {
            let bytes = &bytes.as_chunks::<32>().0[half];
            let mut weights = [0.0; 8];
            for (bytes, weight) in bytes.as_chunks().0.iter().zip(&mut weights) {
                *weight = f32::from_le_bytes(*bytes);
            }
            load(&weights)
        }
        F16 => f16(load_half(&bytes.as_chunks().0[half])),
        _ => bf16(load_half(&bytes.as_chunks().0[half])),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn q8_0<const R: usize>(rows: [&[u8]; R], x: &[f32]) -> [Lanes; R] {
    let (x, _) = x.as_chunks::<{ q8_0::WEIGHTS }>();
    let mut blocks: [&[[u8; q8_0::BYTES]]; R] = [&[]; R];
    for (blocks, row) in blocks.iter_mut().zip(rows) {
        *blocks = &row.as_chunks().0[..x.len()];
    }
    let mut sums = [Lanes::zero(); R];
    for (i, x) in x.iter().enumerate() {
        for (sum, blocks) in sums.iter_mut().zip(blocks) {
            let (scale, values) = split_q8_0(&blocks[i]);
            for (x, values) in x.as_chunks().0.iter().zip(values.as_chunks().0) {
                add_int8(sum, scale, values, x);
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn q6_k<const R: usize>(rows: [&[u8]; R], x: &[f32]) -> [Lanes; R] {
    let (x, _) = x.as_chunks::<{ q6_k::WEIGHTS }>();
    let mut sums = [Lanes::zero(); R];
    for (i, x) in x.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            let block = unpack_q6_k(&row.as_chunks().0[i]);
            let groups = block.values.as_chunks().0.iter().zip(block.scales);
            for (x, (values, scale)) in x.as_chunks().0.iter().zip(groups) {
                add_int8(sum, scale, values, x);
            }
        }
    }
    sums
}

/// Adds 16 signed bytes with one scale; the product with the scale is exact.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn add_int8(sum: &mut Lanes, scale: f32, values: &[u8; LANES], x: &[f32; LANES]) {
    let scale = _mm256_set1_ps(scale);
    let (x_low, x_high) = halves(x);
    let ([low, high], []) = values.as_chunks() else { unreachable!("16 is twice 8") };
    sum.low = _mm256_fmadd_ps(_mm256_mul_ps(int8(low), scale), load(x_low), sum.low);
    sum.high = _mm256_fmadd_ps(_mm256_mul_ps(int8(high), scale), load(x_high), sum.high);
}
