//! Products of many tokens with ternary weights, by tables of sums.
//!
//! Four weights have 81 sums with their four activations. They are all made once, for 16 tokens at
//! a time in the 16 lanes of a vector, and then each packed byte of a row costs one load and one
//! addition for 64 products (the method of four Russians; Arlazarov, Dinic, Kronrod, Faradzhev
//! 1970).
//!
//! ```text
//! for panels of rows
//!   for chunks of 256 columns                       64 packed bytes a row
//!     bytes -> offsets into the tables, of every row of the panel
//!     for blocks of 16 tokens
//!       turn the activations: 16 tokens side by side
//!       for groups of 8 bytes
//!         make 8 tables of 81 vectors                21 KB: they stay in the first-level cache
//!         for rows: open sum += 8 vectors            16 bits
//!       sums += open sums                            32 bits
//! ```
//!
//! # No sum wraps
//!
//! A valid weight is -1, 0 or 1 and an activation lies in -127..=127, so the 256 products of a
//! chunk are at most `256 * 127 = 32512 < 32768`. Code 3 (a damaged file) has no place in the
//! tables: only matrices whose codes were checked come here.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_unpackhi_epi8, _mm_unpacklo_epi8, _mm256_add_epi8, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_si128, _mm256_cvtepi8_epi16,
    _mm256_cvtepi16_epi32, _mm256_cvtepu8_epi16, _mm256_extracti128_si256, _mm256_load_si256,
    _mm256_set1_epi8, _mm256_setr_epi8, _mm256_setr_epi16, _mm256_setzero_si256,
    _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srli_epi16, _mm256_store_si256,
    _mm256_sub_epi16,
};

use super::{
    super::memory::{load_bytes, load_half, prefetch, store_bytes, store_ints},
    Rows,
};
use crate::{
    ColumnsMut, Int8Rows, TERNARY_BLOCK, TernaryScratch,
    pack::BLOCK_BYTES,
    rows::RowFacts,
    scalar::ternary::finish,
    scratch::{Beside, TOKENS},
};

/// Tables in use at once, and bytes of a group.
const GROUP: usize = 8;

/// Sums of a table: three values of each of four weights.
const SUMS: usize = 81;

/// Bytes of a row in a chunk of columns, at most.
const CHUNK_BYTES: usize = 64;

/// Rows of a panel. The more, the better the tables are used; the fewer, the more of the panel's
/// sums and offsets stay in the second-level cache.
const PANEL: usize = 1024;

/// Offsets between those of one group and of the next that are not used, lest the same row of all
/// groups compete for the same lines of the cache.
const STRAY: usize = 12;

const _: () = assert!(4 * CHUNK_BYTES * 127 <= i16::MAX as usize);
const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES) && BLOCK_BYTES.is_multiple_of(GROUP));
const _: () = assert!(GROUP * SUMS * size_of::<Beside>() <= i16::MAX as usize);

/// Bytes from the first table of a group to each.
const TABLES: [i16; GROUP] = {
    let mut starts = [0; GROUP];
    let mut i = 1;
    while i < GROUP {
        #[expect(clippy::cast_possible_wrap, reason = "the largest is 18144")]
        #[expect(clippy::cast_possible_truncation, reason = "the largest is 18144")]
        let start = (i * SUMS * size_of::<Beside>()) as i16;
        starts[i] = start;
        i += 1;
    }
    starts
};

/// Multiplies all rows that `out` has columns for with the tokens from `first` to `end`.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn multiply(
    rows: Rows<'_>,
    x: &Int8Rows,
    [first, end]: [usize; 2],
    out: &mut ColumnsMut<'_>,
    scratch: &mut TernaryScratch,
) {
    let columns = out.columns();
    let mut row = columns.start;
    while row < columns.end {
        let panel = row..columns.end.min(row + PANEL);
        let count = panel.len();
        sum(rows, panel, x, [first, end], scratch);
        for (block, sums) in scratch.sums.chunks_exact(count).enumerate() {
            let first = first + block * TOKENS;
            write(sums, rows.scale, x, first..end.min(first + TOKENS), row - columns.start, out);
        }
        row += count;
    }
}

/// Leaves the sums of a panel in `scratch.sums`: all rows for the first block of tokens, then for
/// the next.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn sum(
    rows: Rows<'_>,
    panel: std::ops::Range<usize>,
    x: &Int8Rows,
    [first, end]: [usize; 2],
    scratch: &mut TernaryScratch,
) {
    let TernaryScratch { turned, tables, offsets, open, sums } = scratch;
    let count = panel.len();
    let stride = count + STRAY;
    turned.resize(4 * CHUNK_BYTES, Beside::default());
    tables.resize(GROUP * SUMS, Beside::default());
    offsets.resize(stride * CHUNK_BYTES / GROUP, [0; 2]);
    open.resize(count, Beside::default());
    sums.clear();
    sums.resize((end - first).div_ceil(TOKENS) * count, [0; TOKENS]);
    for start in (0..rows.bytes).step_by(CHUNK_BYTES) {
        let bytes = start..rows.bytes.min(start + CHUNK_BYTES);
        let groups = bytes.len() / GROUP;
        for (r, row) in panel.clone().enumerate() {
            let packed = &rows.packed[row * rows.bytes..][bytes.clone()];
            // The next chunk of the row, or the first of a row of the next panel.
            let next =
                if bytes.end < rows.bytes { bytes.len() } else { count * rows.bytes - start };
            prefetch(packed, next, CHUNK_BYTES);
            for (block, packed) in packed.as_chunks::<BLOCK_BYTES>().0.iter().enumerate() {
                for (group, found) in offsets_of(packed).into_iter().enumerate() {
                    offsets[(block * BLOCK_BYTES / GROUP + group) * stride + r] = found;
                }
            }
        }
        for (block, sums) in sums.chunks_exact_mut(count).enumerate() {
            turn(x, first + block * TOKENS, end, 4 * start, &mut turned[..4 * bytes.len()]);
            for group in 0..groups {
                make_tables(turned, group * GROUP, tables);
                let offsets = &offsets[group * stride..][..count];
                let tables: &[Beside; GROUP * SUMS] =
                    tables.as_slice().try_into().expect("resized above");
                match (group == 0, group + 1 == groups) {
                    (true, _) => add::<true, false>(tables, offsets, open, sums),
                    (_, false) => add::<false, false>(tables, offsets, open, sums),
                    (_, true) => add::<false, true>(tables, offsets, open, sums),
                }
            }
        }
    }
}

/// Returns where the sums of the weights in each byte are, counted in bytes from the first of the
/// tables of its group; four groups of eight.
///
/// Always less than `GROUP * SUMS * size_of::<Beside>()`, whatever the bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn offsets_of(packed: &[u8; BLOCK_BYTES]) -> [[u64; 2]; BLOCK_BYTES / GROUP] {
    // Two codes as a number of base 4 become one of base 3. The codes 3 of no valid matrix become 0.
    let low = _mm256_setr_epi8(
        0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0, 0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0,
        0, 0,
    );
    let high = _mm256_setr_epi8(
        0, 9, 18, 0, 27, 36, 45, 0, 54, 63, 72, 0, 0, 0, 0, 0, 0, 9, 18, 0, 27, 36, 45, 0, 54, 63,
        72, 0, 0, 0, 0, 0,
    );
    let tables = _mm256_setr_epi16(
        TABLES[0], TABLES[1], TABLES[2], TABLES[3], TABLES[4], TABLES[5], TABLES[6], TABLES[7],
        TABLES[0], TABLES[1], TABLES[2], TABLES[3], TABLES[4], TABLES[5], TABLES[6], TABLES[7],
    );
    let (packed, nibble) = (load_bytes(packed), _mm256_set1_epi8(15));
    let numbers = _mm256_add_epi8(
        _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16::<4>(packed), nibble)),
        _mm256_shuffle_epi8(low, _mm256_and_si256(packed, nibble)),
    );
    let offsets = |numbers: __m128i| {
        let bytes = _mm256_slli_epi16::<5>(_mm256_cvtepu8_epi16(numbers));
        halves(_mm256_add_epi16(bytes, tables))
    };
    let [a, b] = offsets(_mm256_castsi256_si128(numbers));
    let [c, d] = offsets(_mm256_extracti128_si256::<1>(numbers));
    [a, b, c, d]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn halves(x: __m256i) -> [[u64; 2]; 2] {
    let mut bytes = [0; 32];
    store_bytes(&mut bytes, x);
    let words = bytes.as_chunks().0;
    let word = |i: usize| u64::from_le_bytes(words[i]);
    [[word(0), word(1)], [word(2), word(3)]]
}

/// Brings the activations of columns from `column` into order: the tokens of a column side by side.
/// Tokens from `end` on are zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn turn(x: &Int8Rows, first: usize, end: usize, column: usize, turned: &mut [Beside]) {
    const ZEROS: [u8; TOKENS] = [0; TOKENS];
    for (index, turned) in turned.as_chunks_mut::<TOKENS>().0.iter_mut().enumerate() {
        let at = column + index * TOKENS;
        let mut square = [_mm256_castsi256_si128(_mm256_setzero_si256()); TOKENS];
        for (t, line) in square.iter_mut().enumerate() {
            let values = if first + t < end { &x.row(first + t)[at..] } else { &ZEROS };
            *line = load_half(values.first_chunk().expect("rows are padded to whole blocks"));
        }
        for _ in 0..4 {
            let mut next = square;
            for i in 0..TOKENS / 2 {
                next[2 * i] = _mm_unpacklo_epi8(square[i], square[i + TOKENS / 2]);
                next[2 * i + 1] = _mm_unpackhi_epi8(square[i], square[i + TOKENS / 2]);
            }
            square = next;
        }
        for (turned, column) in turned.iter_mut().zip(square) {
            put(turned, _mm256_cvtepi8_epi16(column));
        }
    }
}

/// Makes the tables of a group of bytes that starts with byte `first` of the chunk.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn make_tables(turned: &[Beside], first: usize, tables: &mut [Beside]) {
    for (byte, table) in (first..).zip(tables.as_chunks_mut::<SUMS>().0) {
        // The byte's weights are a quarter of a block apart.
        let start = byte / BLOCK_BYTES * TERNARY_BLOCK + byte % BLOCK_BYTES;
        let x = |i: usize| get(&turned[start + i * BLOCK_BYTES]);
        let (high, low) = (pairs(x(0), x(1)), pairs(x(2), x(3)));
        for (table, high) in table.as_chunks_mut::<9>().0.iter_mut().zip(high) {
            for (sum, low) in table.iter_mut().zip(low) {
                put(sum, _mm256_add_epi16(high, low));
            }
        }
    }
}

/// Returns the nine sums of two activations, each times -1, 0 and 1; those of the second change
/// first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn pairs(a: __m256i, b: __m256i) -> [__m256i; 9] {
    let zero = _mm256_setzero_si256();
    let less = _mm256_sub_epi16(zero, a);
    [
        _mm256_sub_epi16(less, b),
        less,
        _mm256_sub_epi16(b, a),
        _mm256_sub_epi16(zero, b),
        zero,
        b,
        _mm256_sub_epi16(a, b),
        a,
        _mm256_add_epi16(a, b),
    ]
}

/// Adds the sums of a group to the open ones of each row; `FIRST` begins them, `LAST` adds them to
/// the final sums.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn add<const FIRST: bool, const LAST: bool>(
    tables: &[Beside; GROUP * SUMS],
    offsets: &[[u64; 2]],
    open: &mut [Beside],
    sums: &mut [[i32; TOKENS]],
) {
    for ((offsets, open), sums) in offsets.iter().zip(open).zip(sums) {
        let [a, b, c, d] = four(tables, offsets[0]);
        let [e, f, g, h] = four(tables, offsets[1]);
        let even = _mm256_add_epi16(_mm256_add_epi16(a, c), _mm256_add_epi16(e, g));
        let odd = _mm256_add_epi16(_mm256_add_epi16(b, d), _mm256_add_epi16(f, h));
        let mut sum = _mm256_add_epi16(even, odd);
        if !FIRST {
            sum = _mm256_add_epi16(sum, get(open));
        }
        if LAST {
            let halves = [_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum)];
            for (sums, half) in sums.as_chunks_mut::<8>().0.iter_mut().zip(halves) {
                let total = _mm256_add_epi32(load_ints(sums), _mm256_cvtepi16_epi32(half));
                store_ints(sums, total);
            }
        } else {
            put(open, sum);
        }
    }
}

/// Returns the sums at four offsets of 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn four(tables: &[Beside; GROUP * SUMS], offsets: u64) -> [__m256i; 4] {
    let mut found = [_mm256_setzero_si256(); 4];
    for (i, found) in found.iter_mut().enumerate() {
        #[expect(clippy::cast_possible_truncation, reason = "one of the four parts")]
        let offset = usize::from((offsets >> (16 * i)) as u16);
        debug_assert!(offset < size_of_val(tables) && offset.is_multiple_of(size_of::<Beside>()));
        // SAFETY: `offsets_of` gives offsets inside the tables only.
        let entry = unsafe { tables.as_ptr().byte_add(offset) };
        // SAFETY: they are offsets of whole entries, which are borrowed with the tables.
        let entry = unsafe { &*entry };
        *found = get(entry);
    }
    found
}

/// Writes the sums of a block of tokens to the columns from `column`.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn write(
    sums: &[[i32; TOKENS]],
    scale: f32,
    x: &Int8Rows,
    tokens: std::ops::Range<usize>,
    column: usize,
    out: &mut ColumnsMut<'_>,
) {
    let mut facts = [RowFacts::default(); TOKENS];
    for (facts, t) in facts.iter_mut().zip(tokens.clone()) {
        *facts = x.facts(t);
    }
    for (index, sums) in sums.chunks(8).enumerate() {
        let column = column + index * 8;
        for (t, facts) in tokens.clone().zip(&facts) {
            let out = &mut out.row_mut(t)[column..][..sums.len()];
            for (out, sums) in out.iter_mut().zip(sums) {
                *out = finish(sums[t - tokens.start], scale, facts.scale);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn load_ints(x: &[i32; 8]) -> __m256i {
    // SAFETY: the reference is valid for 32 bytes; the load needs no alignment.
    unsafe { std::arch::x86_64::_mm256_loadu_si256(x.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn get(x: &Beside) -> __m256i {
    // SAFETY: the reference is valid for 32 bytes and aligned to them.
    unsafe { _mm256_load_si256(x.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn put(x: &mut Beside, value: __m256i) {
    // SAFETY: the reference is valid for 32 bytes and aligned to them.
    unsafe { _mm256_store_si256(x.0.as_mut_ptr().cast(), value) };
}
