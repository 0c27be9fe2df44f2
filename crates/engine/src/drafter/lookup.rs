//! Drafts from the sequence itself: what followed the latest tokens where they stood before.

use super::{Drafter, Undrafted};

/// Fewest tokens that must agree: a single one says too little about what follows it.
const LEAST_MATCH: usize = 2;
/// Agreement beyond this many tokens says nothing more.
const LONGEST_MATCH: usize = 8;

/// Drafts what followed the longest earlier occurrence of the latest tokens, the latest of equally
/// long ones: texts quote their prompts, and repeat themselves.
#[derive(Clone, Copy, Debug, Default)]
pub struct PromptLookup;

impl Drafter for PromptLookup {
    fn draft(&mut self, sequences: &[Undrafted<'_>]) -> Vec<Vec<u32>> {
        sequences.iter().map(|sequence| look_up(sequence.tokens, sequence.most)).collect()
    }
}

/// Returns up to `most` tokens that may follow `tokens`; none if there is nothing to go by.
fn look_up(tokens: &[u32], most: usize) -> Vec<u32> {
    let Some(start) = continuation(tokens) else { return Vec::new() };
    let mut drafts = Vec::with_capacity(most);
    // What runs into the end of the tokens goes on as it began: a loop repeats itself.
    let period = tokens.len() - start;
    for index in 0..most {
        drafts.push(tokens[start + index % period]);
    }
    drafts
}

/// Returns where the tokens stand that followed the latest ones before.
fn continuation(tokens: &[u32]) -> Option<usize> {
    let last = tokens.last()?;
    let mut longest = LEAST_MATCH - 1;
    let mut found = None;
    for end in (LEAST_MATCH..tokens.len()).rev() {
        if tokens[end - 1] != *last {
            continue;
        }
        let before = tokens[..end].iter().rev().zip(tokens.iter().rev());
        let agree = before.take(LONGEST_MATCH).take_while(|(a, b)| a == b).count();
        if agree > longest {
            longest = agree;
            found = Some(end);
            if agree == LONGEST_MATCH {
                break;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_longest_agreement_is_drafted() {
        for (tokens, expected) in [
            (&[1, 2, 3, 4, 5, 1, 2][..], &[3, 4, 5, 1][..]),
            // A single token is no agreement.
            (&[1, 2, 3, 4, 2], &[]),
            // Three agree at the beginning, only two later.
            (&[7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], &[3, 9, 1, 2]),
            // Of equal ones, the latest.
            (&[1, 2, 3, 1, 2, 4, 9, 1, 2], &[4, 9, 1, 2]),
            // A loop goes on.
            (&[5, 5, 5], &[5, 5, 5, 5]),
            (&[1, 2, 3, 1, 2, 3, 1, 2], &[3, 1, 2, 3]),
            (&[1], &[]),
            (&[], &[]),
            (&[4, 4], &[]),
        ] {
            assert_eq!(look_up(tokens, 4), expected, "{tokens:?}");
        }
        assert_eq!(look_up(&[1, 2, 3, 4, 5, 1, 2], 2), [3, 4]);
        assert!(look_up(&[1, 2, 3, 4, 5, 1, 2], 0).is_empty());
    }
}
