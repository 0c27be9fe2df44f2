use proptest::prelude::*;
use tercet_kernels::{
    AlignedBytes, Int8Rows, Isa, Kernels, MatrixMut, NonFinite, SCALE_BLOCK, ShapeError,
    TernaryMatrix, TernaryScratch,
};

use crate::support::{Random, assert_bits, scalar, variants};

fn quantized(kernels: Kernels, x: &[f32], cols: usize) -> Int8Rows {
    fill(kernels, x, Int8Rows::new(x.len() / cols, cols))
}

fn fill(kernels: Kernels, x: &[f32], mut rows: Int8Rows) -> Int8Rows {
    let cols = rows.cols();
    for (row, x) in x.chunks_exact(cols).enumerate() {
        kernels.quantize(x, rows.row_mut(row)).unwrap();
    }
    rows
}

fn product(kernels: Kernels, w: &TernaryMatrix, x: &Int8Rows, cuts: &[usize]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.rows() * w.rows()];
    let mut scratch = TernaryScratch::default();
    for part in MatrixMut::new(&mut out, x.rows(), w.rows()).split_columns(cuts) {
        kernels.ternary_matmul(w, x, x.rows(), part, &mut scratch);
    }
    out
}

/// The formula of the specification, from unpacked weights.
fn by_hand(w: &TernaryMatrix, x: &Int8Rows) -> Vec<f32> {
    let mut out = Vec::new();
    for t in 0..x.rows() {
        for row in 0..w.rows() {
            let sum = |columns: std::ops::Range<usize>| {
                let product = |col| i32::from(w.trit(row, col)) * i32::from(x.value(t, col));
                let sum: i32 = columns.map(product).sum();
                #[expect(clippy::cast_precision_loss, reason = "the rounding is in the formula")]
                let sum = sum as f32;
                sum
            };
            let blocks = w.cols().div_ceil(SCALE_BLOCK);
            out.push(match w.block_scales() {
                None => sum(0..w.cols()) * (w.scale().unwrap() * x.scale(t)),
                Some(scales) => (0..blocks).fold(0.0, |y, block| {
                    let start = block * SCALE_BLOCK;
                    let activation = x.block_scales(t).map_or_else(|| x.scale(t), |s| s[block]);
                    let scale = scales[row * blocks + block] * activation;
                    sum(start..w.cols().min(start + SCALE_BLOCK)).mul_add(scale, y)
                }),
            });
        }
    }
    out
}

fn compare(w: &TernaryMatrix, x: &[f32]) {
    let rows = quantized(scalar(), x, w.cols());
    let expected = by_hand(w, &rows);
    let shape = (w.rows(), w.cols(), rows.rows());
    assert_bits(Isa::Scalar, &product(scalar(), w, &rows, &[]), &expected, shape);
    for kernels in variants() {
        let rows = quantized(kernels, x, w.cols());
        assert_bits(kernels, &product(kernels, w, &rows, &[]), &expected, shape);
        let cuts = [w.rows() / 3, w.rows() / 2];
        assert_bits(kernels, &product(kernels, w, &rows, &cuts), &expected, shape);
    }
}

/// As [`compare`], with scales for the blocks of the activations.
fn compare_blocks(w: &TernaryMatrix, x: &[f32]) {
    let n = x.len() / w.cols();
    let rows = |kernels| fill(kernels, x, Int8Rows::with_blocks(n, w.cols()));
    let expected = by_hand(w, &rows(scalar()));
    for kernels in variants().into_iter().chain([scalar()]) {
        for cuts in [&[][..], &[w.rows() / 3, w.rows() / 2]] {
            let found = product(kernels, w, &rows(kernels), cuts);
            assert_bits(kernels, &found, &expected, (w, n));
        }
    }
}

/// The matrix with a scale of its own for every block.
fn blocks(w: &TernaryMatrix, random: &mut Random) -> TernaryMatrix {
    let count = w.rows() * w.cols().div_ceil(SCALE_BLOCK);
    let scales: Vec<f32> = random.floats(count).iter().map(|x| x.abs()).collect();
    let packed = w.packed().into();
    TernaryMatrix::from_packed_blocks(w.rows(), w.cols(), scales.into(), packed).unwrap()
}

#[test]
fn products_of_blocks_equal_on_every_shape() {
    let mut random = Random(2);
    for cols in [1, 63, 64, 65, 96, 128, 192, 200, 256, 1280] {
        for (rows, n) in [(1, 1), (3, 2), (5, 7), (8, 3), (9, 4), (16, 5), (23, 9)] {
            let trits = random.trits(rows * cols);
            let w = TernaryMatrix::from_trits(rows, cols, 1.0, &trits).unwrap();
            let (w, x) = (blocks(&w, &mut random), random.floats(n * cols));
            compare(&w, &x);
            let rows = fill(scalar(), &x, Int8Rows::with_blocks(n, cols));
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (block, x) in x.chunks(SCALE_BLOCK).enumerate() {
                    let alone = quantized(scalar(), x, x.len());
                    assert_eq!(
                        rows.block_scales(t).unwrap()[block].to_bits(),
                        alone.scale(0).to_bits()
                    );
                    for col in 0..x.len() {
                        assert_eq!(rows.value(t, block * SCALE_BLOCK + col), alone.value(0, col));
                    }
                }
            }
            compare_blocks(&w, &x);
        }
    }
    let w = TernaryMatrix::from_trits(2, 65, 1.0, &[0; 130]).unwrap();
    let refused = |scales: &[f32]| {
        let packed = w.packed().into();
        TernaryMatrix::from_packed_blocks(2, 65, scales.into(), packed).unwrap_err()
    };
    assert_eq!(
        refused(&[1.0; 3]),
        ShapeError::ScaleCount { rows: 2, cols: 65, expected: 4, found: 3 }
    );
    assert!(matches!(refused(&[1.0, 1.0, f32::INFINITY, 1.0]), ShapeError::Scale { .. }));
}

#[test]
fn products_equal_on_every_shape() {
    let mut random = Random(1);
    for cols in [1, 16, 31, 96, 127, 128, 129, 255, 256, 640, 1280, 1281, 1408, 2560, 2688] {
        for rows in [1, 2, 3, 4, 5, 7, 9] {
            let w =
                TernaryMatrix::from_trits(rows, cols, 0.37, &random.trits(rows * cols)).unwrap();
            for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33] {
                if n > 9 && rows != 5 {
                    continue;
                }
                compare(&w, &random.floats(n * cols));
            }
        }
    }
}

/// Enough rows and tokens for tables: whole and incomplete blocks of tokens and panels of rows,
/// chunks of columns that end early.
#[test]
fn products_of_many_tokens_equal() {
    let mut random = Random(9);
    for (rows, cols) in [(256, 1), (257, 127), (300, 128), (263, 640), (256, 900), (2200, 300)] {
        let w = TernaryMatrix::from_trits(rows, cols, 0.37, &random.trits(rows * cols)).unwrap();
        for n in [10, 11, 16, 26, 27, 32, 33, 48] {
            if n != 27 && rows > 2000 {
                continue;
            }
            compare(&w, &random.floats(n * cols));
        }
    }
    // The largest sums of all.
    for trit in [1, -1] {
        let w = TernaryMatrix::from_trits(256, 1000, 1.0, &vec![trit; 256 * 1000]).unwrap();
        compare(&w, &[127.0; 16 * 1000]);
        compare(&w, &[-127.0; 16 * 1000]);
    }
}

#[test]
fn the_worst_sums_do_not_wrap() {
    for cols in [1280, 1408, 4096, 6912, 16384] {
        for trit in [1, -1] {
            let trits = vec![trit; 5 * cols];
            let w = TernaryMatrix::from_trits(5, cols, 1.0, &trits).unwrap();
            compare_blocks(&blocks(&w, &mut Random(3)), &vec![-127.0; 3 * cols]);
            for (sign, n) in [(1.0, 1), (-1.0, 4), (1.0, 8), (-1.0, 17)] {
                let x = vec![127.0 * sign; n * cols];
                compare(&w, &x);
                let sum = f32::from(trit) * sign * 127.0 * f32::from(u16::try_from(cols).unwrap());
                for kernels in variants() {
                    let rows = quantized(kernels, &x, cols);
                    assert_bits(
                        kernels,
                        &product(kernels, &w, &rows, &[]),
                        &vec![sum; 5 * n],
                        cols,
                    );
                }
            }
        }
    }
}

#[test]
fn damaged_codes_do_not_wrap_either() {
    // Every code is 3, which counts as weight 2.
    let cols = 8192;
    let mut packed = AlignedBytes::zeroed(4 * cols / 4);
    packed.fill(0xff);
    let mut w = TernaryMatrix::from_packed(4, cols, 1.0, packed.into()).unwrap();
    assert!(w.validate().is_err());
    let blocks = blocks(&w, &mut Random(4));
    for n in [1, 2, 3, 4, 16] {
        for x in [1.0, -1.0] {
            compare(&w, &vec![x; n * cols]);
            compare(&blocks, &vec![x; n * cols]);
            compare_blocks(&blocks, &vec![x; n * cols]);
        }
    }
    // So many rows that tables would be used if the codes were valid.
    let mut packed = AlignedBytes::zeroed(256 * 1024 / 4);
    packed.fill(0xff);
    let w = TernaryMatrix::from_packed(256, 1024, 1.0, packed.into()).unwrap();
    compare(&w, &[1.0; 16 * 1024]);
}

#[test]
fn quantised_rows_equal_on_every_length() {
    let mut random = Random(2);
    for cols in (1..200).chain([2560, 6912]) {
        for scale in [1.0, 1e-7, 1e-30, 1e30, f32::MAX] {
            let x: Vec<f32> =
                random.floats(cols).iter().map(|x| x.clamp(-1.0, 1.0) * scale).collect();
            assert_quantised_alike(&x);
        }
    }
}

#[track_caller]
fn assert_quantised_alike(x: &[f32]) {
    let expected = quantized(scalar(), x, x.len());
    for kernels in variants() {
        let found = quantized(kernels, x, x.len());
        assert_bits(kernels, &[found.scale(0)], &[expected.scale(0)], x.len());
        for col in 0..x.len() {
            assert_eq!(found.value(0, col), expected.value(0, col), "{kernels:?}, {x:?}");
        }
    }
}

#[test]
fn quantisation_rounds_ties_to_even() {
    // The largest magnitude is 127, so the factor is 1 and the ties are exact.
    let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5];
    let expected = [127, 0, 2, 2, 0, -2, -2, 126];
    for kernels in variants().into_iter().chain([scalar()]) {
        let x: Vec<f32> = x.iter().copied().cycle().take(64).collect();
        let rows = quantized(kernels, &x, 64);
        assert_bits(kernels, &[rows.scale(0)], &[1.0], "scale");
        for col in 0..64 {
            assert_eq!(rows.value(0, col), expected[col % 8], "{kernels:?}, column {col}");
        }
        let rows = quantized(kernels, &[0.0; 40], 40);
        assert_bits(kernels, &[rows.scale(0)], &[1e-5 / 127.0], "scale of zeros");
    }
}

#[test]
fn rows_that_are_not_finite_are_reported_and_zeroed() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for cols in [1, 8, 33, 64, 100] {
            for index in 0..cols {
                let mut x = vec![1.0; cols];
                let mut rows = Int8Rows::new(1, cols);
                for kernels in variants().into_iter().chain([scalar()]) {
                    x[index] = 1.0;
                    kernels.quantize(&x, rows.row_mut(0)).unwrap();
                    x[index] = bad;
                    x[cols - 1] = bad;
                    assert_eq!(kernels.quantize(&x, rows.row_mut(0)), Err(NonFinite { index }));
                    assert_eq!(rows.scale(0).to_bits(), 0);
                    assert!((0..cols).all(|col| rows.value(0, col) == 0));
                    x[cols - 1] = 1.0;
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn products_equal_on_random_shapes(
        rows in 1_usize..40,
        cols in 1_usize..3000,
        n in 1_usize..20,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let w = TernaryMatrix::from_trits(rows, cols, 1.7e-3, &random.trits(rows * cols)).unwrap();
        let x = random.floats(n * cols);
        compare(&w, &x);
        let blocks = blocks(&w, &mut random);
        compare(&blocks, &x);
        compare_blocks(&blocks, &x);
    }

    #[test]
    fn any_finite_row_is_quantised_alike(
        x in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO, 1..100),
    ) {
        assert_quantised_alike(&x);
    }

    #[test]
    fn any_bits_are_refused_alike(bits in prop::collection::vec(any::<u32>(), 1..70)) {
        let x: Vec<f32> = bits.iter().copied().map(f32::from_bits).collect();
        let mut rows = Int8Rows::new(1, x.len());
        let expected = scalar().quantize(&x, rows.row_mut(0));
        for kernels in variants() {
            prop_assert_eq!(kernels.quantize(&x, rows.row_mut(0)), expected);
        }
    }
}
