//! A gateway's parts around fake workers, and a client that checks the shape of every stream.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tercet_cluster::{
    LayerRange, MemoryRegistry, ModelRecord, ModelState, Rate, Registration, Registry,
    WorkerRecord, WorkerState,
};
use tercet_proto::v1;
use tercet_proto::v1::generate_response::Event;
use tercet_proto::v1::inference_server::Inference;
use tercet_telemetry::Metrics;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::fake::{FakeWorker, Wires, spawn, text, token};
use crate::Config;
use crate::fleet::{Answer, Fleet, Link};
use crate::service::{Service, Shared};

/// Longest wait for anything, in the time of the test's clock: far beyond what any case takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);

pub(super) const SEED: u64 = 42;
pub(super) const PROMPT: &str = "KING HENRY.\n";

pub(super) struct Bench {
    pub(super) registry: MemoryRegistry,
    pub(super) wires: Arc<Wires>,
    pub(super) metrics: Metrics,
    pub(super) shared: Arc<Shared>,
    pub(super) service: Service,
}

pub(super) type Responses = <Service as Inference>::GenerateStream;

/// Everything that a client got.
#[derive(Debug, Default)]
pub(super) struct Got {
    pub(super) started: Option<v1::Started>,
    pub(super) ids: Vec<u32>,
    pub(super) text: String,
    pub(super) finished: Option<v1::Finished>,
    pub(super) error: Option<Status>,
}

/// Returns the record of a ready worker with the whole of each model, the name being the identity.
pub(super) fn record(id: &str, models: &[&str]) -> WorkerRecord {
    WorkerRecord {
        id: id.parse().unwrap(),
        address: format!("{id}:1"),
        epoch: 1,
        state: WorkerState::Ready,
        models: models.iter().map(|name| model(name, name)).collect(),
        max_sequences: 64,
    }
}

pub(super) fn model(name: &str, identity: &str) -> ModelRecord {
    ModelRecord {
        name: name.to_owned(),
        identity: identity.to_owned(),
        header_digest: String::new(),
        layers: LayerRange { start: 0, end: 4 },
        layer_count: 4,
        context_length: 512,
        vocab_size: 32_000,
        state: ModelState::Ready,
        generation: 0,
        kv_tokens: 0,
        decode_rate: Rate::default(),
        prefill_rate: Rate::default(),
    }
}

impl Bench {
    pub(super) fn new(config: Config) -> Self {
        let registry = MemoryRegistry::new();
        let wires = Arc::new(Wires::default());
        let metrics = Metrics::new();
        let policy = config.routing.policy(1);
        let fleet = Fleet::new(&config, Arc::clone(&wires) as _, policy, metrics.clone());
        let shared = Arc::new(Shared {
            streams: Arc::new(Semaphore::new(usize::try_from(config.max_streams).unwrap())),
            config,
            fleet,
            metrics: metrics.clone(),
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
        });
        let follower = Arc::clone(&shared);
        let view = registry.watch();
        spawn(async move { follower.fleet.follow(view).await });
        let service = Service::new(Arc::clone(&shared));
        Self { registry, wires, metrics, shared, service }
    }

    /// Starts and registers a worker.
    pub(super) async fn worker(&self, record: WorkerRecord) -> (Arc<FakeWorker>, Registration) {
        let worker = FakeWorker::start();
        self.wires.0.lock().unwrap().insert(record.id.clone(), worker.wire.clone());
        let registration = self.register(record).await;
        (worker, registration)
    }

    /// Starts and registers a worker that reports its load, and waits until that is known.
    pub(super) async fn reporting(&self, record: WorkerRecord) -> (Arc<FakeWorker>, Registration) {
        let worker = FakeWorker::start();
        worker.reports(|report| {
            report.epoch = record.epoch;
            report.set_state(v1::WorkerState::Ready);
            report.models = record.models.iter().map(load).collect();
        });
        self.wires.0.lock().unwrap().insert(record.id.clone(), worker.wire.clone());
        let id = record.id.clone();
        let registration = self.register(record).await;
        self.until_answer(id.as_str(), Answer::Answering).await;
        (worker, registration)
    }

    /// Returns the link to a worker.
    pub(super) fn link(&self, id: &str) -> Arc<Link> {
        self.shared.fleet.watch().borrow().link(&id.parse().unwrap()).unwrap()
    }

    /// Returns when a worker answers so.
    pub(super) async fn until_answer(&self, id: &str, answer: Answer) {
        let mut answers = self.link(id).answers();
        let came = answers.wait_for(|present| *present == answer);
        tokio::time::timeout(PATIENCE, came).await.unwrap().unwrap();
    }

    /// Registers a worker and waits until the gateway knows it.
    pub(super) async fn register(&self, record: WorkerRecord) -> Registration {
        self.noticed(self.registry.register(record)).await.unwrap()
    }

    /// Withdraws a worker and waits until the gateway knows it.
    pub(super) async fn leave(&self, registration: Registration) {
        self.noticed(registration.leave()).await;
    }

    /// Returns when the gateway has taken over the change that `change` makes to the registry.
    pub(super) async fn noticed<T>(&self, change: impl Future<Output = T>) -> T {
        let mut routes = self.shared.fleet.watch();
        routes.borrow_and_update();
        let changed = change.await;
        tokio::time::timeout(PATIENCE, routes.changed()).await.unwrap().unwrap();
        changed
    }

    pub(super) async fn generate(
        &self,
        request: impl Into<Request<v1::GenerateRequest>>,
    ) -> Result<Responses, Status> {
        Ok(self.service.generate(request.into()).await?.into_inner())
    }

    /// Has a request answered and returns what came.
    pub(super) async fn get(&self, request: v1::GenerateRequest) -> Got {
        let given = request.resume.clone().map(|resume| resume.token_ids).unwrap_or_default();
        match self.generate(Request::new(request)).await {
            Ok(stream) => collect(stream, given).await,
            Err(error) => Got { error: Some(error), ..Got::default() },
        }
    }

    pub(super) fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.encode();
        let value = text.lines().find_map(|line| line.strip_prefix(series));
        value.map_or(0.0, |value| value.trim().parse().unwrap())
    }
}

fn load(model: &ModelRecord) -> v1::ModelLoad {
    v1::ModelLoad {
        name: model.name.clone(),
        generation: model.generation,
        state: v1::ModelState::Ready.into(),
        ..v1::ModelLoad::default()
    }
}

pub(super) fn request(max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Prompt(PROMPT.to_owned())),
        sampling: Some(v1::Sampling { seed: Some(SEED), ..Default::default() }),
        stop: Some(v1::Stop { max_tokens: Some(max_tokens), ..Default::default() }),
        ..Default::default()
    }
}

/// Returns the completion that the formula gives.
pub(super) fn expected(seed: u64, tokens: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    while ids.len() < tokens {
        ids.push(token(seed, PROMPT, &ids));
    }
    ids
}

/// Reads a stream to its end. Panics unless it is one `started`, each index once in order, and one
/// `finished` or an error.
pub(super) async fn collect(stream: Responses, given: Vec<u32>) -> Got {
    let got = Got { ids: given, ..Got::default() };
    tokio::time::timeout(PATIENCE, drain(stream, got)).await.expect("the stream ends")
}

/// Reads one message of a stream.
pub(super) async fn read(stream: &mut Responses) -> Event {
    let message = tokio::time::timeout(PATIENCE, stream.next()).await.expect("a message comes");
    message.expect("the stream goes on").unwrap().event.unwrap()
}

async fn drain(
    mut stream: impl Stream<Item = Result<v1::GenerateResponse, Status>> + Unpin,
    mut got: Got,
) -> Got {
    while let Some(message) = stream.next().await {
        assert!(
            got.finished.is_none() && got.error.is_none(),
            "{message:?} after the end: {got:?}"
        );
        match message.map(|response| response.event.unwrap()) {
            Ok(Event::Started(started)) => {
                assert!(got.started.is_none(), "started twice: {got:?}");
                got.started = Some(started);
            }
            Ok(Event::Delta(delta)) => {
                assert!(got.started.is_some(), "delta before started: {got:?}");
                assert_eq!(usize::try_from(delta.index).unwrap(), got.ids.len(), "{got:?}");
                got.ids.extend(delta.token_ids);
                got.text.push_str(&delta.text);
            }
            Ok(Event::Prompt(prompt)) => panic!("nobody asked for {prompt:?}"),
            Ok(Event::Finished(finished)) => got.finished = Some(finished),
            Err(status) => got.error = Some(status),
        }
    }
    assert!(got.finished.is_some() || got.error.is_some(), "ends without a word: {got:?}");
    got
}

impl Got {
    /// Asserts that the client got the undisturbed completion, of which it brought `given` tokens.
    pub(super) fn assert_undisturbed(&self, seed: u64, tokens: usize, given: usize) {
        assert!(self.error.is_none(), "{:?}", self.error);
        let ids = expected(seed, tokens);
        assert_eq!(self.ids, ids);
        let texts: String = ids[given..].iter().map(|id| text(*id)).collect();
        assert_eq!(self.text, texts);
        assert_eq!(self.started.as_ref().unwrap().seed, seed);
        let usage = self.finished.as_ref().unwrap().usage.unwrap();
        assert_eq!(usize::try_from(usage.completion_tokens).unwrap(), tokens);
        assert_eq!(usize::try_from(usage.prompt_tokens).unwrap(), PROMPT.len());
    }
}
