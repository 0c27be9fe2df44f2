//! The algorithms, once for vectors of every instruction set.
//!
//! An instruction set is two small traits: [`Lanes`], the [`LANES`] virtual lanes of f32 in however
//! many registers they take, and [`Products`], the multiplication of bytes in whatever width and by
//! whatever instruction there is. The value that implements them is the proof that the CPU has the
//! instructions, so the methods are safe to call; they and the algorithms are always inlined into
//! the one function of an instruction set that enables its features:
//!
//! ```text
//! Kernels::dot -> Vectors::run(Dot) -> Neon::run(Dot)      #[target_feature(enable = "neon")]
//!                                        `- Dot::run(neon) with every method of Lanes inlined
//! ```
//!
//! The module `emulated` implements both traits with plain arrays, in the widths and with the arithmetic of
//! every instruction set, so that the algorithms are tested also where the instructions are missing.

mod attention;
mod dense;
mod elements;
#[cfg(feature = "emulated")]
pub(crate) mod emulated;
mod exp;
mod reduce;
mod ternary;

pub(crate) use self::{
    attention::Attend,
    dense::{DenseMatmul, DenseRow},
    elements::{Add, Argmax, Relu2Mul, Rope, Scale, SiluMul},
    exp::Exp,
    reduce::{Dot, SumExp},
    ternary::{Quantize, TernaryMatmul, blocks::TernaryMatmulBlocks},
};
#[cfg(target_arch = "aarch64")]
use crate::aarch64::{Neon, NeonDot, NeonI8mm};
#[cfg(target_arch = "x86_64")]
use crate::x86_64::avx512::Avx512;
use crate::{Isa, LANES, TERNARY_BLOCK, pack::BLOCK_BYTES};

/// Defines methods of a trait whose bodies may use the instructions that the features enable.
///
/// A method is inlined into the caller, and with it the body, since the caller has the features.
macro_rules! methods {
    ($features:literal $(
        $(#[$attribute:meta])*
        fn $name:ident($($argument:ident: $type:ty),*) $(-> $output:ty)? $body:block
    )*) => {$(
        $(#[$attribute])*
        #[inline(always)]
        fn $name(self, $($argument: $type),*) $(-> $output)? {
            #[inline]
            #[target_feature(enable = $features)]
            fn enabled($($argument: $type),*) $(-> $output)? $body
            // SAFETY: `self` exists, so the CPU has the features.
            unsafe { enabled($($argument),*) }
        }
    )*};
}
pub(crate) use methods;

/// An operation on the virtual lanes.
pub(crate) trait Operation {
    type Output;

    /// Does it; to be marked `#[inline(always)]`.
    fn run<V: Lanes>(self, v: V) -> Self::Output;
}

/// An operation that multiplies bytes.
pub(crate) trait Product {
    /// Does it; to be marked `#[inline(always)]`.
    fn run<P: Products>(self, p: P);
}

/// The vectors of an instruction set whose variant is made of the algorithms here.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vectors {
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(NeonDot),
    #[cfg(target_arch = "aarch64")]
    NeonI8mm(NeonI8mm),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// The stand-in of an instruction set.
    #[cfg(feature = "emulated")]
    Emulated(Isa),
}

impl Vectors {
    /// Returns the vectors of an instruction set if the CPU has it and they are what it runs on.
    pub(crate) fn detect(isa: Isa) -> Option<Self> {
        match isa {
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::detect().map(Self::Neon),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => NeonDot::detect().map(Self::NeonDot),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => NeonI8mm::detect().map(Self::NeonI8mm),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().map(Self::Avx512),
            _ => None,
        }
    }

    pub(crate) fn isa(self) -> Isa {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => Isa::Neon,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(_) => Isa::NeonDot,
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(_) => Isa::NeonI8mm,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Isa::Avx512,
            #[cfg(feature = "emulated")]
            Self::Emulated(isa) => isa,
        }
    }

    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.run(operation),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(dot) => dot.lanes().run(operation),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(i8mm) => i8mm.lanes().run(operation),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.run(operation),
            #[cfg(feature = "emulated")]
            Self::Emulated(isa) => emulated::run(isa, operation),
        }
    }

    pub(crate) fn multiply(self, product: impl Product) {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.multiply(product),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(dot) => dot.multiply(product),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm(i8mm) => i8mm.multiply(product),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.multiply(product),
            #[cfg(feature = "emulated")]
            Self::Emulated(isa) => emulated::multiply(isa, product),
        }
    }
}

/// The [`LANES`] virtual lanes.
///
/// Every method is one operation of IEEE 754 in each lane unless it says otherwise.
pub(crate) trait Lanes: Copy {
    /// A number in each lane.
    type Floats: Copy;
    /// A signed number of 32 bits in each lane.
    type Ints: Copy;

    /// Whether 16 sums fit the registers beside what they are made of.
    const MANY: bool;

    fn splat(self, x: f32) -> Self::Floats;
    fn load(self, x: &[f32; LANES]) -> Self::Floats;
    fn store(self, to: &mut [f32; LANES], x: Self::Floats);
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn div(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Returns `a * b + c`, rounded once.
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Returns `a` where it is larger than `b`, `b` elsewhere, also where one is NaN.
    fn larger(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Returns `a` where it is smaller than `b`, `b` elsewhere, also where one is NaN.
    fn smaller(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Returns the larger of `largest` and the magnitude of `x`, by their bits: NaN is larger than
    /// infinity. The sign of `largest` must be clear.
    fn larger_magnitude(self, largest: Self::Floats, x: Self::Floats) -> Self::Floats;
    /// Rounds to the nearest whole number, ties to even.
    fn round(self, x: Self::Floats) -> Self::Floats;
    /// Returns `2^(n >> 1)` and `2^(n - (n >> 1))` for whole `n` from -252 to 254; anything for NaN.
    fn powers_of_two(self, n: Self::Floats) -> [Self::Floats; 2];
    /// Adds the lanes: `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn fold(self, x: Self::Floats) -> f32;

    fn splat_int(self, x: i32) -> Self::Ints;
    fn add_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    fn sub_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    fn store_ints(self, to: &mut [i32; LANES], x: Self::Ints);
    /// Rounds to the nearest whole number, ties to even; magnitudes below 2^31 only.
    fn to_ints(self, x: Self::Floats) -> Self::Ints;
    fn to_floats(self, x: Self::Ints) -> Self::Floats;
    /// Stores numbers from -128 to 127 as bytes.
    fn store_as_bytes(self, to: &mut [u8; LANES], x: Self::Ints);

    /// Converts signed bytes.
    fn widen_bytes(self, x: &[u8; LANES]) -> Self::Floats;
    /// Converts numbers of half precision.
    fn widen_f16(self, x: &[u8; 2 * LANES]) -> Self::Floats;
    /// Converts upper halves of numbers of single precision.
    fn widen_bf16(self, x: &[u8; 2 * LANES]) -> Self::Floats;

    /// Asks for the memory at an offset from the start of `bytes`, which need not exist.
    fn prefetch(self, bytes: &[u8], offset: usize);
}

/// Vectors of bytes, and the products of codes of ternary weights with activations.
pub(crate) trait Products: Copy {
    /// The lanes of the results.
    type Lanes: Lanes;
    /// A packed block as it is read.
    type Packed: Copy;
    /// A vector of codes, or of activations.
    type Bytes: Copy;
    /// Sums of products, as the instruction makes them.
    type Run: Copy;
    /// Sums of runs, 32 bits each.
    type Sums: Copy;

    /// Vectors of codes in a block: 2, 4 or 8.
    const PARTS: usize;
    /// Blocks whose products surely fit a run.
    const BLOCKS: usize;
    /// Rows, and tokens, of the largest tile.
    const TILE: Tile;

    fn lanes(self) -> Self::Lanes;
    fn load_packed(self, block: &[u8; BLOCK_BYTES]) -> Self::Packed;
    /// Returns the codes of the part number `PART` of a block.
    fn codes<const PART: usize>(self, packed: Self::Packed) -> Self::Bytes;
    /// Returns the activations that belong to the same columns.
    fn activations<const PART: usize>(self, block: &[u8; TERNARY_BLOCK]) -> Self::Bytes;

    fn empty_run(self) -> Self::Run;
    /// Adds the products of codes and activations.
    fn dot(self, run: Self::Run, codes: Self::Bytes, x: Self::Bytes) -> Self::Run;
    fn empty_sums(self) -> Self::Sums;
    fn add_run(self, sums: Self::Sums, run: Self::Run) -> Self::Sums;
    fn total(self, sums: Self::Sums) -> i32;
    /// Returns the total of each of 16 runs.
    fn totals_of_rows(self, runs: &[Self::Run; LANES]) -> <Self::Lanes as Lanes>::Ints;

    /// Adds the products of each row of codes with each row of activations.
    ///
    /// An instruction that multiplies more than one row with one row keeps its sums where it likes:
    /// what is added here is read by [`Self::totals`] only.
    #[inline(always)]
    fn multiply<const R: usize, const T: usize>(
        self,
        runs: &mut [[Self::Run; T]; R],
        codes: [Self::Bytes; R],
        x: [Self::Bytes; T],
    ) {
        for t in 0..T {
            for r in 0..R {
                runs[r][t] = self.dot(runs[r][t], codes[r], x[t]);
            }
        }
    }

    /// Returns the totals of what [`Self::multiply`] has added.
    #[inline(always)]
    fn totals<const R: usize, const T: usize>(self, sums: [[Self::Sums; T]; R]) -> [[i32; T]; R] {
        let mut totals = [[0; T]; R];
        for r in 0..R {
            for t in 0..T {
                totals[r][t] = self.total(sums[r][t]);
            }
        }
        totals
    }
}

/// The largest tile of a product of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tile {
    /// Two rows and four tokens: for 16 registers.
    Small,
    /// Four rows and four tokens: for 32 registers.
    Large,
    /// Four rows and eight tokens, where a register holds the sums of several pairs.
    #[cfg_attr(
        not(any(target_arch = "aarch64", feature = "emulated")),
        expect(dead_code, reason = "no instruction of x86-64 multiplies pairs")
    )]
    Paired,
}

/// Returns the lane that has the sum of a row and a token, of an instruction that multiplies two rows
/// with two; `None` if the row or the token is the odd last of a tile.
#[cfg(any(target_arch = "aarch64", feature = "emulated"))]
#[inline(always)]
pub(crate) fn pair<const R: usize, const T: usize>(r: usize, t: usize) -> Option<usize> {
    (r < R / 2 * 2 && t < T / 2 * 2).then_some(r % 2 * 2 + t % 2)
}

/// Distance of prefetched bytes behind the next tile's start.
///
/// Rows are short and read several at a time, which the hardware takes for many streams that end
/// at once, and leaves half of the memory's speed unused. But the rows of a tile are one piece of
/// memory, and so are the tiles: the prefetch runs over them in order, at least one tile ahead.
pub(crate) const AHEAD: usize = 2048;

/// Bytes that a prefetch brings.
const LINE: usize = 64;

/// Asks for the piece number `piece` of `len` bytes of the tile after the one that starts with
/// `row`, one of `rows` rows. The bytes need not exist.
#[inline(always)]
fn prefetch_piece<V: Lanes>(v: V, row: &[u8], rows: usize, piece: usize, len: usize) {
    for line in (0..len).step_by(LINE) {
        v.prefetch(row, rows * row.len() + AHEAD + piece * len + line);
    }
}
