//! Policies that look at nothing but the workers.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tercet_cluster::WorkerId;

use super::hash::{GOLDEN, spread};
use super::{Candidate, Offer, Policy};

/// Takes one worker after the other, in the order of their names.
#[derive(Debug, Default)]
pub struct RoundRobin {
    /// The last one: an index would jump as workers come and go.
    last: Mutex<Option<WorkerId>>,
}

impl Policy for RoundRobin {
    fn choose(&self, candidates: &[Candidate<'_>], _offer: &Offer) -> usize {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |index: &usize| candidates[*index].worker;
        let is_after = |index: &usize| last.as_ref().is_some_and(|last| name(index) > last);
        let after = (0..candidates.len()).filter(is_after).min_by_key(name);
        let next = after.or_else(|| (0..candidates.len()).min_by_key(name)).unwrap_or(0);
        *last = candidates.get(next).map(|candidate| candidate.worker.clone());
        next
    }
}

/// Chooses the worker with the fewest outstanding tokens. Equal ones take turns.
#[derive(Debug, Default)]
pub struct LeastOutstanding {
    turn: AtomicUsize,
}

impl Policy for LeastOutstanding {
    fn choose(&self, candidates: &[Candidate<'_>], _offer: &Offer) -> usize {
        let least = candidates.iter().map(Candidate::all_tokens).min();
        let equals = || {
            candidates
                .iter()
                .enumerate()
                .filter(|(_, candidate)| Some(candidate.all_tokens()) == least)
                .map(|(index, _)| index)
        };
        let ties = equals().count().max(1);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % ties;
        equals().nth(turn).unwrap_or(0)
    }
}

/// Draws two workers and chooses the one with fewer outstanding tokens: nearly as even as looking
/// at all, and gateways that know equally little do not all run to the same one.
#[derive(Debug)]
pub struct PowerOfTwo {
    state: AtomicU64,
}

impl PowerOfTwo {
    /// Returns a policy whose draws depend on the seed.
    pub fn new(seed: u64) -> Self {
        Self { state: AtomicU64::new(seed) }
    }

    /// Returns a number below `bound`, which is not 0.
    fn draw(&self, bound: usize) -> usize {
        let state = self.state.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        // The remainder favours low numbers by less than bound / 2^64.
        usize::try_from(spread(state) % bound as u64).unwrap_or(0)
    }
}

impl Policy for PowerOfTwo {
    fn choose(&self, candidates: &[Candidate<'_>], _offer: &Offer) -> usize {
        let count = candidates.len();
        if count < 2 {
            return 0;
        }
        let first = self.draw(count);
        let second = (first + 1 + self.draw(count - 1)) % count;
        let load = |index: usize| (candidates[index].all_tokens(), candidates[index].all_streams());
        if load(second) < load(first) { second } else { first }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::{candidate, names, with_others};

    fn choose(policy: &impl Policy, candidates: &[Candidate<'_>]) -> usize {
        policy.choose(candidates, &Offer::default())
    }

    #[test]
    fn fewest_tokens_win() {
        let policy = LeastOutstanding::default();
        let candidates = [candidate(1, 900), candidate(3, 30), candidate(2, 31)];
        for _ in 0..4 {
            assert_eq!(choose(&policy, &candidates), 1);
        }
        assert_eq!(choose(&policy, &[with_others(1, 100), candidate(1, 90)]), 1);
    }

    #[test]
    fn equals_take_turns() {
        let policy = LeastOutstanding::default();
        let candidates = [candidate(0, 5), candidate(0, 0), candidate(0, 0), candidate(0, 0)];
        let mut chosen: Vec<_> = (0..6).map(|_| choose(&policy, &candidates)).collect();
        chosen.sort_unstable();
        assert_eq!(chosen, [1, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn turns_go_on_where_they_were_as_workers_come_and_go() {
        let names = names(4);
        let named = |worker| Candidate { worker, ..candidate(0, 0) };
        let all: Vec<_> = names.iter().map(named).collect();
        let policy = RoundRobin::default();
        let turns: Vec<_> = (0..6).map(|_| choose(&policy, &all)).collect();
        assert_eq!(turns, [0, 1, 2, 3, 0, 1]);
        assert_eq!(choose(&policy, &[all[0], all[3]]), 1, "2 has gone: 3 is next");
        assert_eq!(choose(&policy, &all), 0);
        assert_eq!(choose(&policy, &[all[3], all[2], all[1]]), 2, "in the order of names");
    }

    #[test]
    fn the_better_of_two_wins_and_everyone_is_drawn() {
        let policy = PowerOfTwo::new(7);
        let load = [candidate(0, 50), candidate(0, 10), candidate(0, 90), candidate(0, 20)];
        let mut counts = [0; 4];
        for _ in 0..6000 {
            counts[choose(&policy, &load)] += 1;
        }
        // Of the 6 pairs, 3 have the least loaded one, 2 more the second, 1 more the third.
        assert_eq!(counts[2], 0, "the fullest is the worse of any pair");
        for (count, share) in [(counts[1], 3000), (counts[3], 2000), (counts[0], 1000)] {
            assert!((share - 200..share + 200).contains(&count), "{counts:?}");
        }
        assert_eq!(choose(&policy, &load[..1]), 0);
        let again = (PowerOfTwo::new(3), PowerOfTwo::new(3));
        let equal = [candidate(0, 0); 5];
        assert!((0..100).all(|_| choose(&again.0, &equal) == choose(&again.1, &equal)));
    }
}
