//! The binary `tercet`.

use std::{
    cell::RefCell,
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};
use tokio::time;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{PATIENCE, Process, process::release};

/// A running `tercet serve`, `worker` or `gateway` whose gRPC listener is bound.
#[derive(Debug)]
pub struct Tercet {
    process: Process,
    address: String,
    /// Lines said before the one of the gRPC listener.
    earlier: Vec<String>,
}

impl Tercet {
    /// Returns the path of the optimised binary.
    ///
    /// It is `TERCET_BIN` if set, as by `tests/run`; otherwise it is built first, so that a test
    /// never runs on an old one.
    ///
    /// # Panics
    ///
    /// Panics if it does not build.
    pub fn binary() -> &'static Path {
        static BINARY: OnceLock<PathBuf> = OnceLock::new();
        BINARY.get_or_init(|| {
            let set = env::var_os("TERCET_BIN").map(PathBuf::from);
            set.unwrap_or_else(|| release("tercet-cli").join("tercet"))
        })
    }

    /// Returns a command with these arguments that no setting of the developer's shell reaches.
    pub fn command(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(Self::binary());
        for (name, _) in env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("TERCET_") || name_text.starts_with("OTEL_") {
                command.env_remove(&name);
            }
        }
        // Nor the configuration of the machine.
        command.env("TERCET_CONFIG", "/dev/null").args(args);
        command
    }

    /// Starts a server with these arguments and waits until its gRPC listener is bound.
    ///
    /// # Errors
    ///
    /// Returns an error if it ends before, with what it said.
    pub fn start(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Self> {
        Self::spawn(&mut Self::command(args))
    }

    /// Starts a server by a command of [`Tercet::command`], as [`Tercet::start`] does.
    ///
    /// # Errors
    ///
    /// Returns an error as [`Tercet::start`] does.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = format!("{:?}", command.get_args().collect::<Vec<_>>());
        let mut process = Process::start(&name, command)?;
        let earlier = RefCell::new(Vec::new());
        let address = process.line("line `listening on`", |line| {
            earlier.borrow_mut().push(line.to_owned());
            line.strip_prefix("listening on ").map(str::to_owned)
        })?;
        Ok(Self { process, address, earlier: earlier.into_inner() })
    }

    /// Returns the `HOST:PORT` of its gRPC listener.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the `HOST:PORT` of another listener, by its name.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not tell it.
    pub fn listener(&mut self, name: &str) -> Result<String> {
        let prefix = format!("{name} listening on ");
        let find = |line: &str| line.strip_prefix(&prefix).map(str::to_owned);
        if let Some(address) = self.earlier.iter().find_map(|line| find(line)) {
            return Ok(address);
        }
        self.process.line(&format!("line `{prefix}`"), find)
    }

    /// Returns a new connection to its gRPC listener.
    ///
    /// # Errors
    ///
    /// Returns an error if it takes none.
    pub async fn connect(&self) -> Result<Channel> {
        connect(&self.address).await
    }

    /// Waits until its health answers SERVING.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not within [`PATIENCE`].
    pub async fn serving(&self) -> Result<()> {
        serving(&self.address).await.with_context(|| self.process.said())
    }

    /// Returns its process, to wait for more of its lines or to kill it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// Returns a new connection to a gRPC listener.
///
/// # Errors
///
/// Returns an error if nothing takes it.
pub async fn connect(address: &str) -> Result<Channel> {
    Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(PATIENCE)
        .connect()
        .await
        .with_context(|| format!("connect to {address}"))
}

/// Waits until the standard health service at an address answers SERVING.
///
/// # Errors
///
/// Returns an error if it does not within [`PATIENCE`].
pub async fn serving(address: &str) -> Result<()> {
    let wait = async {
        let request = HealthCheckRequest { service: String::new() };
        let mut client = HealthClient::new(connect(address).await?);
        let mut states = client.watch(request).await?.into_inner();
        while let Some(state) = states.message().await? {
            if state.status() == ServingStatus::Serving {
                return Ok(());
            }
        }
        bail!("{address}: the health stream ended before SERVING");
    };
    time::timeout(PATIENCE, wait)
        .await
        .with_context(|| format!("{address}: not SERVING within {PATIENCE:?}"))?
}
