//! One trace runs from the client through gateway, worker and second stage, and arrives over OTLP.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value,
    trace::v1::{Span, span::SpanKind},
};
use tercet_proto::v1::generate_request::Input;
use tercet_tests::{Client, Etcd, PATIENCE, Tercet, collect, sampled};
use tokio::{net::TcpListener, task::JoinSet, time};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// A span and the name of the service that it came from.
type Told = (String, Span);

#[derive(Clone, Debug, Default)]
struct Collector(Arc<Mutex<Vec<Told>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let service = resource
                .resource
                .iter()
                .flat_map(|resource| &resource.attributes)
                .find(|attribute| attribute.key == "service.name")
                .and_then(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
                    any_value::Value::StringValue(name) => Some(name.clone()),
                    _ => None,
                })
                .unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let mut told = self.0.lock().map_err(|_| Status::internal("a test panicked"))?;
            told.extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT_SPAN_ID: &str = "b7ad6b7169203331";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_runs_through_gateway_worker_and_second_stage() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let collector = Collector::default();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let service = TraceServiceServer::new(collector.clone());
    let serve = Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpListenerStream::new(listener));
    // A task of its own: waiting for a process below blocks its thread.
    let mut tasks = JoinSet::new();
    tasks.spawn(serve);
    trace(&etcd.url(), &endpoint, &collector).await
}

async fn trace(etcd: &str, endpoint: &str, collector: &Collector) -> Result<()> {
    let common = ["--etcd", etcd, "--cluster", "trace", "--listen", "127.0.0.1:0"];
    let common: Vec<&str> = common.into_iter().chain(["--otlp-endpoint", endpoint]).collect();
    let stage = |layers| {
        Tercet::start(["worker", "--threads", "1", "--layers", layers].iter().chain(&common))
    };
    let (mut head, mut tail) = (stage("0..2")?, stage("2..3")?);
    let mut gateway = Tercet::start(["gateway"].iter().chain(&common))?;
    head.serving().await?;
    gateway.serving().await?;

    let client = Client::connect(gateway.address()).await?;
    let mut request = Request::new(sampled(Input::Prompt("HAMLET.\n".to_owned()), 1, 12));
    let traceparent = format!("00-{TRACE_ID}-{CLIENT_SPAN_ID}-01");
    request.metadata_mut().insert("traceparent", traceparent.parse()?);
    let completion = collect(client.open(request).await?, |_| ()).await?;
    ensure!(completion.ids.len() == 12);

    // An orderly end flushes what a batch still holds.
    for part in [&mut gateway, &mut head, &mut tail] {
        part.process().signal("TERM")?;
        let status = part.process().wait()?;
        ensure!(status.success(), "{status}\n{}", part.process().said());
    }
    let told = async {
        loop {
            let told = collector.0.lock().expect("no test panicked").clone();
            if told.iter().any(|(_, span)| span.name.contains("stage") && in_trace(span)) {
                return told;
            }
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    let told = time::timeout(PATIENCE, told).await.context("no span of a stage came")?;
    check(&told)
}

fn in_trace(span: &Span) -> bool {
    hex(&span.trace_id) == TRACE_ID
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check(told: &[Told]) -> Result<()> {
    let spans: Vec<&Told> = told.iter().filter(|(_, span)| in_trace(span)).collect();
    let by_id: HashMap<&[u8], &Told> =
        spans.iter().map(|told| (told.1.span_id.as_slice(), *told)).collect();
    let tree = || {
        let line = |(service, span): &&Told| {
            format!("{service}: {} <- {}", span.name, hex(&span.parent_span_id))
        };
        spans.iter().map(line).collect::<Vec<_>>().join("\n")
    };
    // The services on the way from a span up to the client's, without repeats.
    let path = |from: &Span| {
        let mut services: Vec<&str> = Vec::new();
        let mut at = from;
        while let Some((service, span)) = by_id.get(at.span_id.as_slice()) {
            if services.last() != Some(&service.as_str()) {
                services.push(service);
            }
            match by_id.get(span.parent_span_id.as_slice()) {
                Some((_, parent)) => at = parent,
                None => return (services, hex(&span.parent_span_id)),
            }
        }
        (services, String::new())
    };
    let stage = spans
        .iter()
        .find(|(_, span)| span.name.contains("stage"))
        .context("no span of the second stage")?;
    let (services, root) = path(&stage.1);
    let roles: Vec<bool> = ["worker", "worker", "gateway"]
        .iter()
        .zip(&services)
        .map(|(role, service)| service.contains(role))
        .collect();
    let through = services.last().is_some_and(|service| service.contains("gateway"));
    ensure!(through && roles.first() == Some(&true), "{services:?}\n{}", tree());
    ensure!(root == CLIENT_SPAN_ID, "the client's span is not the root: {root}\n{}", tree());
    let of_gateway = |kind: SpanKind| {
        spans
            .iter()
            .any(|(service, span)| service.contains("gateway") && span.kind == i32::from(kind))
    };
    ensure!(of_gateway(SpanKind::Server) && of_gateway(SpanKind::Client), "{}", tree());
    let worker = spans.iter().filter(|(service, _)| service.contains("worker"));
    let instances: Vec<_> = worker.map(|(_, span)| span.kind).collect();
    ensure!(instances.contains(&i32::from(SpanKind::Server)), "{}", tree());
    Ok(())
}
