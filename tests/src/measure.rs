//! Figures that tests measure.

use std::{fmt, fs, time::Duration};

use anyhow::{Context as _, Result};

/// Measured times.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<Duration>);

impl Sample {
    /// Takes one more.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the time that so many of a thousand do not exceed; 0 of no times.
    pub fn quantile(&self, of_1000: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * of_1000).div_ceil(1000).max(1);
        sorted.get(rank - 1).copied().unwrap_or_default()
    }

    /// Returns the middle one.
    pub fn median(&self) -> Duration {
        self.quantile(500)
    }

    /// Returns the time that 99 of 100 do not exceed.
    pub fn p99(&self) -> Duration {
        self.quantile(990)
    }

    /// Returns the longest.
    pub fn max(&self) -> Duration {
        self.quantile(1000)
    }
}

impl Extend<Duration> for Sample {
    fn extend<T: IntoIterator<Item = Duration>>(&mut self, times: T) {
        self.0.extend(times);
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let (median, p99, max) = (millis(self.median()), millis(self.p99()), millis(self.max()));
        write!(f, "n={:<5} median {median:.1} ms, p99 {p99:.1} ms, max {max:.1} ms", self.len())
    }
}

/// Returns the bytes of memory that a process has in use.
///
/// # Errors
///
/// Returns an error if it is gone.
pub fn resident_bytes(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmRSS")?;
    Ok(kib.parse::<u64>().with_context(|| path)? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_members_of_the_sample() {
        let mut sample = Sample::default();
        assert_eq!(sample.p99(), Duration::ZERO);
        sample.extend((1..=200).rev().map(Duration::from_millis));
        assert_eq!(sample.median(), Duration::from_millis(100));
        assert_eq!(sample.p99(), Duration::from_millis(198));
        assert_eq!(sample.max(), Duration::from_millis(200));
    }
}
