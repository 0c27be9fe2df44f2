//! Binds the parts to a listener, and takes them down again.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tercet_cluster::{Registry, View};
use tercet_proto::convention;
use tercet_telemetry::Metrics;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::fleet::{self, Fleet};
use crate::front::Front;
use crate::service::{self, Service, Shared};
use crate::{Administration, Config, Dialer, Policy};

/// How long the last messages of ended streams get to reach their clients.
pub(crate) const FLUSH: Duration = Duration::from_secs(1);

/// Names under which health is told: the whole server and its service.
const HEALTH_NAMES: [&str; 2] = ["", "tercet.v1.Inference"];

/// A gateway that is wired and not yet serving.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
    view: watch::Receiver<Arc<View>>,
    beside: Option<Routes>,
}

/// Why a gateway does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Fault: us.
    #[error("describe the services for reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// Fault: the machine.
    #[error("serve gRPC")]
    Transport(#[source] tonic::transport::Error),
}

/// Tells whether a gateway should get requests. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Readiness {
    routes: watch::Receiver<Arc<fleet::Routes>>,
    draining: CancellationToken,
}

impl Readiness {
    /// Returns whether at least one model can be asked for, or why not.
    pub fn check(&self) -> Result<(), String> {
        if self.draining.is_cancelled() {
            return Err("draining".to_owned());
        }
        if !self.routes.borrow().is_serving() {
            return Err("no worker is ready".to_owned());
        }
        Ok(())
    }
}

impl Gateway {
    /// Wires a gateway over the workers of `registry`, reached through `dialer`. It chooses workers
    /// as `config` says.
    pub fn build(
        config: Config,
        registry: &dyn Registry,
        dialer: Arc<dyn Dialer>,
        metrics: Metrics,
    ) -> Self {
        let policy = config.routing.policy(service::draw_seed());
        Self::build_with_policy(config, registry, dialer, metrics, policy)
    }

    /// Wires a gateway that chooses workers by `policy`.
    pub fn build_with_policy(
        config: Config,
        registry: &dyn Registry,
        dialer: Arc<dyn Dialer>,
        metrics: Metrics,
        policy: Box<dyn Policy>,
    ) -> Self {
        let fleet = Fleet::new(&config, dialer, policy, metrics.clone());
        let streams = usize::try_from(config.max_streams).unwrap_or(Semaphore::MAX_PERMITS);
        let shared = Shared {
            fleet,
            metrics,
            streams: Arc::new(Semaphore::new(streams)),
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
            config,
        };
        Self { shared: Arc::new(shared), view: registry.watch(), beside: None }
    }

    /// Serves the `Worker` service of the only worker as well, for a process that is both.
    pub fn beside(mut self, worker: Routes) -> Self {
        self.beside = Some(worker);
        self
    }

    /// Returns the `Admin` service, for a listener of its own.
    pub fn administration(&self) -> Administration {
        Administration::new(Arc::clone(&self.shared), self.view.clone())
    }

    /// Returns what tells whether this gateway should get requests.
    pub fn readiness(&self) -> Readiness {
        Readiness { routes: self.shared.fleet.watch(), draining: self.shared.draining.clone() }
    }

    /// Serves on `listener` until `shutdown` resolves, then drains:
    ///
    /// 1. Health turns to NOT_SERVING and new requests are refused with UNAVAILABLE (DRAINING).
    /// 2. After `drain_delay` no connection is accepted any more.
    /// 3. Streams finish. Those left after `drain_timeout` end with UNAVAILABLE (DRAINING).
    ///
    /// Returns when all streams have ended. Dropping the future ends them at once.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let Self { shared, view, beside } = self;
        let config = shared.config.clone();
        let draining = shared.draining.clone();
        let stop = shared.stop.clone();
        let closing = CancellationToken::new();
        // Ends the background tasks, and with a dropped future also the streams.
        let _guards = (draining.clone().drop_guard(), stop.clone().drop_guard());

        shared.fleet.apply(&Arc::clone(&view.borrow()));
        let (reporter, health) = tonic_health::server::health_reporter();
        let routes = Arc::clone(&shared.fleet.watch().borrow());
        report(&reporter, &routes, Vec::new()).await;

        let tasks = TaskTracker::new();
        let follower = Arc::clone(&shared);
        let following = stop.clone();
        tasks.spawn(async move {
            following.run_until_cancelled(follower.fleet.follow(view)).await;
        });
        tasks.spawn(report_health(reporter, shared.fleet.watch(), draining.clone()));
        tasks.close();

        let is_worker = beside.is_some();
        let server = Server::builder()
            .http2_keepalive_interval(Some(config.keepalive_interval))
            .http2_keepalive_timeout(Some(config.keepalive_timeout))
            .add_routes(beside.unwrap_or_default())
            .add_service(health)
            .add_service(reflection(is_worker).build_v1().map_err(ServeError::Reflection)?)
            .add_service(reflection(is_worker).build_v1alpha().map_err(ServeError::Reflection)?)
            .add_service(Front::new(Service::new(Arc::clone(&shared))))
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                closing.clone().cancelled_owned(),
            );
        let mut server = std::pin::pin!(server);

        let drain = async {
            shutdown.await;
            draining.cancel();
            tokio::time::sleep(config.drain_delay).await;
            closing.cancel();
            // Not only `server`: it also waits for calls that never end, as health watches.
            if !shared.streams_end_within(config.drain_timeout).await {
                tracing::info!(
                    "streams are left after the drain, they are told to resume elsewhere"
                );
            }
            stop.cancel();
            // A client that does not read keeps its stream.
            shared.streams_end_within(FLUSH).await;
            tokio::time::sleep(FLUSH).await;
        };
        let served = tokio::select! {
            served = &mut server => served.map_err(ServeError::Transport),
            () = drain => Ok(()),
        };
        stop.cancel();
        draining.cancel();
        tasks.wait().await;
        served
    }
}

impl Shared {
    /// Returns whether all streams have ended before `timeout` has passed. New ones are refused by
    /// then.
    async fn streams_end_within(&self, timeout: Duration) -> bool {
        let ended = self.streams.acquire_many(self.config.max_streams);
        tokio::time::timeout(timeout, ended).await.is_ok()
    }
}

/// Tells health as routes come and go, until the gateway drains.
async fn report_health(
    reporter: HealthReporter,
    mut routes: watch::Receiver<Arc<fleet::Routes>>,
    draining: CancellationToken,
) {
    let mut told = Vec::new();
    loop {
        let latest = Arc::clone(&routes.borrow_and_update());
        told = report(&reporter, &latest, told).await;
        match draining.run_until_cancelled(routes.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) | None => break,
        }
    }
    report(&reporter, &fleet::Routes::default(), told).await;
}

/// Tells the health of the server and of its models; returns the names of those, and tells that the
/// others of `before` cannot be asked for.
async fn report(
    reporter: &HealthReporter,
    routes: &fleet::Routes,
    before: Vec<String>,
) -> Vec<String> {
    let served =
        if routes.is_serving() { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in HEALTH_NAMES {
        reporter.set_service_status(name, served).await;
    }
    let models = routes.models();
    let names: Vec<_> = models.iter().map(|model| convention::health_name(&model.name)).collect();
    for name in &names {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    for gone in before.iter().filter(|name| !names.contains(name)) {
        reporter.set_service_status(gone, ServingStatus::NotServing).await;
    }
    names
}

/// Lists what is served here, under both versions of reflection, and not the internal services that
/// the same descriptors hold.
fn reflection(is_worker: bool) -> tonic_reflection::server::Builder<'static> {
    let services = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tercet_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
        .include_reflection_service(false)
        .with_service_name("tercet.v1.Inference")
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection")
        .with_service_name("grpc.reflection.v1alpha.ServerReflection");
    if is_worker { services.with_service_name("tercet.v1.Worker") } else { services }
}
