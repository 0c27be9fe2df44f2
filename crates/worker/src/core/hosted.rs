//! One model of a worker: what is known of it, how far it is, who uses it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use tercet_cluster::{LayerRange, ModelRecord, ModelState, Rate};
use tercet_engine::{
    ComputePool, Engine, EngineOptions, ModelConfig, PAGE_POSITIONS, Unverified,
    model_file::{GenerationDefaults, ModelFile, Totals},
};
use tercet_proto::{Reason, v1};
use tercet_telemetry::{Component, Metrics};
use tercet_text::{ChatTemplate, Grammars, SpecialTokens, Tokenizer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Active, ActiveGuard, Core, budget::KvShare, wire};
use crate::{Config, ModelSpec, company::Floor, meter::Meter, pipeline::Stage};

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
    /// Cannot be computed any more, and why. Only a drain follows.
    Failed(Arc<str>),
}

impl Phase {
    /// Returns the state as metrics call it.
    pub(crate) fn state(&self) -> &'static str {
        match self {
            Self::Loading(_) => "loading",
            Self::Ready(_) => "ready",
            Self::Draining => "draining",
            Self::Failed(_) => "failed",
        }
    }

    /// Returns the state as it is written on the wire.
    pub(crate) fn wire(&self) -> v1::ModelState {
        match self {
            Self::Loading(_) => v1::ModelState::Loading,
            Self::Ready(_) => v1::ModelState::Ready,
            Self::Draining => v1::ModelState::Draining,
            Self::Failed(_) => v1::ModelState::Failed,
        }
    }
}

/// How far the loading of a model is.
pub(crate) type Progress = v1::LoadProgress;

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
    has_chat_template: bool,
    /// How the file stores most of the ternary weights.
    quantization: String,
    totals: Totals,
}

/// A model in memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) grammars: Arc<Grammars>,
    /// Digests of the tensors held, in model order.
    pub(crate) parts: Vec<(String, [u8; 32])>,
    /// Weights of a native file that have not been compared with these digests.
    pub(crate) unverified: Mutex<Option<Unverified>>,
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
    /// Greater for each later model of the worker.
    pub(crate) generation: u64,
    /// Its part of the worker's KV memory, for as long as it may use it.
    share: Mutex<Option<KvShare>>,
    /// How far the loading is.
    pub(crate) progress: watch::Sender<Progress>,
    /// Streams, scorings and pipeline links in progress.
    pub(crate) active: Active,
    /// What its requests still take, and how fast it computes them.
    pub(crate) meter: Meter,
    /// Who is computed beside whom, in all models.
    pub(crate) floor: Floor,
    /// Cancelled when a drain has lasted too long: whatever is active must end.
    pub(crate) evicted: CancellationToken,
    /// Cancelled when the model is to leave memory. Nothing is active any more, or has been told
    /// to end.
    pub(crate) closing: CancellationToken,
    /// Cancelled when the model has left memory.
    pub(crate) gone: CancellationToken,
}

impl Facts {
    pub(crate) fn new(model: &ModelFile, spec: &ModelSpec, config: &Config) -> Self {
        Self {
            name: spec.name.clone().unwrap_or_else(|| model.name.clone()),
            layers: config.engine.layers.clone().unwrap_or(0..model.config.layers),
            header_digest: model.header_digest(),
            generation: model.generation,
            eos: model.special.eos.clone(),
            has_chat_template: model.chat_template.is_some(),
            quantization: model.quantization(),
            totals: model.summary().totals,
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

    /// Returns all that clients may want to know of the model.
    pub(crate) fn describe(&self, identity: &str, special: &SpecialTokens) -> v1::GetModelResponse {
        let ModelConfig { architecture, layers, hidden, heads, kv_heads, .. } = self.config;
        let GenerationDefaults { temperature, top_k, top_p, min_p, repetition_penalty } =
            self.generation;
        v1::GetModelResponse {
            model: Some(self.info(identity)),
            architecture: architecture.to_string(),
            quantization: self.quantization.clone(),
            layer_count: wire(layers),
            hidden_size: wire(hidden),
            head_count: wire(heads),
            kv_head_count: wire(kv_heads),
            parameter_count: self.totals.parameters,
            ternary_parameter_count: self.totals.ternary_parameters,
            weight_bytes: self.totals.bytes,
            kv_bytes_per_token: self.config.kv_bytes_per_position() as u64,
            bos_token_id: special.bos,
            adds_bos: special.add_bos,
            eos_token_ids: self.eos.clone(),
            has_chat_template: self.has_chat_template,
            sampling_defaults: Some(v1::Sampling {
                temperature: Some(temperature),
                top_k: Some(top_k),
                top_p: Some(top_p),
                seed: None,
                min_p: Some(min_p),
                repetition_penalty: Some(repetition_penalty),
                frequency_penalty: Some(0.0),
                presence_penalty: Some(0.0),
                logit_bias: BTreeMap::new(),
            }),
        }
    }
}

impl Hosted {
    pub(super) fn new(core: &Core, facts: Facts, share: KvShare, generation: u64) -> Self {
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
            generation,
            share: Mutex::new(Some(share)),
            progress: watch::Sender::default(),
            active: Active::new(core.traffic.clone()),
            meter: Meter::default(),
            floor: core.floor.clone(),
            evicted: core.evicted.child_token(),
            closing: core.closing.child_token(),
            gone: CancellationToken::new(),
        }
    }

    /// Returns how far the model is.
    pub(crate) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Returns a receiver that changes with the phase.
    pub(crate) fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Enters a phase, unless the model drains, or failed and does not drain now. Returns whether
    /// it did.
    pub(crate) fn enter(&self, phase: Phase) -> bool {
        let entered = self.phase.send_if_modified(|present| {
            let enters = match (&*present, &phase) {
                (Phase::Draining, _) => false,
                (Phase::Failed(_), next) => *next == Phase::Draining,
                (present, next) => present != next,
            };
            if enters {
                *present = phase;
            }
            enters
        });
        if entered {
            self.metrics.set_model_state(&self.facts.name, self.phase().state());
            self.changes.send_modify(|changes| *changes += 1);
        }
        entered
    }

    /// Returns the options of the engine, with the KV memory that the model has.
    pub(crate) fn options(&self) -> EngineOptions {
        let layers = Some(self.facts.layers.clone());
        EngineOptions { layers, kv_bytes: self.kv_bytes(), ..self.config.engine.clone() }
    }

    /// Returns the bytes of KV memory that the model may use.
    pub(crate) fn kv_bytes(&self) -> usize {
        self.share().as_ref().map_or(0, KvShare::bytes)
    }

    /// Returns KV memory that the model has no use for.
    pub(crate) fn keep_kv(&self, bytes: usize) {
        if let Some(share) = self.share().as_mut() {
            share.shrink(bytes);
        }
    }

    fn share(&self) -> MutexGuard<'_, Option<KvShare>> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the model out of memory, except for what those who use it still hold. Blocking: joins
    /// its threads.
    pub(crate) fn discard(&self) {
        let loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Role::Engine(engine)) = loaded.as_ref().map(|loaded| &loaded.role) {
            engine.stop();
        }
        drop(loaded);
        *self.share() = None;
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
            (Phase::Loading(why), _) => self.loading(why),
            (Phase::Failed(why), _) => self.failed(&why),
            (Phase::Ready(_), None) => self.failed("it is not in memory any more"),
        };
        self.reject(&refused);
        Err(refused)
    }

    /// Returns the status of everything that a drain refuses or ends.
    pub(crate) fn draining(&self) -> Status {
        let (name, id) = (&self.facts.name, &self.config.id);
        Reason::Draining.status(format!("model {name:?} is about to leave worker {id}"))
    }

    fn loading(&self, why: &str) -> Status {
        let name = &self.facts.name;
        let message = format!("model {name:?} is not ready: {why}");
        Reason::Loading.status_retry_after(message, RETRY_AFTER)
    }

    /// Returns the status of what a model that failed refuses.
    pub(crate) fn failed(&self, why: &str) -> Status {
        Reason::WorkerFailed.status(format!("model {:?} failed: {why}", self.facts.name))
    }

    /// Takes one of the places for requests.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.room).try_acquire_owned().map_err(|_| {
            let most = self.config.engine.max_sequences + self.config.engine.max_waiting;
            self.overloaded(format!(
                "{most} requests for model {:?} are in progress, as many as fit",
                self.facts.name
            ))
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
            Phase::Failed(_) => (ModelState::Failed, ""),
        };
        let (facts, speed) = (&self.facts, self.meter.speed());
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
            generation: self.generation,
            kv_tokens: self.kv_tokens(),
            decode_rate: Rate::measured(speed.decode()),
            prefill_rate: Rate::measured(speed.prefill()),
        }
    }

    /// Returns how many tokens the KV memory holds; 0 until the model is loaded.
    fn kv_tokens(&self) -> u64 {
        let pages = match self.loaded().as_ref().map(|loaded| &loaded.role) {
            Some(Role::Engine(engine)) => engine.load_now().pages,
            Some(Role::Stage(stage)) => stage.kv_pages,
            None => 0,
        };
        (pages * PAGE_POSITIONS) as u64
    }
}
