//! The choice of a worker for a request, and the wait for one.

use std::sync::{Arc, MutexGuard, PoisonError};

use tercet_proto::Reason;
use tokio::time::{self, Instant};
use tonic::Status;

use super::lines::Refusal;
use super::{Fleet, Group, Lease, Member, Routes, Want};
use crate::Candidate;

/// Room that a worker's KV memory must have for what a request generates first.
const FIRST_TOKENS: u64 = 64;

/// The workers that can take a request now: at least one.
#[derive(Debug)]
struct Choice<'a> {
    group: &'a Group,
    members: Vec<&'a Member>,
    /// The members as a policy sees them.
    candidates: Vec<Candidate<'a>>,
}

/// Why there is no choice.
#[derive(Debug, Default)]
struct Blocked {
    /// Whether workers answer that have no room.
    full: bool,
    /// When one that is being left alone can be tried again.
    retry_at: Option<Instant>,
}

/// Until when a request waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a worker that answers.
    pub(crate) worker: Instant,
    /// For room at one.
    pub(crate) room: Instant,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
}

/// No worker could take a request in the time given.
#[derive(Debug)]
pub(crate) enum NoPlace {
    /// None answers.
    NoWorker,
    /// Those that answer have no room.
    Refused(Refusal),
}

impl NoPlace {
    /// Returns what the caller is told.
    pub(crate) fn status(&self, model: &str) -> Status {
        match self {
            Self::NoWorker => Reason::NoWorker.status(format!("no worker can serve {model:?} now")),
            Self::Refused(refusal) => {
                let message = format!("no room for {model:?} now: {refusal}");
                match refusal {
                    Refusal::Full { retry, .. }
                    | Refusal::Long { retry, .. }
                    | Refusal::Waited { retry, .. } => {
                        Reason::Overloaded.status_retry_after(message, *retry)
                    }
                    Refusal::Hopeless { .. } => Status::deadline_exceeded(message),
                }
            }
        }
    }
}

impl From<Refusal> for NoPlace {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Fleet {
    /// Returns a place at a worker, waiting for one in line.
    pub(crate) async fn acquire(&self, want: &Want, patience: Patience) -> Result<Lease, NoPlace> {
        if want.alone || !want.computes {
            // These need no slot of those that the line is about.
            let taken = self.when(want, |choice| self.take(choice, want));
            return time::timeout_at(patience.worker, taken).await.map_err(|_| NoPlace::NoWorker);
        }
        let begun = Instant::now();
        let lease = self.queue(want, patience).await?;
        self.metrics.queue_waited(&want.model, begun.elapsed());
        Ok(lease)
    }

    /// Returns why a new request is refused before any work is done for it, if it is.
    pub(crate) fn refusal(&self, want: &Want, deadline: Option<Instant>) -> Option<NoPlace> {
        self.lines.refusal(want, deadline).map(NoPlace::Refused)
    }

    async fn queue(&self, want: &Want, patience: Patience) -> Result<Lease, NoPlace> {
        let place = {
            // So that others see either the request in line or what it took.
            let _choosing = self.choosing();
            if self.lines.is_first(want)
                && let Ok(lease) = self.look(want)
            {
                return Ok(lease);
            }
            self.lines.enter(want, patience.deadline)?
        };
        loop {
            let mut retry_at = None;
            if self.lines.is_first(want) {
                let _choosing = self.choosing();
                match self.look(want) {
                    Ok(lease) => {
                        place.served();
                        return Ok(lease);
                    }
                    Err(blocked) => retry_at = blocked.retry_at,
                }
            }
            let now = Instant::now();
            let limits = [patience.worker, patience.room];
            let limit = limits.into_iter().filter(|limit| *limit > now).min();
            tokio::select! {
                () = place.called() => {}
                () = until(retry_at) => {}
                () = until(limit.or(Some(now))) => {
                    if let Some(over) = self.over(want, patience) {
                        return Err(over);
                    }
                }
            }
        }
    }

    /// Returns what is to be said of a request that has waited long enough.
    fn over(&self, want: &Want, patience: Patience) -> Option<NoPlace> {
        let now = Instant::now();
        let routes = Arc::clone(&self.routes.borrow());
        let is_full =
            Choice::among(&routes, want, now).map_or_else(|blocked| blocked.full, |_| true);
        if is_full {
            (now >= patience.room).then(|| self.lines.waited(want).into())
        } else {
            (now >= patience.worker).then_some(NoPlace::NoWorker)
        }
    }

    /// Takes a slot for a request that nobody goes before; called with the choice locked.
    fn look(&self, want: &Want) -> Result<Lease, Blocked> {
        let routes = Arc::clone(&self.routes.borrow());
        let choice = Choice::among(&routes, want, Instant::now())?;
        let identity = &choice.group.info.identity;
        if want.identity.is_none() && self.lines.has_begun(&want.model, identity) {
            return Err(Blocked { full: true, retry_at: None });
        }
        Ok(self.take(choice, want))
    }

    /// Returns when a worker could take a request.
    pub(crate) async fn room(&self, want: &Want) {
        self.when(want, |_| ()).await;
    }

    /// Returns what is made of the choice among the workers, once there is one.
    async fn when<T>(&self, want: &Want, make: impl Fn(Choice<'_>) -> T) -> T {
        let (mut routes, mut changes) = (self.watch(), self.lines.changes());
        loop {
            changes.mark_unchanged();
            let latest = Arc::clone(&routes.borrow_and_update());
            let retry_at = {
                // So that the next choice sees what is made of this one.
                let _choosing = self.choosing();
                match Choice::among(&latest, want, Instant::now()) {
                    Ok(choice) => return make(choice),
                    Err(blocked) => blocked.retry_at,
                }
            };
            // Their senders are in `self`.
            tokio::select! {
                _ = routes.changed() => {}
                _ = changes.changed() => {}
                () = until(retry_at) => {}
            }
        }
    }

    fn take(&self, choice: Choice<'_>, want: &Want) -> Lease {
        let Choice { group, members, candidates } = choice;
        let chosen = self.policy.choose(&candidates, &want.offer).min(members.len() - 1);
        let Member { link, generation, .. } = members[chosen];
        Lease::new(Arc::clone(link), *generation, group.info.identity.clone(), want)
    }

    fn choosing(&self) -> MutexGuard<'_, ()> {
        self.choosing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Choice<'a> {
    /// Returns the workers that can take a request now, or why there are none.
    fn among(routes: &'a Routes, want: &Want, now: Instant) -> Result<Self, Blocked> {
        let group = routes.group(want).ok_or_else(Blocked::default)?;
        let mut blocked = Blocked::default();
        let mut members = Vec::with_capacity(group.members.len());
        let mut candidates = Vec::with_capacity(group.members.len());
        for member in &group.members {
            let link = &member.link;
            if link.answer().is_suspect() || link.is_draining(&want.model, member.generation) {
                continue;
            }
            if let Some(until) = link.ejected_until(&want.model, now) {
                let retry_at = blocked.retry_at.map_or(until, |earliest| earliest.min(until));
                blocked.retry_at = Some(retry_at);
                continue;
            }
            let (streams, tokens) = link.load();
            let candidate = Candidate {
                worker: link.worker(),
                streams,
                tokens,
                max_sequences: member.max_sequences,
                reported: link.reported(&want.model, now),
                slow: link.is_slow(&want.model, now),
            };
            let is_taken = link.is_alone() || (want.alone && streams > 0);
            if is_taken || (want.computes && !has_room(&candidate, member, want)) {
                blocked.full = true;
                continue;
            }
            candidates.push(candidate);
            members.push(member);
        }
        if members.is_empty() {
            return Err(blocked);
        }
        let mut choice = Self { group, members, candidates };
        choice.avoid_slow();
        Ok(choice)
    }

    /// Leaves out the slow ones, unless all are.
    fn avoid_slow(&mut self) {
        if self.candidates.iter().any(|candidate| !candidate.slow) {
            let mut slow = self.candidates.iter().map(|candidate| candidate.slow);
            self.members.retain(|_| !slow.next().unwrap_or(true));
            self.candidates.retain(|candidate| !candidate.slow);
        }
    }
}

/// Returns whether a worker would begin with a request at once, as far as is known.
fn has_room(candidate: &Candidate<'_>, member: &Member, want: &Want) -> bool {
    if candidate.is_full() {
        return false;
    }
    // One that has nothing else tells by itself if a request is too large for it.
    let is_idle = candidate.all_streams() == 0;
    let needed = want.offer.prompt_tokens.saturating_add(FIRST_TOKENS);
    let fits = candidate.reported.is_none_or(|reported| reported.free_kv_tokens >= needed);
    is_idle || fits || member.kv_tokens == 0
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
