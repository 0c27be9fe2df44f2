//! Drafts that are right as often as one likes: measures what verification costs and gains.

use super::{Drafter, Undrafted};
use crate::sampler::uniform;

/// Knows how sequences go on, from an earlier run of the same requests, and corrupts each token of
/// that with a given probability, repeatably.
#[derive(Clone, Debug)]
pub struct Forced {
    texts: Vec<Vec<u32>>,
    acceptance: f64,
    seed: u64,
    drawn: u64,
}

impl Forced {
    /// Returns a drafter for sequences that begin as one of `texts`, prompt and completion, whose
    /// drafts are right with the probability `acceptance`.
    pub fn new(texts: Vec<Vec<u32>>, acceptance: f64, seed: u64) -> Self {
        Self { texts, acceptance, seed, drawn: 0 }
    }

    fn corrupt(&mut self, id: u32) -> u32 {
        self.drawn += 1;
        // The other token must be in the vocabulary: one below is, except for the first.
        let other = id.checked_sub(1).unwrap_or(1);
        if uniform(self.seed, self.drawn) < self.acceptance { id } else { other }
    }
}

impl Drafter for Forced {
    fn draft(&mut self, sequences: &[Undrafted<'_>]) -> Vec<Vec<u32>> {
        let mut drafts = Vec::with_capacity(sequences.len());
        for Undrafted { tokens, most, .. } in sequences {
            let text = self.texts.iter().find(|text| text.starts_with(tokens));
            let rest = text.map_or(&[][..], |text| &text[tokens.len()..]);
            let rest = rest[..rest.len().min(*most)].to_vec();
            drafts.push(rest.into_iter().map(|id| self.corrupt(id)).collect());
        }
        drafts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::SequenceId;

    #[test]
    fn drafts_are_right_as_often_as_asked() {
        let text: Vec<u32> = (0..4000).map(|i| i % 7).collect();
        for acceptance in [0.0, 0.5, 0.8, 1.0] {
            let mut forced = Forced::new(vec![vec![9], text.clone()], acceptance, 3);
            let mut right = 0;
            for end in 1..3990 {
                let sequence = Undrafted { sequence: SequenceId(1), tokens: &text[..end], most: 3 };
                let drafts = forced.draft(&[sequence]).remove(0);
                assert_eq!(drafts.len(), 3);
                right += drafts.iter().zip(&text[end..]).filter(|(a, b)| a == b).count();
            }
            let share = right as f64 / (3.0 * 3989.0);
            assert!((share - acceptance).abs() < 0.02, "{share} {acceptance}");
        }
        let unknown = Undrafted { sequence: SequenceId(1), tokens: &[5], most: 3 };
        assert_eq!(Forced::new(vec![text], 1.0, 3).draft(&[unknown]), [Vec::<u32>::new()]);
    }
}
