//! A worker is killed in the middle of streams, and no client notices.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{Client, Completion, Etcd, Tercet, collect, metric, sampled};

const STREAMS: u64 = 8;
const MAX_TOKENS: u32 = 600;
/// Tokens, of all streams together, after which the worker is killed: a small part of them all.
const KILL_AFTER: usize = 300;

fn request(stream: u64) -> GenerateRequest {
    let speakers = ["KING HENRY", "HAMLET", "ROMEO", "JULIET", "FALSTAFF", "OTHELLO", "LEAR"];
    let speaker = speakers[usize::try_from(stream).expect("few streams") % speakers.len()];
    let mut request = sampled(Input::Prompt(format!("{speaker}.\n")), 100 + stream, MAX_TOKENS);
    // Withheld text must survive the move too.
    request.stop.get_or_insert_default().strings = vec!["\n\nTHE END OF ALL PLAYS".to_owned()];
    request
}

/// Runs all streams at once and calls `at_kill` once when [`KILL_AFTER`] tokens have come.
async fn streams(client: &Client, at_kill: impl FnOnce() -> Result<()>) -> Result<Vec<Completion>> {
    let tokens = Arc::new(AtomicUsize::new(0));
    let enough = Arc::new(tokio::sync::Notify::new());
    let all = try_join_all((0..STREAMS).map(|stream| {
        let (client, tokens, enough) = (client.clone(), Arc::clone(&tokens), Arc::clone(&enough));
        async move {
            let messages = client.open(request(stream)).await?;
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

    let undisturbed = streams(&client, || Ok(())).await?;
    ensure!(moves(&metrics)? == 0.0, "nothing moved without a reason");
    for completion in &undisturbed {
        ensure!(completion.ids.len() == usize::try_from(MAX_TOKENS)?);
    }

    let disturbed = streams(&client, || first.process().kill()).await?;
    ensure!(moves(&metrics)? >= 1.0, "the worker had no stream when it was killed");
    for (stream, (got, expected)) in disturbed.iter().zip(&undisturbed).enumerate() {
        ensure!(got == expected, "stream {stream}: {got:?}\nis not {expected:?}");
    }
    Ok(())
}

/// Returns how many streams the gateway has moved.
fn moves(metrics: &str) -> Result<f64> {
    metric(metrics, "tercet_stream_moves_total", &[])
}
