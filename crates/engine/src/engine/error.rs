//! What can be wrong with an engine or one of its steps.

use std::ops::Range;

use tercet_kernels::Isa;
use thiserror::Error;

use crate::{kv::KvError, model_file::ModelError, pool::PoolError};

/// An engine could not be made.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The model file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The compute threads could not be made.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The layer range does not fit the model or the role.
    #[error("layers {}..{} do not fit: {expected}", layers.start, layers.end)]
    Layers {
        /// Asked for.
        layers: Range<usize>,
        /// What would fit.
        expected: String,
    },
    /// The CPU lacks the instruction set asked for.
    #[error("this CPU has no {0}; leave the instruction set out to take the best that it has")]
    Isa(Isa),
    /// The KV budget holds nothing.
    #[error(
        "a KV cache of {bytes} bytes holds no page: one page of 64 positions takes {page_bytes} bytes"
    )]
    KvTooSmall {
        /// Budget.
        bytes: usize,
        /// Bytes of a page.
        page_bytes: usize,
    },
    /// The stretch is no factor above 1.
    #[error("a prefill stretch of {0} leaves prompts no time: it must be a number above 1")]
    Stretch(f64),
    /// A limit is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The compute thread could not be started.
    #[error("start the compute thread")]
    Thread(#[source] std::io::Error),
}

/// A step could not be computed: a defect, or a peer that does not keep to the protocol.
#[derive(Debug, Error)]
pub enum StepError {
    /// The KV cache cannot hold the rows.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The frame does not fit the stage.
    #[error("step {step}: {what}")]
    Frame {
        /// Number of the step.
        step: u64,
        /// What does not fit.
        what: String,
    },
}
