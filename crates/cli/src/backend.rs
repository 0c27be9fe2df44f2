//! Where client commands get their answers: a server, or a worker in this process.
//!
//! Both speak the same service, the second one through memory, so that a text is the same wherever
//! it is computed.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::FutureExt as _;
use tercet_client::{AddressError, Client, ConnectError, GenerateError, Generation, Options};
use tercet_cluster::{MemoryRegistry, Registry as _, View, WorkerId, WorkerState};
use tercet_engine::EngineOptions;
use tercet_gateway::{Dialer as _, LocalDialer};
use tercet_proto::{
    InvalidRequest, is_unreachable,
    v1::{GenerateRequest, ListModelsRequest, ModelInfo, generate_response::Event},
};
use tercet_telemetry::Metrics;
use tercet_worker::{ModelSource, ModelSpec, ServeError, Worker};
use tokio::task::JoinSet;
use tonic::{Code, Status, transport::Channel};

use crate::{
    args::BackendArgs,
    failure::{misconfigured, unbuilt},
    progress::{load_line, showing},
};

/// What answers requests.
#[derive(Debug)]
pub(crate) struct Backend {
    client: Client,
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
        // Chats and scripts rather hear soon that nobody is there than wait for somebody. Once more
        // than there are servers: the connection may have been lost since it was last used.
        let options = Options { opening_attempts: args.connect.len() + 1, ..Options::default() };
        let client =
            Client::connect(&args.connect, options).await.map_err(|error| match error {
                ConnectError::Address(error) => no_address(error),
                ConnectError::Unanswered { addresses, source } => {
                    anyhow::Error::from(source).context(unanswered(&addresses))
                }
            })?;
        let model = args.model.clone().unwrap_or_default();
        Ok(Self { client, model, local: JoinSet::new() })
    }

    /// Starts a text, of the model in use.
    pub(crate) async fn generate(&self, request: GenerateRequest) -> Result<Text> {
        let request = GenerateRequest { model: self.model.clone(), ..request };
        match self.client.generate(request).await {
            Ok(generation) => Ok(Text { generation, client: self.client.clone() }),
            Err(error) => Err(failure(&self.client, error)),
        }
    }

    /// Returns the models that can be asked for.
    pub(crate) async fn models(&self) -> Result<Vec<ModelInfo>> {
        let listed = self.client.inference().list_models(ListModelsRequest {}).await;
        match listed {
            Ok(listed) => Ok(listed.into_inner().models),
            Err(status) => Err(denied(&self.client, &status)),
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
        drop(self.client);
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
            head_screen: args.engine.head_screen,
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
        Ok(Self { client: Client::over(channel), model: String::new(), local })
    }
}

/// A text in the making. Dropping it cancels the computation.
#[derive(Debug)]
pub(crate) struct Text {
    generation: Generation,
    client: Client,
}

impl Text {
    /// Returns what comes next; `Finished` is the last.
    pub(crate) async fn next(&mut self) -> Result<Event> {
        match self.generation.next().await {
            Ok(Some(event)) => Ok(event),
            Ok(None) => bail!("the text is complete already"),
            Err(error) => Err(failure(&self.client, error)),
        }
    }
}

/// Connects to one server.
pub(crate) async fn connect(address: &str) -> Result<Channel> {
    let connected = tercet_client::endpoint(address).map_err(no_address)?.connect().await;
    connected.with_context(|| {
        format!("no server answers at {address}: start one with `tercet serve` or `tercet worker`")
    })
}

fn no_address(error: AddressError) -> anyhow::Error {
    misconfigured(anyhow!("--connect {error}"))
}

/// Says that there is no server, and what to do.
fn unanswered(addresses: &[String]) -> String {
    format!(
        "no server answers at {}: start one with `tercet serve`, or leave --connect out to compute \
         in this process",
        addresses.join(" or ")
    )
}

/// Turns what became of a text into an error for people.
fn failure(client: &Client, error: GenerateError) -> anyhow::Error {
    let why = denied(client, error.status());
    match error {
        GenerateError::Refused(_) => why,
        GenerateError::Lost { .. } => why.context(error.to_string()),
    }
}

/// Turns what a server said, or that none did, into an error for people.
fn denied(client: &Client, status: &Status) -> anyhow::Error {
    if is_unreachable(status) {
        return anyhow!(unanswered(&client.addresses().map(str::to_owned).collect::<Vec<_>>()));
    }
    refused(status)
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
