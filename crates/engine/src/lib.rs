//! Model file to tokens: loading, forward pass, scheduling, sampling. Synchronous: no async
//! runtime, no sockets.
//!
//! ```text
//! ModelFile (mapped) --load(layers)--> StageWeights
//!
//!   submit          plan                 step                    apply
//! Engine --> Scheduler --> StageRunner(Forward, KvCache, Sampler) --> Scheduler --> events
//!                              |                                  ^
//!                              +--> Downstream ... Follower ------+    (pipeline of stages)
//! ```
//!
//! A whole model is the stage that has every layer; a pipeline is the same code with narrower
//! ranges. One request has one output, to the bit: integer products are exact, every float sum has
//! one order that depends on positions alone, and draws are keyed by seed and position. Batching,
//! chunking, threads, instruction set, stages, cached prefixes and resumes therefore change no answer.
//!
//! Reading order: [`request`] and [`plan`] (what is asked, what is computed), [`scheduler`],
//! [`drafter`], [`engine`], [`pipeline`]; then `runner`, `forward`, `kv`, `sampler`; then [`model_file`].

pub mod bandwidth;
pub mod demo;
pub mod drafter;
pub mod engine;
mod forward;
mod kv;
pub mod model_file;
pub mod pipeline;
pub mod plan;
mod pool;
pub mod request;
mod rotary;
mod runner;
mod sampler;
pub mod scheduler;

pub use self::{
    drafter::{Drafter, Speculation},
    engine::{
        Attachment, Engine, EngineError, EngineOptions, EventSink, HeadScreen, ScreenTally,
        SequenceHandle, StepError, StepObserver, StepReport,
    },
    kv::{KvError, PAGE_POSITIONS},
    model_file::{ModelConfig, ModelError, ModelFile},
    pipeline::{Downstream, Followed, Follower, LinkLost, StageFrame},
    pool::{ComputePool, PoolError, Unverified},
    request::{Output, SequenceEvent, SequenceFailure, SequenceRequest, StopReason, SubmitError},
    runner::LogitsObserver,
    sampler::SamplingParams,
};
