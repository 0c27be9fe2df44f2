//! Working memory of the products of many tokens.

/// Tokens whose sums stand side by side.
pub(crate) const TOKENS: usize = 16;

/// One 16-bit number for each of [`TOKENS`] tokens.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Beside(pub(crate) [i16; TOKENS]);

/// Working memory of [`Kernels::ternary_matmul`](crate::Kernels::ternary_matmul), kept from call
/// to call: one for each thread, about half a megabyte for 128 tokens once it was used.
#[derive(Clone, Debug, Default)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "the variants there have no tables")
)]
pub struct TernaryScratch {
    /// Activations of a chunk of columns, the tokens of each column side by side.
    pub(crate) turned: Vec<Beside>,
    /// Sums of groups of activations.
    pub(crate) tables: Vec<Beside>,
    /// Where in the tables the sums of the weights are, eight of 16 bits for each row.
    pub(crate) offsets: Vec<[u64; 2]>,
    /// Sums of a chunk of columns that are not finished, one for each row.
    pub(crate) open: Vec<Beside>,
    /// Sums of all columns so far, one for each block of tokens and row.
    pub(crate) sums: Vec<[i32; TOKENS]>,
}
