//! The stages of a pipeline: what the first one sends, and how a later one follows.

use std::{
    fmt,
    ops::{ControlFlow, Range},
    time::Duration,
};

use thiserror::Error;

use crate::{
    engine::{EngineError, EngineOptions, StepError},
    model_file::{ModelError, ModelFile, Report},
    plan::{StepPlan, StepResult},
    pool::ComputePool,
    pool::Unverified,
    runner::{Input, LogitsObserver, Produced, StageRunner},
};

/// One step on its way from a stage to the next.
#[derive(Clone, Debug, PartialEq)]
pub struct StageFrame {
    /// What to compute.
    pub plan: StepPlan,
    /// The rows that come in: rows x hidden size.
    pub activations: Vec<f32>,
}

/// The next stage is gone.
#[derive(Debug, Error)]
#[error("the next stage is lost: {0}")]
pub struct LinkLost(pub String);

/// Where a first stage sends its frames.
pub trait Downstream: fmt::Debug + Send {
    /// Hands `frame` over, waiting only for as long as the next stage lags by its credits.
    fn send(&mut self, frame: StageFrame) -> Result<(), LinkLost>;
}

/// A later stage: computes the frames it is given, in order.
#[derive(Debug)]
pub struct Follower {
    runner: StageRunner,
    layers: Range<usize>,
}

/// What a later stage made of a frame.
#[derive(Debug)]
pub enum Followed {
    /// The frame for the next stage.
    Forward(StageFrame),
    /// The answer of the last stage.
    Result(StepResult),
}

impl Follower {
    /// Loads the weights of `options.layers`, which must begin after layer 0, to be computed on
    /// threads of its own.
    pub fn load(model: &ModelFile, options: &EngineOptions) -> Result<Self, EngineError> {
        let pool = ComputePool::new(options.threads)?;
        Self::load_on(model, options, &pool, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::load`], to be computed on the threads of `pool`. Tells `report` how far the
    /// reading of the weights is, which may end it.
    pub fn load_on(
        model: &ModelFile,
        options: &EngineOptions,
        pool: &ComputePool,
        report: Report<'_>,
    ) -> Result<Self, EngineError> {
        let layers = options.layers.clone().unwrap_or(0..model.config.layers);
        if layers.start == 0 {
            return Err(EngineError::Layers {
                layers,
                expected: "a later stage begins after layer 0".to_owned(),
            });
        }
        let runner = StageRunner::load(model, layers.clone(), options, pool.clone(), report)?;
        Ok(Self { runner, layers })
    }

    /// Shows every row of logits to `observer`.
    pub fn observe_logits(&mut self, observer: Option<LogitsObserver>) {
        self.runner.observe_logits(observer);
    }

    /// Returns the layers held.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Returns the pages of the KV cache.
    pub fn kv_pages(&self) -> usize {
        self.runner.kv_pages()
    }

    /// Returns the bytes of the KV cache.
    pub fn kv_bytes(&self) -> usize {
        self.runner.kv_bytes()
    }

    /// Returns the pages of the KV cache that hold positions.
    pub fn kv_pages_in_use(&self) -> usize {
        self.runner.kv_pages_in_use()
    }

    /// Returns the digests of the tensors held. Hashes them all, in turns with whoever else uses
    /// the pool, and tells `report` how far it is.
    ///
    /// # Errors
    /// [`ModelError::Interrupted`] if `report` says so.
    pub fn part_digests(&self, report: Report<'_>) -> Result<Vec<(String, [u8; 32])>, ModelError> {
        self.runner.part_digests(report)
    }

    /// Returns the check of what a native file says of its weights, `None` for other files.
    pub fn unverified(&self) -> Option<Unverified> {
        self.runner.unverified()
    }

    /// Returns what it took to compute the last frame, waiting for the threads not counted.
    pub fn last_step(&self) -> Duration {
        self.runner.last_step()
    }

    /// Forgets all sequences: a new link begins.
    pub fn reset(&mut self) {
        self.runner.reset();
    }

    /// Computes one frame. After an error the link must be dropped.
    pub fn apply(&mut self, frame: StageFrame) -> Result<Followed, StepError> {
        let StageFrame { plan, activations } = frame;
        Ok(match self.runner.step(&plan, Input::Activations(activations))? {
            Produced::Activations(activations) => {
                Followed::Forward(StageFrame { plan, activations })
            }
            Produced::Results(results) => Followed::Result(StepResult { step: plan.step, results }),
        })
    }
}
