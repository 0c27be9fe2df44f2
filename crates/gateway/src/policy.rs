//! Which of the suitable workers gets a request.

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};

use tercet_cluster::WorkerId;

use crate::fleet::Reported;

/// A worker that could take a request, as the policy sees it. It answers, does not drain, and has
/// not just failed.
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
    /// Called under a lock, so that concurrent requests see each other's choices: it must be quick.
    fn choose(&self, candidates: &[Candidate<'_>]) -> usize;
}

/// Chooses the worker with the fewest outstanding tokens, workers with a free slot first and slow
/// ones last. Equal ones take turns.
#[derive(Debug, Default)]
pub struct LeastOutstanding {
    turn: AtomicUsize,
}

impl Policy for LeastOutstanding {
    fn choose(&self, candidates: &[Candidate<'_>]) -> usize {
        let rank = |candidate: &Candidate<'_>| {
            (candidate.is_full(), candidate.slow, candidate.all_tokens())
        };
        let least = candidates.iter().map(rank).min();
        let equals = || {
            candidates
                .iter()
                .enumerate()
                .filter(|(_, candidate)| Some(rank(candidate)) == least)
                .map(|(index, _)| index)
        };
        let ties = equals().count().max(1);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % ties;
        equals().nth(turn).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    static WORKER: LazyLock<WorkerId> = LazyLock::new(|| "w".parse().unwrap());

    fn candidate(streams: usize, tokens: u64) -> Candidate<'static> {
        let (reported, slow) = (None, false);
        Candidate { worker: &WORKER, streams, tokens, max_sequences: 4, reported, slow }
    }

    fn with_others(streams: usize, tokens: u64) -> Candidate<'static> {
        let reported =
            Reported { other_streams: streams, other_tokens: tokens, ..Reported::default() };
        Candidate { reported: Some(reported), ..candidate(1, 10) }
    }

    #[test]
    fn fewest_tokens_win() {
        let policy = LeastOutstanding::default();
        let candidates = [candidate(1, 900), candidate(3, 30), candidate(2, 31)];
        for _ in 0..4 {
            assert_eq!(policy.choose(&candidates), 1);
        }
    }

    #[test]
    fn a_free_slot_wins_over_few_tokens() {
        let policy = LeastOutstanding::default();
        let candidates = [candidate(4, 10), candidate(3, 10_000)];
        assert_eq!(policy.choose(&candidates), 1);
        let full = [candidate(4, 11), candidate(9, 10)];
        assert_eq!(policy.choose(&full), 1, "all are full: fewest tokens");
    }

    #[test]
    fn equals_take_turns() {
        let policy = LeastOutstanding::default();
        let candidates = [candidate(0, 5), candidate(0, 0), candidate(0, 0), candidate(0, 0)];
        let mut chosen: Vec<_> = (0..6).map(|_| policy.choose(&candidates)).collect();
        chosen.sort_unstable();
        assert_eq!(chosen, [1, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn what_others_have_there_counts() {
        let policy = LeastOutstanding::default();
        assert_eq!(policy.choose(&[with_others(1, 100), candidate(1, 90)]), 1);
        assert_eq!(policy.choose(&[with_others(3, 0), candidate(1, 90)]), 1, "it is full");
    }

    #[test]
    fn slow_ones_come_last_among_those_with_room() {
        let policy = LeastOutstanding::default();
        let slow = Candidate { slow: true, ..candidate(0, 0) };
        assert_eq!(policy.choose(&[slow, candidate(3, 900)]), 1);
        assert_eq!(policy.choose(&[slow, candidate(4, 900)]), 0, "slow is better than none");
    }
}
