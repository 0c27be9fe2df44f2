//! Waits at many workers, against those of one queue before all of their slots.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tercet_proto::v1::generate_request::Input;
use tercet_tests::{
    Client, Dice, Lab, Sample, collect, full, measured, sampled, seed_of, synthetic::Options,
};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};

const SLOTS: u32 = 4;
const LOAD: f64 = 0.95;
/// Completions of 4 to 100 tokens, most of them short: Pareto with this exponent.
const SHAPE: f64 = 1.5;
const SHORTEST: f64 = 4.0;
const LONGEST: f64 = 100.0;
/// Tokens per second of a stream: slow enough for what a request costs this machine to be little
/// beside what it takes.
const RATE: f64 = 10.0;
/// The p99 of waits may be so many times that of one queue,
const WORSE: f64 = 1.2;
/// and so much longer: what a request takes through the gateway on a busy machine.
const SLACK: Duration = Duration::from_millis(25);
/// The machine of a short run may be busier still.
const LENIENCE: u32 = 3;
/// Of `n` times what one worker does, `n` workers do at least this.
const LINEAR: f64 = 0.97;

/// Nobody is refused: what would be refused would not have to wait.
const FLAGS: &[&str] = &["--max-queue", "100000", "--max-queue-wait", "1000s"];

/// A request that was answered.
#[derive(Clone, Copy, Debug)]
struct Answered {
    asked: Instant,
    tokens: u32,
    first: Duration,
}

async fn ask(client: Client, number: u64, tokens: u32) -> Result<Answered> {
    let asked = Instant::now();
    let request = sampled(Input::Prompt("To be".to_owned()), number, tokens);
    let mut first = None;
    let stream = client.open(request).await?;
    collect(stream, |_| {
        first.get_or_insert_with(|| asked.elapsed());
    })
    .await?;
    Ok(Answered { asked, tokens, first: first.context("no tokens")? })
}

/// Draws the length of a completion.
fn length(dice: &mut Dice) -> u32 {
    // The inverse of the distribution, cut off at both ends.
    let cut = (SHORTEST / LONGEST).powf(SHAPE);
    let part = 1.0 - dice.fraction() * (1.0 - cut);
    let length = SHORTEST / part.powf(1.0 / SHAPE);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "4 to 100")]
    let length = length.round() as u32;
    length
}

/// Returns the waits of the same requests at one queue before so many slots.
fn ideal(answered: &[Answered], slots: usize, pace: Duration) -> Sample {
    let mut by_time = answered.to_vec();
    by_time.sort_by_key(|answered| answered.asked);
    let mut waits = Sample::default();
    let Some(first) = by_time.first() else { return waits };
    let mut free: BinaryHeap<_> = std::iter::repeat_n(Reverse(first.asked), slots).collect();
    for request in &by_time {
        let Some(Reverse(slot)) = free.pop() else { break };
        let begins = slot.max(request.asked);
        waits.push(begins - request.asked);
        free.push(Reverse(begins + pace * request.tokens));
    }
    waits
}

/// Runs requests at random moments for so long, at [`LOAD`] of what the workers can do.
async fn run(lab: &Lab, workers: u32, last: Duration, seed: u64) -> Result<Vec<Answered>> {
    let mut dice = Dice::new(seed);
    let tokens_per_second = LOAD * f64::from(workers * SLOTS) * RATE;
    let most = tokens_per_second * last.as_secs_f64();
    let (mut lengths, mut tokens) = (Vec::new(), 0.0);
    while tokens < most {
        lengths.push(length(&mut dice));
        tokens += f64::from(lengths[lengths.len() - 1]);
    }
    // By the lengths drawn: a few long ones more or less are a different load.
    let mean = tokens / f64::from(u32::try_from(lengths.len())?);
    let per_second = tokens_per_second / mean;
    let mut running = JoinSet::new();
    let mut next = Instant::now();
    for (number, tokens) in (0..).zip(lengths) {
        time::sleep_until(next).await;
        running.spawn(ask(lab.client().clone(), number, tokens));
        next += dice.gap(per_second);
    }
    let mut answered = Vec::new();
    while let Some(one) = running.join_next().await {
        answered.push(one??);
    }
    Ok(answered)
}

/// Returns the part of what all slots can do that full slots do.
async fn saturated(lab: &Lab, workers: u32) -> Result<f64> {
    const TOKENS: u32 = 50;
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for number in 0..u64::from(workers * SLOTS) {
        running.spawn(ask(lab.client().clone(), number, TOKENS));
    }
    while let Some(one) = running.join_next().await {
        one??;
    }
    Ok(f64::from(TOKENS) / RATE / begun.elapsed().as_secs_f64())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_are_those_of_one_queue_and_rates_add_up() -> Result<()> {
    let (sizes, seconds): (&[u32], _) =
        if full() { (&[1, 2, 4, 8, 16], 60) } else { (&[1, 4], 30) };
    let seed = seed_of("TERCET_BALANCE_SEED")?;
    let mut single = None;
    for &workers in sizes {
        let slots = workers * SLOTS;
        let options = Options {
            rate: RATE,
            slots: SLOTS,
            queue: u32::MAX,
            cluster: "balance".parse()?,
            ..Options::new("worker".parse()?)
        };
        let Some(lab) = Lab::start(workers.try_into()?, &options, FLAGS).await? else {
            return Ok(());
        };
        let aggregate = saturated(&lab, workers).await?;
        let single = *single.get_or_insert(aggregate);
        let answered = run(&lab, workers, Duration::from_secs(seconds), seed).await?;
        let ideal = ideal(&answered, slots.try_into()?, options.pace());
        let mut waits = Sample::default();
        waits.extend(answered.iter().map(|one| one.first.saturating_sub(options.pace())));
        measured(&format!(
            "TERCET_BALANCE_SEED={seed}: {workers} workers: waits {waits}; at one queue {ideal}; \
             aggregate {:.3} of linear",
            aggregate / single
        ));
        ensure!(aggregate >= LINEAR * single, "{workers} workers: {aggregate} against {single}");
        let slack = if full() { SLACK } else { SLACK * LENIENCE };
        let bound = ideal.p99().mul_f64(WORSE) + slack;
        ensure!(
            waits.p99() <= bound,
            "{workers} workers: p99 {:?}, expected {bound:?}",
            waits.p99()
        );
    }
    Ok(())
}
