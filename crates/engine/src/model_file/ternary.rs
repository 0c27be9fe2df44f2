//! Ternary matrices from every storage this version reads.

use tercet_kernels::{AlignedBytes, DenseType, TernaryMatrix, WeightBytes};

use super::error::ModelError;
use super::folder::PackedScale;
use super::folder::shards::{ElementType, Entry};
use super::tensors::{Tensor, read_floats};

/// Elements of one I2_S block.
pub(crate) const BLOCK: usize = 128;
/// Bytes of one I2_S block.
pub(crate) const BLOCK_BYTES: usize = 32;
/// Bytes after the elements of an I2_S tensor; the first four are the scale.
pub(crate) const I2S_TAIL: usize = 32;
/// Code of weight 0.
const ZERO: u8 = 1;
/// Smallest scale absmean gives, as in training.
const MIN_ABSMEAN: f64 = 1e-5;

/// Packs codes (weight + 1) of a whole number of blocks: byte `p` of a block holds elements `p`,
/// `32 + p`, `64 + p` and `96 + p`, highest bits first.
pub(crate) fn pack_codes(codes: &[u8], bytes: &mut [u8]) {
    let blocks = codes.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES));
    for (codes, bytes) in blocks {
        let (first, rest) = codes.split_at(BLOCK_BYTES);
        let (second, rest) = rest.split_at(BLOCK_BYTES);
        let (third, fourth) = rest.split_at(BLOCK_BYTES);
        for (((byte, a), b), (c, d)) in
            bytes.iter_mut().zip(first).zip(second).zip(third.iter().zip(fourth))
        {
            *byte = a << 6 | b << 4 | c << 2 | d;
        }
    }
}

/// Unpacks a whole number of blocks into codes; the inverse of [`pack_codes`].
pub(crate) fn unpack_codes(bytes: &[u8], codes: &mut [u8]) {
    let blocks = codes.chunks_exact_mut(BLOCK).zip(bytes.chunks_exact(BLOCK_BYTES));
    for (codes, bytes) in blocks {
        for (quarter, shift) in codes.chunks_exact_mut(BLOCK_BYTES).zip([6, 4, 2, 0]) {
            for (code, byte) in quarter.iter_mut().zip(bytes) {
                *code = byte >> shift & 3;
            }
        }
    }
}

/// Packs a matrix row by row, each row padded to whole blocks.
struct Packer {
    packed: AlignedBytes,
    codes: Vec<u8>,
    cols: usize,
    filled: usize,
}

impl Packer {
    fn new(rows: usize, cols: usize) -> Self {
        let padded = cols.next_multiple_of(BLOCK);
        Self {
            packed: AlignedBytes::zeroed(rows * padded / 4),
            codes: vec![ZERO; padded],
            cols,
            filled: 0,
        }
    }

    /// Appends the row that `fill` writes as codes.
    fn push(&mut self, fill: impl FnOnce(&mut [u8])) {
        fill(&mut self.codes[..self.cols]);
        let length = self.codes.len() / 4;
        pack_codes(&self.codes, &mut self.packed[self.filled..self.filled + length]);
        self.filled += length;
    }
}

/// Builds the matrix and checks scale and codes.
fn finish(tensor: &Tensor, scale: f32, packed: WeightBytes) -> Result<TernaryMatrix, ModelError> {
    if !(scale.is_finite() && scale > 0.0) {
        return Err(tensor.error(format!("has the scale {scale}, expected a positive number")));
    }
    let matrix = TernaryMatrix::from_packed(tensor.rows, tensor.cols, scale, packed);
    let matrix =
        matrix.map_err(|error| tensor.error(format!("does not fit its shape: {error}")))?;
    matrix.validate().map_err(|error| tensor.error(format!("is damaged: {error}")))?;
    Ok(matrix)
}

/// Reads I2_S. Rows of whole blocks are used where they are; others are repacked, since blocks of
/// the file then run across rows.
pub(crate) fn read_i2s(tensor: &Tensor) -> Result<TernaryMatrix, ModelError> {
    let bytes = tensor.bytes();
    let (elements, tail) = bytes.split_at(bytes.len() - I2S_TAIL);
    let scale = tail.first_chunk().map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes));
    if tensor.cols.is_multiple_of(BLOCK) {
        let range = tensor.range.start..tensor.range.end - I2S_TAIL;
        return finish(tensor, scale, tensor.file.share(range));
    }
    let mut packer = Packer::new(tensor.rows, tensor.cols);
    let mut unpacked = [0; BLOCK];
    // Codes of the current block that no row has taken yet.
    let mut rest: &[u8] = &[];
    let mut blocks = elements.chunks_exact(BLOCK_BYTES);
    let mut row = vec![0; tensor.cols];
    for _ in 0..tensor.rows {
        let mut filled = 0;
        while filled < tensor.cols {
            if rest.is_empty() {
                let Some(block) = blocks.next() else {
                    return Err(tensor.error("ends before its last row"));
                };
                unpack_codes(block, &mut unpacked);
                rest = &unpacked;
            }
            let take = rest.len().min(tensor.cols - filled);
            let (taken, left) = rest.split_at(take);
            row[filled..filled + take].copy_from_slice(taken);
            filled += take;
            rest = left;
        }
        packer.push(|codes| codes.copy_from_slice(&row));
    }
    finish(tensor, scale, WeightBytes::owned(packer.packed))
}

/// Reads the packing of transformers: output row `i * n + p` is in bits `2i` of byte row `p` of
/// `n`.
pub(crate) fn read_packed(
    tensor: &Tensor,
    scale: &Entry,
    rule: PackedScale,
) -> Result<TernaryMatrix, ModelError> {
    let scale_bytes = &scale.file.bytes()[scale.range.clone()];
    let kind = match scale.dtype {
        ElementType::F32 => DenseType::F32,
        ElementType::F16 => DenseType::F16,
        _ => DenseType::Bf16,
    };
    let stored = read_floats(kind, scale_bytes).and_then(|values| values.first().copied());
    let stored = stored.unwrap_or(f32::NAN);
    if !(stored.is_finite() && stored > 0.0) {
        let problem = format!("has the weight_scale {stored}, expected a positive number");
        return Err(tensor.error(problem));
    }
    let scale = match rule {
        PackedScale::Multiplier => stored,
        PackedScale::Divisor => 1.0 / stored,
    };
    let bytes = tensor.bytes();
    let byte_rows = tensor.rows.div_ceil(4);
    let mut packer = Packer::new(tensor.rows, tensor.cols);
    for row in 0..tensor.rows {
        let (shift, byte_row) = (2 * (row / byte_rows), row % byte_rows);
        let source = &bytes[byte_row * tensor.cols..][..tensor.cols];
        packer.push(|codes| {
            for (code, byte) in codes.iter_mut().zip(source) {
                *code = byte >> shift & 3;
            }
        });
    }
    finish(tensor, scale, WeightBytes::owned(packer.packed))
}

/// Quantises training weights: `scale = max(mean |w|, 1e-5)`, weight `clamp(round(w / scale))`,
/// ties to even.
///
/// The mean is summed in f64 by 16 lanes, lane `i` taking elements `i`, `i + 16`, ..., folded in
/// the order 8, 4, 2, 1: one fixed order that also runs at memory speed.
pub(crate) fn read_master(tensor: &Tensor, kind: DenseType) -> Result<TernaryMatrix, ModelError> {
    let row_bytes = tensor.bytes().len() / tensor.rows;
    let rows = || tensor.bytes().chunks_exact(row_bytes);
    let floats = |row: &[u8]| {
        read_floats(kind, row).ok_or_else(|| tensor.error("is not of a floating-point type"))
    };
    let mut lanes = [0.0_f64; 16];
    let mut at = 0;
    for row in rows() {
        let values = floats(row)?;
        // A row may begin in any lane; from lane 0 on, whole groups go through all of them.
        let (begin, rest) = values.split_at(values.len().min((16 - at % 16) % 16));
        for (lane, value) in lanes[at % 16..].iter_mut().zip(begin) {
            *lane += f64::from(*value).abs();
        }
        for group in rest.chunks(16) {
            for (lane, value) in lanes.iter_mut().zip(group) {
                *lane += f64::from(*value).abs();
            }
        }
        at += values.len();
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a count below 2^53 is exact")]
    let mean = lanes[0] / (at as f64);
    if !mean.is_finite() {
        return Err(tensor.error(format!("has the mean magnitude {mean}, expected finite weights")));
    }
    let scale = mean.max(MIN_ABSMEAN);
    let mut packer = Packer::new(tensor.rows, tensor.cols);
    for row in rows() {
        let values = floats(row)?;
        packer.push(|codes| {
            for (code, value) in codes.iter_mut().zip(values) {
                *code = quantize(f64::from(value) / scale);
            }
        });
    }
    finish(tensor, super::folder::narrow(scale), WeightBytes::owned(packer.packed))
}

/// Returns the code of the nearest of -1, 0 and 1, ties to even.
fn quantize(value: f64) -> u8 {
    // Rounding half to even sends exactly the open interval above 0.5 to 1, and so below.
    ZERO + u8::from(value > 0.5) - u8::from(value < -0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_follow_the_bit_order() {
        let codes: Vec<u8> = (0..256_u32).map(|i| (i * 7 % 3) as u8).collect();
        let mut bytes = [0; 64];
        pack_codes(&codes, &mut bytes);
        for (at, code) in codes.iter().enumerate() {
            let (block, inside) = (at / 128, at % 128);
            let byte = bytes[block * 32 + inside % 32];
            assert_eq!(byte >> (6 - 2 * (inside / 32)) & 3, *code, "element {at}");
        }
        let mut back = [0; 256];
        unpack_codes(&bytes, &mut back);
        assert_eq!(back[..], codes[..]);
    }

    #[test]
    fn quantisation_rounds_half_to_even() {
        let cases = [(0.5, 1), (-0.5, 1), (0.500_001, 2), (-0.500_001, 0), (1.5, 2), (-9.0, 0)];
        for (value, code) in cases {
            assert_eq!(quantize(value), code, "{value}");
        }
    }
}
