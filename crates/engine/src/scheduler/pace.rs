//! How many prompt rows a step takes, so that the streams beside them hardly notice.
//!
//! ```text
//! time of a step = D(decoding rows) + sum over its prompt rows of (a + b * position)
//! prompt rows are added while their sum is below (stretch - 1) * D
//! ```
//!
//! `D` is the median of the latest steps without prompt rows; `a`, what the products of a row cost,
//! and `b`, what its attention costs more for each position before it, are fitted to what the other
//! steps took longer. Times are passed in: here is no clock. Nothing of this changes an answer, only
//! when it comes.

use std::{collections::VecDeque, time::Duration};

/// Steps without prompt rows that are remembered.
const WINDOW: usize = 8;
/// Steps with prompt rows after which one without is due, to see what the streams alone cost now:
/// their contexts grow.
const STALE: u32 = 64;
/// Least steps between two that are held free of prompt rows for the sake of measuring.
const PROBE_EVERY: u32 = 8;
/// Weight of what was observed before, at each observation of prompt rows.
const MEMORY: f64 = 0.95;
/// How far an observation may be from what was expected, as a factor: a page fault or a neighbour
/// on the same core must not stop the prompts for long.
const OUTLIER: f64 = 4.0;

/// What a step was made of.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct StepShape {
    /// Rows of sequences that continue from their last token.
    pub decode_rows: usize,
    /// Rows of drafts of what follows those.
    pub draft_rows: usize,
    /// Rows of prompts.
    pub prompt_rows: usize,
    /// Sum of the positions of the prompts' rows.
    pub prompt_positions: usize,
}

/// Estimates of what rows cost.
#[derive(Debug)]
pub(super) struct Pace {
    /// Decoding rows and seconds of the latest steps without prompt rows.
    decode: VecDeque<(f64, f64)>,
    /// Steps with prompt rows and decoding ones since the last without.
    mixed: u32,
    rows: Fit,
}

/// Least squares of seconds over (rows, positions), where old observations fade.
#[derive(Clone, Copy, Debug, Default)]
struct Fit {
    rows_rows: f64,
    rows_positions: f64,
    positions_positions: f64,
    rows_seconds: f64,
    positions_seconds: f64,
}

/// What a prompt row costs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct RowCost {
    row: f64,
    position: f64,
}

/// What a step may still take of prompts.
#[derive(Debug)]
pub(super) struct Budget {
    rows: usize,
    /// Seconds left, and what rows take of them; absent if nobody is held up.
    seconds: Option<(f64, RowCost)>,
    first: bool,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { decode: VecDeque::new(), mixed: 0, rows: Fit::default() }
    }

    /// Learns what a step took.
    pub(super) fn observe(&mut self, shape: &StepShape, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if shape.prompt_rows == 0 {
            // With drafts it is another kind of step.
            if shape.decode_rows > 0 && shape.draft_rows == 0 {
                self.decode.push_back((count(shape.decode_rows), seconds));
                if self.decode.len() > WINDOW {
                    self.decode.pop_front();
                }
                self.mixed = 0;
            }
            return;
        }
        let decode = if shape.decode_rows == 0 {
            0.0
        } else {
            self.mixed = self.mixed.saturating_add(1);
            match self.decode_seconds(shape.decode_rows) {
                Some(decode) => decode,
                // The share of the prompts cannot be told.
                None => return,
            }
        };
        let (rows, positions) = (count(shape.prompt_rows), count(shape.prompt_positions));
        let expected = self.rows.cost().map(|cost| cost.row * rows + cost.position * positions);
        let longer = match expected {
            Some(expected) => (seconds - decode).clamp(expected / OUTLIER, expected * OUTLIER),
            None => (seconds - decode).max(0.0),
        };
        self.rows.observe(rows, positions, longer);
    }

    /// Returns what a step with `decode_rows` may take of prompts: at most `chunk` rows, and no
    /// more than makes it take `stretch` times as long as without. Nothing at all, if it has to be
    /// seen first how long that is.
    pub(super) fn budget(&self, decode_rows: usize, chunk: usize, stretch: f64) -> Budget {
        let free = Budget { rows: chunk, seconds: None, first: true };
        if decode_rows == 0 || stretch == f64::MAX {
            return free;
        }
        let Some(cost) = self.rows.cost() else { return free };
        if self.probe_is_due(decode_rows) {
            return Budget { rows: 0, ..free };
        }
        let Some(decode) = self.decode_seconds(decode_rows) else { return free };
        Budget { seconds: Some(((stretch - 1.0) * decode, cost)), ..free }
    }

    fn probe_is_due(&self, decode_rows: usize) -> bool {
        let rows = count(decode_rows);
        let known = self.decode.iter().any(|(seen, _)| is_near(*seen, rows));
        self.decode.is_empty() || self.mixed >= STALE || (self.mixed >= PROBE_EVERY && !known)
    }

    /// Returns what a step of `decode_rows` and no others takes: the median of those of about as
    /// many rows. What was seen with more rows counts in proportion, with fewer as it is: the truth
    /// is more than that, and the prompts rather wait.
    fn decode_seconds(&self, decode_rows: usize) -> Option<f64> {
        let rows = count(decode_rows);
        let scaled = |(seen, seconds): &(f64, f64)| seconds * (rows / seen).min(1.0);
        let near = self.decode.iter().filter(|(seen, _)| is_near(*seen, rows));
        let mut seconds: Vec<f64> = near.map(scaled).collect();
        if seconds.is_empty() {
            seconds = self.decode.iter().map(scaled).collect();
        }
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied()
    }
}

impl Budget {
    /// Takes up to `wanted` rows from `position` on; the first asked gets at least one, so that
    /// prompts come to an end whatever they cost.
    pub(super) fn take(&mut self, position: usize, wanted: usize) -> usize {
        let most = wanted.min(self.rows);
        let Some((seconds, cost)) = &mut self.seconds else {
            self.rows -= most;
            return most;
        };
        let mut taken = 0;
        while taken < most {
            let row = cost.row + cost.position * count(position + taken);
            if row > *seconds && !self.first {
                break;
            }
            *seconds -= row;
            self.first = false;
            taken += 1;
        }
        self.rows -= taken;
        taken
    }
}

impl Fit {
    fn observe(&mut self, rows: f64, positions: f64, seconds: f64) {
        for (sum, product) in [
            (&mut self.rows_rows, rows * rows),
            (&mut self.rows_positions, rows * positions),
            (&mut self.positions_positions, positions * positions),
            (&mut self.rows_seconds, rows * seconds),
            (&mut self.positions_seconds, positions * seconds),
        ] {
            *sum = *sum * MEMORY + product;
        }
    }

    /// Returns the costs that fit best, none of them negative; nothing before any observation.
    fn cost(&self) -> Option<RowCost> {
        if self.rows_rows == 0.0 {
            return None;
        }
        let flat = RowCost { row: self.rows_seconds / self.rows_rows, position: 0.0 };
        let square = self.rows_rows * self.positions_positions;
        let determinant = square - self.rows_positions * self.rows_positions;
        // All rows at about the same positions: the two cannot be told apart.
        if determinant < 1e-3 * square {
            return Some(flat);
        }
        let row = self.rows_seconds * self.positions_positions
            - self.positions_seconds * self.rows_positions;
        let position =
            self.rows_rows * self.positions_seconds - self.rows_positions * self.rows_seconds;
        Some(if position <= 0.0 {
            flat
        } else if row <= 0.0 {
            let position = self.positions_seconds / self.positions_positions;
            RowCost { row: 0.0, position }
        } else {
            RowCost { row: row / determinant, position: position / determinant }
        })
    }
}

/// Returns whether a step of `seen` rows tells what one of `rows` takes.
fn is_near(seen: f64, rows: f64) -> bool {
    seen <= 1.5 * rows && rows <= 1.5 * seen
}

#[expect(clippy::cast_precision_loss, reason = "rows and positions are far below 2^52")]
fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with these costs in seconds: of a step, a row, and a row for each position.
    struct Machine {
        step: f64,
        row: f64,
        position: f64,
    }

    const MACHINE: Machine = Machine { step: 2e-3, row: 1e-3, position: 2e-7 };

    impl Machine {
        fn seconds(&self, shape: &StepShape) -> f64 {
            self.step
                + self.row * count(shape.decode_rows + shape.prompt_rows)
                + self.position * count(shape.prompt_positions)
        }
    }

    fn shape(decode_rows: usize, position: usize, prompt_rows: usize) -> StepShape {
        let prompt_positions = (position..position + prompt_rows).sum();
        StepShape { decode_rows, prompt_rows, prompt_positions, ..StepShape::default() }
    }

    fn step(pace: &mut Pace, shape: StepShape, noise: f64) -> f64 {
        let seconds = MACHINE.seconds(&shape) * noise;
        pace.observe(&shape, Duration::from_secs_f64(seconds));
        seconds
    }

    /// Takes a prompt of `length` through, beside `decode_rows`; returns the longest step and the
    /// number of steps.
    fn take_through(pace: &mut Pace, decode_rows: usize, length: usize) -> (f64, usize) {
        let (mut position, mut longest, mut steps) = (0, 0.0_f64, 0);
        while position < length {
            let mut budget = pace.budget(decode_rows, 512, 1.6);
            let rows = budget.take(position, length - position);
            longest = longest.max(step(pace, shape(decode_rows, position, rows), 1.0));
            position += rows;
            steps += 1;
            assert!(steps < 20_000, "no progress at {position}");
        }
        (longest, steps)
    }

    #[test]
    fn a_prompt_stretches_steps_as_much_as_it_may_and_no_more() {
        let mut pace = Pace::new();
        assert_eq!(take_through(&mut pace, 0, 2000).1, 4, "alone it gets all rows");
        for decode_rows in [8, 24, 8, 16] {
            let alone = MACHINE.seconds(&shape(decode_rows, 0, 0));
            for _ in 0..20 {
                step(&mut pace, shape(decode_rows, 0, 0), 1.0);
            }
            let (longest, steps) = take_through(&mut pace, decode_rows, 6000);
            assert!(longest < 1.65 * alone, "{decode_rows}: {longest} {alone}");
            let mean = MACHINE.row + MACHINE.position * 3000.0;
            let fewest = 6000.0 * mean / (0.6 * alone);
            assert!(count(steps) < 1.35 * fewest + 100.0, "{decode_rows}: {steps} steps, {fewest}");
        }
    }

    #[test]
    fn outliers_hardly_matter() {
        let mut pace = Pace::new();
        step(&mut pace, shape(0, 0, 128), 1.0);
        for nth in 0..8 {
            step(&mut pace, shape(8, 0, 0), if nth % 3 == 2 { 30.0 } else { 1.0 });
        }
        let rows = |pace: &Pace| pace.budget(8, 512, 1.6).take(0, 512);
        assert!((4..=6).contains(&rows(&pace)), "{}", rows(&pace));
        step(&mut pace, shape(8, 0, 5), 100.0);
        assert!((4..=6).contains(&rows(&pace)), "128 rows weigh more: {}", rows(&pace));
    }

    #[test]
    fn what_the_streams_cost_is_looked_at_again() {
        let mut pace = Pace::new();
        let free = |pace: &Pace, n| pace.budget(n, 99, 1.6).take(0, 99);
        assert_eq!(free(&pace, 3), 99, "nothing is known, and nobody measures");
        step(&mut pace, shape(0, 0, 10), 1.0);
        assert_eq!(free(&pace, 3), 0, "a look at the streams first");
        step(&mut pace, shape(3, 0, 0), 1.0);
        let mut probes = 0;
        for nth in 0..1000 {
            let decode_rows = if nth < 500 { 3 } else { 30 };
            let mut budget = pace.budget(decode_rows, 99, 1.6);
            let rows = budget.take(nth, 99);
            probes += usize::from(rows == 0);
            step(&mut pace, shape(decode_rows, nth, rows), 1.0);
        }
        assert!((14..=18).contains(&probes), "{probes}");
    }

    #[test]
    fn a_row_is_taken_even_if_it_takes_too_long() {
        let mut pace = Pace::new();
        step(&mut pace, shape(0, 0, 100), 1000.0);
        step(&mut pace, shape(1, 0, 0), 1.0);
        let mut budget = pace.budget(1, 99, 1.6);
        assert_eq!((budget.take(0, 50), budget.take(0, 50)), (1, 0));
    }
}
