//! What a process tells of itself: traces, logs, metrics and admin endpoints.
//!
//! ```text
//! tracing --+--> stderr, text or JSON
//!           +--> spans --> OTLP exporter, on a runtime of its own --> collector
//! Metrics -----> /metrics   )
//! Probe -------> /livez     )  admin server
//! Probe -------> /readyz    )
//! ```
//!
//! - [`init`] sets up logs and traces and returns the guard that flushes them.
//! - [`extract`] and [`inject`] carry the trace context through gRPC metadata, [`set_parent`] and
//!   [`traceparent_of`] through fields of messages.
//! - [`Metrics`] holds every metric, under the names of the GenAI conventions where one fits.
//! - [`serve_admin`] serves them.

mod admin;
mod exporter;
mod metrics;
mod propagation;
mod setup;

pub use self::{
    admin::{Admin, Probe, serve_admin},
    metrics::{
        Component, EjectionCause, MAX_MODEL_LABELS, Metrics, MoveCause, Operation, PageState,
        QueueRefusal, RequestRecorder, RowKind, SequenceState, TokenKind,
    },
    propagation::{extract, inject, set_parent, traceparent_of},
    setup::{Config, InitError, LogFormat, ShutdownError, Telemetry, UnknownLogFormat, init},
};
