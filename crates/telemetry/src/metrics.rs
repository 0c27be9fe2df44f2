//! Every metric of every process, in one list.
//!
//! Names and buckets of `gen_ai_*` are those of the OpenTelemetry GenAI conventions
//! (<https://github.com/open-telemetry/semantic-conventions-genai>), spelt for Prometheus.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};

mod gateway;
mod labels;
mod requests;
#[cfg(test)]
mod tests;
mod worker;

use self::{gateway::GatewayFamilies, requests::RequestFamilies, worker::WorkerFamilies};
pub use self::{
    gateway::{EjectionCause, MoveCause, QueueRefusal},
    requests::{Component, Operation, RequestRecorder, TokenKind},
    worker::{PageState, RowKind, SequenceState},
};

/// Most distinct values of a model label; later ones are counted as `other`.
///
/// A series lives as long as its process: names must not be able to fill the memory.
pub const MAX_MODEL_LABELS: usize = 256;

type HistogramFamily<L> = Family<L, Histogram, fn() -> Histogram>;

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ModelLabels {
    gen_ai_request_model: String,
}

/// Every metric of the process. Clones are handles to the same values.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    /// Model labels in use. Locked for one look-up per request.
    models: Mutex<HashSet<String>>,
    requests: RequestFamilies,
    gateway: GatewayFamilies,
    worker: WorkerFamilies,
}

impl Metrics {
    /// Returns metrics that are all zero.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let requests = RequestFamilies::register(&mut registry);
        let gateway = GatewayFamilies::register(&mut registry);
        let worker = WorkerFamilies::register(&mut registry);
        registry.register(
            "tercet_build",
            "What runs here",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        Self(Arc::new(Inner { registry, models: Mutex::default(), requests, gateway, worker }))
    }

    /// Returns all metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.0.registry).expect("writing to a string cannot fail");
        out
    }

    fn model_label(&self, model: &str) -> String {
        let mut models = self.0.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.contains(model) {
            return model.to_owned();
        }
        if models.len() >= MAX_MODEL_LABELS {
            return "other".to_owned();
        }
        models.insert(model.to_owned());
        model.to_owned()
    }

    fn labels_of(&self, model: &str) -> ModelLabels {
        ModelLabels { gen_ai_request_model: self.model_label(model) }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers a metric, or a family of them, that starts at zero.
fn registered<M: Clone + Default + Metric>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Registers a family of histograms of seconds.
fn seconds<L: Clone + Eq + Hash>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    histogram: fn() -> Histogram,
) -> HistogramFamily<L>
where
    HistogramFamily<L>: Metric,
{
    let family = Family::new_with_constructor(histogram);
    registry.register_with_unit(name, help, Unit::Seconds, family.clone());
    family
}

fn gauge_value(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
