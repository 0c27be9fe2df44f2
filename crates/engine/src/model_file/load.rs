//! How far the loading of a model is.

use std::ops::ControlFlow;

use super::error::ModelError;

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
