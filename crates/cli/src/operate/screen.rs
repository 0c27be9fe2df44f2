//! A terminal that shows one page, drawn anew again and again.

use std::{
    io::{self, Read as _, Write as _},
    thread,
};

use anyhow::{Context as _, Result};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// Goes over to the other page of the terminal, without a cursor.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// Goes back to what was there before.
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// The terminal, as it was before once this is dropped.
pub(super) struct Screen {
    found: Termios,
    page: String,
}

/// What ends the view.
pub(super) struct Exit {
    keys: mpsc::Receiver<u8>,
    interrupt: Signal,
    terminate: Signal,
}

impl Screen {
    pub(super) fn enter() -> Result<(Self, Exit)> {
        let interrupt = signal(SignalKind::interrupt()).context("listen for signals")?;
        let terminate = signal(SignalKind::terminate()).context("listen for signals")?;
        let found = tcgetattr(io::stdin()).context("read the mode of the terminal")?;
        let mut quiet = found.clone();
        // Keys come one by one and are not shown; Ctrl-C stays a signal.
        quiet.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &quiet).context("set the terminal's mode")?;
        let (sender, keys) = mpsc::channel(1);
        let screen = Self { found, page: String::new() };
        // Ends with the process: a read of a terminal cannot be called off.
        thread::Builder::new()
            .name("tercet-keys".to_owned())
            .spawn(move || {
                let keys = io::stdin().lock().bytes().map_while(Result::ok);
                for key in keys {
                    if sender.blocking_send(key).is_err() {
                        return;
                    }
                }
            })
            .context("start the thread that reads keys")?;
        let mut stdout = io::stdout().lock();
        stdout.write_all(ENTER)?;
        stdout.flush()?;
        Ok((screen, Exit { keys, interrupt, terminate }))
    }

    /// Shows a page, and a note below.
    pub(super) fn show(&mut self, page: &str, note: &str) -> io::Result<()> {
        page.clone_into(&mut self.page);
        self.draw(note)
    }

    /// Shows another note below the same page.
    pub(super) fn note(&self, note: &str) -> io::Result<()> {
        self.draw(note)
    }

    fn draw(&self, note: &str) -> io::Result<()> {
        let size = tcgetwinsize(io::stdout())?;
        let (rows, columns) = (usize::from(size.ws_row), usize::from(size.ws_col));
        let mut stdout = io::stdout().lock();
        stdout.write_all(frame(&self.page, note, rows, columns).as_bytes())?;
        stdout.flush()
    }
}

impl Exit {
    /// Returns when the user wants to leave: q, Ctrl-C, or SIGTERM.
    pub(super) async fn asked(&mut self) {
        loop {
            tokio::select! {
                key = self.keys.recv() => match key {
                    Some(b'q' | b'Q') | None => return,
                    Some(_) => {}
                },
                _ = self.interrupt.recv() => return,
                _ = self.terminate.recv() => return,
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no care.
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.found) {
            tracing::debug!(%error, "the terminal keeps its mode");
        }
        drop(io::stdout().write_all(LEAVE));
        drop(io::stdout().flush());
    }
}

/// Returns what draws a page over the one before: as many lines as there is room for, none longer.
fn frame(page: &str, note: &str, rows: usize, columns: usize) -> String {
    // A terminal that does not tell its size has room for everything.
    let (rows, columns) = (
        if rows == 0 { usize::MAX } else { rows },
        if columns == 0 { usize::MAX } else { columns },
    );
    let mut frame = String::from("\x1b[H");
    for line in page.lines().take(rows.saturating_sub(2)).chain(["", note]) {
        frame.extend(line.chars().take(columns));
        frame.push_str("\x1b[K\r\n");
    }
    frame.truncate(frame.len() - 2);
    frame.push_str("\x1b[J");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_cut_to_the_terminal() {
        assert_eq!(
            frame("one\ntwo\nthree\n", "note", 4, 3),
            "\x1b[Hone\x1b[K\r\ntwo\x1b[K\r\n\x1b[K\r\nnot\x1b[K\x1b[J"
        );
        assert!(frame("one\ntwo", "", 0, 0).contains("two"));
    }
}
