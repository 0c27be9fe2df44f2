//! A worker without a model: real services and membership around a formula.
//!
//! ```text
//! Options (flags) --> run --> register in etcd, serve until SIGTERM, drain, leave
//!                      |
//!                      +-- Inference: Formula(prompt ids, seed)(index) at a set pace
//!                      +-- Worker, health
//! ```
//!
//! What a token is depends on the prompt, the seed and the index alone, so a stream can go on at
//! any index on any other synthetic worker of the same model, and a test knows at once when a token
//! is lost, repeated or another one. It costs no computation: what a test measures is the cluster.

mod administration;
mod formula;
mod generation;
mod inference;
mod load;
mod options;
mod process;
mod run;

use std::time::SystemTime;

pub use self::{
    formula::Formula,
    options::{Omission, Options},
    process::SyntheticWorker,
    run::run,
};

/// Returns the present time in microseconds of the system's clock, as synthetic workers stamp it.
pub fn micros_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
