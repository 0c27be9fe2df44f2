//! Rows of made-up weights in the storage of each type.

use half::{bf16, f16};

use super::random::{GROUP, Group, Stream};
use super::shape::HeadType;

/// What one step of a dense weight is worth: a power of two, so that every product with it is
/// exact.
const DENSE_UNIT: f32 = 1.0 / 64.0;
/// Root mean square of dense weights: 18 for the value, 2.7 for the scale.
pub(super) const DENSE_SPREAD: f32 = 49.0 * DENSE_UNIT;
/// Weights of a Q6_K block.
const LARGE_BLOCK: usize = 256;

/// Returns norm weights around `gain`, as F32.
pub(super) fn norm(stream: &Stream, length: usize, gain: f32) -> Vec<u8> {
    norm_weights(stream, length, gain).flat_map(f32::to_le_bytes).collect()
}

/// Returns norm weights of either sign whose magnitudes are around `gain`, as F32.
pub(super) fn signed_norm(stream: &Stream, length: usize, gain: f32) -> Vec<u8> {
    let signed = |(at, weight): (u64, f32)| if stream.coin(at) { -weight } else { weight };
    (0..).zip(norm_weights(stream, length, gain)).map(signed).flat_map(f32::to_le_bytes).collect()
}

fn norm_weights(stream: &Stream, length: usize, gain: f32) -> impl Iterator<Item = f32> {
    (0..length as u64).map(move |at| gain * (0.75 + 0.5 * stream.unit(at)))
}

/// Encodes rows of the embedding or the head.
#[derive(Debug)]
pub(super) struct DenseEncoder {
    kind: HeadType,
    /// [`DENSE_UNIT`].
    unit: f16,
}

impl DenseEncoder {
    /// Makes an encoder whose weights spread by [`DENSE_SPREAD`].
    pub(super) fn new(kind: HeadType) -> Self {
        Self { kind, unit: f16::from_f32(DENSE_UNIT) }
    }

    /// Appends one row; rows are whole blocks, which the file's layout has checked.
    pub(super) fn row(&self, groups: &[Group], out: &mut Vec<u8>) {
        match self.kind {
            HeadType::F32 => out.extend(self.values(groups).flat_map(f32::to_le_bytes)),
            // At most 7 significant bits times a power of two: exact in both halves.
            HeadType::F16 => {
                out.extend(self.values(groups).flat_map(|v| f16::from_f32(v).to_le_bytes()));
            }
            HeadType::Bf16 => {
                out.extend(self.values(groups).flat_map(|v| bf16::from_f32(v).to_le_bytes()));
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
            HeadType::Q4_0 => {
                for pair in groups.chunks_exact(2) {
                    self.q4_0(pair, out);
                }
            }
        }
    }

    /// Returns the weights of a row.
    fn values<'a>(&self, groups: &'a [Group]) -> impl Iterator<Item = f32> + use<'a> {
        let unit = self.unit.to_f32();
        groups.iter().flat_map(products).map(move |value| unit * f32::from(value))
    }

    /// Appends a Q4_0 block: scale, then nibbles that count from -8, those of the second half of
    /// the block above those of the first.
    fn q4_0(&self, pair: &[Group], out: &mut Vec<u8>) {
        // The largest product, 124, becomes 7 of these.
        const STEP: i8 = 16;
        out.extend((self.unit * f16::from(STEP)).to_le_bytes());
        let code = |product: i8| {
            // To the nearest step, halves up.
            let steps = (i16::from(product) + 8).div_euclid(16).clamp(-8, 7);
            u8::try_from(steps + 8).expect("at least -8 + 8")
        };
        let mut products = pair.iter().map(products);
        if let (Some(first), Some(second)) = (products.next(), products.next()) {
            out.extend(first.into_iter().zip(second).map(|(a, b)| code(a) | code(b) << 4));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bits_are_near() {
        let mut groups = [Group::default(); 4];
        Stream::new(7, "head").groups(3, &mut groups);
        let encoder = DenseEncoder::new(HeadType::Q4_0);
        let mut bytes = Vec::new();
        encoder.row(&groups, &mut bytes);
        let mut found = Vec::new();
        for block in bytes.chunks_exact(18) {
            let step = f16::from_le_bytes([block[0], block[1]]).to_f32();
            let value = |code: u8| step * (f32::from(code) - 8.0);
            found.extend(block[2..].iter().map(|byte| value(byte & 15)));
            found.extend(block[2..].iter().map(|byte| value(byte >> 4)));
        }
        let exact: Vec<f32> = encoder.values(&groups).collect();
        assert_eq!(found.len(), exact.len());
        // Half a step, or what is above seven of them.
        let limit = 12.0 * encoder.unit.to_f32();
        for (found, exact) in found.iter().zip(&exact) {
            assert!((found - exact).abs() <= limit, "{found} for {exact}");
        }
        assert!(found.iter().any(|value| *value != 0.0));
    }
}
