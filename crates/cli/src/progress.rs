//! What takes its time, told to a terminal.

use std::{
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    pin::pin,
    time::Duration,
};

use tokio::time::{Instant, interval_at};

/// What is shorter is not told.
const PATIENCE: Duration = Duration::from_millis(400);
/// How often the time is told.
const PERIOD: Duration = Duration::from_millis(100);

/// Runs `work`, and tells a terminal meanwhile what it is and how long it takes.
pub(crate) async fn showing<T>(what: &str, work: impl Future<Output = T>) -> T {
    if !io::stderr().is_terminal() {
        return work.await;
    }
    let start = Instant::now();
    let mut work = pin!(work);
    let mut ticks = interval_at(start + PATIENCE, PERIOD);
    let mut line = Line::new();
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = ticks.tick() => line.show(&format!("{what} {:.1} s", start.elapsed().as_secs_f64())),
        }
    }
}

/// A line of a terminal that goes when it is dropped; nothing elsewhere.
pub(crate) struct Line {
    is_terminal: bool,
    is_shown: bool,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { is_terminal: io::stderr().is_terminal(), is_shown: false }
    }

    pub(crate) fn show(&mut self, text: &str) {
        if !self.is_terminal {
            return;
        }
        self.is_shown = true;
        // A terminal that is gone needs no progress.
        drop(write!(io::stderr(), "\r{text}\x1b[K"));
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.is_shown {
            drop(write!(io::stderr(), "\r\x1b[K"));
        }
    }
}
