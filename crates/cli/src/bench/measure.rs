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
    pub(super) fn new(args: &BenchArgs) -> Self {
        Self {
            prompt: args.prompt.get(),
            generate: args.generate,
            batch: args.batch.map_or(1, NonZeroUsize::get),
            repeat: args.repeat.get(),
            chunk: args.engine.prefill_chunk.get(),
        }
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

/// Returns how long the prefill took, and the decode if there is one.
pub(super) fn measure(
    engine: &Engine,
    load: &Load,
    round: usize,
) -> Result<(Duration, Option<Duration>)> {
    if load.generate == 0 {
        return Ok((watch(engine, load, round, 0)?.0, None));
    }
    let (mut prefill, decode) = watch(engine, load, round, load.generate)?;
    if load.batch > 1 {
        prefill = watch(engine, load, round, 0)?.0;
    }
    Ok((prefill, Some(decode)))
}

/// Computes one batch until each sequence has `generate` tokens after the prefill. Returns how long
/// the prefill took and how long what came after it.
pub(super) fn watch(
    engine: &Engine,
    load: &Load,
    round: usize,
    generate: usize,
) -> Result<(Duration, Duration)> {
    let (sender, events) = channel();
    let (gate, closed) = channel::<()>();
    let mut closed = Some(closed);
    let mut handles = Vec::with_capacity(load.batch);
    for index in 0..load.batch {
        let request = SequenceRequest {
            prompt: prompt(load.prompt, engine.config().vocab, round * load.batch + index),
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

    let mut started = 0;
    let mut prefilled = None;
    let mut generated = vec![0; load.batch];
    let mut lacking = load.batch;
    let mut done = None;
    // Goes on after the end until every sink is gone: the next batch starts on an idle engine.
    for Event { sequence, at, what } in events {
        match what {
            SequenceEvent::Token { index, .. } => {
                if prefilled.is_some() {
                    generated[sequence] += 1;
                    lacking -= usize::from(generated[sequence] == generate);
                } else {
                    started += usize::from(index == 0);
                    prefilled = (started == load.batch).then_some(at);
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
        (Some(prefilled), Some(done)) => Ok((prefilled - start, done - prefilled)),
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

    fn load(line: &str) -> Load {
        let Command::Bench(args) = Cli::parse_from(line.split(' ')).command else {
            panic!("{line} is a bench")
        };
        Load::new(&args)
    }

    #[test]
    fn every_sequence_stays_in_the_window() {
        let load = load("tercet bench --prompt 200 --generate 10 --batch 4 --prefill-chunk 64");
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
            let load = load(line);
            let options = EngineOptions {
                kv_bytes: load.kv_bytes(&model.config),
                max_sequences: load.batch,
                prefill_chunk: load.chunk,
                prefill_stretch: f64::MAX,
                ..EngineOptions::default()
            };
            let engine = Engine::load(&model, &options).unwrap();
            let (prefill, decode) = measure(&engine, &load, 0).unwrap();
            assert!(prefill > Duration::ZERO, "{line}");
            assert_eq!(decode.is_some(), load.generate > 0, "{line}");
            assert!(decode.is_none_or(|decode| decode > Duration::ZERO), "{line}");
        }
    }
}
