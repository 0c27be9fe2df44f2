//! The `Inference` service of a synthetic worker.

use std::{
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use futures::stream::BoxStream;
use tercet_proto::{
    GenerateSpec, GetModelSpec, Reason, ScoreSpec, TokenizeInput, TokenizeSpec,
    v1::{self, inference_server::Inference},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{Formula, Omission, Options, formula::VOCABULARY, generation::Generation, load::Load};

/// Ids of the bytes of a text begin here.
const FIRST_BYTE: u32 = 3;

/// What all calls share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) epoch: u64,
    pub(super) load: Arc<Load>,
    /// Time between two tokens of a stream.
    pub(super) pace: watch::Sender<Duration>,
    /// How far the worker is.
    pub(super) state: watch::Sender<v1::ModelState>,
    /// Cancelled when an operator wants the worker to stop.
    pub(super) told_to_stop: CancellationToken,
    /// Cancelled when streams must end.
    pub(super) evicted: CancellationToken,
}

impl Shared {
    /// Returns digest and size of the model, as told to clients.
    pub(super) fn model(&self) -> v1::ModelInfo {
        let name = self.options.model.clone();
        let bytes = name.bytes().map(u32::from).collect::<Vec<_>>();
        let identity = format!("{:08x}", Formula::new(&bytes, 0).id(0));
        let (context_length, vocab_size) = (self.options.context, VOCABULARY);
        v1::ModelInfo { name, identity, context_length, vocab_size }
    }

    /// Returns the generation of the model, as told in the registry and in reports.
    pub(super) fn generation(&self) -> u64 {
        u64::from(self.options.has(Omission::ModelState))
    }

    /// Says that a stream begins, if that is asked for.
    pub(super) fn tell(&self, seed: u64, index: u32) {
        if self.options.tell {
            // Where nobody listens any more, nothing is to be told.
            _ = writeln!(io::stdout(), "begin {seed} {index}");
        }
    }

    fn check_model(&self, model: Option<&str>) -> Result<(), Status> {
        let own = &self.options.model;
        match model {
            Some(model) if model != own => Err(Reason::ModelUnknown
                .status(format!("no model {model:?} is served here, expected {own:?}"))),
            _ => Ok(()),
        }
    }

    /// Refuses what comes before the worker is ready, or after.
    fn check_state(&self) -> Result<(), Status> {
        let id = &self.options.id;
        match *self.state.borrow() {
            v1::ModelState::Ready => Ok(()),
            v1::ModelState::Draining => {
                Err(Reason::Draining.status(format!("worker {id} is about to stop")))
            }
            _ => Err(Reason::Loading.status(format!("worker {id} is not ready"))),
        }
    }
}

/// Answers by the formula.
#[derive(Clone, Debug)]
pub(super) struct SyntheticInference(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl Inference for SyntheticInference {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let timeout = tercet_proto::timeout(request.metadata());
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let spec = GenerateSpec::try_from(request.into_inner())?;
        self.0.check_model(spec.model.as_deref())?;
        self.0.check_state()?;
        Ok(Response::new(Generation::begin(&self.0, spec, deadline)?.into_stream()))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        self.0.check_state()?;
        let ids = match TokenizeSpec::try_from(request.into_inner())?.input {
            TokenizeInput::Text(text) => prompt_ids(&text),
            TokenizeInput::Chat(chat) => chat_ids(&chat),
        };
        let tokens = Some(v1::TokenIds { ids });
        Ok(Response::new(v1::TokenizeResponse { tokens, ..Default::default() }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        self.0.check_state()?;
        let ids = request.into_inner().tokens.unwrap_or_default().ids;
        let byte = |id: u32| id.checked_sub(FIRST_BYTE).and_then(|byte| u8::try_from(byte).ok());
        let bytes: Vec<u8> = ids.into_iter().filter_map(byte).collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        self.0.check_state()?;
        let ids = ScoreSpec::try_from(request.into_inner())?.tokens;
        let top_ids = (1..=ids.len()).map(|end| Formula::new(&ids[..end], 0).id(0)).collect();
        Ok(Response::new(v1::ScoreResponse { logprobs: vec![-1.0; ids.len() - 1], top_ids }))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse { models: vec![self.0.model()] }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        self.0.check_model(GetModelSpec::from(request.into_inner()).model.as_deref())?;
        self.0.check_state()?;
        let model = Some(self.0.model());
        Ok(Response::new(v1::GetModelResponse { model, ..Default::default() }))
    }
}

/// Returns the token ids of a chat: of each message the role, a 1, and the content.
pub(super) fn chat_ids(chat: &v1::Chat) -> Vec<u32> {
    let ids = |message: &v1::ChatMessage| {
        [prompt_ids(&message.role), vec![1], prompt_ids(&message.content)].concat()
    };
    chat.messages.iter().flat_map(ids).collect()
}

/// Returns the token ids of a text: its bytes.
pub(super) fn prompt_ids(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| FIRST_BYTE + u32::from(byte)).collect()
}
