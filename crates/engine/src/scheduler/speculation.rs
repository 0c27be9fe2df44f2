//! How many drafts a step verifies: as many as make tokens come faster.
//!
//! ```text
//! tokens of a sequence with k drafts, each right with probability p:  1 + p + .. + p^k
//! drafts are added while the tokens of the step per second grow
//! ```
//!
//! What a step of n rows takes is learnt from the steps, and `p`, for each sequence, from its
//! drafts. Where drafts do not pay, a sequence is left alone for longer and longer before it is
//! tried again, so that hopeless ones cost next to nothing. Times are passed in: here is no clock.

use std::time::Duration;

use crate::drafter::Drafter;

/// Most rows of a step that has drafts: beyond, its time grows with its rows.
pub(super) const MOST_ROWS: usize = 8;
/// Steps without drafts that are seen before the first with some.
const PLAIN_FIRST: u32 = 2;
/// What each row more than one is taken to add to the time of a step before it is known.
const GUESSED_ROW: f64 = 0.12;
/// Weight of an observation of the time of a step.
const NEW_BASE: f64 = 0.2;
/// Least weight of an observation of what more rows take; the first ones count for more.
const NEW_FACTOR: f64 = 0.1;
/// How fast what more rows take is forgotten while it is not seen.
const FORGET: f64 = 1e-3;
/// How far a step may be from what was expected, as a factor: one that was held up says nothing.
const OUTLIER: f64 = 4.0;
/// Weight of a sequence's older drafts, at each new one.
const MEMORY: f64 = 0.95;
/// Weight of older drafts of all sequences.
const LONG_MEMORY: f64 = 0.99;
/// Drafts that the experience with other sequences counts for.
const PRIOR: f64 = 1.0;
/// Steps that a sequence is left alone for, the first time and at most.
const REST: u32 = 8;
const LONGEST_REST: u32 = 128;

/// What a scheduler knows of drafts.
#[derive(Debug)]
pub(super) struct Speculation {
    pub(super) drafter: Box<dyn Drafter>,
    /// Most drafts of a sequence in a step.
    pub(super) tokens: usize,
    costs: Costs,
    all: Rate,
}

/// What steps take, by their rows.
#[derive(Debug)]
struct Costs {
    /// Seconds of a step of one row.
    base: f64,
    /// Plain steps seen.
    plain: u32,
    /// How many times as long a step of so many rows takes, and how often that was seen.
    factors: [(f64, u32); MOST_ROWS + 1],
}

/// How often drafts are right.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    accepted: f64,
    tried: f64,
}

/// How the drafts of a sequence fare.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Drafts {
    rate: Rate,
    /// Steps that it is still left alone for.
    rest: u32,
    /// How often it was left alone since a draft was right.
    rests: u32,
    /// The next draft is made whether it pays or not.
    trial: bool,
}

/// What a sequence of a step could have.
#[derive(Debug)]
pub(super) struct Chance {
    /// Most drafts.
    pub(super) most: usize,
    /// Probability that a draft is right.
    pub(super) right: f64,
}

impl Speculation {
    pub(super) fn new(drafter: Box<dyn Drafter>, tokens: usize) -> Self {
        Self { drafter, tokens, costs: Costs::new(), all: Rate::default() }
    }

    /// Learns what a step of these rows, all of them decoding or drafts, took.
    pub(super) fn observe(&mut self, rows: usize, drafts: usize, elapsed: Duration) {
        self.costs.observe(rows, drafts, elapsed.as_secs_f64());
    }

    /// Learns that `accepted` of `drafted` drafts of a sequence were right.
    pub(super) fn verified(&mut self, drafts: &mut Drafts, drafted: usize, accepted: usize) {
        drafts.rate.observe(MEMORY, drafted, accepted);
        self.all.observe(LONG_MEMORY, drafted, accepted);
        drafts.trial = false;
        if accepted > 0 {
            drafts.rests = 0;
        }
    }

    /// Returns what `drafts` of a sequence stand for, of which up to `most` have room in a step.
    pub(super) fn chance(&self, drafts: &mut Drafts, most: usize) -> Chance {
        let resting = drafts.rest > 0;
        drafts.rest = drafts.rest.saturating_sub(1);
        drafts.trial |= resting && drafts.rest == 0;
        let most = if resting { 0 } else { most.min(self.tokens) };
        Chance { most, right: drafts.rate.estimate(self.all.estimate(0.5)) }
    }

    /// Returns how many drafts each sequence of a step gets.
    pub(super) fn share(&self, chances: &[Chance]) -> Vec<usize> {
        let rows = chances.len();
        let mut shares = vec![0; rows];
        if self.costs.plain < PLAIN_FIRST {
            return shares;
        }
        let mut best = (self.costs.gain(rows, count(rows)), shares.clone());
        let mut tokens = count(rows);
        for rows in rows + 1..=MOST_ROWS {
            let open = chances.iter().zip(&shares).enumerate();
            let next = open
                .filter(|(_, (chance, share))| **share < chance.most)
                .map(|(index, (chance, share))| (index, chance.right.powi(exponent(*share))))
                .max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
            let Some((index, gained)) = next else { break };
            shares[index] += 1;
            tokens += gained;
            let gain = self.costs.gain(rows, tokens);
            if gain > best.0 {
                best = (gain, shares.clone());
            }
        }
        best.1
    }
}

impl Drafts {
    /// Returns how many drafts the sequence gets in the end, where `share` would pay: one to see
    /// whether it is still hopeless, or none for a while.
    pub(super) fn settle(&mut self, chance: &Chance, share: usize) -> usize {
        if chance.most == 0 || share > 0 {
            return share;
        }
        if self.trial {
            return 1;
        }
        self.rest = (REST << self.rests.min(16)).min(LONGEST_REST);
        self.rests += 1;
        0
    }
}

impl Costs {
    fn new() -> Self {
        let guess = |rows: usize| 1.0 + GUESSED_ROW * count(rows.saturating_sub(1));
        Self { base: 0.0, plain: 0, factors: std::array::from_fn(|rows| (guess(rows), 0)) }
    }

    fn observe(&mut self, rows: usize, drafts: usize, seconds: f64) {
        if rows == 0 || rows > MOST_ROWS {
            return;
        }
        let factor = self.factors[rows].0;
        if self.base == 0.0 {
            self.base = seconds / factor;
        }
        self.plain = self.plain.saturating_add(u32::from(drafts == 0));
        let ratio = (seconds / (self.base * factor)).clamp(1.0 / OUTLIER, OUTLIER);
        for (other, (factor, seen)) in self.factors.iter_mut().enumerate().skip(2) {
            if other == rows {
                *seen = seen.saturating_add(1);
                let weight = NEW_FACTOR.max(1.0 / f64::from(seen.saturating_add(1)));
                *factor *= 1.0 + weight * (ratio - 1.0);
            } else {
                *factor += FORGET * (1.0 + GUESSED_ROW * count(other - 1) - *factor);
            }
        }
        // With more rows, the ratio tells about them first.
        let weight = if rows == 1 { NEW_BASE } else { NEW_FACTOR * NEW_BASE };
        self.base *= 1.0 + weight * (ratio - 1.0);
    }

    /// Returns the tokens per time that a step of `rows` rows and `tokens` tokens gives.
    fn gain(&self, rows: usize, tokens: f64) -> f64 {
        self.factors.get(rows).map_or(0.0, |(factor, _)| tokens / factor)
    }
}

impl Rate {
    fn observe(&mut self, memory: f64, drafted: usize, accepted: usize) {
        // Drafts behind a wrong one were not tried.
        let tried = drafted.min(accepted + 1);
        let kept = memory.powi(exponent(tried) - 1);
        self.accepted = self.accepted * kept + count(accepted);
        self.tried = self.tried * kept + count(tried);
    }

    fn estimate(&self, prior: f64) -> f64 {
        (self.accepted + PRIOR * prior) / (self.tried + PRIOR)
    }
}

#[expect(clippy::cast_precision_loss, reason = "rows of a step are few")]
fn count(n: usize) -> f64 {
    n as f64
}

/// Returns the exponent of the probability that as many drafts before one are right, and itself.
fn exponent(before: usize) -> i32 {
    i32::try_from(before + 1).unwrap_or(i32::MAX)
}
