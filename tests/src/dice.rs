//! Repeatable choices.

use std::{
    env,
    hash::{BuildHasher as _, RandomState},
    ops::Range,
    time::Duration,
};

use anyhow::{Context as _, Result};

/// Draws numbers that follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// Returns the dice of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Draws any number.
    pub fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Draws a number of `low..high`.
    ///
    /// # Panics
    ///
    /// Panics if the range is empty.
    pub fn between(&mut self, low: u32, high: u32) -> u32 {
        assert!(low < high, "{low}..{high} is empty");
        low + u32::try_from(self.roll() % u64::from(high - low)).expect("less than a u32")
    }

    /// Draws one of some things.
    ///
    /// # Panics
    ///
    /// Panics if there are none.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let count = u32::try_from(all.len()).expect("few things");
        &all[usize::try_from(self.between(0, count)).expect("an index")]
    }

    /// Draws true once in so many times.
    ///
    /// # Panics
    ///
    /// Panics if that is 0.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.between(0, times) == 0
    }

    /// Draws a time in milliseconds.
    ///
    /// # Panics
    ///
    /// Panics if the range is empty.
    pub fn millis(&mut self, range: Range<u32>) -> Duration {
        Duration::from_millis(self.between(range.start, range.end).into())
    }

    /// Draws a number above 0 and at most 1.
    pub fn fraction(&mut self) -> f64 {
        // 53 bits: exactly what an f64 holds.
        #[expect(clippy::cast_precision_loss, reason = "at most 2^53")]
        let bits = ((self.roll() >> 11) + 1) as f64;
        bits / 9_007_199_254_740_992.0
    }

    /// Draws the time until the next of events that come so often on average, each by itself.
    pub fn gap(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(-self.fraction().ln() / per_second)
    }
}

/// Returns the number that an environment variable holds, if it is set.
///
/// # Errors
///
/// Returns an error that names the variable if it holds something else.
pub fn number_of(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = env::var(variable) else { return Ok(None) };
    let number = text.parse().with_context(|| format!("{variable}={text}: expected a number"))?;
    Ok(Some(number))
}

/// Returns the seed that an environment variable holds, else a new one.
///
/// # Errors
///
/// Returns an error that names the variable if it holds no number.
pub fn seed_of(variable: &str) -> Result<u64> {
    // Short, to be typed.
    let fresh = || RandomState::new().hash_one(0_u8) % 1_000_000_000;
    Ok(number_of(variable)?.unwrap_or_else(fresh))
}
