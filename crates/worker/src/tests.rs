//! Workers on loopback sockets over the built-in model.

mod choices;
mod cluster;
mod company;
mod deadlines;
mod drain;
mod generate;
mod grammar;
mod models;
mod pipeline;
mod refusals;
mod reports;
mod texts;

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use tercet_cluster::{MemoryRegistry, Registry, View, WorkerState};
use tercet_engine::{EngineOptions, demo, scheduler::Load};
use tercet_proto::v1::{
    self, generate_request::Input, generate_response::Event, inference_client::InferenceClient,
};
use tercet_telemetry::Metrics;
use tercet_text::{StreamDecoder, Tokenizer};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet, time};
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, server::TcpIncoming},
};

use crate::{
    Condition, Config, ServeError, Worker,
    core::{Hosted, Role},
};

/// Longest any step of a test may take, on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A worker being served.
struct Node {
    address: String,
    metrics: Metrics,
    condition: Condition,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinSet<Result<(), ServeError>>,
}

/// Returns the engine options of the tests.
fn options() -> EngineOptions {
    EngineOptions { kv_bytes: 64 << 20, ..EngineOptions::default() }
}

/// Returns the options of a stage.
fn stage(layers: Range<usize>) -> EngineOptions {
    EngineOptions { layers: Some(layers), ..options() }
}

impl Node {
    async fn start(id: &str, engine: EngineOptions, registry: &MemoryRegistry) -> Self {
        Self::start_with(id, registry, |config| config.engine = engine).await
    }

    async fn start_with(
        id: &str,
        registry: &MemoryRegistry,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut config = Config::new(id.parse().unwrap(), address.clone());
        config.engine = options();
        configure(&mut config);
        let metrics = Metrics::new();
        let worker = Worker::build(config, Arc::new(registry.clone()), metrics.clone()).unwrap();
        let condition = worker.condition();
        let (stop, stopped) = oneshot::channel();
        let mut serving = JoinSet::new();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        serving.spawn(worker.serve(incoming, async { stopped.await.unwrap_or(()) }));
        Self { address, metrics, condition, stop: Some(stop), serving }
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel())
    }

    /// Begins the shutdown.
    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Returns what serving ended with.
    async fn ended(&mut self) -> Result<(), ServeError> {
        soon("the end", self.serving.join_next()).await.unwrap().unwrap()
    }

    /// Returns the only model.
    fn model(&self) -> Arc<Hosted> {
        self.condition.core.find(None).unwrap()
    }

    /// Returns the load of the engine.
    fn load(&self) -> Load {
        match &self.model().loaded().unwrap().role {
            Role::Engine(engine) => engine.load_now(),
            Role::Stage(_) => panic!("a stage has no scheduler"),
        }
    }
}

/// Returns what `future` gives, which must come soon.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let given = time::timeout(PATIENCE, future).await;
    given.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// Waits until something holds that cannot be waited for in a better way.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    soon(what, async {
        while !holds() {
            time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Waits until the registry's view is as wanted.
async fn view_where(
    registry: &MemoryRegistry,
    what: &str,
    wanted: impl Fn(&View) -> bool,
) -> Arc<View> {
    let mut views = registry.watch();
    let view = soon(what, views.wait_for(|view| wanted(view))).await.unwrap();
    Arc::clone(&view)
}

/// Waits until a worker is in a state.
async fn in_state(registry: &MemoryRegistry, id: &str, state: WorkerState) -> Arc<View> {
    let what = format!("{id} in state {state:?}");
    view_where(registry, &what, |view| {
        view.workers.get(&id.parse().unwrap()).is_some_and(|worker| worker.state == state)
    })
    .await
}

/// Starts one worker with the whole model and waits until it is ready.
async fn whole(engine: EngineOptions) -> (Node, MemoryRegistry) {
    let registry = MemoryRegistry::new();
    let node = Node::start("whole", engine, &registry).await;
    in_state(&registry, "whole", WorkerState::Ready).await;
    (node, registry)
}

const PROMPT: &str = "KING HENRY.\n";

/// Returns a request for sampled tokens.
fn request(max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(Input::Prompt(PROMPT.to_owned())),
        sampling: Some(v1::Sampling {
            temperature: Some(0.9),
            top_p: Some(0.95),
            seed: Some(7),
            ..v1::Sampling::default()
        }),
        stop: Some(v1::Stop {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..v1::Stop::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// A stream that was read to its end.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    started: v1::Started,
    ids: Vec<u32>,
    text: String,
    finished: v1::Finished,
}

async fn begin(
    node: &Node,
    request: v1::GenerateRequest,
) -> Result<Streaming<v1::GenerateResponse>, Status> {
    let begun = soon("the response headers", node.client().generate(request)).await;
    Ok(begun?.into_inner())
}

async fn generate(node: &Node, request: v1::GenerateRequest) -> Result<Answer, Status> {
    let resumed = request.resume.as_ref().map_or(0, |resume| resume.token_ids.len());
    let mut stream = begin(node, request).await?;
    let started = match next(&mut stream).await? {
        Some(Event::Started(started)) => started,
        other => panic!("expected started, got {other:?}"),
    };
    read_on(&mut stream, started, resumed).await
}

/// Reads a stream to its end; `from` is the index of the next token.
async fn read_on(
    stream: &mut Streaming<v1::GenerateResponse>,
    started: v1::Started,
    from: usize,
) -> Result<Answer, Status> {
    let mut answer =
        Answer { started, ids: Vec::new(), text: String::new(), finished: Default::default() };
    loop {
        match next(stream).await? {
            Some(Event::Delta(delta)) => {
                let index = u32::try_from(from + answer.ids.len()).unwrap();
                assert_eq!(delta.index, index, "indices have no gaps");
                assert!(!delta.token_ids.is_empty(), "a delta without tokens");
                answer.ids.extend(delta.token_ids);
                answer.text.push_str(&delta.text);
            }
            Some(Event::Finished(mut finished)) => {
                assert_eq!(next(stream).await?, None, "finished is last");
                // Of all that is told, only this differs from time to time.
                let timings = finished.timings.take().unwrap();
                assert!(timings.first_token_seconds >= timings.queue_seconds, "{timings:?}");
                return Ok(Answer { finished, ..answer });
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Returns all that a stream says, apart from timings.
async fn events(node: &Node, request: v1::GenerateRequest) -> Vec<Event> {
    let mut stream = begin(node, request).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = next(&mut stream).await.unwrap() {
        events.push(match event {
            Event::Finished(finished) => {
                Event::Finished(v1::Finished { timings: None, ..finished })
            }
            event => event,
        });
    }
    events
}

async fn next(stream: &mut Streaming<v1::GenerateResponse>) -> Result<Option<Event>, Status> {
    let message = soon("the next message", stream.message()).await?;
    Ok(message.map(|message| message.event.expect("every message says something")))
}

/// Returns the built-in model's tokenizer.
fn tokenizer() -> Arc<Tokenizer> {
    let model = demo::model().unwrap();
    Arc::new(Tokenizer::new(&model.tokenizer, model.special).unwrap())
}

/// Returns the text that ids have released before their completion ends.
fn released(ids: &[u32], stops: &[String]) -> String {
    let mut decoder = StreamDecoder::new(tokenizer(), stops.to_vec());
    ids.iter().map(|id| decoder.push(*id).text).collect()
}
