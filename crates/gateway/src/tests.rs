//! The gateway over fake workers: real gRPC through memory, with wires that can be cut, and a clock
//! that jumps instead of waiting.

mod admin;
mod aliases;
mod bench;
mod fake;
mod limits;
mod liveness;
mod models;
mod poison;
mod queue;
mod resume;
mod routing;
mod serving;
mod simulation;
