//! The `Worker` service: what the worker holds, and models loaded and unloaded at run time.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::BoxStream};
use tercet_cluster::Registry;
use tercet_engine::{EngineError, ModelFile};
use tercet_proto::{
    InvalidRequest, Reason,
    v1::{self, load_model_response::Event, worker_server::Worker},
};
use tokio::{
    sync::{oneshot, watch},
    task,
};
use tonic::{Request, Response, Status};

use crate::{
    LoadError, ModelSource, ModelSpec,
    core::{Core, Facts, Hosted, Phase, Progress, wire},
    failure,
    hosting::{self, HostError},
    load, report,
};

/// Tells what the worker holds, and changes it.
#[derive(Clone, Debug)]
pub(crate) struct AdministrationService {
    core: Arc<Core>,
    registry: Arc<dyn Registry>,
}

impl AdministrationService {
    pub(crate) fn new(core: Arc<Core>, registry: Arc<dyn Registry>) -> Self {
        Self { core, registry }
    }

    /// Returns the folder that makes changes possible.
    fn model_dir(&self) -> Result<&Path, Status> {
        self.core.config.model_dir.as_deref().ok_or_else(|| {
            Status::permission_denied(
                "this worker loads and unloads no models at run time: start it with --model-dir DIR",
            )
        })
    }

    /// Opens a model below the model folder, headers only.
    async fn open(&self, path: String, spec: ModelSpec) -> Result<(ModelFile, Facts), Status> {
        let dir = self.model_dir()?.to_owned();
        let config = Arc::clone(&self.core.config);
        let opened = task::spawn_blocking(move || {
            let spec = ModelSpec { source: ModelSource::Path(permitted(&dir, &path)?), ..spec };
            let file = load::open(&spec.source).map_err(|error| refused(&error.into()))?;
            let facts = Facts::new(&file, &spec, &config);
            Ok((file, facts))
        });
        opened.await.unwrap_or_else(|_| Err(Status::internal("the model file broke the reader")))
    }
}

#[tonic::async_trait]
impl Worker for AdministrationService {
    type LoadModelStream = BoxStream<'static, Result<v1::LoadModelResponse, Status>>;
    type WatchLoadStream = BoxStream<'static, Result<v1::LoadReport, Status>>;

    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let core = &self.core;
        Ok(Response::new(v1::DescribeResponse {
            worker_id: core.config.id.to_string(),
            epoch: core.config.epoch,
            models: core.models().iter().map(|model| held(model)).collect(),
            kv_memory: core.kv.total() as u64,
            unassigned_kv_memory: core.kv.unassigned() as u64,
        }))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let (core, id) = (&self.core, request.into_inner().worker_id);
        if !id.is_empty() && id != core.config.id.as_str() {
            return Err(Status::failed_precondition(format!(
                "this is worker {}, not {id:?}",
                core.config.id
            )));
        }
        // At once, so that nothing new has come when the caller reads the answer.
        core.drain();
        core.told_to_stop.cancel();
        let streams = core.models().iter().map(|model| model.meter.admitted()).sum();
        Ok(Response::new(v1::DrainResponse { streams: wire(streams) }))
    }

    async fn load_model(
        &self,
        request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        let core = &self.core;
        self.model_dir()?;
        if core.is_draining() {
            let message = format!("worker {} is about to stop", core.config.id);
            return Err(Reason::Draining.status(message));
        }
        if core.config.engine.layers.is_some() {
            return Err(Status::failed_precondition(
                "this worker is a stage of a pipeline, which holds one model",
            ));
        }
        let v1::LoadModelRequest { path, name, kv_memory } = request.into_inner();
        let kv_bytes = usize::try_from(kv_memory).unwrap_or(usize::MAX);
        let kv_bytes = (kv_bytes > 0).then_some(kv_bytes);
        let name = (!name.is_empty()).then_some(name);
        let spec = ModelSpec { source: ModelSource::BuiltIn, name, kv_bytes };
        let (file, facts) = self.open(path, spec).await?;
        let name = facts.name.clone();
        let exists = || {
            Status::already_exists(format!(
                "this worker has a model {name:?} already: unload it, or give this one another name"
            ))
        };
        if core.model(&name).is_some() {
            return Err(exists());
        }
        let share =
            core.kv.take(kv_bytes).map_err(|error| Reason::Overloaded.status(error.to_string()))?;
        let model = core.host(facts, share).ok_or_else(exists)?;
        let (ended, failure) = oneshot::channel();
        let hosted =
            hosting::host(Arc::clone(core), Arc::clone(&model), file, Arc::clone(&self.registry));
        core.tasks.spawn(async move {
            if let Err(error) = hosted.await {
                tracing::warn!(
                    model = name,
                    error = &error as &dyn std::error::Error,
                    "not served"
                );
                // Whoever asked may have gone.
                drop(ended.send(error));
            }
        });
        let watched = LoadWatch {
            progress: model.progress.subscribe(),
            phases: model.phases(),
            failure,
            model,
            ended: false,
        };
        let events = futures::stream::unfold(watched, |mut watched| async move {
            Some((watched.next().await?, watched))
        });
        Ok(Response::new(events.boxed()))
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        self.model_dir()?;
        let v1::UnloadModelRequest { name, grace_millis } = request.into_inner();
        let model = self.core.find(Some(&name))?;
        let grace = grace_millis.map_or(self.core.config.drain_timeout, Duration::from_millis);
        if !model.enter(Phase::Draining) {
            let message = format!("model {name:?} is on its way out already");
            return Err(Status::failed_precondition(message));
        }
        // A task of the worker: goes on when the caller goes away.
        let unloaded = self.core.tasks.spawn(hosting::unload(model, grace)).await;
        let moved = unloaded.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(v1::UnloadModelResponse { moved_streams: wire(moved) }))
    }

    async fn watch_load(
        &self,
        request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let interval = report::interval(request.get_ref());
        Ok(Response::new(report::reports(Arc::clone(&self.core), interval).boxed()))
    }
}

/// What the caller of a load is told.
struct LoadWatch {
    model: Arc<Hosted>,
    progress: watch::Receiver<Progress>,
    phases: watch::Receiver<Phase>,
    failure: oneshot::Receiver<HostError>,
    /// Whether the last has been said.
    ended: bool,
}

impl LoadWatch {
    async fn next(&mut self) -> Option<Result<v1::LoadModelResponse, Status>> {
        if self.ended {
            return None;
        }
        let progress = tokio::select! {
            biased;
            left = self.phases.wait_for(|phase| !matches!(phase, Phase::Loading(_))) => {
                drop(left);
                None
            }
            Ok(()) = self.progress.changed() => Some(*self.progress.borrow_and_update()),
        };
        let event = match progress {
            Some(progress) => Ok(Event::Progress(progress)),
            None => {
                self.ended = true;
                self.outcome().await
            }
        };
        Some(event.map(|event| v1::LoadModelResponse { event: Some(event) }))
    }

    /// Returns what a loading that is over came to.
    async fn outcome(&mut self) -> Result<Event, Status> {
        match self.model.phase() {
            Phase::Ready(identity) => Ok(Event::Ready(self.model.facts.info(&identity))),
            Phase::Failed(why) => Err(self.model.failed(&why)),
            // Comes when the model has left memory: its place is free then.
            Phase::Draining | Phase::Loading(_) => match (&mut self.failure).await {
                Ok(error) => Err(not_hosted(&error)),
                Err(_) => Err(self.model.draining()),
            },
        }
    }
}

/// Returns the path of a model, if it is below the folder.
fn permitted(dir: &Path, asked: &str) -> Result<PathBuf, Status> {
    let denied = || {
        Status::permission_denied(format!(
            "{asked:?} is not below {}, the --model-dir of this worker",
            dir.display()
        ))
    };
    let missing = |path: &Path, error: &std::io::Error| {
        Status::from(InvalidRequest::new("path", format!("{}: {error}", path.display())))
    };
    let dir = dir.canonicalize().map_err(|error| missing(dir, &error))?;
    let path = dir.join(asked);
    // Before the file system is asked, which would tell what exists elsewhere.
    if !path.starts_with(&dir) || path.components().any(|part| part == Component::ParentDir) {
        return Err(denied());
    }
    let path = path.canonicalize().map_err(|error| missing(&path, &error))?;
    if path.starts_with(&dir) { Ok(path) } else { Err(denied()) }
}

/// Returns the status of a model that could not be loaded.
fn not_hosted(error: &HostError) -> Status {
    match error {
        HostError::Load(error) => refused(error),
        HostError::WarmUp(_) | HostError::BrokeDown(_) | HostError::EngineLost => {
            Status::internal(failure::chain(error))
        }
    }
}

fn refused(error: &LoadError) -> Status {
    let message = failure::chain(error);
    match error {
        LoadError::Engine(EngineError::KvTooSmall { .. }) => {
            InvalidRequest::new("kv_memory", message).into()
        }
        LoadError::Model(_) | LoadError::Tokenizer(_) | LoadError::Template(_) => {
            InvalidRequest::new("path", message).into()
        }
        LoadError::Engine(EngineError::Model(_)) => InvalidRequest::new("path", message).into(),
        LoadError::Engine(_) | LoadError::Thread(_) => Status::internal(message),
    }
}

/// Returns what is held of a model.
fn held(model: &Hosted) -> v1::HeldModel {
    let phase = model.phase();
    let state = phase.wire();
    let (identity, detail) = match phase {
        Phase::Ready(identity) => (identity, Arc::from("")),
        Phase::Loading(why) => (Arc::from(""), why.into()),
        Phase::Draining => (Arc::from(""), Arc::from("")),
        Phase::Failed(why) => (Arc::from(""), why),
    };
    let facts = &model.facts;
    v1::HeldModel {
        model: Some(facts.info(&identity)),
        layers: Some(v1::LayerRange {
            start: wire(facts.layers.start),
            end: wire(facts.layers.end),
        }),
        layer_count: wire(facts.config.layers),
        header_digest: facts.header_digest.to_vec(),
        parts: model.loaded().map(|loaded| parts(&loaded.parts)).unwrap_or_default(),
        state: state.into(),
        detail: detail.to_string(),
        kv_memory: model.kv_bytes() as u64,
    }
}

/// Returns digests as they are written on the wire.
pub(crate) fn parts(parts: &[(String, [u8; 32])]) -> Vec<v1::PartDigest> {
    let digests = parts
        .iter()
        .map(|(part, digest)| v1::PartDigest { part: part.clone(), digest: digest.to_vec() });
    digests.collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tonic::Code;

    use super::*;

    #[test]
    fn only_what_is_below_the_folder_is_permitted() {
        let root = std::env::temp_dir().join(format!("tercet-permitted-{}", std::process::id()));
        let dir = root.join("models");
        fs::create_dir_all(dir.join("a")).unwrap();
        fs::write(dir.join("a/model.gguf"), "").unwrap();
        fs::write(root.join("secret.gguf"), "").unwrap();
        std::os::unix::fs::symlink(root.join("secret.gguf"), dir.join("link.gguf")).unwrap();
        std::os::unix::fs::symlink(&dir, root.join("alias")).unwrap();

        let model = dir.join("a/model.gguf").canonicalize().unwrap();
        for asked in ["a/model.gguf", "./a//model.gguf", model.to_str().unwrap()] {
            assert_eq!(permitted(&dir, asked).unwrap(), model, "{asked}");
            assert_eq!(permitted(&root.join("alias"), asked).unwrap(), model, "{asked}");
        }
        let secret = root.join("secret.gguf");
        for asked in [
            "../secret.gguf",
            "a/../../secret.gguf",
            "link.gguf",
            secret.to_str().unwrap(),
            "/",
            "../nothing",
        ] {
            let refused = permitted(&dir, asked).unwrap_err();
            assert_eq!(refused.code(), Code::PermissionDenied, "{asked}: {refused}");
        }
        assert_eq!(permitted(&dir, "nothing").unwrap_err().code(), Code::InvalidArgument);
        fs::remove_dir_all(root).unwrap();
    }
}
