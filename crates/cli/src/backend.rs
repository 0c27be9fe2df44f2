//! Where client commands get their answers: a server, or a worker in this process.
//!
//! Both speak the same service, the second one through memory, so that a text is the same wherever
//! it is computed.

mod generation;
pub(crate) mod servers;

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::FutureExt as _;
use tercet_cluster::{MemoryRegistry, Registry as _, View, WorkerId, WorkerState};
use tercet_engine::EngineOptions;
use tercet_gateway::{Dialer as _, LocalDialer};
use tercet_proto::{
    InvalidRequest,
    v1::{GenerateRequest, ListModelsRequest, ModelInfo},
};
use tercet_telemetry::Metrics;
use tercet_worker::{ModelSource, ModelSpec, ServeError, Worker};
use tokio::task::JoinSet;
use tonic::{Code, Status};

pub(crate) use self::generation::{Generation, Piece};
use self::servers::Servers;
use crate::{
    args::BackendArgs,
    failure::{misconfigured, unbuilt},
    progress::{load_line, showing},
};

/// What answers requests.
#[derive(Debug)]
pub(crate) struct Backend {
    servers: Servers,
    /// Name of the model in requests; empty for the only one.
    model: String,
    /// The worker of this process, if it is what answers. Ends when dropped.
    local: JoinSet<Result<(), ServeError>>,
}

impl Backend {
    /// Connects to a server asked for, or loads the model in this process.
    pub(crate) async fn new(args: &BackendArgs) -> Result<Self> {
        if args.connect.is_empty() {
            return Self::local(args).await;
        }
        let servers = Servers::connect(&args.connect).await?;
        let model = args.model.clone().unwrap_or_default();
        Ok(Self { servers, model, local: JoinSet::new() })
    }

    /// Starts a generation, of the model in use.
    pub(crate) async fn generate(&mut self, request: GenerateRequest) -> Result<Generation<'_>> {
        let request = GenerateRequest { model: self.model.clone(), ..request };
        Generation::start(&mut self.servers, request).await
    }

    /// Returns the models that can be asked for.
    pub(crate) async fn models(&mut self) -> Result<Vec<ModelInfo>> {
        let listed = self.servers.client().list_models(ListModelsRequest {}).await;
        match listed {
            Ok(listed) => Ok(listed.into_inner().models),
            Err(status) => Err(self.servers.failure(&status)),
        }
    }

    /// Returns the name of the model in requests; empty for the only one.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Asks another model from now on.
    pub(crate) fn set_model(&mut self, name: String) {
        self.model = name;
    }

    /// Ends the worker of this process, if there is one.
    pub(crate) async fn stop(mut self) {
        drop(self.servers);
        self.local.shutdown().await;
    }

    async fn local(args: &BackendArgs) -> Result<Self> {
        let id: WorkerId = "local".parse().context("name the worker of this process")?;
        let registry = Arc::new(MemoryRegistry::new());
        let mut view = registry.watch();
        let (dialer, connections) = LocalDialer::new(id.clone());
        let mut config = tercet_worker::Config::new(id, "local".to_owned());
        if let Some(path) = &args.model {
            let source = ModelSource::Path(PathBuf::from(path));
            config.models = vec![ModelSpec { source, ..ModelSpec::default() }];
        }
        config.engine = EngineOptions {
            threads: args.engine.threads(),
            isa: args.engine.isa,
            prefill_chunk: args.engine.prefill_chunk.get(),
            max_sequences: 1,
            ..EngineOptions::default()
        };
        let worker = Worker::build(config, registry, Metrics::new()).map_err(unbuilt)?;
        let condition = worker.condition();
        let mut local = JoinSet::new();
        local.spawn(worker.serve(connections, std::future::pending()).boxed());

        let is_ready = |view: &Arc<View>| {
            view.workers.values().any(|worker| worker.state == WorkerState::Ready)
        };
        let loaded = async {
            tokio::select! {
                ended = local.join_next() => match ended {
                    Some(Ok(Err(error))) => Err(error.into()),
                    _ => bail!("the worker of this process ended while it loaded the model"),
                },
                view = view.wait_for(is_ready) => {
                    let view = view.context("watch the worker of this process")?;
                    Ok(view.workers.values().next().cloned())
                }
            }
        };
        let record = showing(|| load_line(&condition.loading()), loaded).await?;
        let record = record.context("find the worker of this process")?;
        let channel = dialer.dial(&record).context("connect to the worker of this process")?;
        Ok(Self { servers: Servers::local(channel), model: String::new(), local })
    }
}

/// Turns a server's refusal into an error for people.
pub(crate) fn refused(status: &Status) -> anyhow::Error {
    if let Some(invalid) = InvalidRequest::of(status) {
        return misconfigured(invalid);
    }
    let said = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    match status.code() {
        Code::InvalidArgument | Code::NotFound => misconfigured(anyhow!(said)),
        _ => anyhow!(said),
    }
}
