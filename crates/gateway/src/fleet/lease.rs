use std::sync::Arc;

use tokio::time::Instant;

use super::Link;

/// One request's place at a worker. Counts as load until dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    link: Arc<Link>,
    identity: String,
    /// Tokens of this request still counted as load. Never below 1, so that a request that took
    /// more than it said still counts.
    tokens: u64,
    since: Instant,
}

impl Lease {
    pub(super) fn new(link: Arc<Link>, identity: String, tokens: u64) -> Self {
        let tokens = tokens.max(1);
        link.begin(tokens);
        Self { link, identity, tokens, since: Instant::now() }
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Returns the identity of the model there.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// Returns when the place was taken.
    pub(super) fn since(&self) -> Instant {
        self.since
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
