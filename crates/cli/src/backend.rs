//! Where client commands get their answers: a server, or a worker in this process.
//!
//! Both speak the same service, the second one through memory, so that a text is the same wherever
//! it is computed.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::FutureExt as _;
use tercet_cluster::{MemoryRegistry, Registry as _, View, WorkerId, WorkerState};
use tercet_engine::EngineOptions;
use tercet_gateway::{Dialer as _, LocalDialer};
use tercet_proto::{
    InvalidRequest,
    v1::{
        GenerateRequest, GenerateResponse, Sampling, Stop, generate_request::Input,
        generate_response::Event, inference_client::InferenceClient,
    },
};
use tercet_telemetry::Metrics;
use tercet_worker::{ModelSource, ModelSpec, ServeError, Worker};
use tokio::task::JoinSet;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    args::{BackendArgs, SamplingArgs},
    failure::{misconfigured, unbuilt},
};

/// How long a server may take to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What answers requests.
#[derive(Debug)]
pub(crate) struct Backend {
    client: InferenceClient<Channel>,
    /// Name of the model in requests; empty for the only one.
    model: String,
    /// The worker of this process, if it is what answers. Ends when dropped.
    local: JoinSet<Result<(), ServeError>>,
}

impl Backend {
    /// Connects to the server asked for, or loads the model in this process.
    pub(crate) async fn new(args: &BackendArgs) -> Result<Self> {
        match &args.connect {
            Some(address) => {
                let client = InferenceClient::new(connect(address).await?);
                let model = args.model.clone().unwrap_or_default();
                Ok(Self { client, model, local: JoinSet::new() })
            }
            None => Self::local(args).await,
        }
    }

    /// Starts a generation.
    pub(crate) async fn generate(
        &mut self,
        input: Input,
        sampling: &SamplingArgs,
    ) -> Result<Generation> {
        let request = GenerateRequest {
            model: self.model.clone(),
            input: Some(input),
            sampling: Some(Sampling {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                seed: sampling.seed,
            }),
            stop: Some(Stop {
                max_tokens: sampling.max_tokens,
                strings: sampling.stop.clone(),
                ignore_eos: sampling.ignore_eos.then_some(true),
            }),
            resume: None,
        };
        let stream = self.client.generate(request).await.map_err(|status| refused(&status))?;
        Ok(Generation { stream: stream.into_inner() })
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
            config.models = vec![ModelSpec { source, name: None }];
        }
        config.engine = EngineOptions {
            threads: args.engine.threads(),
            isa: args.engine.isa,
            prefill_chunk: args.engine.prefill_chunk.get(),
            max_sequences: 1,
            ..EngineOptions::default()
        };
        let worker = Worker::build(config, registry, Metrics::new()).map_err(unbuilt)?;
        let mut local = JoinSet::new();
        local.spawn(worker.serve(connections, std::future::pending()).boxed());

        let is_ready = |view: &Arc<View>| {
            view.workers.values().any(|worker| worker.state == WorkerState::Ready)
        };
        let record = tokio::select! {
            ended = local.join_next() => match ended {
                Some(Ok(Err(error))) => return Err(error.into()),
                _ => bail!("the worker of this process ended while it loaded the model"),
            },
            view = view.wait_for(is_ready) => {
                let view = view.context("watch the worker of this process")?;
                view.workers.values().next().cloned()
            }
        };
        let record = record.context("find the worker of this process")?;
        let channel = dialer.dial(&record).context("connect to the worker of this process")?;
        Ok(Self { client: InferenceClient::new(channel), model: String::new(), local })
    }
}

/// A text in the making. Dropping it cancels the computation.
#[derive(Debug)]
pub(crate) struct Generation {
    stream: Streaming<GenerateResponse>,
}

impl Generation {
    /// Returns the next piece of text, which may be empty, or nothing once the text is complete.
    pub(crate) async fn next(&mut self) -> Result<Option<String>> {
        let message = self.stream.message().await.map_err(|status| refused(&status))?;
        match message.map(|message| message.event) {
            Some(Some(Event::Delta(delta))) => Ok(Some(delta.text)),
            Some(Some(Event::Started(_)) | None) => Ok(Some(String::new())),
            Some(Some(Event::Finished(_))) => Ok(None),
            None => bail!("the server closed the stream before the text was complete"),
        }
    }
}

/// Connects to a server.
async fn connect(address: &str) -> Result<Channel> {
    let expected = || {
        misconfigured(anyhow!(
            "--connect {address} is no address: expected HOST:PORT such as 127.0.0.1:7171"
        ))
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| expected())?;
    if endpoint.uri().port().is_none() || endpoint.uri().path() != "/" {
        return Err(expected());
    }
    let connected = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).connect().await;
    connected.with_context(|| {
        format!(
            "no server answers at {address}: start one with `tercet serve`, or leave --connect \
             out to compute in this process"
        )
    })
}

/// Turns a server's refusal into an error for people.
fn refused(status: &Status) -> anyhow::Error {
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
