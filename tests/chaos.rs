//! Whatever happens to workers, every stream completes and is what it would have been.
//!
//! A trial is 16 streams at a cluster of real processes on hosts of their own, to which one or two
//! [`Fault`]s happen at random moments. All of it follows from the trial's seed: a failure names
//! it, and `TERCET_CHAOS_SEED=SEED TERCET_CHAOS_TRIALS=1` makes that trial again.
//! `TERCET_CHAOS_TRIALS` alone sets how many there are.

mod cluster;
mod faults;
mod streams;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tercet_tests::{Dice, Sample, full, measured, number_of, seed_of};

use self::{
    cluster::{Cluster, Program},
    faults::{Fault, Kind, draw, play},
    streams::{Pool, Stream},
};

/// Streams of a trial.
const STREAMS: usize = 16;
/// No trial takes longer, or something hangs.
const TRIAL: Duration = Duration::from_secs(60);
/// What killing a worker may cost a stream beyond the computing of what it had already, at the
/// median and in 99 of 100 cases.
const KILLED: (Duration, Duration) = (Duration::from_millis(150), Duration::from_millis(750));
/// A machine that others use as well may take so many times longer.
const LENIENCE: u32 = 3;

/// What trials with faults of one kind cost.
#[derive(Debug, Default)]
struct Cost {
    /// Of each stream that went on elsewhere: how long nothing came, beyond the computing of what it
    /// had already. Only of trials with one fault.
    recovery: Sample,
    /// Of each trial: the longest time in which a stream got nothing.
    pause: Sample,
    /// Moves of streams, of all trials.
    moves: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_whatever_happens_to_workers() -> Result<()> {
    let trials = if full() { 200 } else { 25 };
    let trials = number_of("TERCET_CHAOS_TRIALS")?.unwrap_or(trials);
    let Some(mut cluster) = Cluster::start(Program::Synthetic).await? else { return Ok(()) };
    let costs = run(&mut cluster, Pool::synthetic(), &Kind::ALL, trials).await?;
    for (kind, Cost { recovery, pause, moves }) in &costs {
        measured(&format!("{kind:?}: {moves} moves; recovery {recovery}; longest pause {pause}"));
    }
    let moves: usize = costs.values().map(|cost| cost.moves).sum();
    ensure!(u64::try_from(moves)? >= trials, "{moves} moves: the faults met no streams");
    if let Some(killed) = costs.get(&Kind::Kill).filter(|cost| cost.recovery.len() >= 20) {
        let lenience = if full() { 1 } else { LENIENCE };
        let (median, p99) = (killed.recovery.median(), killed.recovery.p99());
        ensure!(median <= KILLED.0 * lenience, "median {median:?} after a kill");
        ensure!(p99 <= KILLED.1 * lenience, "p99 {p99:?} after a kill");
    }
    Ok(())
}

/// The same with real models, which compute what the formula only claims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_real_model_outlive_it_too() -> Result<()> {
    let trials = number_of("TERCET_CHAOS_TRIALS")?.unwrap_or_else(|| if full() { 20 } else { 5 });
    let Some(mut cluster) = Cluster::start(Program::Engine).await? else { return Ok(()) };
    let kinds = [Kind::Kill, Kind::Partition, Kind::Reset, Kind::Drain, Kind::Stop];
    let costs = run(&mut cluster, Pool::demo(), &kinds, trials).await?;
    for (kind, Cost { pause, .. }) in &costs {
        measured(&format!("{kind:?}: longest pause of a trial {pause}"));
    }
    Ok(())
}

async fn run(
    cluster: &mut Cluster,
    mut pool: Pool,
    kinds: &[Kind],
    trials: u64,
) -> Result<BTreeMap<Kind, Cost>> {
    let first = seed_of("TERCET_CHAOS_SEED")?;
    measured(&format!("{trials} trials from TERCET_CHAOS_SEED={first} on"));
    pool.run_undisturbed(cluster).await.context("run undisturbed")?;
    let mut costs: BTreeMap<Kind, Cost> = BTreeMap::new();
    for seed in first..first + trials {
        let mut dice = Dice::new(seed);
        let which = usize::try_from(seed % u64::try_from(kinds.len())?)?;
        let faults = draw(&mut dice, kinds[which], kinds);
        let trial = tokio::time::timeout(TRIAL, trial(cluster, &pool, &mut dice, &faults));
        let streams = trial.await.context("a stream hangs").and_then(|streams| streams);
        let streams = streams.with_context(|| {
            format!(
                "TERCET_CHAOS_SEED={seed} TERCET_CHAOS_TRIALS=1: {faults:?}\n{}",
                cluster.said()
            )
        })?;
        for stream in &streams {
            let cost = costs.entry(faults[0].kind).or_default();
            cost.moves += stream.resumed.len();
            if faults.len() == 1 {
                cost.recovery.extend(stream.recoveries());
            }
        }
        let pause = streams.iter().map(Stream::longest_pause).max().unwrap_or_default();
        costs.entry(faults[0].kind).or_default().pause.push(pause);
    }
    Ok(costs)
}

async fn trial(
    cluster: &mut Cluster,
    pool: &Pool,
    dice: &mut Dice,
    faults: &[Fault],
) -> Result<Vec<Stream>> {
    let mut running = pool.begin(cluster.client(), dice, STREAMS);
    let played = play(cluster, faults).await;
    let streams = running.join(pool).await;
    cluster.restore().await.context("after the trial")?;
    // What the streams say tells more than what became of the faults.
    let mut streams = streams?;
    played?;
    cluster.attribute(&mut streams);
    Ok(streams)
}
