//! Instruction sets and the proofs that they may be used.

use std::{error::Error, fmt, str::FromStr};

/// An instruction set that the kernels are written for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the specification of every other variant.
    Scalar,
    /// x86-64 with AVX2, FMA, F16C, BMI1 and BMI2.
    Avx2,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Self; 2] = [Self::Scalar, Self::Avx2];

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
            Self::Avx2 => "avx2",
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
        assert_eq!(error.to_string(), "no instruction set \"sse9\"; expected one of scalar avx2");
    }

    #[test]
    fn scalar_is_always_there() {
        assert!(Isa::supported().contains(&Isa::Scalar));
        assert_eq!(Isa::supported().last(), Some(&Isa::detect()));
    }
}
