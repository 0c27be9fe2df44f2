//! Checkpoints in their own formats, against the answers of transformers, over gRPC.

use std::fs;

use anyhow::{Result, ensure};
use serde::Deserialize;
use tercet_proto::v1::{Chat, ChatMessage, TokenIds, generate_request::Input};
use tercet_tests::{Client, Tercet, greedy, workspace};

#[derive(Deserialize)]
struct Expected {
    tolerance: Tolerance,
    cases: Vec<Case>,
    chat: Option<ChatCase>,
    bits_per_byte: Option<BitsPerByte>,
}

#[derive(Deserialize)]
struct Tolerance {
    mean_abs_logprob: f64,
    argmax_gap: f64,
    bits_per_byte: Option<f64>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    /// How far the first logit is above the second at each of `greedy_ids`.
    greedy_top2_gap: Vec<f64>,
    logprobs_of_prompt: Vec<f64>,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Vec<Message>,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct BitsPerByte {
    text: String,
    value: f64,
    tokens: usize,
    bytes: usize,
}

fn expected(folder: &str) -> Result<Expected> {
    let path = workspace().join("tests/fixtures").join(folder).join("expected.json");
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// Serves a model of the fixtures.
async fn serve(model: &str) -> Result<(Tercet, Client)> {
    let path = workspace().join("tests/fixtures").join(model);
    let path = path.to_string_lossy();
    let server = Tercet::start(
        ["serve", "--listen", "127.0.0.1:0", "--threads", "2", "--model"]
            .into_iter()
            .chain([&*path]),
    )?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;
    Ok((server, client))
}

async fn check_cases(client: &Client, expected: &Expected) -> Result<()> {
    for case in &expected.cases {
        let prompt = &case.prompt;
        ensure!(client.tokenize(prompt).await? == case.prompt_ids, "{prompt:?}: prompt ids");

        let ids: Vec<u32> = case.prompt_ids.iter().chain(&case.greedy_ids).copied().collect();
        let length = ids.len();
        let scores = client.score(ids).await?;
        // What is missing would be compared with nothing below.
        ensure!(scores.logprobs.len() == length - 1 && scores.top_ids.len() == length);
        let n = case.logprobs_of_prompt.len();
        let total: f64 = case
            .logprobs_of_prompt
            .iter()
            .zip(&scores.logprobs)
            .map(|(expected, got)| (expected - f64::from(*got)).abs())
            .sum();
        let mean = total / n as f64;
        ensure!(
            mean <= expected.tolerance.mean_abs_logprob,
            "{prompt:?}: log-probabilities are off by {mean} on average"
        );
        let top_ids = &scores.top_ids[case.prompt_ids.len() - 1..];
        for (index, (id, gap)) in case.greedy_ids.iter().zip(&case.greedy_top2_gap).enumerate() {
            ensure!(
                top_ids[index] == *id || *gap <= expected.tolerance.argmax_gap,
                "{prompt:?}: token {index} is {}, not {id}, though the gap is {gap}",
                top_ids[index]
            );
        }
        check_greedy(client, case, expected.tolerance.argmax_gap).await?;
    }
    Ok(())
}

/// A free-running greedy continuation leaves the expected one only where two logits are close.
async fn check_greedy(client: &Client, case: &Case, argmax_gap: f64) -> Result<()> {
    let input = Input::Prompt(case.prompt.clone());
    let n = u32::try_from(case.greedy_ids.len())?;
    let completion = client.generate(greedy(input, n)).await?;
    ensure!(completion.ids.len() == case.greedy_ids.len());
    let differs = completion.ids.iter().zip(&case.greedy_ids).position(|(got, id)| got != id);
    if let Some(index) = differs {
        let gap = case.greedy_top2_gap[index];
        ensure!(gap <= argmax_gap, "{:?}: leaves at {index}, gap {gap}", case.prompt);
    }
    Ok(())
}

/// A conversation is answered as its rendered and tokenized form is.
async fn check_chat(client: &Client, chat: &ChatCase) -> Result<()> {
    let messages = chat
        .messages
        .iter()
        .map(|message| ChatMessage { role: message.role.clone(), content: message.content.clone() })
        .collect();
    let chat_of = Chat { messages, ..Chat::default() };
    let as_chat = client.generate(greedy(Input::Chat(chat_of), 16)).await?;
    ensure!(usize::try_from(as_chat.started.prompt_tokens)? == chat.ids.len());
    let ids = TokenIds { ids: chat.ids.clone() };
    let as_tokens = client.generate(greedy(Input::Tokens(ids), 16)).await?;
    ensure!(as_chat.ids == as_tokens.ids, "{:?} {:?}", as_chat.ids, as_tokens.ids);
    Ok(())
}

async fn check(model: &str, answers: &str) -> Result<()> {
    let expected = expected(answers)?;
    let (_server, client) = serve(model).await?;
    check_cases(&client, &expected).await?;
    if let Some(chat) = &expected.chat {
        check_chat(&client, chat).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_packed_folder_answers_as_transformers_does() -> Result<()> {
    check("bitnet-packed", "bitnet-packed").await
}

#[tokio::test]
async fn bf16_masters_answer_as_transformers_does() -> Result<()> {
    check("bitnet-bf16", "bitnet-bf16").await
}

#[tokio::test]
async fn a_gguf_of_bitnet_cpp_answers_as_transformers_does() -> Result<()> {
    check("gguf/bitnet-i2_s.gguf", "bitnet-packed").await
}

#[tokio::test]
async fn a_packed_llama_folder_answers_as_transformers_does() -> Result<()> {
    check("llama-packed", "llama-packed").await
}

#[tokio::test]
async fn a_llama_gguf_of_tq1_0_answers_as_transformers_does() -> Result<()> {
    check("gguf/llama-tq1_0.gguf", "llama-packed").await
}

#[tokio::test]
async fn a_llama_gguf_of_tq2_0_answers_as_transformers_does() -> Result<()> {
    check("gguf/llama-tq2_0.gguf", "llama-packed").await
}

#[tokio::test]
async fn a_qwen3_gguf_of_q2_0_answers_as_transformers_does() -> Result<()> {
    check("gguf/qwen3-q2_0.gguf", "qwen3-group64").await
}

#[tokio::test]
async fn a_folder_and_its_gguf_have_one_identity() -> Result<()> {
    let (_folder, of_folder) = serve("bitnet-packed").await?;
    let out = tercet_tests::Scratch::new("convert")?;
    let file = out.path().join("converted.gguf");
    let source = workspace().join("tests/fixtures/bitnet-packed");
    let mut convert = Tercet::command(["model", "convert"]);
    tercet_tests::run(convert.arg(source).arg(&file))?;
    let server = Tercet::start([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--model",
        &file.to_string_lossy(),
    ])?;
    server.serving().await?;
    let of_file = Client::connect(server.address()).await?;
    let identity = async |client: &Client| anyhow::Ok(client.models().await?[0].identity.clone());
    let (a, b) = (identity(&of_folder).await?, identity(&of_file).await?);
    ensure!(a.len() == 64 && a == b, "{a} {b}");
    Ok(())
}

#[tokio::test]
async fn the_built_in_model_is_as_good_as_it_was_trained() -> Result<()> {
    let expected = expected("demo-model")?;
    let server = Tercet::start(["serve", "--listen", "127.0.0.1:0", "--threads", "2"])?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;
    check_cases(&client, &expected).await?;

    let bits = expected.bits_per_byte.expect("the file has bits per byte");
    let text = workspace().join("tests/fixtures/demo-model").join(&bits.text);
    let text = fs::read_to_string(text)?;
    ensure!(text.len() == bits.bytes);
    let ids = client.tokenize(&text).await?;
    let (bos, ids) = ids.split_first().expect("BOS at least");
    ensure!(ids.len() == bits.tokens, "{} tokens", ids.len());
    let mut nats = 0.0;
    // As the answers were made: runs of 255 ids, each after one BOS.
    for run in ids.chunks(255) {
        let scores = client.score([*bos].iter().chain(run).copied().collect()).await?;
        ensure!(scores.logprobs.len() == run.len());
        nats -= scores.logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>();
    }
    let got = nats / std::f64::consts::LN_2 / text.len() as f64;
    let off = (got / bits.value - 1.0).abs();
    let tolerance = expected.tolerance.bits_per_byte.expect("the file has a tolerance");
    ensure!(off <= tolerance, "{got} bits per byte, {} expected", bits.value);
    Ok(())
}
