//! One generation: from the engine's events to the messages of a stream.

use std::{collections::VecDeque, sync::Arc};

use futures::{StreamExt as _, stream::BoxStream};
use tercet_engine::{SequenceHandle, plan::TokenLogprobs};
use tercet_proto::v1::{self, GenerateResponse, generate_response::Event};
use tercet_telemetry::RequestRecorder;
use tercet_text::Tokenizer;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::Status;
use tracing::Span;

use crate::{
    company::Company,
    completion::{Completion, Matched},
    core::{ActiveGuard, Hosted, wire},
    failure,
    inference::passed,
    mailbox::{End, Mail, Mailbox},
    meter::Debt,
    span::{self, Phase},
};

/// The messages of one generation. Dropping it cancels the sequence within one step.
pub(crate) type Stream = BoxStream<'static, Result<GenerateResponse, Status>>;

/// A generation in progress.
pub(crate) struct Generation {
    pub(crate) model: Arc<Hosted>,
    pub(crate) completion: Completion,
    /// Where the engine tells of the sequence; `None` for a completion that is over.
    pub(crate) sequence: Option<(Mailbox, SequenceHandle)>,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
    pub(crate) held: Held,
    /// Spells the tokens of log-probabilities.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The stop strings of the request.
    pub(crate) stop_strings: Vec<String>,
    /// The prompt, if the caller wants it back.
    pub(crate) echo: Option<v1::Prompt>,
    pub(crate) clock: Clock,
    /// Tokens that were cached when the sequence left the queue first.
    pub(crate) cached: Option<usize>,
    /// Messages to be sent before anything new.
    pub(crate) outbox: VecDeque<GenerateResponse>,
}

/// When things happened.
pub(crate) struct Clock {
    asked: Instant,
    scheduled: Option<Instant>,
    /// When the first and the last new token came.
    tokens: Option<(Instant, Instant)>,
}

impl Clock {
    /// Returns the clock of a request that comes in now.
    pub(crate) fn start() -> Self {
        Self { asked: Instant::now(), scheduled: None, tokens: None }
    }

    fn schedule(&mut self) {
        self.scheduled.get_or_insert_with(Instant::now);
    }

    fn token(&mut self) {
        let now = Instant::now();
        self.tokens = Some((self.tokens.map_or(now, |(first, _)| first), now));
    }

    /// Returns how long the parts took; none for those that were not.
    fn timings(&self) -> v1::Timings {
        let scheduled = self.scheduled.unwrap_or(self.asked);
        let (first, last) = self.tokens.unwrap_or((scheduled, scheduled));
        v1::Timings {
            queue_seconds: (scheduled - self.asked).as_secs_f64(),
            prefill_seconds: (first - scheduled).as_secs_f64(),
            first_token_seconds: (first - self.asked).as_secs_f64(),
            decode_seconds: (last - first).as_secs_f64(),
        }
    }
}

/// What a generation holds while it lasts.
pub(crate) struct Held {
    pub(crate) _room: OwnedSemaphorePermit,
    pub(crate) _active: ActiveGuard,
    pub(crate) debt: Debt,
    pub(crate) company: Company,
}

/// What is told of a generation to operators.
pub(crate) struct Watched {
    pub(crate) span: Span,
    /// Taken at the end.
    pub(crate) recorder: Option<RequestRecorder>,
    pub(crate) phase: Option<(Phase, Span)>,
}

impl Generation {
    /// Returns the stream of messages, the first of which says that the request was admitted.
    pub(crate) fn into_stream(mut self, started: v1::Started, mut watched: Watched) -> Stream {
        self.outbox.push_back(message(Event::Started(started)));
        self.outbox.extend(self.echo.take().map(|prompt| message(Event::Prompt(prompt))));
        if self.sequence.is_none() {
            self.finish(&mut watched);
        }
        futures::stream::unfold((self, watched), |(mut generation, mut watched)| async move {
            Some((generation.next(&mut watched).await?, (generation, watched)))
        })
        .boxed()
    }

    async fn next(&mut self, watched: &mut Watched) -> Option<Result<GenerateResponse, Status>> {
        loop {
            if let Some(message) = self.outbox.pop_front() {
                return Some(Ok(message));
            }
            let (mailbox, _) = self.sequence.as_ref()?;
            let mail = tokio::select! {
                // A fast engine must not hide that time is up.
                biased;
                () = self.model.evicted.cancelled() => Err(self.model.draining()),
                () = passed(self.deadline) => Err(failure::deadline()),
                mail = mailbox.receive() => Ok(mail),
            };
            if let Err(status) = mail.and_then(|mail| self.take_in(mail, watched)) {
                watched.fail(&status);
                self.sequence = None;
                return Some(Err(status));
            }
        }
    }

    /// Turns what has happened into messages.
    fn take_in(&mut self, mail: Mail, watched: &mut Watched) -> Result<(), Status> {
        let Mail { scheduled, first_index, ids, logprobs, end } = mail;
        if let Some(cached) = scheduled {
            // A preempted sequence finds its own pages: that saves nothing.
            self.cached.get_or_insert(cached);
            self.clock.schedule();
            watched.enter(Phase::Prefill);
        }
        if !ids.is_empty() {
            if first_index != self.completion.tokens() {
                return Err(failure::engine_lost());
            }
            watched.enter(Phase::Decode);
            self.clock.token();
            self.held.debt.pay(ids.len());
            self.held.company.pay(ids.len());
            let delta = self.delta(ids, logprobs);
            watched.count(delta.token_ids.len());
            self.outbox.push_back(message(Event::Delta(delta)));
        }
        match end {
            _ if self.completion.ended().is_some() => self.finish(watched),
            None => {}
            Some(End::Failed(failure)) => return Err(failure::sequence(&self.model, &failure)),
            // The completion knows by itself when it is complete: the engine lost count.
            Some(End::Finished | End::Scores(_) | End::Dropped) => {
                return Err(failure::engine_lost());
            }
        }
        Ok(())
    }

    /// Takes new tokens, except those after the end of the completion.
    fn delta(&mut self, mut ids: Vec<u32>, mut logprobs: Vec<TokenLogprobs>) -> v1::Delta {
        let index = self.completion.tokens();
        let mut text = String::new();
        for id in &ids {
            text.push_str(&self.completion.push(*id));
            if self.completion.ended().is_some() {
                break;
            }
        }
        ids.truncate(self.completion.tokens() - index);
        logprobs.truncate(ids.len());
        let logprobs = ids.iter().zip(logprobs).map(|(id, logprobs)| self.spell(*id, logprobs));
        let logprobs = logprobs.collect();
        v1::Delta { index: wire(index), token_ids: ids, text, logprobs }
    }

    fn spell(&self, id: u32, logprobs: TokenLogprobs) -> v1::TokenLogprob {
        let token = |id| self.tokenizer.token_bytes(id).to_vec();
        let top = logprobs.top.into_iter();
        v1::TokenLogprob {
            logprob: logprobs.logprob,
            top: top
                .map(|(id, logprob)| v1::TopLogprob { id, logprob, token: token(id) })
                .collect(),
            token: token(id),
        }
    }

    /// Ends the stream: the completion is complete.
    fn finish(&mut self, watched: &mut Watched) {
        let reason = self.completion.ended().unwrap_or_default();
        let usage = v1::Usage {
            prompt_tokens: wire(self.completion.prompt_tokens()),
            completion_tokens: wire(self.completion.tokens()),
            cached_tokens: wire(self.cached.unwrap_or_default()),
        };
        let matched = self.completion.matched().map(|matched| match matched {
            Matched::String(nth) => {
                v1::finished::Matched::StopString(self.stop_strings[nth].clone())
            }
            Matched::Token(id) => v1::finished::Matched::StopToken(id),
        });
        let timings = Some(self.clock.timings());
        let finished = v1::Finished { reason: reason.into(), usage: Some(usage), matched, timings };
        self.outbox.push_back(message(Event::Finished(finished)));
        watched.succeed(reason, usage);
        // Ends what the engine does for it: after a stop string it would go on.
        self.sequence = None;
    }
}

impl Watched {
    /// Begins a phase, unless it has begun: a preempted sequence is scheduled again.
    fn enter(&mut self, phase: Phase) {
        let present = self.phase.as_ref().map(|(present, _)| *present);
        if matches!(
            (present, phase),
            (Some(Phase::Queue), Phase::Prefill)
                | (Some(Phase::Queue | Phase::Prefill), Phase::Decode)
        ) {
            self.phase = Some((phase, span::phase(&self.span, phase)));
        }
    }

    fn count(&mut self, tokens: usize) {
        if let Some(recorder) = &mut self.recorder {
            recorder.completion(tokens);
        }
    }

    fn succeed(&mut self, reason: v1::FinishReason, usage: v1::Usage) {
        self.phase = None;
        self.span.record(
            "gen_ai.response.finish_reasons",
            tercet_proto::convention::finish_reason(reason),
        );
        self.span.record("gen_ai.usage.input_tokens", usage.prompt_tokens);
        self.span.record("gen_ai.usage.output_tokens", usage.completion_tokens);
        self.span.record("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens);
        span::record_ok(&self.span);
        if let Some(recorder) = self.recorder.take() {
            recorder.succeed();
        }
    }

    pub(crate) fn fail(&mut self, status: &Status) {
        self.phase = None;
        span::record_failed(&self.span, status);
        if let Some(recorder) = self.recorder.take() {
            recorder.fail(tercet_proto::convention::error_type(status));
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Neither succeeded nor failed: the caller has gone. The recorder says so by itself.
        if self.recorder.is_some() {
            span::record_cancelled(&self.span);
        }
    }
}

fn message(event: Event) -> GenerateResponse {
    GenerateResponse { event: Some(event) }
}
