//! Sets up logs and traces for the process, and takes them down without losing the last spans.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider};
use tokio::runtime::Runtime;
use tracing::Dispatch;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::exporter::RuntimeExporter;

#[cfg(test)]
mod tests;

/// How long a dropped guard waits for the last spans.
const DROP_TIMEOUT: Duration = Duration::from_secs(2);

/// Targets whose spans and events never become part of a trace: the exporter runs on them, so
/// its own traffic would be exported in turn.
const UNTRACED: [&str; 7] = ["axum", "h2", "hyper", "opentelemetry", "rustls", "tonic", "tower"];

/// What to log and where to send traces.
#[derive(Clone, Debug)]
pub struct Config {
    /// `service.name` of every span, such as `tercet-gateway`.
    pub service_name: String,
    /// `service.instance.id` of every span: which of the processes of that service.
    pub instance: String,
    /// OTLP/gRPC collector, such as `http://127.0.0.1:4317`. Without one no span leaves the
    /// process; trace contexts are still passed on.
    pub otlp_endpoint: Option<String>,
    /// Form of the log lines.
    pub log_format: LogFormat,
    /// What to log, in the syntax of `RUST_LOG`, such as `info,tercet_gateway=debug`.
    pub log_filter: String,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(UnknownLogFormat(text.to_owned())),
        }
    }
}

/// A log format that does not exist.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown log format {0:?}: expected text or json")]
pub struct UnknownLogFormat(pub String);

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Fault: the configuration.
    #[error("log filter {filter:?} is malformed, expected one like info,tercet_gateway=debug")]
    Filter {
        /// The filter given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Fault: the configuration.
    #[error("OTLP endpoint {endpoint:?} is unusable, expected one like http://127.0.0.1:4317")]
    Exporter {
        /// The endpoint given.
        endpoint: String,
        /// What is wrong with it.
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// Fault: the machine.
    #[error("start the exporter's thread")]
    Runtime(#[source] std::io::Error),
    /// Fault: us.
    #[error("telemetry is already set up in this process")]
    AlreadySet(#[source] tracing::subscriber::SetGlobalDefaultError),
}

/// Why the last spans may be lost.
#[derive(Debug, thiserror::Error)]
#[error("flush traces within {timeout:?}")]
pub struct ShutdownError {
    /// How long the flush was given.
    timeout: Duration,
    /// What went wrong.
    source: OTelSdkError,
}

/// Keeps traces flowing; flushes them when shut down or dropped.
#[must_use = "dropping it stops the export of traces"]
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
    /// The exporter's runtime. `None` without an exporter, and after the shutdown.
    runtime: Option<Runtime>,
}

impl Telemetry {
    /// Sends what spans are left, waiting at most `timeout`. Later spans are dropped.
    ///
    /// Blocks the thread: call it when the servers are down, outside of their runtime.
    pub fn shutdown(mut self, timeout: Duration) -> Result<(), ShutdownError> {
        self.stop(timeout)
    }

    fn stop(&mut self, timeout: Duration) -> Result<(), ShutdownError> {
        let Some(runtime) = self.runtime.take() else { return Ok(()) };
        let flushed = self.provider.shutdown_with_timeout(timeout);
        // Never waits: the exporter may hang in a dead connection.
        runtime.shutdown_background();
        flushed.map_err(|source| ShutdownError { timeout, source })
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Err(error) = self.stop(DROP_TIMEOUT) {
            tracing::warn!(error = &error as &dyn std::error::Error, "traces may be lost");
        }
    }
}

/// Sets up logs on stderr and traces, for the whole process.
///
/// Spans are sampled as their parent was; without a parent, always.
pub fn init(config: &Config) -> Result<Telemetry, InitError> {
    let (dispatch, telemetry) = build(config)?;
    tracing::dispatcher::set_global_default(dispatch).map_err(InitError::AlreadySet)?;
    Ok(telemetry)
}

/// Returns the subscriber of `config` and the guard that keeps it exporting.
fn build(config: &Config) -> Result<(Dispatch, Telemetry), InitError> {
    let filter = EnvFilter::try_new(&config.log_filter)
        .map_err(|source| InitError::Filter { filter: config.log_filter.clone(), source })?;

    let resource = Resource::builder()
        .with_service_name(config.service_name.clone())
        .with_attributes([
            KeyValue::new("service.instance.id", config.instance.clone()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ])
        .build();
    let mut provider = SdkTracerProvider::builder()
        .with_resource(resource)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)));
    let mut runtime = None;
    if let Some(endpoint) = &config.otlp_endpoint {
        let (exporter, exporter_runtime) = RuntimeExporter::start(endpoint)?;
        provider = provider.with_span_processor(BatchSpanProcessor::builder(exporter).build());
        runtime = Some(exporter_runtime);
    }
    let provider = provider.build();

    let traces = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("tercet"))
        // A task's span is entered on every poll: keep that free of clocks and thread locals.
        .with_context_activation(false)
        .with_tracked_inactivity(false)
        .with_location(false)
        .with_threads(false)
        .with_filter(
            Targets::new()
                .with_default(LevelFilter::INFO)
                .with_targets(UNTRACED.map(|target| (target, LevelFilter::OFF))),
        );
    let subscriber =
        tracing_subscriber::registry().with(log_layer(config.log_format).with_filter(filter));
    let dispatch = Dispatch::new(subscriber.with(traces));
    Ok((dispatch, Telemetry { provider, runtime }))
}

fn log_layer(format: LogFormat) -> Box<dyn Layer<Registry> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_current_span(false).boxed(),
    }
}
