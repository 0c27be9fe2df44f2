//! Dequantisation: the exact f32 values of stored weights.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_cvtss_f32,
    _mm256_and_si256, _mm256_castsi256_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8,
    _mm256_set1_ps, _mm256_slli_epi16, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_sub_epi8,
};

use super::super::memory::{load_bytes, load_half, store, store_bytes};
use crate::{
    DenseType,
    dense::{q6_k, q8_0},
    scalar,
};

/// Dequantises consecutive weights: whole blocks of the format.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(in super::super) fn row(kind: DenseType, bytes: &[u8], out: &mut [f32]) {
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
        DenseType::Q8_0 => {
            let (blocks, _) = bytes.as_chunks::<{ q8_0::BYTES }>();
            for (block, out) in blocks.iter().zip(out.as_chunks_mut::<{ q8_0::WEIGHTS }>().0) {
                let (scale, values) = split_q8_0(block);
                let scale = _mm256_set1_ps(scale);
                for (values, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                    store(out, _mm256_mul_ps(int8(values), scale));
                }
            }
        }
        DenseType::Q6K => {
            let (blocks, _) = bytes.as_chunks::<{ q6_k::BYTES }>();
            for (block, out) in blocks.iter().zip(out.as_chunks_mut::<{ q6_k::WEIGHTS }>().0) {
                let block = unpack_q6_k(block);
                let groups = block.values.as_chunks::<{ q6_k::GROUP }>().0;
                let out = out.as_chunks_mut::<{ q6_k::GROUP }>().0;
                for ((values, scale), out) in groups.iter().zip(block.scales).zip(out) {
                    let scale = _mm256_set1_ps(scale);
                    for (values, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                        store(out, _mm256_mul_ps(int8(values), scale));
                    }
                }
            }
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

/// Returns the scale and the values of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn split_q8_0(block: &[u8; q8_0::BYTES]) -> (f32, &[u8; q8_0::WEIGHTS]) {
    let values = block.last_chunk().expect("a block is its scale and its values");
    (f16_scale([block[0], block[1]]), values)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn f16_scale(bytes: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes)))))
}

/// A Q6_K block with its values as signed bytes in order and one scale for every 16.
pub(super) struct Unpacked {
    pub(super) values: [u8; q6_k::WEIGHTS],
    pub(super) scales: [f32; q6_k::WEIGHTS / q6_k::GROUP],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn unpack_q6_k(block: &[u8; q6_k::BYTES]) -> Unpacked {
    let mut unpacked = Unpacked { values: [0; q6_k::WEIGHTS], scales: [0.0; 16] };
    let scale = _mm256_set1_ps(f16_scale([block[q6_k::SCALE], block[q6_k::SCALE + 1]]));
    let groups = block[q6_k::SCALES..q6_k::SCALE].as_chunks().0;
    for (groups, scales) in groups.iter().zip(unpacked.scales.as_chunks_mut().0) {
        store(scales, _mm256_mul_ps(int8(groups), scale));
    }
    let lows = block[..q6_k::HIGH].as_chunks::<32>().0.as_chunks::<2>().0;
    let highs = block[q6_k::HIGH..q6_k::SCALES].as_chunks::<32>().0;
    let values = unpacked.values.as_chunks_mut::<32>().0.as_chunks_mut::<4>().0;
    for (([low_0, low_1], high), values) in lows.iter().zip(highs).zip(values) {
        let (low_0, low_1, high) = (load_bytes(low_0), load_bytes(low_1), load_bytes(high));
        let mut put = |j: usize, low, high| store_bytes(&mut values[j], value_q6_k(low, high));
        put(0, low_0, _mm256_slli_epi16::<4>(high));
        put(1, low_1, _mm256_slli_epi16::<2>(high));
        put(2, _mm256_srli_epi16::<4>(low_0), high);
        put(3, _mm256_srli_epi16::<4>(low_1), _mm256_srli_epi16::<2>(high));
    }
    unpacked
}

/// Joins the low bits 3-0 of `low` with bits 5-4 of `high`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn value_q6_k(low: __m256i, high: __m256i) -> __m256i {
    let low = _mm256_and_si256(low, _mm256_set1_epi8(0x0f));
    let high = _mm256_and_si256(high, _mm256_set1_epi8(0x30));
    _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(q6_k::ZERO))
}
