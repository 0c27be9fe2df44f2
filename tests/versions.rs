//! Releases side by side: what one of the first wire contract does with this one, and the reverse.
//!
//! There is no released program yet that could be kept for these tests. An older gateway is what it
//! is to a worker: a caller that knows the messages of `fixtures/wire/first.binpb` and nothing else.
//! An older worker is a synthetic one without what has been added since.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tercet_proto::v1::{
    Finished, GenerateRequest, generate_request::Input, generate_response::Event,
};
use tercet_tests::{
    Client, Etcd, Tercet, connect, run, sampled, serving,
    synthetic::{Omission, Options, SyntheticWorker},
    tool, workspace,
};
use tokio::time;

const PROMPT: &str = "KING HENRY.\n";
const TOKENS: u32 = 24;

/// What a stream came to.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    ids: Vec<u64>,
    text: String,
    reason: String,
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// Calls a method as a program of the first contract does, and returns its answers.
fn first_contract(
    grpcurl: &Path,
    address: &str,
    method: &str,
    request: &Value,
) -> Result<Vec<Value>> {
    let mut call = Command::new(grpcurl);
    call.arg("-protoset").arg(workspace().join("tests/fixtures/wire/first.binpb"));
    call.args(["-plaintext", "-d", &request.to_string(), address, method]);
    let answers = run(&mut call)?;
    Ok(serde_json::Deserializer::from_str(&answers).into_iter().collect::<Result<_, _>>()?)
}

/// Puts the messages of a stream together; `Told::ids` begins with those resumed.
fn told(messages: &[Value], mut ids: Vec<u64>) -> Result<Told> {
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let mut text = String::new();
    for message in messages {
        if let Some(delta) = message.get("delta") {
            let index = number(&delta["index"]);
            ensure!(index == u64::try_from(ids.len())?, "a delta at {index} after {}", ids.len());
            ids.extend(delta["tokenIds"].as_array().into_iter().flatten().map(number));
            text += delta["text"].as_str().unwrap_or_default();
        }
    }
    let finished = &messages.last().context("no messages")?["finished"];
    Ok(Told {
        ids,
        text,
        reason: finished["reason"].as_str().context("not finished")?.to_owned(),
        prompt_tokens: number(&finished["usage"]["promptTokens"]),
        completion_tokens: number(&finished["usage"]["completionTokens"]),
    })
}

fn request() -> Value {
    json!({
        "prompt": PROMPT,
        "sampling": { "seed": "7" },
        "stop": { "max_tokens": TOKENS, "ignore_eos": true },
    })
}

#[tokio::test]
async fn programs_of_the_first_contract_use_this_release() -> Result<()> {
    let Some(grpcurl) = tool("grpcurl") else { return Ok(()) };
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "versions", "--listen", "127.0.0.1:0"];
    let worker = Tercet::start(["worker", "--threads", "1"].iter().chain(&cluster))?;
    let gateway = Tercet::start(["gateway"].iter().chain(&cluster))?;
    for part in [&worker, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;
    let expected = client.generate(sampled(Input::Prompt(PROMPT.to_owned()), 7, TOKENS)).await?;
    let usage = expected.finished.usage.unwrap_or_default();
    let expected = Told {
        ids: expected.ids.iter().map(|id| u64::from(*id)).collect(),
        text: expected.text,
        reason: "FINISH_REASON_MAX_TOKENS".to_owned(),
        prompt_tokens: usage.prompt_tokens.into(),
        completion_tokens: usage.completion_tokens.into(),
    };

    let generate = "tercet.v1.Inference/Generate";
    for (who, part) in [("gateway", &gateway), ("worker", &worker)] {
        let answers = first_contract(&grpcurl, part.address(), generate, &request())?;
        ensure!(told(&answers, Vec::new())? == expected, "{who}: {answers:?}");
        // As an older gateway moves a stream here, or an older client resumes one.
        let cut = 10;
        let mut resumed = request();
        resumed["resume"] = json!({ "seed": "7", "token_ids": expected.ids[..cut] });
        let answers = first_contract(&grpcurl, part.address(), generate, &resumed)?;
        let moved = told(&answers, expected.ids[..cut].to_vec())?;
        ensure!(
            moved.ids == expected.ids && expected.text.ends_with(&moved.text),
            "{who}: {moved:?}"
        );
        ensure!(moved.completion_tokens == expected.completion_tokens, "{who}: {moved:?}");
    }
    let described = "tercet.v1.Worker/Describe";
    let described = first_contract(&grpcurl, worker.address(), described, &json!({}))?;
    let models = described[0]["models"].as_array().context("no models")?;
    ensure!(models[0]["state"] == "MODEL_STATE_READY", "{described:?}");
    let refused = json!({ "prompt": PROMPT, "stop": { "max_tokens": 0 } });
    let refused = first_contract(&grpcurl, gateway.address(), generate, &refused);
    let message = refused.err().context("no tokens are no completion")?.to_string();
    ensure!(message.contains("InvalidArgument") && message.contains("max_tokens"), "{message}");
    Ok(())
}

/// Reads a stream of a worker that may be older, and calls `at` after ten tokens.
async fn read(
    client: &Client,
    request: GenerateRequest,
    mut at: impl FnMut() -> Result<()>,
) -> Result<(Vec<u32>, String, Finished)> {
    let mut stream = client.open(request).await?;
    let (mut ids, mut text) = (Vec::new(), String::new());
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Delta(delta)) => {
                ensure!(usize::try_from(delta.index)? == ids.len(), "{delta:?} at {}", ids.len());
                ids.extend(delta.token_ids);
                text += &delta.text;
                if ids.len() == 10 {
                    at()?;
                }
            }
            Some(Event::Finished(mut finished)) => {
                finished.timings = None;
                return Ok((ids, text, finished));
            }
            _ => {}
        }
    }
    anyhow::bail!("ended after {} tokens without finished", ids.len())
}

#[tokio::test]
async fn streams_move_between_older_workers_and_those_of_this_release() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let options = |name: &str, without: &[Omission]| -> Result<Options> {
        Ok(Options {
            etcd: vec![etcd.url()],
            cluster: "mixed".parse()?,
            drain_millis: 50,
            tell: true,
            without: without.to_vec(),
            ..Options::new(name.parse()?)
        })
    };
    let older = options("older", &Omission::ALL.map(|(_, omission)| omission))?;
    let newer = options("newer", &[])?;

    let mut first = SyntheticWorker::start(&older)?;
    first.registered()?;
    let mut load =
        tercet_proto::v1::worker_client::WorkerClient::new(connect(first.address()).await?);
    let absent = load.watch_load(tercet_proto::v1::WatchLoadRequest::default()).await;
    ensure!(absent.is_err_and(|status| status.code() == tonic::Code::Unimplemented));

    let url = etcd.url();
    let args = ["gateway", "--etcd", &url, "--cluster", "mixed", "--listen", "127.0.0.1:0"];
    let gateway = Tercet::start(args)?;
    serving(gateway.address()).await?;
    let client = Client::connect(gateway.address()).await?;
    let request = |seed| {
        let mut request = sampled(Input::Prompt("To be".to_owned()), seed, 60);
        request.model = older.model.clone();
        request
    };
    let mut expected = Vec::new();
    for seed in 0..4 {
        expected.push(read(&client, request(seed), || Ok(())).await?);
    }

    // Older to newer by a kill and a drain, then newer to older by the same.
    let mut present = first;
    for (seed, (next, kill)) in
        (0..).zip([(&newer, true), (&older, false), (&newer, false), (&older, true)])
    {
        let mut follower = None;
        let moved = read(&client, request(seed), || {
            let mut worker = SyntheticWorker::start(next)?;
            worker.registered()?;
            follower = Some(worker);
            if kill { present.process().kill() } else { present.process().signal("TERM") }
        });
        let moved = time::timeout(tercet_tests::PATIENCE, moved).await.context("it hangs")??;
        ensure!(moved == expected[usize::try_from(seed)?], "stream {seed}: {moved:?}");
        if !kill {
            ensure!(present.process().wait()?.success(), "drained");
        }
        present = follower.context("ten tokens came")?;
        let said = present.process().said();
        ensure!(said.contains(&format!("begin {seed} ")), "stream {seed} did not move: {said}");
    }
    Ok(())
}
