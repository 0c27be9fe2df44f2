//! What every command that runs asynchronous parts sets up: logs, traces, a runtime.

use std::{future::Future, io, num::NonZeroUsize, time::Duration};

use anyhow::{Context as _, Result};
use tercet_telemetry::Config;
use tokio::runtime::{Builder, Runtime};

use crate::{args::LogArgs, failure::misconfigured};

/// Threads for sockets where a model may be computed, on threads of its own.
pub(crate) const IO_THREADS: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");
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
    run_on(IO_THREADS, identity, log, main)
}

/// As [`run`], with so many threads for sockets.
pub(crate) fn run_on<F>(
    threads: NonZeroUsize,
    identity: Identity<'_>,
    log: &LogArgs,
    main: impl FnOnce() -> F,
) -> Result<()>
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
    let runtime = runtime(threads).context("start the threads for sockets")?;
    let done = runtime.block_on(async { main().await });
    // A read of stdin or a name lookup may never end; nothing of ours is left by now.
    runtime.shutdown_background();
    if let Err(error) = telemetry.shutdown(FLUSH) {
        tracing::warn!(error = &error as &dyn std::error::Error, "traces may be lost");
    }
    done
}

/// Returns a runtime of so many threads.
///
/// A single one is the caller's, and not a pool of one: what arrives on a socket then wakes no other
/// thread, and what several tasks have to send on a connection waits for all of them and goes out in
/// one piece.
fn runtime(threads: NonZeroUsize) -> io::Result<Runtime> {
    let mut builder = match threads.get() {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder.worker_threads(threads.get()).enable_all().build()
}

#[cfg(test)]
mod tests {
    use tokio::runtime::RuntimeFlavor;

    use super::*;

    #[test]
    fn one_thread_is_no_pool() {
        for (threads, flavor) in
            [(1, RuntimeFlavor::CurrentThread), (3, RuntimeFlavor::MultiThread)]
        {
            let runtime = runtime(NonZeroUsize::new(threads).unwrap()).unwrap();
            assert_eq!(runtime.handle().runtime_flavor(), flavor, "{threads}");
            assert_eq!(runtime.metrics().num_workers(), threads);
        }
    }
}
