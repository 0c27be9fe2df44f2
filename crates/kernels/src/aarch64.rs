//! Variants for aarch64: the vectors of NEON, and two ways to multiply bytes that came later.

mod dotprod;
mod i8mm;
mod neon;

pub(crate) use self::{dotprod::NeonDot, i8mm::NeonI8mm, neon::Neon};
