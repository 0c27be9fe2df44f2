//! Whether a worker answers: a state machine that is told what happened and what time it is.
//!
//! ```text
//! ## Unheard   => (Answering | Silent | Gone | Unjudged)   a new worker: a report; nothing for
//!                                                          too long; refused; an older version
//! ## Answering => (Answering | Lost | Silent)   a sign of life; its reports broke off; nothing
//!                                               for too long
//! ## Lost      => (Answering | Gone | Silent)   reports come again; refused; nothing
//! ## Silent    => (Answering | Gone)            reports come again; refused
//! ## Gone      => (Answering)                   the refusal was no end after all
//! ## Unjudged: for good, its connections and streams have to tell
//! ```

use std::time::Duration;

use tokio::time::Instant;

/// Looks at a worker per `suspect_after`: its silence is noticed at most one part late.
const LOOKS: u32 = 4;

/// What is known of a worker's life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Answer {
    /// New: nothing has been heard yet.
    Unheard,
    /// Reports come.
    Answering,
    /// Its reports broke off a moment ago, and how it is will be known in a moment.
    Lost,
    /// Nothing has come for too long.
    Silent,
    /// Nobody listens there any more, or somebody else.
    Gone,
    /// It sends no reports: an older version.
    Unjudged,
}

impl Answer {
    /// Returns the name in logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Unheard => "unheard",
            Self::Answering => "answering",
            Self::Lost => "lost",
            Self::Silent => "silent",
            Self::Gone => "gone",
            Self::Unjudged => "unjudged",
        }
    }

    /// Returns whether new requests must not go there.
    pub(crate) fn is_suspect(self) -> bool {
        match self {
            Self::Unheard | Self::Answering | Self::Unjudged => false,
            Self::Lost | Self::Silent | Self::Gone => true,
        }
    }
}

/// The life of one worker.
#[derive(Debug)]
pub(super) struct Pulse {
    suspect_after: Duration,
    answer: Answer,
    /// When the last sign of life came.
    heard: Instant,
    looked: Instant,
}

impl Pulse {
    pub(super) fn new(suspect_after: Duration, now: Instant) -> Self {
        Self { suspect_after, answer: Answer::Unheard, heard: now, looked: now }
    }

    pub(super) fn answer(&self) -> Answer {
        self.answer
    }

    /// Returns how often to look.
    pub(super) fn beat(suspect_after: Duration) -> Duration {
        (suspect_after / LOOKS).max(Duration::from_millis(1))
    }

    /// A report came.
    pub(super) fn report(&mut self, now: Instant) {
        self.heard = now;
        if self.answer != Answer::Unjudged {
            self.answer = Answer::Answering;
        }
    }

    /// The reports broke off.
    pub(super) fn lose(&mut self) {
        if self.answer == Answer::Answering {
            self.answer = Answer::Lost;
        }
    }

    /// A connection was refused, or another incarnation answers.
    pub(super) fn refuse(&mut self) {
        if self.answer != Answer::Unjudged {
            self.answer = Answer::Gone;
        }
    }

    /// The worker knows nothing of reports.
    pub(super) fn give_up(&mut self) {
        self.answer = Answer::Unjudged;
    }

    /// Time has passed; `stirred` tells whether any stream brought a message since the last look.
    pub(super) fn look(&mut self, now: Instant, stirred: bool) {
        // Whoever looks late was held up itself, and may have left unread what came meanwhile.
        let late = (now - self.looked).saturating_sub(2 * Self::beat(self.suspect_after));
        self.heard = (self.heard + late).min(now);
        self.looked = now;
        // A message does not wake the dead: its stream may have been read late.
        if stirred && matches!(self.answer, Answer::Unheard | Answer::Answering) {
            self.heard = now;
        }
        let silent = now - self.heard >= self.suspect_after;
        if silent && matches!(self.answer, Answer::Unheard | Answer::Answering | Answer::Lost) {
            self.answer = Answer::Silent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(1);

    /// A pulse and its clock.
    struct Bed {
        pulse: Pulse,
        now: Instant,
    }

    impl Bed {
        fn new() -> Self {
            let now = Instant::now();
            Self { pulse: Pulse::new(AFTER, now), now }
        }

        /// Lets time pass in beats, with or without messages, and returns the answer.
        fn pass(&mut self, millis: u64, stirred: bool) -> Answer {
            let (end, beat) = (self.now + Duration::from_millis(millis), Pulse::beat(AFTER));
            while self.now + beat <= end {
                self.now += beat;
                self.pulse.look(self.now, stirred);
            }
            self.now = end;
            self.pulse.answer()
        }

        fn report(&mut self) {
            self.pulse.report(self.now);
        }
    }

    #[test]
    fn silence_is_suspect_and_a_report_ends_it() {
        let mut bed = Bed::new();
        bed.report();
        for _ in 0..20 {
            assert_eq!(bed.pass(750, false), Answer::Answering);
            bed.report();
        }
        assert_eq!(bed.pass(750, false), Answer::Answering);
        assert_eq!(bed.pass(500, false), Answer::Silent);
        assert_eq!(bed.pass(60_000, false), Answer::Silent);
        assert_eq!(bed.pass(1_000, true), Answer::Silent, "only a report is a sign of life now");
        bed.report();
        assert_eq!(bed.pulse.answer(), Answer::Answering);
        assert!(!Answer::Answering.is_suspect() && Answer::Silent.is_suspect());
    }

    #[test]
    fn messages_are_signs_of_life_too() {
        let mut bed = Bed::new();
        bed.report();
        assert_eq!(bed.pass(30_000, true), Answer::Answering);
        assert_eq!(bed.pass(1_000, false), Answer::Silent);
    }

    #[test]
    fn a_new_worker_has_as_long_to_say_something() {
        let mut bed = Bed::new();
        assert_eq!(bed.pass(750, false), Answer::Unheard);
        assert_eq!(bed.pass(250, false), Answer::Silent);
    }

    #[test]
    fn lost_reports_are_followed_by_the_truth() {
        let mut bed = Bed::new();
        bed.report();
        bed.pulse.lose();
        assert_eq!(bed.pulse.answer(), Answer::Lost);
        bed.report();
        assert_eq!(bed.pulse.answer(), Answer::Answering, "only the connection had broken");
        bed.pulse.lose();
        bed.pulse.refuse();
        assert_eq!(bed.pulse.answer(), Answer::Gone);
        bed.pulse.lose();
        assert_eq!(bed.pass(5_000, true), Answer::Gone);
        bed.report();
        bed.pulse.lose();
        assert_eq!(bed.pass(1_000, false), Answer::Silent, "a partition");
    }

    #[test]
    fn older_versions_are_not_judged() {
        let mut bed = Bed::new();
        bed.pulse.give_up();
        bed.pulse.refuse();
        bed.pulse.lose();
        assert_eq!(bed.pass(600_000, false), Answer::Unjudged);
        assert!(!Answer::Unjudged.is_suspect());
    }

    #[test]
    fn a_gateway_that_was_held_up_blames_nobody() {
        let mut bed = Bed::new();
        bed.report();
        bed.pass(250, false);
        bed.now += Duration::from_secs(10);
        bed.pulse.look(bed.now, false);
        assert_eq!(bed.pulse.answer(), Answer::Answering);
        assert_eq!(bed.pass(1_000, false), Answer::Silent, "it had its chance after that");
    }
}
