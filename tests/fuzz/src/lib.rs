//! Everything that reads bytes of strangers, as one function each: the targets of the fuzzer.
//!
//! ```text
//! corpus/TARGET/*  --replay test, `cargo test`-------------------------> target(bytes)
//!                  --`tests/fuzz/run`: libFuzzer mutates, by coverage--> target(bytes)
//! ```
//!
//! A target runs the code that serves users on bytes that may hold anything, and panics only over a
//! defect: a panic within, an answer that contradicts itself, or an error nobody can read. It returns
//! whether the bytes were good. Bytes that once showed a defect stay in the corpus.

mod message;
mod model;
mod request;
mod text;

pub use self::{
    model::{config, gguf, safetensors},
    request::request,
    text::{grammar, template, tokenizer},
};

/// A function that takes any bytes, and returns whether they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All targets, by the names of their programs and corpora.
pub const TARGETS: [(&str, Target); 7] = [
    ("config", config),
    ("gguf", gguf),
    ("grammar", grammar),
    ("request", request),
    ("safetensors", safetensors),
    ("template", template),
    ("tokenizer", tokenizer),
];
