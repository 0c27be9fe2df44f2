//! Loads and stores whose length the type proves.

use std::arch::x86_64::{
    __m128, __m128i, __m256, __m256i, _MM_HINT_T0, _mm_loadu_ps, _mm_loadu_si128, _mm_prefetch,
    _mm_storeu_ps, _mm256_cmpgt_epi32, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_maskload_ps,
    _mm256_set1_epi32, _mm256_setr_epi32, _mm256_storeu_ps, _mm256_storeu_si256,
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn load(x: &[f32; 8]) -> __m256 {
    // SAFETY: the reference is valid for 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Returns the mask of the first `len` lanes, all of them if there are fewer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn first_lanes(len: usize) -> __m256i {
    let len = i32::try_from(len.min(8)).expect("8 is a small number");
    _mm256_cmpgt_epi32(_mm256_set1_epi32(len), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// Loads the first eight numbers; lanes without one are zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn load_some(x: &[f32]) -> __m256 {
    let mask = first_lanes(x.len());
    // SAFETY: the mask has lanes of numbers inside the slice only; others are not accessed.
    unsafe { _mm256_maskload_ps(x.as_ptr(), mask) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn load_four(x: &[f32; 4]) -> __m128 {
    // SAFETY: the reference is valid for 16 bytes; the load needs no alignment.
    unsafe { _mm_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn store_four(x: &mut [f32; 4], value: __m128) {
    // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_ps(x.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn store(x: &mut [f32; 8], value: __m256) {
    // SAFETY: the reference is valid for 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn load_bytes(x: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is valid for 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn store_bytes(x: &mut [u8; 32], value: __m256i) {
    // SAFETY: the reference is valid for 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn load_half(x: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is valid for 16 bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn store_ints(x: &mut [i32; 8], value: __m256i) {
    // SAFETY: the reference is valid for 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), value) }
}

/// Distance of prefetched bytes behind the next tile's start.
///
/// Rows are short and read several at a time, which the hardware takes for many streams that end
/// at once, and leaves half of the memory's speed unused. But the rows of a tile are one piece of
/// memory, and so are the tiles: the prefetch runs over them in order, at least one tile ahead.
const AHEAD: usize = 2048;

/// Asks for the piece number `piece` of `LEN` bytes of the tile after the one that starts with
/// `row`, one of `rows` rows. The bytes need not exist.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn prefetch_piece<const LEN: usize>(row: &[u8], rows: usize, piece: usize) {
    prefetch(row, rows * row.len() + AHEAD + piece * LEN, LEN);
}

/// Asks for `len` bytes from `offset` after the start of `bytes`. They need not exist.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn prefetch(bytes: &[u8], offset: usize, len: usize) {
    for line in (0..len).step_by(64) {
        // Whatever the address, a prefetch does not fault and reads nothing the program can see.
        _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(offset + line).cast());
    }
}
