//! `tercet chat`: a conversation, line by line.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, Result};
use futures::FutureExt as _;
use tercet_proto::v1::{Chat, ChatMessage, generate_request::Input};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use crate::{
    args::{ChatArgs, LogArgs, SamplingArgs},
    backend::Backend,
    failure,
    output::{print, print_line},
    process::{self, Identity},
};

const HELP: &str = "\
/help         shows this
/reset        forgets the conversation
/system TEXT  tells the model TEXT before the conversation, from the next answer on
/quit         ends, as the end of input does
Ctrl-C stops an answer. Everything else is said to the model.";

/// Runs `tercet chat`.
pub(crate) fn run(args: &ChatArgs, log: &LogArgs) -> Result<()> {
    process::run(Identity::client(), log, || chat(args).boxed())
}

async fn chat(args: &ChatArgs) -> Result<()> {
    let mut backend = Backend::new(&args.backend).await?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for Ctrl-C")?;
    let mut lines = read_lines()?;
    let mut conversation = Conversation { system: args.system.clone(), messages: Vec::new() };
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        print_line("/help shows the commands.")?;
    }
    loop {
        if is_terminal {
            print("> ")?;
        }
        let line = tokio::select! {
            line = lines.recv() => line.transpose().context("read the next line")?,
            _ = interrupt.recv() => {
                print_line("\n/quit ends the conversation.")?;
                continue;
            }
        };
        let Some(line) = line else { break };
        match Entry::parse(&line) {
            Entry::Nothing => {}
            Entry::Quit => break,
            Entry::Help => print_line(HELP)?,
            Entry::Reset => conversation.messages.clear(),
            Entry::System(text) => conversation.system = text,
            Entry::Unknown(command) => {
                print_line(&format!("{command} is not a command; /help shows them."))?;
            }
            Entry::Say(text) => {
                let input = conversation.asking(&text);
                let said = answer(&mut backend, input, &args.sampling, &mut interrupt).await?;
                conversation.add(text, said);
            }
        }
    }
    backend.stop().await;
    Ok(())
}

/// Prints an answer as it comes and returns it, as far as it got before Ctrl-C. A request that
/// fails gets its error printed: the next one may work.
async fn answer(
    backend: &mut Backend,
    input: Input,
    sampling: &SamplingArgs,
    interrupt: &mut Signal,
) -> Result<String> {
    let mut said = String::new();
    let failed = {
        let telling = async {
            let mut generation = backend.generate(input, sampling).await?;
            while let Some(text) = generation.next().await? {
                print(&text)?;
                said.push_str(&text);
            }
            Ok(())
        };
        tokio::select! {
            told = telling => told.err(),
            _ = interrupt.recv() => None,
        }
    };
    if !said.ends_with('\n') {
        print("\n")?;
    }
    match failed {
        Some(error) if failure::is_broken_pipe(&error) => Err(error),
        Some(error) => {
            writeln!(io::stderr(), "error: {}", failure::message(&error))?;
            Ok(said)
        }
        None => Ok(said),
    }
}

/// What has been said so far.
#[derive(Debug, Default)]
struct Conversation {
    system: Option<String>,
    messages: Vec<ChatMessage>,
}

impl Conversation {
    /// Returns the request for the answer to `text`.
    fn asking(&self, text: &str) -> Input {
        let system = self.system.iter().map(|text| message("system", text));
        let said = self.messages.iter().cloned();
        let messages = system.chain(said).chain([message("user", text)]).collect();
        Input::Chat(Chat { messages })
    }

    /// Remembers what was said and what the model said to it. Without an answer neither counts:
    /// templates expect user and assistant to take turns.
    fn add(&mut self, text: String, answer: String) {
        if !answer.is_empty() {
            self.messages.push(message("user", &text));
            self.messages.push(message("assistant", &answer));
        }
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// What a line says.
#[derive(Debug, Eq, PartialEq)]
enum Entry {
    Nothing,
    Quit,
    Help,
    Reset,
    System(Option<String>),
    Unknown(String),
    Say(String),
}

impl Entry {
    fn parse(line: &str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Self::Nothing;
        }
        if !line.starts_with('/') {
            return Self::Say(line.to_owned());
        }
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match (command, rest) {
            ("/quit", "") => Self::Quit,
            ("/help", "") => Self::Help,
            ("/reset", "") => Self::Reset,
            ("/system", "") => Self::System(None),
            ("/system", text) => Self::System(Some(text.to_owned())),
            _ => Self::Unknown(line.to_owned()),
        }
    }
}

/// Reads stdin on a thread of its own, which ends with the process: a read cannot be called off.
fn read_lines() -> Result<mpsc::Receiver<io::Result<String>>> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::Builder::new()
        .name("tercet-stdin".to_owned())
        .spawn(move || {
            for line in io::stdin().lock().lines() {
                if sender.blocking_send(line).is_err() {
                    break;
                }
            }
        })
        .context("start the thread that reads lines")?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_said() {
        assert_eq!(Entry::parse("  "), Entry::Nothing);
        assert_eq!(Entry::parse(" hello /quit "), Entry::Say("hello /quit".to_owned()));
        assert_eq!(Entry::parse("/quit"), Entry::Quit);
        assert_eq!(Entry::parse("/reset "), Entry::Reset);
        assert_eq!(Entry::parse("/help"), Entry::Help);
        assert_eq!(Entry::parse("/system  Be brief."), Entry::System(Some("Be brief.".to_owned())));
        assert_eq!(Entry::parse("/system"), Entry::System(None));
        assert_eq!(Entry::parse("/quit now"), Entry::Unknown("/quit now".to_owned()));
        assert_eq!(Entry::parse("/exit"), Entry::Unknown("/exit".to_owned()));
    }

    #[test]
    fn turns_are_kept_in_order() {
        let roles = |conversation: &Conversation| match conversation.asking("last") {
            Input::Chat(chat) => {
                chat.messages.into_iter().map(|m| (m.role, m.content)).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        let pair = |role: &str, content: &str| (role.to_owned(), content.to_owned());
        let mut conversation = Conversation::default();
        conversation.add("first".to_owned(), "one".to_owned());
        conversation.add("cancelled".to_owned(), String::new());
        conversation.system = Some("brief".to_owned());
        assert_eq!(
            roles(&conversation),
            [
                pair("system", "brief"),
                pair("user", "first"),
                pair("assistant", "one"),
                pair("user", "last"),
            ]
        );
    }
}
