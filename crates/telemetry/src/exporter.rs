//! The OTLP exporter and the runtime it owns.
//!
//! The SDK's batch processor exports from a plain thread that blocks until the export is over.
//! tonic needs a live runtime meanwhile: on the process's own runtime that deadlocks as soon as
//! its only worker waits for a flush, as on a machine with one CPU. So the exporter has a runtime
//! of one thread which does nothing else.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::SpanData;
use tokio::runtime::{Handle, Runtime};

use crate::setup::InitError;

/// Longest export of one batch, retries included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// An OTLP exporter whose work is done on a given runtime.
pub(crate) struct RuntimeExporter {
    exporter: Arc<SpanExporter>,
    runtime: Handle,
    /// Whether the last export failed: only changes are logged, not every batch of an outage.
    failing: AtomicBool,
}

impl RuntimeExporter {
    /// Returns an exporter to `endpoint` and the runtime to keep for as long as it is used.
    pub(crate) fn start(endpoint: &str) -> Result<(Self, Runtime), InitError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp")
            .enable_all()
            .build()
            .map_err(InitError::Runtime)?;
        // tonic spawns its connection task on the current runtime.
        let entered = runtime.enter();
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|source| InitError::Exporter { endpoint: endpoint.to_owned(), source })?;
        drop(entered);
        let runtime_handle = runtime.handle().clone();
        let exporter = Self {
            exporter: Arc::new(exporter),
            runtime: runtime_handle,
            failing: AtomicBool::new(false),
        };
        Ok((exporter, runtime))
    }

    fn note(&self, outcome: &OTelSdkResult) {
        let failed = outcome.is_err();
        if self.failing.swap(failed, Ordering::Relaxed) == failed {
            return;
        }
        match outcome {
            Ok(()) => tracing::info!("traces reach the collector again"),
            Err(error) => tracing::warn!(%error, "traces do not reach the collector"),
        }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for RuntimeExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exporter = Arc::clone(&self.exporter);
        let export = self.runtime.spawn(async move { exporter.export(batch).await });
        let outcome = export
            .await
            .unwrap_or_else(|error| Err(OTelSdkError::InternalFailure(error.to_string())));
        self.note(&outcome);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

impl fmt::Debug for RuntimeExporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeExporter").field("failing", &self.failing).finish_non_exhaustive()
    }
}
