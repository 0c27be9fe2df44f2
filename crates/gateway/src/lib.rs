//! gRPC front door: routing over workers and exact resume.
//!
//! ```text
//! client --Generate--> Service --admit, resolve the model--> Relay --attempt--> worker a
//!                                                              |    broken: ids so far
//!                                                              +----resume----> worker b
//! Registry --View--> Fleet: one Link per worker (channel, load, health) --Policy--> the choice
//! ```
//!
//! - The fleet follows the registry's view and knows, for every worker, what the data plane says of
//!   it: a worker that breaks a stream is left alone for a while, whatever the registry says, and
//!   one that reports its load stays in use for as long as it does, whatever the registry forgets.
//! - A relay owns one client's stream. It forwards messages as they come and keeps only the token
//!   ids: with them and the seed the stream goes on exactly at any worker of the same identity.
//! - The server drains: it refuses new requests, lets streams finish, and ends what is left with a
//!   status that tells clients to resume elsewhere.

mod admin;
mod aliases;
mod config;
mod dialer;
mod fleet;
mod front;
mod offer;
mod policy;
mod relay;
mod server;
mod service;
mod span;
#[cfg(test)]
mod tests;

pub use self::{
    admin::Administration,
    aliases::{Alias, AliasError, Aliases},
    config::Config,
    dialer::{DialError, Dialer, LocalDialer, LocalIncoming, TcpDialer},
    fleet::Reported,
    offer::{Offer, SESSION_ID},
    policy::{
        Candidate, LeastOutstanding, Policy, PowerOfTwo, PrefixAffinity, RoundRobin, Routing,
        SessionAffinity, UnknownRouting,
    },
    server::{Gateway, Readiness, ServeError},
};
