//! Ten times more requests than the workers can answer: what is taken is answered as usual, and the
//! rest is told so at once.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{
    Client, Dice, Lab, Sample, collect, full, measured, resident_bytes, sampled, seed_of,
    synthetic::Options,
};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};
use tonic::{Code, Status};

const WORKERS: u32 = 2;
const SLOTS: u32 = 4;
/// Requests that wait at each worker.
const QUEUE: u32 = 4;
const TOKENS: u32 = 100;
/// Tokens per second of a stream.
const RATE: f64 = 50.0;
/// Requests come so many times faster than they can be answered.
const OVERLOAD: f64 = 10.0;
/// Part of the capacity that must be used.
const GOODPUT: f64 = 0.9;
/// What a refusal may take, in 99 of 100 cases.
const REFUSAL: Duration = Duration::from_millis(20);
/// What a busy machine may add to a wait.
const SLACK: Duration = Duration::from_millis(250);
/// A machine that others use as well may take so many times longer to refuse.
const LENIENCE: u32 = 3;
/// What the gateway's memory may grow by once all of it has been in use.
const GROWTH: u64 = 8 << 20;

/// Requests that wait at the gateway.
const WAITING: u32 = 8;
const FLAGS: &[&str] = &["--max-queue", "8"];

/// What became of a request.
enum Outcome {
    /// When its tokens came; how long it took until the first.
    Answered {
        first: Duration,
        tokens: Vec<Instant>,
    },
    Refused {
        after: Duration,
    },
}

async fn ask(client: Client, request: GenerateRequest) -> Result<Outcome> {
    let asked = Instant::now();
    let stream = match client.open(request).await {
        Ok(stream) => stream,
        Err(error) => return refused(error, asked),
    };
    let mut tokens = Vec::new();
    match collect(stream, |_| tokens.push(Instant::now())).await {
        Ok(_) => {
            let first = *tokens.first().context("no tokens")? - asked;
            Ok(Outcome::Answered { first, tokens })
        }
        Err(error) if tokens.is_empty() => refused(error, asked),
        Err(error) => Err(error.context("after it was admitted")),
    }
}

fn refused(error: anyhow::Error, asked: Instant) -> Result<Outcome> {
    let after = asked.elapsed();
    let status = error.downcast::<Status>()?;
    ensure!(status.code() == Code::ResourceExhausted, "{status:?}");
    ensure!(tercet_proto::retry_after(&status).is_some(), "does not say when to come back");
    Ok(Outcome::Refused { after })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_is_answered_and_the_rest_refused_at_once() -> Result<()> {
    let length = Duration::from_secs(if full() { 60 } else { 10 });
    let options = Options {
        rate: RATE,
        slots: SLOTS,
        queue: QUEUE,
        cluster: "overload".parse()?,
        ..Options::new("worker".parse()?)
    };
    let Some(mut lab) = Lab::start(WORKERS.try_into()?, &options, FLAGS).await? else {
        return Ok(());
    };
    let seed = seed_of("TERCET_OVERLOAD_SEED")?;
    let mut dice = Dice::new(seed);
    let capacity = f64::from(WORKERS * SLOTS) * RATE;
    let offered = OVERLOAD * capacity / f64::from(TOKENS);
    let gateway = lab.gateway().process().id();

    let mut requests = JoinSet::new();
    let begun = Instant::now();
    // Until then, slots and queues fill.
    let warm = begun + length / 4;
    let (mut next, mut number, mut memory) = (begun, 0, None);
    while next < begun + length {
        time::sleep_until(next).await;
        let mut request = sampled(Input::Prompt("To be".to_owned()), number, TOKENS);
        request.model = options.model.clone();
        requests.spawn(ask(lab.client().clone(), request));
        number += 1;
        next += dice.gap(offered);
        if memory.is_none() && next > warm {
            memory = Some(resident_bytes(gateway)?);
        }
    }
    let end = Instant::now();
    let grown = resident_bytes(gateway)?.saturating_sub(memory.context("no first measurement")?);

    let (mut firsts, mut refusals, mut tokens) = (Sample::default(), Sample::default(), 0_u32);
    while let Some(outcome) = requests.join_next().await {
        match outcome?? {
            Outcome::Answered { first, tokens: times } => {
                firsts.push(first);
                let counted = times.iter().filter(|time| (warm..end).contains(time)).count();
                tokens += u32::try_from(counted)?;
            }
            Outcome::Refused { after } => refusals.push(after),
        }
    }
    let goodput = f64::from(tokens) / (end - warm).as_secs_f64() / capacity;
    measured(&format!(
        "TERCET_OVERLOAD_SEED={seed}: {offered} requests/s for {length:?}, goodput {goodput:.3} of \
         capacity; admitted, to the first token: {firsts}; refusals: {refusals}; memory grew by \
         {} KiB",
        grown / 1024
    ));
    ensure!(goodput >= GOODPUT, "goodput is {goodput:.3} of the capacity");
    // Everything ahead of the last in the queue, then its own first token.
    let rounds = f64::from(WORKERS * QUEUE + WAITING) / f64::from(WORKERS * SLOTS);
    let longest = Duration::from_secs_f64(rounds * f64::from(TOKENS) / RATE);
    let bound = longest + options.pace() + SLACK;
    ensure!(firsts.p99() <= bound, "p99 {:?} to the first token, expected {bound:?}", firsts.p99());
    let lenience = if full() { 1 } else { LENIENCE };
    ensure!(refusals.p99() <= REFUSAL * lenience, "p99 {:?} to a refusal", refusals.p99());
    ensure!(grown <= GROWTH, "the gateway's memory grew by {grown} bytes");
    Ok(())
}
