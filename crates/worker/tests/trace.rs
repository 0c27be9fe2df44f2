//! One request is one trace: the worker that heads a pipeline, its phases, and the later stage.
//!
//! A binary of its own, since the compute threads trace to the process-wide subscriber.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{future::pending, ops::Range, sync::Arc, time::Duration};

use opentelemetry::trace::{SpanId, TraceId, TracerProvider as _};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tercet_cluster::{MemoryRegistry, Registry};
use tercet_engine::EngineOptions;
use tercet_proto::v1::{
    self, generate_request::Input, generate_response::Event, inference_client::InferenceClient,
};
use tercet_telemetry::Metrics;
use tercet_worker::{Config, Worker};
use tokio::{net::TcpListener, task::JoinSet, time};
use tonic::{
    Request,
    transport::{Endpoint, server::TcpIncoming},
};
use tracing_subscriber::layer::SubscriberExt as _;

const CLIENT: &str = "00-0123456789abcdef0123456789abcdef-00000000000000aa-01";
const PATIENCE: Duration = Duration::from_secs(60);

async fn start(
    workers: &mut JoinSet<()>,
    registry: &MemoryRegistry,
    id: &str,
    layers: Range<usize>,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut config = Config::new(id.parse().unwrap(), address.clone());
    config.engine =
        EngineOptions { layers: Some(layers), kv_bytes: 64 << 20, ..EngineOptions::default() };
    let worker = Worker::build(config, Arc::new(registry.clone()), Metrics::new()).unwrap();
    workers.spawn(async move {
        worker.serve(TcpIncoming::from(listener), pending()).await.unwrap();
    });
    address
}

fn named<'a>(spans: &'a [SpanData], name: &str) -> &'a SpanData {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "spans named {name} among {spans:#?}");
    found[0]
}

fn attribute(span: &SpanData, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
    found.unwrap_or_else(|| panic!("no {key} in {span:#?}")).value.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_trace_across_stages() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();

    let registry = MemoryRegistry::new();
    let mut workers = JoinSet::new();
    let head = start(&mut workers, &registry, "head", 0..1).await;
    start(&mut workers, &registry, "tail", 1..3).await;
    let mut views = registry.watch();
    let ready =
        views.wait_for(|view| view.workers.values().any(|worker| worker.serves("demo").is_some()));
    time::timeout(PATIENCE, ready).await.expect("the pipeline is ready").unwrap();

    let mut request = Request::new(v1::GenerateRequest {
        input: Some(Input::Prompt("KING HENRY.\n".to_owned())),
        stop: Some(v1::Stop { max_tokens: Some(5), ..v1::Stop::default() }),
        sampling: Some(v1::Sampling {
            min_p: Some(0.25),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(0.5),
            logit_bias: [(3, 1.0), (4, -1.0)].into(),
            ..v1::Sampling::default()
        }),
        logprobs: Some(v1::Logprobs { top: 2 }),
        grammar: Some(v1::Grammar { form: Some(v1::grammar::Form::JsonObject(v1::JsonObject {})) }),
        ..v1::GenerateRequest::default()
    });
    request.metadata_mut().insert("traceparent", CLIENT.parse().unwrap());
    let channel = Endpoint::from_shared(format!("http://{head}")).unwrap().connect_lazy();
    let mut stream = InferenceClient::new(channel).generate(request).await.unwrap().into_inner();
    let mut finished = None;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Finished(last)) = message.event {
            finished = last.usage;
        }
    }
    let completion_tokens = finished.unwrap().completion_tokens;

    let trace = TraceId::from_hex("0123456789abcdef0123456789abcdef").unwrap();
    let of_trace = || {
        let mut spans = exporter.get_finished_spans().unwrap();
        spans.retain(|span| span.span_context.trace_id() == trace);
        spans
    };
    // The later stage learns with the next step that the sequence is closed.
    let spans = time::timeout(PATIENCE, async {
        loop {
            let spans = of_trace();
            if spans.iter().any(|span| span.name == "stage 1..3")
                && spans.iter().any(|span| span.name == "tercet.v1.Inference/Generate")
            {
                return spans;
            }
            time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("the spans are not complete: {:#?}", of_trace()));

    let server = named(&spans, "tercet.v1.Inference/Generate");
    assert_eq!(server.parent_span_id, SpanId::from_hex("00000000000000aa").unwrap());
    for child in ["queue", "prefill", "decode", "stage 1..3"] {
        let child = named(&spans, child);
        assert_eq!(child.parent_span_id, server.span_context.span_id(), "{}", child.name);
    }
    assert_eq!(spans.len(), 5, "no span per token: {spans:#?}");
    assert_eq!(attribute(server, "gen_ai.request.model"), "demo");
    assert_eq!(attribute(server, "gen_ai.usage.output_tokens"), completion_tokens.to_string());
    for (name, expected) in [
        ("gen_ai.request.presence_penalty", "0.5"),
        ("gen_ai.output.type", "json"),
        ("gen_ai.usage.cache_read.input_tokens", "0"),
        ("tercet.request.min_p", "0.25"),
        ("tercet.request.repetition_penalty", "1.5"),
        ("tercet.request.logit_biases", "2"),
        ("tercet.request.top_logprobs", "2"),
        ("tercet.request.grammar", "grammar.json_object"),
    ] {
        assert_eq!(attribute(server, name), expected, "{name}");
    }
    assert_eq!(attribute(server, "rpc.response.status_code"), "OK");
    assert!(["stop", "length"].contains(&&*attribute(server, "gen_ai.response.finish_reasons")));
    assert_eq!(attribute(named(&spans, "stage 1..3"), "tercet.layers"), "1..3");
}
