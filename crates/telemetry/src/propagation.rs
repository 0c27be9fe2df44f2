//! W3C trace context in and out of gRPC metadata and message fields.

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{KeyRef, MetadataKey, MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// Makes the caller's span the parent of `span`, if the metadata names one.
///
/// Call it before anything else is done with the span: its children and its own context fix its
/// parent.
pub fn extract(metadata: &MetadataMap, span: &Span) {
    adopt(&MetadataExtractor(metadata), span);
}

/// Writes the context of `span` into the metadata of a call made for it.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    TraceContextPropagator::new().inject_context(&span.context(), &mut MetadataInjector(metadata));
}

/// Makes the span that `traceparent` names the parent of `span`. An empty or malformed one is
/// ignored. As [`extract`], call it first.
pub fn set_parent(span: &Span, traceparent: &str) {
    adopt(&TraceparentExtractor(traceparent), span);
}

/// Returns the context of `span` as a `traceparent`; empty if it is not part of a trace.
pub fn traceparent_of(span: &Span) -> String {
    let mut injector = TraceparentInjector(String::new());
    TraceContextPropagator::new().inject_context(&span.context(), &mut injector);
    injector.0
}

fn adopt(extractor: &dyn Extractor, span: &Span) {
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), extractor);
    if !parent.span().span_context().is_valid() {
        return;
    }
    if let Err(error) = span.set_parent(parent) {
        // Filtered out, or no telemetry in this process.
        tracing::trace!(%error, "trace context is not continued");
    }
}

struct MetadataExtractor<'a>(&'a MetadataMap);

impl Extractor for MetadataExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                KeyRef::Ascii(key) => Some(key.as_str()),
                KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

struct MetadataInjector<'a>(&'a mut MetadataMap);

impl Injector for MetadataInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        let key = MetadataKey::from_bytes(key.as_bytes());
        if let (Ok(key), Ok(value)) = (key, MetadataValue::try_from(value)) {
            self.0.insert(key, value);
        }
    }
}

struct TraceparentExtractor<'a>(&'a str);

impl Extractor for TraceparentExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

struct TraceparentInjector(String);

impl Injector for TraceparentInjector {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = value;
        }
    }
}
