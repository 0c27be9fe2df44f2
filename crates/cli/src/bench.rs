//! `tercet bench`: prefill and decode speed of the engine, without sockets.
//!
//! ```text
//! prefill: submit all prompts .......... last first token        batch x prompt tokens
//! decode:            last first token .. `generate` steps later  batch x generate tokens
//! ```
//!
//! The decode window opens when every sequence has its first token, so that each step in it has the
//! whole batch and no prompt rows. With more than one sequence, early ones would decode beside late
//! prompts and slow the prefill down, so it gets a run of its own that ends at the first tokens.

mod measure;
mod recommend;
mod report;
mod resident;

use std::{
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, anyhow};
use tercet_engine::{Engine, EngineOptions, ModelFile, ScreenTally, bandwidth::ReadBuffer, demo};
use tokio::time::Instant;

use self::{
    measure::{Load, Numbers, Seen, measure},
    recommend::recommend,
    report::{Loading, Machine, Point, Report, Screened, Spread},
    resident::{peak_bytes, resident_bytes},
};
use crate::{
    args::BenchArgs,
    failure::{misconfigured, no_model},
    output::{print, print_line},
    profile,
};

/// Times that memory is read to see how fast that goes, with each number of threads.
const PASSES: usize = 9;

/// Runs `tercet bench`.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let begun = Instant::now();
    let model = open(args.model.as_deref())?;
    let opened = begun.elapsed();
    let loads = Load::all(args);
    check(args, &loads, &model)?;
    let first = loads.first().context("measure at least one load")?;
    let options = options(args, args.engine.threads(), &loads, &model);
    let engine = Engine::load(&model, &options).map_err(misconfigured)?;
    let loaded = begun.elapsed();

    let screened = Arc::new(Mutex::new(ScreenTally::default()));
    let tally = Arc::clone(&screened);
    engine.observe_steps(Box::new(move |report| *lock(&tally) += report.screen));
    let mut numbers = Numbers::default();
    let mut points = Vec::with_capacity(loads.len());
    // Faults the weights in and wakes the threads up.
    let waking = measure(&engine, &first.short(), &mut numbers)?;
    for (index, load) in loads.iter().enumerate() {
        // Makes room for the rows of the load.
        if index > 0 {
            measure(&engine, &load.short(), &mut numbers)?;
        }
        *lock(&screened) = ScreenTally::default();
        let seen: Result<Vec<Seen>> =
            (0..load.repeat).map(|_| measure(&engine, load, &mut numbers)).collect();
        let seen = seen?;
        let ScreenTally { tokens, rows, fallbacks } = *lock(&screened);
        let screen = engine.screen_bytes().map(|bytes| Screened {
            bytes: bytes as u64,
            tokens,
            rows,
            fallbacks,
        });
        points.push(Point::new(*load, &seen, screen).context("measure at least once")?);
    }
    let summary = model.summary();
    let loading = Loading {
        open_seconds: opened.as_secs_f64(),
        load_seconds: (loaded - opened).as_secs_f64(),
        first_token_seconds: (loaded + waking.soonest()).as_secs_f64(),
        weight_bytes: report::weight_bytes(&summary) + engine.screen_bytes().unwrap_or(0) as u64,
        kv_bytes: engine.kv_bytes() as u64,
        resident_bytes: resident_bytes(),
        peak_resident_bytes: peak_bytes(),
    };
    let isa = engine.isa();
    // Two engines at once would compute on the same CPUs.
    drop(engine);
    let report = Report {
        summary,
        isa,
        threads: options.threads,
        points,
        loading,
        machine: machine(options.threads)?,
        recommendation: if args.batch.is_empty() && first.generate > 0 {
            recommend(args, &model)?
        } else {
            None
        },
    };
    if args.json {
        print_line(&serde_json::to_string_pretty(&report.to_json()?).context("write JSON")?)?;
    } else {
        print(&report.to_string())?;
    }
    Ok(())
}

fn lock(tally: &Mutex<ScreenTally>) -> MutexGuard<'_, ScreenTally> {
    // Numbers are whole whoever panics.
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: Option<&Path>) -> Result<ModelFile> {
    path.map_or_else(demo::model, ModelFile::open).map_err(no_model)
}

/// Refuses what the model or the machine has no room for.
fn check(args: &BenchArgs, loads: &[Load], model: &ModelFile) -> Result<()> {
    let memory = profile::Machine::here(args.model.as_slice()).memory;
    for load in loads {
        if load.positions() > model.config.context {
            return Err(misconfigured(anyhow!(
                "a prompt of {} and up to {} generated tokens do not fit the model's context of \
                 {}: lower --prompt, --generate or --batch",
                load.prompt,
                load.most_generated(),
                model.config.context
            )));
        }
        let kv_bytes = load.kv_bytes(&model.config) as u64;
        if kv_bytes > memory {
            return Err(misconfigured(anyhow!(
                "the keys and values of {} sequences of {} tokens take {} MiB, but {} MiB of \
                 memory are available: lower --prompt, --generate or --batch",
                load.batch,
                load.positions(),
                kv_bytes >> 20,
                memory >> 20
            )));
        }
    }
    Ok(())
}

/// Reads memory with one thread and with as many as compute.
fn machine(threads: usize) -> Result<Machine> {
    let buffer = ReadBuffer::new().context("get memory to read")?;
    let mut counts = vec![1, threads];
    counts.dedup();
    let rates = counts.into_iter().filter_map(|threads| {
        // The first pass wakes the threads up.
        let rates = buffer.read(threads, PASSES + 1).split_off(1);
        Some((threads, Spread::of(rates)?))
    });
    Ok(Machine {
        cpu: report::cpu(),
        cpus: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        read_buffer_bytes: buffer.bytes() as u64,
        read_bytes_per_second: rates.collect(),
    })
}

/// Returns the options of an engine that computes any of `loads` with so many threads.
fn options(args: &BenchArgs, threads: usize, loads: &[Load], model: &ModelFile) -> EngineOptions {
    let most = |of: &dyn Fn(&Load) -> usize| loads.iter().map(of).max().unwrap_or(1);
    let batch = most(&|load| load.batch);
    EngineOptions {
        threads,
        isa: args.engine.isa,
        head_screen: args.engine.head_screen,
        layers: None,
        context: None,
        kv_bytes: most(&|load| load.kv_bytes(&model.config)),
        max_sequences: batch,
        // The engine counts those it is about to admit as well.
        max_waiting: 2 * batch,
        prefill_chunk: args.engine.prefill_chunk.get(),
        placement: args.engine.weights,
        // How long early ones decode beside late prompts is counted on.
        prefill_stretch: f64::MAX,
        ..EngineOptions::default()
    }
}
