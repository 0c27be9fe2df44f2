//! Rows of made-up weights in the storage of each type.

use half::f16;

use super::random::{GROUP, Group, Stream};
use super::shape::{HeadType, TernaryType};
use crate::model_file::ternary::pack_codes;

/// Weights of a TQ1_0, TQ2_0 or Q6_K block.
const LARGE_BLOCK: usize = 256;

/// Returns norm weights around 1, as F32.
pub(super) fn norm(stream: &Stream, length: usize) -> Vec<u8> {
    (0..length as u64).flat_map(|at| (0.75 + 0.5 * stream.unit(at)).to_le_bytes()).collect()
}

/// Appends one row of ternary codes; rows are whole blocks, which the file's layout has checked.
pub(super) fn ternary(kind: TernaryType, scale: f16, codes: &[u8], out: &mut Vec<u8>) {
    match kind {
        TernaryType::I2S => {
            let start = out.len();
            out.resize(start + codes.len() / 4, 0);
            pack_codes(codes, &mut out[start..]);
        }
        TernaryType::Tq1_0 => {
            for block in codes.chunks_exact(LARGE_BLOCK) {
                tq1_0(block, out);
                out.extend(scale.to_le_bytes());
            }
        }
        TernaryType::Tq2_0 => {
            for block in codes.chunks_exact(LARGE_BLOCK) {
                // Byte m of a half holds elements m, 32 + m, 64 + m, 96 + m, lowest bits first.
                for half in block.chunks_exact(128) {
                    out.extend((0..32).map(|m| {
                        half[m] | half[32 + m] << 2 | half[64 + m] << 4 | half[96 + m] << 6
                    }));
                }
                out.extend(scale.to_le_bytes());
            }
        }
        TernaryType::Q2_0 => {
            for block in codes.chunks_exact(64) {
                out.extend(scale.to_le_bytes());
                out.extend(block.chunks_exact(4).map(|c| c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6));
            }
        }
    }
}

/// Appends the 52 bytes of a TQ1_0 block: base-3 numbers of five digits, stored as the fixed-point
/// fraction `n / 243` in 8 bits, so that multiplying by 3 brings the digits to the top in turn.
///
/// Elements 0..160 are five apart by 32, elements 160..240 five apart by 16, and the last 16 four
/// apart by 4.
fn tq1_0(block: &[u8], out: &mut Vec<u8>) {
    let fraction = |digits: u16| {
        // Rounded up, so that the digits survive the multiplications.
        let byte = (digits * 256).div_ceil(243);
        u8::try_from(byte).expect("242 * 256 / 243 rounds up to 255")
    };
    let number = |start: usize, stride: usize, count: usize| {
        (0..count).fold(0, |n, digit| n * 3 + u16::from(block[start + digit * stride]))
    };
    out.extend((0..32).map(|m| fraction(number(m, 32, 5))));
    out.extend((0..16).map(|m| fraction(number(160 + m, 16, 5))));
    // The fifth digit is zero.
    out.extend((0..4).map(|m| fraction(number(240 + m, 4, 4) * 3)));
}

/// Encodes rows of the embedding or the head.
#[derive(Debug)]
pub(super) struct DenseEncoder {
    kind: HeadType,
    /// A power of two, so that every product with it is exact.
    unit: f16,
}

impl DenseEncoder {
    /// Chooses the unit for rows of `cols` weights: logits of a normed state then spread by
    /// about 2.
    pub(super) fn new(kind: HeadType, cols: usize) -> Self {
        // Root mean square of value times scale: 18 for the one, 2.7 for the other.
        const SPREAD: f32 = 49.0;
        #[expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
        let wanted = 2.0 / (cols as f32).sqrt() / SPREAD;
        let mut unit = 1.0_f32;
        while unit > wanted && unit > 1.0 / 16_384.0 {
            unit /= 2.0;
        }
        Self { kind, unit: f16::from_f32(unit) }
    }

    /// Appends one row; rows are whole blocks, which the file's layout has checked.
    pub(super) fn row(&self, groups: &[Group], out: &mut Vec<u8>) {
        match self.kind {
            HeadType::F16 => {
                let unit = self.unit.to_f32();
                for group in groups {
                    // At most 7 significant bits times a power of two: exact in f16.
                    out.extend(
                        products(group)
                            .into_iter()
                            .flat_map(|value| f16::from_f32(unit * f32::from(value)).to_le_bytes()),
                    );
                }
            }
            HeadType::Q8_0 => {
                for pair in groups.chunks_exact(2) {
                    out.extend(self.unit.to_le_bytes());
                    for group in pair {
                        out.extend(products(group).map(i8::cast_unsigned));
                    }
                }
            }
            HeadType::Q6K => {
                for block in groups.chunks_exact(LARGE_BLOCK / GROUP) {
                    self.q6_k(block, out);
                }
            }
        }
    }

    /// Appends a Q6_K block: low nibbles, high bit pairs, scales, unit.
    fn q6_k(&self, groups: &[Group], out: &mut Vec<u8>) {
        let mut low = [0_u8; 128];
        let mut high = [0_u8; 64];
        let values = groups.iter().flat_map(|group| group.values);
        for (at, value) in values.enumerate() {
            let code = (value + 32).cast_unsigned();
            let (half, quarter, lane) = (at / 128, at % 128 / 32, at % 32);
            low[half * 64 + quarter % 2 * 32 + lane] |= (code & 15) << (quarter / 2 * 4);
            high[half * 32 + lane] |= (code >> 4) << (quarter * 2);
        }
        out.extend(low);
        out.extend(high);
        out.extend(groups.iter().map(|group| group.scale.cast_unsigned()));
        out.extend(self.unit.to_le_bytes());
    }
}

/// Returns value times scale: at most 31 * 4 = 124 in magnitude.
fn products(group: &Group) -> [i8; GROUP] {
    group.values.map(|value| value * group.scale)
}
