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

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use tercet_engine::{Engine, EngineOptions, ModelFile, demo};

use self::{
    measure::{Load, measure},
    recommend::recommend,
    report::{Report, Spread},
};
use crate::{
    args::BenchArgs,
    failure::{misconfigured, no_model},
    output::{print, print_line},
};

/// Runs `tercet bench`.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let model = open(args.model.as_deref())?;
    let load = Load::new(args);
    if load.positions() > model.config.context {
        return Err(misconfigured(anyhow!(
            "a prompt of {} and up to {} generated tokens do not fit the model's context of {}: \
             lower --prompt, --generate or --batch",
            load.prompt,
            load.most_generated(),
            model.config.context
        )));
    }
    let options = options(args, args.engine.threads(), &load, &model);
    let engine = Engine::load(&model, &options).map_err(misconfigured)?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=args.repeat.get() {
        let (prefilled, decoded) = measure(&engine, &load, round)?;
        // The first round faults the weights in and wakes the threads up.
        if round > 0 {
            prefill.push((load.batch * load.prompt) as f64 / prefilled.as_secs_f64());
            decode.extend(
                decoded.map(|took| (load.batch * load.generate) as f64 / took.as_secs_f64()),
            );
        }
    }
    let isa = engine.isa();
    // Two engines at once would compute on the same CPUs.
    drop(engine);
    let report = Report {
        summary: model.summary(),
        isa,
        threads: options.threads,
        load,
        prefill: Spread::of(prefill).context("measure at least once")?,
        decode: Spread::of(decode),
        recommendation: match args.batch {
            None if load.generate > 0 => recommend(args, &model)?,
            _ => None,
        },
    };
    if args.json {
        print_line(&serde_json::to_string_pretty(&report.to_json()).context("write JSON")?)?;
    } else {
        print(&report.to_string())?;
    }
    Ok(())
}

fn open(path: Option<&Path>) -> Result<ModelFile> {
    path.map_or_else(demo::model, ModelFile::open).map_err(no_model)
}

/// Returns the options of an engine that computes `load` with so many threads.
fn options(args: &BenchArgs, threads: usize, load: &Load, model: &ModelFile) -> EngineOptions {
    EngineOptions {
        threads,
        isa: args.engine.isa,
        layers: None,
        context: None,
        kv_bytes: load.kv_bytes(&model.config),
        max_sequences: load.batch,
        // The engine counts those it is about to admit as well.
        max_waiting: 2 * load.batch,
        prefill_chunk: load.chunk,
        placement: args.engine.weights,
        // How long early ones decode beside late prompts is counted on.
        prefill_stretch: f64::MAX,
        ..EngineOptions::default()
    }
}
