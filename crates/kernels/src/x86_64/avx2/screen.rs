//! Products with a screen.
//!
//! Codes are 0 to 63 and the two integers of an activation -64 to 63: `vpmaddubsw` multiplies them
//! into sums of 16 bits, four of which cannot overflow together: `8 * 63 * 64` is below 2^15.

use std::arch::x86_64::{
    __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_shuffle_epi32, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_si128, _mm256_extracti128_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srli_epi16,
};

use super::memory::{load_bytes, prefetch};
use crate::{
    ColumnsMut, DenseMatrix, Screen, ScreenPart, ScreenQuery,
    screen::{BLOCK, BLOCK_BYTES, Factors},
};

/// Bytes of the screen asked for ahead of where it is read.
const AHEAD: usize = 4096;

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn estimate(screen: &Screen, query: &ScreenQuery, mut out: ColumnsMut<'_>) {
    let columns = out.columns();
    let tokens = query.tokens();
    for row in columns.clone() {
        let at = row - columns.start;
        let mut token = 0;
        while token < tokens {
            token += match tokens - token {
                1 => tile::<1>(screen, query, row, token, at, &mut out),
                2 => tile::<2>(screen, query, row, token, at, &mut out),
                _ => tile::<3>(screen, query, row, token, at, &mut out),
            };
        }
    }
}

/// Multiplies one row with `T` tokens; returns `T`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn tile<const T: usize>(
    screen: &Screen,
    query: &ScreenQuery,
    row: usize,
    token: usize,
    at: usize,
    out: &mut ColumnsMut<'_>,
) -> usize {
    let blocks = screen.blocks(row);
    let factors: [Factors<'_>; T] = std::array::from_fn(|t| {
        let Factors { high, low } = query.factors(token + t);
        Factors { high: &high[..blocks.len()], low: &low[..blocks.len()] }
    });
    let mut high = [_mm256_setzero_si256(); T];
    let mut low = [_mm256_setzero_si256(); T];
    for (index, block) in blocks.iter().enumerate() {
        if token == 0 {
            prefetch(block, AHEAD, BLOCK_BYTES);
        }
        let codes = codes(block);
        for t in 0..T {
            high[t] = _mm256_add_epi32(high[t], products(codes, &factors[t].high[index]));
            low[t] = _mm256_add_epi32(low[t], products(codes, &factors[t].low[index]));
        }
    }
    for t in 0..T {
        out.row_mut(token + t)[at] =
            query.estimate(token + t, screen.scale(row), fold(high[t]), fold(low[t]));
    }
    T
}

/// Returns the 128 codes of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn codes(block: &[u8; BLOCK_BYTES]) -> [__m256i; 4] {
    let parts = block.as_chunks::<32>().0;
    let (low, high, top) = (load_bytes(&parts[0]), load_bytes(&parts[1]), load_bytes(&parts[2]));
    let nibble = _mm256_set1_epi8(15);
    let two = _mm256_set1_epi8(0x30);
    let join =
        |low, top| _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(top, two));
    [
        join(low, _mm256_slli_epi16::<4>(top)),
        join(_mm256_srli_epi16::<4>(low), _mm256_slli_epi16::<2>(top)),
        join(high, top),
        join(_mm256_srli_epi16::<4>(high), _mm256_srli_epi16::<2>(top)),
    ]
}

/// Returns the sums of the products of codes and integers, 16 in each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn products(codes: [__m256i; 4], factors: &[u8; BLOCK]) -> __m256i {
    let x = factors.as_chunks::<32>().0;
    let first = _mm256_add_epi16(
        _mm256_maddubs_epi16(codes[0], load_bytes(&x[0])),
        _mm256_maddubs_epi16(codes[1], load_bytes(&x[1])),
    );
    let second = _mm256_add_epi16(
        _mm256_maddubs_epi16(codes[2], load_bytes(&x[2])),
        _mm256_maddubs_epi16(codes[3], load_bytes(&x[3])),
    );
    _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1))
}

/// Returns the sum of eight numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn fold(sums: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b00_00_00_01>(two)))
}

/// Fills rows of a screen.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn fill(w: &DenseMatrix, part: ScreenPart<'_>) {
    part.fill(w.cols(), |row, out| super::dense::row(w.kind(), w.row_bytes(row), out));
}
