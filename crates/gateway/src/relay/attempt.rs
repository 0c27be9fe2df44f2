//! A stream at one worker: opening it, and opening another before it is given up.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use tercet_proto::{GenerateSpec, ResumeSpec, v1};
use tokio::time::Instant;
use tonic::{Request, Status, Streaming};
use tracing::{Instrument, Span};

use super::seldom::Seldom;
use super::trouble::{Trouble, answers_again, trouble};
use super::{State, call, is_movable};
use crate::fleet::{Lease, NoPlace, Patience, Want};
use crate::span;

/// A stream at one worker.
pub(super) struct Attempt {
    pub(super) stream: Streaming<Bytes>,
    pub(super) lease: Lease,
    pub(super) span: Span,
    /// Messages that have come.
    pub(super) heard: Arc<AtomicU64>,
    /// Resolves when the stream should leave the worker.
    pub(super) trouble: Seldom<Trouble>,
}

/// Why there is no stream at a worker.
pub(super) enum Failure {
    /// None could take it in time.
    NoPlace(NoPlace),
    /// One did not.
    Refused { lease: Lease, span: Span, why: Break },
}

/// How a stream, or the attempt to open one, ended at a worker.
pub(super) enum Break {
    /// The worker or the transport said so.
    Status(Status),
    /// The stream gave it up.
    Trouble(Trouble),
}

/// What became of a stream whose worker does not answer.
pub(super) enum Relocation {
    /// The worker spoke after all.
    Heard(Result<Option<Bytes>, Status>),
    /// The stream is at another worker, or the worker answers again.
    Settled,
}

impl State {
    /// Waits for a worker and opens a stream there.
    pub(super) async fn attempt(&self, patience: Patience) -> Result<Attempt, Failure> {
        let acquired = self.shared.fleet.acquire(&self.want, patience).await;
        let lease = acquired.map_err(Failure::NoPlace)?;
        let spec = self.spec_to_send();
        let span =
            span::generation(&self.span, self.operation, &self.want.model, &spec, lease.link());
        if let Some(previous) = &self.previous {
            span.follows_from(previous);
        }
        let heard = Arc::new(AtomicU64::new(0));
        let mut trouble = self.trouble(&lease, &heard);
        let opened = tokio::select! {
            biased;
            opened = self.open(&lease, &span, spec) => opened.map_err(Break::Status),
            trouble = &mut trouble => Err(Break::Trouble(trouble)),
        };
        match opened {
            Ok(stream) => Ok(Attempt { stream, lease, span, heard, trouble }),
            Err(why) => Err(Failure::Refused { lease, span, why }),
        }
    }

    /// Returns how long a stream may wait for another worker.
    pub(super) fn new_patience(&self) -> Patience {
        let (now, config) = (Instant::now(), &self.shared.config);
        let (worker, room) = (now + config.worker_wait, now + config.max_queue_wait);
        Patience { worker, room, deadline: self.deadline }
    }

    /// Returns what tells that a stream should leave its worker.
    fn trouble(&self, lease: &Lease, heard: &Arc<AtomicU64>) -> Seldom<Trouble> {
        let identity = Some(lease.identity().to_owned());
        let want = Want { identity, ..self.want.clone() };
        let (shared, link) = (Arc::clone(&self.shared), Arc::clone(lease.link()));
        Seldom::new(trouble(shared, link, want, Arc::clone(heard)))
    }

    pub(super) fn enter(&mut self, attempt: Attempt) {
        self.want.admitted = true;
        self.cursor.begin_attempt();
        self.attempt = Some(attempt);
    }

    /// Opens a stream at another worker while the present one does not answer, and only then gives
    /// that one up: where the others have no room, waiting for it is the best there is.
    pub(super) async fn relocate(&mut self) -> Result<Relocation, Status> {
        let Some(mut attempt) = self.attempt.take() else { return Ok(Relocation::Settled) };
        let mut given_up = false;
        loop {
            let elsewhere = async {
                if given_up {
                    return std::future::pending().await;
                }
                self.attempt(self.new_patience()).await
            };
            let outcome = tokio::select! {
                biased;
                message = attempt.stream.message() => Some(Relocation::Heard(message)),
                () = answers_again(attempt.lease.link()) => Some(Relocation::Settled),
                other = elsewhere => match other {
                    Ok(other) => {
                        let Attempt { lease, span, .. } = attempt;
                        self.part(&lease, span, Break::Trouble(Trouble::Silent), true)?;
                        self.enter(other);
                        return Ok(Relocation::Settled);
                    }
                    Err(Failure::NoPlace(_)) => None,
                    Err(Failure::Refused { lease, span, why }) => {
                        // What another has against the request is no reason to end it here.
                        given_up = matches!(&why, Break::Status(status) if !is_movable(status));
                        if !given_up {
                            self.part(&lease, span, why, false)?;
                        }
                        None
                    }
                },
            };
            if let Some(outcome) = outcome {
                attempt.trouble = self.trouble(&attempt.lease, &attempt.heard);
                self.attempt = Some(attempt);
                return Ok(outcome);
            }
        }
    }

    /// Returns the request as the next worker must see it.
    fn spec_to_send(&self) -> GenerateSpec {
        let mut spec = self.spec.clone();
        let ids = self.cursor.ids();
        if !ids.is_empty() {
            let resume = ResumeSpec { seed: self.cursor.seed(), token_ids: ids.to_vec() };
            spec.resume = Some(resume);
        }
        spec.alone_tokens = self.ordeal.alone_tokens(ids.len());
        spec
    }

    async fn open(
        &self,
        lease: &Lease,
        span: &Span,
        spec: GenerateSpec,
    ) -> Result<Streaming<Bytes>, Status> {
        let mut request = Request::new(v1::GenerateRequest::from(spec));
        tercet_telemetry::inject(span, request.metadata_mut());
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        call::generate(lease.link().channel(), request).instrument(span.clone()).await
    }
}
