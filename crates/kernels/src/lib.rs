//! Ternary packing and arithmetic, one variant per instruction set.
