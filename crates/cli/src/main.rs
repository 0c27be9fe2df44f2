//! The binary `tercet`.

fn main() {}
