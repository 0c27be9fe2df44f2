//! However an answer is computed, it is the same to the bit.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use tercet_kernels::Isa;
use tercet_proto::v1::{GenerateRequest, ScoreResponse, generate_request::Input};
use tercet_tests::{
    Client, Dice, FEATURES, Reference, Source, Tercet, did_not_run, full, metric, sampled,
    workspace,
};

const TOKENS: u32 = 24;

/// One more way to compute: its arguments, and the metric that tells that it did what it is for.
type Setting = (&'static [&'static str], &'static str);

const SETTINGS: &[Setting] = &[
    (&["--threads=1", "--isa=scalar", "--prefill-chunk=1"], "tercet_prefix_hit_tokens_total"),
    (&["--threads=2", "--isa=avx2", "--prefill-chunk=7"], "tercet_prefix_hit_tokens_total"),
    (&["--threads=2", "--prefill-chunk=128"], "tercet_prefix_hit_tokens_total"),
    // Two sequences of a long prompt do not fit.
    (&["--threads=1", "--kv-memory=2MiB", "--prefill-chunk=64"], "tercet_preemptions_total"),
    (&["--threads=2", "--kv-memory=2MiB", "--max-sequences=5"], "tercet_preemptions_total"),
    (&["--threads=2", "--max-sequences=1"], "tercet_prefix_hit_tokens_total"),
    (&["--threads=1", "--max-sequences=64"], "tercet_prefix_hit_tokens_total"),
];

async fn start(arguments: &[&str]) -> Result<(Tercet, Client)> {
    let serve = ["serve", "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"];
    let server = Tercet::start(serve.iter().chain(arguments))?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;
    Ok((server, client))
}

fn text() -> Result<String> {
    Ok(fs::read_to_string(workspace().join("tests/fixtures/demo-model/heldout.txt"))?)
}

/// Every way to ask, about a short prompt or two that share a long prefix, about all of them in a full
/// run; and some at random.
fn requests(text: &str) -> Vec<GenerateRequest> {
    let prompts = ["HAMLET.\n", &text[..700], &text[..720]];
    let mut requests = Vec::new();
    for (nth, (_, apply)) in FEATURES.iter().enumerate() {
        for (tail, prompt) in prompts.iter().enumerate() {
            if full() || nth % prompts.len() == tail {
                let seed = u64::try_from(3 * nth + tail).expect("few features");
                let mut request = sampled(Input::Prompt((*prompt).to_owned()), seed, TOKENS);
                apply(&mut request);
                requests.push(request);
            }
        }
    }
    let mut dice = Dice::new(3);
    let source = Source { model: "", vocab: 1000, context: 360, text, chat: true };
    requests.extend((0..8).map(|_| source.draw(&mut dice)));
    requests
}

/// Returns the bits of the scores of a prompt.
async fn scores(client: &Client, text: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = client.tokenize(&text[..600]).await?;
    let ScoreResponse { logprobs, top_ids } = client.score(ids).await?;
    Ok((logprobs.into_iter().map(f32::to_bits).collect(), top_ids))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_however_they_are_computed() -> Result<()> {
    let text = text()?;
    let mut references = Vec::new();
    let (server, client) = start(&["--threads=1", "--isa=scalar"]).await?;
    for request in requests(&text) {
        references.push(Reference::ask(&client, request).await?);
    }
    let scored = scores(&client, &text).await?;
    drop(server);

    for (arguments, evidence) in SETTINGS {
        if arguments.contains(&"--isa=avx2") && !Isa::Avx2.is_supported() {
            did_not_run("this CPU has no AVX2");
            continue;
        }
        check(arguments, evidence, &references, &scored, &text)
            .await
            .with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

/// Holds a server of a setting to the answers: of all at once, again, now that their prefixes are
/// cached, and resumed at every token.
async fn check(
    arguments: &[&str],
    evidence: &str,
    references: &[Reference],
    scored: &(Vec<u32>, Vec<u32>),
    text: &str,
) -> Result<()> {
    let (mut server, client) = start(arguments).await?;
    let metrics = server.listener("metrics")?;
    for _ in 0..2 {
        let all = references.iter().map(|reference| reference.repeat(&client));
        let (_, now) = futures::try_join!(try_join_all(all), scores(&client, text))?;
        ensure!(now == *scored, "scores differ beside streams");
    }
    for reference in references.iter().step_by(if full() { 2 } else { 11 }) {
        let rests: Vec<_> =
            reference.resumable().into_iter().map(|index| reference.resumed(index).1).collect();
        try_join_all(rests.iter().map(|rest| rest.repeat(&client))).await?;
    }
    let seen = metric(&metrics, evidence, &[])?;
    ensure!(seen > 0.0, "{evidence} is {seen}: the setting shows nothing");
    Ok(())
}
