//! A real etcd.

use std::{net::Ipv4Addr, process::Command};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{Process, Scratch, tool};

/// A running etcd of one member, on free ports, with an empty store; gone when dropped.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    address: String,
    // Dropped after the process, whose store it holds.
    _directory: Scratch,
}

impl Etcd {
    /// Starts one and waits until it takes clients; `None` where etcd is missing, as by [`tool`].
    ///
    /// # Errors
    ///
    /// Returns an error if it ends before, with what it said.
    pub fn start() -> Result<Option<Self>> {
        Self::start_at(Ipv4Addr::LOCALHOST)
    }

    /// Starts one at an address, as [`Etcd::start`] does.
    ///
    /// # Errors
    ///
    /// Returns an error as [`Etcd::start`] does.
    pub fn start_at(address: Ipv4Addr) -> Result<Option<Self>> {
        let Some(program) = tool("etcd") else {
            return Ok(None);
        };
        let any = format!("http://{address}:0");
        let any = any.as_str();
        let directory = Scratch::new("etcd")?;
        let mut command = Command::new(program);
        command.arg("--data-dir").arg(directory.path()).args(["--logger", "zap"]);
        command.args(["--log-outputs", "stdout", "--unsafe-no-fsync"]);
        command.args(["--listen-client-urls", any, "--advertise-client-urls", any]);
        command.args(["--listen-peer-urls", any, "--initial-advertise-peer-urls", any]);
        command.arg("--initial-cluster").arg(format!("default={any}"));
        let mut process = Process::start("etcd", &mut command)?;
        let address = process.line("client address", |line| {
            let entry: Value = serde_json::from_str(line).ok()?;
            let message = entry.get("msg")?.as_str()?;
            let ready = message.starts_with("serving client traffic");
            ready.then(|| entry.get("address")?.as_str().map(str::to_owned))?
        });
        let address = address.context("start etcd")?;
        Ok(Some(Self { process, address, _directory: directory }))
    }

    /// Returns the URL for clients.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns its process, to stop or kill it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
