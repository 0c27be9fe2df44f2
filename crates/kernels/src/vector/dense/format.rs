//! Dequantisation: the exact f32 values of stored weights, 16 at a time.

use super::Lanes;
use crate::{
    DenseType, LANES,
    dense::{f16_to_f32, q4_0, q6_k, q8_0},
};

/// A storage format.
pub(super) trait Format {
    const KIND: DenseType;
    /// Vectors of weights that are stored together; of a format without blocks, one.
    const CHUNKS: usize;
    /// Bytes of these.
    const BYTES: usize = Self::KIND.row_bytes(Self::CHUNKS * LANES);

    /// Returns the weights of one vector of a block.
    fn weights<V: Lanes>(v: V, block: &[u8], chunk: usize) -> V::Floats;
}

pub(super) struct F32;

impl Format for F32 {
    const KIND: DenseType = DenseType::F32;
    const CHUNKS: usize = 1;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], _: usize) -> V::Floats {
        let mut weights = [0.0; LANES];
        for (weight, bytes) in weights.iter_mut().zip(block.as_chunks().0) {
            *weight = f32::from_le_bytes(*bytes);
        }
        v.load(&weights)
    }
}

pub(super) struct F16;

impl Format for F16 {
    const KIND: DenseType = DenseType::F16;
    const CHUNKS: usize = 1;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], _: usize) -> V::Floats {
        v.widen_f16(first(block))
    }
}

pub(super) struct Bf16;

impl Format for Bf16 {
    const KIND: DenseType = DenseType::Bf16;
    const CHUNKS: usize = 1;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], _: usize) -> V::Floats {
        v.widen_bf16(first(block))
    }
}

pub(super) struct Q8_0;

impl Format for Q8_0 {
    const KIND: DenseType = DenseType::Q8_0;
    const CHUNKS: usize = q8_0::WEIGHTS / LANES;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], chunk: usize) -> V::Floats {
        let values = first(&block[2 + chunk * LANES..]);
        v.mul(v.widen_bytes(values), v.splat(scale(block, 0)))
    }
}

pub(super) struct Q4_0;

impl Format for Q4_0 {
    const KIND: DenseType = DenseType::Q4_0;
    const CHUNKS: usize = q4_0::WEIGHTS / LANES;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], chunk: usize) -> V::Floats {
        let codes: &[u8; LANES] = first(&block[2..]);
        let mut values = [0; LANES];
        for (value, code) in values.iter_mut().zip(codes) {
            *value = (code >> (4 * chunk) & 15).wrapping_sub(q4_0::ZERO.cast_unsigned());
        }
        // The product is exact; the addition only turns -0 into +0.
        v.fma(v.widen_bytes(&values), v.splat(scale(block, 0)), v.splat(0.0))
    }
}

pub(super) struct Q6K;

impl Format for Q6K {
    const KIND: DenseType = DenseType::Q6K;
    const CHUNKS: usize = q6_k::WEIGHTS / LANES;

    #[inline(always)]
    fn weights<V: Lanes>(v: V, block: &[u8], chunk: usize) -> V::Floats {
        let (half, inside) = (chunk / 8, chunk % 8);
        let (quarter, part) = (inside / 2, inside % 2 * LANES);
        let low: &[u8; LANES] = first(&block[half * 64 + quarter % 2 * 32 + part..]);
        let high: &[u8; LANES] = first(&block[q6_k::HIGH + half * 32 + part..]);
        let mut values = [0; LANES];
        for ((value, low), high) in values.iter_mut().zip(low).zip(high) {
            let code = low >> (quarter / 2 * 4) & 15 | (high >> (2 * quarter) & 3) << 4;
            *value = code.wrapping_sub(q6_k::ZERO.cast_unsigned());
        }
        let group = f32::from(block[q6_k::SCALES + chunk].cast_signed());
        // The products are exact; the addition only turns -0 into +0.
        let scale = v.splat(scale(block, q6_k::SCALE) * group);
        v.fma(v.widen_bytes(&values), scale, v.splat(0.0))
    }
}

#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes(*first(&block[at..])))
}

#[inline(always)]
fn first<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    bytes.first_chunk().expect("a block has all of its bytes")
}
