//! The wire contract in `proto/`, by the real buf.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tercet_tests::{Scratch, run, tool, workspace};

#[test]
fn protos_lint() -> Result<()> {
    let Some(buf) = tool("buf") else { return Ok(()) };
    run(Command::new(buf).arg("lint").current_dir(workspace().join("proto")))?;
    Ok(())
}

/// Returns what buf finds against the first wire contract, of which programs in the field are: the
/// image `fixtures/wire/first.binpb`, which stays as it is.
fn breaking(buf: &Path, protos: &Path) -> Result<()> {
    let first = workspace().join("tests/fixtures/wire/first.binpb");
    let mut check = Command::new(buf);
    check.args(["breaking", "--path", "tercet", "--against"]).arg(first);
    run(check.current_dir(protos))?;
    Ok(())
}

#[test]
fn nothing_of_the_first_contract_is_broken() -> Result<()> {
    let Some(buf) = tool("buf") else { return Ok(()) };
    breaking(&buf, &workspace().join("proto"))
}

#[test]
fn what_breaks_older_releases_is_found() -> Result<()> {
    let Some(buf) = tool("buf") else { return Ok(()) };
    let scratch = Scratch::new("wire")?;
    let below = scratch.path().join("tercet/v1");
    fs::create_dir_all(&below)?;
    let protos = workspace().join("proto");
    fs::copy(protos.join("buf.yaml"), scratch.path().join("buf.yaml"))?;
    let files: Vec<_> = fs::read_dir(protos.join("tercet/v1"))?.collect::<Result<_, _>>()?;
    for (file, from, to, finding) in [
        ("inference.proto", "uint64 seed = 1;", "uint64 seed = 9;", "with name \"seed\""),
        ("inference.proto", "uint32 index = 1;", "uint64 index = 1;", "changed type"),
        (
            "inference.proto",
            "FINISH_REASON_EOS = 1",
            "FINISH_REASON_EOS = 9",
            "on enum \"FinishReason\"",
        ),
        ("worker.proto", "  rpc Describe(", "  rpc Tell(", "RPC \"Describe\""),
    ] {
        for entry in &files {
            fs::copy(entry.path(), below.join(entry.file_name()))?;
        }
        breaking(&buf, scratch.path()).context("an unchanged copy")?;
        let text = fs::read_to_string(below.join(file))?;
        ensure!(text.contains(from), "{file} has no {from:?}");
        fs::write(below.join(file), text.replacen(from, to, 1))?;
        let found = breaking(&buf, scratch.path()).map_err(|error| error.to_string());
        ensure!(found.as_ref().is_err_and(|found| found.contains(finding)), "{from:?}: {found:?}");
    }
    Ok(())
}

/// Clients and scripts in the field spell these; renaming one breaks them without a word.
#[test]
fn public_spellings_hold() -> Result<()> {
    let Some(buf) = tool("buf") else { return Ok(()) };
    let mut build = Command::new(buf);
    build.args(["build", "--as-file-descriptor-set", "--output", "-#format=json"]);
    let image = run(build.current_dir(workspace().join("proto")))?;
    let image: Value = serde_json::from_str(&image)?;
    let file = list(&image, "file")
        .iter()
        .find(|file| file["name"] == "tercet/v1/inference.proto")
        .context("no tercet/v1/inference.proto")?;
    assert_eq!(file["package"], "tercet.v1");

    let service = &list(file, "service")[0];
    assert_eq!(service["name"], "Inference");
    let methods: Vec<_> = list(service, "method").iter().map(|method| &method["name"]).collect();
    for name in ["Generate", "Tokenize", "Detokenize", "Score", "ListModels", "GetModel"] {
        ensure!(methods.iter().any(|method| *method == name), "no method {name}: {methods:?}");
    }

    let generate = list(service, "method").iter().find(|method| method["name"] == "Generate");
    let generate = generate.context("no method Generate")?;
    assert_eq!(generate["serverStreaming"], true);
    let reaches = |from: &str, paths: &[&str]| -> Result<()> {
        for path in paths {
            walk(file, from, path).with_context(|| format!("{from}: {path}"))?;
        }
        Ok(())
    };
    reaches(
        ".tercet.v1.GenerateRequest",
        &[
            "model",
            "prompt",
            "tokens.ids",
            "chat.messages.role",
            "chat.messages.content",
            "chat.template_variables",
            "sampling.temperature",
            "sampling.top_k",
            "sampling.top_p",
            "sampling.seed",
            "sampling.min_p",
            "sampling.repetition_penalty",
            "sampling.frequency_penalty",
            "sampling.presence_penalty",
            "sampling.logit_bias",
            "stop.max_tokens",
            "stop.strings",
            "stop.ignore_eos",
            "stop.token_ids",
            "resume.seed",
            "resume.token_ids",
            "logprobs.top",
            "echo",
            "cache_salt",
            "grammar.json_schema",
            "grammar.json_object",
            "grammar.regex",
            "grammar.choice.texts",
        ],
    )?;
    reaches(
        ".tercet.v1.GenerateResponse",
        &[
            "started.model",
            "started.seed",
            "started.prompt_tokens",
            "delta.index",
            "delta.token_ids",
            "delta.text",
            "finished.reason",
            "delta.logprobs.top.logprob",
            "prompt.token_ids",
            "finished.usage.cached_tokens",
            "finished.stop_string",
            "finished.stop_token",
            "finished.timings.first_token_seconds",
        ],
    )?;
    reaches(".tercet.v1.TokenizeRequest", &["model", "text", "chat.messages", "token_bytes"])?;
    reaches(".tercet.v1.TokenizeResponse", &["tokens.ids", "rendered", "token_bytes"])?;
    reaches(".tercet.v1.DetokenizeRequest", &["model", "tokens.ids", "skip_special_tokens"])?;
    reaches(".tercet.v1.DetokenizeResponse", &["text"])?;
    reaches(".tercet.v1.GetModelRequest", &["model"])?;
    reaches(
        ".tercet.v1.GetModelResponse",
        &[
            "model.name",
            "model.identity",
            "architecture",
            "quantization",
            "kv_bytes_per_token",
            "bos_token_id",
            "eos_token_ids",
            "has_chat_template",
            "sampling_defaults.temperature",
        ],
    )?;
    reaches(".tercet.v1.ScoreRequest", &["model", "tokens.ids"])?;
    reaches(".tercet.v1.ScoreResponse", &["logprobs", "top_ids"])
}

/// Follows a path of fields through the messages of a file.
fn walk(file: &Value, message: &str, path: &str) -> Result<()> {
    let mut message = message.to_owned();
    for name in path.split('.') {
        let fields = list(file, "messageType")
            .iter()
            .find(|found| message == format!(".tercet.v1.{}", found["name"].as_str().unwrap_or("")))
            .map(|found| list(found, "field"))
            .with_context(|| format!("no message {message}"))?;
        let field = fields.iter().find(|field| field["name"] == name);
        let field = field.with_context(|| format!("no field {name} in {message}"))?;
        message = field["typeName"].as_str().unwrap_or("a scalar").to_owned();
    }
    Ok(())
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}
