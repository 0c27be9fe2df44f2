//! Which of the suitable workers gets a request.

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A worker that could take a request, as the policy sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Requests of this gateway in progress there.
    pub streams: usize,
    /// Tokens these will still take at most, where unknown an assumption.
    pub tokens: u64,
    /// Most sequences the worker computes at once; more wait there.
    pub max_sequences: usize,
}

impl Candidate {
    fn is_full(&self) -> bool {
        self.streams >= self.max_sequences
    }
}

/// Chooses among workers.
pub trait Policy: Debug + Send + Sync {
    /// Returns the index of the chosen candidate; there is at least one.
    ///
    /// Called under a lock, so that concurrent requests see each other's choices: it must be quick.
    fn choose(&self, candidates: &[Candidate]) -> usize;
}

/// Chooses the worker with the fewest outstanding tokens, workers with a free slot first. Equal
/// ones take turns.
#[derive(Debug, Default)]
pub struct LeastOutstanding {
    turn: AtomicUsize,
}

impl Policy for LeastOutstanding {
    fn choose(&self, candidates: &[Candidate]) -> usize {
        let rank = |candidate: &Candidate| (candidate.is_full(), candidate.tokens);
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
    use super::*;

    fn candidate(streams: usize, tokens: u64) -> Candidate {
        Candidate { streams, tokens, max_sequences: 4 }
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
}
