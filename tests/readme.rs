//! Every command of the documents works as it is written there.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use tercet_tests::{Tercet, run, tool, workspace};

/// Where the documents say that the server listens.
const ADDRESS: &str = "127.0.0.1:7171";
/// Where they say that it serves its operators.
const ADMIN_ADDRESS: &str = "127.0.0.1:7173";

/// Returns the commands of the `sh` blocks of a document; lines continued by `\` are one.
fn commands(document: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(workspace().join(document)).context(document.to_owned())?;
    let mut commands = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "```sh" {
            continue;
        }
        let block: Vec<&str> = lines.by_ref().take_while(|line| line.trim() != "```").collect();
        let block = block.join("\n").replace("\\\n", " ");
        let of_block = block.lines().map(str::trim);
        commands.extend(
            of_block.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned),
        );
    }
    ensure!(!commands.is_empty(), "{document} has no commands");
    Ok(commands)
}

/// Runs a command of a document in a shell at the root of the checkout, with the installed parts on
/// the path and the server's addresses in place of the documented ones.
fn shell(command: &str, address: &str, admin: &str) -> Result<String> {
    let binary = Tercet::binary().to_string_lossy().into_owned();
    let command = command
        .replace(ADDRESS, address)
        .replace(ADMIN_ADDRESS, admin)
        .replace("target/release/tercet", &binary);
    let path = std::env::var("PATH").unwrap_or_default();
    let tools = workspace().join("target/tools/bin");
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", &command]).current_dir(workspace());
    shell.env("PATH", format!("{}:{path}", tools.display()));
    run(shell.env("PYTHONPATH", workspace().join("target/tools/python")))
}

#[tokio::test]
async fn the_commands_of_the_readme_work() -> Result<()> {
    if tool("grpcurl").is_none() {
        return Ok(());
    }
    let mut commands = commands("README.md")?.into_iter();
    ensure!(commands.next().as_deref() == Some("cargo run --release -- serve"), "first command");
    ensure!(commands.next().as_deref() == Some("tests/run"), "second command");
    let listeners = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut server = Tercet::start(["serve"].iter().chain(&listeners))?;
    server.serving().await?;
    let admin = server.listener("admin")?;
    for command in commands {
        let said = shell(&command, server.address(), &admin)?;
        check(&command, &said).with_context(|| format!("{command}\n{said}"))?;
    }
    Ok(())
}

/// Holds what a command said against what its document promises.
fn check(command: &str, said: &str) -> Result<()> {
    let expected: &[&str] = match command {
        _ if command.contains("\"logprobs\"") => {
            &["\"logprob\"", "\"top\"", "\"usage\"", "\"timings\"", "FINISH_REASON_MAX_TOKENS"]
        }
        _ if command.contains("\"grammar\"") => &["\"finished\"", "FINISH_REASON_EOS"],
        _ if command.contains("Inference/GetModel") => &["\"identity\"", "\"eosTokenIds\""],
        _ if command.contains("Inference/Tokenize") => &["\"ids\"", "KING HENRY.\\n"],
        _ if command.contains("Inference/Detokenize") => &["\"text\": \"KI\""],
        _ if command.contains("Inference/Generate") => {
            &["\"started\"", "\"delta\"", "\"finished\"", "FINISH_REASON_MAX_TOKENS"]
        }
        _ if command.contains("status") && command.contains("--json") => {
            &["\"worker_id\": \"local\"", "\"free_kv_tokens\""]
        }
        _ if command.contains("tercet status") => &["gateway ", "demo", "local", "connected"],
        _ if command.contains("Admin/GetStatus") => &["\"workerId\": \"local\"", "\"models\""],
        _ if command.contains("model list") => &["demo", "ready", "unassigned"],
        _ if command.ends_with("list") => {
            &["tercet.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"]
        }
        _ if command.contains(" describe ") => &["rpc Generate"],
        _ if command.contains("tercet generate") || command.contains("resume.py") => &[""],
        _ if command.contains("--print-config") => {
            &["threads = 2", "# flag --threads", "# profile edge", "# default"]
        }
        _ if command.contains("bench") => &["prefill", "decode"],
        _ if command.contains("model synth") => &[""],
        _ if command.contains("model inspect") => &["bitnet"],
        _ if command.contains("model verify") => &[" is whole, identity "],
        _ if command.contains("helm template") => &["kind: Deployment"],
        _ if command.starts_with("rm ") => return Ok(()),
        _ => bail!("no test knows this command: say here what it promises"),
    };
    ensure!(!said.trim().is_empty(), "it said nothing");
    for part in expected {
        ensure!(said.contains(part), "it did not say {part}");
    }
    Ok(())
}
