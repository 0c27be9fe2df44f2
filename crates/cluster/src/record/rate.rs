use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Tokens per second as measured, to two digits.
///
/// Coarse on purpose: a record that changed with every reading would be written all the time, and
/// whoever compares workers by it wants no more.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(into = "f64", try_from = "f64")]
pub struct Rate {
    /// Thousandths of a token per second; 0 while nothing is measured.
    thousandths: u64,
}

/// Why a stored rate cannot be used.
#[derive(Debug, Error)]
#[error("`{0}` is no rate: expected tokens per second, 0 or more")]
pub struct InvalidRate(f64);

impl Rate {
    /// Rounds a reading; what is not a positive number counts as nothing measured.
    pub fn measured(tokens_per_second: f64) -> Self {
        let Ok(exact) = Self::try_from(tokens_per_second) else { return Self::default() };
        let mut unit = 1;
        while exact.thousandths / unit >= 100 {
            unit *= 10;
        }
        Self { thousandths: (exact.thousandths + unit / 2) / unit * unit }
    }

    /// Returns whether nothing is measured yet.
    pub fn is_unknown(&self) -> bool {
        self.thousandths == 0
    }

    /// Returns whether two rates differ by less than a quarter of the greater.
    pub fn is_near(self, other: Self) -> bool {
        let (low, high) = (self.min(other), self.max(other));
        low == high || (high.thousandths - low.thousandths) * 4 < high.thousandths
    }

    /// Returns the tokens per second; 0 while nothing is measured.
    pub fn tokens_per_second(self) -> f64 {
        self.into()
    }
}

impl From<Rate> for f64 {
    fn from(rate: Rate) -> Self {
        rate.thousandths as Self / 1000.0
    }
}

impl TryFrom<f64> for Rate {
    type Error = InvalidRate;

    fn try_from(tokens_per_second: f64) -> Result<Self, InvalidRate> {
        /// A thousand million tokens per second, far beyond any machine.
        const MOST: f64 = 1e9;
        if !(0.0..=f64::MAX).contains(&tokens_per_second) {
            return Err(InvalidRate(tokens_per_second));
        }
        let thousandths = (tokens_per_second.min(MOST) * 1000.0).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and far below 2^64"
        )]
        let thousandths = thousandths as u64;
        Ok(Self { thousandths })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_rounded_to_two_digits() {
        for (reading, rounded) in [
            (0.0, 0.0),
            (0.0124, 0.012),
            (0.999, 1.0),
            (11.74, 12.0),
            (99.4, 99.0),
            (99.6, 100.0),
            (1234.0, 1200.0),
            (1250.0, 1300.0),
            (-1.0, 0.0),
            (f64::NAN, 0.0),
            (f64::INFINITY, 0.0),
        ] {
            let rate = Rate::measured(reading);
            assert_eq!(rate.tokens_per_second(), rounded, "{reading}");
            assert_eq!(rate.is_unknown(), rounded == 0.0, "{reading}");
        }
        assert_eq!(Rate::measured(f64::MAX).tokens_per_second(), 1e9);
    }

    #[test]
    fn rates_are_near_within_a_quarter() {
        for (a, b, near) in [
            (0.0, 0.0, true),
            (0.0, 1.0, false),
            (76.0, 100.0, true),
            (75.0, 100.0, false),
            (0.012, 0.015, true),
        ] {
            let (a, b) = (Rate::measured(a), Rate::measured(b));
            assert_eq!((a.is_near(b), b.is_near(a)), (near, near), "{a:?} {b:?}");
        }
    }

    #[test]
    fn the_stored_form_is_a_number() {
        let stored = serde_json::to_string(&Rate::measured(11.5)).unwrap();
        assert_eq!(stored, "12.0");
        for (stored, rate) in [("12", 12.0), ("0.25", 0.25), ("117.125", 117.125)] {
            let read: Rate = serde_json::from_str(stored).unwrap();
            assert_eq!(read.tokens_per_second(), rate, "whatever another release rounds to");
        }
        for wrong in ["-1", "null", "\"12\""] {
            assert!(serde_json::from_str::<Rate>(wrong).is_err(), "{wrong}");
        }
    }
}
