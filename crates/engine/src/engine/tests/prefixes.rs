//! Cached prefixes, evictions and preemptions change no bit.

use std::collections::HashSet;

use super::*;
use crate::scheduler::Tally;

/// Bytes of a KV page of the built-in model.
const PAGE: usize = 3 * 2 * 2 * 64 * 64 * 4;

/// What requests give one at a time: tokens, and positions with logits bits.
///
/// A preempted sequence goes on under another number, so rows are looked up by what they are.
struct Alone {
    tokens: Vec<Vec<u32>>,
    rows: HashSet<(usize, Vec<u32>)>,
}

impl Alone {
    fn new(asked: &[SequenceRequest]) -> Self {
        let seen = Seen::default();
        let options = EngineOptions { max_sequences: 1, prefill_chunk: 4096, ..options() };
        let model = demo::model().unwrap();
        let engine = Engine::load_observed(&model, &options, Some(observer(&seen))).unwrap();
        let mut alone = Self { tokens: Vec::new(), rows: HashSet::new() };
        for (number, asked) in asked.iter().enumerate() {
            // Its own salt: nothing is there before.
            let asked = SequenceRequest { cache_salt: number.to_string(), ..asked.clone() };
            let (_handle, receiver) = submit(&engine, asked);
            assert_eq!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached: 0 }));
            alone.tokens.push(tokens(&receiver));
        }
        let rows = std::mem::take(&mut *seen.lock().unwrap()).into_iter();
        alone.rows.extend(rows.map(|((_, position), bits)| (position, bits)));
        alone
    }

    /// Checks all rows that were seen, and returns their number.
    fn check_rows(&self, seen: &Seen, what: &str) -> usize {
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        let rows = seen.len();
        for ((sequence, position), bits) in seen {
            let known = self.rows.contains(&(position, bits));
            assert!(known, "{what}: logits of position {position} of sequence {sequence}");
        }
        rows
    }
}

/// An engine that is watched, and what its steps came to.
fn watched(options: &EngineOptions) -> (Engine, Seen, Arc<Mutex<Tally>>) {
    let seen = Seen::default();
    let model = demo::model().unwrap();
    let engine = Engine::load_observed(&model, options, Some(observer(&seen))).unwrap();
    let tally = Arc::new(Mutex::new(Tally::default()));
    let sum = Arc::clone(&tally);
    engine.observe_steps(Box::new(move |report| {
        let mut sum = sum.lock().unwrap();
        sum.preemptions += report.tally.preemptions;
        sum.hit_tokens += report.tally.hit_tokens;
    }));
    (engine, seen, tally)
}

/// A prompt that shares `common` tokens with all others.
fn sharing(common: usize, own: usize, seed: usize) -> Vec<u32> {
    let id = |i: usize| u32::try_from(i % 1021).unwrap();
    let common = (0..common).map(|i| id(i * i * 31 + 5));
    common.chain((0..own).map(|i| id(i * 17 + seed * 101 + 1))).collect()
}

#[test]
fn prefix_hits_change_no_bit() {
    let asked: Vec<_> = [63, 64, 65, 127, 128, 129, 192]
        .into_iter()
        .enumerate()
        .flat_map(|(seed, common)| [(common, 1, seed), (common, 30, seed + 50)])
        .map(|(common, own, seed)| request(&sharing(common, own, seed), 12, sampled(seed as u64)))
        .collect();
    let alone = Alone::new(&asked);
    for prefill_chunk in [7, 4096] {
        let options = EngineOptions { prefill_chunk, threads: 2, ..options() };
        let (engine, seen, tally) = watched(&options);
        let mut rows = 0;
        for round in 0..2 {
            for (number, asked) in asked.iter().enumerate() {
                let what = format!("chunks of {prefill_chunk}, round {round}, request {number}");
                let (_handle, receiver) = submit(&engine, asked.clone());
                assert_eq!(tokens(&receiver), alone.tokens[number], "{what}");
                rows += alone.check_rows(&seen, &what);
            }
        }
        let due: usize = asked.iter().map(|asked| 2 * (asked.prompt.len() + 11)).sum();
        let hits = tally.lock().unwrap().hit_tokens;
        assert_eq!(rows + hits, due, "what was hit was not computed");
        assert!(hits > due / 2, "{hits} of {due}");
    }
}

#[test]
fn evicted_prefixes_are_computed_again() {
    let asked: Vec<_> = [(128, 9), (10, 150), (128, 70), (0, 190), (64, 3), (128, 9), (65, 100)]
        .into_iter()
        .enumerate()
        .map(|(seed, (common, own))| request(&sharing(common, own, seed), 8, sampled(seed as u64)))
        .collect();
    let alone = Alone::new(&asked);
    let (engine, seen, tally) = watched(&EngineOptions { kv_bytes: 5 * PAGE, ..options() });
    for round in 0..3 {
        for (number, asked) in asked.iter().enumerate() {
            let what = format!("round {round}, request {number}");
            let (_handle, receiver) = submit(&engine, asked.clone());
            assert_eq!(tokens(&receiver), alone.tokens[number], "{what}");
            alone.check_rows(&seen, &what);
        }
    }
    let hits = tally.lock().unwrap().hit_tokens;
    let most = 3 * asked.iter().map(|asked| asked.prompt.len() / 64 * 64).sum::<usize>();
    assert!((1..most / 2).contains(&hits), "some are hit, some evicted: {hits} of {most}");
    wait_until_idle(&engine);
    assert!((1..=5).contains(&engine.load_now().pages_cached));
}

#[test]
fn preemption_changes_no_bit() {
    let asked: Vec<_> = (0..7)
        .map(|seed| {
            let prompt = sharing(seed % 3 * 32, 20 + seed * 7, seed);
            request(&prompt, 100, sampled(seed as u64))
        })
        .collect();
    let alone = Alone::new(&asked);
    for (pages, prefill_chunk) in [(4, 4096), (5, 9), (8, 50)] {
        let what = format!("{pages} pages, chunks of {prefill_chunk}");
        let options = EngineOptions { kv_bytes: pages * PAGE, prefill_chunk, ..options() };
        let (engine, seen, tally) = watched(&options);
        let running: Vec<_> = asked.iter().map(|asked| submit(&engine, asked.clone())).collect();
        for (number, (_, receiver)) in running.iter().enumerate() {
            assert_eq!(tokens(receiver), alone.tokens[number], "{what}: request {number}");
        }
        assert!(tally.lock().unwrap().preemptions > 0, "{what}");
        alone.check_rows(&seen, &what);
        wait_until_idle(&engine);
    }
}

#[test]
fn random_joins_and_cancels_change_no_bit() {
    let asked: Vec<_> = (0..32)
        .map(|seed| {
            let prompt = sharing(seed * 37 % 131, 1 + seed * 13 % 60, seed);
            request(&prompt, 5 + seed % 20, sampled(seed as u64))
        })
        .collect();
    let alone = Alone::new(&asked);
    for (seed, (max_sequences, pages)) in
        (0..).zip([(1, 400), (2, 9), (5, 400), (16, 20), (32, 400), (32, 12)])
    {
        let mut draws = 0;
        let mut below = |n: u32| {
            draws += 1;
            (0..n).find(|i| uniform(seed, draws) * f64::from(n) < f64::from(i + 1)).unwrap()
        };
        let options = EngineOptions {
            threads: 1 + below(2) as usize,
            max_sequences,
            kv_bytes: pages * PAGE,
            prefill_chunk: 1 + below(120) as usize,
            ..options()
        };
        let what = format!("at most {max_sequences} in {pages} pages, {options:?}");
        let (engine, seen, _) = watched(&options);
        let mut running = Vec::new();
        for (number, asked) in asked.iter().enumerate() {
            let (handle, receiver) = submit(&engine, asked.clone());
            if below(4) == 0 {
                // Gone after some of its events, or before the first.
                for _ in 0..below(5) {
                    drop(receiver.recv_timeout(WAIT));
                }
                drop(handle);
            } else {
                running.push((number, handle, receiver));
            }
        }
        assert!(running.len() < asked.len(), "{what}: none is cancelled");
        for (number, _handle, receiver) in &running {
            assert_eq!(tokens(receiver), alone.tokens[*number], "{what}: request {number}");
        }
        wait_until_idle(&engine);
        assert!(alone.check_rows(&seen, &what) > 500, "{what}");
    }
}
