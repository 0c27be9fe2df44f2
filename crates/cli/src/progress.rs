//! What takes its time, told to a terminal.

use std::{
    future::Future,
    io::{self, IsTerminal as _, Write},
    pin::pin,
    time::Duration,
};

use tercet_proto::v1::{LoadProgress, LoadStage};
use tokio::time::{Instant, interval_at};

/// What is shorter is not told.
const PATIENCE: Duration = Duration::from_millis(400);
/// How often the time is told.
const PERIOD: Duration = Duration::from_millis(100);

/// Runs `work`, and tells a terminal meanwhile what it is and how long it takes.
pub(crate) async fn showing<T>(what: impl Fn() -> String, work: impl Future<Output = T>) -> T {
    telling(Line::new(), what, work).await
}

/// Runs `work`, and shows meanwhile on `line` what it is and how long it takes.
async fn telling<T>(
    mut line: Line<impl Write>,
    what: impl Fn() -> String,
    work: impl Future<Output = T>,
) -> T {
    let start = Instant::now();
    let mut work = pin!(work);
    let mut ticks = interval_at(start + PATIENCE, PERIOD);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = ticks.tick() => {
                line.show(&format!("{}, {:.1} s", what(), start.elapsed().as_secs_f64()));
            }
        }
    }
}

/// A line of a terminal that goes when it is dropped; nothing elsewhere.
pub(crate) struct Line<W: Write = io::Stderr> {
    terminal: Option<W>,
    is_shown: bool,
}

impl Line {
    pub(crate) fn new() -> Self {
        Self { terminal: Some(io::stderr()).filter(io::Stderr::is_terminal), is_shown: false }
    }
}

impl<W: Write> Line<W> {
    pub(crate) fn show(&mut self, text: &str) {
        if let Some(terminal) = &mut self.terminal {
            self.is_shown = true;
            // A terminal that is gone needs no progress.
            drop(write!(terminal, "\r{text}\x1b[K"));
        }
    }
}

impl<W: Write> Drop for Line<W> {
    fn drop(&mut self) {
        if let (Some(terminal), true) = (&mut self.terminal, self.is_shown) {
            drop(write!(terminal, "\r\x1b[K"));
        }
    }
}

/// Says how far the loading of a model is.
pub(crate) fn load_line(progress: &LoadProgress) -> String {
    let what = match progress.stage() {
        LoadStage::Reading => "reading",
        LoadStage::Hashing => "hashing",
        LoadStage::WarmingUp => "warming up",
        LoadStage::Unspecified => "loading",
    };
    match progress.total_bytes {
        0 => what.to_owned(),
        total => format!("{what} {}% of {}", progress.done_bytes * 100 / total, size(total)),
    }
}

/// Returns bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{}.{} GiB", bytes >> 30, ((bytes % (1 << 30)) * 10) >> 30),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, timeout};

    use super::*;

    fn line(screen: &mut Vec<u8>) -> Line<&mut Vec<u8>> {
        Line { terminal: Some(screen), is_shown: false }
    }

    fn reading() -> String {
        "reading".to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_takes_its_time_is_told() {
        let mut screen = Vec::new();
        telling(line(&mut screen), reading, sleep(Duration::from_millis(300))).await;
        assert_eq!(screen, b"");
        let done = telling(line(&mut screen), reading, async {
            sleep(Duration::from_millis(550)).await;
            7
        });
        assert_eq!(done.await, 7);
        let shown = String::from_utf8(screen).unwrap();
        assert_eq!(shown, "\rreading, 0.4 s\x1b[K\rreading, 0.5 s\x1b[K\r\x1b[K");
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_goes_when_the_work_is_called_off() {
        let mut screen = Vec::new();
        let forever = telling(line(&mut screen), reading, std::future::pending::<()>());
        assert!(timeout(Duration::from_millis(450), forever).await.is_err());
        assert!(String::from_utf8(screen).unwrap().ends_with("s\x1b[K\r\x1b[K"));
    }

    #[test]
    fn progress_is_told_in_words() {
        let progress = |stage: LoadStage, done_bytes, total_bytes| {
            load_line(&LoadProgress { stage: stage.into(), done_bytes, total_bytes })
        };
        assert_eq!(progress(LoadStage::Reading, 1 << 29, 3 << 29), "reading 33% of 1.5 GiB");
        assert_eq!(progress(LoadStage::Hashing, 5 << 20, 5 << 20), "hashing 100% of 5 MiB");
        assert_eq!(progress(LoadStage::WarmingUp, 0, 0), "warming up");
    }
}
