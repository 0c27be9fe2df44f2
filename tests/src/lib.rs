//! Support for tests across crates: the binary `tercet` as real processes, and the real parts around
//! it that `tests/run` installs.
//!
//! - [`tool`] finds an installed part; without it a test says that it did not run, and under
//!   `tests/run`, which installs all of them, it fails.
//! - [`Tercet`] is a running `tercet` that has bound its address; [`Etcd`] a running etcd, [`EtcdTrio`] one
//!   of three members; all end when dropped. [`Process`] is what they are made of.
//! - [`Client`] is a client of the public service, [`collect`] reads a stream and holds it to its
//!   promises. A [`Reference`] is an answer that others are held to, and [`FEATURES`] are all the
//!   ways to ask.
//! - [`synthetic`] is a worker without a model, [`Network`] and [`Host`] are machines of their own,
//!   [`relay`] is a bad network.
//! - [`Lab`] is a gateway with synthetic workers.
//! - [`Dice`] makes choices that can be made again; [`Sample`] and [`measured`] are for figures.
//! - [`run`] runs a command to its end; [`Scratch`] is a directory for one test.
//!
//! The tests themselves are `tests.rs` and the modules it names.

mod answer;
mod client;
mod dice;
mod etcd;
mod http;
mod lab;
mod measure;
mod network;
mod process;
pub mod relay;
mod scratch;
pub mod synthetic;
mod tercet;
mod tools;
mod variety;

pub use self::{
    answer::{Answer, End, Likelihood, Reference},
    client::{Client, Completion, collect, collect_from, greedy, sampled},
    dice::{Dice, number_of, seed_of},
    etcd::{Etcd, EtcdTrio},
    http::{http_get, http_post, metric},
    lab::Lab,
    measure::{Sample, resident_bytes},
    network::{Host, Network},
    process::{PATIENCE, Process, helper, run},
    scratch::Scratch,
    tercet::{Tercet, connect, serving},
    tools::{did_not_run, full, measured, python, tool, workspace},
    variety::{FEATURES, Feature, Source},
};
