//! One client's generation, over as many workers as it takes.
//!
//! ```text
//! ## Seeking  => (Relaying | Ended)    a worker was found; none in time, or the request is refused
//! ## Relaying => (Relaying | Seeking | Ended)   a message; a break; the last message or an error
//! ```
//!
//! The client sees one stream: one `started`, every index once, one `finished`. What a move needs
//! is the request, the seed, and the ids so far; text is forwarded and never kept.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use tercet_proto::{GenerateSpec, Input, Reason, raw, v1};
use tercet_telemetry::{Component, MoveCause, Operation, RequestRecorder};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tonic::{Code, Status};
use tracing::Span;

use crate::fleet::{Fleet, Lease, NoPlace, Patience, Want};
use crate::service::Shared;
use crate::span;

mod attempt;
mod call;
mod cursor;
mod ordeal;
mod seldom;
mod trouble;

use self::attempt::{Attempt, Break, Failure, Relocation};
use self::cursor::{Cursor, Step};
use self::ordeal::{Accident, Ordeal};
use self::seldom::Seldom;
use self::trouble::Trouble;

/// How long a worker without room is left alone when it does not say so itself.
const DEFAULT_BACK_OFF: Duration = Duration::from_millis(200);

/// What the client gets: encoded messages.
pub(crate) type Messages = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// What a relay starts with.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) shared: Arc<Shared>,
    pub(crate) spec: GenerateSpec,
    /// What it needs of a worker.
    pub(crate) want: Want,
    /// Key of the draws.
    pub(crate) seed: u64,
    /// How long it may wait for its first worker.
    pub(crate) patience: Patience,
    /// The call's span.
    pub(crate) span: Span,
    /// The call's place among the streams of this gateway.
    pub(crate) permit: OwnedSemaphorePermit,
}

/// A generation in progress. Dropping it cancels the computation.
struct Relay {
    state: State,
    /// Resolves when the stream must end, whatever the worker does.
    ending: Seldom<Status>,
}

struct State {
    shared: Arc<Shared>,
    /// The request, with the seed filled in and without what it resumes: that is in the cursor.
    spec: GenerateSpec,
    operation: Operation,
    want: Want,
    /// Where the client's stream is.
    cursor: Cursor,
    attempt: Option<Attempt>,
    /// Breaks survived.
    moves: u32,
    /// Breaks of which it is still open whether they were crashes.
    accidents: Vec<Accident>,
    ordeal: Ordeal,
    deadline: Option<Instant>,
    /// How long a worker may be waited for; `None` while one answers.
    patience: Option<Patience>,
    /// What the last worker said that did not take the request.
    refusal: Option<Status>,
    /// `None` once the stream has ended.
    recorder: Option<RequestRecorder>,
    span: Span,
    /// The span of the last attempt, for the next one to point at.
    previous: Option<Span>,
    _permit: OwnedSemaphorePermit,
}

/// Returns the stream that the client sees.
pub(crate) fn relay(start: Start) -> Messages {
    // Boxed: the relay moves into a new future for each message.
    Box::pin(futures::stream::unfold(Box::new(Relay::new(start)), |mut relay| async move {
        let item = relay.next().await?;
        Some((item, relay))
    }))
}

impl Relay {
    fn new(start: Start) -> Self {
        let Start { shared, mut spec, want, seed, patience, span, permit } = start;
        let deadline = patience.deadline;
        let operation = match spec.input {
            Input::Prompt(_) | Input::Tokens(_) => Operation::TextCompletion,
            Input::Chat(_) => Operation::Chat,
        };
        span.record("gen_ai.operation.name", operation.as_str());
        span.record("gen_ai.request.model", want.model.as_str());
        spec.model = Some(want.model.clone());
        spec.sampling.seed = Some(seed);
        let given = spec.resume.take().map(|resume| resume.token_ids).unwrap_or_default();
        let ending = Seldom::new(ending(shared.stop.clone(), deadline));
        let recorder = shared.metrics.request(Component::Gateway, operation, &want.model);
        Self {
            state: State {
                shared,
                spec,
                operation,
                want,
                cursor: Cursor::new(seed, given),
                attempt: None,
                moves: 0,
                accidents: Vec::new(),
                ordeal: Ordeal::default(),
                deadline,
                patience: Some(patience),
                refusal: None,
                recorder: Some(recorder),
                span,
                previous: None,
                _permit: permit,
            },
            ending,
        }
    }

    /// Returns the next message for the client; `None` after the last.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        self.state.recorder.as_ref()?;
        // A message that is there goes out, even if it comes with the deadline.
        let outcome = tokio::select! {
            biased;
            outcome = self.state.next() => outcome,
            status = &mut self.ending => Err(status),
        };
        if let Err(status) = &outcome {
            self.state.fail(status);
        }
        Some(outcome)
    }
}

impl State {
    async fn next(&mut self) -> Result<Bytes, Status> {
        loop {
            let Some(attempt) = &mut self.attempt else {
                self.seek().await?;
                continue;
            };
            let message = tokio::select! {
                biased;
                message = attempt.stream.message() => message,
                trouble = &mut attempt.trouble => match trouble {
                    Trouble::Silent => match self.relocate().await? {
                        Relocation::Heard(message) => message,
                        Relocation::Settled => continue,
                    },
                    Trouble::Stalled => {
                        self.leave(Break::Trouble(trouble))?;
                        continue;
                    }
                },
            };
            let status = match message {
                Ok(Some(message)) => match self.accept(message) {
                    Step::Forward(message) => return Ok(message),
                    Step::Skip => continue,
                    Step::Broken(why) => Reason::StreamBroken.status(why),
                    Step::Mismatch(why) => Reason::ModelMismatch.status(why),
                },
                Ok(None) => Reason::StreamBroken.status("stream ended before it was finished"),
                Err(status) => status,
            };
            self.leave(Break::Status(status))?;
        }
    }

    /// Takes a message of the current attempt.
    fn accept(&mut self, message: Bytes) -> Step<Bytes> {
        let Some(attempt) = &mut self.attempt else { return Step::Skip };
        if attempt.heard.fetch_add(1, Ordering::Relaxed) == 0 {
            attempt.lease.set_alive();
            self.patience = None;
            self.refusal = None;
        }
        attempt.lease.link().stir();
        if let Some(tokens) = self.cursor.pass(&message) {
            self.progress(tokens);
            return Step::Forward(message);
        }
        match raw::decode(&message) {
            Ok(response) => self.accept_decoded(response),
            Err(error) => Step::Broken(format!("a message cannot be decoded: {error}")),
        }
    }

    /// Takes a message that has to be looked at in full.
    fn accept_decoded(&mut self, response: v1::GenerateResponse) -> Step<Bytes> {
        let before = self.cursor.len();
        let response = match self.cursor.accept(response) {
            Step::Forward(response) => response,
            Step::Skip => return Step::Skip,
            Step::Broken(why) => return Step::Broken(why),
            Step::Mismatch(why) => return Step::Mismatch(why),
        };
        match &response.event {
            Some(v1::generate_response::Event::Started(started)) => self.started(started),
            Some(v1::generate_response::Event::Delta(_)) => {
                self.progress(self.cursor.len() - before);
            }
            Some(v1::generate_response::Event::Finished(finished)) => self.finished(finished),
            Some(v1::generate_response::Event::Prompt(_)) | None => {}
        }
        Step::Forward(raw::encode(&response))
    }

    fn started(&mut self, started: &v1::Started) {
        let (Some(attempt), Some(recorder)) = (&self.attempt, &self.recorder) else { return };
        recorder.prompt(started.prompt_tokens);
        attempt.span.record("gen_ai.response.model", started.model.as_str());
        self.want.identity = Some(attempt.lease.identity().to_owned());
    }

    /// The client gets so many more tokens.
    fn progress(&mut self, tokens: usize) {
        let (Some(attempt), Some(recorder)) = (&mut self.attempt, &mut self.recorder) else {
            return;
        };
        recorder.completion(tokens);
        attempt.lease.progress(u64::try_from(tokens).unwrap_or(u64::MAX));
        if attempt.lease.is_alone() && self.ordeal.clear(self.cursor.len()) {
            self.want.alone = false;
            attempt.lease.share();
        }
    }

    /// ## Relaying => Ended
    fn finished(&mut self, finished: &v1::Finished) {
        let Some(attempt) = self.attempt.take() else { return };
        span::record_finished(&attempt.span, finished);
        span::record_finished(&self.span, finished);
        if let Some(recorder) = self.recorder.take() {
            recorder.succeed();
        }
    }

    /// Finds a worker and opens a stream there. ## Seeking => (Relaying | Ended)
    async fn seek(&mut self) -> Result<(), Status> {
        loop {
            self.reckon().await?;
            let patience = match self.patience {
                Some(patience) => patience,
                None => *self.patience.insert(self.new_patience()),
            };
            match self.attempt(patience).await {
                Ok(attempt) => {
                    self.enter(attempt);
                    return Ok(());
                }
                Err(Failure::NoPlace(no_place)) => return Err(self.no_place(&no_place)),
                Err(Failure::Refused { lease, span, why }) => {
                    self.want.admitted = true;
                    self.part(&lease, span, why, false)?;
                }
            }
        }
    }

    /// Leaves the present worker. ## Relaying => (Seeking | Ended)
    fn leave(&mut self, why: Break) -> Result<(), Status> {
        match self.attempt.take() {
            Some(Attempt { lease, span, .. }) => self.part(&lease, span, why, true),
            None => Ok(()),
        }
    }

    /// Leaves a worker; `aboard` tells whether it had taken the request. Fails if the client's
    /// stream ends too.
    fn part(&mut self, lease: &Lease, span: Span, why: Break, aboard: bool) -> Result<(), Status> {
        let (status, cause) = match why {
            Break::Status(status) => {
                let cause = cause(&status);
                (status, cause)
            }
            Break::Trouble(Trouble::Silent) => {
                (Reason::StreamBroken.status("it does not answer"), MoveCause::Silent)
            }
            Break::Trouble(Trouble::Stalled) => {
                (Reason::StreamBroken.status("it computes nothing"), MoveCause::Stalled)
            }
        };
        span::record_received(&span, &status);
        self.previous = Some(span);
        // The client's own timer looks like a broken transport: the worker is not to blame.
        if self.is_expired() {
            return Err(deadline_exceeded());
        }
        if !is_movable(&status) {
            return Err(relayed(&status));
        }

        blame(&self.shared.fleet, lease, cause, &status);
        // A call that was under way may have been taken, and a silent worker may have crashed with
        // its host, whatever is known of it now.
        if matches!(cause, MoveCause::Broken | MoveCause::Silent)
            || (aboard && cause == MoveCause::Failed)
        {
            self.ordeal.broke(self.cursor.len());
            self.accidents.push(Accident::new(lease, cause == MoveCause::Failed));
        }
        // A worker that did not take the request costs time, which is bounded, and no more.
        let refused =
            matches!(cause, MoveCause::Unreachable | MoveCause::Overloaded | MoveCause::Loading);
        if !refused {
            self.moves += 1;
            let max_moves = self.shared.config.max_moves;
            if self.moves > max_moves {
                let message =
                    format!("gave up after {max_moves} moves, the last worker: {}", said(&status));
                return Err(Reason::of(&status).unwrap_or(Reason::StreamBroken).status(message));
            }
        }
        self.shared.metrics.stream_moved(cause);
        tracing::info!(
            parent: &self.span,
            cause = cause.as_str(),
            worker = lease.link().worker().as_str(),
            index = self.cursor.len(),
            status = said(&status),
            "migrate"
        );
        self.refusal = Some(status);
        Ok(())
    }

    /// Finds out how many workers crashed with the request aboard, once that matters, and has it
    /// run alone after two. Fails if it crashed one while it was alone there.
    async fn reckon(&mut self) -> Result<(), Status> {
        if !self.ordeal.is_open(self.accidents.len()) {
            return Ok(());
        }
        for accident in std::mem::take(&mut self.accidents) {
            if accident.was_crash().await && self.ordeal.crash(accident.was_alone()) {
                self.shared.metrics.poisoned();
                let crashes = self.ordeal.crashes();
                return Err(Reason::Poison.status(format!(
                    "{crashes} workers crashed while they computed this request, the last while \
                     it computed nothing else"
                )));
            }
        }
        if self.ordeal.is_suspect() && !std::mem::replace(&mut self.want.alone, true) {
            self.shared.metrics.lone_run();
            tracing::warn!(
                parent: &self.span,
                crashes = self.ordeal.crashes(),
                index = self.cursor.len(),
                "isolate"
            );
        }
        if self.want.alone {
            let worker = Instant::now() + self.shared.config.alone_wait;
            self.patience = Some(Patience { worker, room: worker, deadline: self.deadline });
        }
        Ok(())
    }

    fn no_place(&mut self, no_place: &NoPlace) -> Status {
        if self.is_expired() {
            return deadline_exceeded();
        }
        let model = &self.want.model;
        match self.refusal.take() {
            Some(status) if Reason::of(&status) == Some(Reason::Overloaded) => relayed(&status),
            Some(status) => Reason::NoWorker
                .status(format!("no worker can serve {model:?} now, the last: {}", said(&status))),
            None => no_place.status(model),
        }
    }

    fn is_expired(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// ## (Seeking | Relaying) => Ended
    fn fail(&mut self, status: &Status) {
        self.attempt = None;
        span::record_answered(&self.span, status);
        self.shared.count_rejection(status);
        if let Some(recorder) = self.recorder.take() {
            recorder.fail(tercet_proto::convention::error_type(status));
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.recorder.is_some() {
            span::record_answered(&self.span, &Status::cancelled("client went away"));
        }
    }
}

/// Resolves when the client's deadline passes or the gateway must stop.
async fn ending(stop: tokio_util::sync::CancellationToken, deadline: Option<Instant>) -> Status {
    let expired = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = expired => deadline_exceeded(),
        () = stop.cancelled() => Reason::Draining.status("this gateway stops, resume at another"),
    }
}

pub(crate) fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("the answer was not finished within the deadline of the call")
}

/// Keeps new requests away from a worker that ended one with a movable `status`.
pub(crate) fn blame(fleet: &Fleet, lease: &Lease, cause: MoveCause, status: &Status) {
    match cause {
        // The registry will say so too, later.
        MoveCause::Draining => lease.set_draining(),
        MoveCause::Overloaded | MoveCause::Loading => {
            let delay = tercet_proto::retry_after(status).unwrap_or(DEFAULT_BACK_OFF);
            lease.back_off(Instant::now() + delay);
        }
        MoveCause::Unreachable | MoveCause::Broken => fleet.eject(lease, false),
        // Its link knows already, and when that is over.
        MoveCause::Silent => {}
        // Its other models may be well.
        MoveCause::Pipeline | MoveCause::Failed | MoveCause::Stalled => fleet.eject(lease, true),
    }
}

/// Returns whether a request that a worker ended so may succeed at another.
pub(crate) fn is_movable(status: &Status) -> bool {
    // The registry said that the worker has the model: it has been unloaded since.
    tercet_proto::is_movable(status) || Reason::of(status) == Some(Reason::ModelUnknown)
}

/// Returns why a request that ended so goes on at another worker.
pub(crate) fn cause(status: &Status) -> MoveCause {
    match Reason::of(status) {
        Some(Reason::Draining | Reason::ModelUnknown) => MoveCause::Draining,
        Some(Reason::Loading) => MoveCause::Loading,
        Some(Reason::Overloaded) => MoveCause::Overloaded,
        Some(Reason::PipelineBroken) => MoveCause::Pipeline,
        Some(Reason::WorkerFailed) => MoveCause::Failed,
        _ if tercet_proto::is_unreachable(status) => MoveCause::Unreachable,
        _ => MoveCause::Broken,
    }
}

/// Returns a worker's status as it is passed on: without its metadata.
pub(crate) fn relayed(status: &Status) -> Status {
    Status::with_details(status.code(), status.message(), status.details().to_vec().into())
}

fn said(status: &Status) -> &str {
    match (status.message(), status.code()) {
        ("", Code::Unavailable) => "unavailable",
        ("", _) => "no reason given",
        (message, _) => message,
    }
}
