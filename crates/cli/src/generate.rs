//! `tercet generate`: a prompt continued on stdout.

mod listing;

use std::io::{self, IsTerminal as _};

use anyhow::Result;
use futures::FutureExt as _;
use tercet_proto::v1::{
    Delta, GenerateRequest, Logprobs, Prompt, generate_request::Input, generate_response::Event,
};

use crate::{
    args::{GenerateArgs, LogArgs},
    backend::Backend,
    output::{print, print_line},
    process::{self, Identity},
    progress::showing,
};

/// Runs `tercet generate`.
pub(crate) fn run(args: &GenerateArgs, log: &LogArgs) -> Result<()> {
    process::run(Identity::client(), log, || generate(args).boxed())
}

async fn generate(args: &GenerateArgs) -> Result<()> {
    let request = GenerateRequest {
        logprobs: args.logprobs.map(|top| Logprobs { top }),
        echo: args.echo.then_some(true),
        ..args.sampling.request(Input::Prompt(args.prompt.clone()))?
    };
    let is_listing = request.logprobs.is_some();
    let backend = Backend::new(&args.backend).await?;
    let mut generation = backend.generate(request).await?;
    let mut ends_line = true;
    let mut reading = String::from("waiting for a turn");
    loop {
        let piece = if reading.is_empty() {
            generation.next().await?
        } else {
            showing(|| reading.clone(), generation.next()).await?
        };
        match piece {
            Event::Started(started) => {
                reading = format!("reading {} prompt tokens", started.prompt_tokens);
            }
            Event::Prompt(prompt) if is_listing => {
                print_line(&listing::prompt(&prompt))?;
            }
            Event::Delta(delta) if is_listing => {
                reading.clear();
                print(&listing::tokens(&delta))?;
            }
            Event::Prompt(Prompt { text, .. }) | Event::Delta(Delta { text, .. }) => {
                reading.clear();
                if !text.is_empty() {
                    print(&text)?;
                    ends_line = text.ends_with('\n');
                }
            }
            Event::Finished(_) => break,
        }
    }
    // Scripts get the text and nothing else; a terminal's next prompt starts on its own line.
    if !ends_line && io::stdout().is_terminal() {
        print("\n")?;
    }
    backend.stop().await;
    Ok(())
}
