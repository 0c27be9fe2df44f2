//! Where entries come from: a terminal with a line editor, or a pipe.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use anyhow::{Context as _, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::{
    CompletionType, Config, Editor, Helper,
    completion::Completer,
    error::{ReadlineError, Signal as SeenSignal},
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};
use tokio::{signal::unix::Signal, sync::mpsc};

use super::entry::{COMMANDS, goes_on, name};

/// Entries that the history keeps.
const HISTORY: usize = 1000;
/// Ends what the line editor asked of the terminal besides its mode, and the line.
const LEAVE: &[u8] = b"\x1b[?2004l\n";

/// What came of a wait for an entry.
#[derive(Debug)]
pub(super) enum Typed {
    Entry(String),
    /// Ctrl-C.
    Interrupt,
    End,
}

/// Reads entries, one when asked.
///
/// On a thread of its own, which ends with the process: a read cannot be called off. What it does
/// to the terminal meanwhile is undone when this is dropped.
#[derive(Debug)]
pub(super) struct Input {
    wanted: SyncSender<()>,
    typed: mpsc::Receiver<Result<Typed>>,
    /// Whether an entry has been asked for that has not come.
    is_waiting: bool,
    /// The mode in which the terminal was found, if there is one.
    found: Option<Termios>,
}

impl Input {
    /// Reads from stdin; `history` is the file that remembers what was typed at a terminal.
    pub(super) fn new(history: Option<PathBuf>) -> Result<Self> {
        let (mut source, found) = if is_terminal() {
            let found = tcgetattr(io::stdin()).context("read the mode of the terminal")?;
            (Source::Terminal(Box::new(Terminal::new(history)?)), Some(found))
        } else {
            (Source::Pipe, None)
        };
        let (wanted, wants): (_, Receiver<()>) = sync_channel(1);
        let (sender, typed) = mpsc::channel(1);
        std::thread::Builder::new()
            .name("tercet-stdin".to_owned())
            .spawn(
                move || {
                    while wants.recv().is_ok() && sender.blocking_send(source.read()).is_ok() {}
                },
            )
            .context("start the thread that reads lines")?;
        Ok(Self { wanted, typed, is_waiting: false, found })
    }

    /// Returns the next entry.
    pub(super) async fn next(&mut self, interrupt: &mut Signal) -> Result<Typed> {
        if !self.is_waiting {
            if self.wanted.send(()).is_err() {
                return Ok(Typed::End);
            }
            self.is_waiting = true;
        }
        tokio::select! {
            biased;
            typed = self.typed.recv() => {
                self.is_waiting = false;
                typed.unwrap_or(Ok(Typed::End))
            }
            _ = interrupt.recv() => Ok(Typed::Interrupt),
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let Some(found) = self.found.as_ref().filter(|_| self.is_waiting) else { return };
        // A terminal that is gone needs no care.
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, found) {
            tracing::debug!(%error, "the terminal keeps its mode");
        }
        drop(io::stdout().write_all(LEAVE));
    }
}

/// Returns whether someone types.
pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Returns the file for what is typed.
pub(super) fn history_path(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")));
    Some(state?.join("tercet/chat-history"))
}

enum Source {
    Terminal(Box<Terminal>),
    Pipe,
}

impl Source {
    fn read(&mut self) -> Result<Typed> {
        match self {
            Self::Terminal(terminal) => terminal.read(),
            Self::Pipe => read_pipe(),
        }
    }
}

fn read_pipe() -> Result<Typed> {
    let mut entry = String::new();
    for line in io::stdin().lock().lines() {
        entry.push_str(&line.context("read the next line")?);
        if !goes_on(&entry) {
            return Ok(Typed::Entry(entry));
        }
        entry.push('\n');
    }
    Ok(if entry.is_empty() { Typed::End } else { Typed::Entry(entry) })
}

struct Terminal {
    editor: Editor<Hand, FileHistory>,
    history: Option<PathBuf>,
}

impl Terminal {
    fn new(history: Option<PathBuf>) -> Result<Self> {
        let config = Config::builder()
            .max_history_size(HISTORY)
            .context("set up the history")?
            .completion_type(CompletionType::List)
            .build();
        let mut editor = Editor::with_config(config).context("set up the line editor")?;
        editor.set_helper(Some(Hand));
        // Without the file, or with a broken one, a new history begins.
        if let Some(error) = history.as_ref().and_then(|path| editor.load_history(path).err()) {
            tracing::debug!(%error, "no history");
        }
        Ok(Self { editor, history })
    }

    fn read(&mut self) -> Result<Typed> {
        match self.editor.readline("> ") {
            Ok(entry) => {
                self.remember(&entry);
                Ok(Typed::Entry(entry))
            }
            // A key, or a signal from elsewhere.
            Err(ReadlineError::Interrupted | ReadlineError::Signal(SeenSignal::Interrupt)) => {
                Ok(Typed::Interrupt)
            }
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(error) => Err(error).context("read the next line"),
        }
    }

    /// Keeps an entry, at once: who ends a terminal ends this process as well.
    fn remember(&mut self, entry: &str) {
        if entry.trim().is_empty() {
            return;
        }
        let kept = self.editor.add_history_entry(entry).and_then(|is_new| {
            let Some(path) = self.history.as_deref().filter(|_| is_new) else { return Ok(()) };
            path.parent().map_or(Ok(()), make_folder)?;
            self.editor.append_history(path)
        });
        if let Err(error) = kept {
            tracing::warn!(%error, "the history cannot be kept; --no-history does without");
            self.history = None;
        }
    }
}

fn make_folder(path: &Path) -> Result<(), ReadlineError> {
    Ok(std::fs::create_dir_all(path)?)
}

/// What the line editor knows of entries: when one is complete, and the commands.
struct Hand;

impl Helper for Hand {}
impl Highlighter for Hand {}
impl Hinter for Hand {
    type Hint = String;
}

impl Validator for Hand {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if goes_on(context.input()) {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for Hand {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        Ok((0, candidates(&line[..position])))
    }
}

/// Returns the commands that begin so.
fn candidates(start: &str) -> Vec<String> {
    if !start.starts_with('/') {
        return Vec::new();
    }
    let names = COMMANDS.iter().map(|(usage, _)| name(usage));
    names.filter(|name| name.starts_with(start)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_completed() {
        assert_eq!(candidates("/re"), ["/regenerate"]);
        assert_eq!(candidates("/s"), ["/system", "/set", "/show", "/save"]);
        assert_eq!(candidates("hello"), [""; 0]);
    }

    #[test]
    fn the_history_is_in_the_state_folder() {
        let state = |name: &str| (name == "XDG_STATE_HOME").then(|| PathBuf::from("/s"));
        assert_eq!(history_path(state), Some(PathBuf::from("/s/tercet/chat-history")));
        let home = |name: &str| (name == "HOME").then(|| PathBuf::from("/h"));
        assert_eq!(history_path(home), Some(PathBuf::from("/h/.local/state/tercet/chat-history")));
        assert_eq!(history_path(|_| None), None);
    }
}
