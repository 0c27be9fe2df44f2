//! Measures what a long prompt does to the streams beside it.
//!
//! ```text
//! cargo run --release -p tercet-engine --example stall -- MODEL.gguf \
//!     [--threads 2] [--streams 8] [--prompt 1500] [--stretch 1.6]
//! ```
//!
//! Without such a file, one of the shape `125m` is made up there. The streams decode alone for a
//! while, then the prompt arrives; gaps between the tokens of each stream are counted before it and
//! until its first token. A very large stretch shows what happens without the limit.

#![expect(clippy::print_stdout, reason = "it is a report")]
#![expect(clippy::disallowed_types, reason = "real time is what it measures")]

use std::{
    env,
    error::Error,
    fmt,
    path::Path,
    sync::mpsc::{self, Receiver, Sender},
    time::{Duration, Instant},
};

use tercet_engine::{
    Engine, EngineOptions, ModelFile, Output, SamplingParams, SequenceEvent, SequenceHandle,
    SequenceRequest, SubmitError,
    model_file::synth::{self, HeadType, Shape, SizeOverrides, SynthOptions, TernaryType},
};

/// Tokens of each stream before its gaps count.
const WARM: usize = 24;
/// Tokens of each stream that count before the long prompt comes.
const BEFORE: usize = 100;
/// Prompt tokens of a stream.
const SHORT: usize = 32;

/// Number of the stream, when, and what happened.
type Told = (usize, Instant, SequenceEvent);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().ok_or("name a model file; it is made up if there is none")?;
    let (mut threads, mut streams, mut prompt, mut stretch) = (2, 8, 1500, 1.6);
    while let (Some(option), Some(value)) = (arguments.next(), arguments.next()) {
        match option.as_str() {
            "--threads" => threads = value.parse()?,
            "--streams" => streams = value.parse()?,
            "--prompt" => prompt = value.parse()?,
            "--stretch" => stretch = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    let path = Path::new(&path);
    if !path.exists() {
        let options = SynthOptions {
            sizes: SizeOverrides::default(),
            shape: Shape::Small125M,
            ternary: TernaryType::I2S,
            head: HeadType::F16,
            seed: 1,
            overwrite: false,
        };
        synth::write(&options, path, &mut |_| {})?;
    }
    let options = EngineOptions {
        threads,
        kv_bytes: 2 << 30,
        max_sequences: streams + 1,
        prefill_stretch: stretch,
        ..EngineOptions::default()
    };
    let engine = Engine::load(&ModelFile::open(path)?, &options)?;
    let (told, events) = mpsc::channel();
    let mut gaps = Gaps { last: vec![None; streams], counts: vec![0; streams], all: Vec::new() };
    let _streams = (0..streams)
        .map(|stream| submit(&engine, stream, SHORT, usize::MAX, &told))
        .collect::<Result<Vec<_>, _>>()?;
    gaps.collect(&events, streams, |gaps| gaps.counts.iter().all(|count| *count > WARM))?;
    gaps.all.clear();
    gaps.collect(&events, streams, |gaps| gaps.counts.iter().all(|count| *count > WARM + BEFORE))?;
    let before = Summary::of(&mut gaps.all);
    let begun = Instant::now();
    let _long = submit(&engine, streams, prompt, 1, &told)?;
    gaps.collect(&events, streams, |_| false)?;
    let took = begun.elapsed();
    let during = Summary::of(&mut gaps.all);
    println!("alone:  {before}");
    println!("beside: {during}, until the first token of {prompt} after {took:.1?}");
    println!(
        "ratio:  p50 {:.2}, p99 {:.2}",
        during.p50.as_secs_f64() / before.p50.as_secs_f64(),
        during.p99.as_secs_f64() / before.p99.as_secs_f64(),
    );
    Ok(())
}

/// Begins a sequence of made-up tokens.
fn submit(
    engine: &Engine,
    number: usize,
    length: usize,
    max_tokens: usize,
    told: &Sender<Told>,
) -> Result<SequenceHandle, SubmitError> {
    let vocab = engine.config().vocab;
    let ids = (0..length).map(|i| u32::try_from((i * 7919 + number * 104_729) % vocab));
    let request = SequenceRequest {
        prompt: ids.collect::<Result<_, _>>().unwrap_or_default(),
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        output: Output::Generate { max_tokens, stop_ids: Vec::new() },
        traceparent: String::new(),
        cache_salt: String::new(),
    };
    let told = told.clone();
    // Nobody listens any more once the report is made.
    let sink = move |event| told.send((number, Instant::now(), event)).unwrap_or_default();
    engine.submit(request, Box::new(sink))
}

/// Times between the tokens of each stream.
struct Gaps {
    last: Vec<Option<Instant>>,
    counts: Vec<usize>,
    all: Vec<Duration>,
}

impl Gaps {
    /// Collects gaps until `enough`, or until the sequence after the streams has a token.
    fn collect(
        &mut self,
        events: &Receiver<Told>,
        streams: usize,
        enough: impl Fn(&Self) -> bool,
    ) -> Result<(), Box<dyn Error>> {
        while !enough(self) {
            let (number, at, event) = events.recv()?;
            match event {
                SequenceEvent::Token { .. } if number == streams => return Ok(()),
                SequenceEvent::Token { .. } => {
                    let last = self.last[number].replace(at);
                    self.all.extend(last.map(|last| at - last));
                    self.counts[number] += 1;
                }
                SequenceEvent::Scheduled { .. } => {}
                // The long one may be done in the same step as its token.
                SequenceEvent::Finished(_) if number == streams => return Ok(()),
                other => return Err(format!("stream {number} ended early: {other:?}").into()),
            }
        }
        Ok(())
    }
}

struct Summary {
    p50: Duration,
    p99: Duration,
    max: Duration,
    count: usize,
}

impl Summary {
    /// Sums `gaps` up and empties them.
    fn of(gaps: &mut Vec<Duration>) -> Self {
        gaps.sort_unstable();
        let quantile = |percent: usize| gaps[(gaps.len() - 1) * percent / 100];
        let (p50, p99, max) = (quantile(50), quantile(99), quantile(100));
        Self { p50, p99, max, count: std::mem::take(gaps).len() }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50, p99, max, count } = self;
        write!(f, "p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?} of {count} gaps")
    }
}
