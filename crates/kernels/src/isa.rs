//! Instruction sets and the proofs that they may be used.

use std::{error::Error, fmt, str::FromStr};

/// An instruction set that the kernels are written for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the specification of every other variant.
    Scalar,
    /// aarch64 with NEON, as every one has it.
    Neon,
    /// aarch64 with NEON and the dot product of bytes.
    NeonDot,
    /// aarch64 with NEON, the dot product and the matrix product of bytes.
    NeonI8mm,
    /// x86-64 with AVX2, FMA, F16C, BMI1 and BMI2.
    Avx2,
    /// x86-64 with all of AVX2 and the dot product of bytes.
    AvxVnni,
    /// x86-64 with all of AVX2, and AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Self; 7] = [
        Self::Scalar,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
    ];

    /// Returns the fastest instruction set of this CPU.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_supported()).unwrap_or(Self::Scalar)
    }

    /// Returns every instruction set of this CPU, slowest first.
    pub fn supported() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_supported()).collect()
    }

    /// Returns whether this CPU has the instruction set.
    pub fn is_supported(self) -> bool {
        crate::Kernels::new(self).is_some()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::NeonDot => "dotprod",
            Self::NeonI8mm => "i8mm",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
        })
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| UnknownIsa { name: name.to_owned() })
    }
}

/// The name of no instruction set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa {
    /// The name given.
    pub name: String,
}

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no instruction set {:?}; expected one of", self.name)?;
        for isa in Isa::ALL {
            write!(f, " {isa}")?;
        }
        Ok(())
    }
}

impl Error for UnknownIsa {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no instruction set \"sse9\"; expected one of scalar neon dotprod i8mm avx2 avx-vnni \
             avx512"
        );
    }

    #[test]
    fn scalar_is_always_there() {
        assert!(Isa::supported().contains(&Isa::Scalar));
        assert_eq!(Isa::supported().last(), Some(&Isa::detect()));
    }
}
