//! A real etcd.

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::Command,
};

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
        let address = serving(&mut process).context("start etcd")?;
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

/// Waits until a member takes clients, and returns where.
fn serving(process: &mut Process) -> Result<String> {
    process.line("client address", |line| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let message = entry.get("msg")?.as_str()?;
        let ready = message.starts_with("serving client traffic");
        ready.then(|| entry.get("address")?.as_str().map(str::to_owned))?
    })
}

/// A running etcd of three members, on ports that stay theirs; gone when dropped.
#[derive(Debug)]
pub struct EtcdTrio {
    members: [Member; 3],
}

#[derive(Debug)]
struct Member {
    program: PathBuf,
    name: String,
    client: String,
    peer: String,
    all: String,
    process: Option<Process>,
    directory: Scratch,
}

impl EtcdTrio {
    /// Starts them and waits until they take clients; `None` where etcd is missing, as by [`tool`].
    ///
    /// # Errors
    ///
    /// Returns an error if one ends before, with what it said.
    pub fn start() -> Result<Option<Self>> {
        let Some(program) = tool("etcd") else {
            return Ok(None);
        };
        let [one, two, three] =
            ["one", "two", "three"].map(|name| Ok::<_, io::Error>((name, free()?)));
        let peers = [one?, two?, three?];
        let all = peers.each_ref().map(|(name, peer)| format!("{name}=http://{peer}")).join(",");
        let [one, two, three] = peers.map(|(name, peer)| {
            let directory = Scratch::new(&format!("etcd-{name}"))?;
            let (program, all, client) = (program.clone(), all.clone(), free()?);
            let name = name.to_owned();
            Ok::<_, io::Error>(Member {
                program,
                name,
                client,
                peer,
                all,
                process: None,
                directory,
            })
        });
        let mut trio = Self { members: [one?, two?, three?] };
        trio.restart()?;
        Ok(Some(trio))
    }

    /// Returns the `HOST:PORT` for clients of each.
    pub fn addresses(&self) -> [String; 3] {
        self.members.each_ref().map(|member| member.client.clone())
    }

    /// Kills a member without notice.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn kill(&mut self, member: usize) -> Result<()> {
        self.members[member].process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// Starts those that do not run, with all they had stored, and waits until they take clients.
    ///
    /// # Errors
    ///
    /// Returns an error if one ends before, with what it said.
    pub fn restart(&mut self) -> Result<()> {
        let mut started = Vec::new();
        for member in self.members.iter_mut().filter(|member| member.process.is_none()) {
            member.process = Some(member.launch()?);
            started.push(member);
        }
        // None does before most of them run.
        for process in started.into_iter().filter_map(|member| member.process.as_mut()) {
            serving(process).context("start etcd")?;
        }
        Ok(())
    }
}

impl Member {
    fn launch(&self) -> Result<Process> {
        let (client, peer) = (format!("http://{}", self.client), format!("http://{}", self.peer));
        let mut command = Command::new(&self.program);
        command.arg("--data-dir").arg(self.directory.path()).args(["--logger", "zap"]);
        command.args(["--log-outputs", "stdout", "--unsafe-no-fsync", "--name", &self.name]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &self.all]);
        Process::start(&format!("etcd {}", self.name), &mut command)
    }
}

/// Returns an address that was free a moment ago.
fn free() -> io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}
