use proptest::prelude::*;
use tercet_kernels::{DenseMatrix, DenseType, Isa, Kernels, MatrixMut};

use crate::support::{Random, assert_bits, scalar, variants};

/// A matrix of any stored bytes, with scales and numbers kept finite.
fn matrix(random: &mut Random, kind: DenseType, rows: usize, cols: usize) -> DenseMatrix {
    let mut bytes = random.bytes(rows * kind.row_bytes(cols));
    let finite_half = |bytes: &mut [u8]| bytes[1] = bytes[1] & 0x83 | 0x28;
    match kind {
        DenseType::F32 => bytes.chunks_exact_mut(4).for_each(|b| b[3] = b[3] & 0x80 | 0x3d),
        DenseType::Bf16 => bytes.chunks_exact_mut(2).for_each(|b| b[1] = b[1] & 0x80 | 0x3d),
        DenseType::F16 => bytes.chunks_exact_mut(2).for_each(finite_half),
        DenseType::Q8_0 => bytes.chunks_exact_mut(34).for_each(|b| finite_half(&mut b[..2])),
        DenseType::Q4_0 => bytes.chunks_exact_mut(18).for_each(|b| finite_half(&mut b[..2])),
        DenseType::Q6K => bytes.chunks_exact_mut(210).for_each(|b| finite_half(&mut b[208..])),
    }
    DenseMatrix::new(kind, rows, cols, bytes.as_slice().into()).unwrap()
}

fn product(kernels: Kernels, w: &DenseMatrix, x: &[f32], cuts: &[usize]) -> Vec<f32> {
    let n = x.len() / w.cols();
    let mut out = vec![f32::NAN; n * w.rows()];
    for part in MatrixMut::new(&mut out, n, w.rows()).split_columns(cuts) {
        kernels.dense_matmul(w, x, part);
    }
    out
}

fn weights(kernels: Kernels, w: &DenseMatrix, row: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; w.cols()];
    kernels.dense_row(w, row, &mut out);
    out
}

fn compare(w: &DenseMatrix, x: &[f32]) {
    let rows: Vec<_> = (0..w.rows()).map(|row| weights(scalar(), w, row)).collect();
    let mut expected = Vec::new();
    for x in x.chunks_exact(w.cols()) {
        expected.extend(rows.iter().map(|row| scalar().dot(row, x)));
    }
    let what = (w, x.len() / w.cols());
    assert_bits(Isa::Scalar, &product(scalar(), w, x, &[]), &expected, what);
    for kernels in variants() {
        for (row, expected) in rows.iter().enumerate() {
            assert_bits(kernels, &weights(kernels, w, row), expected, w);
        }
        assert_bits(kernels, &product(kernels, w, x, &[]), &expected, what);
        let cuts = [w.rows() / 3, w.rows() / 2];
        assert_bits(kernels, &product(kernels, w, x, &cuts), &expected, what);
    }
}

#[test]
fn products_equal_on_every_shape() {
    let mut random = Random(3);
    for kind in DenseType::ALL {
        let block = kind.block_weights();
        for cols in [1_usize, 2, 7, 8, 15, 16, 17, 33, 100, 256, 1024, 1040, 1280, 2560] {
            if !cols.is_multiple_of(block) {
                continue;
            }
            for rows in [1, 3, 4, 5, 9] {
                let w = matrix(&mut random, kind, rows, cols);
                for n in 1..=9 {
                    compare(&w, &random.floats(n * cols));
                }
            }
        }
    }
}

#[test]
fn every_half_precision_number_is_exact() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for kind in [DenseType::F16, DenseType::Bf16] {
        let w = DenseMatrix::new(kind, 1, 65536, bytes.as_slice().into()).unwrap();
        let expected = weights(scalar(), &w, 0);
        for kernels in variants() {
            assert_bits(kernels, &weights(kernels, &w, 0), &expected, kind);
        }
    }
}

#[test]
fn block_formats_dequantise_exactly() {
    // In f64 the products of scales and values are exact beyond doubt.
    let mut random = Random(4);
    let w = matrix(&mut random, DenseType::Q6K, 1, 2560);
    let found = weights(scalar(), &w, 0);
    for (block, found) in w.bytes().chunks_exact(210).zip(found.chunks_exact(256)) {
        let half = DenseMatrix::new(DenseType::F16, 1, 1, block[208..].into()).unwrap();
        let scale = f64::from(weights(scalar(), &half, 0)[0]);
        for (i, &found) in found.iter().enumerate() {
            let (half, j, l) = (i / 128, i % 128 / 32, i % 32);
            let low = block[half * 64 + l + 32 * (j % 2)] >> (4 * (j / 2)) & 15;
            let high = block[128 + half * 32 + l] >> (2 * j) & 3;
            let value = f64::from(low + 16 * high) - 32.0;
            let group = f64::from(block[192 + i / 16].cast_signed());
            assert_eq!(f64::from(found), scale * group * value);
        }
    }
    let w = matrix(&mut random, DenseType::Q4_0, 1, 2560);
    let found = weights(scalar(), &w, 0);
    for (block, found) in w.bytes().chunks_exact(18).zip(found.chunks_exact(32)) {
        let half = DenseMatrix::new(DenseType::F16, 1, 1, block[..2].into()).unwrap();
        let scale = f64::from(weights(scalar(), &half, 0)[0]);
        for (i, &found) in found.iter().enumerate() {
            let code = block[2 + i % 16] >> (4 * (i / 16)) & 15;
            assert_eq!(f64::from(found), scale * (f64::from(code) - 8.0));
        }
    }
}

#[test]
fn extreme_blocks_are_exact() {
    // The largest and the smallest scale, the most negative group, the extreme codes.
    for scale in [0x7bff_u16, 0x0001, 0x8001, 0x03ff] {
        let mut block = vec![0_u8; 210];
        block[64..128].fill(0xff);
        block[160..192].fill(0xff);
        block[192..208].fill(0x80);
        block[208..].copy_from_slice(&scale.to_le_bytes());
        let w = DenseMatrix::new(DenseType::Q6K, 1, 256, block.as_slice().into()).unwrap();
        compare(&w, &[1.0; 256]);
        let mut block = vec![0x80_u8; 34];
        block[..2].copy_from_slice(&scale.to_le_bytes());
        let w = DenseMatrix::new(DenseType::Q8_0, 1, 32, block.as_slice().into()).unwrap();
        compare(&w, &[1.0; 32]);
        compare(&w, &[1e-30; 64]);
        for codes in [0x00, 0xff, 0x80, 0x0f] {
            let mut block = vec![codes; 18];
            block[..2].copy_from_slice(&scale.to_le_bytes());
            let w = DenseMatrix::new(DenseType::Q4_0, 1, 32, block.as_slice().into()).unwrap();
            compare(&w, &[1.0; 32]);
        }
    }
}

proptest! {
    #[test]
    fn products_equal_on_random_shapes(
        kind in prop::sample::select(&DenseType::ALL[..]),
        rows in 1_usize..20,
        size in 1_usize..1500,
        n in 1_usize..14,
        seed: u64,
    ) {
        let mut random = Random(seed);
        let cols = size.next_multiple_of(kind.block_weights());
        let w = matrix(&mut random, kind, rows, cols);
        compare(&w, &random.floats(n * cols));
    }
}
