//! Support for tests across crates: the binary `tercet` as real processes, and the real parts around
//! it that `tests/run` installs.
//!
//! - [`tool`] finds an installed part; without it a test says that it did not run, and under
//!   `tests/run`, which installs all of them, it fails.
//! - [`Tercet`] is a running `tercet` that has bound its address; [`Etcd`] a running etcd; both end
//!   when dropped. [`Process`] is what they are made of.
//! - [`run`] runs a command to its end; [`Scratch`] is a directory for one test.
//!
//! The tests themselves are `tests.rs` and the modules it names.

mod etcd;
mod process;
mod scratch;
mod tercet;
mod tools;

pub use self::{
    etcd::Etcd,
    process::{PATIENCE, Process, run},
    scratch::Scratch,
    tercet::{Tercet, connect, serving},
    tools::{did_not_run, full, tool, workspace},
};
