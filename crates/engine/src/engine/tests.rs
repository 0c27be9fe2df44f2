//! The promise of the whole product, held against the built-in model: the bits of a sequence's
//! logits depend on nothing but the sequence.

mod cancel;
mod drafts;
mod grammar;
mod prefixes;
mod screen;
mod shared;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use super::*;
use crate::{
    demo,
    pipeline::{Followed, Follower, LinkLost, StageFrame},
    plan::{Scores, SequenceId},
    request::{Output, SequenceFailure, StopReason},
    sampler::{SamplingParams, uniform},
};

const WAIT: Duration = Duration::from_secs(60);

/// Logits bits by sequence and position.
type Seen = Arc<Mutex<BTreeMap<(SequenceId, usize), Vec<u32>>>>;

fn observer(seen: &Seen) -> LogitsObserver {
    let seen = Arc::clone(seen);
    Box::new(move |sequence, position, logits| {
        let bits = logits.iter().map(|logit| logit.to_bits()).collect();
        seen.lock().unwrap().insert((sequence, position), bits);
    })
}

fn options() -> EngineOptions {
    EngineOptions { kv_bytes: 64 << 20, ..EngineOptions::default() }
}

fn request(prompt: &[u32], max_tokens: usize, sampling: SamplingParams) -> SequenceRequest {
    SequenceRequest {
        prompt: prompt.to_vec(),
        resumed: Vec::new(),
        sampling,
        output: Output::Generate { max_tokens, stop_ids: Vec::new() },
        traceparent: String::new(),
        cache_salt: String::new(),
    }
}

/// Made-up prompts of different lengths: token ids of the built-in model.
fn prompts(n: usize) -> Vec<Vec<u32>> {
    (0..n)
        .map(|i| {
            let length = 3 + i * 37 % 100;
            let ids = (0..length).map(|j| u32::try_from((i * 101 + j * j * 37) % 1021).unwrap());
            std::iter::once(1021).chain(ids).collect()
        })
        .collect()
}

fn sampled(seed: u64) -> SamplingParams {
    // Other settings with every seed, so that the whole battery runs with each of them.
    let on = |bit: u32| seed >> bit & 1 == 1;
    SamplingParams {
        temperature: if seed % 5 == 4 { 0.0 } else { 0.9 },
        top_p: 0.95,
        seed,
        min_p: if on(1) { 0.02 } else { 0.0 },
        repetition_penalty: if on(0) { 1.3 } else { 1.0 },
        frequency_penalty: if on(2) { 0.4 } else { 0.0 },
        presence_penalty: if on(1) { -0.3 } else { 0.0 },
        logit_bias: if on(0) { [(5, 4.0), (77, -9.0)].into() } else { [].into() },
        top_logprobs: on(0).then_some(3),
        ..SamplingParams::greedy()
    }
}

fn submit(engine: &Engine, asked: SequenceRequest) -> (SequenceHandle, Receiver<SequenceEvent>) {
    let (sender, receiver) = mpsc::channel();
    // The receiver may be gone: its test has what it wants.
    let sink = Box::new(move |event| drop(sender.send(event)));
    (engine.submit(asked, sink).unwrap(), receiver)
}

fn tokens(receiver: &Receiver<SequenceEvent>) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match receiver.recv_timeout(WAIT).unwrap() {
            SequenceEvent::Scheduled { .. } => {}
            SequenceEvent::Token { id, .. } => tokens.push(id),
            SequenceEvent::Finished(_) => return tokens,
            other => panic!("{other:?}"),
        }
    }
}

/// What one run of all prompts gave: tokens, and logits bits by prompt and position.
#[derive(PartialEq)]
struct Outcome {
    tokens: Vec<Vec<u32>>,
    logits: BTreeMap<(usize, usize), Vec<u32>>,
}

/// Submits all prompts at once and collects everything. Sequence numbers follow admission, which
/// is the order of submission.
fn outcome(engine: &Engine, seen: &Seen, prompts: &[Vec<u32>]) -> Outcome {
    let running: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| submit(engine, request(prompt, 20, sampled(i as u64))))
        .collect();
    let tokens = running.iter().map(|(_, receiver)| tokens(receiver)).collect();
    let logits = std::mem::take(&mut *seen.lock().unwrap())
        .into_iter()
        .map(|((sequence, position), bits)| {
            ((usize::try_from(sequence.0).unwrap(), position), bits)
        })
        .collect();
    Outcome { tokens, logits }
}

/// Every prompt in an engine of its own: the oracle, in scalar arithmetic.
fn solo(prompts: &[Vec<u32>]) -> Outcome {
    let mut all = Outcome { tokens: Vec::new(), logits: BTreeMap::new() };
    for (i, prompt) in prompts.iter().enumerate() {
        let seen = Seen::default();
        let options = EngineOptions { isa: Some(Isa::Scalar), prefill_chunk: 4096, ..options() };
        let engine =
            Engine::load_observed(&demo::model().unwrap(), &options, Some(observer(&seen)))
                .unwrap();
        let (_handle, receiver) = submit(&engine, request(prompt, 20, sampled(i as u64)));
        all.tokens.push(tokens(&receiver));
        for ((_, position), bits) in std::mem::take(&mut *seen.lock().unwrap()) {
            all.logits.insert((i, position), bits);
        }
    }
    all
}

fn assert_equal(got: &Outcome, expected: &Outcome, what: &str) {
    assert_eq!(got.tokens, expected.tokens, "{what}: tokens");
    assert!(got.logits.keys().eq(expected.logits.keys()), "{what}: positions");
    for (key, bits) in &got.logits {
        assert!(*bits == expected.logits[key], "{what}: logits of (prompt, position) {key:?}");
    }
}

#[test]
fn batches_chunks_threads_and_instruction_sets_change_no_bit() {
    let prompts = prompts(7);
    let expected = solo(&prompts);
    assert_eq!(
        expected.logits.len(),
        prompts.iter().map(|prompt| prompt.len() + 19).sum::<usize>(),
        "every position is observed"
    );
    let model = demo::model().unwrap();
    for isa in Isa::supported() {
        for (threads, max_sequences, prefill_chunk) in
            [(1, 16, 1), (2, 16, 7), (3, 3, 50), (2, 16, 4096)]
        {
            if isa == Isa::Scalar && prefill_chunk != 7 {
                // Slow, and the oracle is scalar already.
                continue;
            }
            let what =
                format!("{isa}, {threads} threads, {max_sequences} at once, {prefill_chunk}");
            let isa = Some(isa);
            let options = EngineOptions { threads, isa, max_sequences, prefill_chunk, ..options() };
            let seen = Seen::default();
            let engine = Engine::load_observed(&model, &options, Some(observer(&seen))).unwrap();
            assert_equal(&outcome(&engine, &seen, &prompts), &expected, &what);
        }
    }
}

/// Sequences that join at random moments, in random order, under random limits.
#[test]
fn random_batches_change_no_bit() {
    let prompts = prompts(7);
    let expected = solo(&prompts);
    let model = demo::model().unwrap();
    for seed in 0..6 {
        let mut draws = 0;
        let mut below = |n: u32| {
            draws += 1;
            (0..n).find(|i| uniform(seed, draws) * f64::from(n) < f64::from(i + 1)).unwrap()
        };
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, below(u32::try_from(last + 1).unwrap()) as usize);
        }
        let options = EngineOptions {
            threads: 1 + below(3) as usize,
            max_sequences: 1 + below(7) as usize,
            prefill_chunk: 1 + below(90) as usize,
            ..options()
        };
        let what = format!("seed {seed}: {order:?}, {options:?}");
        let seen = Seen::default();
        let engine = Engine::load_observed(&model, &options, Some(observer(&seen))).unwrap();
        let mut running = Vec::new();
        for &prompt in &order {
            running.push(submit(&engine, request(&prompts[prompt], 20, sampled(prompt as u64))));
            // The next joins once the first has gone a few steps further, if it has any left.
            let first: &Receiver<SequenceEvent> = &running[0].1;
            for _ in 0..below(4) {
                drop(first.recv_timeout(WAIT));
            }
        }
        let mut logits = BTreeMap::new();
        for (&prompt, (_, receiver)) in order.iter().zip(&running).skip(1) {
            assert_eq!(tokens(receiver), expected.tokens[prompt], "{what}: prompt {prompt}");
        }
        // Its events were partly taken above: waits for what is left of them.
        while running[0].1.recv_timeout(WAIT).is_ok() {}
        for ((sequence, position), bits) in std::mem::take(&mut *seen.lock().unwrap()) {
            logits.insert((order[usize::try_from(sequence.0).unwrap()], position), bits);
        }
        let got = Outcome { tokens: expected.tokens.clone(), logits };
        assert_equal(&got, &expected, &what);
    }
}

/// A later stage on a thread of its own, over channels.
#[derive(Debug)]
struct Channel(Sender<StageFrame>);

impl Downstream for Channel {
    fn send(&mut self, frame: StageFrame) -> Result<(), LinkLost> {
        self.0.send(frame).map_err(|_| LinkLost("the channel is closed".to_owned()))
    }
}

/// Builds a pipeline of the stages cut at `cuts`. Frames of each later stage run on one thread.
fn pipeline(cuts: &[usize], seen: &Seen, options: &EngineOptions) -> Arc<Engine> {
    let model = demo::model().unwrap();
    let mut followers: Vec<Follower> = cuts
        .iter()
        .zip(cuts.iter().skip(1).chain([&model.config.layers]))
        .map(|(&start, &end)| {
            let options = EngineOptions { layers: Some(start..end), ..options.clone() };
            Follower::load(&model, &options).unwrap()
        })
        .collect();
    followers.last_mut().unwrap().observe_logits(Some(observer(seen)));
    let head = EngineOptions { layers: Some(0..cuts[0]), ..options.clone() };
    let engine = Arc::new(Engine::load(&model, &head).unwrap());
    let (sender, receiver) = mpsc::channel::<StageFrame>();
    let kv_pages = followers.iter().map(Follower::kv_pages).min().unwrap();
    let results = Arc::downgrade(&engine);
    std::thread::spawn(move || {
        for frame in receiver {
            let mut on_its_way = Some(frame);
            for follower in &mut followers {
                let frame = on_its_way.take().expect("only the last stage answers");
                match follower.apply(frame).unwrap() {
                    Followed::Forward(next) => on_its_way = Some(next),
                    Followed::Result(result) => {
                        if let Some(engine) = results.upgrade() {
                            engine.deliver(1, result);
                        }
                    }
                }
            }
        }
    });
    engine.attach(Attachment {
        downstream: Box::new(Channel(sender)),
        epoch: 1,
        stages: cuts.len() + 1,
        kv_pages,
    });
    engine
}

#[test]
fn stages_change_no_bit() {
    let prompts = prompts(6);
    let expected = solo(&prompts);
    for cuts in [&[1][..], &[2], &[1, 2]] {
        for (threads, prefill_chunk) in [(1, 7), (2, 4096)] {
            let what = format!("cut at {cuts:?}, {threads} threads, {prefill_chunk}");
            let options = EngineOptions { threads, prefill_chunk, ..options() };
            let seen = Seen::default();
            let engine = pipeline(cuts, &seen, &options);
            assert_equal(&outcome(&engine, &seen, &prompts), &expected, &what);
        }
    }
}

#[test]
fn a_resume_at_any_index_gives_the_same_bits() {
    let prompt = &prompts(3)[2];
    let seen = Seen::default();
    let engine =
        Engine::load_observed(&demo::model().unwrap(), &options(), Some(observer(&seen))).unwrap();
    let (_handle, receiver) = submit(&engine, request(prompt, 12, sampled(5)));
    let whole = tokens(&receiver);
    let expected = std::mem::take(&mut *seen.lock().unwrap());
    for cut in 1..12 {
        let mut asked = request(prompt, 12, sampled(5));
        asked.resumed = whole[..cut].to_vec();
        // Without the first, with the second, the pages of the runs before.
        for (salt, cached) in [(cut.to_string(), 0), (String::new(), 64)] {
            asked.cache_salt = salt;
            let (_handle, receiver) = submit(&engine, asked.clone());
            assert_eq!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached }));
            assert_eq!(tokens(&receiver), whole[cut..], "resumed after {cut} tokens");
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            let expected = expected.values().skip(cached);
            assert!(seen.values().eq(expected), "resumed after {cut} tokens: logits");
        }
    }
}

#[test]
fn scores_are_the_log_softmax_of_the_logits() {
    let prompt = &prompts(3)[2];
    let seen = Seen::default();
    let engine =
        Engine::load_observed(&demo::model().unwrap(), &options(), Some(observer(&seen))).unwrap();
    let asked = SequenceRequest { output: Output::Score, ..request(prompt, 1, sampled(0)) };
    let (_handle, receiver) = submit(&engine, asked);
    let scores = loop {
        match receiver.recv_timeout(WAIT).unwrap() {
            SequenceEvent::Scores(scores) => break scores,
            SequenceEvent::Scheduled { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    let seen = seen.lock().unwrap();
    assert_eq!((scores.logprobs.len(), scores.top_ids.len()), (prompt.len() - 1, prompt.len()));
    for (position, bits) in seen.iter().map(|((_, position), bits)| (*position, bits)) {
        let logits: Vec<f64> = bits.iter().map(|b| f64::from(f32::from_bits(*b))).collect();
        let best = scores.top_ids[position] as usize;
        assert!(logits.iter().all(|logit| *logit <= logits[best]));
        if let Some(id) = prompt.get(position + 1) {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let expected = logits[*id as usize] - sum.ln();
            let got = f64::from(scores.logprobs[position]);
            assert!((got - expected).abs() < 1e-5, "{position}: {got} {expected}");
        }
    }
}

/// Waits until no sequence runs and no page is in use: the load is told after the events.
#[expect(clippy::disallowed_types, reason = "no runtime here whose time could be paused")]
fn wait_until_idle(engine: &Engine) {
    let deadline = std::time::Instant::now() + WAIT;
    let idle = || engine.load_now().running == 0 && engine.load_now().pages_referenced == 0;
    while !idle() {
        assert!(std::time::Instant::now() < deadline, "{:?}", engine.load_now());
        std::thread::yield_now();
    }
}

#[test]
fn a_lost_stage_fails_its_sequences_and_a_new_one_serves() {
    let seen = Seen::default();
    let engine = pipeline(&[1], &seen, &options());
    let (_handle, receiver) = submit(&engine, request(&[1, 2], 900, sampled(1)));
    assert_eq!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached: 0 }));
    engine.detach(0, "an older link");
    assert!(matches!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Token { index: 0, .. })));
    engine.detach(1, "the cable was cut");
    let failure = receiver.iter().find(|event| !matches!(event, SequenceEvent::Token { .. }));
    let reason = SequenceFailure::PipelineBroken("the cable was cut".to_owned());
    assert_eq!(failure, Some(SequenceEvent::Failed(reason)));
    let asked = request(&[1, 2], 3, sampled(1));
    let refused = engine.submit(asked.clone(), Box::new(|_| {})).unwrap_err();
    assert_eq!(refused, SubmitError::NoPipeline);
    wait_until_idle(&engine);
}

#[test]
fn a_dropped_handle_frees_its_pages() {
    let engine = Engine::load(&demo::model().unwrap(), &options()).unwrap();
    let (handle, receiver) = submit(&engine, request(&[1, 2], 1000, sampled(1)));
    assert_eq!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached: 0 }));
    drop(handle);
    // The sink goes with the sequence: the channel closes.
    assert!(receiver.iter().count() < 1000);
    let (_handle, receiver) = submit(&engine, request(&[3], 1, sampled(1)));
    assert_eq!(tokens(&receiver).len(), 1);
    wait_until_idle(&engine);
}

#[test]
fn a_sequence_past_the_context_ends_there() {
    let options = EngineOptions { kv_bytes: 3 * 2 * 2 * 64 * 64 * 4, ..options() };
    let engine = Engine::load(&demo::model().unwrap(), &options).unwrap();
    assert_eq!(engine.context_limit(), 64, "the KV cache holds one page");
    let (sender, receiver) = mpsc::channel();
    let sink = Box::new(move |event| drop(sender.send(event)));
    let _handle = engine.submit(request(&[1; 60], 100, sampled(1)), sink).unwrap();
    let last = receiver.iter().last();
    assert_eq!(last, Some(SequenceEvent::Finished(StopReason::Context)));
    let error = engine.submit(request(&[1; 65], 1, sampled(1)), Box::new(|_| {})).unwrap_err();
    assert_eq!(error, SubmitError::TooLong { tokens: 65, limit: 64 });
}

#[test]
fn the_context_may_be_less_than_the_models() {
    let model = demo::model().unwrap();
    for (context, limit) in [(Some(20), 20), (Some(1 << 30), model.config.context)] {
        let options = EngineOptions { context, ..options() };
        assert_eq!(Engine::load(&model, &options).unwrap().context_limit(), limit);
    }
    let options = EngineOptions { context: Some(20), ..options() };
    let engine = Engine::load(&model, &options).unwrap();
    let (sender, receiver) = mpsc::channel();
    let sink = Box::new(move |event| drop(sender.send(event)));
    let _handle = engine.submit(request(&[1; 18], 100, sampled(1)), sink).unwrap();
    let events: Vec<_> = receiver.iter().collect();
    assert_eq!(events.last(), Some(&SequenceEvent::Finished(StopReason::Context)));
    let tokens = events.iter().filter(|event| matches!(event, SequenceEvent::Token { .. }));
    assert_eq!(tokens.count(), 2);
    let error = engine.submit(request(&[1; 21], 1, sampled(1)), Box::new(|_| {})).unwrap_err();
    assert_eq!(error, SubmitError::TooLong { tokens: 21, limit: 20 });
}

#[test]
fn bad_options_are_named() {
    let model = demo::model().unwrap();
    let error = |options: EngineOptions| Engine::load(&model, &options).unwrap_err().to_string();
    assert!(error(EngineOptions { threads: 0, ..options() }).contains("threads"));
    assert!(error(EngineOptions { kv_bytes: 5, ..options() }).contains("holds no page"));
    assert!(error(EngineOptions { layers: Some(1..2), ..options() }).contains("begins at layer 0"));
    assert!(error(EngineOptions { layers: Some(0..9), ..options() }).contains("layers 0..3"));
    assert!(error(EngineOptions { max_sequences: 0, ..options() }).contains("max_sequences"));
    assert!(error(EngineOptions { context: Some(0), ..options() }).contains("context"));
}

#[test]
fn scores_fit_their_prompt_in_chunks() {
    let prompt = &prompts(5)[4];
    let mut all: Vec<Scores> = Vec::new();
    for prefill_chunk in [1, 7, 500] {
        let options = EngineOptions { prefill_chunk, ..options() };
        let engine = Engine::load(&demo::model().unwrap(), &options).unwrap();
        let asked = SequenceRequest { output: Output::Score, ..request(prompt, 1, sampled(0)) };
        let (_handle, receiver) = submit(&engine, asked);
        let scores = receiver.iter().find_map(|event| match event {
            SequenceEvent::Scores(scores) => Some(scores),
            _ => None,
        });
        all.push(scores.unwrap());
    }
    assert!(all.iter().all(|scores| *scores == all[0]));
}

/// The log-probabilities of a completion are those that `Score` gives its tokens, whatever the
/// penalties and wherever the completion was resumed.
#[test]
fn logprobs_are_those_of_the_model() {
    let prompt = &prompts(3)[1];
    let engine = Engine::load(&demo::model().unwrap(), &options()).unwrap();
    let told = |asked: SequenceRequest| {
        let (_handle, receiver) = submit(&engine, asked);
        let told = receiver.iter().filter_map(|event| match event {
            SequenceEvent::Token { id, logprobs, .. } => Some((id, logprobs.unwrap())),
            _ => None,
        });
        told.collect::<Vec<_>>()
    };
    let asked = request(prompt, 15, sampled(3));
    let whole = told(asked.clone());
    assert_eq!(whole.len(), 15);
    let ids: Vec<u32> = prompt.iter().copied().chain(whole.iter().map(|(id, _)| *id)).collect();
    let score = SequenceRequest { output: Output::Score, ..request(&ids, 1, sampled(0)) };
    let (_handle, receiver) = submit(&engine, score);
    let scores = receiver.iter().find_map(|event| match event {
        SequenceEvent::Scores(scores) => Some(scores),
        _ => None,
    });
    let scores = scores.unwrap();
    for (index, (id, logprobs)) in whole.iter().enumerate() {
        let row = prompt.len() + index - 1;
        assert_eq!(logprobs.logprob.to_bits(), scores.logprobs[row].to_bits(), "{index}");
        assert_eq!(logprobs.top.len(), 3);
        assert_eq!(logprobs.top[0].0, scores.top_ids[row]);
        assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
        let own = logprobs.top.iter().find(|(top, _)| top == id);
        assert!(own.is_none_or(|(_, logprob)| logprob.to_bits() == logprobs.logprob.to_bits()));
    }
    for cut in [1, 7, 14] {
        let resumed = ids[prompt.len()..][..cut].to_vec();
        assert_eq!(told(SequenceRequest { resumed, ..asked.clone() }), whole[cut..]);
    }
}
