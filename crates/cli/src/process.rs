//! What every command that runs asynchronous parts sets up: logs, traces, a runtime.

use std::{future::Future, time::Duration};

use anyhow::{Context as _, Result};
use tercet_telemetry::Config;

use crate::{args::LogArgs, failure::misconfigured};

/// Threads for sockets; the models are computed on threads of their own.
const IO_THREADS: usize = 2;
/// How long the last spans may take to reach the collector.
const FLUSH: Duration = Duration::from_secs(2);

/// What a process tells of itself.
#[derive(Debug)]
pub(crate) struct Identity<'a> {
    /// `service.name` of its spans.
    pub(crate) service: &'static str,
    /// Which of the processes of that service it is.
    pub(crate) instance: String,
    /// Where traces go.
    pub(crate) otlp_endpoint: Option<&'a str>,
    /// What is logged unless the user says otherwise.
    pub(crate) filter: &'static str,
}

impl Identity<'static> {
    /// Returns the identity of a command that is not a server.
    pub(crate) fn client() -> Self {
        Self { service: "tercet", instance: String::new(), otlp_endpoint: None, filter: "warn" }
    }
}

/// Sets up logs and traces, runs `main` to its end, and takes everything down.
pub(crate) fn run<F>(identity: Identity<'_>, log: &LogArgs, main: impl FnOnce() -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let telemetry = tercet_telemetry::init(&Config {
        service_name: identity.service.to_owned(),
        instance: identity.instance,
        otlp_endpoint: identity.otlp_endpoint.map(str::to_owned),
        log_format: log.format,
        log_filter: log.filter.clone().unwrap_or_else(|| identity.filter.to_owned()),
    })
    .map_err(misconfigured)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .enable_all()
        .build()
        .context("start the threads for sockets")?;
    let done = runtime.block_on(async { main().await });
    // A read of stdin or a name lookup may never end; nothing of ours is left by now.
    runtime.shutdown_background();
    if let Err(error) = telemetry.shutdown(FLUSH) {
        tracing::warn!(error = &error as &dyn std::error::Error, "traces may be lost");
    }
    done
}
