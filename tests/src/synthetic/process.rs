//! A synthetic worker as a process.

use std::process::Command;

use anyhow::Result;

use super::Options;
use crate::{Process, helper};

/// A running synthetic worker that has bound its address; killed when dropped.
#[derive(Debug)]
pub struct SyntheticWorker {
    process: Process,
    address: String,
}

impl SyntheticWorker {
    /// Returns a command that starts one.
    pub fn command(options: &Options) -> Command {
        let mut command = Command::new(helper("synthetic-worker"));
        command.args(options.args());
        command
    }

    /// Starts one and waits until it is bound.
    ///
    /// # Errors
    ///
    /// Returns an error if it ends before, with what it said.
    pub fn start(options: &Options) -> Result<Self> {
        Self::spawn(&mut Self::command(options))
    }

    /// Starts one by a command of [`SyntheticWorker::command`].
    ///
    /// # Errors
    ///
    /// Returns an error as [`SyntheticWorker::start`] does.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let mut process = Process::start("synthetic-worker", command)?;
        let address = process.line("line `listening on`", |line| {
            line.strip_prefix("listening on ").map(str::to_owned)
        })?;
        Ok(Self { process, address })
    }

    /// Waits until it is ready and the registry tells so.
    ///
    /// # Errors
    ///
    /// Returns an error if that does not happen in time.
    pub fn registered(&mut self) -> Result<()> {
        self.process.line("line `registered`", |line| (line == "registered").then_some(()))
    }

    /// Returns the `HOST:PORT` that it listens at.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
