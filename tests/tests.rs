//! Behaviour across crates, on real processes and real parts; `tests/run` runs all of it.
//!
//! A module is a file beside this one. What several of them need is in the support library, `src/`.

mod aarch64;
mod architecture;
mod balance;
mod battery;
mod chaos;
mod chart;
mod damaged;
mod failover;
mod fixtures;
mod models;
mod network;
mod operate;
mod outage;
mod overload;
mod pipeline;
mod plots;
mod pods;
mod readme;
mod records;
mod rolling;
mod soak;
mod stall;
mod synthetic;
mod trace;
mod versions;
mod wire;
