//! Signals that end a server.

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals over: from now on they end nothing by themselves.
    pub(crate) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for the first signal, asks for a drain through `stop`, and fails at the second.
    pub(crate) async fn watch(mut self, stop: &CancellationToken) -> Result<()> {
        let name = self.next().await;
        tracing::info!(signal = name, "stopping: streams may finish, a second signal ends them");
        stop.cancel();
        let name = self.next().await;
        bail!("a second signal ({name}) came before all streams had finished: they are cut off");
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
