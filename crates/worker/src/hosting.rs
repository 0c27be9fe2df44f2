//! The life of a model in a worker: read, hashed, warmed up, served, taken out of memory.
//!
//! ```text
//! loading --> ready --> draining --> (streams end) --> gone
//!    |          +-----> failed --------^   the compute thread broke down, or a native file has lied:
//!    |                                     its memory is returned, the name stays until the model
//!    +--> gone: damaged, interrupted       is unloaded
//! ```

use std::{error::Error as StdError, sync::Arc, time::Duration};

use tercet_cluster::Registry;
use tercet_engine::{
    Engine, EngineError, ModelError, ModelFile, Output, SamplingParams, SequenceRequest, model_file,
};
use tercet_proto::v1::LoadStage;
use tercet_telemetry::{PageState, SequenceState};
use thiserror::Error;
use tokio::{
    sync::mpsc,
    task,
    time::{self, MissedTickBehavior},
};

use crate::{
    LoadError,
    core::{Core, Hosted, Loaded, Phase, Progress, Role},
    load,
    mailbox::{End, mailbox},
    pipeline::head,
};

/// How long streams that have to move get to say so.
const FLUSH: Duration = Duration::from_secs(1);
/// How often the load is measured and the compute thread looked after.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// What is told of a model whose file has lied.
const NOT_VERIFIED: &str = "its weights are not what its file says: convert the model again";
/// What is told of a model whose compute thread ended.
const BROKE_DOWN: &str = "its compute thread broke down: unload the model and load it again";

/// Why a model is not served, or served no longer.
#[derive(Debug, Error)]
pub(crate) enum HostError {
    /// The file, the configuration or the machine is at fault.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model file is at fault, or we are.
    #[error("the warm-up generation failed: {0}")]
    WarmUp(String),
    /// Fault: us.
    #[error("the loading broke down: {0}")]
    BrokeDown(String),
    /// All models have failed. Fault: us.
    #[error("the compute thread ended")]
    EngineLost,
}

/// Loads a model and keeps it until it is to leave memory. Returns once it has, and why it was
/// not served as long as it was wanted.
pub(crate) async fn host(
    core: Arc<Core>,
    model: Arc<Hosted>,
    file: ModelFile,
    registry: Arc<dyn Registry>,
) -> Result<(), HostError> {
    let hosted = read_and_serve(&core, &model, file, registry).await;
    model.enter(Phase::Draining);
    discard(&model).await;
    core.forget(&model);
    hosted
}

/// As [`host`], for a task of the worker: tells of failures that concern the worker as a whole.
pub(crate) async fn host_from_the_start(
    core: Arc<Core>,
    model: Arc<Hosted>,
    file: ModelFile,
    registry: Arc<dyn Registry>,
    failures: mpsc::Sender<HostError>,
) {
    if let Err(error) = host(core, model, file, registry).await {
        // One is enough to end the worker.
        drop(failures.try_send(error));
    }
}

async fn read_and_serve(
    core: &Core,
    model: &Arc<Hosted>,
    file: ModelFile,
    registry: Arc<dyn Registry>,
) -> Result<(), HostError> {
    let reading = Arc::clone(model);
    // Ends early when the model is not wanted any more.
    let read = task::spawn_blocking(move || load::load(&file, &reading));
    let loaded = match read.await.map_err(|error| HostError::BrokeDown(error.to_string()))? {
        Err(
            LoadError::Model(ModelError::Interrupted)
            | LoadError::Engine(EngineError::Model(ModelError::Interrupted)),
        ) => return Ok(()),
        loaded => Arc::new(loaded?),
    };
    model.install(Arc::clone(&loaded));
    let serving = async {
        tokio::select! {
            served = serve(model, &loaded, registry) => served,
            error = distrust(model, &loaded) => {
                let error = &error as &dyn StdError;
                tracing::error!(error, model = model.facts.name, "the model is not what its file says");
                model.enter(Phase::Failed(NOT_VERIFIED.into()));
                Ok(())
            }
            () = look_after(model, &loaded) => {
                tracing::error!(model = model.facts.name, "the compute thread broke down");
                model.enter(Phase::Failed(BROKE_DOWN.into()));
                Ok(())
            }
        }
    };
    let served = model.closing.run_until_cancelled(serving).await;
    drop(loaded);
    if matches!(model.phase(), Phase::Failed(_)) {
        discard(model).await;
        if core.is_lost() {
            return Err(HostError::EngineLost);
        }
        model.closing.cancelled().await;
    }
    served.unwrap_or(Ok(()))
}

/// Lets the streams of a model that drains finish, tells the rest to move, and returns their number
/// once the model has left memory.
pub(crate) async fn unload(model: Arc<Hosted>, grace: Duration) -> usize {
    tokio::select! {
        () = model.active.idle() => {}
        () = time::sleep(grace) => {}
        () = model.evicted.cancelled() => {}
    }
    let moved = model.active.count();
    model.evicted.cancel();
    // A caller that does not read keeps its stream; the memory goes all the same.
    drop(time::timeout(FLUSH, model.active.idle()).await);
    model.closing.cancel();
    model.gone.cancelled().await;
    moved
}

/// Gives the memory back; joins the threads of the model elsewhere.
async fn discard(model: &Arc<Hosted>) {
    let model = Arc::clone(model);
    let discarded = task::spawn_blocking(move || model.discard()).await;
    // Cancelled, it is the process that ends, and takes the memory with it.
    if let Some(error) = discarded.err().filter(task::JoinError::is_panic) {
        tracing::warn!(error = &error as &dyn StdError, "a model left memory badly");
    }
}

/// Warms a model up and lets requests in. Does not return after that.
async fn serve(
    model: &Arc<Hosted>,
    loaded: &Loaded,
    registry: Arc<dyn Registry>,
) -> Result<(), HostError> {
    let stage = LoadStage::WarmingUp.into();
    model.progress.send_replace(Progress { stage, ..Progress::default() });
    let identity: Arc<str> = match &loaded.role {
        Role::Engine(engine) if engine.is_whole() => {
            warm_up(engine).await.map_err(HostError::WarmUp)?;
            model_file::identity(&model.facts.header_digest, &loaded.parts).into()
        }
        Role::Engine(engine) => {
            let (model, engine) = (Arc::clone(model), Arc::clone(engine));
            match head::lead(model, engine, loaded, registry.watch()).await {}
        }
        Role::Stage(stage) => {
            stage.warm_up().await.map_err(HostError::WarmUp)?;
            "".into()
        }
    };
    tracing::info!(
        model = model.facts.name,
        layers = model.facts.layers_label(),
        %identity,
        "the model is warm"
    );
    model.enter(Phase::Ready(identity));
    std::future::pending().await
}

/// Generates two tokens: the weights are in memory then, and all parts have worked once.
pub(crate) async fn warm_up(engine: &Engine) -> Result<(), String> {
    let (sink, mailbox) = mailbox();
    let request = SequenceRequest {
        prompt: vec![0],
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        output: Output::Generate { max_tokens: 2, stop_ids: Vec::new() },
        traceparent: String::new(),
        cache_salt: String::new(),
    };
    let _handle = engine.submit(request, sink).map_err(|error| error.to_string())?;
    loop {
        match mailbox.receive().await.end {
            None => {}
            Some(End::Finished) => return Ok(()),
            Some(End::Failed(failure)) => return Err(failure.to_string()),
            Some(End::Scores(_) | End::Dropped) => return Err("the engine broke down".to_owned()),
        }
    }
}

/// Compares the weights of a native file with what it says of them; returns only if it has lied.
async fn distrust(model: &Arc<Hosted>, loaded: &Arc<Loaded>) -> ModelError {
    // First requests come first.
    let ready = |phase: &Phase| matches!(phase, Phase::Ready(_));
    drop(model.phases().wait_for(ready).await);
    let (hosted, held) = (Arc::clone(model), Arc::clone(loaded));
    let checked = task::spawn_blocking(move || load::check(&held, &hosted)).await;
    match checked {
        Ok(Err(error)) if !matches!(error, ModelError::Interrupted) => error,
        _ => std::future::pending().await,
    }
}

/// Measures the load until the compute thread is gone.
async fn look_after(model: &Hosted, loaded: &Loaded) {
    let mut heartbeat = time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (metrics, name) = (&model.metrics, &model.facts.name);
    loop {
        heartbeat.tick().await;
        match &loaded.role {
            Role::Engine(engine) if !engine.is_alive() => return,
            Role::Engine(engine) => {
                let load = engine.load_now();
                metrics.set_sequences(name, SequenceState::Running, load.running);
                metrics.set_sequences(name, SequenceState::Waiting, load.waiting);
                let held = load.pages_referenced + load.pages_cached;
                metrics.set_kv_pages(name, PageState::Used, load.pages_referenced);
                metrics.set_kv_pages(name, PageState::Cached, load.pages_cached);
                metrics.set_kv_pages(name, PageState::Free, load.pages - held);
            }
            // Counts by itself, step by step.
            Role::Stage(stage) if !stage.is_alive() => return,
            Role::Stage(_) => {}
        }
    }
}
