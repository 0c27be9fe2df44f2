//! A worker is killed in the middle of streams, and no client notices.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{
    Client, Completion, Dice, Etcd, FEATURES, Reference, Source, Tercet, collect, metric, sampled,
};

const STREAMS: u64 = 8;
const MAX_TOKENS: u32 = 600;
/// Tokens, of all streams together, after which the worker is killed: a small part of them all.
const KILL_AFTER: usize = 300;
/// Tokens of a stream that is surely in progress then.
const LONG: u32 = 100;

fn request(stream: u64) -> GenerateRequest {
    let speakers = ["KING HENRY", "HAMLET", "ROMEO", "JULIET", "FALSTAFF", "OTHELLO", "LEAR"];
    let speaker = speakers[usize::try_from(stream).expect("few streams") % speakers.len()];
    let mut request = sampled(Input::Prompt(format!("{speaker}.\n")), 100 + stream, MAX_TOKENS);
    // Withheld text must survive the move too.
    request.stop.get_or_insert_default().strings = vec!["\n\nTHE END OF ALL PLAYS".to_owned()];
    request
}

/// Every way to ask, and some drawn ones.
fn of_all_kinds() -> Vec<GenerateRequest> {
    let mut requests = Vec::new();
    for (nth, (_, apply)) in (0..).zip(FEATURES) {
        let mut request = request(nth);
        request.stop.get_or_insert_default().max_tokens = Some(2 * LONG);
        apply(&mut request);
        requests.push(request);
    }
    let text = "Enter HAMLET, reading.\n\nPOLONIUS.\nWhat do you read, my lord?\n".repeat(20);
    let source = Source { model: "", vocab: 1000, context: 600, text: &text, chat: true };
    let mut dice = Dice::new(7);
    requests.extend((0..8).map(|_| source.draw(&mut dice)));
    requests
}

/// Runs all streams at once and calls `at_kill` once when [`KILL_AFTER`] tokens have come.
async fn streams(
    client: &Client,
    requests: &[GenerateRequest],
    at_kill: impl FnOnce() -> Result<()>,
) -> Result<Vec<Completion>> {
    let tokens = Arc::new(AtomicUsize::new(0));
    let enough = Arc::new(tokio::sync::Notify::new());
    let all = try_join_all(requests.iter().map(|request| {
        let (client, tokens, enough) = (client.clone(), Arc::clone(&tokens), Arc::clone(&enough));
        async move {
            let messages = client.open(request.clone()).await?;
            collect(messages, |delta| {
                let n = delta.token_ids.len();
                let before = tokens.fetch_add(n, Ordering::Relaxed);
                if before < KILL_AFTER && before + n >= KILL_AFTER {
                    enough.notify_one();
                }
            })
            .await
        }
    }));
    let kill = async {
        enough.notified().await;
        at_kill()
    };
    let (all, ()) = futures::try_join!(all, kill)?;
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_outlives_its_worker_unchanged() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "failover", "--listen", "127.0.0.1:0"];
    let worker = || Tercet::start(["worker", "--threads", "1"].iter().chain(&cluster));
    let (mut first, second) = (worker()?, worker()?);
    let metrics = ["--metrics-listen", "127.0.0.1:0"];
    let mut gateway = Tercet::start(["gateway"].iter().chain(&cluster).chain(&metrics))?;
    let metrics = gateway.listener("metrics")?;
    for part in [&first, &second, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;

    let requests: Vec<_> = (0..STREAMS).map(request).collect();
    let undisturbed = streams(&client, &requests, || Ok(())).await?;
    ensure!(moves(&metrics)? == 0.0, "nothing moved without a reason");
    for completion in &undisturbed {
        ensure!(completion.ids.len() == usize::try_from(MAX_TOKENS)?);
    }

    let disturbed = streams(&client, &requests, || first.process().kill()).await?;
    ensure!(moves(&metrics)? >= 1.0, "the worker had no stream when it was killed");
    for (stream, (got, expected)) in disturbed.iter().zip(&undisturbed).enumerate() {
        ensure!(got == expected, "stream {stream}: {got:?}\nis not {expected:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_all_kinds_outlive_the_only_worker() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "kinds", "--listen", "127.0.0.1:0"];
    let worker = || Tercet::start(["worker", "--threads", "1"].iter().chain(&cluster));
    let mut first = worker()?;
    let gateway = ["gateway", "--metrics-listen", "127.0.0.1:0", "--worker-wait", "60s"];
    let mut gateway = Tercet::start(gateway.iter().chain(&cluster))?;
    let metrics = gateway.listener("metrics")?;
    for part in [&first, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;
    let requests = of_all_kinds();
    let undisturbed = streams(&client, &requests, || Ok(())).await?;
    let before = moves(&metrics)?;

    // All wait until there is another one.
    let mut second = None;
    let disturbed = streams(&client, &requests, || {
        first.process().kill()?;
        second = Some(worker()?);
        Ok(())
    })
    .await?;
    let long = |completion: &&Completion| completion.ids.len() >= LONG as usize;
    let long = u32::try_from(undisturbed.iter().filter(long).count())?;
    let moved = moves(&metrics)? - before;
    ensure!(long >= 12 && moved >= f64::from(long), "{moved} moves of {long} long streams");
    for ((got, expected), request) in disturbed.iter().zip(&undisturbed).zip(&requests) {
        ensure!(got == expected, "{request:?}\ngot\n{got:?}\nnot\n{expected:?}");
        let echoed = got.prompt.as_ref().map(|prompt| prompt.token_ids.len());
        let asked = request.echo().then_some(got.started.prompt_tokens as usize);
        ensure!(echoed == asked, "{request:?}\nechoes\n{:?}", got.prompt);
    }

    // A client that has lost its own connection resumes by itself.
    for request in requests {
        let reference = Reference::ask(&client, request).await?;
        let indices = reference.resumable();
        let (_, rest) = reference.resumed(indices[indices.len() / 2]);
        rest.repeat(&client).await?;
    }
    Ok(())
}

/// Returns how many streams the gateway has moved.
fn moves(metrics: &str) -> Result<f64> {
    metric(metrics, "tercet_stream_moves_total", &[])
}
