//! The variant for AVX2 with FMA and F16C.
//!
//! [`Avx2`] exists only on a CPU that has all of the features; its methods are the only entrances,
//! one `unsafe` each. Everything behind them is safe code with the features enabled.
//!
//! The 16 virtual lanes are two registers of eight. Loops run over whole registers; what remains
//! of a row is done number by number with the functions of the scalar variant, on the same lanes.

mod attention;
mod dense;
mod exp;
mod lanes;
mod memory;
mod screen;
mod ternary;
mod vector;
mod vectors;

pub(super) use self::vectors::totals_of_eight;
use super::avx_vnni::AvxVnni;
use crate::{
    AttentionScratch, ColumnsMut, DenseMatrix, DenseType, Int8Rows, Isa, Screen, ScreenPart,
    ScreenQuery, TernaryMatrix, TernaryScratch,
    attention::Shape,
    rows::RowFacts,
    vector::{TernaryMatmul, TernaryMatmulBlocks},
};

/// Proof that AVX2, FMA, F16C, BMI1 and BMI2 may be executed on this CPU, and the proof of more for
/// what it makes faster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2 {
    vnni: Option<AvxVnni>,
}

impl Avx2 {
    /// Returns the proof if the CPU and the operating system support every feature.
    pub(crate) fn detect() -> Option<Self> {
        let supported = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2");
        supported.then_some(Self { vnni: None })
    }

    /// Returns the proof of AVX2 and of AVX-VNNI.
    pub(crate) fn detect_vnni() -> Option<Self> {
        AvxVnni::detect(Self::detect()?).map(Self::of)
    }

    /// Returns the proof that is part of another.
    pub(super) fn of(vnni: AvxVnni) -> Self {
        Self { vnni: Some(vnni) }
    }

    /// Returns the instruction set that the products of bytes use.
    pub(crate) fn isa(self) -> Isa {
        if self.vnni.is_some() { Isa::AvxVnni } else { Isa::Avx2 }
    }

    pub(crate) fn quantize(self, x: &[f32], values: &mut [u8]) -> Option<RowFacts> {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { ternary::quantize(x, values) }
    }

    pub(crate) fn ternary_matmul(
        self,
        w: &TernaryMatrix,
        scale: f32,
        x: &Int8Rows,
        n: usize,
        out: ColumnsMut<'_>,
        scratch: &mut TernaryScratch,
    ) {
        if let Some(vnni) = self.vnni {
            return vnni.multiply(TernaryMatmul { w, scale, x, n, out });
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { ternary::matmul(w, scale, x, n, out, scratch) }
    }

    pub(crate) fn ternary_matmul_blocks(
        self,
        w: &TernaryMatrix,
        scales: &[f32],
        x: &Int8Rows,
        n: usize,
        out: ColumnsMut<'_>,
    ) {
        if let Some(vnni) = self.vnni {
            return vnni.multiply(TernaryMatmulBlocks { w, scales, x, n, out });
        }
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { ternary::blocks::matmul(w, scales, x, n, out) }
    }

    pub(crate) fn dense_matmul(self, w: &DenseMatrix, x: &[f32], out: ColumnsMut<'_>) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { dense::matmul(w, x, out) }
    }

    pub(crate) fn dense_row(self, kind: DenseType, bytes: &[u8], out: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { dense::row(kind, bytes, out) }
    }

    pub(crate) fn dense_rows(self, w: &DenseMatrix, rows: &[u32], x: &[f32], out: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { dense::rows(w, rows, x, out) }
    }

    pub(crate) fn fill_screen(self, w: &DenseMatrix, part: ScreenPart<'_>) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { screen::fill(w, part) }
    }

    pub(crate) fn screen_matmul(self, w: &Screen, x: &ScreenQuery, out: ColumnsMut<'_>) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { screen::estimate(w, x, out) }
    }

    pub(crate) fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { lanes::dot(a, b) }
    }

    pub(crate) fn scale(self, x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::scale(x, factor, weight, out) }
    }

    pub(crate) fn relu2_mul(self, gate: &mut [f32], up: &[f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::relu2_mul(gate, up) }
    }

    pub(crate) fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::silu_mul(gate, up) }
    }

    pub(crate) fn add(self, acc: &mut [f32], x: &[f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::add(acc, x) }
    }

    pub(crate) fn rope(self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::rope(head, cos, sin) }
    }

    pub(crate) fn attend<'a>(
        self,
        q: &[f32],
        kv: impl Fn(usize) -> (&'a [f32], &'a [f32]),
        shape: Shape,
        scratch: &mut AttentionScratch,
        out: &mut [f32],
    ) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { attention::attend(q, kv, shape, scratch, out) }
    }

    pub(crate) fn sum_exp(self, x: &[f32], max: f32) -> f32 {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { lanes::sum_exp(x, max) }
    }

    pub(crate) fn exp(self, x: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { exp::exp(x) }
    }

    pub(crate) fn argmax(self, x: &[f32]) -> usize {
        // SAFETY: `self` exists, so the CPU has the features.
        unsafe { vector::argmax(x) }
    }
}
