//! One measurement: a batch, computed and timed.

use std::{
    num::NonZeroUsize,
    sync::mpsc::{Receiver, Sender, channel},
};

use anyhow::{Context as _, Result, bail};
use tercet_engine::{
    Engine, ModelConfig, Output, PAGE_POSITIONS, SamplingParams, SequenceEvent, SequenceRequest,
};
use tokio::time::{Duration, Instant};

use crate::args::BenchArgs;

/// Tokens of a prompt, and generated after it, that warm an engine up.
const WARM: (usize, usize) = (512, 8);

/// What is computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) prompt: usize,
    pub(super) generate: usize,
    pub(super) batch: usize,
    pub(super) repeat: usize,
    pub(super) chunk: usize,
}

impl Load {
    /// Returns what is asked for: each prompt with each batch.
    pub(super) fn all(args: &BenchArgs) -> Vec<Self> {
        let alone = [NonZeroUsize::MIN];
        let batches = if args.batch.is_empty() { alone.as_slice() } else { &args.batch };
        let of_prompt = |prompt: &NonZeroUsize| {
            let load = Self {
                prompt: prompt.get(),
                generate: args.generate,
                batch: 1,
                repeat: args.repeat.get(),
                chunk: args.engine.prefill_chunk.get(),
            };
            batches.iter().map(move |batch| Self { batch: batch.get(), ..load })
        };
        args.prompt.iter().flat_map(of_prompt).collect()
    }

    /// Returns as much of the load as warms an engine up for it.
    pub(super) fn short(&self) -> Self {
        let (prompt, generate) = (self.prompt.min(WARM.0), self.generate.min(WARM.1));
        Self { prompt, generate, ..*self }
    }

    /// Returns the tokens that the first sequence may be ahead of the last one.
    fn head_start(&self) -> usize {
        self.batch * self.prompt.div_ceil(self.chunk) + 1
    }

    pub(super) fn most_generated(&self) -> usize {
        self.head_start() + self.generate
    }

    pub(super) fn positions(&self) -> usize {
        self.prompt + self.most_generated()
    }

    /// Returns the memory that keeps every sequence whole.
    pub(super) fn kv_bytes(&self, config: &ModelConfig) -> usize {
        let pages = self.batch * (self.positions().div_ceil(PAGE_POSITIONS) + 1);
        let position_bytes = config.layers * 2 * config.kv_width() * size_of::<f32>();
        pages * PAGE_POSITIONS * position_bytes
    }
}

/// What was seen of a batch.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Until every sequence had its first token.
    pub(super) prefill: Duration,
    /// From then until each had as many more as were asked for.
    pub(super) decode: Duration,
    /// Until the first token of each sequence.
    pub(super) first_tokens: Vec<Duration>,
    /// Tokens of each sequence during the decode.
    pub(super) tokens: Vec<usize>,
}

impl Seen {
    /// Returns the time until the first token of any sequence.
    pub(super) fn soonest(&self) -> Duration {
        self.first_tokens.iter().min().copied().unwrap_or_default()
    }
}

/// Numbers the prompts of an engine, so that no two have the same number: it keeps the keys and
/// values of those it has read.
#[derive(Debug, Default)]
pub(super) struct Numbers(usize);

impl Numbers {
    fn take(&mut self, count: usize) -> usize {
        let first = self.0;
        self.0 += count;
        first
    }
}

/// Measures once: the prefill, and the decode if anything is generated.
pub(super) fn measure(engine: &Engine, load: &Load, numbers: &mut Numbers) -> Result<Seen> {
    let mut seen = watch(engine, load, numbers)?;
    if load.batch > 1 && load.generate > 0 {
        let prefill = watch(engine, &Load { generate: 0, ..*load }, numbers)?;
        seen = Seen { prefill: prefill.prefill, first_tokens: prefill.first_tokens, ..seen };
    }
    Ok(seen)
}

/// Computes one batch until each sequence has as many tokens as are asked for after the prefill.
pub(super) fn watch(engine: &Engine, load: &Load, numbers: &mut Numbers) -> Result<Seen> {
    let generate = load.generate;
    let first = numbers.take(load.batch);
    let (sender, events) = channel();
    let (gate, closed) = channel::<()>();
    let mut closed = Some(closed);
    let mut handles = Vec::with_capacity(load.batch);
    for index in 0..load.batch {
        let request = SequenceRequest {
            prompt: prompt(load.prompt, engine.config().vocab, first + index),
            resumed: Vec::new(),
            sampling: SamplingParams::greedy(),
            output: Output::Generate {
                max_tokens: if generate == 0 { 1 } else { load.most_generated() },
                stop_ids: Vec::new(),
            },
            traceparent: String::new(),
            cache_salt: String::new(),
        };
        let sink = sink(index, Sender::clone(&sender), closed.take());
        handles.push(engine.submit(request, Box::new(sink)).context("submit a sequence")?);
    }
    drop(sender);
    let start = Instant::now();
    drop(gate);

    let mut first_tokens = Vec::with_capacity(load.batch);
    let mut prefilled = None;
    let mut generated = vec![0; load.batch];
    let mut lacking = load.batch;
    let mut done = None;
    // Goes on after the end until every sink is gone: the next batch starts on an idle engine.
    for Event { sequence, at, what } in events {
        match what {
            SequenceEvent::Token { index, .. } => {
                if prefilled.is_none() {
                    if index == 0 {
                        first_tokens.push(at - start);
                    }
                    prefilled = (first_tokens.len() == load.batch).then_some(at);
                } else if done.is_none() {
                    generated[sequence] += 1;
                    lacking -= usize::from(generated[sequence] == generate);
                }
                if prefilled.is_some() && (generate == 0 || lacking == 0) && done.is_none() {
                    done = Some(at);
                    handles.clear();
                }
            }
            SequenceEvent::Failed(failure) => return Err(failure.into()),
            SequenceEvent::Scheduled { .. }
            | SequenceEvent::Finished(_)
            | SequenceEvent::Scores(_) => {}
        }
    }
    match (prefilled, done) {
        (Some(prefilled), Some(done)) => Ok(Seen {
            prefill: prefilled - start,
            decode: done - prefilled,
            first_tokens,
            tokens: generated,
        }),
        _ => bail!("the engine ended before the measurement did"),
    }
}

/// What a sink saw.
struct Event {
    sequence: usize,
    at: Instant,
    what: SequenceEvent,
}

/// Returns a sink that notes the time on the compute thread, not when someone reads of it.
///
/// The first sequence's sink holds that thread up, before its first step, until `gate` is dropped:
/// all prompts are there then, and none has a head start.
fn sink(
    sequence: usize,
    events: Sender<Event>,
    mut gate: Option<Receiver<()>>,
) -> impl FnMut(SequenceEvent) + Send {
    move |what| {
        if let Some(gate) = gate.take() {
            // An error is how a dropped gate looks.
            gate.recv().unwrap_or_default();
        }
        // Nobody listens any more when a measurement has failed.
        drop(events.send(Event { sequence, at: Instant::now(), what }));
    }
}

/// Makes up ids: no two prompts share a prefix that a cache could use.
fn prompt(length: usize, vocab: usize, number: usize) -> Vec<u32> {
    // SplitMix64, seeded by the number of the prompt.
    let mut state = (number as u64) << 32;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let id = |draw: u64| u32::try_from(draw % vocab as u64).unwrap_or(0);
    (0..length).map(|_| id(next())).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use tercet_engine::{EngineOptions, demo};

    use super::*;
    use crate::args::{Cli, Command};

    fn loads(line: &str) -> Vec<Load> {
        let Command::Bench(args) = Cli::parse_from(line.split(' ')).command else {
            panic!("{line} is a bench")
        };
        Load::all(&args)
    }

    #[test]
    fn each_prompt_meets_each_batch() {
        let sizes = |line: &str| -> Vec<_> {
            loads(line).iter().map(|load| (load.prompt, load.batch)).collect()
        };
        let all = [(8, 1), (8, 4), (9, 1), (9, 4)];
        assert_eq!(sizes("tercet bench --prompt 8,9 --batch 1,4"), all);
        assert_eq!(sizes("tercet bench"), [(128, 1)]);
    }

    #[test]
    fn every_sequence_stays_in_the_window() {
        let line = "tercet bench --prompt 200 --generate 10 --batch 4 --prefill-chunk 64";
        let load = loads(line)[0];
        assert_eq!(load.head_start(), 17);
        assert_eq!(load.positions(), 200 + 17 + 10);
    }

    #[test]
    fn prompts_differ_and_repeat() {
        assert_eq!(prompt(16, 1000, 3), prompt(16, 1000, 3));
        assert_ne!(prompt(1, 1 << 20, 3), prompt(1, 1 << 20, 4));
        assert!(prompt(1000, 7, 0).iter().all(|id| *id < 7));
    }

    #[test]
    fn both_phases_are_timed_on_the_built_in_model() {
        let model = demo::model().unwrap();
        for line in [
            "tercet bench --prompt 9 --generate 3 --batch 3 --prefill-chunk 4",
            "tercet bench --prompt 9 --generate 3 --batch 1",
            "tercet bench --prompt 2 --generate 0 --batch 2",
        ] {
            let load = loads(line)[0];
            let options = EngineOptions {
                kv_bytes: load.kv_bytes(&model.config),
                max_sequences: load.batch,
                prefill_chunk: load.chunk,
                prefill_stretch: f64::MAX,
                ..EngineOptions::default()
            };
            let engine = Engine::load(&model, &options).unwrap();
            let mut numbers = Numbers::default();
            let seen = measure(&engine, &load, &mut numbers).unwrap();
            assert!(seen.prefill > Duration::ZERO, "{line}");
            assert_eq!(seen.first_tokens.len(), load.batch, "{line}");
            assert_eq!(seen.first_tokens.iter().max(), Some(&seen.prefill), "{line}");
            assert_eq!(seen.decode > Duration::ZERO, load.generate > 0, "{line}");
            assert_eq!(seen.tokens.len(), load.batch, "{line}");
            assert!(seen.tokens.iter().all(|tokens| *tokens >= load.generate), "{line}");
            assert!(numbers.0 >= load.batch, "{line}");
        }
    }

    #[test]
    fn no_prefill_is_read_from_the_cache() {
        let model = demo::model().unwrap();
        // Longer than a page, and with pages to spare.
        let load = loads("tercet bench --prompt 200 --generate 2 --batch 2")[0];
        let options = EngineOptions {
            max_sequences: load.batch,
            prefill_stretch: f64::MAX,
            ..EngineOptions::default()
        };
        let engine = Engine::load(&model, &options).unwrap();
        let (sender, hits) = channel();
        engine.observe_steps(Box::new(move |report| sender.send(report.tally.hit_tokens).unwrap()));
        let mut numbers = Numbers::default();
        for _ in 0..2 {
            measure(&engine, &load, &mut numbers).unwrap();
        }
        drop(engine);
        let hits: Vec<_> = hits.iter().collect();
        assert!(hits.len() > 4 && hits.iter().all(|hits| *hits == 0), "{hits:?}");
    }
}
