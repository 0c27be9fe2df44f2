//! Several models in one process, loaded and unloaded at run time by the command line, while
//! streams run that must not notice.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use tercet_proto::{
    Reason,
    v1::{GenerateRequest, generate_request::Input},
};
use tercet_tests::{
    Client, Completion, Etcd, PATIENCE, Scratch, Tercet, collect, run, sampled, workspace,
};
use tokio::{task, time};
use tonic::Status;

const STREAMS: u64 = 6;
const MAX_TOKENS: u32 = 400;
/// Tokens, of all streams together, after which the models change: a small part of them all.
const CHANGE_AFTER: usize = 200;

/// Arguments of a process that has two models and may load more.
fn models() -> Vec<String> {
    let fixtures = workspace().join("tests/fixtures");
    let at = |path: &str| fixtures.join(path).display().to_string();
    [
        format!("--model=play={}", at("demo-model")),
        format!("--model=small={},kv=16MiB", at("gguf/bitnet-i2_s.gguf")),
        format!("--model-dir={}", fixtures.display()),
        "--kv-memory=128MiB".to_owned(),
        "--threads=2".to_owned(),
    ]
    .into()
}

/// The streams of both models; every third is the small one's.
fn request(stream: u64) -> GenerateRequest {
    let (model, input) = if stream.is_multiple_of(3) {
        ("small", "Once upon a time")
    } else {
        ("play", "KING HENRY.\n")
    };
    // Both contexts hold it.
    let tokens = if model == "small" { 100 } else { MAX_TOKENS };
    asking(model, Input::Prompt(input.to_owned()), 100 + stream, tokens)
}

/// Returns a request that depends on no defaults of a model.
fn asking(model: &str, input: Input, seed: u64, max_tokens: u32) -> GenerateRequest {
    let mut asked = sampled(input, seed, max_tokens);
    let sampling = asked.sampling.get_or_insert_default();
    (sampling.temperature, sampling.top_k, sampling.top_p) = (Some(0.9), Some(0), Some(0.95));
    GenerateRequest { model: model.to_owned(), ..asked }
}

/// Runs `tercet model` with these words.
async fn model(address: &str, words: &[&str]) -> Result<String> {
    let mut command = Tercet::command(["model"].iter().chain(words));
    command.args(["--connect", address]);
    task::spawn_blocking(move || run(&mut command)).await?
}

async fn names(client: &Client) -> Result<Vec<String>> {
    Ok(client.models().await?.into_iter().map(|model| model.name).collect())
}

/// Waits until these models can be asked for.
async fn until_served(client: &Client, expected: &[&str]) -> Result<()> {
    let wait = async {
        while names(client).await? != expected {
            time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(())
    };
    time::timeout(PATIENCE, wait).await.with_context(|| format!("{expected:?} are not served"))?
}

/// Runs all streams at once, and `meanwhile` when enough tokens have come.
async fn streams(
    client: &Client,
    meanwhile: impl Future<Output = Result<()>>,
) -> Result<Vec<Completion>> {
    let tokens = Arc::new(AtomicUsize::new(0));
    let enough = Arc::new(tokio::sync::Notify::new());
    let all = try_join_all((0..STREAMS).map(|stream| {
        let (client, tokens, enough) = (client.clone(), Arc::clone(&tokens), Arc::clone(&enough));
        async move {
            let messages = client.open(request(stream)).await?;
            collect(messages, |delta| {
                let n = delta.token_ids.len();
                let before = tokens.fetch_add(n, Ordering::Relaxed);
                if before < CHANGE_AFTER && before + n >= CHANGE_AFTER {
                    enough.notify_one();
                }
            })
            .await
        }
    }));
    let change = async {
        enough.notified().await;
        meanwhile.await
    };
    let (all, ()) = futures::try_join!(all, change)?;
    Ok(all)
}

/// Loads a third model and unloads it under a stream of its own, while the others' streams run.
async fn come_and_go(client: &Client, server: &str) -> Result<()> {
    until_served(client, &["play", "small"]).await?;
    let mut alone = Vec::new();
    for stream in 0..STREAMS {
        alone.push(client.generate(request(stream)).await?);
    }

    let disturbed = streams(client, async {
        let said = model(server, &["load", "demo-model", "--name", "third"]).await?;
        ensure!(said.contains("third is served"), "{said}");
        until_served(client, &["play", "small", "third"]).await?;
        // The weights of the first one's.
        let text = || Input::Prompt("KING HENRY.\n".to_owned());
        let third = client.generate(asking("third", text(), 101, MAX_TOKENS)).await?;
        ensure!(third.ids == alone[1].ids, "{third:?} is not {:?}", alone[1]);

        let mut open = client.open(asking("third", text(), 101, 2 * MAX_TOKENS)).await?;
        open.message().await?.context("it has begun")?;
        let said = model(server, &["unload", "third", "--grace", "0ms"]).await?;
        ensure!(said.contains("third is unloaded"), "{said}");
        let ended = loop {
            match open.message().await {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(status) => break Some(status),
            }
        };
        let status = ended.context("the stream was done before its model was unloaded")?;
        ensure!(Reason::of(&status) == Some(Reason::NoWorker), "no other worker has it: {status}");
        until_served(client, &["play", "small"]).await
    })
    .await?;
    for (stream, (got, expected)) in disturbed.iter().zip(&alone).enumerate() {
        ensure!(got == expected, "stream {stream}: {got:?}\nis not {expected:?}");
    }

    // Gone for callers, too, and what is left is told.
    let refused =
        client.generate(GenerateRequest { model: "third".to_owned(), ..request(0) }).await;
    let Err(error) = refused else { bail!("a model that is gone answers") };
    let status: &Status = error.downcast_ref().context("a status")?;
    ensure!(Reason::of(status) == Some(Reason::ModelUnknown), "{status}");
    ensure!(status.message().contains("play, small"), "{status}");

    let listed = model(server, &["list"]).await?;
    ensure!(listed.contains("play") && !listed.contains("third"), "{listed}");
    // Refusals are told in a word, and change nothing.
    for (words, expected) in [
        (&["load", "../../Cargo.toml"][..], "--model-dir"),
        (&["load", "bitnet-packed/expected.json"], "not a model"),
        (&["load", "bitnet-packed", "--name", "play"], "already"),
        (&["unload", "fourth"], "\"play\", \"small\""),
    ] {
        let Err(refused) = model(server, words).await else { bail!("{words:?} is not refused") };
        ensure!(format!("{refused:#}").contains(expected), "{words:?}: {refused:#}");
    }
    ensure!(model(server, &["list"]).await? == listed);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_come_and_go_under_streams_that_do_not_notice() -> Result<()> {
    let serve = ["serve", "--listen=127.0.0.1:0", "--worker-wait=1s"].map(str::to_owned);
    let server = Tercet::start(serve.into_iter().chain(models()))?;
    server.serving().await?;
    come_and_go(&Client::connect(server.address()).await?, server.address()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_follows_the_models_of_its_workers() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "models", "--listen", "127.0.0.1:0"];
    let cluster = cluster.map(str::to_owned);
    let worker = ["worker".to_owned()].into_iter().chain(cluster.clone()).chain(models());
    let worker = Tercet::start(worker)?;
    let gateway = ["gateway".to_owned(), "--worker-wait=1s".to_owned()];
    let gateway = Tercet::start(gateway.into_iter().chain(cluster))?;
    for part in [&worker, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;
    let Err(refused) = model(gateway.address(), &["list"]).await else {
        bail!("a gateway has no models of its own")
    };
    ensure!(format!("{refused:#}").contains("is a gateway"), "{refused:#}");
    come_and_go(&client, worker.address()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_an_unloaded_model_is_given_back() -> Result<()> {
    let scratch = Scratch::new("unloaded")?;
    let file = scratch.path().join("big.gguf");
    let mut synth = Tercet::command(["model", "synth", "--shape", "125m", "--out"]);
    synth.arg(&file);
    task::spawn_blocking(move || run(&mut synth)).await??;
    let size = fs::metadata(&file)?.len() >> 20;

    let dir = format!("--model-dir={}", scratch.path().display());
    let serve = ["serve", "--listen=127.0.0.1:0", "--kv-memory=256MiB", &dir];
    let mut serve = Tercet::command(serve);
    // Left to itself, the allocator has an arena for each thread it meets and raises the sizes from
    // which it gives memory back: it keeps tens of MiB, more or fewer as threads happen to run.
    for (setting, value) in [
        ("MALLOC_ARENA_MAX", "1"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
    ] {
        serve.env(setting, value);
    }
    let mut server = Tercet::spawn(&mut serve)?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;
    let mut after_unload = Vec::new();
    let before = server.process().resident()? >> 10;
    for round in 0..6 {
        model(server.address(), &["load", "big.gguf", "--name", "big"]).await?;
        until_served(&client, &["big", "demo"]).await?;
        // Fills KV pages, buffers and the prefix cache.
        let ids = (0..400).map(|id| id % 1000).collect();
        let input = Input::Tokens(tercet_proto::v1::TokenIds { ids });
        client.generate(asking("big", input, 7, 4)).await?;
        let loaded = server.process().resident()? >> 10;
        ensure!(loaded > before + size * 3 / 4, "{loaded} MiB hold a model of {size} MiB");
        model(server.address(), &["unload", "big"]).await?;
        let unloaded = server.process().resident()? >> 10;
        ensure!(
            unloaded < before + (loaded - before) / 3,
            "round {round}: {before} MiB before, {loaded} MiB with the model, {unloaded} MiB after"
        );
        after_unload.push(unloaded);
    }
    // Holes between small things stay, and the next round fills them. What each round keeps of a
    // model, if only its vocabulary, is there two times and more.
    let last = after_unload[4].min(after_unload[5]);
    ensure!(last <= after_unload[2] + 8, "memory grows: {after_unload:?} MiB");
    Ok(())
}
