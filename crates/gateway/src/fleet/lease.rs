use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::health::Ejection;
use super::link::Traffic;
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
    traffic: Arc<Traffic>,
    /// Connections of the link when the request began.
    connections: u64,
    /// Whether a token has come.
    flowing: bool,
    /// Whether the request has the worker for itself.
    alone: bool,
}

impl Lease {
    pub(super) fn new(link: Arc<Link>, generation: u64, identity: String, want: &Want) -> Self {
        let tokens = want.tokens.max(1);
        link.begin(tokens);
        if want.alone {
            link.set_alone(true);
        }
        Self {
            traffic: link.traffic(&want.model),
            connections: link.connections(),
            link,
            model: want.model.clone(),
            generation,
            identity,
            tokens,
            since: Instant::now(),
            flowing: false,
            alone: want.alone,
        }
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Returns the number of connections over which reports had come when the request began.
    pub(crate) fn connections(&self) -> u64 {
        self.connections
    }

    /// Returns whether the request has the worker for itself.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone
    }

    /// Lets other requests to the worker again.
    pub(crate) fn share(&mut self) {
        if std::mem::take(&mut self.alone) {
            self.link.set_alone(false);
        }
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

    /// Leaves the worker alone for a while, or only the model there if that is what failed. Returns
    /// whether it does.
    pub(super) fn eject(&self, only_model: bool, ejection: Ejection) -> bool {
        let model = only_model.then_some(self.model.as_str());
        self.link.eject(model, self.since, ejection)
    }

    /// Counts tokens that have come, as load no longer.
    pub(crate) fn progress(&mut self, tokens: u64) {
        let done = tokens.min(self.tokens - 1);
        self.tokens -= done;
        self.link.progress(done);
        self.traffic.tokens.fetch_add(tokens, Ordering::Relaxed);
        if !self.flowing {
            self.flowing = true;
            self.traffic.streams.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.flowing {
            self.traffic.streams.fetch_sub(1, Ordering::Relaxed);
        }
        self.share();
        self.link.end(self.tokens);
    }
}
