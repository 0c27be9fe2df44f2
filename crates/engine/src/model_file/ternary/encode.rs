//! Ternary rows in the storage of each type.

use std::fmt;
use std::str::FromStr;

use half::f16;

use super::pack_codes;
use crate::model_file::gguf::types;
use crate::model_file::names::{UnknownName, parse};

/// Storage of ternary matrices.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum TernaryType {
    /// bitnet.cpp's: 2 bits a weight, one scale a matrix.
    I2S,
    /// llama.cpp's: five weights in 8 bits, one scale for 256.
    Tq1_0,
    /// llama.cpp's: 2 bits a weight, one scale for 256.
    Tq2_0,
    /// llama.cpp's: 2 bits a weight, one scale for 64.
    Q2_0,
}

impl TernaryType {
    /// All types.
    pub const ALL: [Self; 4] = [Self::I2S, Self::Tq1_0, Self::Tq2_0, Self::Q2_0];

    /// Returns the type number of tensors.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::I2S => types::I2_S,
            Self::Tq1_0 => types::TQ1_0,
            Self::Tq2_0 => types::TQ2_0,
            Self::Q2_0 => types::Q2_0,
        }
    }

    /// Returns `general.file_type`: bitnet.cpp's number for I2_S, llama.cpp's for the others.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::I2S => 40,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
            Self::Q2_0 => 41,
        }
    }

    /// Returns the weights that share a scale, `None` if all of a matrix do.
    pub(crate) fn block(self) -> Option<usize> {
        match self {
            Self::I2S => None,
            Self::Tq1_0 | Self::Tq2_0 => Some(256),
            Self::Q2_0 => Some(64),
        }
    }
}

impl fmt::Display for TernaryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I2S => "i2_s",
            Self::Tq1_0 => "tq1_0",
            Self::Tq2_0 => "tq2_0",
            Self::Q2_0 => "q2_0",
        })
    }
}

impl FromStr for TernaryType {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        parse("ternary type", &Self::ALL, name)
    }
}

/// Appends one row of codes, of whole blocks; `scale` says the scale of a block by its index in the
/// row. I2_S has its scale elsewhere.
pub(crate) fn row(
    kind: TernaryType,
    codes: &[u8],
    scale: impl Fn(usize) -> f16,
    out: &mut Vec<u8>,
) {
    let Some(size) = kind.block() else {
        let start = out.len();
        out.resize(start + codes.len() / 4, 0);
        pack_codes(codes, &mut out[start..]);
        return;
    };
    for (index, block) in codes.chunks_exact(size).enumerate() {
        let scale = scale(index).to_le_bytes();
        match kind {
            TernaryType::I2S => {}
            TernaryType::Tq1_0 => {
                tq1_0(block, out);
                out.extend(scale);
            }
            TernaryType::Tq2_0 => {
                // Byte m of a half holds elements m, 32 + m, 64 + m, 96 + m, lowest bits first.
                for half in block.chunks_exact(128) {
                    out.extend((0..32).map(|m| {
                        half[m] | half[32 + m] << 2 | half[64 + m] << 4 | half[96 + m] << 6
                    }));
                }
                out.extend(scale);
            }
            TernaryType::Q2_0 => {
                out.extend(scale);
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
