//! Dequantisation: the exact f32 values of stored weights.

use std::arch::x86_64::{
    __m128i, __m256, _mm_and_si128, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtsi64_si128,
    _mm_cvtss_f32, _mm_set1_epi8, _mm_srli_epi16, _mm_srli_si128, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_slli_epi32,
};

use super::{
    super::{
        lanes::halves_mut,
        memory::{load_half, store},
    },
    q6_k,
};
use crate::{
    DenseType, LANES,
    dense::{q4_0, q8_0},
    scalar,
};

/// Weights of a block of Q8_0 and Q4_0.
pub(super) const SMALL_BLOCK: usize = 32;

const _: () = assert!(q8_0::WEIGHTS == SMALL_BLOCK && q4_0::WEIGHTS == SMALL_BLOCK);

/// Dequantises consecutive weights: whole blocks of the format.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn row(kind: DenseType, bytes: &[u8], out: &mut [f32], factors: &mut q6_k::Factors) {
    match kind {
        DenseType::F32 => scalar::dense::row(kind, bytes, out),
        DenseType::F16 | DenseType::Bf16 => {
            let (chunks, tail) = bytes.as_chunks::<16>();
            let (out, out_tail) = out.as_chunks_mut();
            for (bytes, out) in chunks.iter().zip(out) {
                let half = load_half(bytes);
                store(out, if kind == DenseType::F16 { f16(half) } else { bf16(half) });
            }
            scalar::dense::row(kind, tail, out_tail);
        }
        DenseType::Q8_0 => small_blocks::<{ q8_0::BYTES }>(bytes, out),
        DenseType::Q4_0 => small_blocks::<{ q4_0::BYTES }>(bytes, out),
        DenseType::Q6K => q6_k::row(bytes, out, factors),
    }
}

/// Dequantises blocks of Q8_0 or Q4_0, which their size tells apart.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn small_blocks<const BYTES: usize>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.as_chunks::<BYTES>().0;
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<SMALL_BLOCK>().0) {
        let scale = block_scale(block);
        for (part, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let (low, high) = halves_mut(out);
            let weights = sixteen(block, scale, part);
            store(low, weights[0]);
            store(high, weights[1]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn f16(bytes: __m128i) -> __m256 {
    _mm256_cvtph_ps(bytes)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn bf16(bytes: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bytes)))
}

/// Returns eight signed bytes as f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn int8(bytes: &[u8; 8]) -> __m256 {
    let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
}

/// Returns the scale of a block of Q8_0 or Q4_0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn block_scale<const BYTES: usize>(block: &[u8; BYTES]) -> __m256 {
    _mm256_set1_ps(f16_scale([block[0], block[1]]))
}

/// Returns the first or the second 16 weights of a block of Q8_0 or Q4_0.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn sixteen<const BYTES: usize>(
    block: &[u8; BYTES],
    scale: __m256,
    part: usize,
) -> [__m256; 2] {
    if BYTES == q8_0::BYTES {
        let values = &block[2..].as_chunks().0[2 * part..][..2];
        return [_mm256_mul_ps(int8(&values[0]), scale), _mm256_mul_ps(int8(&values[1]), scale)];
    }
    let both = load_half(block.last_chunk().expect("a block is its scale and its codes"));
    let shifted = if part == 0 { both } else { _mm_srli_epi16::<4>(both) };
    let codes = _mm_and_si128(shifted, _mm_set1_epi8(15));
    // scale * code - scale * 8, all three exact.
    let offset = _mm256_mul_ps(scale, _mm256_set1_ps(-f32::from(q4_0::ZERO)));
    let weights = |codes| {
        let codes = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
        _mm256_fmadd_ps(codes, scale, offset)
    };
    [weights(codes), weights(_mm_srli_si128::<8>(codes))]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn f16_scale(bytes: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes)))))
}
