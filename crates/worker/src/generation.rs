//! One generation: from the engine's events to the messages of a stream.

use std::{collections::VecDeque, sync::Arc};

use futures::{StreamExt as _, stream::BoxStream};
use tercet_engine::SequenceHandle;
use tercet_proto::v1::{self, GenerateResponse, generate_response::Event};
use tercet_telemetry::RequestRecorder;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::Status;
use tracing::Span;

use crate::{
    completion::Completion,
    core::{ActiveGuard, Hosted, wire},
    failure,
    inference::passed,
    mailbox::{End, Mail, Mailbox},
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
    pub(crate) _held: Held,
    /// Messages to be sent before anything new.
    pub(crate) outbox: VecDeque<GenerateResponse>,
}

/// What a generation holds while it lasts.
pub(crate) struct Held {
    pub(crate) _room: OwnedSemaphorePermit,
    pub(crate) _active: ActiveGuard,
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
        let Mail { scheduled, first_index, ids, end } = mail;
        if scheduled {
            watched.enter(Phase::Prefill);
        }
        if !ids.is_empty() {
            if first_index != self.completion.tokens() {
                return Err(failure::engine_lost());
            }
            watched.enter(Phase::Decode);
            let delta = self.delta(ids);
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
    fn delta(&mut self, mut ids: Vec<u32>) -> v1::Delta {
        let index = self.completion.tokens();
        let mut text = String::new();
        for id in &ids {
            text.push_str(&self.completion.push(*id));
            if self.completion.ended().is_some() {
                break;
            }
        }
        ids.truncate(self.completion.tokens() - index);
        v1::Delta { index: wire(index), token_ids: ids, text, logprobs: Vec::new() }
    }

    /// Ends the stream: the completion is complete.
    fn finish(&mut self, watched: &mut Watched) {
        let reason = self.completion.ended().unwrap_or_default();
        let usage = v1::Usage {
            prompt_tokens: wire(self.completion.prompt_tokens()),
            completion_tokens: wire(self.completion.tokens()),
            ..v1::Usage::default()
        };
        let finished =
            v1::Finished { reason: reason.into(), usage: Some(usage), ..v1::Finished::default() };
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
