//! Binds the parts to a listener, and takes them down again.

use std::{error::Error as StdError, future::Future, pin::pin, sync::Arc, time::Duration};

use futures::Stream;
use tercet_cluster::{ClusterError, Registry};
use tercet_engine::{ModelError, ModelFile, PoolError};
use tercet_proto::v1::{
    LoadProgress, inference_server::InferenceServer, worker_server::WorkerServer,
};
use tercet_telemetry::Metrics;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    task::{self, JoinSet},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    Config, LoadError,
    administration::AdministrationService,
    core::{Core, Facts, Hosted, NoKvMemory, Phase},
    hosting::{self, HostError},
    inference::InferenceService,
    load, membership,
    pipeline::PipelineService,
};

/// How long the last messages of ended streams get to reach their clients.
const FLUSH: Duration = Duration::from_secs(1);
/// How long background tasks may take to end, the leave from the registry included.
const FAREWELL: Duration = Duration::from_secs(8);
/// Bytes that may be under way on one stream before the receiver has to say that it keeps up: a
/// prefill chunk of a wide model at least, or the links of a pipeline would wait.
const STREAM_WINDOW: u32 = 16 << 20;
/// The same for all streams of a connection.
const CONNECTION_WINDOW: u32 = 32 << 20;

/// A worker that is wired and not yet serving.
#[derive(Debug)]
pub struct Worker {
    core: Arc<Core>,
    registry: Arc<dyn Registry>,
    models: Vec<(Arc<Hosted>, ModelFile)>,
}

/// Why a worker cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The configuration or the model file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The configuration or the machine is at fault.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The configuration is at fault.
    #[error(transparent)]
    Kv(#[from] NoKvMemory),
    /// The configuration is at fault.
    #[error("layers of {models} models are asked for: a stage of a pipeline holds exactly one")]
    Stage {
        /// Number of models.
        models: usize,
    },
    /// The configuration is at fault.
    #[error("two models are named {name:?}: give them names of their own")]
    SameName {
        /// The name.
        name: String,
    },
}

/// Why a worker does not serve, or serves no longer.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The model file, the configuration or the machine is at fault.
    #[error("load the model")]
    Load(#[from] LoadError),
    /// The model file is at fault, or we are.
    #[error("the warm-up generation failed: {0}")]
    WarmUp(String),
    /// Fault: us.
    #[error("a task of the worker broke down: {0}")]
    BrokeDown(String),
    /// Fault: us.
    #[error("the compute thread ended")]
    EngineLost,
    /// Another worker has taken the name over.
    #[error("take part in the cluster")]
    Cluster(#[from] ClusterError),
    /// Fault: us.
    #[error("describe the services for reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// Fault: the machine.
    #[error("serve gRPC")]
    Transport(#[source] tonic::transport::Error),
}

impl From<HostError> for ServeError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Load(error) => Self::Load(error),
            HostError::WarmUp(why) => Self::WarmUp(why),
            HostError::BrokeDown(why) => Self::BrokeDown(why),
            HostError::EngineLost => Self::EngineLost,
        }
    }
}

/// Tells how a worker is. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Condition {
    pub(crate) core: Arc<Core>,
}

impl Condition {
    /// Returns whether the worker takes requests, or steps if it is a later stage, or why not.
    pub fn ready(&self) -> Result<(), String> {
        self.core.ready()
    }

    /// Returns how far the loading of the first model is.
    pub fn loading(&self) -> LoadProgress {
        self.core.models().first().map(|model| *model.progress.borrow()).unwrap_or_default()
    }

    /// Returns whether the worker is worth keeping, or why not. Depends on nothing outside of the
    /// process.
    pub fn live(&self) -> Result<(), String> {
        if self.core.is_lost() { Err("all models failed".to_owned()) } else { Ok(()) }
    }
}

impl Worker {
    /// Opens the models, headers only, and wires a worker for them.
    ///
    /// # Errors
    /// When a model cannot be opened or does not have the layers asked for, or two have one name.
    pub fn build(
        config: Config,
        registry: Arc<dyn Registry>,
        metrics: Metrics,
    ) -> Result<Self, BuildError> {
        let core = Core::new(config, metrics)?;
        let specs = &core.config.models;
        if core.config.engine.layers.is_some() && specs.len() != 1 {
            return Err(BuildError::Stage { models: specs.len() });
        }
        let asked: Vec<_> = specs.iter().map(|spec| spec.kv_bytes).collect();
        let shares = core.kv.share_out(&asked, core.config.model_dir.is_some())?;
        let mut models = Vec::with_capacity(specs.len());
        for (spec, share) in specs.iter().zip(shares) {
            let file = load::open(&spec.source)?;
            let facts = Facts::new(&file, spec, &core.config);
            let (start, end, layers) = (facts.layers.start, facts.layers.end, file.config.layers);
            if start >= end || end > layers {
                return Err(ModelError::Layers { start, end, layers }.into());
            }
            let name = facts.name.clone();
            let hosted = core.host(facts, share).ok_or(BuildError::SameName { name })?;
            models.push((hosted, file));
        }
        Ok(Self { core: Arc::new(core), registry, models })
    }

    /// Returns what tells how the worker is.
    pub fn condition(&self) -> Condition {
        Condition { core: Arc::clone(&self.core) }
    }

    /// Returns the `Worker` service, for a server that stands in front of this worker alone.
    pub fn administration(&self) -> Routes {
        Routes::new(WorkerServer::new(self.administration_service()))
    }

    fn administration_service(&self) -> AdministrationService {
        AdministrationService::new(Arc::clone(&self.core), Arc::clone(&self.registry))
    }

    /// Serves the connections of `incoming` until `shutdown` resolves, or `Worker.Drain` is called,
    /// then drains:
    ///
    /// 1. Health turns to NOT_SERVING, the registry says draining, and new requests are refused
    ///    with UNAVAILABLE (DRAINING).
    /// 2. Streams finish. Those left after `drain_timeout` end with UNAVAILABLE (DRAINING).
    /// 3. The worker leaves the registry.
    ///
    /// The model is loaded meanwhile: until it is warm, requests are refused with UNAVAILABLE
    /// (LOADING). Drains as well, and returns why, when the worker cannot go on. Dropping the
    /// future ends everything at once and waits for the step that is being computed.
    pub async fn serve<I, C, E>(
        self,
        incoming: I,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError>
    where
        I: Stream<Item = Result<C, E>> + Send,
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        C::ConnectInfo: Clone + Send + Sync + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + Send,
    {
        let administration = self.administration_service();
        let Self { core, registry, models } = self;
        let (done, closing) = (CancellationToken::new(), CancellationToken::new());
        // With a dropped future, streams, links and models end as well.
        let _guards = [&done, &core.evicted, &core.closing].map(|token| token.clone().drop_guard());

        let (reporter, health) = tonic_health::server::health_reporter();
        report(&reporter, &core, Vec::new()).await;
        let server = Server::builder()
            .http2_keepalive_interval(Some(core.config.keepalive_interval))
            .http2_keepalive_timeout(Some(core.config.keepalive_timeout))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .add_service(health)
            .add_service(reflection().build_v1().map_err(ServeError::Reflection)?)
            .add_service(reflection().build_v1alpha().map_err(ServeError::Reflection)?)
            .add_service(InferenceServer::new(InferenceService::new(Arc::clone(&core))))
            .add_service(WorkerServer::new(administration))
            .add_service(PipelineService::server(Arc::clone(&core)))
            .serve_with_incoming_shutdown(incoming, closing.clone().cancelled_owned());
        let mut server = pin!(server);

        let mut background = JoinSet::new();
        background.spawn(report_health(reporter, Arc::clone(&core), done.clone()));
        background.spawn({
            let part =
                membership::take_part(Arc::clone(&core), Arc::clone(&registry), done.clone());
            async move { Ok(part.await?) }
        });
        let (failures, mut failed) = mpsc::channel(1);
        for (model, file) in models {
            core.tasks.spawn(hosting::host_from_the_start(
                Arc::clone(&core),
                model,
                file,
                Arc::clone(&registry),
                failures.clone(),
            ));
        }

        let (ended, accepting) = tokio::select! {
            served = &mut server => (served.map_err(ServeError::Transport), false),
            () = shutdown => (Ok(()), true),
            () = core.told_to_stop.cancelled() => (Ok(()), true),
            // None of them ends by itself.
            Some(ended) = background.join_next() => (flatten(ended), true),
            Some(error) = failed.recv() => (Err(error.into()), true),
        };

        core.drain();
        tracing::info!(worker = %core.config.id, "draining");
        {
            let drain = pin!(drain(&core, &closing));
            if accepting {
                tokio::select! {
                    // Its end is that of all connections: a failure now cuts nothing short.
                    _ = &mut server => {}
                    () = drain => {}
                }
            } else {
                drain.await;
            }
        }
        core.evicted.cancel();
        core.closing.cancel();
        done.cancel();
        let tasks = core.tasks.clone();
        let farewell = async {
            while let Some(said) = background.join_next().await {
                if let Err(error) = flatten(said) {
                    tracing::warn!(error = &error as &dyn StdError, "a task ended badly");
                }
            }
            tasks.close();
            tasks.wait().await;
        };
        if time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!("tasks are left after {FAREWELL:?}: they are dropped");
        }
        background.abort_all();
        // Joins the compute thread.
        drop(task::spawn_blocking(move || drop(core)).await);
        ended
    }
}

/// Lets streams finish, ends those that take too long, and closes the connections.
async fn drain(core: &Core, closing: &CancellationToken) {
    if time::timeout(core.config.drain_timeout, core.idle()).await.is_err() {
        tracing::warn!("streams are left after the drain timeout: they end now");
    }
    core.evicted.cancel();
    closing.cancel();
    time::sleep(FLUSH).await;
}

fn flatten(ended: Result<Result<(), ServeError>, task::JoinError>) -> Result<(), ServeError> {
    ended.unwrap_or_else(|error| Err(ServeError::BrokeDown(error.to_string())))
}

/// Tells health as the models change.
async fn report_health(
    reporter: HealthReporter,
    core: Arc<Core>,
    done: CancellationToken,
) -> Result<(), ServeError> {
    let mut changes = core.changes();
    let mut told = Vec::new();
    loop {
        changes.mark_unchanged();
        told = report(&reporter, &core, told).await;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return Ok(()) },
            () = done.cancelled() => return Ok(()),
        }
    }
}

/// Tells the health of the server, its services and its models; returns the names of the models,
/// and forgets those of `before` that are gone.
async fn report(reporter: &HealthReporter, core: &Core, before: Vec<String>) -> Vec<String> {
    let models = core.models();
    let names: Vec<String> = models
        .iter()
        .map(|model| tercet_proto::convention::health_name(&model.facts.name))
        .collect();
    for (name, model) in names.iter().zip(&models) {
        let ready = matches!(model.phase(), Phase::Ready(_));
        reporter.set_service_status(name, status(ready)).await;
    }
    for gone in before.iter().filter(|name| !names.contains(name)) {
        reporter.clone().clear_service_status(gone).await;
    }
    let stage = core.config.engine.layers.as_ref().is_some_and(|layers| layers.start > 0);
    let served = if stage { "tercet.v1.Pipeline" } else { "tercet.v1.Inference" };
    for name in ["", served] {
        reporter.set_service_status(name, status(core.ready().is_ok())).await;
    }
    // Answers whatever the phase.
    reporter.set_service_status("tercet.v1.Worker", ServingStatus::Serving).await;
    names
}

fn status(ready: bool) -> ServingStatus {
    if ready { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tercet_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
