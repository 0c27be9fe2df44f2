//! Policies that send what belongs together to one worker, as long as that leaves nobody with much
//! more than its share: consistent hashing with bounded loads (<https://arxiv.org/abs/1608.01350>),
//! by rendezvous.

use std::cmp::Reverse;
use std::sync::{Mutex, PoisonError};

use super::hash::{hash, join};
use super::memory::Memory;
use super::{Candidate, LeastOutstanding, Offer, Policy};

/// How far above its share a worker's load may go for affinity's sake.
const EPSILON: f64 = 0.25;

/// Pages whose workers are remembered: some MiB.
const REMEMBERED_PAGES: usize = 1 << 16;

/// Sends the requests of a session to one worker. When a worker comes or goes, only the sessions
/// move that it gets or had. Requests without a session go where the least is outstanding.
#[derive(Debug, Default)]
pub struct SessionAffinity {
    without: LeastOutstanding,
}

impl Policy for SessionAffinity {
    fn choose(&self, candidates: &[Candidate<'_>], offer: &Offer) -> usize {
        match offer.session {
            None => self.without.choose(candidates, offer),
            Some(session) => {
                let bound = Bound::of(candidates);
                best(candidates, &bound, session, |_| 0)
            }
        }
    }
}

/// Sends a request to the worker that has most of its prompt's pages in its cache, as far as is
/// known from where requests went; a new prompt by its first page, so that gateways agree. Prompts
/// shorter than a page go where the least is outstanding.
#[derive(Debug)]
pub struct PrefixAffinity {
    without: LeastOutstanding,
    /// Locked for one choice, which never waits.
    memory: Mutex<Memory>,
}

impl Default for PrefixAffinity {
    fn default() -> Self {
        Self {
            without: LeastOutstanding::default(),
            memory: Mutex::new(Memory::new(REMEMBERED_PAGES)),
        }
    }
}

impl Policy for PrefixAffinity {
    fn needs_pages(&self) -> bool {
        true
    }

    fn choose(&self, candidates: &[Candidate<'_>], offer: &Offer) -> usize {
        let [first, ..] = offer.pages.as_slice() else {
            return self.without.choose(candidates, offer);
        };
        let workers: Vec<u64> = candidates.iter().map(name).collect();
        let bound = Bound::of(candidates);
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        // From the end: the deepest page that anybody suitable holds decides.
        let held = offer.pages.iter().enumerate().rev().find_map(|(depth, page)| {
            let holders = memory.holders(page);
            let is_held = |index: &usize| holders.contains(&Some(workers[*index]));
            let within = |index: &usize| bound.allows(&candidates[*index]);
            let held = (0..candidates.len()).any(|index| is_held(&index) && within(&index));
            held.then_some((depth, holders))
        });
        let holders = held.map_or([None; 2], |(_, holders)| holders);
        let key = hash(first.as_bytes());
        let is_holder = |index: usize| u8::from(holders.contains(&Some(workers[index])));
        let chosen = best(candidates, &bound, key, is_holder);
        for page in &offer.pages {
            memory.put(page, workers[chosen]);
        }
        chosen
    }
}

/// Returns the candidate within the bound that has the highest rank, of equal ones the first in the
/// order that rendezvous hashing gives for `key`.
fn best(
    candidates: &[Candidate<'_>],
    bound: &Bound,
    key: u64,
    rank: impl Fn(usize) -> u8,
) -> usize {
    let order = |index: &usize| {
        let candidate = &candidates[*index];
        Reverse((bound.allows(candidate), rank(*index), join(key, name(candidate))))
    };
    (0..candidates.len()).min_by_key(order).unwrap_or(0)
}

/// Returns what stands for a worker in hashes.
fn name(candidate: &Candidate<'_>) -> u64 {
    hash(candidate.worker.as_str().as_bytes())
}

/// How many streams a worker may have for affinity's sake.
#[derive(Debug)]
struct Bound {
    /// Streams per sequence that a worker computes at once.
    share: f64,
}

#[expect(clippy::cast_precision_loss, reason = "counts of streams are far below 2^53")]
impl Bound {
    fn of(candidates: &[Candidate<'_>]) -> Self {
        // With the one that is about to be placed.
        let streams: usize = 1 + candidates.iter().map(Candidate::all_streams).sum::<usize>();
        let capacity: f64 = candidates.iter().map(|each| each.max_sequences.max(1) as f64).sum();
        Self { share: (1.0 + EPSILON) * streams as f64 / capacity }
    }

    /// Returns whether one more stream leaves the worker within its bound. At least one worker is:
    /// together the bounds are above the streams.
    fn allows(&self, candidate: &Candidate<'_>) -> bool {
        let most = (self.share * candidate.max_sequences.max(1) as f64).ceil();
        candidate.all_streams() as f64 + 1.0 <= most
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tercet_cluster::WorkerId;
    use tercet_text::prefix::PageName;

    use super::*;
    use crate::policy::tests::{candidate, names};

    /// Workers that keep every stream they are sent.
    struct Bed {
        names: Vec<WorkerId>,
        streams: Vec<usize>,
    }

    impl Bed {
        fn new(count: usize) -> Self {
            Self { names: names(count), streams: vec![0; count] }
        }

        /// Returns where an idle cluster of the workers that `is_here` picks sends an offer.
        fn home(
            &self,
            policy: &impl Policy,
            offer: &Offer,
            is_here: impl Fn(usize) -> bool,
        ) -> usize {
            let here: Vec<_> = (0..self.names.len()).filter(|index| is_here(*index)).collect();
            let candidates: Vec<_> = here.iter().map(|index| self.candidate(*index, 0)).collect();
            here[policy.choose(&candidates, offer)]
        }

        fn candidate(&self, index: usize, streams: usize) -> Candidate<'_> {
            let worker = &self.names[index];
            Candidate { worker, max_sequences: 1000, ..candidate(streams, 0) }
        }

        /// Sends an offer and keeps its stream.
        fn send(&mut self, policy: &impl Policy, offer: &Offer) -> usize {
            let all = 0..self.names.len();
            let candidates: Vec<_> =
                all.map(|index| self.candidate(index, self.streams[index])).collect();
            let chosen = policy.choose(&candidates, offer);
            self.streams[chosen] += 1;
            chosen
        }

        /// Panics if a worker has more than the bound allowed when the last stream came.
        fn assert_bounded(&self) {
            let total: usize = self.streams.iter().sum();
            let mean = total as f64 / self.names.len() as f64;
            let most = ((1.0 + EPSILON) * mean).ceil();
            assert!(self.streams.iter().all(|load| *load as f64 <= most), "{:?}", self.streams);
        }
    }

    fn session(key: u64) -> Offer {
        Offer { session: Some(hash(&key.to_le_bytes())), ..Offer::default() }
    }

    fn prompt(conversation: u32, pages: u32) -> Offer {
        let ids: Vec<u32> = (0..pages * 64).map(|at| conversation * 1000 + at / 64).collect();
        let pages = PageName::root(b"model", "").chain(&ids).collect();
        Offer { pages, ..Offer::default() }
    }

    #[test]
    fn a_session_stays_and_moves_only_with_its_worker() {
        let bed = Bed::new(8);
        let policy = SessionAffinity::default();
        let homes: Vec<_> =
            (0..2000).map(|key| bed.home(&policy, &session(key), |index| index < 7)).collect();
        let mut counts = HashMap::new();
        for home in &homes {
            *counts.entry(*home).or_insert(0) += 1;
        }
        assert!(counts.values().all(|count| (200..400).contains(count)), "{counts:?}");
        for (key, home) in (0..2000).zip(&homes) {
            let again = bed.home(&policy, &session(key), |index| index < 7);
            assert_eq!(again, *home);
            let without = bed.home(&policy, &session(key), |index| index < 7 && index != 3);
            assert!(*home == 3 || without == *home, "it moved though its worker stayed");
            assert_ne!(without, 3);
            let with_another = bed.home(&policy, &session(key), |_| true);
            assert!(with_another == *home || with_another == 7, "it moved between old workers");
        }
    }

    #[test]
    fn no_worker_gets_much_more_than_its_share_of_hot_sessions() {
        for count in 1..=9 {
            let mut bed = Bed::new(count);
            let policy = SessionAffinity::default();
            for _ in 0..500 {
                bed.send(&policy, &session(1));
                bed.assert_bounded();
            }
        }
    }

    #[test]
    fn shares_follow_the_capacity() {
        let names = names(2);
        let policy = SessionAffinity::default();
        let mut streams = [0, 0];
        for _ in 0..100 {
            let of = |index: usize, max_sequences| Candidate {
                worker: &names[index],
                max_sequences,
                ..candidate(streams[index], 0)
            };
            streams[policy.choose(&[of(0, 300), of(1, 100)], &session(5))] += 1;
        }
        assert!(streams[1] <= 32, "{streams:?}");
        assert!(streams[0] <= 94, "{streams:?}");
    }

    #[test]
    fn requests_without_a_session_or_a_page_go_to_the_least_loaded() {
        let loaded = [candidate(2, 20), candidate(1, 10), candidate(3, 30)];
        assert_eq!(SessionAffinity::default().choose(&loaded, &Offer::default()), 1);
        assert_eq!(PrefixAffinity::default().choose(&loaded, &Offer::default()), 1);
    }

    #[test]
    fn a_conversation_returns_to_the_worker_that_has_its_pages() {
        let mut bed = Bed::new(6);
        let policy = PrefixAffinity::default();
        let mut homes = Vec::new();
        for conversation in 0..200 {
            homes.push(bed.send(&policy, &prompt(conversation, 3)));
            bed.assert_bounded();
        }
        bed.streams.fill(0);
        for (conversation, home) in (0..200).zip(&homes) {
            let grown = prompt(conversation, 5);
            assert_eq!(bed.home(&policy, &grown, |_| true), *home);
        }
    }

    #[test]
    fn the_deepest_known_page_decides() {
        let bed = Bed::new(2);
        let policy = PrefixAffinity::default();
        let (short, long) = (prompt(1, 1), prompt(1, 4));
        let at = bed.home(&policy, &long, |index| index == 0);
        assert_eq!(at, 0);
        // The first page alone is now known at the other one, and more recently.
        assert_eq!(bed.home(&policy, &short, |index| index == 1), 1);
        assert_eq!(bed.home(&policy, &prompt(1, 4), |_| true), 0);
        // One without its deepest holder: the other one has the first page.
        assert_eq!(bed.home(&policy, &prompt(1, 2), |index| index == 1), 1);
    }

    #[test]
    fn one_hot_prompt_spreads_when_it_must() {
        for count in 1..=9 {
            let mut bed = Bed::new(count);
            let policy = PrefixAffinity::default();
            for _ in 0..300 {
                bed.send(&policy, &prompt(1, 4));
                bed.assert_bounded();
            }
        }
    }
}
