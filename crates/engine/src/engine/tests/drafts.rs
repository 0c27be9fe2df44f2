//! Drafts, however many are right, change no token, no logit and no log-probability.

use std::collections::HashSet;

use super::*;
use crate::{drafter::Forced, scheduler::Tally};

/// Bytes of a KV page of the built-in model.
const PAGE: usize = 3 * 2 * 2 * 64 * 64 * 4;

/// What a request was told, from its first token on.
fn told(receiver: &Receiver<SequenceEvent>) -> Vec<SequenceEvent> {
    let mut told = Vec::new();
    loop {
        let event = receiver.recv_timeout(WAIT).unwrap();
        let last = !matches!(event, SequenceEvent::Scheduled { .. } | SequenceEvent::Token { .. });
        if !matches!(event, SequenceEvent::Scheduled { .. }) {
            told.push(event);
        }
        if last {
            return told;
        }
    }
}

fn ids(told: &[SequenceEvent]) -> Vec<u32> {
    let id = |event: &SequenceEvent| match event {
        SequenceEvent::Token { id, .. } => Some(*id),
        _ => None,
    };
    told.iter().filter_map(id).collect()
}

/// What requests give one at a time, without drafts.
struct Undrafted {
    told: Vec<Vec<SequenceEvent>>,
    /// Prompt and completion.
    texts: Vec<Vec<u32>>,
    /// Position and logits bits of every row.
    rows: HashSet<(usize, Vec<u32>)>,
}

impl Undrafted {
    fn new(asked: &[SequenceRequest], options: &EngineOptions) -> Self {
        let seen = Seen::default();
        let options = EngineOptions { isa: Some(Isa::Scalar), max_sequences: 1, ..options.clone() };
        let model = demo::model().unwrap();
        let engine = Engine::load_observed(&model, &options, Some(observer(&seen))).unwrap();
        let mut alone = Self { told: vec![], texts: vec![], rows: HashSet::new() };
        for (number, asked) in asked.iter().enumerate() {
            let salted = SequenceRequest { cache_salt: number.to_string(), ..asked.clone() };
            let (_handle, receiver) = submit(&engine, salted);
            let told = told(&receiver);
            alone.texts.push([&asked.prompt[..], &ids(&told)].concat());
            alone.told.push(told);
        }
        let rows = std::mem::take(&mut *seen.lock().unwrap());
        alone.rows.extend(rows.into_iter().map(|((_, position), bits)| (position, bits)));
        alone
    }

    fn drafter(&self, acceptance: f64, seed: u64) -> Option<Box<dyn Drafter>> {
        Some(Box::new(Forced::new(self.texts.clone(), acceptance, seed)))
    }
}

/// An engine that drafts, and what its steps come to.
fn drafting(
    options: &EngineOptions,
    drafter: Option<Box<dyn Drafter>>,
    seen: &Seen,
) -> (Engine, Arc<Mutex<Tally>>) {
    let model = demo::model().unwrap();
    let engine = Engine::load_observed(&model, options, Some(observer(seen))).unwrap();
    engine.draft_with(drafter, 7);
    let tally = Arc::new(Mutex::new(Tally::default()));
    let sum = Arc::clone(&tally);
    engine.observe_steps(Box::new(move |report| {
        let mut sum = sum.lock().unwrap();
        sum.drafted += report.tally.drafted;
        sum.accepted += report.tally.accepted;
        sum.preemptions += report.tally.preemptions;
    }));
    (engine, tally)
}

/// Greedy and sampled requests with penalties, biases, log-probabilities, stop ids and ends.
fn asked() -> Vec<SequenceRequest> {
    let prompts = prompts(7);
    (0..10)
        .map(|seed| {
            let stop_ids = if seed % 3 == 2 { (0..40).collect() } else { Vec::new() };
            let max_tokens = 40 + seed * 7;
            let mut asked = request(&prompts[seed % 7], 1, sampled(seed as u64));
            asked.output = Output::Generate { max_tokens, stop_ids };
            asked
        })
        .collect()
}

#[test]
fn drafts_change_no_bit_however_many_are_right() {
    let asked = asked();
    let expected = Undrafted::new(&asked, &options());
    let stopped =
        |told: &&Vec<SequenceEvent>| told.last() == Some(&SequenceEvent::Finished(StopReason::Eos));
    assert!(expected.told.iter().any(|told| stopped(&told)), "a stop id ends some");
    for (acceptance, max_sequences, threads) in
        [(0.0, 1, 1), (0.5, 1, 2), (0.8, 1, 1), (1.0, 1, 2), (0.5, 3, 1), (0.8, 6, 2), (1.0, 16, 1)]
    {
        let what = format!("{acceptance} right, {max_sequences} at once");
        let seen = Seen::default();
        let options = EngineOptions { max_sequences, threads, prefill_chunk: 50, ..options() };
        let (engine, tally) = drafting(&options, expected.drafter(acceptance, 5), &seen);
        let running: Vec<_> = asked.iter().map(|asked| submit(&engine, asked.clone())).collect();
        for (number, (_, receiver)) in running.iter().enumerate() {
            assert_eq!(told(receiver), expected.told[number], "{what}: request {number}");
        }
        wait_until_idle(&engine);
        for ((sequence, position), bits) in std::mem::take(&mut *seen.lock().unwrap()) {
            // Behind a stop id, drafts that are right have rows of their own.
            let text = &expected.texts[usize::try_from(sequence.0).unwrap()];
            let known = position + 1 >= text.len() || expected.rows.contains(&(position, bits));
            assert!(known, "{what}: logits of position {position} of {sequence}");
        }
        let tally = *tally.lock().unwrap();
        assert!(tally.drafted > 0, "{what}: {tally:?}");
        assert_eq!(tally.accepted > 0, acceptance > 0.0, "{what}: {tally:?}");
        assert!(acceptance < 1.0 || tally.accepted <= tally.drafted, "{what}: {tally:?}");
    }
}

#[test]
fn resumes_and_prefix_hits_go_on_alike_with_drafts() {
    let asked = SequenceRequest {
        output: Output::Generate { max_tokens: 60, stop_ids: Vec::new() },
        ..request(&prompts(3)[2], 1, sampled(5))
    };
    let expected = Undrafted::new(std::slice::from_ref(&asked), &options());
    let whole = ids(&expected.told[0]);
    for acceptance in [0.5, 1.0] {
        let seen = Seen::default();
        let (engine, tally) = drafting(&options(), expected.drafter(acceptance, 2), &seen);
        for cut in (0..60).chain([59]) {
            for salt in [cut.to_string(), String::new()] {
                let resumed = whole[..cut].to_vec();
                let asked = SequenceRequest { resumed, cache_salt: salt, ..asked.clone() };
                let (_handle, receiver) = submit(&engine, asked);
                assert_eq!(ids(&told(&receiver)), whole[cut..], "{acceptance}: from {cut}");
            }
        }
        for ((_, position), bits) in std::mem::take(&mut *seen.lock().unwrap()) {
            assert!(expected.rows.contains(&(position, bits)), "{acceptance}: {position}");
        }
        let tally = *tally.lock().unwrap();
        assert!(tally.accepted > 100, "{tally:?}");
    }
}

#[test]
fn preempted_and_cancelled_sequences_are_drafted_for_again() {
    let asked: Vec<_> =
        (0..7).map(|seed| request(&prompts(7)[seed], 100, sampled(seed as u64))).collect();
    let expected = Undrafted::new(&asked, &options());
    for (pages, acceptance) in [(4, 0.8), (5, 0.5), (8, 1.0)] {
        let what = format!("{pages} pages, {acceptance}");
        let options = EngineOptions { kv_bytes: pages * PAGE, ..options() };
        let (engine, tally) = drafting(&options, expected.drafter(acceptance, 9), &Seen::default());
        for round in 0..2 {
            let mut running = Vec::new();
            for (number, asked) in asked.iter().enumerate() {
                let (handle, receiver) = submit(&engine, asked.clone());
                if round == 1 && number % 3 == 0 {
                    for _ in 0..number + 3 {
                        drop(receiver.recv_timeout(WAIT));
                    }
                    drop(handle);
                } else {
                    running.push((number, handle, receiver));
                }
            }
            for (number, _handle, receiver) in &running {
                assert_eq!(told(receiver), expected.told[*number], "{what}: request {number}");
            }
        }
        wait_until_idle(&engine);
        let tally = *tally.lock().unwrap();
        assert!(tally.preemptions > 0 && tally.accepted > 0, "{what}: {tally:?}");
    }
}

#[test]
fn looking_up_the_prompt_helps_where_a_text_repeats_itself() {
    // Greedy completions of the small model run into loops.
    let asked: Vec<_> =
        prompts(4).iter().map(|prompt| request(prompt, 200, SamplingParams::greedy())).collect();
    let expected = Undrafted::new(&asked, &options());
    let speculation = Speculation::Lookup { tokens: 4 };
    let options = EngineOptions { speculation, max_sequences: 2, ..options() };
    let engine = Engine::load(&demo::model().unwrap(), &options).unwrap();
    let (drafted, accepted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let sums = (Arc::clone(&drafted), Arc::clone(&accepted));
    engine.observe_steps(Box::new(move |report| {
        sums.0.fetch_add(report.tally.drafted as u64, Ordering::Relaxed);
        sums.1.fetch_add(report.tally.accepted as u64, Ordering::Relaxed);
    }));
    let running: Vec<_> = asked.iter().map(|asked| submit(&engine, asked.clone())).collect();
    for (number, (_, receiver)) in running.iter().enumerate() {
        assert_eq!(told(receiver), expected.told[number], "request {number}");
    }
    let counts = (drafted.load(Ordering::Relaxed), accepted.load(Ordering::Relaxed));
    assert!(counts.1 > 0 && counts.1 <= counts.0, "{counts:?}");
}
