//! The whole gateway over real sockets and real time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use tercet_cluster::{MemoryRegistry, Registry};
use tercet_proto::v1::inference_client::InferenceClient;
use tercet_proto::v1::inference_server::InferenceServer;
use tercet_proto::{Reason, v1};
use tercet_telemetry::Metrics;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::bench::{SEED, expected, record, request};
use super::fake::{FakeService, FakeWorker, Play, Wires};
use crate::server::FLUSH;
use crate::{Config, Dialer, Gateway, LocalDialer, Readiness, ServeError, TcpDialer};

/// Longest wait for anything that happens at once.
const SOON: Duration = Duration::from_secs(20);

struct Served {
    channel: Channel,
    readiness: Readiness,
    stop: Option<oneshot::Sender<()>>,
    gateway: JoinSet<Result<(), ServeError>>,
}

impl Served {
    async fn start(config: Config, registry: &MemoryRegistry, dialer: Arc<dyn Dialer>) -> Self {
        let gateway = Gateway::build(config, registry, dialer, Metrics::new());
        let readiness = gateway.readiness();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(gateway.serve(listener, stopped.map(drop)));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { channel, readiness, stop: Some(stop), gateway: tasks }
    }

    fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }

    fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    /// Tells the gateway to stop.
    fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Returns when the gateway has stopped.
    async fn stopped(&mut self) {
        let served = timeout(SOON, self.gateway.join_next()).await.expect("the gateway stops");
        served.unwrap().unwrap().unwrap();
    }
}

/// Reads until the next message with tokens and returns them; `None` at the end.
async fn tokens(stream: &mut Streaming<v1::GenerateResponse>) -> Option<Vec<u32>> {
    loop {
        let message = timeout(SOON, stream.message()).await.expect("a message comes").unwrap()?;
        if let Some(v1::generate_response::Event::Delta(delta)) = message.event {
            return Some(delta.token_ids);
        }
    }
}

async fn rest(stream: &mut Streaming<v1::GenerateResponse>) -> Vec<u32> {
    let mut ids = Vec::new();
    while let Some(more) = tokens(stream).await {
        ids.extend(more);
    }
    ids
}

/// Reads statuses until the wanted one.
async fn until(health: &mut Streaming<HealthCheckResponse>, wanted: ServingStatus) {
    loop {
        let update = timeout(SOON, health.message()).await.expect("health changes").unwrap();
        if update.unwrap().status() == wanted {
            return;
        }
    }
}

fn wired(worker: &FakeWorker, id: &str) -> Arc<Wires> {
    let wires = Wires::default();
    wires.0.lock().unwrap().insert(id.parse().unwrap(), worker.wire.clone());
    Arc::new(wires)
}

#[tokio::test]
async fn health_follows_the_workers() {
    let registry = MemoryRegistry::new();
    let worker = FakeWorker::start();
    let mut served = Served::start(Config::default(), &registry, wired(&worker, "a")).await;
    for service in ["", "tercet.v1.Inference"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut health = served.health().watch(request).await.unwrap().into_inner();
        until(&mut health, ServingStatus::NotServing).await;
        assert_eq!(served.readiness.check(), Err("no worker is ready".to_owned()));
        let registration = registry.register(record("a", &["demo"])).await.unwrap();
        until(&mut health, ServingStatus::Serving).await;
        assert_eq!(served.readiness.check(), Ok(()));
        registration.leave().await;
        until(&mut health, ServingStatus::NotServing).await;
    }
    served.stop();
    served.stopped().await;
    assert_eq!(served.readiness.check(), Err("draining".to_owned()));
}

#[tokio::test]
async fn both_reflection_versions_list_the_services() {
    let registry = MemoryRegistry::new();
    let served = Served::start(Config::default(), &registry, Arc::new(TcpDialer::default())).await;
    let mut lists = Vec::new();
    {
        use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
        use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
        let request = tonic_reflection::pb::v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new(served.channel.clone());
        let stream = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
        let answer = stream.into_inner().message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("{answer:?}")
        };
        lists.push(list.service.into_iter().map(|service| service.name).collect::<Vec<_>>());
    }
    {
        use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
        use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
        let request = tonic_reflection::pb::v1alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new(served.channel.clone());
        let stream = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
        let answer = stream.into_inner().message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("{answer:?}")
        };
        lists.push(list.service.into_iter().map(|service| service.name).collect());
    }
    for list in lists {
        for service in ["tercet.v1.Inference", "grpc.health.v1.Health"] {
            assert!(list.iter().any(|name| name == service), "no {service} in {list:?}");
        }
    }
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_refuses_new_ones() {
    let registry = MemoryRegistry::new();
    let worker = FakeWorker::start();
    let (open, gate) = watch::channel(false);
    worker.plays([Play::Gate { at: 3, open: gate }]);
    let _registration = registry.register(record("a", &["demo"])).await.unwrap();
    // Long enough that connections are still accepted below.
    let config = Config { drain_delay: SOON, ..Config::default() };
    let mut served = Served::start(config, &registry, wired(&worker, "a")).await;
    let mut stream = served.client().generate(request(12)).await.unwrap().into_inner();
    assert_eq!(tokens(&mut stream).await, Some(expected(SEED, 1)));
    let watched = HealthCheckRequest::default();
    let mut health = served.health().watch(watched).await.unwrap().into_inner();
    until(&mut health, ServingStatus::Serving).await;

    served.stop();
    until(&mut health, ServingStatus::NotServing).await;
    let refused = served.client().generate(request(4)).await.unwrap_err();
    assert_eq!(Reason::of(&refused), Some(Reason::Draining));
    assert_eq!(refused.code(), Code::Unavailable);

    open.send_replace(true);
    let mut ids = expected(SEED, 1);
    ids.extend(rest(&mut stream).await);
    assert_eq!(ids, expected(SEED, 12));
}

#[tokio::test]
async fn a_drain_ends_streams_that_do_not_finish() {
    let registry = MemoryRegistry::new();
    let worker = FakeWorker::start();
    worker.plays([Play::Hold { at: 3 }]);
    let _registration = registry.register(record("a", &["demo"])).await.unwrap();
    let config = Config { drain_timeout: Duration::from_millis(50), ..Config::default() };
    let mut served = Served::start(config, &registry, wired(&worker, "a")).await;
    let mut stream = served.client().generate(request(12)).await.unwrap().into_inner();
    assert_eq!(tokens(&mut stream).await, Some(expected(SEED, 1)));
    // A watch never ends: it must not hold up the drain.
    let watched = HealthCheckRequest::default();
    let mut health = served.health().watch(watched).await.unwrap().into_inner();
    until(&mut health, ServingStatus::Serving).await;

    served.stop();
    let begun = Instant::now();
    let error = loop {
        match timeout(SOON, stream.message()).await.expect("the stream ends") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without a word"),
            Err(error) => break error,
        }
    };
    assert_eq!(Reason::of(&error), Some(Reason::Draining));
    assert!(begun.elapsed() < FLUSH * 2, "told while there is time: {:?}", begun.elapsed());
    served.stopped().await;
    worker.until_active(0).await;
}

#[tokio::test]
async fn an_idle_gateway_stops_at_once() {
    let registry = MemoryRegistry::new();
    let worker = FakeWorker::start();
    let _registration = registry.register(record("a", &["demo"])).await.unwrap();
    let mut served = Served::start(Config::default(), &registry, wired(&worker, "a")).await;
    let stream = served.client().generate(request(4)).await.unwrap().into_inner();
    assert_eq!(stream.count().await, 6);
    let begun = Instant::now();
    served.stop();
    served.stopped().await;
    assert!(begun.elapsed() < Config::default().drain_timeout / 2, "{:?}", begun.elapsed());
}

/// Starts a worker in a runtime of its own, which dies with all its sockets.
async fn killable(worker: &Arc<FakeWorker>) -> (SocketAddr, tokio::runtime::Runtime) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let service = InferenceServer::new(FakeService(Arc::clone(worker)));
    let (bound, address) = oneshot::channel();
    runtime.spawn(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        bound.send(listener.local_addr().unwrap()).unwrap();
        let incoming = TcpIncoming::from(listener);
        Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    });
    (address.await.unwrap(), runtime)
}

#[tokio::test]
async fn streams_survive_the_death_of_their_worker_over_tcp() {
    let registry = MemoryRegistry::new();
    let (first, _) = FakeWorker::new();
    let (second, _) = FakeWorker::new();
    let (first_address, first_runtime) = killable(&first).await;
    let (second_address, second_runtime) = killable(&second).await;
    let at = |id: &str, address: SocketAddr| {
        let mut record = record(id, &["demo"]);
        record.address = address.to_string();
        record
    };
    first.plays((0..8).map(|_| Play::Hold { at: 5 }));
    let _first = registry.register(at("first", first_address)).await.unwrap();
    let mut served =
        Served::start(Config::default(), &registry, Arc::new(TcpDialer::default())).await;
    let mut streams = Vec::new();
    for nth in 0..8 {
        let mut request = request(12);
        request.sampling.as_mut().unwrap().seed = Some(nth);
        let mut stream = served.client().generate(request).await.unwrap().into_inner();
        let mut ids = Vec::new();
        while ids.len() < 5 {
            ids.extend(tokens(&mut stream).await.unwrap());
        }
        streams.push((nth, ids, stream));
    }
    let _second = registry.register(at("second", second_address)).await.unwrap();
    let begun = Instant::now();
    first_runtime.shutdown_background();
    for (seed, mut ids, mut stream) in streams {
        ids.extend(rest(&mut stream).await);
        assert_eq!(ids, expected(seed, 12));
    }
    let elapsed = begun.elapsed();
    assert!(elapsed < TcpDialer::default().keepalive_timeout, "found by the reset: {elapsed:?}");
    assert_eq!(second.seen().len(), 8);
    served.stop();
    served.stopped().await;
    second_runtime.shutdown_background();
}

#[tokio::test]
async fn a_worker_in_the_same_process_needs_no_socket() {
    let registry = MemoryRegistry::new();
    let (worker, _) = FakeWorker::new();
    let (dialer, incoming) = LocalDialer::new("local".parse().unwrap());
    let mut tasks = JoinSet::new();
    let service = InferenceServer::new(FakeService(Arc::clone(&worker)));
    tasks.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let error = dialer.dial(&record("other", &[])).unwrap_err();
    assert!(error.to_string().contains("holds only local"), "{error}");

    let _registration = registry.register(record("local", &["demo"])).await.unwrap();
    let mut served = Served::start(Config::default(), &registry, Arc::new(dialer)).await;
    let mut stream = served.client().generate(request(12)).await.unwrap().into_inner();
    assert_eq!(rest(&mut stream).await, expected(SEED, 12));
    served.stop();
    served.stopped().await;
}
