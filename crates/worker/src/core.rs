//! What all services of a worker share.

mod budget;
mod hosted;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tercet_cluster::{WorkerRecord, WorkerState};
use tercet_engine::{ComputePool, PoolError};
use tercet_proto::{InvalidRequest, Reason};
use tercet_telemetry::Metrics;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

pub use self::budget::NoKvMemory;
pub(crate) use self::{
    budget::{KvBudget, KvShare},
    hosted::{Facts, Hosted, Loaded, Phase, Progress, Role},
};
use crate::{Config, company::Floor};

/// Why a worker without models is not ready.
const NO_MODEL: &str = "no model is loaded";

/// Most names of models that a message lists.
const LISTED: usize = 8;

/// What all services of a worker share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Arc<Config>,
    pub(crate) metrics: Metrics,
    /// The compute threads, for all models.
    pub(crate) pool: ComputePool,
    /// The models by name. Held for a look-up.
    models: RwLock<BTreeMap<String, Arc<Hosted>>>,
    /// Grows with every change of the models and of their phases.
    changes: watch::Sender<u64>,
    /// Grows whenever something begins or ends at one of the models.
    traffic: watch::Sender<u64>,
    draining: AtomicBool,
    /// Cancelled when an operator wants the worker to stop.
    pub(crate) told_to_stop: CancellationToken,
    /// Cancelled when a drain has lasted too long: whatever is active must end.
    pub(crate) evicted: CancellationToken,
    /// Cancelled at the end: the models leave memory.
    pub(crate) closing: CancellationToken,
    /// The KV memory, for all models.
    pub(crate) kv: KvBudget,
    /// Counts the models ever hosted.
    generations: AtomicU64,
    /// Who is computed beside whom.
    floor: Floor,
    /// Tasks of models and pipeline links.
    pub(crate) tasks: TaskTracker,
}

impl Core {
    pub(crate) fn new(config: Config, metrics: Metrics) -> Result<Self, PoolError> {
        Ok(Self {
            pool: ComputePool::new(config.engine.threads)?,
            kv: KvBudget::new(config.engine.kv_bytes),
            config: Arc::new(config),
            metrics,
            models: RwLock::default(),
            changes: watch::Sender::new(0),
            traffic: watch::Sender::new(0),
            draining: AtomicBool::new(false),
            told_to_stop: CancellationToken::new(),
            evicted: CancellationToken::new(),
            closing: CancellationToken::new(),
            generations: AtomicU64::new(0),
            floor: Floor::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Adds a model that is still to be loaded; nothing if there is one of that name.
    pub(crate) fn host(&self, facts: Facts, share: KvShare) -> Option<Arc<Hosted>> {
        // Also greater than in earlier lives of the worker, whose gateways may be the same.
        let generation = self.config.epoch + self.generations.fetch_add(1, Ordering::Relaxed);
        let hosted = Arc::new(Hosted::new(self, facts, share, generation));
        {
            let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
            if models.contains_key(&hosted.facts.name) {
                return None;
            }
            models.insert(hosted.facts.name.clone(), Arc::clone(&hosted));
        }
        // A drain that began in between would overlook it.
        if self.is_draining() {
            hosted.enter(Phase::Draining);
        }
        self.changes.send_modify(|changes| *changes += 1);
        Some(hosted)
    }

    /// Removes a model that has left memory.
    pub(crate) fn forget(&self, model: &Hosted) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.remove(&model.facts.name);
        drop(models);
        self.metrics.forget_model(&model.facts.name);
        model.gone.cancel();
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Returns a receiver that changes with the models and their phases.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Returns a receiver that changes when something begins or ends at one of the models.
    pub(crate) fn traffic(&self) -> watch::Receiver<u64> {
        self.traffic.subscribe()
    }

    /// Returns the models, by name.
    pub(crate) fn models(&self) -> Vec<Arc<Hosted>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.values().map(Arc::clone).collect()
    }

    /// Returns the model of that name.
    pub(crate) fn model(&self, name: &str) -> Option<Arc<Hosted>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).get(name).map(Arc::clone)
    }

    /// Returns the model that a request means: the one named, or the only one.
    pub(crate) fn find(&self, asked: Option<&str>) -> Result<Arc<Hosted>, Status> {
        if let Some(asked) = asked {
            return self.model(asked).ok_or_else(|| {
                Reason::ModelUnknown
                    .status(format!("model {asked:?} is not served here: {}", self.served()))
            });
        }
        let mut models = self.models();
        let stays =
            |model: &Arc<Hosted>| !matches!(model.phase(), Phase::Draining | Phase::Failed(_));
        // Those on their way out are asked only if there is nothing else, to say so themselves.
        if models.iter().any(stays) {
            models.retain(stays);
        }
        match models.as_slice() {
            [only] => Ok(Arc::clone(only)),
            [] => Err(Reason::ModelUnknown.status(NO_MODEL)),
            _ => {
                let description =
                    format!("several models are served, name one of them: {}", self.served());
                Err(InvalidRequest::new("model", description).into())
            }
        }
    }

    /// Returns the names of the models for a message, not too many.
    fn served(&self) -> String {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        if models.is_empty() {
            return NO_MODEL.to_owned();
        }
        let names: Vec<String> =
            models.keys().take(LISTED).map(|name| format!("{name:?}")).collect();
        let verb = if models.len() == 1 { "is" } else { "are" };
        match models.len() - names.len() {
            0 => format!("{} {verb}", names.join(", ")),
            more => format!("{} and {more} more {verb}", names.join(", ")),
        }
    }

    /// Takes nothing new from now on, for good.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        for model in self.models() {
            model.enter(Phase::Draining);
        }
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Returns whether the worker is about to stop.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Returns when nothing is in progress.
    pub(crate) async fn idle(&self) {
        for model in self.models() {
            model.active.idle().await;
        }
    }

    /// Returns whether the worker takes anything, or why not.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.is_draining() {
            return Err("draining".to_owned());
        }
        let mut waits = NO_MODEL;
        for model in self.models() {
            match model.phase() {
                Phase::Ready(_) => return Ok(()),
                Phase::Loading(why) => waits = why,
                Phase::Failed(_) if waits == NO_MODEL => waits = "a model failed",
                Phase::Failed(_) | Phase::Draining => {}
            }
        }
        Err(waits.to_owned())
    }

    /// Returns whether all models have failed: nothing but a new start helps.
    pub(crate) fn is_lost(&self) -> bool {
        let models = self.models();
        let failed = |model: &Arc<Hosted>| matches!(model.phase(), Phase::Failed(_));
        !models.is_empty() && models.iter().all(failed)
    }

    /// Returns what the worker takes.
    pub(crate) fn state(&self) -> WorkerState {
        self.state_of(&self.models().iter().map(|model| model.phase()).collect::<Vec<_>>())
    }

    fn state_of(&self, phases: &[Phase]) -> WorkerState {
        if self.is_draining() {
            WorkerState::Draining
        } else if phases.iter().any(|phase| matches!(phase, Phase::Ready(_))) {
            WorkerState::Ready
        } else {
            WorkerState::Loading
        }
    }

    /// Returns what the registry should say of the worker.
    pub(crate) fn record(&self) -> WorkerRecord {
        let models = self.models();
        let phases: Vec<Phase> = models.iter().map(|model| model.phase()).collect();
        let state = self.state_of(&phases);
        WorkerRecord {
            id: self.config.id.clone(),
            address: self.config.address.clone(),
            epoch: self.config.epoch,
            state,
            models: models.iter().zip(&phases).map(|(model, phase)| model.record(phase)).collect(),
            max_sequences: wire(self.config.engine.max_sequences),
        }
    }
}

/// Returns a size as it is written on the wire. Sizes of models and limits are far below 2^32.
pub(crate) fn wire(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// Counts what is in progress.
#[derive(Clone, Debug)]
pub(crate) struct Active {
    count: watch::Sender<usize>,
    /// Grows with every change of the count, of whichever model.
    traffic: watch::Sender<u64>,
}

/// One thing in progress.
#[derive(Debug)]
pub(crate) struct ActiveGuard(Active);

impl Active {
    fn new(traffic: watch::Sender<u64>) -> Self {
        Self { count: watch::Sender::default(), traffic }
    }

    /// Counts one more until the guard is dropped.
    pub(crate) fn begin(&self) -> ActiveGuard {
        self.count.send_modify(|active| *active += 1);
        self.traffic.send_modify(|changes| *changes += 1);
        ActiveGuard(self.clone())
    }

    /// Returns how much is in progress.
    pub(crate) fn count(&self) -> usize {
        *self.count.borrow()
    }

    /// Returns when nothing is in progress.
    pub(crate) async fn idle(&self) {
        let waited = self.count.subscribe().wait_for(|active| *active == 0).await.map(drop);
        debug_assert!(waited.is_ok(), "the sender is `self`");
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.0.count.send_modify(|active| *active -= 1);
        self.0.traffic.send_modify(|changes| *changes += 1);
    }
}
