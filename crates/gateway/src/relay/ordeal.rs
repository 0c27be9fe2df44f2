//! Whether a request makes workers crash: counted here, and in the end tried alone.
//!
//! ```text
//! ## Innocent => (Innocent | Suspect)   a crash with it aboard; the second
//! ## Suspect  => (Poison | Innocent)    it runs alone: a crash then is its own; past the place
//!                                       where the others happened it is none of them
//! ```

use std::sync::Arc;

use crate::fleet::{Lease, Link};

/// Crashes after which a request runs alone: one may be anybody's, two are unlikely to be chance.
const CRASHES: u32 = 2;

/// Tokens that a request runs alone beyond the last crash: workers were ahead of what had come from
/// them by a step or a few.
const MARGIN: usize = 16;

/// A stream that broke and may have broken with its worker.
#[derive(Debug)]
pub(super) struct Accident {
    link: Arc<Link>,
    /// Of the link, when the stream began.
    connections: u64,
    alone: bool,
    /// Whether the worker said itself that it broke down.
    told: bool,
}

impl Accident {
    pub(super) fn new(lease: &Lease, told: bool) -> Self {
        let link = Arc::clone(lease.link());
        Self { link, connections: lease.connections(), alone: lease.is_alone(), told }
    }

    /// Returns whether the worker crashed, waiting a moment for what becomes of it.
    pub(super) async fn was_crash(&self) -> bool {
        self.told || self.link.has_crashed(self.connections).await
    }

    pub(super) fn was_alone(&self) -> bool {
        self.alone
    }
}

/// What is known of a request.
#[derive(Debug, Default)]
pub(super) struct Ordeal {
    crashes: u32,
    /// Tokens that had come when the last stream broke, if any did.
    broke_at: usize,
}

impl Ordeal {
    /// A stream broke after so many tokens.
    pub(super) fn broke(&mut self, tokens: usize) {
        self.broke_at = self.broke_at.max(tokens);
    }

    /// Returns whether it matters for what happens next whether so many accidents were crashes.
    pub(super) fn is_open(&self, accidents: usize) -> bool {
        accidents > 0 && u64::from(self.crashes) + accidents as u64 >= u64::from(CRASHES)
    }

    /// A worker crashed with the request aboard. Returns whether that was its own doing.
    pub(super) fn crash(&mut self, alone: bool) -> bool {
        self.crashes = self.crashes.saturating_add(1);
        alone
    }

    pub(super) fn crashes(&self) -> u32 {
        self.crashes
    }

    /// Returns whether it has to run alone.
    pub(super) fn is_suspect(&self) -> bool {
        self.crashes >= CRASHES
    }

    /// Returns how many more tokens it has to run alone when it has so many.
    pub(super) fn alone_tokens(&self, tokens: usize) -> u32 {
        if !self.is_suspect() {
            return 0;
        }
        u32::try_from((self.broke_at + MARGIN).saturating_sub(tokens)).unwrap_or(u32::MAX).max(1)
    }

    /// It ran alone and has so many tokens now. Returns whether that clears it.
    pub(super) fn clear(&mut self, tokens: usize) -> bool {
        let cleared = tokens >= self.broke_at + MARGIN;
        if cleared {
            *self = Self::default();
        }
        cleared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_crash_while_alone_is_poison() {
        let mut ordeal = Ordeal::default();
        assert!(!ordeal.is_open(0) && !ordeal.is_open(1) && ordeal.is_open(2));
        ordeal.broke(40);
        assert!(!ordeal.crash(false));
        assert!(!ordeal.is_suspect() && ordeal.is_open(1));
        assert_eq!(ordeal.alone_tokens(40), 0);
        ordeal.broke(30);
        assert!(!ordeal.crash(false));
        assert!(ordeal.is_suspect());
        assert_eq!(ordeal.alone_tokens(30), 26, "until 16 beyond the fortieth");
        ordeal.broke(31);
        assert!(ordeal.crash(true));
        assert_eq!(ordeal.crashes(), 3);
    }

    #[test]
    fn a_request_that_gets_past_the_place_is_cleared() {
        let mut ordeal = Ordeal::default();
        for _ in 0..2 {
            ordeal.broke(40);
            ordeal.crash(false);
        }
        assert!(!ordeal.clear(55));
        assert!(ordeal.is_suspect());
        assert_eq!(ordeal.alone_tokens(55), 1);
        assert!(ordeal.clear(56));
        assert!(!ordeal.is_suspect() && !ordeal.is_open(1));
    }
}
