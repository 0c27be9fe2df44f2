//! gRPC server around one engine: admission, token streams, pipeline stages, drain.
//!
//! ```text
//! Generate --> Completion (pure: text, counts, end) <-- Mailbox <-- Engine (threads of its own)
//! Score ------------------------------------------------^
//! Pipeline.Connect --> Stage (thread of its own), or head::lead --> Link --> next worker
//! phase: loading -> ready -> draining --> health, registry, refusals
//! ```
//!
//! - [`Worker::build`] opens the model, [`Worker::serve`] does the rest: everything it starts ends
//!   with it.
//! - Async tasks never compute: tokens come from the compute thread through a mailbox that neither
//!   side waits for, and texts are tokenized on blocking threads.
//! - What a stream sends is a pure function of the request and the ids sampled, so a resume at any
//!   other worker of the same identity goes on exactly.

mod administration;
mod completion;
mod config;
mod core;
mod failure;
mod generation;
mod hosting;
mod inference;
mod load;
mod mailbox;
mod membership;
mod pipeline;
mod prompt;
mod span;
#[cfg(test)]
mod tests;
mod worker;

pub use self::{
    config::{Config, ModelSource, ModelSpec},
    core::NoKvMemory,
    load::LoadError,
    worker::{BuildError, Condition, ServeError, Worker},
};
