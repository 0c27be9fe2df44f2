//! Vectors that are plain arrays, with the widths and the arithmetic of each instruction set.
//!
//! They stand in for the vectors of machines that are not at hand: an algorithm that is right with
//! them is right, if each method of the real ones does what its instruction is documented to do.

use std::marker::PhantomData;

use super::{Lanes, Operation, Product, Products, Tile, pair};
use crate::{Isa, LANES, TERNARY_BLOCK, dense::f16_to_f32, pack::BLOCK_BYTES, scalar};

/// Runs an operation as an instruction set would.
///
/// # Panics
/// If it is the scalar one, which has no vectors.
pub(crate) fn run<O: Operation>(isa: Isa, operation: O) -> O::Output {
    match isa {
        Isa::Scalar => unreachable!("plain Rust needs no stand-in"),
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm | Isa::Avx512 => operation.run(Emulated::<true>),
        Isa::Avx2 | Isa::AvxVnni => operation.run(Emulated::<false>),
    }
}

/// Multiplies as an instruction set would.
///
/// # Panics
/// If it is the scalar one, which has no vectors.
pub(crate) fn multiply(isa: Isa, product: impl Product) {
    match isa {
        Isa::Scalar => unreachable!("plain Rust needs no stand-in"),
        Isa::Neon => product.run(Register::<16, Smlal>::new()),
        Isa::NeonDot => product.run(Register::<16, Sdot>::new()),
        Isa::NeonI8mm => product.run(Register::<16, Smmla>::new()),
        Isa::Avx2 => product.run(Register::<32, Vpmaddubsw>::new()),
        Isa::AvxVnni => product.run(Register::<32, Vpdpbusd>::new()),
        Isa::Avx512 => product.run(Register::<64, Vpdpbusd>::new()),
    }
}

/// The virtual lanes, with tiles for many registers or for few.
#[derive(Clone, Copy)]
pub(crate) struct Emulated<const MANY: bool>;

/// Applies a function of numbers to each lane.
macro_rules! each {
    (|$($x:ident),+| $result:expr) => {{
        let mut lanes = [Default::default(); LANES];
        for i in 0..LANES {
            $(let $x = $x[i];)+
            lanes[i] = $result;
        }
        lanes
    }};
}

impl<const MANY: bool> Lanes for Emulated<MANY> {
    type Floats = [f32; LANES];
    type Ints = [i32; LANES];

    const MANY: bool = MANY;

    #[inline(never)]
    fn splat(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(never)]
    fn load(self, x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }

    #[inline(never)]
    fn store(self, to: &mut [f32; LANES], x: [f32; LANES]) {
        *to = x;
    }

    #[inline(never)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| a + b)
    }

    #[inline(never)]
    fn sub(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| a - b)
    }

    #[inline(never)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| a * b)
    }

    #[inline(never)]
    fn div(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| a / b)
    }

    #[inline(never)]
    fn fma(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b, c| f32::mul_add(a, b, c))
    }

    #[inline(never)]
    fn larger(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| if a > b { a } else { b })
    }

    #[inline(never)]
    fn smaller(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        each!(|a, b| if a < b { a } else { b })
    }

    #[inline(never)]
    fn larger_magnitude(self, largest: [f32; LANES], x: [f32; LANES]) -> [f32; LANES] {
        each!(|largest, x| f32::from_bits(largest.to_bits().max(x.abs().to_bits())))
    }

    #[inline(never)]
    fn round(self, x: [f32; LANES]) -> [f32; LANES] {
        each!(|x| x.round_ties_even())
    }

    #[inline(never)]
    fn powers_of_two(self, n: [f32; LANES]) -> [[f32; LANES]; 2] {
        let n = self.to_ints(n);
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned());
        [each!(|n| power(n >> 1)), each!(|n| power(n.wrapping_sub(n >> 1)))]
    }

    #[inline(never)]
    fn fold(self, x: [f32; LANES]) -> f32 {
        scalar::lanes::fold(x)
    }

    #[inline(never)]
    fn splat_int(self, x: i32) -> [i32; LANES] {
        [x; LANES]
    }

    #[inline(never)]
    fn add_ints(self, a: [i32; LANES], b: [i32; LANES]) -> [i32; LANES] {
        each!(|a, b| i32::wrapping_add(a, b))
    }

    #[inline(never)]
    fn sub_ints(self, a: [i32; LANES], b: [i32; LANES]) -> [i32; LANES] {
        each!(|a, b| i32::wrapping_sub(a, b))
    }

    #[inline(never)]
    fn store_ints(self, to: &mut [i32; LANES], x: [i32; LANES]) {
        *to = x;
    }

    #[inline(never)]
    #[expect(clippy::cast_possible_truncation, reason = "small numbers only")]
    fn to_ints(self, x: [f32; LANES]) -> [i32; LANES] {
        each!(|x| x.round_ties_even() as i32)
    }

    #[inline(never)]
    #[expect(clippy::cast_precision_loss, reason = "the rounding of the conversion")]
    fn to_floats(self, x: [i32; LANES]) -> [f32; LANES] {
        each!(|x| x as f32)
    }

    #[inline(never)]
    fn store_as_bytes(self, to: &mut [u8; LANES], x: [i32; LANES]) {
        *to = each!(|x| x.to_le_bytes()[0]);
    }

    #[inline(never)]
    fn widen_bytes(self, x: &[u8; LANES]) -> [f32; LANES] {
        each!(|x| f32::from(x.cast_signed()))
    }

    #[inline(never)]
    fn widen_f16(self, x: &[u8; 2 * LANES]) -> [f32; LANES] {
        let x = x.as_chunks().0;
        each!(|x| f16_to_f32(u16::from_le_bytes(x)))
    }

    #[inline(never)]
    fn widen_bf16(self, x: &[u8; 2 * LANES]) -> [f32; LANES] {
        let x = x.as_chunks::<2>().0;
        each!(|x| f32::from_le_bytes([0, 0, x[0], x[1]]))
    }

    #[inline(never)]
    fn prefetch(self, _: &[u8], _: usize) {}
}

/// A register of `BYTES` bytes and the instruction that multiplies it.
pub(crate) struct Register<const BYTES: usize, I>(PhantomData<I>);

impl<const BYTES: usize, I> Register<BYTES, I> {
    fn new() -> Self {
        Self(PhantomData)
    }
}

impl<const BYTES: usize, I> Clone for Register<BYTES, I> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<const BYTES: usize, I> Copy for Register<BYTES, I> {}

/// The lanes of a sum; an instruction uses as many as its register has.
type Sums = [i32; LANES];

/// An instruction that multiplies bytes.
trait Instruction {
    /// As [`Products::BLOCKS`].
    const BLOCKS: usize;
    /// As [`Products::TILE`].
    const TILE: Tile;

    /// Adds the products of codes and activations.
    fn dot<const BYTES: usize>(sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums;

    /// Multiplies a tile, as [`Products::multiply`].
    #[inline(never)]
    fn multiply<const BYTES: usize, const R: usize, const T: usize>(
        runs: &mut [[Sums; T]; R],
        codes: [[u8; BYTES]; R],
        x: [[u8; BYTES]; T],
    ) {
        for (runs, codes) in runs.iter_mut().zip(codes) {
            for (run, x) in runs.iter_mut().zip(x) {
                *run = Self::dot(*run, codes, x);
            }
        }
    }

    /// Returns the totals of what [`Self::multiply`] has added.
    #[inline(never)]
    fn totals<const R: usize, const T: usize>(sums: [[Sums; T]; R]) -> [[i32; T]; R] {
        sums.map(|sums| sums.map(|sums| sums.iter().sum()))
    }
}

#[inline(never)]
fn product(code: u8, x: u8) -> i32 {
    i32::from(code) * i32::from(x.cast_signed())
}

#[inline(never)]
fn to_16_bits(x: i32) -> i16 {
    let [a, b, ..] = x.to_le_bytes();
    i16::from_le_bytes([a, b])
}

/// Adds the products of groups of four bytes to lanes of 32 bits.
#[inline(never)]
fn dot_of_fours<const BYTES: usize>(mut sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
    for i in 0..BYTES {
        sums[i / 4] = sums[i / 4].wrapping_add(product(codes[i], x[i]));
    }
    sums
}

/// AVX2: neighbouring products are added with saturation, then to lanes of 16 bits.
struct Vpmaddubsw;

impl Instruction for Vpmaddubsw {
    const BLOCKS: usize = 10;
    const TILE: Tile = Tile::Small;

    #[inline(never)]
    fn dot<const BYTES: usize>(mut sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        for i in 0..BYTES / 2 {
            let pair = product(codes[2 * i], x[2 * i]) + product(codes[2 * i + 1], x[2 * i + 1]);
            let pair = pair.clamp(i16::MIN.into(), i16::MAX.into());
            sums[i] = i32::from(to_16_bits(sums[i] + pair));
        }
        sums
    }
}

/// AVX-VNNI and AVX-512 VNNI: four neighbouring products are added to lanes of 32 bits.
struct Vpdpbusd;

impl Instruction for Vpdpbusd {
    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Large;

    #[inline(never)]
    fn dot<const BYTES: usize>(sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        dot_of_fours(sums, codes, x)
    }
}

/// NEON: the products of both halves are added to lanes of 16 bits.
struct Smlal;

impl Instruction for Smlal {
    const BLOCKS: usize = 5;
    const TILE: Tile = Tile::Large;

    #[inline(never)]
    fn dot<const BYTES: usize>(mut sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        for i in 0..BYTES {
            let lane = i % (BYTES / 2);
            sums[lane] = i32::from(to_16_bits(sums[lane] + product(codes[i], x[i])));
        }
        sums
    }
}

/// The dot product of aarch64: as [`Vpdpbusd`], with codes that are signed.
struct Sdot;

impl Instruction for Sdot {
    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Large;

    #[inline(never)]
    fn dot<const BYTES: usize>(sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        dot_of_fours(sums, codes, x)
    }
}

/// The matrix product of aarch64: two rows of eight times two rows of eight.
struct Smmla;

impl Instruction for Smmla {
    const BLOCKS: usize = usize::MAX;
    const TILE: Tile = Tile::Paired;

    #[inline(never)]
    fn dot<const BYTES: usize>(sums: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        dot_of_fours(sums, codes, x)
    }

    #[inline(never)]
    fn multiply<const BYTES: usize, const R: usize, const T: usize>(
        runs: &mut [[Sums; T]; R],
        codes: [[u8; BYTES]; R],
        x: [[u8; BYTES]; T],
    ) {
        for r in 0..R {
            for t in 0..T {
                match pair::<R, T>(r, t) {
                    None => runs[r][t] = Self::dot(runs[r][t], codes[r], x[t]),
                    Some(0) => {
                        for half in [0, BYTES / 2] {
                            for (row, token) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                                for i in half..half + BYTES / 2 {
                                    runs[r][t][2 * row + token] +=
                                        product(codes[r + row][i], x[t + token][i]);
                                }
                            }
                        }
                    }
                    Some(_) => {}
                }
            }
        }
    }

    #[inline(never)]
    fn totals<const R: usize, const T: usize>(sums: [[Sums; T]; R]) -> [[i32; T]; R] {
        let mut totals = [[0; T]; R];
        for r in 0..R {
            for t in 0..T {
                totals[r][t] = match pair::<R, T>(r, t) {
                    None => sums[r][t].iter().sum(),
                    Some(lane) => sums[r - lane / 2][t - lane % 2][lane],
                };
            }
        }
        totals
    }
}

impl<const BYTES: usize, I: Instruction> Products for Register<BYTES, I> {
    type Lanes = Emulated<true>;
    type Packed = [u8; BLOCK_BYTES];
    type Bytes = [u8; BYTES];
    type Run = Sums;
    type Sums = Sums;

    const PARTS: usize = TERNARY_BLOCK / BYTES;
    const BLOCKS: usize = I::BLOCKS;
    // A register of 32 bytes is one of 16.
    const TILE: Tile = if BYTES == 32 { Tile::Small } else { I::TILE };

    #[inline(never)]
    fn lanes(self) -> Emulated<true> {
        Emulated
    }

    #[inline(never)]
    fn load_packed(self, block: &[u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        *block
    }

    #[inline(never)]
    fn codes<const PART: usize>(self, packed: [u8; BLOCK_BYTES]) -> [u8; BYTES] {
        let mut codes = [0; BYTES];
        for (i, code) in codes.iter_mut().enumerate() {
            let column = PART * BYTES + i;
            *code = packed[column % BLOCK_BYTES] >> (6 - 2 * (column / BLOCK_BYTES)) & 3;
        }
        codes
    }

    #[inline(never)]
    fn activations<const PART: usize>(self, block: &[u8; TERNARY_BLOCK]) -> [u8; BYTES] {
        block.as_chunks().0[PART]
    }

    #[inline(never)]
    fn empty_run(self) -> Sums {
        Sums::default()
    }

    #[inline(never)]
    fn dot(self, run: Sums, codes: [u8; BYTES], x: [u8; BYTES]) -> Sums {
        I::dot(run, codes, x)
    }

    #[inline(never)]
    fn empty_sums(self) -> Sums {
        Sums::default()
    }

    #[inline(never)]
    fn add_run(self, sums: Sums, run: Sums) -> Sums {
        each!(|sums, run| i32::wrapping_add(sums, run))
    }

    #[inline(never)]
    fn total(self, sums: Sums) -> i32 {
        sums.iter().sum()
    }

    #[inline(never)]
    fn totals_of_rows(self, runs: &[Sums; LANES]) -> [i32; LANES] {
        runs.map(|run| run.iter().sum())
    }

    #[inline(never)]
    fn multiply<const R: usize, const T: usize>(
        self,
        runs: &mut [[Sums; T]; R],
        codes: [[u8; BYTES]; R],
        x: [[u8; BYTES]; T],
    ) {
        I::multiply(runs, codes, x);
    }

    #[inline(never)]
    fn totals<const R: usize, const T: usize>(self, sums: [[Sums; T]; R]) -> [[i32; T]; R] {
        I::totals(sums)
    }
}
