use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span as WireSpan;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tracing::{info_span, instrument::WithSubscriber};

use super::*;
use crate::{extract, inject, set_parent, traceparent_of};

const CLIENT: &str = "00-0123456789abcdef0123456789abcdef-00000000000000aa-01";
const FLUSH: Duration = Duration::from_secs(10);

/// An OTLP collector on a thread of its own, so that a test may block.
struct Collector {
    address: SocketAddr,
    batches: mpsc::Receiver<ExportTraceServiceRequest>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Sink(mpsc::SyncSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.try_send(request.into_inner()).unwrap();
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn start() -> Self {
        let (sink, batches) = mpsc::sync_channel(64);
        let (stop, stopped) = oneshot::channel();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tonic::transport::Server::builder()
                    .add_service(TraceServiceServer::new(Sink(sink)))
                    .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                        stopped.await.unwrap_or(());
                    })
                    .await
                    .unwrap();
            });
        });
        Self { address, batches, stop: Some(stop), thread: Some(thread) }
    }

    fn config(&self) -> Config {
        Config {
            service_name: "tercet-test".to_owned(),
            instance: "instance-1".to_owned(),
            otlp_endpoint: Some(format!("http://{}", self.address)),
            log_format: LogFormat::Text,
            log_filter: "off".to_owned(),
        }
    }

    /// Returns everything received so far, stopping the collector.
    fn finish(mut self) -> Vec<ExportTraceServiceRequest> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
        self.batches.try_iter().collect()
    }
}

fn spans(batches: &[ExportTraceServiceRequest]) -> Vec<&WireSpan> {
    batches
        .iter()
        .flat_map(|batch| &batch.resource_spans)
        .flat_map(|resource| &resource.scope_spans)
        .flat_map(|scope| &scope.spans)
        .collect()
}

fn named<'a>(spans: &[&'a WireSpan], name: &str) -> &'a WireSpan {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no span {name} among {spans:?}"));
    assert!(found.next().is_none(), "more than one span {name}");
    span
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_trace_crosses_processes_and_reaches_the_collector() {
    let collector = Collector::start();
    let (dispatch, telemetry) = build(&collector.config()).unwrap();
    tracing::dispatcher::with_default(&dispatch, || {
        let mut from_client = MetadataMap::new();
        from_client.insert("traceparent", CLIENT.parse().unwrap());

        // The gateway continues the client's trace and calls a worker.
        let server = info_span!("server", otel.kind = "server");
        extract(&from_client, &server);
        let call = info_span!(parent: &server, "call", otel.kind = "client", answer = 42);
        let mut to_worker = MetadataMap::new();
        inject(&call, &mut to_worker);

        // The worker continues it and tells the next stage in a message.
        let work = info_span!("work");
        extract(&to_worker, &work);
        let stage = info_span!("stage");
        set_parent(&stage, &traceparent_of(&work));
        stage.in_scope(|| tracing::info!(target: "h2::codec", "would loop"));
        stage.in_scope(|| tracing::info!("kept"));
        assert!(info_span!(target: "tonic::transport", "transport").is_disabled());
    });
    telemetry.shutdown(FLUSH).unwrap();

    let batches = collector.finish();
    let resource = batches[0].resource_spans[0].resource.as_ref().unwrap();
    let attribute = |key: &str| {
        let found = resource.attributes.iter().find(|attribute| attribute.key == key);
        format!("{:?}", found.unwrap_or_else(|| panic!("no attribute {key}")).value)
    };
    assert!(attribute("service.name").contains("tercet-test"));
    assert!(attribute("service.instance.id").contains("instance-1"));

    let spans = spans(&batches);
    assert_eq!(spans.len(), 4, "{spans:?}");
    let [server, call, work, stage] =
        ["server", "call", "work", "stage"].map(|name| named(&spans, name));
    for span in [server, call, work, stage] {
        assert_eq!(hex(&span.trace_id), "0123456789abcdef0123456789abcdef", "{}", span.name);
    }
    assert_eq!(hex(&server.parent_span_id), "00000000000000aa");
    assert_eq!(call.parent_span_id, server.span_id);
    assert_eq!(work.parent_span_id, call.span_id);
    assert_eq!(stage.parent_span_id, work.span_id);
    let events: Vec<_> = stage.events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(events, ["kept"]);
    assert!(call.attributes.iter().any(|attribute| attribute.key == "answer"));
}

#[test]
fn the_callers_sampling_decision_is_kept() {
    let collector = Collector::start();
    let (dispatch, telemetry) = build(&collector.config()).unwrap();
    tracing::dispatcher::with_default(&dispatch, || {
        let unsampled = info_span!("unsampled");
        set_parent(&unsampled, &CLIENT.replace("-01", "-00"));
        assert!(traceparent_of(&unsampled).ends_with("-00"));
        drop(info_span!("root"));
    });
    telemetry.shutdown(FLUSH).unwrap();
    let batches = collector.finish();
    let spans = spans(&batches);
    assert_eq!(spans.len(), 1, "{spans:?}");
    assert!(named(&spans, "root").parent_span_id.is_empty());
}

#[test]
fn without_a_collector_contexts_are_still_passed_on() {
    let config = Config { otlp_endpoint: None, ..Collector::start().config() };
    let (dispatch, telemetry) = build(&config).unwrap();
    tracing::dispatcher::with_default(&dispatch, || {
        let span = info_span!("server");
        set_parent(&span, CLIENT);
        let passed_on = traceparent_of(&span);
        assert!(passed_on.starts_with("00-0123456789abcdef0123456789abcdef-"), "{passed_on}");
        assert!(!passed_on.contains("00000000000000aa"), "{passed_on}");
        for malformed in ["", "00-0-0-01", "nonsense"] {
            let span = info_span!("server");
            set_parent(&span, malformed);
            assert!(!traceparent_of(&span).contains("0123456789abcdef0123456789abcdef"));
        }
    });
    telemetry.shutdown(FLUSH).unwrap();
}

#[test]
fn without_telemetry_there_is_no_context() {
    assert_eq!(traceparent_of(&info_span!("server")), "");
    let mut metadata = MetadataMap::new();
    inject(&info_span!("server"), &mut metadata);
    assert!(metadata.is_empty());
}

/// The one thread of the process's runtime is blocked by the shutdown: the exporter must not need
/// it.
#[test]
fn the_flush_needs_nothing_of_the_processes_runtime() {
    let collector = Collector::start();
    let config = collector.config();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (dispatch, telemetry) = build(&config).unwrap();
        async { drop(info_span!("last")) }.with_subscriber(dispatch).await;
        telemetry.shutdown(FLUSH).unwrap();
    });
    let batches = collector.finish();
    assert_eq!(spans(&batches).len(), 1);
}

#[test]
fn a_collector_that_never_answers_delays_the_shutdown_no_longer_than_asked() {
    // Accepts connections, by its backlog, and never reads from them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = Config {
        otlp_endpoint: Some(format!("http://{}", silent.local_addr().unwrap())),
        ..Collector::start().config()
    };
    let (dispatch, telemetry) = build(&config).unwrap();
    tracing::dispatcher::with_default(&dispatch, || drop(info_span!("lost")));
    let timeout = Duration::from_millis(50);
    let begun = tokio::time::Instant::now();
    let error = telemetry.shutdown(timeout).unwrap_err();
    assert_eq!(error.to_string(), "flush traces within 50ms");
    assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
}

#[test]
fn bad_configuration_is_told() {
    let config = Collector::start().config();
    let bad_filter = Config { log_filter: "a=b=c".to_owned(), ..config.clone() };
    let error = build(&bad_filter).map(drop).unwrap_err();
    assert!(error.to_string().contains("\"a=b=c\""), "{error}");
    let bad_endpoint = Config { otlp_endpoint: Some("not a url".to_owned()), ..config };
    let error = build(&bad_endpoint).map(drop).unwrap_err();
    assert!(error.to_string().contains("\"not a url\""), "{error}");
    assert_eq!("json".parse(), Ok(LogFormat::Json));
    assert_eq!("xml".parse::<LogFormat>(), Err(UnknownLogFormat("xml".to_owned())));
    for format in [LogFormat::Text, LogFormat::Json] {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
}
