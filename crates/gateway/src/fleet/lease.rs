use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Link, Want};

/// One request's place at a worker. Counts as load until dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    link: Arc<Link>,
    model: String,
    /// Of the model at the worker.
    generation: u64,
    identity: String,
    /// Tokens of this request still counted as load. Never below 1, so that a request that took
    /// more than it said still counts.
    tokens: u64,
    since: Instant,
}

impl Lease {
    pub(super) fn new(link: Arc<Link>, generation: u64, identity: String, want: &Want) -> Self {
        let tokens = want.tokens.max(1);
        link.begin(tokens);
        let model = want.model.clone();
        Self { link, model, generation, identity, tokens, since: Instant::now() }
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Returns the identity of the model there.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// Takes no more requests for the model to the worker.
    pub(crate) fn set_draining(&self) {
        self.link.set_draining(&self.model, self.generation);
    }

    /// Takes no requests for the model to the worker until then, without holding it against it.
    pub(crate) fn back_off(&self, until: Instant) {
        self.link.back_off(&self.model, until);
    }

    /// Forgets past failures: the worker answers.
    pub(crate) fn set_alive(&self) {
        self.link.set_alive(&self.model);
    }

    /// Leaves the worker alone for a while, or only the model there if that is what failed.
    pub(super) fn eject(&self, only_model: bool, first: Duration, longest: Duration) {
        let model = only_model.then_some(self.model.as_str());
        self.link.eject(model, self.since, first, longest);
    }

    /// Counts tokens that have come as load no longer.
    pub(crate) fn progress(&mut self, tokens: u64) {
        let done = tokens.min(self.tokens - 1);
        self.tokens -= done;
        self.link.progress(done);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.link.end(self.tokens);
    }
}
