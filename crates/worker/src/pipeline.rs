//! The stages of a pipeline over gRPC.
//!
//! ```text
//! engine --WireDownstream--> Link ==Connect==> PipelineService --> Stage thread (Follower)
//!    ^                                             |                   |  forward: its own Link
//!    +--- deliver <--- head::lead <==results=======+<---- result ------+
//! ```
//!
//! As many steps are under way as there are stages, so the queues below are bounded by the
//! protocol itself: one that is full means a peer that does not keep to it, and ends the link.

pub(crate) mod head;
mod link;
mod service;
mod stage;
mod wire;

pub(crate) use self::{service::PipelineService, stage::Stage};

use tercet_engine::EngineOptions;

/// Messages of one link that may wait in one direction. More than any pipeline has stages.
const QUEUE: usize = 256;

/// Least bytes of a message that a stage takes, however small its own limits are: the stage before
/// may have larger ones.
const LEAST_MESSAGE: usize = 64 << 20;

/// Bytes of a row besides its activations: ids to score, runs, what opens a sequence.
const ROW_OVERHEAD: usize = 512;

/// Returns the most bytes of a message of one step.
fn message_limit(options: &EngineOptions, hidden: usize) -> usize {
    let rows = options.prefill_chunk.saturating_add(options.max_sequences);
    rows.saturating_mul(hidden * size_of::<f32>() + ROW_OVERHEAD).max(LEAST_MESSAGE)
}
