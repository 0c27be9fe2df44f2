//! NEON: the 16 virtual lanes are four registers.

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use crate::{
    LANES, TERNARY_BLOCK,
    pack::BLOCK_BYTES,
    vector::{Lanes, Operation, Product, Products, Tile, methods},
};

/// Proof that NEON may be executed on this CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// Returns the proof if the CPU has NEON.
    pub(crate) fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "neon")]
        fn enabled<O: Operation>(neon: Neon, operation: O) -> O::Output {
            operation.run(neon)
        }
        // SAFETY: `self` exists, so the CPU has NEON.
        unsafe { enabled(self, operation) }
    }

    pub(crate) fn multiply<P: Product>(self, product: P) {
        #[target_feature(enable = "neon")]
        fn enabled<P: Product>(neon: Neon, product: P) {
            product.run(neon);
        }
        // SAFETY: `self` exists, so the CPU has NEON.
        unsafe { enabled(self, product) }
    }
}

type Floats = [float32x4_t; 4];
type Ints = [int32x4_t; 4];

/// Applies an expression to each of the four registers.
macro_rules! four {
    (|$i:ident| $result:expr) => {
        [
            {
                const $i: usize = 0;
                $result
            },
            {
                const $i: usize = 1;
                $result
            },
            {
                const $i: usize = 2;
                $result
            },
            {
                const $i: usize = 3;
                $result
            },
        ]
    };
}

impl Lanes for Neon {
    type Floats = Floats;
    type Ints = Ints;

    // Four registers a sum.
    const MANY: bool = false;

    methods! { "neon"
        fn splat(x: f32) -> Floats {
            [vdupq_n_f32(x); 4]
        }

        fn load(x: &[f32; LANES]) -> Floats {
            let x = x.as_chunks::<4>().0;
            four!(|I| load_four(&x[I]))
        }

        fn store(to: &mut [f32; LANES], x: Floats) {
            for (to, x) in to.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
                unsafe { vst1q_f32(to.as_mut_ptr(), x) }
            }
        }

        fn add(a: Floats, b: Floats) -> Floats {
            four!(|I| vaddq_f32(a[I], b[I]))
        }

        fn sub(a: Floats, b: Floats) -> Floats {
            four!(|I| vsubq_f32(a[I], b[I]))
        }

        fn mul(a: Floats, b: Floats) -> Floats {
            four!(|I| vmulq_f32(a[I], b[I]))
        }

        fn div(a: Floats, b: Floats) -> Floats {
            four!(|I| vdivq_f32(a[I], b[I]))
        }

        fn fma(a: Floats, b: Floats, c: Floats) -> Floats {
            four!(|I| vfmaq_f32(c[I], a[I], b[I]))
        }

        fn larger(a: Floats, b: Floats) -> Floats {
            four!(|I| vbslq_f32(vcgtq_f32(a[I], b[I]), a[I], b[I]))
        }

        fn smaller(a: Floats, b: Floats) -> Floats {
            four!(|I| vbslq_f32(vcltq_f32(a[I], b[I]), a[I], b[I]))
        }

        fn larger_magnitude(largest: Floats, x: Floats) -> Floats {
            four!(|I| {
                let bits = vreinterpretq_u32_f32(vabsq_f32(x[I]));
                vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(largest[I]), bits))
            })
        }

        fn round(x: Floats) -> Floats {
            four!(|I| vrndnq_f32(x[I]))
        }

        fn powers_of_two(n: Floats) -> [Floats; 2] {
            let n = four!(|I| vcvtnq_s32_f32(n[I]));
            let half = four!(|I| vshrq_n_s32::<1>(n[I]));
            [
                four!(|I| power_of_two(half[I])),
                four!(|I| power_of_two(vsubq_s32(n[I], half[I]))),
            ]
        }

        fn fold(x: Floats) -> f32 {
            let four = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }

        fn splat_int(x: i32) -> Ints {
            [vdupq_n_s32(x); 4]
        }

        fn add_ints(a: Ints, b: Ints) -> Ints {
            four!(|I| vaddq_s32(a[I], b[I]))
        }

        fn sub_ints(a: Ints, b: Ints) -> Ints {
            four!(|I| vsubq_s32(a[I], b[I]))
        }

        fn store_ints(to: &mut [i32; LANES], x: Ints) {
            for (to, x) in to.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
                unsafe { vst1q_s32(to.as_mut_ptr(), x) }
            }
        }

        fn to_ints(x: Floats) -> Ints {
            four!(|I| vcvtnq_s32_f32(x[I]))
        }

        fn to_floats(x: Ints) -> Floats {
            four!(|I| vcvtq_f32_s32(x[I]))
        }

        fn store_as_bytes(to: &mut [u8; LANES], x: Ints) {
            let low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
            let high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
            let bytes = vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
            // SAFETY: the reference is valid for 16 bytes; the store needs no alignment.
            unsafe { vst1q_u8(to.as_mut_ptr(), bytes) }
        }

        fn widen_bytes(x: &[u8; LANES]) -> Floats {
            let x = vreinterpretq_s8_u8(load_bytes(x));
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }

        fn widen_f16(x: &[u8; 2 * LANES]) -> Floats {
            let x = x.as_chunks::<16>().0;
            let [low, high] = [load_bytes(&x[0]), load_bytes(&x[1])];
            [half_low(low), half_high(low), half_low(high), half_high(high)]
        }

        fn widen_bf16(x: &[u8; 2 * LANES]) -> Floats {
            let x = x.as_chunks::<16>().0;
            let low = vreinterpretq_u16_u8(load_bytes(&x[0]));
            let high = vreinterpretq_u16_u8(load_bytes(&x[1]));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
            ]
        }

        fn prefetch(bytes: &[u8], offset: usize) {
            let address = bytes.as_ptr().wrapping_add(offset);
            // SAFETY: whatever the address, a prefetch does not fault and reads nothing the program
            // can see.
            unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, readonly)) }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_four(x: &[f32; 4]) -> float32x4_t {
    // SAFETY: the reference is valid for 16 bytes; the load needs no alignment.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_bytes(x: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the reference is valid for 16 bytes; the load needs no alignment.
    unsafe { vld1q_u8(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

/// Converts the low four numbers of half precision. Its intrinsic needs a type that is not stable.
#[inline]
#[target_feature(enable = "neon")]
fn half_low(x: uint8x16_t) -> float32x4_t {
    let converted: float32x4_t;
    // SAFETY: the instruction works on these registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) converted, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    converted
}

/// Converts the high four numbers of half precision.
#[inline]
#[target_feature(enable = "neon")]
fn half_high(x: uint8x16_t) -> float32x4_t {
    let converted: float32x4_t;
    // SAFETY: the instruction works on these registers only.
    unsafe {
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) converted, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    converted
}

/// A packed block: its low and its high 16 bytes.
pub(super) type Packed = [uint8x16_t; 2];

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_packed(block: &[u8; BLOCK_BYTES]) -> Packed {
    let block = block.as_chunks::<16>().0;
    [load_bytes(&block[0]), load_bytes(&block[1])]
}

/// Returns the codes of 16 columns: an even part from the low bytes, an odd one from the high bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn codes<const PART: usize>(packed: Packed) -> int8x16_t {
    let packed = packed[PART % 2];
    let mask = vdupq_n_u8(3);
    vreinterpretq_s8_u8(match PART / 2 {
        0 => vshrq_n_u8::<6>(packed),
        1 => vandq_u8(vshrq_n_u8::<4>(packed), mask),
        2 => vandq_u8(vshrq_n_u8::<2>(packed), mask),
        _ => vandq_u8(packed, mask),
    })
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn activations<const PART: usize>(block: &[u8; TERNARY_BLOCK]) -> int8x16_t {
    vreinterpretq_s8_u8(load_bytes(&block.as_chunks::<16>().0[PART]))
}

/// Returns the totals of 16 registers.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn totals(sums: &[int32x4_t; LANES]) -> Ints {
    four!(|I| {
        let [a, b, c, d] = [sums[4 * I], sums[4 * I + 1], sums[4 * I + 2], sums[4 * I + 3]];
        vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
    })
}

/// The methods of [`Products`] that only need NEON, for every instruction that multiplies.
macro_rules! products_of_neon {
    () => {
        type Lanes = Neon;
        type Packed = Packed;
        type Bytes = int8x16_t;
        type Sums = int32x4_t;

        const PARTS: usize = TERNARY_BLOCK / 16;

        #[inline(always)]
        fn codes<const PART: usize>(self, packed: Packed) -> int8x16_t {
            // SAFETY: `self` exists, so the CPU has NEON.
            unsafe { codes::<PART>(packed) }
        }

        #[inline(always)]
        fn activations<const PART: usize>(self, block: &[u8; TERNARY_BLOCK]) -> int8x16_t {
            // SAFETY: `self` exists, so the CPU has NEON.
            unsafe { activations::<PART>(block) }
        }

        methods! { "neon"
            fn load_packed(block: &[u8; BLOCK_BYTES]) -> Packed {
                load_packed(block)
            }

            fn empty_sums() -> int32x4_t {
                vdupq_n_s32(0)
            }

            fn total(sums: int32x4_t) -> i32 {
                vaddvq_s32(sums)
            }
        }
    };
}
pub(super) use products_of_neon;

impl Products for Neon {
    products_of_neon!();

    /// Lanes of 16 bits.
    type Run = int16x8_t;

    const BLOCKS: usize = RUN;
    const TILE: Tile = Tile::Large;

    #[inline(always)]
    fn lanes(self) -> Self {
        self
    }

    methods! { "neon"
        fn empty_run() -> int16x8_t {
            vdupq_n_s16(0)
        }

        fn dot(run: int16x8_t, codes: int8x16_t, x: int8x16_t) -> int16x8_t {
            vmlal_high_s8(vmlal_s8(run, vget_low_s8(codes), vget_low_s8(x)), codes, x)
        }

        fn add_run(sums: int32x4_t, run: int16x8_t) -> int32x4_t {
            vpadalq_s16(sums, run)
        }

        fn totals_of_rows(runs: &[int16x8_t; LANES]) -> Ints {
            let mut sums = [vdupq_n_s32(0); LANES];
            for (sum, run) in sums.iter_mut().zip(runs) {
                *sum = vpaddlq_s16(*run);
            }
            totals(&sums)
        }
    }
}

/// Blocks whose products are summed in 16 bits. Two bits hold at most 3 (a damaged file), activations
/// are at most 127, and a block adds 16 products to each lane.
const RUN: usize = 5;
const _: () = assert!(RUN * 16 * 3 * 127 <= i16::MAX as usize);
const _: () = assert!((RUN + 1) * 16 * 3 * 127 > i16::MAX as usize);
