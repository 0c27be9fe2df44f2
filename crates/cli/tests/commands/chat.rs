//! `tercet chat`, through pipes and at a terminal.

use std::{
    io::{Read as _, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use crate::support::{Running, Scratch, signal, tercet};

/// How long an expected text may take.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_chat_goes_on_after_an_interrupt() {
    let mut chat = Running::start("chat --ignore-eos --seed 1");
    let mut stdin = chat.0.stdin.take().unwrap();
    let mut stdout = chat.0.stdout.take().unwrap();
    stdin.write_all(b"Speak, my lord.\n").unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    chat.signal("-INT");
    stdin.write_all(b"/help\n/quit\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\n/help "), "{rest}");
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
}

/// Returns what a chat prints to stdout when these lines are piped in.
pub(crate) fn piped(line: &str, entries: &str) -> String {
    let mut chat = Running::start(line);
    chat.0.stdin.take().unwrap().write_all(entries.as_bytes()).unwrap();
    let mut said = String::new();
    chat.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(chat.0.wait().unwrap().code(), Some(0), "{said}");
    said
}

#[test]
fn commands_work_through_a_pipe() {
    let scratch = Scratch::new("chat");
    let file = scratch.file("talk.json");
    let line = "chat --seed 1 --max-tokens 12 --ignore-eos";
    let said = piped(line, "Speak.\n/undo\nSpeak.\n");
    let answer = said.lines().next().unwrap();
    assert_eq!(said, format!("{answer}\ntook back: Speak.\n{answer}\n"));

    let entries = format!("Speak.\n/save {file}\n/new\n/show\n/load {file}\n/show\n/model\n");
    let said = piped(line, &entries);
    let expected = "\nignore-eos true\nmax-tokens 12\nseed 1\n0 turns\n1 turns\n";
    assert!(said.contains(expected), "{said}");
    assert!(said.contains("\n* demo  context 1024\n"), "{said}");
    let saved = std::fs::read_to_string(&file).unwrap();
    assert!(saved.contains("\"user\": \"Speak.\""), "{saved}");

    let said = piped(line, "/set max-tokens 3\n/set temperature 0\nSpeak.\n/show\n");
    assert!(said.len() < answer.len() + 60, "{said}");
    assert!(said.contains("\nmax-tokens 3\nseed 1\ntemperature 0\n1 turns\n"), "{said}");

    let said = piped(line, "/system Be\\\nbrief.\n/show\n/regenerate\nSpeak.\n/regenerate\n/show");
    assert!(said.starts_with("system Be\\\nbrief.\n"), "{said}");
    assert!(said.ends_with("1 turns\n"), "{said}");
}

#[test]
fn mistakes_in_a_chat_do_not_end_it() {
    let mut chat = Running::start("chat --max-tokens 3 --verbose");
    let entries = "/set temperature hot\n/lod x\n/load /no/such\n/model other\n/undo\nSpeak.\n";
    chat.0.stdin.take().unwrap().write_all(entries.as_bytes()).unwrap();
    let mut said = String::new();
    chat.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
    let lines: Vec<_> = said.lines().collect();
    for (line, expected) in lines.iter().zip([
        "error: temperature hot: expected a finite number of at least 0",
        "error: /lod is no command: did you mean /load?",
        "error: read /no/such: ",
        "error: no model other: there is demo",
        "error: nothing has been said yet",
        "[",
    ]) {
        assert!(line.starts_with(expected), "{line}");
    }
    assert!(lines[5].contains(" prompt tokens, 3 of the answer, "), "{said}");
    assert!(lines[5].contains(" tokens/s, first token after "), "{said}");
}

/// A command at a pseudo-terminal, which `script` makes.
pub(crate) struct Terminal {
    child: Child,
    keys: ChildStdin,
    shown: Receiver<Vec<u8>>,
    /// What has been shown and not yet expected.
    screen: String,
}

impl Terminal {
    fn start(line: &str, state: &str) -> Self {
        // A shell that stays between would die of Ctrl-C itself and tell that instead of our code.
        // Some replace themselves by the last command of `-c`, some do not.
        Self::run(&format!("exec tercet {line}"), state)
    }

    /// Runs a line of a shell; `tercet` in it is the binary.
    pub(crate) fn run(line: &str, state: &str) -> Self {
        let binary = tercet([""; 0]);
        let mut command = Command::new("script");
        let line = line.replace("tercet", binary.get_program().to_str().unwrap());
        command.args(["-q", "-e", "-c", &line, "/dev/null"]).env("SHELL", "/bin/sh");
        for (name, value) in binary.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("XDG_STATE_HOME", state).env("TERM", "xterm");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("script is there");
        let (sender, shown) = channel();
        let mut output = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let keys = child.stdin.take().unwrap();
        Self { child, keys, shown, screen: String::new() }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Waits until `text` is shown, and returns what was shown before it.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        loop {
            if let Some(at) = self.screen.find(text) {
                let before = self.screen[..at].to_owned();
                self.screen.drain(..at + text.len());
                return before;
            }
            match self.shown.recv_timeout(PATIENCE) {
                Ok(bytes) => self.screen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("no {text:?} in {:?}: {error}", self.screen),
            }
        }
    }

    /// Waits for the end and returns the exit code.
    pub(crate) fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

const UP: &str = "\x1b[A";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
/// A text of the demo model that takes a while.
const LONG: &str = "chat --seed 1 --ignore-eos --isa scalar --threads 1";

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let scratch = Scratch::new("chat-terminal");
    let (state, talk) = (scratch.file("state"), scratch.file("talk.json"));
    let whole = piped("chat --seed 1 --ignore-eos", "Speak, my lord.\n");
    let start: String = whole.chars().take_while(|c| *c != '\n').take(12).collect();

    let mut terminal = Terminal::start(LONG, &state);
    terminal.expect("/help");
    terminal.expect("> ");
    terminal.press("Speak, my lord.\r");
    terminal.expect("Speak, my lord.");
    terminal.expect(&start);
    terminal.press(CTRL_C);
    let rest = terminal.expect("> ");
    assert!(rest.len() + start.len() < whole.len(), "it went on to the end");
    terminal.press(&format!("/save {talk}\r"));
    terminal.expect("> ");
    terminal.press("/undo\r");
    terminal.expect("took back: Speak, my lord.");
    let saved = std::fs::read_to_string(&talk).unwrap();
    assert!(saved.contains(&start), "what came before Ctrl-C counts: {saved}");

    // Three entries up is what was said.
    terminal.expect("> ");
    terminal.press(&UP.repeat(3));
    terminal.expect("Speak, my lord.");
    terminal.press(CTRL_C);
    terminal.expect("Ctrl-C again");
    terminal.expect("> ");
    terminal.press("/show\r");
    terminal.expect("0 turns");
    terminal.expect("> ");
    terminal.press(CTRL_D);
    assert_eq!(terminal.end(), Some(0));

    // The next chat remembers.
    let mut terminal = Terminal::start(LONG, &state);
    terminal.expect("> ");
    terminal.press(&format!("{UP}{UP}"));
    terminal.expect("/undo");
    terminal.press(CTRL_C);
    terminal.expect("Ctrl-C again");
    terminal.expect("> ");
    terminal.press(CTRL_C);
    assert_eq!(terminal.end(), Some(0), "twice ends");
}

#[test]
fn entries_of_several_lines_are_one() {
    let scratch = Scratch::new("chat-lines");
    let mut terminal = Terminal::start("chat --max-tokens 2 --no-history", &scratch.file("state"));
    terminal.expect("> ");
    terminal.press("one \\\rtwo\r");
    terminal.expect("> ");
    terminal.press("/undo\r");
    terminal.expect("took back: one \r\ntwo");
    terminal.expect("> ");
    terminal.press("/qu\t\r");
    assert_eq!(terminal.end(), Some(0), "Tab completes");
    assert!(!scratch.0.join("state").exists(), "no history was asked for");
}

#[test]
fn sigterm_ends_a_chat_and_leaves_the_terminal_as_it_was() {
    let scratch = Scratch::new("chat-sigterm");
    let line =
        "stty -g; sh -c 'echo pid $$.; exec tercet chat --no-history'; echo code $?; stty -g";
    let mut terminal = Terminal::run(line, &scratch.file("state"));
    let before = terminal.expect("pid ");
    let pid = terminal.expect(".").parse().unwrap();
    terminal.expect("/help");
    terminal.expect("> ");
    // The line editor is there.
    terminal.press("half a li");
    terminal.expect("half a li");
    signal(pid, "-TERM");
    let said = terminal.expect("code 0\r\n");
    assert!(said.contains("\x1b[?2004l"), "bracketed paste is off: {said:?}");
    let after = terminal.expect("\r\n");
    assert_eq!(after.trim(), before.trim());
    assert_eq!(terminal.end(), Some(0));
}

#[test]
fn sigterm_ends_an_answer() {
    let mut chat = Running::start("chat --ignore-eos --seed 1");
    let mut stdin = chat.0.stdin.take().unwrap();
    stdin.write_all(b"Speak, my lord.\n").unwrap();
    chat.0.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    chat.signal("-TERM");
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
}
