//! The public service: admits requests and passes them on.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tercet_proto::v1::inference_client::InferenceClient;
use tercet_proto::v1::inference_server::Inference;
use tercet_proto::{
    ASSUMED_TOKENS, GenerateSpec, InvalidRequest, Reason, ScoreSpec, TokenizeSpec, raw, v1,
};
use tercet_telemetry::{Component, Metrics};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span};

use crate::fleet::{Fleet, Patience, RouteError, Want};
use crate::relay::{self, Messages, Start};
use crate::span;
use crate::{Config, Offer};

/// When to come back if there is no room: streams end all the time.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Most times a call with a single answer is made.
const UNARY_ATTEMPTS: u32 = 2;

/// What all calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) fleet: Fleet,
    pub(crate) metrics: Metrics,
    /// Room for streams.
    pub(crate) streams: Arc<Semaphore>,
    /// Cancelled when no new requests are taken any more.
    pub(crate) draining: CancellationToken,
    /// Cancelled when streams must end.
    pub(crate) stop: CancellationToken,
}

impl Shared {
    /// Counts a request that ended for want of room or of a worker.
    pub(crate) fn count_rejection(&self, status: &Status) {
        if let Some(reason @ (Reason::Overloaded | Reason::Draining | Reason::NoWorker)) =
            Reason::of(status)
        {
            self.metrics.reject(Component::Gateway, reason.as_str());
        }
    }
}

/// The gateway's side of `tercet.v1.Inference`.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Shared>);

/// A call with a single answer.
struct Call<M> {
    message: M,
    want: Want,
    patience: Patience,
}

/// What to know of a kind of message that any worker with the model answers.
struct Ask<M> {
    method: &'static str,
    check: fn(M) -> Result<M, InvalidRequest>,
    /// The field that names the model.
    model: fn(&mut M) -> &mut String,
}

impl<M> Call<M> {
    fn is_expired(&self) -> bool {
        self.patience.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }
}

impl Service {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    async fn start(
        &self,
        request: Request<v1::GenerateRequest>,
        span: Span,
    ) -> Result<Start, Status> {
        let patience = self.patience(&request);
        let session = Offer::session(request.metadata());
        let mut spec = GenerateSpec::try_from(request.into_inner())?;
        // For gateways to ask of workers, not for clients.
        spec.alone_tokens = 0;
        let permit = self.admit()?;
        let seed = spec.seed().unwrap_or_else(draw_seed);
        // A request that is resumed has its seed, and goes to the same model.
        let key = session.unwrap_or(seed);
        let model = self.resolve(spec.model.as_deref(), key, patience.worker).await?;
        let tokens = spec.stop.max_tokens.map_or(ASSUMED_TOKENS, u64::from);
        let mut want = self.0.fleet.want(model, tokens);
        if let Some(refused) = self.0.fleet.refusal(&want, patience.deadline) {
            return Err(refused.status(&want.model));
        }
        want.offer = self.offer(session, &spec, &want.model);
        let shared = Arc::clone(&self.0);
        Ok(Start { shared, spec, want, seed, patience, span, permit })
    }

    /// Returns what a request offers to choose a worker by.
    fn offer(&self, session: Option<u64>, spec: &GenerateSpec, model: &str) -> Arc<Offer> {
        let pages = match self.0.fleet.needs_pages() {
            true => Offer::pages(spec, &self.0.fleet.identity(model).unwrap_or_default()),
            false => Vec::new(),
        };
        Arc::new(Offer { session, pages, prompt_tokens: Offer::prompt_tokens(spec) })
    }

    /// Returns how long a call may wait.
    fn patience<M>(&self, request: &Request<M>) -> Patience {
        let now = Instant::now();
        let deadline = tercet_proto::timeout(request.metadata()).map(|timeout| now + timeout);
        let until = |wait| deadline.map_or(now + wait, |deadline| deadline.min(now + wait));
        let Config { worker_wait, max_queue_wait, .. } = self.0.config;
        Patience { worker: until(worker_wait), room: until(max_queue_wait), deadline }
    }

    /// Returns a place among the streams, if there is room.
    fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        if self.0.draining.is_cancelled() {
            return Err(Reason::Draining.status("this gateway takes no new requests, ask another"));
        }
        Arc::clone(&self.0.streams).try_acquire_owned().map_err(|_| {
            let room = self.0.config.max_streams;
            let message = format!("all {room} streams of this gateway are in use");
            Reason::Overloaded.status_retry_after(message, RETRY_DELAY)
        })
    }

    /// Returns the model that a name means for requests with that key.
    async fn resolve(
        &self,
        name: Option<&str>,
        key: u64,
        until: Instant,
    ) -> Result<String, Status> {
        let model = name.map(|name| self.0.config.aliases.resolve(name, key));
        let resolved = self.0.fleet.resolve(model, until).await;
        resolved.map_err(|error| match (name, model, error) {
            (Some(name), Some(model), RouteError::Unknown { served, .. }) if name != model => {
                Reason::ModelUnknown.status(format!(
                    "alias {name:?} leads to {model:?}, which is not served here, only: {served}"
                ))
            }
            (_, _, error) => error.into(),
        })
    }

    /// Has a worker answer what costs it next to nothing.
    async fn ask<M, R, F>(
        &self,
        ask: Ask<M>,
        request: Request<M>,
        send: impl Fn(InferenceClient<Channel>, Request<M>) -> F,
    ) -> Result<Response<R>, Status>
    where
        M: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let span = span::server(ask.method, request.metadata());
        let answered = async {
            let patience = self.patience(&request);
            let key = Offer::session(request.metadata()).unwrap_or_default();
            let mut message = (ask.check)(request.into_inner())?;
            let named = (ask.model)(&mut message);
            let asked = (!named.is_empty()).then_some(named.as_str());
            let model = self.resolve(asked, key, patience.worker).await?;
            model.clone_into(named);
            let want = Want { computes: false, ..self.0.fleet.want(model, 1) };
            self.forward(Call { message, want, patience }, send).await
        };
        let outcome = answered.instrument(span.clone()).await;
        self.answer(&span, outcome)
    }

    /// Makes a call at a worker, and once more if that worker is out of reach.
    async fn forward<M, R, F>(
        &self,
        call: Call<M>,
        send: impl Fn(InferenceClient<Channel>, Request<M>) -> F,
    ) -> Result<Response<R>, Status>
    where
        M: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut attempts = 1;
        loop {
            let lease = match self.0.fleet.acquire(&call.want, call.patience).await {
                Ok(lease) => lease,
                Err(no_place) => {
                    if call.is_expired() {
                        return Err(relay::deadline_exceeded());
                    }
                    return Err(no_place.status(&call.want.model));
                }
            };
            let mut request = Request::new(call.message.clone());
            tercet_telemetry::inject(&Span::current(), request.metadata_mut());
            if let Some(deadline) = call.patience.deadline {
                request.set_timeout(deadline.saturating_duration_since(Instant::now()));
            }
            let status = match send(lease.link().client(), request).await {
                Ok(response) => {
                    lease.set_alive();
                    return Ok(Response::new(response.into_inner()));
                }
                Err(status) => status,
            };
            if call.is_expired() {
                return Err(relay::deadline_exceeded());
            }
            if !relay::is_movable(&status) {
                return Err(relay::relayed(&status));
            }
            relay::blame(&self.0.fleet, &lease, relay::cause(&status), &status);
            if attempts == UNARY_ATTEMPTS {
                return Err(relay::relayed(&status));
            }
            attempts += 1;
        }
    }

    /// Records how a call ended.
    fn answer<R>(&self, span: &Span, outcome: Result<R, Status>) -> Result<R, Status> {
        if let Err(status) = &outcome {
            span::record_answered(span, status);
            self.0.count_rejection(status);
        }
        outcome
    }
}

impl Service {
    /// Starts a generation, with answers as they came from the worker.
    pub(crate) async fn relay(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Messages>, Status> {
        let span = span::server("tercet.v1.Inference/Generate", request.metadata());
        let start = self.start(request, span.clone()).instrument(span.clone()).await;
        let start = self.answer(&span, start)?;
        Ok(Response::new(relay::relay(start)))
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream =
        Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send + 'static>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let messages = self.relay(request).await?.into_inner();
        let decoded = messages.map(|message| {
            raw::decode(&message?).map_err(|error| Status::internal(error.to_string()))
        });
        Ok(Response::new(Box::pin(decoded)))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let ask = Ask {
            method: "tercet.v1.Inference/Tokenize",
            check: |message: v1::TokenizeRequest| TokenizeSpec::try_from(message).map(Into::into),
            model: |message: &mut v1::TokenizeRequest| &mut message.model,
        };
        self.ask(ask, request, |mut client, request| async move { client.tokenize(request).await })
            .await
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let ask = Ask {
            method: "tercet.v1.Inference/Detokenize",
            check: Ok,
            model: |message: &mut v1::DetokenizeRequest| &mut message.model,
        };
        self.ask(
            ask,
            request,
            |mut client, request| async move { client.detokenize(request).await },
        )
        .await
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        let span = span::server("tercet.v1.Inference/Score", request.metadata());
        let answered = async {
            let patience = self.patience(&request);
            let key = Offer::session(request.metadata()).unwrap_or_default();
            let mut spec = ScoreSpec::try_from(request.into_inner())?;
            let _permit = self.admit()?;
            let model = self.resolve(spec.model.as_deref(), key, patience.worker).await?;
            spec.model = Some(model.clone());
            let tokens = u64::try_from(spec.tokens.len()).unwrap_or(u64::MAX);
            let want = self.0.fleet.want(model, tokens);
            let message = v1::ScoreRequest::from(spec);
            self.forward(Call { message, want, patience }, |mut client, request| async move {
                client.score(request).await
            })
            .await
        };
        let outcome = answered.instrument(span.clone()).await;
        self.answer(&span, outcome)
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let models = self.0.config.aliases.listed(self.0.fleet.watch().borrow().models());
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let ask = Ask {
            method: "tercet.v1.Inference/GetModel",
            check: Ok,
            model: |message: &mut v1::GetModelRequest| &mut message.model,
        };
        self.ask(ask, request, |mut client, request| async move { client.get_model(request).await })
            .await
    }
}

impl From<RouteError> for Status {
    fn from(error: RouteError) -> Self {
        let message = error.to_string();
        match error {
            RouteError::Unknown { .. } => Reason::ModelUnknown.status(message),
            RouteError::Ambiguous { .. } => InvalidRequest::new("model", message).into(),
            RouteError::Nothing => Reason::NoWorker.status(message),
        }
    }
}

/// Returns a seed that no other request has.
pub(crate) fn draw_seed() -> u64 {
    // The keys of a new `RandomState` come from the system's randomness and differ each time;
    // SipHash spreads them over all 64 bits. A seed has to be distinct, not secret.
    RandomState::new().hash_one(0_u8)
}
