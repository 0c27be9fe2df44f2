//! Q6_K without conversions from integers.
//!
//! A code of six bits becomes a float by being written into its mantissa: `2 + code / 32` has the
//! bits `0x40000000 | code << 17`, which two byte interleavings make out of `code << 1`. Then
//!
//! ```text
//! weight = s * (code - 32) = fma(2 + code / 32, 32 * s, -96 * s)      s = scale * group
//! ```
//!
//! `s` has at most 19 significant bits, so `32 * s` and `96 * s` are exact, and the sum is the
//! weight itself, which fits f32: nothing is rounded. A weight of zero comes out as +0, as the
//! specification has it.

use std::arch::x86_64::{
    __m256, __m256i, _mm_cvtsi64_si128, _mm256_and_si256, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_permutevar8x32_epi32, _mm256_set1_epi8, _mm256_set1_ps, _mm256_setr_epi32,
    _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srli_epi16, _mm256_unpackhi_epi8,
    _mm256_unpackhi_epi16, _mm256_unpacklo_epi8, _mm256_unpacklo_epi16,
};

use std::sync::atomic::{Ordering, compiler_fence};

use super::{
    super::{
        lanes::{Lanes, halves, halves_mut},
        memory::{load, load_bytes, prefetch_piece, store},
    },
    decode::f16_scale,
};
use crate::{
    LANES,
    dense::q6_k::{BYTES, GROUP, HIGH, SCALE, SCALES, WEIGHTS},
};

/// Groups of a block.
const GROUPS: usize = WEIGHTS / GROUP;

/// `32 * s` of every group of some blocks, and `-96 * s`.
#[derive(Debug, Default)]
pub(super) struct Factors {
    slopes: Vec<f32>,
    offsets: Vec<f32>,
}

impl Factors {
    /// Computes the factors of whole blocks, one after the other.
    ///
    /// They go through memory because a broadcast from there is a load, and from a register a
    /// shuffle, of which there are enough.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    fn fill<const R: usize>(&mut self, rows: [&[[u8; BYTES]]; R]) {
        let groups = R * rows[0].len() * GROUPS;
        self.slopes.resize(groups, 0.0);
        self.offsets.resize(groups, 0.0);
        let slopes = self.slopes.as_chunks_mut::<8>().0.as_chunks_mut::<2>().0;
        let offsets = self.offsets.as_chunks_mut::<8>().0.as_chunks_mut::<2>().0;
        let blocks = rows.into_iter().flatten();
        for ((block, slopes), offsets) in blocks.zip(slopes).zip(offsets) {
            let scale = f16_scale([block[SCALE], block[SCALE + 1]]);
            let slope = _mm256_set1_ps(32.0 * scale);
            let offset = _mm256_set1_ps(-96.0 * scale);
            let groups = block[SCALES..SCALE].as_chunks::<8>().0;
            for ((groups, slopes), offsets) in groups.iter().zip(slopes).zip(offsets) {
                let groups = _mm_cvtsi64_si128(i64::from_le_bytes(*groups));
                let groups = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(groups));
                store(slopes, _mm256_mul_ps(groups, slope));
                store(offsets, _mm256_mul_ps(groups, offset));
            }
        }
    }
}

/// Dequantises whole blocks.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn row(bytes: &[u8], out: &mut [f32], factors: &mut Factors) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    factors.fill([blocks]);
    let slopes = factors.slopes.as_chunks::<GROUPS>().0;
    let offsets = factors.offsets.as_chunks::<GROUPS>().0;
    let out = out.as_chunks_mut::<GROUP>().0.as_chunks_mut::<GROUPS>().0;
    for (((block, slopes), offsets), out) in blocks.iter().zip(slopes).zip(offsets).zip(out) {
        for at in 0..2 {
            let half = Half::load(block, at);
            let slopes = &slopes.as_chunks::<8>().0[at];
            let offsets = &offsets.as_chunks::<8>().0[at];
            let out = &mut out.as_chunks_mut::<8>().0[at];
            store_quarter::<0>(&half, slopes, offsets, out);
            store_quarter::<1>(&half, slopes, offsets, out);
            store_quarter::<2>(&half, slopes, offsets, out);
            store_quarter::<3>(&half, slopes, offsets, out);
        }
    }
}

/// Dequantises 32 weights of half a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn store_quarter<const Q: usize>(
    half: &Half,
    slopes: &[f32; GROUPS / 2],
    offsets: &[f32; GROUPS / 2],
    out: &mut [[f32; LANES]; GROUPS / 2],
) {
    let [a, b, c, d] = half.codes::<Q>();
    for (group, codes) in [(2 * Q, [a, b]), (2 * Q + 1, [c, d])] {
        let [low, high] = weights(codes, slopes[group], offsets[group]);
        let out = halves_mut(&mut out[group]);
        store(out.0, low);
        store(out.1, high);
    }
}

/// Multiplies `R` rows with `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn products<const R: usize, const T: usize>(
    rows: [&[u8]; R],
    tokens: [&[f32]; T],
    factors: &mut Factors,
) -> [[Lanes; T]; R] {
    let mut x: [&[[f32; WEIGHTS]]; T] = [&[]; T];
    for (x, token) in x.iter_mut().zip(tokens) {
        *x = token.as_chunks().0;
    }
    let blocks = x[0].len();
    let mut w: [&[[u8; BYTES]]; R] = [&[]; R];
    for (w, row) in w.iter_mut().zip(rows) {
        *w = &row.as_chunks().0[..blocks];
    }
    for x in &mut x {
        *x = &x[..blocks];
    }
    factors.fill(w);
    let mut slopes: [&[[f32; GROUPS]]; R] = [&[]; R];
    let mut offsets: [&[[f32; GROUPS]]; R] = [&[]; R];
    for r in 0..R {
        slopes[r] = &factors.slopes.as_chunks().0[r * blocks..][..blocks];
        offsets[r] = &factors.offsets.as_chunks().0[r * blocks..][..blocks];
    }
    let mut sums = [[Lanes::zero(); T]; R];
    for i in 0..blocks {
        for r in 0..R {
            prefetch_piece::<BYTES>(rows[0], R, R * i + r);
        }
        for at in 0..2 {
            let mut half = [Half::load(&w[0][i], at); R];
            for r in 1..R {
                half[r] = Half::load(&w[r][i], at);
            }
            let mut part = Part {
                slopes: [&[0.0; 8]; R],
                offsets: [&[0.0; 8]; R],
                x: [&[[0.0; LANES]; 8]; T],
            };
            for r in 0..R {
                part.slopes[r] = &slopes[r][i].as_chunks().0[at];
                part.offsets[r] = &offsets[r][i].as_chunks().0[at];
            }
            for (part, x) in part.x.iter_mut().zip(x) {
                *part = &x[i].as_chunks().0.as_chunks().0[at];
            }
            part.add_quarter::<0>(&half, &mut sums);
            part.add_quarter::<1>(&half, &mut sums);
            part.add_quarter::<2>(&half, &mut sums);
            part.add_quarter::<3>(&half, &mut sums);
        }
    }
    sums
}

/// What half a block of `R` rows is multiplied with.
struct Part<'a, const R: usize, const T: usize> {
    slopes: [&'a [f32; GROUPS / 2]; R],
    offsets: [&'a [f32; GROUPS / 2]; R],
    x: [&'a [[f32; LANES]; GROUPS / 2]; T],
}

impl<const R: usize, const T: usize> Part<'_, R, T> {
    /// Adds 32 columns.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    fn add_quarter<const Q: usize>(&self, half: &[Half; R], sums: &mut [[Lanes; T]; R]) {
        for r in 0..R {
            let [a, b, c, d] = half[r].codes::<Q>();
            for (group, codes) in [(2 * Q, [a, b]), (2 * Q + 1, [c, d])] {
                let [low, high] = weights(codes, self.slopes[r][group], self.offsets[r][group]);
                for (sum, x) in sums[r].iter_mut().zip(self.x) {
                    let x = halves(&x[group]);
                    sum.low = _mm256_fmadd_ps(low, load(x.0), sum.low);
                    sum.high = _mm256_fmadd_ps(high, load(x.1), sum.high);
                }
            }
            // Keeps the compiler from dequantising everything first and spilling the sums.
            compiler_fence(Ordering::SeqCst);
        }
    }
}

/// 128 codes as stored, in the order that the interleavings undo: within 32 bytes, the groups of
/// four 0, 2, 4, 6 and then 1, 3, 5, 7.
#[derive(Clone, Copy)]
struct Half {
    low: [__m256i; 2],
    high: __m256i,
}

impl Half {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    fn load(block: &[u8; BYTES], half: usize) -> Self {
        let low = block[..HIGH].as_chunks::<32>().0.as_chunks::<2>().0;
        let high = block[HIGH..SCALES].as_chunks::<32>().0;
        let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        let ordered = |bytes| _mm256_permutevar8x32_epi32(load_bytes(bytes), order);
        let [low_0, low_1] = &low[half];
        Self { low: [ordered(low_0), ordered(low_1)], high: ordered(&high[half]) }
    }

    /// Returns 32 consecutive codes as `2 + code / 32`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
    fn codes<const Q: usize>(&self) -> [__m256; 4] {
        let low = self.low[Q % 2];
        // Bits 4-1 and bits 6-5 of every byte are taken from these; the others are masked.
        let (low, high) = match Q {
            0 => (_mm256_slli_epi16::<1>(low), _mm256_slli_epi16::<5>(self.high)),
            1 => (_mm256_slli_epi16::<1>(low), _mm256_slli_epi16::<3>(self.high)),
            2 => (_mm256_srli_epi16::<3>(low), _mm256_slli_epi16::<1>(self.high)),
            _ => (_mm256_srli_epi16::<3>(low), _mm256_srli_epi16::<1>(self.high)),
        };
        let low = _mm256_and_si256(low, _mm256_set1_epi8(0x1e));
        let high = _mm256_and_si256(high, _mm256_set1_epi8(0x60));
        let codes = _mm256_or_si256(low, high);
        let (zero, exponent) = (_mm256_setzero_si256(), _mm256_set1_epi8(0x40));
        let first = _mm256_unpacklo_epi8(codes, exponent);
        let second = _mm256_unpackhi_epi8(codes, exponent);
        [
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, first)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, first)),
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, second)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, second)),
        ]
    }
}

/// Returns the weights of a group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn weights(codes: [__m256; 2], slope: f32, offset: f32) -> [__m256; 2] {
    let (slope, offset) = (_mm256_set1_ps(slope), _mm256_set1_ps(offset));
    codes.map(|code| _mm256_fmadd_ps(code, slope, offset))
}
