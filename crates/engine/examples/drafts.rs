//! What drafts gain and cost: tokens per second of one stream with drafts of which a given share is
//! right, and with those looked up in the text itself, beside the speed without any.
//!
//! ```text
//! cargo run --release -p tercet-engine --example drafts -- [MODEL] [TOKENS]
//! ```
//!
//! All are measured in turns, and have to give the same tokens. Without a model, it is the built-in one.
#![expect(clippy::print_stdout, reason = "it is a report")]
#![expect(clippy::disallowed_types, reason = "real time is what it measures")]

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use tercet_engine::{
    Drafter, Engine, EngineOptions, ModelFile, Output, SamplingParams, SequenceEvent,
    SequenceRequest, demo,
    drafter::{Forced, PromptLookup},
};

/// Times that each way is measured.
const ROUNDS: usize = 3;
/// Most drafts of a sequence in a step.
const MOST: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next();
    let tokens = args.next().map_or(Ok(64), |tokens| tokens.parse())?;
    let model = path.as_ref().map_or_else(demo::model, |path| ModelFile::open(path.as_ref()))?;
    let options = EngineOptions { threads: 2, kv_bytes: 1 << 29, ..EngineOptions::default() };
    let engine = Engine::load(&model, &options)?;
    let counts: Arc<[AtomicUsize; 2]> = Arc::default();
    let sums = Arc::clone(&counts);
    engine.observe_steps(Box::new(move |report| {
        sums[0].fetch_add(report.tally.drafted, Ordering::Relaxed);
        sums[1].fetch_add(report.tally.accepted, Ordering::Relaxed);
    }));
    let prompt: Vec<u32> = (0..24).map(|i| 1 + i * i * 37 % 1000).collect();
    generate(&engine, &prompt, 8)?;
    let (text, _) = generate(&engine, &prompt, tokens)?;
    let whole = [&prompt[..], &text].concat();
    let forced = |acceptance| -> Option<Box<dyn Drafter>> {
        Some(Box::new(Forced::new(vec![whole.clone()], acceptance, 1)))
    };
    let mut speeds = vec![Vec::new(); 6];
    for _ in 0..ROUNDS {
        let ways = [
            ("none", None),
            ("0% right", forced(0.0)),
            ("50% right", forced(0.5)),
            ("80% right", forced(0.8)),
            ("100% right", forced(1.0)),
            ("lookup", Some(Box::new(PromptLookup) as Box<dyn Drafter>)),
        ];
        for ((name, drafter), speeds) in ways.into_iter().zip(&mut speeds) {
            engine.draft_with(drafter, MOST);
            let before = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
            let (got, speed) = generate(&engine, &prompt, tokens)?;
            assert_eq!(got, text, "drafts change no token");
            // The last step tells what the one before it came to.
            generate(&engine, &prompt, 1)?;
            let [drafted, accepted] = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
            speeds.push(speed);
            println!(
                "{name:>10}  {speed:8.2} tokens/s  {:4} drafted {:4} accepted",
                drafted - before[0],
                accepted - before[1]
            );
        }
    }
    for speeds in &mut speeds {
        speeds.sort_by(f64::total_cmp);
    }
    let none = speeds[0][ROUNDS / 2];
    let ratios: Vec<_> =
        speeds.iter().map(|speeds| format!("{:.3}", speeds[ROUNDS / 2] / none)).collect();
    println!("medians against none: {}", ratios.join(" "));
    Ok(())
}

/// Returns a completion and the tokens per second after its first.
fn generate(
    engine: &Engine,
    prompt: &[u32],
    tokens: usize,
) -> Result<(Vec<u32>, f64), Box<dyn Error>> {
    let request = SequenceRequest {
        prompt: prompt.to_vec(),
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        output: Output::Generate { max_tokens: tokens, stop_ids: Vec::new() },
        traceparent: String::new(),
        cache_salt: String::new(),
    };
    let (sender, events) = mpsc::channel();
    let sink = move |event| drop(sender.send((Instant::now(), event)));
    let _handle = engine.submit(request, Box::new(sink))?;
    let mut text = Vec::new();
    let mut times = Vec::new();
    for (at, event) in events {
        if let SequenceEvent::Token { id, .. } = event {
            text.push(id);
            times.push(at);
        }
    }
    let took = match (times.first(), times.last()) {
        (Some(first), Some(last)) => (*last - *first).as_secs_f64(),
        _ => return Err("no token came".into()),
    };
    let speed = (text.len() - 1) as f64 / took;
    Ok((text, speed))
}
