//! Reads a model into memory. Blocking: minutes for a large one.

use std::{
    ops::ControlFlow,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tercet_engine::{
    Engine, EngineError, EngineOptions, Follower, ModelError, ModelFile, StepReport, demo,
    model_file::{LoadProgress, identity},
};
use tercet_proto::v1::LoadStage;
use tercet_telemetry::{Metrics, RowKind};
use tercet_text::{ChatTemplate, Grammars, TemplateError, Tokenizer, TokenizerError};
use thiserror::Error;

use crate::{
    ModelSource,
    core::{Hosted, Loaded, Progress, Role},
    pipeline::Stage,
};

/// Why a model could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The model file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model file is at fault, or of a kind that is not supported.
    #[error("build the tokenizer of the model")]
    Tokenizer(#[from] TokenizerError),
    /// The model file is at fault.
    #[error("parse the chat template of the model")]
    Template(#[from] TemplateError),
    /// The configuration or the machine is at fault.
    #[error("set up the engine")]
    Engine(#[from] EngineError),
    /// The machine is at fault.
    #[error("start the thread of the pipeline stage")]
    Thread(#[source] std::io::Error),
}

/// Opens the model, headers only.
pub(crate) fn open(source: &ModelSource) -> Result<ModelFile, ModelError> {
    match source {
        ModelSource::BuiltIn => demo::model(),
        ModelSource::Path(path) => ModelFile::open(path),
    }
}

/// Loads the layers that the worker holds.
pub(crate) fn load(file: &ModelFile, model: &Hosted) -> Result<Loaded, LoadError> {
    let Hosted { facts, metrics, pool, .. } = model;
    let (tokenizer, template) = text_parts(file)?;
    let tokenizer = Arc::new(tokenizer);
    let grammars = Arc::new(Grammars::new(Arc::clone(&tokenizer), facts.config.vocab));
    let options = EngineOptions { grammars: Some(Arc::clone(&grammars)), ..model.options() };
    let reading = &mut reporter(model, LoadStage::Reading);
    let hashing = &mut reporter(model, LoadStage::Hashing);
    let (role, parts, unverified) = if facts.is_later_stage() {
        let follower = Follower::load_on(file, &options, pool, reading)?;
        model.keep_kv(follower.kv_bytes());
        let parts = follower.part_digests(hashing)?;
        let unverified = follower.unverified();
        let stage = Stage::start(follower, facts, &parts, metrics.clone());
        (Role::Stage(stage.map_err(LoadError::Thread)?), parts, unverified)
    } else {
        let engine = Engine::load_on(file, &options, pool, None, reading)?;
        model.keep_kv(engine.kv_bytes());
        let parts = engine.part_digests(hashing)?;
        let (metrics, name, meter) = (metrics.clone(), facts.name.clone(), model.meter.clone());
        engine.observe_steps(Box::new(move |report| {
            count(&metrics, &name, report);
            meter.step(report);
        }));
        let unverified = engine.unverified();
        (Role::Engine(Arc::new(engine)), parts, unverified)
    };
    let unverified = Mutex::new(unverified);
    Ok(Loaded { tokenizer, template, grammars, parts, unverified, role })
}

/// Compares the weights of a native file with the digests it tells, which were believed so far.
pub(crate) fn check(loaded: &Loaded, model: &Hosted) -> Result<(), ModelError> {
    let unverified = loaded.unverified.lock().unwrap_or_else(PoisonError::into_inner).take();
    let closing = model.closing.clone();
    unverified.map_or(Ok(()), |unverified| {
        unverified.verify(&mut |_| match closing.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    })
}

/// What [`verify`] finds of a model that is whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verified {
    /// The model's own name.
    pub name: String,
    /// Digest of weights, tokenizer, template and numerics, in hexadecimal.
    pub identity: String,
}

/// Reads the model at `path` as a worker does, every byte of it, one layer in memory at a time;
/// `report` is told the layers done and their number.
///
/// # Errors
/// If a worker could not load it.
pub fn verify(path: &Path, report: &mut dyn FnMut(usize, usize)) -> Result<Verified, LoadError> {
    let file = ModelFile::open(path)?.doubted();
    text_parts(&file)?;
    let layers = file.config.layers;
    let mut parts = Vec::new();
    for layer in 0..layers {
        parts.extend(file.load(layer..layer + 1)?.part_digests());
        report(layer + 1, layers);
    }
    file.check_digests(&parts)?;
    let identity = identity(&file.header_digest(), &parts);
    Ok(Verified { name: file.name, identity })
}

/// Builds what turns text into ids and back.
fn text_parts(file: &ModelFile) -> Result<(Tokenizer, Option<ChatTemplate>), LoadError> {
    let tokenizer = Tokenizer::new(&file.tokenizer, file.special.clone())?;
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    let (bos, eos) = (text(file.special.bos), text(file.special.eos.first().copied()));
    let template = file.chat_template.as_deref();
    let template = template.map(|source| ChatTemplate::new(source, bos, eos)).transpose()?;
    Ok((tokenizer, template))
}

/// Counts a step of the engine of a model.
fn count(metrics: &Metrics, model: &str, report: &StepReport) {
    let StepReport { shape, tally, elapsed, screen } = report;
    let rows = [
        (RowKind::Prompt, shape.prompt_rows),
        (RowKind::Decode, shape.decode_rows),
        (RowKind::Draft, shape.draft_rows),
    ];
    metrics.step(model, *elapsed, &rows);
    metrics.preempted(model, tally.preemptions);
    metrics.prefix_hit(model, tally.hit_tokens);
    metrics.drafted(model, tally.drafted, tally.accepted);
    metrics.screened(model, screen.tokens, screen.rows, screen.fallbacks);
}

/// Returns what tells of a stage of loading, and ends it when the model is not wanted any more.
fn reporter(model: &Hosted, stage: LoadStage) -> impl FnMut(LoadProgress) -> ControlFlow<()> {
    let (progress, closing) = (model.progress.clone(), model.closing.clone());
    move |LoadProgress { done, total }| {
        let stage = stage.into();
        progress.send_replace(Progress { stage, done_bytes: done, total_bytes: total });
        if closing.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
