use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

/// How a client behaves. Plain data; every field has a default.
#[derive(Clone, Debug)]
pub struct Options {
    /// Longest time for a connection to be made.
    pub connect_timeout: Duration,
    /// Pings a server that a stream waits for this often: one that hangs or vanished without a
    /// reset is found by them.
    pub keepalive_interval: Duration,
    /// Takes a server for gone when its ping is not answered within this time.
    pub keepalive_timeout: Duration,
    /// Times in a row that a request may fail before it is taken at all; at least one.
    pub opening_attempts: usize,
    /// Attempts in a row, without a new token, after which a stream that broke off is given up.
    pub attempts: usize,
    /// Time without a new token after which it is given up.
    pub patience: Duration,
    /// The first pause, once every address has been tried; each one after it is twice as long.
    /// Drawn between half of it and all of it, so that clients that were cut off together do not
    /// come back together.
    pub first_pause: Duration,
    /// The longest pause that a client takes by itself. One that a server asks for (`RetryInfo`)
    /// may be longer.
    pub longest_pause: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(10),
            opening_attempts: 8,
            attempts: 8,
            patience: Duration::from_secs(120),
            first_pause: Duration::from_millis(250),
            longest_pause: Duration::from_secs(4),
        }
    }
}

impl Options {
    /// Returns how long to wait before an attempt; `round` counts those before it that waited.
    pub(crate) fn pause(&self, round: usize) -> Duration {
        let longest = self.longest(round);
        let drawn = RandomState::new().hash_one(round);
        let fraction = 0.5 + f64::from(drawn.to_le_bytes()[0]) / f64::from(u8::MAX) / 2.0;
        longest.mul_f64(fraction)
    }

    fn longest(&self, round: usize) -> Duration {
        let factor = u32::try_from(round).ok().and_then(|round| 2_u32.checked_pow(round));
        let pause = factor.map(|factor| self.first_pause.saturating_mul(factor));
        pause.unwrap_or(self.longest_pause).min(self.longest_pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let options = Options::default();
        let millis = |round| options.longest(round).as_millis();
        assert_eq!([0, 1, 2, 3, 4, 5].map(millis), [250, 500, 1000, 2000, 4000, 4000]);
        assert_eq!(millis(1000), 4000);
        let drawn: Vec<_> = (0..32).map(|_| options.pause(2)).collect();
        assert!(drawn.iter().all(|pause| (500..=1000).contains(&pause.as_millis())), "{drawn:?}");
        assert!(drawn.iter().any(|pause| *pause != drawn[0]), "they come back together");
    }
}
