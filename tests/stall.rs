//! A long prompt arrives among streams, and they hardly notice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tercet_proto::v1::generate_request::Input;
use tercet_proto::v1::{GenerateRequest, TokenIds, generate_response::Event};
use tercet_tests::{Client, Dice, PATIENCE, Scratch, Tercet, full, greedy, measured, run};
use tokio::{
    sync::watch,
    task::{self, JoinSet},
    time::{self, Instant},
};

const STREAMS: u32 = 8;
/// Context of the model.
const CONTEXT: u32 = 2048;
/// Tokens of each stream before the long prompt, and after it: what the two are compared by.
const QUIET: usize = 25;
/// How many times as long half of the tokens may take while the prompt is computed, on a machine that
/// has other work: the engine's example `stall` measures what a quiet one does.
const STRETCH: f64 = 4.0;

fn prompt(dice: &mut Dice, length: u32) -> Input {
    Input::Tokens(TokenIds { ids: (0..length).map(|_| dice.between(0, 50_000)).collect() })
}

/// Times between the tokens of all streams.
#[derive(Debug, Default)]
struct Gaps {
    without: Vec<Duration>,
    during: Vec<Duration>,
}

/// What a stream is to know of the long prompt, and the test of the streams.
struct Shared {
    computing: AtomicBool,
    progress: watch::Sender<[usize; STREAMS as usize]>,
}

/// Reads a stream until it is cancelled.
async fn follow(
    client: Client,
    nth: usize,
    request: GenerateRequest,
    shared: Arc<Shared>,
    mut end: watch::Receiver<bool>,
) -> Result<Gaps> {
    let mut stream = client.open(request).await?;
    let mut gaps = Gaps::default();
    // When the last token came, and whether the long prompt was computed then.
    let mut last: Option<(Instant, bool)> = None;
    loop {
        let message = tokio::select! {
            _ = end.wait_for(|end| *end) => return Ok(gaps),
            message = stream.message() => message?.context("the stream ended too early")?,
        };
        let Some(Event::Delta(delta)) = message.event else { continue };
        let (now, computing) = (Instant::now(), shared.computing.load(Ordering::Relaxed));
        // Tokens that come together have come one by one to whoever reads slowly.
        for _ in &delta.token_ids {
            if let Some((before, was)) = last {
                // What is partly of both is of neither.
                match (was, computing) {
                    (true, true) => gaps.during.push(now - before),
                    (false, false) => gaps.without.push(now - before),
                    _ => {}
                }
            }
            last = Some((now, computing));
        }
        shared.progress.send_modify(|progress| progress[nth] += delta.token_ids.len());
    }
}

/// Waits until every stream has had some more tokens.
async fn more(shared: &Shared, tokens: usize) -> Result<()> {
    let mut progress = shared.progress.subscribe();
    let begun = *progress.borrow();
    let wait = progress.wait_for(|now| begun.iter().zip(now).all(|(a, b)| b - a >= tokens));
    time::timeout(PATIENCE, wait).await.context("the streams stand still")??;
    Ok(())
}

/// Returns the milliseconds that so many of 100 do not exceed.
fn percentile(gaps: &[Duration], percent: usize) -> f64 {
    gaps[gaps.len() * percent / 100].as_secs_f64() * 1e3
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Lets streams begin, a long prompt come among them, and returns the times between their tokens.
async fn round(client: &Client, dice: &mut Dice, length: u32) -> Result<Gaps> {
    let shared = Arc::new(Shared {
        computing: AtomicBool::new(false),
        progress: watch::Sender::new([0; STREAMS as usize]),
    });
    let (end, ended) = watch::channel(false);
    let mut streams = JoinSet::new();
    for nth in 0..STREAMS as usize {
        let request = greedy(prompt(dice, 16), CONTEXT - 16);
        streams.spawn(follow(client.clone(), nth, request, Arc::clone(&shared), ended.clone()));
    }
    let meanwhile = async {
        // The first tokens come while prompts are computed still.
        more(&shared, 8).await?;
        more(&shared, QUIET).await?;
        shared.computing.store(true, Ordering::Relaxed);
        let long = client.generate(greedy(prompt(dice, length), 1));
        time::timeout(10 * PATIENCE, long).await.context("the prompt is not computed")??;
        shared.computing.store(false, Ordering::Relaxed);
        more(&shared, QUIET).await
    };
    let done = meanwhile.await;
    end.send_replace(true);
    let mut all = Gaps::default();
    while let Some(stream) = streams.join_next().await {
        let gaps = stream??;
        all.without.extend(gaps.without);
        all.during.extend(gaps.during);
    }
    done?;
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_prompt_does_not_hold_up_streams() -> Result<()> {
    let scratch = Scratch::new("stall")?;
    let file = scratch.path().join("small.gguf");
    let mut synth = Tercet::command(["model", "synth", "--shape", "125m", "--out"]);
    synth.arg(&file);
    task::spawn_blocking(move || run(&mut synth)).await??;
    let model = format!("--model={}", file.display());
    // Room for all: nobody is preempted.
    let serve = ["serve", "--listen=127.0.0.1:0", "--threads=2", "--kv-memory=768MiB", &model];
    let server = Tercet::start(serve)?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;

    let mut dice = Dice::new(6);
    let mut ratios = Vec::new();
    let (rounds, length) = if full() { (5, 2000) } else { (3, 400) };
    for nth in 0..rounds {
        let mut gaps = round(&client, &mut dice, length).await?;
        if gaps.during.len() < 40 {
            bail!("the prompt was computed in {} tokens: it is too short", gaps.during.len());
        }
        let counts = (gaps.without.len(), gaps.during.len());
        gaps.without.sort();
        gaps.during.sort();
        let [half, most] = [50, 99].map(|percent| {
            let without = percentile(&gaps.without, percent);
            let during = percentile(&gaps.during, percent);
            measured(&format!(
                "round {nth}: {percent} of 100 tokens within {without:.1} ms ({} tokens), and within \
                 {during:.1} ms while the prompt is computed ({} tokens)",
                counts.0, counts.1,
            ));
            during / without
        });
        measured(&format!("round {nth}: {half:.2} and {most:.2} times as long"));
        ratios.push(half);
    }
    let ratio = median(&mut ratios);
    ensure!(ratio <= STRETCH, "tokens take {ratio:.2} times as long: {ratios:.2?}");
    Ok(())
}
