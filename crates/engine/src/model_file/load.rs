//! How far the loading of a model is.

use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;

use super::error::ModelError;
use super::names::{UnknownName, parse};

/// Where the ternary weights of a file live.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Placement {
    /// In memory of the process, in huge pages, if the system has them; else as [`Self::Mapped`].
    #[default]
    Auto,
    /// In the mapped file where its layout allows, shared with other processes that map it.
    Mapped,
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Mapped => "mapped",
        })
    }
}

impl FromStr for Placement {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        parse("placement of weights", &[Self::Auto, Self::Mapped], name)
    }
}

/// How far a stage of loading is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LoadProgress {
    /// Bytes dealt with.
    pub done: u64,
    /// Bytes to deal with.
    pub total: u64,
}

/// Is told how far loading is, and says whether it shall go on.
pub type Report<'a> = &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>;

impl LoadProgress {
    /// Returns the beginning of so many bytes.
    pub(crate) fn of(total: u64) -> Self {
        Self { done: 0, total }
    }

    /// Counts bytes, and tells.
    pub(crate) fn advance(&mut self, bytes: u64, report: Report<'_>) -> Result<(), ModelError> {
        self.done += bytes;
        match report(*self) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ModelError::Interrupted),
        }
    }
}
