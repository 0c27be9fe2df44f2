//! The `Inference` service.

use std::{
    collections::VecDeque,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::Arc,
};

use tercet_engine::{Engine, Output, SamplingParams, SequenceRequest, plan::Scores};
use tercet_proto::{
    DetokenizeSpec, GenerateSpec, GetModelSpec, GrammarSpec, Input, InvalidRequest, Reason,
    SamplingSpec, ScoreSpec, TokenizeSpec,
    v1::{self, inference_server::Inference},
};
use tercet_telemetry::{Component, Operation};
use tercet_text::{Grammar, StreamDecoder};
use tokio::{
    task,
    time::{self, Instant},
};
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, Span};

use crate::{
    company::Company,
    completion::{Completion, Limits},
    core::{ActiveGuard, Core, Facts, Hosted, Loaded, Phase, wire},
    failure,
    generation::{Clock, Generation, Held, Stream, Watched},
    grammar,
    mailbox::{End, mailbox},
    prompt::{self, Prompt},
    span,
};

/// Serves requests for the models of one worker.
#[derive(Clone, Debug)]
pub(crate) struct InferenceService {
    core: Arc<Core>,
}

/// A call as it came in.
struct Call {
    span: Span,
    deadline: Option<Instant>,
}

impl Call {
    fn new<T>(method: &'static str, request: &Request<T>) -> Self {
        let timeout = tercet_proto::timeout(request.metadata());
        Self {
            span: span::server(method, request.metadata()),
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
        }
    }

    /// Runs a call to its answer and records how it ended.
    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let answer = answer.instrument(self.span.clone()).await;
        match &answer {
            Ok(_) => span::record_ok(&self.span),
            Err(status) => span::record_failed(&self.span, status),
        }
        answer.map(Response::new)
    }
}

impl InferenceService {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Admits a generation and begins it.
    async fn begin(&self, call: &Call, spec: GenerateSpec) -> Result<Stream, Status> {
        let model = self.core.find(spec.model.as_deref())?;
        // Counted before the phase is looked at, or a drain could overlook it.
        let active = model.begin();
        let (_, engine) = model.serving()?;
        let operation = match &spec.input {
            Input::Chat(_) => Operation::Chat,
            Input::Prompt(_) | Input::Tokens(_) => Operation::TextCompletion,
        };
        let name = &model.facts.name;
        record_request(&call.span, operation, name, &spec);
        let mut watched = Watched {
            recorder: Some(model.metrics.request(Component::Worker, operation, name)),
            span: call.span.clone(),
            phase: None,
        };
        match submit(model, &engine, call.deadline, spec, active, &mut watched).await {
            Ok((generation, started)) => Ok(generation.into_stream(started, watched)),
            Err(status) => {
                watched.fail(&status);
                Err(status)
            }
        }
    }

    /// Scores tokens.
    async fn score_tokens(&self, call: &Call, spec: ScoreSpec) -> Result<Scores, Status> {
        let core = &self.core;
        let model = core.find(spec.model.as_deref())?;
        let _active = model.begin();
        let (_, engine) = model.serving()?;
        let _room = model.admit()?;
        let length = spec.tokens.len();
        let mut debt = model.meter.admit();
        debt.owe(length, 0);
        let _company = Company::enter(&model, 0, call.deadline).await?;
        let (sink, mailbox) = mailbox();
        let request = SequenceRequest {
            prompt: spec.tokens,
            resumed: Vec::new(),
            sampling: SamplingParams::greedy(),
            output: Output::Score,
            traceparent: tercet_telemetry::traceparent_of(&call.span),
            cache_salt: String::new(),
        };
        // Dropped with this future when the caller goes away: that cancels the sequence.
        let _handle = engine
            .submit(request, sink)
            .map_err(|error| failure::submit(&model, &error, "tokens.ids", length))?;
        loop {
            let mail = tokio::select! {
                biased;
                () = model.evicted.cancelled() => return Err(model.draining()),
                () = passed(call.deadline) => return Err(failure::deadline()),
                mail = mailbox.receive() => mail,
            };
            match mail.end {
                None => {}
                Some(End::Scores(scores)) => return Ok(scores),
                Some(End::Failed(failure)) => return Err(failure::sequence(&model, &failure)),
                Some(End::Finished | End::Dropped) => return Err(failure::engine_lost()),
            }
        }
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Stream;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Stream>, Status> {
        let call = Call::new("tercet.v1.Inference/Generate", &request);
        let begun = async {
            let spec = GenerateSpec::try_from(request.into_inner())?;
            self.begin(&call, spec).await
        };
        // How it ends is recorded by the stream.
        let begun = begun.instrument(call.span.clone()).await;
        if let Err(status) = &begun {
            span::record_failed(&call.span, status);
        }
        begun.map(Response::new)
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let call = Call::new("tercet.v1.Inference/Tokenize", &request);
        let tokenized = async {
            let TokenizeSpec { model, input, token_bytes } = request.into_inner().try_into()?;
            let model = self.core.find(model.as_deref())?;
            model.serving()?;
            blocking(&model, move |loaded| prompt::tokenize(loaded, input, token_bytes)).await
        };
        call.answer(tokenized).await
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let call = Call::new("tercet.v1.Inference/Detokenize", &request);
        let detokenized = async {
            let DetokenizeSpec { model, tokens, skip_special_tokens } = request.into_inner().into();
            let model = self.core.find(model.as_deref())?;
            model.serving()?;
            let vocab = model.facts.config.vocab;
            let decoded = blocking(&model, move |loaded| {
                Ok(prompt::detokenize(loaded, vocab, &tokens, skip_special_tokens)?)
            });
            decoded.await
        };
        call.answer(detokenized).await
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        let call = Call::new("tercet.v1.Inference/Score", &request);
        let scored = async {
            let spec = ScoreSpec::try_from(request.into_inner())?;
            let Scores { logprobs, top_ids } = self.score_tokens(&call, spec).await?;
            Ok(v1::ScoreResponse { logprobs, top_ids })
        };
        call.answer(scored).await
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let call = Call::new("tercet.v1.Inference/ListModels", &request);
        let ready = self.core.models().into_iter().filter_map(|model| match model.phase() {
            // A later stage knows no identity, and nobody can ask it.
            Phase::Ready(identity) if !identity.is_empty() => Some(model.facts.info(&identity)),
            _ => None,
        });
        let models = ready.collect();
        call.answer(std::future::ready(Ok(v1::ListModelsResponse { models }))).await
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let call = Call::new("tercet.v1.Inference/GetModel", &request);
        let described = async {
            let GetModelSpec { model } = request.into_inner().into();
            let model = self.core.find(model.as_deref())?;
            let (loaded, _) = model.serving()?;
            // It may have begun to drain since.
            let Phase::Ready(identity) = model.phase() else { return Err(model.draining()) };
            Ok(model.facts.describe(&identity, loaded.tokenizer.special()))
        };
        call.answer(described).await
    }
}

/// Makes a request into a sequence and hands it to the engine.
async fn submit(
    model: Arc<Hosted>,
    engine: &Engine,
    deadline: Option<Instant>,
    spec: GenerateSpec,
    active: ActiveGuard,
    watched: &mut Watched,
) -> Result<(Generation, v1::Started), Status> {
    let (room, debt) = (model.admit()?, model.meter.admit());
    let company = Company::enter(&model, spec.alone_tokens, deadline).await?;
    let mut held = Held { _room: room, _active: active, debt, company };
    let seed = spec.seed().unwrap_or_else(draw_seed);
    let clock = Clock::start();
    let GenerateSpec { input, sampling, stop, resume, cache_salt, grammar, logprobs, echo, .. } =
        spec;
    let vocab = model.facts.config.vocab;
    if let Some((nth, id)) = (0..).zip(&stop.token_ids).find(|(_, id)| **id as usize >= vocab) {
        let what = format!("must be below {vocab}, got {id}");
        return Err(InvalidRequest::new(format!("stop.token_ids[{nth}]"), what).into());
    }
    let resumed = resume.map(|resume| resume.token_ids).unwrap_or_default();
    let stop_strings = stop.strings.clone();
    let loaded = blocking(&model, move |loaded| {
        let prompt = Prompt::new(input, loaded)?;
        let echo = if echo { Some(prompt.echo(loaded)?) } else { None };
        let tokenizer = Arc::clone(&loaded.tokenizer);
        let decoder = StreamDecoder::new(Arc::clone(&tokenizer), stop.strings);
        let grammar = grammar.map(|spec| compiled(loaded, spec)).transpose()?;
        Ok((prompt, echo, tokenizer, decoder, grammar))
    });
    let (Prompt { ids: prompt, field }, echo, tokenizer, decoder, grammar) = loaded.await?;

    let prompt_tokens = prompt.len();
    let limits = Limits {
        max_tokens: stop
            .max_tokens
            .map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX)),
        stop_ids: if stop.ignore_eos { Vec::new() } else { model.facts.eos.clone() },
        stop_tokens: stop.token_ids,
        context: engine.context_limit(),
    };
    let tokens = prompt_tokens + resumed.len();
    if tokens > limits.context {
        return Err(failure::too_long(field, tokens, limits.context));
    }
    let mut completion = Completion::new(decoder, prompt_tokens, limits.clone());
    completion.replay(&resumed).map_err(|index| {
        let description = "ends the completion, yet more ids follow";
        InvalidRequest::new(format!("resume.token_ids[{index}]"), description)
    })?;

    if let Some(recorder) = &watched.recorder {
        recorder.prompt(wire(prompt_tokens));
    }
    let sequence = if completion.ended().is_some() {
        None
    } else {
        let left = stop.max_tokens.map(|most| u64::from(most).saturating_sub(resumed.len() as u64));
        held.debt.owe(tokens, left.unwrap_or(tercet_proto::ASSUMED_TOKENS));
        watched.phase = Some((span::Phase::Queue, span::phase(&watched.span, span::Phase::Queue)));
        let (sink, mailbox) = mailbox();
        let request = SequenceRequest {
            prompt,
            resumed,
            sampling: SamplingParams {
                grammar,
                top_logprobs: logprobs,
                ..with_defaults(&model.facts, sampling, seed)
            },
            output: Output::Generate {
                max_tokens: limits.max_tokens,
                stop_ids: [limits.stop_ids, limits.stop_tokens].concat(),
            },
            traceparent: tercet_telemetry::traceparent_of(&watched.span),
            cache_salt,
        };
        let handle = engine
            .submit(request, sink)
            .map_err(|error| failure::submit(&model, &error, field, prompt_tokens))?;
        Some((mailbox, handle))
    };
    watched.span.record("gen_ai.request.seed", seed);
    let started =
        v1::Started { model: model.facts.name.clone(), seed, prompt_tokens: wire(prompt_tokens) };
    let generation = Generation {
        model,
        completion,
        sequence,
        deadline,
        held,
        tokenizer,
        stop_strings,
        echo,
        clock,
        cached: None,
        outbox: VecDeque::new(),
    };
    Ok((generation, started))
}

/// Runs something that may take milliseconds.
async fn blocking<T: Send + 'static>(
    model: &Arc<Hosted>,
    work: impl FnOnce(&Loaded) -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let model = Arc::clone(model);
    let worked = task::spawn_blocking(move || work(&*model.ready()?));
    worked.await.unwrap_or_else(|_| {
        Err(Reason::Poison.status("the worker broke down over the text of the request"))
    })
}

/// Fills in the model's defaults.
fn with_defaults(facts: &Facts, asked: SamplingSpec, seed: u64) -> SamplingParams {
    let defaults = &facts.generation;
    SamplingParams {
        temperature: asked.temperature.unwrap_or(defaults.temperature),
        top_k: asked.top_k.unwrap_or(defaults.top_k),
        top_p: asked.top_p.unwrap_or(defaults.top_p),
        seed,
        min_p: asked.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or_default(),
        presence_penalty: asked.presence_penalty.unwrap_or_default(),
        logit_bias: asked.logit_bias,
        grammar: None,
        top_logprobs: None,
    }
}

/// Returns a grammar that the engine will be able to begin with.
fn compiled(loaded: &Loaded, spec: GrammarSpec) -> Result<Arc<Grammar>, Status> {
    let field = spec.field();
    let grammar = grammar::grammar(spec);
    loaded
        .grammars
        .compile(&grammar)
        .map_err(|error| InvalidRequest::new(field, error.to_string()))?;
    Ok(Arc::new(grammar))
}

/// Returns when the deadline has passed; never without one.
pub(crate) async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Returns a number that nobody can guess well enough to matter: the standard library's hasher is
/// keyed at random.
fn draw_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Returns how the GenAI conventions call what a grammar makes.
fn output_type(grammar: &GrammarSpec) -> &'static str {
    match grammar {
        GrammarSpec::JsonSchema(_) | GrammarSpec::JsonObject => "json",
        GrammarSpec::Regex(_) | GrammarSpec::Choice(_) => "text",
    }
}

fn record_request(span: &Span, operation: Operation, model: &str, spec: &GenerateSpec) {
    span.record("gen_ai.operation.name", operation.as_str());
    span.record("gen_ai.provider.name", "tercet");
    span.record("gen_ai.request.model", model);
    span.record("gen_ai.response.model", model);
    span.record("gen_ai.request.max_tokens", spec.stop.max_tokens);
    span.record("gen_ai.request.temperature", spec.sampling.temperature);
    span.record("gen_ai.request.top_k", spec.sampling.top_k);
    span.record("gen_ai.request.top_p", spec.sampling.top_p);
    span.record("gen_ai.request.frequency_penalty", spec.sampling.frequency_penalty);
    span.record("gen_ai.request.presence_penalty", spec.sampling.presence_penalty);
    span.record("tercet.request.min_p", spec.sampling.min_p);
    span.record("tercet.request.repetition_penalty", spec.sampling.repetition_penalty);
    span.record("tercet.request.top_logprobs", spec.logprobs);
    if !spec.sampling.logit_bias.is_empty() {
        span.record("tercet.request.logit_biases", spec.sampling.logit_bias.len());
    }
    if let Some(grammar) = &spec.grammar {
        span.record("tercet.request.grammar", grammar.field());
        span.record("gen_ai.output.type", output_type(grammar));
    }
    if let Some(resume) = &spec.resume {
        span.record("tercet.resumed_tokens", resume.token_ids.len());
    }
}
