//! `tercet chat`: a conversation at a terminal, or through pipes.

mod conversation;
mod entry;
mod input;
mod parameters;

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use futures::FutureExt as _;
use tercet_proto::v1::{Usage, generate_request, generate_response::Event};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};

use self::{
    conversation::Conversation,
    entry::{COMMANDS, Entry},
    input::{Input, Typed},
    parameters::Parameters,
};
use crate::{
    args::{ChatArgs, LogArgs, SamplingArgs},
    backend::Backend,
    failure,
    output::{print, print_line},
    process::{self, Identity},
    progress::showing,
    variable,
};

/// Runs `tercet chat`; `given` has the words of its flags.
pub(crate) fn run(
    args: &ChatArgs,
    given: BTreeMap<String, Vec<String>>,
    log: &LogArgs,
) -> Result<()> {
    process::run(Identity::client(), log, || chat(args, given).boxed())
}

async fn chat(args: &ChatArgs, given: BTreeMap<String, Vec<String>>) -> Result<()> {
    // Flags that exclude each other are refused before the first entry.
    args.sampling.request(generate_request::Input::Prompt(String::new()))?;
    let backend = Backend::new(&args.backend).await?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let history = if args.no_history { None } else { input::history_path(variable) };
    let mut input = Input::new(history)?;
    if input::is_terminal() {
        print_line("/help shows the commands. Ctrl-C stops an answer, Ctrl-D ends.")?;
    }
    let mut session = Session {
        backend,
        conversation: Conversation::new(args.system.clone()),
        parameters: Parameters::new(args.sampling.clone(), given),
        is_verbose: args.verbose,
        file: None,
    };
    let talked = tokio::select! {
        talked = session.talk(&mut input, &mut interrupt) => talked,
        _ = terminate.recv() => Ok(()),
    };
    // First of all the terminal: its owner waits for it.
    drop(input);
    session.backend.stop().await;
    talked
}

/// Says what went wrong; the conversation goes on.
fn complain(what: &str) -> io::Result<()> {
    writeln!(io::stderr(), "error: {what}")
}

/// A conversation, and all that is set for it.
struct Session {
    backend: Backend,
    conversation: Conversation,
    parameters: Parameters,
    is_verbose: bool,
    /// Where the conversation was saved or loaded last.
    file: Option<PathBuf>,
}

impl Session {
    /// Takes entries until the last.
    async fn talk(&mut self, input: &mut Input, interrupt: &mut Signal) -> Result<()> {
        let mut interrupts = 0;
        loop {
            match input.next(interrupt).await? {
                Typed::Entry(text) => {
                    interrupts = 0;
                    let entry = Entry::parse(&text);
                    if entry == Entry::Quit {
                        return Ok(());
                    }
                    if let Err(error) = self.obey(entry, interrupt).await {
                        if failure::is_broken_pipe(&error) {
                            return Err(error);
                        }
                        complain(&failure::message(&error))?;
                    }
                }
                Typed::Interrupt if interrupts > 0 => return Ok(()),
                Typed::Interrupt => {
                    interrupts += 1;
                    print_line("Ctrl-C again or /quit ends the conversation.")?;
                }
                Typed::End => return Ok(()),
            }
        }
    }

    async fn obey(&mut self, entry: Entry, interrupt: &mut Signal) -> Result<()> {
        match entry {
            Entry::Nothing | Entry::Quit => {}
            Entry::Help => print(&help())?,
            Entry::New => self.conversation.clear(),
            Entry::System(text) => self.conversation.system = text,
            Entry::Set { name, value } => {
                self.parameters.set(&name, value.as_deref()).map_err(anyhow::Error::msg)?;
            }
            Entry::Show => self.show()?,
            Entry::Regenerate => self.regenerate(interrupt).await?,
            Entry::Undo => {
                let turn = self.conversation.undo().ok_or_else(nothing_said)?;
                print_line(&format!("took back: {}", turn.user))?;
            }
            Entry::Save(path) => {
                let path = PathBuf::from(path);
                self.conversation.save(&path, self.file.as_ref() == Some(&path))?;
                self.file = Some(path);
            }
            Entry::Load(path) => {
                self.conversation = Conversation::load(Path::new(&path))?;
                print_line(&format!("{} turns", self.conversation.len()))?;
                self.file = Some(PathBuf::from(path));
            }
            Entry::Model(None) => self.models().await?,
            Entry::Model(Some(name)) => self.choose(name).await?,
            Entry::Verbose => self.is_verbose = !self.is_verbose,
            Entry::Wrong(what) => complain(&what)?,
            Entry::Say(text) => {
                let sampling = self.parameters.current().clone();
                let asked = self.conversation.asking(&text);
                let answer = self.answer(asked, &sampling, interrupt).await?;
                self.conversation.add(text, answer);
            }
        }
        Ok(())
    }

    fn show(&self) -> Result<()> {
        if let Some(system) = &self.conversation.system {
            print_line(&format!("system {system}"))?;
        }
        for line in self.parameters.shown() {
            print_line(&line)?;
        }
        if !self.backend.model().is_empty() {
            print_line(&format!("model {}", self.backend.model()))?;
        }
        Ok(print_line(&format!("{} turns", self.conversation.len()))?)
    }

    /// Asks for another answer to what was said last. A seed given would repeat the one there is.
    async fn regenerate(&mut self, interrupt: &mut Signal) -> Result<()> {
        let turn = self.conversation.undo().ok_or_else(nothing_said)?;
        let sampling = SamplingArgs { seed: None, ..self.parameters.current().clone() };
        let asked = self.conversation.asking(&turn.user);
        let answer = self.answer(asked, &sampling, interrupt).await;
        match answer {
            Ok(answer) if !answer.is_empty() => self.conversation.add(turn.user, answer),
            Ok(_) => self.conversation.restore(turn),
            Err(error) => {
                self.conversation.restore(turn);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn models(&mut self) -> Result<()> {
        let models = self.backend.models().await?;
        let is_only = models.len() == 1;
        for model in models {
            let is_asked = is_only || model.name == self.backend.model();
            let mark = if is_asked { '*' } else { ' ' };
            print_line(&format!("{mark} {}  context {}", model.name, model.context_length))?;
        }
        Ok(())
    }

    async fn choose(&mut self, name: String) -> Result<()> {
        let names: Vec<_> =
            self.backend.models().await?.into_iter().map(|model| model.name).collect();
        if !names.contains(&name) {
            return Err(anyhow!("no model {name}: there is {}", names.join(", ")));
        }
        self.backend.set_model(name);
        Ok(())
    }

    /// Prints an answer as it comes and returns it, as far as it got before Ctrl-C or a failure,
    /// which is told.
    async fn answer(
        &mut self,
        asked: generate_request::Input,
        sampling: &SamplingArgs,
        interrupt: &mut Signal,
    ) -> Result<String> {
        // Those that came after the last answer had ended stop nothing.
        while interrupt.recv().now_or_never().is_some() {}
        let mut said = Said::new();
        let told = tokio::select! {
            told = said.tell(&self.backend, asked, sampling) => told,
            _ = interrupt.recv() => Ok(()),
        };
        if !said.text.ends_with('\n') {
            print("\n")?;
        }
        if let Err(error) = told {
            if failure::is_broken_pipe(&error) {
                return Err(error);
            }
            complain(&failure::message(&error))?;
        }
        if self.is_verbose {
            writeln!(io::stderr(), "[{}]", said.cost())?;
        }
        Ok(said.text)
    }
}

fn nothing_said() -> anyhow::Error {
    anyhow!("nothing has been said yet")
}

/// An answer and what it cost.
struct Said {
    text: String,
    asked: Instant,
    /// When the first and the last text came, and in how many pieces.
    first: Option<Instant>,
    last: Instant,
    usage: Option<Usage>,
}

impl Said {
    fn new() -> Self {
        let now = Instant::now();
        Self { text: String::new(), asked: now, first: None, last: now, usage: None }
    }

    async fn tell(
        &mut self,
        backend: &Backend,
        asked: generate_request::Input,
        sampling: &SamplingArgs,
    ) -> Result<()> {
        let mut generation = backend.generate(sampling.request(asked)?).await?;
        let mut reading = String::from("waiting for a turn");
        loop {
            let piece = match self.first {
                Some(_) => generation.next().await?,
                None => showing(|| reading.clone(), generation.next()).await?,
            };
            match piece {
                Event::Started(started) => {
                    reading = format!("reading {} tokens", started.prompt_tokens);
                }
                Event::Prompt(_) => {}
                Event::Delta(delta) => {
                    self.last = Instant::now();
                    self.first.get_or_insert(self.last);
                    print(&delta.text)?;
                    self.text.push_str(&delta.text);
                }
                Event::Finished(finished) => {
                    self.usage = finished.usage;
                    return Ok(());
                }
            }
        }
    }

    /// Returns the tokens and their speed.
    fn cost(&self) -> String {
        let Some(first) = self.first else { return "no answer".to_owned() };
        let waited = (first - self.asked).as_secs_f64();
        let Some(usage) = &self.usage else {
            return format!("stopped, first token after {waited:.2} s");
        };
        let took = (self.last - first).as_secs_f64();
        let tokens = usage.completion_tokens;
        let speed = if tokens > 1 && took > 0.0 {
            format!(", {:.1} tokens/s", f64::from(tokens - 1) / took)
        } else {
            String::new()
        };
        format!(
            "{} prompt tokens, {tokens} of the answer{speed}, first token after {waited:.2} s",
            usage.prompt_tokens
        )
    }
}

fn help() -> String {
    let width = COMMANDS.iter().map(|(usage, _)| usage.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (usage, what) in COMMANDS {
        text.push_str(&format!("{usage:width$}  {what}\n"));
    }
    text.push_str(
        "Ctrl-C stops an answer. A line that ends in \\ goes on in the next; \"\"\" begins and ends\n\
         a text of several lines. Everything else is said to the model.\n",
    );
    text
}
