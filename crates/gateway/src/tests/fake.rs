//! A worker that generates by a formula and breaks on demand.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use tercet_cluster::{WorkerId, WorkerRecord};
use tercet_proto::v1::generate_response::Event;
use tercet_proto::v1::inference_server::{Inference, InferenceServer};
use tercet_proto::v1::worker_server::{Worker, WorkerServer};
use tercet_proto::{GenerateSpec, Input, v1};
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

use crate::{DialError, Dialer, TcpDialer};

/// Tokens of a request that does not say.
pub(super) const DEFAULT_TOKENS: u32 = 12;

/// What a worker does with one generation. `at` is an index of the completion.
#[derive(Clone, Debug)]
pub(super) enum Play {
    /// Answers all of it.
    Whole,
    /// Refuses it.
    Refuse(Status),
    /// Does not answer at all.
    Stall,
    /// Ends it with a status before that index.
    Fail { at: u32, status: Status },
    /// Ends it without `finished` before that index.
    End { at: u32 },
    /// Cuts the worker's wire before that index, as a kill does.
    Cut { at: u32 },
    /// Breaks the worker's connections before that index, as a network does: it takes new ones.
    Reset { at: u32 },
    /// Lets the worker's wire hang before that index, as a dead network does.
    Freeze { at: u32 },
    /// Says nothing more before that index.
    Hold { at: u32 },
    /// Waits before that index until the gate is open.
    Gate { at: u32, open: watch::Receiver<bool> },
    /// Repeats that many of the tokens resumed from, then goes on.
    Repeat { tokens: u32 },
    /// Leaves out the token at that index.
    Gap { at: u32 },
}

/// Returns the token at the end of `ids`: it depends on the seed, the prompt, and every id before.
pub(super) fn token(seed: u64, prompt: &str, ids: &[u32]) -> u32 {
    let mut hash = seed ^ 0xcbf2_9ce4_8422_2325;
    let bytes = prompt.bytes().map(u64::from).chain(ids.iter().map(|id| u64::from(*id) + 256));
    for byte in bytes {
        hash = (hash ^ byte).wrapping_mul(0x0100_0000_01b3);
        hash ^= hash >> 29;
    }
    u32::try_from(hash % 32_000).unwrap()
}

/// Returns the text of the token at `index`, which depends on the token alone.
pub(super) fn text(id: u32) -> String {
    format!("<{id}>")
}

/// Spawns a task of the test.
#[expect(clippy::disallowed_methods, reason = "ends with the runtime of its test")]
pub(super) fn spawn(task: impl Future<Output = impl Send + 'static> + Send + 'static) {
    drop(tokio::spawn(task));
}

/// A request as a worker saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) spec: GenerateSpec,
    pub(super) metadata: MetadataMap,
}

/// The state of a fake worker; outlives its incarnations.
#[derive(Debug)]
pub(super) struct FakeWorker {
    pub(super) script: Mutex<VecDeque<Play>>,
    pub(super) seen: Mutex<Vec<Seen>>,
    /// Statuses for the next unary calls.
    pub(super) unary: Mutex<VecDeque<Status>>,
    pub(super) unary_calls: Mutex<usize>,
    /// Generations in progress.
    pub(super) active: watch::Sender<usize>,
    pub(super) wire: Wire,
    /// What it tells of its load, every time it changes and steadily; `None` is said by an older
    /// version, which knows no reports.
    pub(super) report: watch::Sender<Option<v1::LoadReport>>,
}

/// What a worker's connections do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum WireState {
    Up,
    /// Connected, and nothing comes through.
    Frozen,
    /// Torn down; new connections are refused.
    Down,
}

#[derive(Clone, Debug)]
pub(super) struct Wire {
    pub(super) state: watch::Sender<WireState>,
    /// Grows when the connections break.
    resets: watch::Sender<u64>,
    accept: mpsc::Sender<DuplexStream>,
}

/// Counts a generation in progress, until dropped.
struct Active(watch::Sender<usize>);

impl Active {
    fn new(active: &watch::Sender<usize>) -> Self {
        active.send_modify(|count| *count += 1);
        Self(active.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl FakeWorker {
    /// Starts a worker behind a wire of its own.
    pub(super) fn start() -> Arc<Self> {
        let (worker, incoming) = Self::new();
        let service = InferenceServer::new(FakeService(Arc::clone(&worker)));
        let reports = WorkerServer::new(FakeService(Arc::clone(&worker)));
        let incoming =
            tokio_stream::StreamExt::map(ReceiverStream::new(incoming), Ok::<_, io::Error>);
        spawn(
            Server::builder()
                .add_service(service)
                .add_service(reports)
                .serve_with_incoming(incoming),
        );
        worker
    }

    /// Returns a worker and the connections that its wire leads to.
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<DuplexStream>) {
        let (accept, incoming) = mpsc::channel(16);
        let worker = Self {
            script: Mutex::default(),
            seen: Mutex::default(),
            unary: Mutex::default(),
            unary_calls: Mutex::default(),
            active: watch::Sender::new(0),
            wire: Wire {
                state: watch::Sender::new(WireState::Up),
                resets: watch::Sender::default(),
                accept,
            },
            report: watch::Sender::new(None),
        };
        (Arc::new(worker), incoming)
    }

    pub(super) fn plays(&self, plays: impl IntoIterator<Item = Play>) {
        self.script.lock().unwrap().extend(plays);
    }

    /// Changes what it reports.
    pub(super) fn reports(&self, change: impl FnOnce(&mut v1::LoadReport)) {
        self.report.send_modify(|report| change(report.get_or_insert_default()));
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Takes a unary call: fails if that is what the test wants.
    fn asked(&self) -> Result<(), Status> {
        *self.unary_calls.lock().unwrap() += 1;
        self.unary.lock().unwrap().pop_front().map_or(Ok(()), Err)
    }

    /// Returns when that many generations have been asked for, without letting time pass.
    pub(super) async fn until_seen(&self, count: usize) {
        while self.seen().len() < count {
            tokio::task::yield_now().await;
        }
    }

    /// Returns when that many generations have been asked for, letting time pass.
    pub(super) async fn in_time_seen(&self, count: usize) {
        let wait = async {
            while self.seen().len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(super::bench::PATIENCE, wait).await.unwrap();
    }

    /// Returns when that many generations are in progress.
    pub(super) async fn until_active(&self, count: usize) {
        let mut reached = self.active.subscribe();
        tokio::time::timeout(super::bench::PATIENCE, reached.wait_for(|active| *active == count))
            .await
            .unwrap_or_else(|_| panic!("active is {}, not {count}", *self.active.borrow()))
            .unwrap();
    }
}

impl Wire {
    /// Connects to the worker through two halves that are copied between while the wire is up.
    async fn connect(self) -> io::Result<TokioIo<DuplexStream>> {
        if *self.state.borrow() == WireState::Down {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (client, mut client_far) = tokio::io::duplex(64 * 1024);
        let (server, mut server_far) = tokio::io::duplex(64 * 1024);
        self.accept.send(server).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        let (mut state, mut resets) = (self.state.subscribe(), self.resets.subscribe());
        spawn(async move {
            loop {
                let current = *state.borrow_and_update();
                let copy = async {
                    match current {
                        WireState::Up => {
                            drop(
                                tokio::io::copy_bidirectional(&mut client_far, &mut server_far)
                                    .await,
                            );
                        }
                        WireState::Frozen => std::future::pending().await,
                        WireState::Down => {}
                    }
                };
                tokio::select! {
                    () = copy => return,
                    _ = resets.changed() => return,
                    changed = state.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(TokioIo::new(client))
    }
}

/// Dials fake workers through their wires, with the keepalive of the TCP dialer.
#[derive(Debug, Default)]
pub(super) struct Wires(pub(super) Mutex<HashMap<WorkerId, Wire>>);

impl Dialer for Wires {
    fn dial(&self, worker: &WorkerRecord) -> Result<Channel, DialError> {
        let wire = self.0.lock().unwrap()[&worker.id].clone();
        let TcpDialer { connect_timeout, keepalive_interval, keepalive_timeout } =
            TcpDialer::default();
        let connector = tower::service_fn(move |_| wire.clone().connect());
        Ok(Endpoint::from_static("http://fake")
            .connect_timeout(connect_timeout)
            .http2_keep_alive_interval(keepalive_interval)
            .keep_alive_timeout(keepalive_timeout)
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(connector))
    }
}

pub(super) struct FakeService(pub(super) Arc<FakeWorker>);

type Responses = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for FakeService {
    type GenerateStream = Responses;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Responses>, Status> {
        let metadata = request.metadata().clone();
        let spec = GenerateSpec::try_from(request.into_inner())?;
        self.0.seen.lock().unwrap().push(Seen { spec: spec.clone(), metadata });
        let play = self.0.script.lock().unwrap().pop_front().unwrap_or(Play::Whole);
        if let Play::Refuse(status) = play {
            return Err(status);
        }
        if let Play::Stall = play {
            std::future::pending::<()>().await;
        }
        // Room for one message: the worker is at most that far ahead of what the gateway read.
        let (messages, stream) = mpsc::channel(1);
        let worker = Arc::clone(&self.0);
        spawn(async move {
            let closed = messages.clone();
            tokio::select! {
                () = perform(&worker, spec, play, messages) => {}
                () = closed.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        self.0.asked()?;
        let v1::TokenizeRequest { text, chat, .. } = request.into_inner();
        let rendered: String =
            chat.unwrap_or_default().messages.into_iter().map(|message| message.content).collect();
        let ids = text.bytes().chain(rendered.bytes()).map(u32::from).collect();
        let tokens = Some(v1::TokenIds { ids });
        Ok(Response::new(v1::TokenizeResponse { tokens, rendered, ..Default::default() }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        self.0.asked()?;
        let ids = request.into_inner().tokens.unwrap_or_default().ids;
        let text = ids.into_iter().map(|id| char::from_u32(id).unwrap()).collect();
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        self.0.asked()?;
        let top_ids = request.into_inner().tokens.unwrap_or_default().ids;
        Ok(Response::new(v1::ScoreResponse { logprobs: vec![-1.0; top_ids.len() - 1], top_ids }))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("the gateway knows by itself"))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        self.0.asked()?;
        let info = v1::ModelInfo { name: request.into_inner().model, ..Default::default() };
        Ok(Response::new(v1::GetModelResponse { model: Some(info), ..Default::default() }))
    }
}

#[tonic::async_trait]
impl Worker for FakeService {
    type LoadModelStream =
        Pin<Box<dyn Stream<Item = Result<v1::LoadModelResponse, Status>> + Send>>;
    type WatchLoadStream = Pin<Box<dyn Stream<Item = Result<v1::LoadReport, Status>> + Send>>;

    async fn watch_load(
        &self,
        request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let interval = Duration::from_millis(request.into_inner().interval_millis.into());
        let mut reports = self.0.report.subscribe();
        if reports.borrow_and_update().is_none() {
            return Err(Status::unimplemented("an older version"));
        }
        let (messages, stream) = mpsc::channel(1);
        spawn(async move {
            loop {
                let report = reports.borrow_and_update().clone().unwrap_or_default();
                if messages.send(Ok(report)).await.is_err() {
                    return;
                }
                drop(tokio::time::timeout(interval, reports.changed()).await);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn drain(
        &self,
        _request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        if self.0.report.borrow().is_none() {
            return Err(Status::unimplemented("an older version"));
        }
        self.0.reports(|report| report.set_state(v1::WorkerState::Draining));
        Ok(Response::new(v1::DrainResponse { streams: 0 }))
    }

    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Err(Status::unimplemented("no gateway asks"))
    }

    async fn load_model(
        &self,
        _request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        Err(Status::unimplemented("no gateway asks"))
    }

    async fn unload_model(
        &self,
        _request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        Err(Status::unimplemented("no gateway asks"))
    }
}

type Messages = mpsc::Sender<Result<v1::GenerateResponse, Status>>;

async fn send(messages: &Messages, event: Event) {
    let response = v1::GenerateResponse { event: Some(event) };
    messages.send(Ok(response)).await.unwrap_or(());
}

async fn perform(worker: &FakeWorker, spec: GenerateSpec, play: Play, messages: Messages) {
    let _active = Active::new(&worker.active);
    let seed = spec.seed().unwrap_or(0);
    let Input::Prompt(prompt) = &spec.input else { panic!("fake workers take prompts") };
    let model = spec.model.clone().unwrap_or_default();
    let prompt_tokens = u32::try_from(prompt.len()).unwrap();
    send(&messages, Event::Started(v1::Started { model, seed, prompt_tokens })).await;

    let mut ids = spec.resume.clone().map(|resume| resume.token_ids).unwrap_or_default();
    if let Play::Repeat { tokens } = play {
        let from = ids.len() - usize::try_from(tokens).unwrap();
        let index = u32::try_from(from).unwrap();
        let token_ids = ids[from..].to_vec();
        let text = token_ids.iter().map(|id| text(*id)).collect();
        send(&messages, Event::Delta(v1::Delta { index, token_ids, text, ..v1::Delta::default() }))
            .await;
    }
    let max_tokens = spec.stop.max_tokens.unwrap_or(DEFAULT_TOKENS);
    loop {
        let index = u32::try_from(ids.len()).unwrap();
        match play.clone() {
            Play::Fail { at, status } if at == index => {
                messages.send(Err(status)).await.unwrap_or(());
                return;
            }
            Play::End { at } if at == index => return,
            Play::Cut { at } if at == index => {
                // What was sent has to arrive first: the test is about this index.
                drop(messages.reserve().await);
                worker.wire.state.send_replace(WireState::Down);
                return;
            }
            Play::Reset { at } if at == index => {
                drop(messages.reserve().await);
                worker.wire.resets.send_modify(|resets| *resets += 1);
                return;
            }
            Play::Freeze { at } if at == index => {
                worker.wire.state.send_replace(WireState::Frozen);
                std::future::pending::<()>().await;
            }
            Play::Hold { at } if at == index => std::future::pending().await,
            Play::Gate { at, mut open } if at == index => {
                drop(open.wait_for(|open| *open).await);
            }
            _ => {}
        }
        if index >= max_tokens {
            break;
        }
        let id = token(seed, prompt, &ids);
        ids.push(id);
        if matches!(play, Play::Gap { at } if at == index) {
            continue;
        }
        let delta =
            v1::Delta { index, token_ids: vec![id], text: text(id), ..v1::Delta::default() };
        send(&messages, Event::Delta(delta)).await;
    }
    let completion_tokens = u32::try_from(ids.len()).unwrap();
    let finished = v1::Finished {
        reason: v1::FinishReason::MaxTokens.into(),
        usage: Some(v1::Usage { prompt_tokens, completion_tokens, ..v1::Usage::default() }),
        ..v1::Finished::default()
    };
    send(&messages, Event::Finished(finished)).await;
}
