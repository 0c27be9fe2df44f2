//! Variants under test, numbers to feed them, and the comparison of bits.

use std::fmt::Debug;

use tercet_kernels::{Isa, Kernels};

/// Returns the specification.
pub(crate) fn scalar() -> Kernels {
    Kernels::new(Isa::Scalar).expect("plain Rust runs everywhere")
}

/// Returns every other variant that runs here, and the stand-ins of all.
///
/// Under emulation of a whole CPU the stand-ins would show nothing that they do not show elsewhere,
/// and take most of the time.
pub(crate) fn variants() -> Vec<Kernels> {
    let vectors = || Isa::ALL.into_iter().filter(|&isa| isa != Isa::Scalar);
    let mut variants: Vec<_> = vectors().filter_map(Kernels::new).collect();
    if !on_emulated_cpu() {
        variants.extend(vectors().filter_map(Kernels::emulated));
    }
    variants
}

/// Returns whether the CPU itself is emulated, which makes everything slow: tests take fewer cases.
pub(crate) fn on_emulated_cpu() -> bool {
    std::env::var_os("TERCET_EMULATED_CPU").is_some_and(|value| value == "1")
}

/// A small generator (SplitMix64): tests must not depend on the day.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.bits() % u64::try_from(end).unwrap()).unwrap()
    }

    /// Returns bytes without any order.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.bits().to_le_bytes()[3]).collect()
    }

    /// Returns floats between -1 and 1 of very different magnitude.
    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let [.., a, b, c, d] = self.bits().to_le_bytes();
                let unit = f32::from(i16::from_le_bytes([a, b])) / 32768.0;
                unit * 2.0_f32.powi(-i32::from(c % 12)) + f32::from(d) * 1e-6
            })
            .collect()
    }

    pub(crate) fn trits(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| [-1, 0, 1][self.below(3)]).collect()
    }
}

/// Asserts equal bits; any NaN equals any other.
#[track_caller]
pub(crate) fn assert_bits(variant: impl Debug, found: &[f32], expected: &[f32], what: impl Debug) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
            "{variant:?} gives {found:e} ({:#010x}), the specification {expected:e} ({:#010x}), \
             element {i} of {what:?}",
            found.to_bits(),
            expected.to_bits()
        );
    }
}
