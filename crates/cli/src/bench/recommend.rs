//! Settings for a server, from what is measured: threads first, then sequences at once.

use std::fmt;

use anyhow::{Context as _, Result};
use serde::{Serialize, Serializer};
use tercet_engine::{Engine, ModelConfig, ModelFile};
use tokio::time::{Duration, Instant};

use super::{
    measure::{Load, Numbers, watch},
    options,
    report::Spread,
};
use crate::{
    args::BenchArgs,
    failure::misconfigured,
    profile::{Machine, Profile},
};

/// Most sequences tried at once.
const MOST_SEQUENCES: usize = 64;
/// Tokens of the prompts when decoding is measured.
const PROMPT: usize = 4;
/// Tokens decoded, by one sequence and by each of several.
const DECODED: [usize; 2] = [16, 8];
/// A measurement is repeated until it has taken so long.
const ENOUGH: Duration = Duration::from_millis(250);
/// What is within this share of the most is as good.
const AS_GOOD: f64 = 0.95;
/// What twice the sequences must bring; more are tried until they have not brought it twice.
const WORTHWHILE: f64 = 1.05;
/// Tokens of a sequence when its memory is counted.
const TYPICAL: usize = 1024;

/// What was measured with so many threads and sequences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    threads: usize,
    batch: usize,
    /// Of all sequences together.
    decode_tokens_per_second: f64,
    /// Of one prompt.
    prefill_tokens_per_second: Option<f64>,
}

/// Settings for a server of this model on this machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Recommendation {
    #[serde(serialize_with = "name")]
    profile: Profile,
    threads: usize,
    max_sequences: usize,
    /// For the keys and values of so many sequences of [`TYPICAL`] tokens.
    kv_bytes: usize,
    /// CPUs of the machine.
    cpus: usize,
    measured: Vec<Point>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn name<S: Serializer>(profile: &Profile, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(profile.name())
}

/// Measures, unless the model has no room for it, and draws the conclusions.
pub(super) fn recommend(args: &BenchArgs, model: &ModelFile) -> Result<Option<Recommendation>> {
    let machine = Machine::here(args.model.as_slice());
    let chunk = args.engine.prefill_chunk.get();
    let load = |batch| {
        let generate = DECODED[usize::from(batch > 1)];
        Load { prompt: PROMPT, generate, batch, repeat: 1, chunk }
    };
    let fits = |batch: &usize| {
        let load = load(*batch);
        load.positions() <= model.config.context
            && load.kv_bytes(&model.config) as u64 <= machine.memory / 4
    };
    let doubled = std::iter::successors(Some(1), |batch| Some(2 * batch));
    let batches: Vec<usize> =
        doubled.take_while(|batch| *batch <= MOST_SEQUENCES).take_while(fits).collect();
    let first_prompt = args.prompt.first().map_or(PROMPT, |prompt| prompt.get());
    let Some(most) = batches.last().map(|most| load(*most)) else { return Ok(None) };

    let mut measured = Vec::new();
    for threads in thread_counts(args.engine.threads_given(), machine.cpus) {
        let engine = Engine::load(model, &options(args, threads, &[most], model));
        let engine = engine.map_err(misconfigured)?;
        let prompt = Load { prompt: first_prompt, generate: 0, ..load(1) };
        let mut numbers = Numbers::default();
        let prefill = rate(&engine, &prompt, &mut numbers, false)?;
        let decode = rate(&engine, &load(1), &mut numbers, true)?;
        measured.push(Point {
            threads,
            batch: 1,
            decode_tokens_per_second: decode,
            prefill_tokens_per_second: Some(prefill),
        });
    }
    let threads = fewest(&measured, |point| point.threads).context("measure some threads")?;
    let engine = Engine::load(model, &options(args, threads, &[most], model));
    let engine = engine.map_err(misconfigured)?;
    let mut best = measured.iter().find(|point| point.threads == threads).map_or(0.0, of_all);
    let mut in_vain = 0;
    let mut numbers = Numbers::default();
    for batch in batches.into_iter().skip(1) {
        let decode = rate(&engine, &load(batch), &mut numbers, batch > 2)?;
        measured.push(Point {
            threads,
            batch,
            decode_tokens_per_second: decode,
            prefill_tokens_per_second: None,
        });
        in_vain = if decode < WORTHWHILE * best { in_vain + 1 } else { 0 };
        if in_vain == 2 {
            break;
        }
        best = best.max(decode);
    }
    Ok(conclude(measured, threads, &machine, &model.config))
}

/// Returns the numbers of threads to try: all CPUs, a half and a quarter, or the one given.
fn thread_counts(given: Option<usize>, cpus: usize) -> Vec<usize> {
    let mut counts = given.map_or_else(|| vec![cpus / 4, cpus / 2, cpus], |given| vec![given]);
    counts.retain(|count| *count > 0);
    counts.dedup();
    counts
}

/// Returns the tokens per second of decoding, or of the prefill if nothing is generated.
///
/// The first measurement counts if it took long enough and `is_warm`: the threads are awake and the
/// weights have been touched.
fn rate(engine: &Engine, load: &Load, numbers: &mut Numbers, is_warm: bool) -> Result<f64> {
    let mut start = Instant::now();
    let mut rates = Vec::new();
    for round in 0.. {
        let seen = watch(engine, load, numbers)?;
        let (tokens, took) = match load.generate {
            0 => (load.prompt, seen.prefill),
            generate => (generate, seen.decode),
        };
        if round > 0 || (is_warm && took >= ENOUGH) {
            rates.push((load.batch * tokens) as f64 / took.as_secs_f64());
        } else {
            start = Instant::now();
        }
        if start.elapsed() >= ENOUGH {
            break;
        }
    }
    Ok(Spread::of(rates).context("measure at least once")?.median)
}

fn of_all(point: &Point) -> f64 {
    point.decode_tokens_per_second
}

/// Returns the least of what is as good as the best.
fn fewest(points: &[Point], of: impl Fn(&Point) -> usize) -> Option<usize> {
    let best = points.iter().map(of_all).max_by(f64::total_cmp)?;
    points.iter().filter(|point| of_all(point) >= AS_GOOD * best).map(of).min()
}

/// Says what to set. A server is what gains from more sequences than the edge profile has, and has
/// the memory for them.
fn conclude(
    measured: Vec<Point>,
    threads: usize,
    machine: &Machine,
    config: &ModelConfig,
) -> Option<Recommendation> {
    let of_threads: Vec<_> =
        measured.iter().copied().filter(|point| point.threads == threads).collect();
    let sequence = TYPICAL.min(config.context) * 2 * config.layers * config.kv_width() * 4;
    let best = fewest(&of_threads, |point| point.batch)?;
    let room = |profile: Profile| {
        let room = profile.tune(machine).kv_mib << 20;
        usize::try_from(room / (sequence as u64).max(1)).unwrap_or(usize::MAX)
    };
    let edge = Profile::Edge.tune(machine).max_sequences;
    let on_server = best.min(room(Profile::Server)).max(1);
    let (profile, max_sequences) = if on_server > edge {
        (Profile::Server, on_server)
    } else {
        (Profile::Edge, best.min(room(Profile::Edge)).clamp(1, edge))
    };
    let kv_bytes = max_sequences * sequence;
    let cpus = machine.cpus;
    Some(Recommendation { profile, threads, max_sequences, kv_bytes, cpus, measured })
}

impl fmt::Display for Recommendation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { profile, threads, max_sequences, kv_bytes, cpus, measured } = self;
        writeln!(f, "threads  sequences   decode tokens/s   of each   prefill tokens/s")?;
        for point in measured {
            let Point { threads, batch, decode_tokens_per_second: decode, .. } = point;
            write!(f, "{threads:>7}  {batch:>9}  {decode:>16.1}  {:>8.1}", decode / *batch as f64)?;
            let prefill = point.prefill_tokens_per_second;
            writeln!(f, "{}", prefill.map_or_else(String::new, |rate| format!("  {rate:>17.1}")))?;
        }
        let at = |batch: usize| {
            let found = measured.iter().find(|p| p.threads == *threads && p.batch == batch);
            found.map_or(0.0, of_all)
        };
        let most = measured.iter().filter(|point| point.threads == *threads);
        let most = most.map(of_all).fold(0.0, f64::max);
        writeln!(
            f,
            "\nrecommended: --profile {profile} --threads {threads} --max-sequences {max_sequences}"
        )?;
        writeln!(
            f,
            "  decodes {:.1} tokens/s alone, {:.1} with --max-sequences busy, {:.0} % of the most \
             measured, on {threads} of {cpus} CPUs",
            at(1),
            at(*max_sequences),
            100.0 * at(*max_sequences) / most.max(f64::MIN_POSITIVE)
        )?;
        writeln!(
            f,
            "  keys and values take {:.1} MiB then, at {TYPICAL} tokens each",
            *kv_bytes as f64 / f64::from(1 << 20)
        )
    }
}

#[cfg(test)]
mod tests {
    use tercet_engine::demo;

    use super::*;

    fn point(threads: usize, batch: usize, decode: f64) -> Point {
        Point { threads, batch, decode_tokens_per_second: decode, prefill_tokens_per_second: None }
    }

    fn concluded(points: &[(usize, f64)], memory: u64) -> (Profile, usize) {
        let measured = points.iter().map(|(batch, decode)| point(8, *batch, *decode)).collect();
        let machine = Machine { cpus: 8, memory, model: 0 };
        let config = demo::model().unwrap().config;
        let concluded = conclude(measured, 8, &machine, &config).unwrap();
        (concluded.profile, concluded.max_sequences)
    }

    #[test]
    fn cpus_are_tried_whole_and_in_parts() {
        assert_eq!(thread_counts(None, 1), [1]);
        assert_eq!(thread_counts(None, 2), [1, 2]);
        assert_eq!(thread_counts(None, 16), [4, 8, 16]);
        assert_eq!(thread_counts(Some(3), 16), [3]);
    }

    #[test]
    fn the_fewest_that_are_as_good_are_taken() {
        let points = [point(1, 1, 10.0), point(2, 1, 19.5), point(4, 1, 20.0)];
        assert_eq!(fewest(&points, |point| point.threads), Some(2));
        assert_eq!(fewest(&[], |point| point.threads), None);
    }

    #[test]
    fn a_server_gains_from_many_sequences() {
        let gains = [(1, 10.0), (2, 20.0), (4, 40.0), (8, 60.0), (16, 61.0)];
        assert_eq!(concluded(&gains, 64 << 30), (Profile::Server, 8));
        assert_eq!(concluded(&gains[..3], 64 << 30), (Profile::Edge, 4));
        assert_eq!(concluded(&[(1, 10.0), (2, 10.1)], 64 << 30), (Profile::Edge, 1));
    }

    #[test]
    fn sequences_must_fit_the_memory() {
        let config = demo::model().unwrap().config;
        let sequence = (1024 * 2 * config.layers * config.kv_width() * 4) as u64;
        let gains = [(1, 1.0), (64, 64.0), (256, 256.0), (4096, 4000.0)];
        let room = (256 << 20) / sequence;
        let (profile, sequences) = concluded(&gains, 1);
        assert_eq!(profile, Profile::Server);
        assert_eq!(sequences as u64, room, "what 256 MiB hold");
    }
}
