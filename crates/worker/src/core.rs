//! What all services of a worker share.

use std::{
    fmt::Write as _,
    ops::Range,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tercet_cluster::{LayerRange, ModelRecord, WorkerRecord, WorkerState};
use tercet_engine::{
    Engine, ModelConfig,
    model_file::{GenerationDefaults, ModelFile},
};
use tercet_proto::{Reason, v1};
use tercet_telemetry::{Component, Metrics};
use tercet_text::{ChatTemplate, Tokenizer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use crate::{Config, pipeline::Stage};

/// When callers of a worker that loads, or has no room, should come back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How far a worker is.
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

/// What is known of the model before it is loaded.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Name in requests.
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    /// Layers held.
    pub(crate) layers: Range<usize>,
    pub(crate) header_digest: [u8; 32],
    pub(crate) generation: GenerationDefaults,
    /// End-of-sequence tokens.
    pub(crate) eos: Vec<u32>,
}

/// The model in memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    /// Digests of the tensors held, in model order.
    pub(crate) parts: Vec<(String, [u8; 32])>,
    pub(crate) role: Role,
}

/// What the worker does with its layers.
#[derive(Debug)]
pub(crate) enum Role {
    /// Takes requests: it holds the whole model, or heads a pipeline.
    Engine(Arc<Engine>),
    /// Follows the stage before it.
    Stage(Stage),
}

/// What all services of a worker share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) facts: Facts,
    pub(crate) metrics: Metrics,
    phase: watch::Sender<Phase>,
    loaded: OnceLock<Loaded>,
    /// One permit for each request that the engine may hold.
    room: Arc<Semaphore>,
    /// Streams, scorings and pipeline links in progress.
    pub(crate) active: Active,
    /// Cancelled when a drain has lasted too long: whatever is active must end.
    pub(crate) evicted: CancellationToken,
    /// Tasks of pipeline links.
    pub(crate) tasks: TaskTracker,
}

impl Facts {
    pub(crate) fn new(model: &ModelFile, config: &Config) -> Self {
        Self {
            name: config.model_name.clone().unwrap_or_else(|| model.name.clone()),
            layers: config.engine.layers.clone().unwrap_or(0..model.config.layers),
            header_digest: model.header_digest(),
            generation: model.generation,
            eos: model.special.eos.clone(),
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
            context_length: wire(self.config.context),
            vocab_size: wire(self.config.vocab),
        }
    }
}

impl Core {
    pub(crate) fn new(config: Config, facts: Facts, metrics: Metrics) -> Self {
        let room = config.engine.max_sequences.saturating_add(config.engine.max_waiting);
        Self {
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            config,
            facts,
            metrics,
            phase: watch::Sender::new(Phase::Loading("the weights are being read")),
            loaded: OnceLock::new(),
            active: Active::default(),
            evicted: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Returns a receiver that changes with the phase.
    pub(crate) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Enters a phase, unless the worker drains.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|present| {
            let enters = *present != Phase::Draining && *present != phase;
            if enters {
                *present = phase;
            }
            enters
        });
    }

    /// Hands the model over to the services. Only once.
    pub(crate) fn install(&self, loaded: Loaded) {
        let installed = self.loaded.set(loaded);
        debug_assert!(installed.is_ok(), "a worker loads one model");
    }

    /// Returns the model, if it is in memory.
    pub(crate) fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    /// Returns the engine and what belongs to it, if requests can be taken now.
    pub(crate) fn serving(&self) -> Result<(&Loaded, &Arc<Engine>), Status> {
        if self.facts.is_later_stage() {
            return Err(Reason::ModelUnknown.status(format!(
                "this worker holds layers {} of {}: ask the head of its pipeline",
                self.facts.layers_label(),
                self.facts.name
            )));
        }
        match self.ready()? {
            loaded @ Loaded { role: Role::Engine(engine), .. } => Ok((loaded, engine)),
            Loaded { role: Role::Stage(_), .. } => unreachable!("a stage begins after layer 0"),
        }
    }

    /// Returns the model if the worker is ready, else says why it is not.
    pub(crate) fn ready(&self) -> Result<&Loaded, Status> {
        let refused = match (&*self.phase.borrow(), self.loaded()) {
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

    /// Checks that the model asked for is the one held.
    pub(crate) fn check_name(&self, asked: Option<&str>) -> Result<(), Status> {
        match asked {
            Some(asked) if asked != self.facts.name => Err(Reason::ModelUnknown
                .status(format!("model {asked:?} is not served here: {:?} is", self.facts.name))),
            _ => Ok(()),
        }
    }

    /// Takes one of the places for requests.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.room).try_acquire_owned().map_err(|_| {
            let most = self.config.engine.max_sequences + self.config.engine.max_waiting;
            self.overloaded(format!("{most} requests are in progress, as many as fit"))
        })
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

    /// Returns what the registry should say of the worker in a phase.
    pub(crate) fn record(&self, phase: &Phase) -> WorkerRecord {
        let (state, identity) = match phase {
            Phase::Loading(_) => (WorkerState::Loading, ""),
            Phase::Ready(identity) => (WorkerState::Ready, &**identity),
            Phase::Draining => (WorkerState::Draining, ""),
        };
        let facts = &self.facts;
        let mut header_digest = String::with_capacity(2 * facts.header_digest.len());
        for byte in facts.header_digest {
            write!(header_digest, "{byte:02x}").expect("writing to a string cannot fail");
        }
        WorkerRecord {
            id: self.config.id.clone(),
            address: self.config.address.clone(),
            epoch: self.config.epoch,
            state,
            models: vec![ModelRecord {
                name: facts.name.clone(),
                identity: identity.to_owned(),
                header_digest,
                layers: LayerRange { start: wire(facts.layers.start), end: wire(facts.layers.end) },
                layer_count: wire(facts.config.layers),
                context_length: wire(facts.config.context),
                vocab_size: wire(facts.config.vocab),
            }],
            max_sequences: wire(self.config.engine.max_sequences),
        }
    }
}

fn loading(why: &str) -> Status {
    Reason::Loading.status_retry_after(format!("not ready: {why}"), RETRY_AFTER)
}

/// Returns a size as it is written on the wire. Sizes of models and limits are far below 2^32.
pub(crate) fn wire(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Counts what is in progress.
#[derive(Clone, Debug, Default)]
pub(crate) struct Active(watch::Sender<usize>);

/// One thing in progress.
#[derive(Debug)]
pub(crate) struct ActiveGuard(watch::Sender<usize>);

impl Active {
    /// Counts one more until the guard is dropped.
    pub(crate) fn begin(&self) -> ActiveGuard {
        self.0.send_modify(|active| *active += 1);
        ActiveGuard(self.0.clone())
    }

    /// Returns when nothing is in progress.
    pub(crate) async fn idle(&self) {
        let waited = self.0.subscribe().wait_for(|active| *active == 0).await.map(drop);
        debug_assert!(waited.is_ok(), "the sender is `self`");
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.send_modify(|active| *active -= 1);
    }
}
