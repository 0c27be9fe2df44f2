//! gRPC server around the engines of some models: admission, token streams, pipeline stages, models
//! loaded and unloaded at run time, drain.
//!
//! ```text
//! Core --find(name)--> Hosted (one model: facts, phase, engine or stage, room, KV share)
//!
//! Generate --> Completion (pure: text, counts, end) <-- Mailbox <-- Engine --turns--> ComputePool
//! Score ------------------------------------------------^
//! Pipeline.Connect --> Stage (thread of its own), or head::lead --> Link --> next worker
//! phase of a model: loading -> ready -> draining, or failed --> health, registry, refusals
//! ```
//!
//! - [`Worker::build`] opens the models, [`Worker::serve`] does the rest: everything it starts ends
//!   with it. One task hosts each model, from its loading until it has left memory.
//! - All models share the compute threads, step by step in turn, and the KV memory, of which each
//!   has a fixed part: `core::budget` has the rule.
//! - A model that breaks down fails alone; a worker whose models have all failed ends.
//! - Async tasks never compute: tokens come from the compute thread through a mailbox that neither
//!   side waits for, and texts are tokenized on blocking threads.
//! - What a stream sends is a pure function of the request and the ids sampled, so a resume at any
//!   other worker of the same identity goes on exactly.

mod administration;
mod company;
mod completion;
mod config;
mod core;
mod failure;
mod generation;
mod grammar;
mod hosting;
mod inference;
mod load;
mod mailbox;
mod membership;
mod meter;
mod pipeline;
mod prompt;
mod report;
mod span;
#[cfg(test)]
mod tests;
mod worker;

pub use self::{
    config::{Config, ModelSource, ModelSpec},
    core::NoKvMemory,
    load::{LoadError, Verified, verify},
    worker::{BuildError, Condition, ServeError, Worker},
};
