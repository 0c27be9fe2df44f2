//! Dense matrices: dequantisation and products.

use crate::{
    ColumnsMut, DenseMatrix, DenseType,
    dense::{f16_to_f32, q4_0, q6_k, q8_0},
    scalar::lanes,
};

pub(crate) fn matmul(w: &DenseMatrix, x: &[f32], mut out: ColumnsMut<'_>) {
    let mut weights = vec![0.0; w.cols()];
    for (index, at) in out.columns().enumerate() {
        row(w.kind(), w.row_bytes(at), &mut weights);
        for (t, x) in x.chunks_exact(w.cols()).enumerate() {
            out.row_mut(t)[index] = lanes::dot(&weights, x);
        }
    }
}

pub(crate) fn rows(w: &DenseMatrix, rows: &[u32], x: &[f32], out: &mut [f32]) {
    let mut weights = vec![0.0; w.cols()];
    for (at, out) in rows.iter().zip(out) {
        row(w.kind(), w.row_bytes(*at as usize), &mut weights);
        *out = lanes::dot(&weights, x);
    }
}

pub(crate) fn row(kind: DenseType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        DenseType::F32 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        DenseType::F16 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f16_to_f32(u16::from_le_bytes(*bytes));
            }
        }
        DenseType::Bf16 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        DenseType::Q8_0 => {
            let blocks = bytes.as_chunks::<{ q8_0::BYTES }>().0;
            for (block, out) in blocks.iter().zip(out.as_chunks_mut().0) {
                block_q8_0(block, out);
            }
        }
        DenseType::Q4_0 => {
            let blocks = bytes.as_chunks::<{ q4_0::BYTES }>().0;
            for (block, out) in blocks.iter().zip(out.as_chunks_mut().0) {
                block_q4_0(block, out);
            }
        }
        DenseType::Q6K => {
            let blocks = bytes.as_chunks::<{ q6_k::BYTES }>().0;
            for (block, out) in blocks.iter().zip(out.as_chunks_mut().0) {
                block_q6_k(block, out);
            }
        }
    }
}

fn block_q8_0(block: &[u8; q8_0::BYTES], out: &mut [f32; q8_0::WEIGHTS]) {
    let scale = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
    for (value, out) in block[2..].iter().zip(out) {
        *out = scale * f32::from(value.cast_signed());
    }
}

fn block_q4_0(block: &[u8; q4_0::BYTES], out: &mut [f32; q4_0::WEIGHTS]) {
    let scale = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
    let (low, high) = out.split_at_mut(q4_0::WEIGHTS / 2);
    for (codes, (low, high)) in block[2..].iter().zip(low.iter_mut().zip(high)) {
        let weight = |code: u8| scale * f32::from(code.cast_signed() - q4_0::ZERO);
        // As for Q6_K: -0 becomes +0.
        *low = weight(codes & 15) + 0.0;
        *high = weight(codes >> 4) + 0.0;
    }
}

fn block_q6_k(block: &[u8; q6_k::BYTES], out: &mut [f32; q6_k::WEIGHTS]) {
    let scale = f16_to_f32(u16::from_le_bytes([block[q6_k::SCALE], block[q6_k::SCALE + 1]]));
    for (i, out) in out.iter_mut().enumerate() {
        let (half, j, l) = (i / q6_k::HALF, i % q6_k::HALF / 32, i % 32);
        let low = block[half * 64 + j % 2 * 32 + l] >> (j / 2 * 4) & 0x0f;
        let high = block[q6_k::HIGH + half * 32 + l] >> (2 * j) & 0b11;
        let value = (low | high << 4).cast_signed() - q6_k::ZERO;
        let group = block[q6_k::SCALES + i / q6_k::GROUP].cast_signed();
        // The last addition only turns -0 into +0, which other variants get for nothing.
        *out = scale * f32::from(group) * f32::from(value) + 0.0;
    }
}
