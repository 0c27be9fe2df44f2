//! What is told of a step.

use std::time::Duration;

use super::ScreenTally;
use crate::scheduler::{StepShape, Tally};

/// What the first stage did in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// What the step was made of.
    pub shape: StepShape,
    /// What happened since the step before.
    pub tally: Tally,
    /// What it took to compute, waiting for the threads not counted.
    pub elapsed: Duration,
    /// What the screen of the head did.
    pub screen: ScreenTally,
}

/// Is told of every step, on the compute thread: it must not block.
pub type StepObserver = Box<dyn FnMut(&StepReport) + Send>;
