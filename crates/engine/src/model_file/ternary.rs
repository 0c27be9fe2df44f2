//! Ternary matrices from every storage this version reads.

pub(crate) mod blocks;
pub(crate) mod encode;
pub(crate) mod master;

use tercet_kernels::{AlignedBytes, DenseType, ShapeError, TernaryMatrix, WeightBytes};

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
    fn push<E>(&mut self, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        fill(&mut self.codes[..self.cols])?;
        let length = self.codes.len() / 4;
        pack_codes(&self.codes, &mut self.packed[self.filled..self.filled + length]);
        self.filled += length;
        Ok(())
    }
}

/// Builds the matrix and checks scale and codes.
fn finish(tensor: &Tensor, scale: f32, packed: WeightBytes) -> Result<TernaryMatrix, ModelError> {
    if !(scale.is_finite() && scale > 0.0) {
        return Err(tensor.error(format!("has the scale {scale}, expected a positive number")));
    }
    let scale = scaled(tensor, scale)?;
    check(tensor, TernaryMatrix::from_packed(tensor.rows, tensor.cols, scale, packed))
}

/// Multiplies a scale with the tensor's factor, if it has one.
fn scaled(tensor: &Tensor, scale: f32) -> Result<f32, ModelError> {
    let Some(factor) = tensor.factor else { return Ok(scale) };
    let product = scale * factor;
    if product.is_finite() && (product > 0.0 || scale == 0.0) {
        return Ok(product);
    }
    let problem = format!("has the scale {scale} and the factor {factor}, a product out of range");
    Err(tensor.error(problem))
}

/// Checks shape and codes of a matrix.
fn check(
    tensor: &Tensor,
    matrix: Result<TernaryMatrix, ShapeError>,
) -> Result<TernaryMatrix, ModelError> {
    let mut matrix =
        matrix.map_err(|error| tensor.error(format!("does not fit its shape: {error}")))?;
    if tensor.trusted {
        return Ok(matrix.trusted());
    }
    matrix.validate().map_err(|error| tensor.error(format!("is damaged: {error}")))?;
    Ok(matrix)
}

/// Reads I2_S. Rows of whole blocks are used where they are; others are repacked, since blocks of
/// the file then run across rows.
pub(crate) fn read_i2s(tensor: &Tensor) -> Result<TernaryMatrix, ModelError> {
    let (rows, cols) = (tensor.rows, tensor.cols);
    let bytes = tensor.bytes();
    let (elements, tail) = bytes.split_at(bytes.len() - I2S_TAIL);
    let scale = tail.first_chunk().map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes));
    if cols.is_multiple_of(BLOCK) {
        if tensor.paired_heads.is_none() {
            let range = tensor.range.start..tensor.range.end - I2S_TAIL;
            return finish(tensor, scale, tensor.file.share(range));
        }
        let mut packed = AlignedBytes::zeroed(elements.len());
        for (row, out) in packed.chunks_exact_mut(cols / 4).enumerate() {
            out.copy_from_slice(&elements[tensor.stored_row(row) * (cols / 4)..][..cols / 4]);
        }
        return finish(tensor, scale, packed.into());
    }
    let mut packer = Packer::new(rows, cols);
    // A row may begin and end inside blocks; these are all it touches.
    let mut codes = vec![0; (cols.div_ceil(BLOCK) + 1) * BLOCK];
    for row in 0..rows {
        let start = tensor.stored_row(row) * cols;
        let (first, end) = (start / BLOCK, (start + cols).div_ceil(BLOCK));
        let Some(blocks) = elements.get(first * BLOCK_BYTES..end * BLOCK_BYTES) else {
            return Err(tensor.error("ends before its last row"));
        };
        unpack_codes(blocks, &mut codes);
        packer.push(|row| {
            row.copy_from_slice(&codes[start - first * BLOCK..][..cols]);
            Ok::<_, ModelError>(())
        })?;
    }
    finish(tensor, scale, packer.packed.into())
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
            Ok::<_, ModelError>(())
        })?;
    }
    finish(tensor, scale, packer.packed.into())
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
}
