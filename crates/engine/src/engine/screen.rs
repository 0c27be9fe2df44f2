//! Whether the head is screened, and what came of it.

use std::{fmt, ops::AddAssign, str::FromStr};

use thiserror::Error;

/// Whether a compressed copy of the head is kept, which tells the rows that could be chosen from
/// those that could not, so that few of the full-precision ones are read. It changes no answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum HeadScreen {
    /// Where it saves much: for large heads of 8 bits a weight or more.
    #[default]
    Auto,
    /// Never.
    Off,
    /// For every head.
    On,
}

impl HeadScreen {
    /// All choices.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Off, Self::On];
}

impl fmt::Display for HeadScreen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::On => "on",
        })
    }
}

/// The name of no choice.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
#[error("no way to screen a head {0:?}; expected auto, off or on")]
pub struct UnknownHeadScreen(pub String);

impl FromStr for HeadScreen {
    type Err = UnknownHeadScreen;

    fn from_str(name: &str) -> Result<Self, UnknownHeadScreen> {
        let mut all = Self::ALL.into_iter();
        all.find(|choice| choice.to_string() == name).ok_or_else(|| UnknownHeadScreen(name.into()))
    }
}

/// What the screen of a head did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ScreenTally {
    /// Tokens chosen with its help.
    pub tokens: u64,
    /// Rows of the head that were computed exactly for them.
    pub rows: u64,
    /// Tokens for which it could not rule out enough: the whole head was computed as well.
    pub fallbacks: u64,
}

impl AddAssign for ScreenTally {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.rows += other.rows;
        self.fallbacks += other.fallbacks;
    }
}
