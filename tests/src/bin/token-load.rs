//! Asks for many streams of a synthetic worker with `--stamp`, or of what is before it, and tells as
//! JSON what came: `token-load HOST:PORT [--streams N] [--connections N] [--tokens N] [--spread-millis N]`.
//!
//! Every stream is held to its indices, so a message that is lost or comes twice is an error and no
//! figure. It computes on one thread and little, to leave the machine to what is measured.

use std::{
    io::{self, Write as _},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tercet_proto::v1::{
    GenerateRequest, Stop, generate_request::Input, generate_response::Event,
    inference_client::InferenceClient,
};
use tercet_tests::synthetic::micros_now;
use tokio::{
    sync::Barrier,
    task::{JoinSet, LocalSet},
    time::{self, Instant},
};
use tonic::transport::Channel;

/// Longest that one run may take beyond its tokens.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug)]
struct Options {
    streams: u32,
    connections: u32,
    /// Tokens of each stream.
    tokens: u32,
    /// Time over which the streams begin.
    spread: Duration,
}

impl Options {
    fn parse(args: impl IntoIterator<Item = String>) -> Result<(String, Self)> {
        let mut args = args.into_iter();
        let target = args.next().context("expected HOST:PORT")?;
        let mut options =
            Self { streams: 256, connections: 16, tokens: 100, spread: Duration::from_secs(1) };
        while let Some(flag) = args.next() {
            let value = args.next().with_context(|| format!("{flag} needs a value"))?;
            let number: u32 = value.parse().with_context(|| format!("{flag} {value}"))?;
            match flag.as_str() {
                "--streams" => options.streams = number,
                "--connections" => options.connections = number,
                "--tokens" => options.tokens = number,
                "--spread-millis" => options.spread = Duration::from_millis(number.into()),
                _ => bail!("no such flag: {flag}"),
            }
        }
        ensure!(options.connections > 0, "--connections is 0, expected at least 1");
        Ok((target, options))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let (target, options) = Options::parse(std::env::args().skip(1))?;
    let mut latencies = Vec::new();
    let mut messages = 0_u64;
    let begun = Instant::now();
    let local = LocalSet::new();
    let running = local.run_until(async {
        let mut clients = Vec::new();
        for _ in 0..options.connections {
            clients.push(InferenceClient::new(tercet_tests::connect(&target).await?));
        }
        let all = usize::try_from(options.streams)?;
        let opened = Rc::new(Barrier::new(all));
        let mut streams = JoinSet::new();
        for (number, client) in (0..options.streams).zip(clients.iter().cycle()) {
            let (client, opened) = (client.clone(), Rc::clone(&opened));
            streams.spawn_local(async move {
                time::sleep(options.spread * number / options.streams).await;
                stream(client, number, options.tokens, &opened)
                    .await
                    .with_context(|| format!("stream {number}"))
            });
        }
        while let Some(ended) = streams.join_next().await {
            let (received, times) = ended??;
            messages += received;
            latencies.extend(times);
        }
        anyhow::Ok(())
    });
    time::timeout(PATIENCE + options.spread, running).await.context("the streams do not end")??;
    let elapsed = begun.elapsed();
    latencies.sort_unstable();
    let quantile = |of_1000: usize| {
        let rank = (latencies.len() * of_1000).div_ceil(1000).max(1);
        latencies.get(rank - 1).copied()
    };
    let told = json!({
        "messages": messages,
        "seconds": elapsed.as_secs_f64(),
        "latency_micros": { "p50": quantile(500), "p99": quantile(990), "max": quantile(1000) },
    });
    writeln!(io::stdout(), "{told}")?;
    Ok(())
}

/// Returns the number of messages of one stream, and how many microseconds each token took from the
/// worker to here. Those that came before all streams were open are not among the times.
async fn stream(
    mut client: InferenceClient<Channel>,
    number: u32,
    tokens: u32,
    opened: &Barrier,
) -> Result<(u64, Vec<u32>)> {
    let request = GenerateRequest {
        input: Some(Input::Prompt(format!("stream {number}"))),
        stop: Some(Stop { max_tokens: Some(tokens), ignore_eos: Some(true), ..Stop::default() }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(request).await?.into_inner();
    let mut messages = 0;
    let mut times = Vec::with_capacity(usize::try_from(tokens)?);
    let mut next = 0;
    let mut all_open = std::pin::pin!(opened.wait());
    let mut is_full = false;
    while let Some(message) = stream.message().await? {
        let now = micros_now();
        messages += 1;
        match message.event {
            Some(Event::Delta(delta)) => {
                ensure!(delta.index == next, "expected index {next}, got {}", delta.index);
                next += u32::try_from(delta.token_ids.len())?;
                if !is_full {
                    is_full = futures::poll!(&mut all_open).is_ready();
                    continue;
                }
                let made: u64 = delta.text.parse().context("the text is no time")?;
                times.push(u32::try_from(now.saturating_sub(made)).unwrap_or(u32::MAX));
            }
            Some(Event::Finished(_)) => {
                ensure!(next == tokens, "expected {tokens} tokens, got {next}");
                return Ok((messages, times));
            }
            _ => {}
        }
    }
    bail!("ended without `finished`, after {next} tokens")
}
