//! Which of the suitable workers gets a request.

use std::fmt::{self, Debug};
use std::str::FromStr;

use tercet_cluster::WorkerId;

use crate::Offer;
use crate::fleet::Reported;

mod affinity;
mod balance;
pub(crate) mod hash;
mod memory;

pub use self::{
    affinity::{PrefixAffinity, SessionAffinity},
    balance::{LeastOutstanding, PowerOfTwo, RoundRobin},
};

/// A worker that could take a request, as the policy sees it. It answers, does not drain, has not
/// just failed, and computes at most [`max_sequences`](Self::max_sequences) requests at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate<'a> {
    /// Its name.
    pub worker: &'a WorkerId,
    /// Requests of this gateway in progress there.
    pub streams: usize,
    /// Tokens these will still take at most, where unknown an assumption.
    pub tokens: u64,
    /// Most sequences the worker computes at once; more wait there.
    pub max_sequences: usize,
    /// What it reports; `None` if it has not lately, or is of a version that never does.
    pub reported: Option<Reported>,
    /// Whether it is far slower than its peers.
    pub slow: bool,
}

impl Candidate<'_> {
    /// Returns the requests of all gateways in progress there, as far as is known.
    pub fn all_streams(&self) -> usize {
        self.streams + self.reported.map_or(0, |reported| reported.other_streams)
    }

    /// Returns the tokens these will still take, as far as is known.
    pub fn all_tokens(&self) -> u64 {
        self.tokens.saturating_add(self.reported.map_or(0, |reported| reported.other_tokens))
    }

    /// Returns whether another request would wait there.
    pub fn is_full(&self) -> bool {
        self.all_streams() >= self.max_sequences
    }
}

/// Chooses among workers.
pub trait Policy: Debug + Send + Sync {
    /// Returns the index of the chosen candidate; there is at least one.
    ///
    /// Only those come into question that there is no better kind of: workers with a free slot if
    /// there are any, and of these the ones that are not slow. Called under a lock, so that
    /// concurrent requests see each other's choices: it must be quick.
    fn choose(&self, candidates: &[Candidate<'_>], offer: &Offer) -> usize;

    /// Returns whether the choice depends on the pages of the prompt, which cost time to name.
    fn needs_pages(&self) -> bool {
        false
    }
}

/// The policies that can be configured.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Routing {
    /// [`RoundRobin`].
    RoundRobin,
    /// [`LeastOutstanding`].
    #[default]
    LeastOutstanding,
    /// [`PowerOfTwo`].
    PowerOfTwo,
    /// [`PrefixAffinity`].
    PrefixAffinity,
    /// [`SessionAffinity`].
    SessionAffinity,
}

/// No policy has that name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is no routing policy, expected one of: {names}", names = Routing::names())]
pub struct UnknownRouting(String);

impl Routing {
    /// Every policy.
    pub const ALL: [Self; 5] = [
        Self::RoundRobin,
        Self::LeastOutstanding,
        Self::PowerOfTwo,
        Self::PrefixAffinity,
        Self::SessionAffinity,
    ];

    /// Returns the name in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastOutstanding => "least-outstanding",
            Self::PowerOfTwo => "power-of-two",
            Self::PrefixAffinity => "prefix-affinity",
            Self::SessionAffinity => "session-affinity",
        }
    }

    /// Returns the policy; what it draws depends on `seed`.
    pub fn policy(self, seed: u64) -> Box<dyn Policy> {
        match self {
            Self::RoundRobin => Box::new(RoundRobin::default()),
            Self::LeastOutstanding => Box::new(LeastOutstanding::default()),
            Self::PowerOfTwo => Box::new(PowerOfTwo::new(seed)),
            Self::PrefixAffinity => Box::new(PrefixAffinity::default()),
            Self::SessionAffinity => Box::new(SessionAffinity::default()),
        }
    }

    fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Routing {
    type Err = UnknownRouting;

    fn from_str(name: &str) -> Result<Self, UnknownRouting> {
        let found = Self::ALL.into_iter().find(|routing| routing.as_str() == name);
        found.ok_or_else(|| UnknownRouting(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    static WORKER: LazyLock<WorkerId> = LazyLock::new(|| "w".parse().unwrap());

    pub(super) fn candidate(streams: usize, tokens: u64) -> Candidate<'static> {
        let (reported, slow) = (None, false);
        Candidate { worker: &WORKER, streams, tokens, max_sequences: 4, reported, slow }
    }

    pub(super) fn with_others(streams: usize, tokens: u64) -> Candidate<'static> {
        let reported =
            Reported { other_streams: streams, other_tokens: tokens, ..Reported::default() };
        Candidate { reported: Some(reported), ..candidate(1, 10) }
    }

    pub(super) fn names(count: usize) -> Vec<WorkerId> {
        (0..count).map(|nth| format!("w{nth}").parse().unwrap()).collect()
    }

    #[test]
    fn what_others_have_there_counts() {
        assert!(with_others(3, 0).is_full() && !candidate(1, 90).is_full());
        assert_eq!(with_others(3, 5).all_tokens(), 15);
    }

    #[test]
    fn every_policy_has_a_name() {
        for routing in Routing::ALL {
            assert_eq!(routing.to_string().parse(), Ok(routing));
            assert_eq!(routing.policy(1).choose(&[candidate(1, 1)], &Offer::default()), 0);
        }
        let error = "fastest".parse::<Routing>().unwrap_err().to_string();
        assert!(error.contains("\"fastest\"") && error.contains("power-of-two"), "{error}");
    }
}
