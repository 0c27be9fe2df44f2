//! One stream of tokens.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, stream::BoxStream};
use tercet_proto::{
    GenerateSpec, Input, InvalidRequest, Reason,
    v1::{self, FinishReason, GenerateResponse, finished::Matched, generate_response::Event},
};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tonic::Status;

use super::{
    Formula, Omission,
    formula::Limits,
    inference::{Shared, chat_ids, prompt_ids},
    load::Aboard,
    micros_now,
};

/// A stream that is further behind its schedule than this does not catch up: nor would a machine
/// that stood still.
const CATCH_UP: Duration = Duration::from_millis(50);

type Item = Result<GenerateResponse, Status>;

/// A completion in the making.
pub(super) struct Generation {
    shared: Arc<Shared>,
    formula: Formula,
    limits: Limits,
    /// `None` once it has ended.
    aboard: Option<Aboard>,
    /// Index of the next token.
    index: u32,
    outbox: VecDeque<GenerateResponse>,
    deadline: Option<Instant>,
    pace: watch::Receiver<Duration>,
    begun: Instant,
    clock: Option<Clock>,
}

/// When what happened.
struct Clock {
    slot: Instant,
    /// When the last token was due.
    last: Instant,
    first_token: Option<Instant>,
}

impl Generation {
    /// Takes a request aboard.
    pub(super) fn begin(
        shared: &Arc<Shared>,
        spec: GenerateSpec,
        deadline: Option<Instant>,
    ) -> Result<Self, Status> {
        if !spec.stop.strings.is_empty() || spec.grammar.is_some() || spec.logprobs.is_some() {
            let message = "synthetic workers know no stop strings, grammars and log-probabilities";
            return Err(InvalidRequest::new("stop.strings", message).into());
        }
        let seed = spec.seed().unwrap_or_default();
        let prompt = match &spec.input {
            Input::Prompt(text) => prompt_ids(text),
            Input::Tokens(ids) => ids.clone(),
            Input::Chat(chat) => chat_ids(chat),
        };
        let prompt_tokens = count(prompt.len());
        let formula = Formula::new(&prompt, seed);
        let limits = Limits { stop: spec.stop, prompt_tokens, context: shared.options.context };
        let given = spec.resume.map(|resume| resume.token_ids).unwrap_or_default();
        let wrong = (0_u32..).zip(&given).find(|(index, id)| formula.id(*index) != **id);
        if let Some((index, id)) = wrong {
            let message = format!("is {id}, expected {} as it was sent", formula.id(index));
            return Err(InvalidRequest::new(format!("resume.token_ids[{index}]"), message).into());
        }
        let index = count(given.len());
        let aboard = shared.load.board(limits.left(index))?;
        shared.tell(seed, index);

        let mut outbox = VecDeque::new();
        let model = shared.options.model.clone();
        outbox.push_back(message(Event::Started(v1::Started { model, seed, prompt_tokens })));
        if spec.echo {
            let text = prompt.iter().filter_map(|id| char::from_u32(*id)).collect();
            outbox.push_back(message(Event::Prompt(v1::Prompt { token_ids: prompt, text })));
        }
        let mut generation = Self {
            shared: Arc::clone(shared),
            formula,
            limits,
            aboard: Some(aboard),
            index,
            outbox,
            deadline,
            pace: shared.pace.subscribe(),
            begun: Instant::now(),
            clock: None,
        };
        if let Some((index, id)) = (0_u32..).zip(given).last()
            && let Some((reason, matched)) = generation.limits.ended(index + 1, id)
        {
            generation.finish(reason, matched);
        }
        Ok(generation)
    }

    /// Returns its messages.
    pub(super) fn into_stream(self) -> BoxStream<'static, Item> {
        messages(self).boxed()
    }

    async fn next(&mut self) -> Option<Item> {
        if let Some(message) = self.outbox.pop_front() {
            return Some(Ok(message));
        }
        self.aboard.as_ref()?;
        let (deadline, shared) = (self.deadline, Arc::clone(&self.shared));
        let status = tokio::select! {
            biased;
            () = shared.evicted.cancelled() => {
                Reason::Draining.status(format!("worker {} is about to stop", shared.options.id))
            }
            () = passed(deadline) => {
                Status::deadline_exceeded("the deadline of the request has passed")
            }
            () = self.token_is_due() => return Some(Ok(self.token())),
        };
        self.aboard = None;
        Some(Err(status))
    }

    /// Waits for the time of the next token.
    async fn token_is_due(&mut self) {
        if self.clock.is_none() {
            let Some(aboard) = &mut self.aboard else { return };
            let slot = aboard.slot().await;
            self.clock = Some(Clock { slot, last: slot, first_token: None });
        }
        let Some(clock) = &mut self.clock else { return };
        loop {
            let mut step = *self.pace.borrow_and_update();
            if clock.first_token.is_none() {
                step += self.shared.options.prefill(self.limits.prompt_tokens + self.index);
            }
            let due = clock.last + step;
            tokio::select! {
                () = time::sleep_until(due) => {
                    let now = Instant::now();
                    clock.last = if now - due > CATCH_UP { now } else { due };
                    clock.first_token.get_or_insert(now);
                    return;
                }
                // It became slower or faster.
                Ok(()) = self.pace.changed() => {}
            }
        }
    }

    fn token(&mut self) -> GenerateResponse {
        let index = self.index;
        let id = self.formula.id(index);
        self.index += 1;
        if let Some(aboard) = &mut self.aboard {
            aboard.step();
        }
        let ended = self.limits.ended(self.index, id);
        let text = if self.shared.options.stamp {
            micros_now().to_string()
        } else {
            self.formula.text(index, ended.is_some())
        };
        if let Some((reason, matched)) = ended {
            self.finish(reason, matched);
        }
        message(Event::Delta(v1::Delta {
            index,
            token_ids: vec![id],
            text,
            ..v1::Delta::default()
        }))
    }

    fn finish(&mut self, reason: FinishReason, matched: Option<Matched>) {
        let usage = v1::Usage {
            prompt_tokens: self.limits.prompt_tokens,
            completion_tokens: self.index,
            cached_tokens: 0,
        };
        let timings = self.shared.options.has(Omission::Timings).then(|| self.timings());
        let finished = v1::Finished { reason: reason.into(), usage: Some(usage), matched, timings };
        self.outbox.push_back(message(Event::Finished(finished)));
        if let (Some(mut aboard), Some(clock)) = (self.aboard.take(), &self.clock) {
            aboard.plan(clock.last);
        }
    }

    fn timings(&self) -> v1::Timings {
        let seconds = |from: Instant, to: Instant| (to - from).as_secs_f64();
        let now = Instant::now();
        let slot = self.clock.as_ref().map_or(now, |clock| clock.slot);
        let first_token = self.clock.as_ref().and_then(|clock| clock.first_token).unwrap_or(now);
        v1::Timings {
            queue_seconds: seconds(self.begun, slot),
            prefill_seconds: seconds(slot, first_token),
            first_token_seconds: seconds(self.begun, first_token),
            decode_seconds: seconds(first_token, now),
        }
    }
}

fn messages(generation: Generation) -> impl Stream<Item = Item> + Send {
    // Boxed: it moves into a new future for each message.
    futures::stream::unfold(Box::new(generation), |mut generation| async move {
        Some((generation.next().await?, generation))
    })
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn message(event: Event) -> GenerateResponse {
    GenerateResponse { event: Some(event) }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
