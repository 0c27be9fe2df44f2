//! One model of a worker: what is known of it, how far it is, who uses it.

use std::{
    fmt::Write as _,
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tercet_cluster::{LayerRange, ModelRecord, ModelState};
use tercet_engine::{
    ComputePool, Engine, ModelConfig,
    model_file::{GenerationDefaults, ModelFile},
};
use tercet_proto::{Reason, v1};
use tercet_telemetry::{Component, Metrics};
use tercet_text::{ChatTemplate, Tokenizer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Active, ActiveGuard, Core, wire};
use crate::{Config, ModelSpec, pipeline::Stage};

/// When callers of a model that loads, or has no room, should come back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How far a model is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    /// Not ready; says what it waits for.
    Loading(&'static str),
    /// Takes requests, or steps if it is a later stage. The identity of the whole model; empty for
    /// a later stage, which does not know it.
    Ready(Arc<str>),
    /// Finishes what it has and takes nothing new. For good.
    Draining,
}

/// What is known of a model before it is loaded.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Name in requests.
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    /// Most tokens of a sequence.
    pub(crate) context: usize,
    /// Layers held.
    pub(crate) layers: Range<usize>,
    pub(crate) header_digest: [u8; 32],
    pub(crate) generation: GenerationDefaults,
    /// End-of-sequence tokens.
    pub(crate) eos: Vec<u32>,
}

/// A model in memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    /// Digests of the tensors held, in model order.
    pub(crate) parts: Vec<(String, [u8; 32])>,
    pub(crate) role: Role,
}

/// What the worker does with the layers of a model.
#[derive(Debug)]
pub(crate) enum Role {
    /// Takes requests: it holds the whole model, or heads a pipeline.
    Engine(Arc<Engine>),
    /// Follows the stage before it.
    Stage(Stage),
}

/// One model of a worker.
#[derive(Debug)]
pub(crate) struct Hosted {
    pub(crate) config: Arc<Config>,
    pub(crate) facts: Facts,
    pub(crate) metrics: Metrics,
    pub(crate) pool: ComputePool,
    phase: watch::Sender<Phase>,
    /// Grows with every change of the worker's models.
    changes: watch::Sender<u64>,
    /// Held for a pointer copy.
    loaded: RwLock<Option<Arc<Loaded>>>,
    /// One permit for each request that the engine may hold.
    room: Arc<Semaphore>,
    /// Streams, scorings and pipeline links in progress.
    pub(crate) active: Active,
    /// Cancelled when a drain has lasted too long: whatever is active must end.
    pub(crate) evicted: CancellationToken,
}

impl Facts {
    pub(crate) fn new(model: &ModelFile, spec: &ModelSpec, config: &Config) -> Self {
        Self {
            name: spec.name.clone().unwrap_or_else(|| model.name.clone()),
            layers: config.engine.layers.clone().unwrap_or(0..model.config.layers),
            header_digest: model.header_digest(),
            generation: model.generation,
            eos: model.special.eos.clone(),
            context: config.engine.context_of(&model.config),
            config: model.config.clone(),
        }
    }

    /// Returns whether the worker follows another stage.
    pub(crate) fn is_later_stage(&self) -> bool {
        self.layers.start > 0
    }

    /// Returns the layers as in `--layers`.
    pub(crate) fn layers_label(&self) -> String {
        format!("{}..{}", self.layers.start, self.layers.end)
    }

    pub(crate) fn info(&self, identity: &str) -> v1::ModelInfo {
        v1::ModelInfo {
            name: self.name.clone(),
            identity: identity.to_owned(),
            context_length: wire(self.context),
            vocab_size: wire(self.config.vocab),
        }
    }
}

impl Hosted {
    pub(super) fn new(core: &Core, facts: Facts) -> Self {
        let engine = &core.config.engine;
        let room = engine.max_sequences.saturating_add(engine.max_waiting);
        Self {
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            config: Arc::clone(&core.config),
            facts,
            metrics: core.metrics.clone(),
            pool: core.pool.clone(),
            phase: watch::Sender::new(Phase::Loading("the weights are being read")),
            changes: core.changes.clone(),
            loaded: RwLock::default(),
            active: Active::default(),
            evicted: core.evicted.child_token(),
        }
    }

    /// Returns how far the model is.
    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Enters a phase, unless the model drains.
    pub(crate) fn enter(&self, phase: Phase) {
        let entered = self.phase.send_if_modified(|present| {
            let enters = *present != Phase::Draining && *present != phase;
            if enters {
                *present = phase;
            }
            enters
        });
        if entered {
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// Hands the model over to the services.
    pub(crate) fn install(&self, loaded: Arc<Loaded>) {
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = Some(loaded);
    }

    /// Returns the model, if it is in memory.
    pub(crate) fn loaded(&self) -> Option<Arc<Loaded>> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the model and its engine, if requests can be taken now.
    pub(crate) fn serving(&self) -> Result<(Arc<Loaded>, Arc<Engine>), Status> {
        if self.facts.is_later_stage() {
            return Err(Reason::ModelUnknown.status(format!(
                "this worker holds layers {} of {}: ask the head of its pipeline",
                self.facts.layers_label(),
                self.facts.name
            )));
        }
        let loaded = self.ready()?;
        match &loaded.role {
            Role::Engine(engine) => {
                let engine = Arc::clone(engine);
                Ok((loaded, engine))
            }
            Role::Stage(_) => unreachable!("a stage begins after layer 0"),
        }
    }

    /// Returns the model if it is ready, else says why it is not.
    pub(crate) fn ready(&self) -> Result<Arc<Loaded>, Status> {
        let refused = match (self.phase(), self.loaded()) {
            (Phase::Ready(_), Some(loaded)) => return Ok(loaded),
            (Phase::Draining, _) => self.draining(),
            (Phase::Loading(why), _) => loading(why),
            (Phase::Ready(_), None) => loading("the weights are being read"),
        };
        self.reject(&refused);
        Err(refused)
    }

    /// Returns the status of everything that a drain refuses or ends.
    pub(crate) fn draining(&self) -> Status {
        Reason::Draining.status(format!("worker {} is about to stop", self.config.id))
    }

    /// Takes one of the places for requests.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.room).try_acquire_owned().map_err(|_| {
            let most = self.config.engine.max_sequences + self.config.engine.max_waiting;
            self.overloaded(format!("{most} requests are in progress, as many as fit"))
        })
    }

    /// Counts one more thing in progress until the guard is dropped. To be called before the phase
    /// is looked at, or a drain could overlook it.
    pub(crate) fn begin(&self) -> ActiveGuard {
        self.active.begin()
    }

    /// Returns the status of a request that finds no room.
    pub(crate) fn overloaded(&self, message: String) -> Status {
        let refused = Reason::Overloaded.status_retry_after(message, RETRY_AFTER);
        self.reject(&refused);
        refused
    }

    fn reject(&self, refused: &Status) {
        if let Some(reason) = Reason::of(refused) {
            self.metrics.reject(Component::Worker, reason.as_str());
        }
    }

    /// Returns what the registry should say of the model in a phase.
    pub(crate) fn record(&self, phase: &Phase) -> ModelRecord {
        let (state, identity) = match phase {
            Phase::Loading(_) => (ModelState::Loading, ""),
            Phase::Ready(identity) => (ModelState::Ready, &**identity),
            Phase::Draining => (ModelState::Draining, ""),
        };
        let facts = &self.facts;
        let mut header_digest = String::with_capacity(2 * facts.header_digest.len());
        for byte in facts.header_digest {
            write!(header_digest, "{byte:02x}").expect("writing to a string cannot fail");
        }
        ModelRecord {
            name: facts.name.clone(),
            identity: identity.to_owned(),
            header_digest,
            layers: LayerRange { start: wire(facts.layers.start), end: wire(facts.layers.end) },
            layer_count: wire(facts.config.layers),
            context_length: wire(facts.context),
            vocab_size: wire(facts.config.vocab),
            state,
        }
    }
}

fn loading(why: &str) -> Status {
    Reason::Loading.status_retry_after(format!("not ready: {why}"), RETRY_AFTER)
}
