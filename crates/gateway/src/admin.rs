//! The `Admin` service: what an operator sees of the gateway and its cluster.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _};
use tercet_cluster::View;
use tercet_proto::v1::{
    self,
    admin_server::{Admin, AdminServer},
};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};
use tonic::{Code, Request, Response, Status};

use crate::ServeError;
use crate::server::FLUSH;
use crate::service::Shared;

/// Time between two messages to one who does not say.
const DEFAULT_INTERVAL_MILLIS: u32 = 1000;
/// What may be asked for.
const INTERVAL_MILLIS: std::ops::RangeInclusive<u32> = 100..=60_000;
/// Longest wait for a worker that is told to drain.
const DRAIN_ANSWER: Duration = Duration::from_secs(5);

/// The `Admin` service of a gateway, for a listener that only operators reach.
#[derive(Debug)]
pub struct Administration(AdminService);

impl Administration {
    pub(crate) fn new(shared: Arc<Shared>, view: watch::Receiver<Arc<View>>) -> Self {
        Self(AdminService { shared, view, started: Instant::now() })
    }

    /// Returns the service itself.
    #[cfg(test)]
    pub(crate) fn service(self) -> AdminService {
        self.0
    }

    /// Serves on `listener` until `shutdown` resolves, best after the gateway's own drain, which
    /// can be watched here.
    ///
    /// # Errors
    ///
    /// Returns an error if the listener fails.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(tercet_proto::FILE_DESCRIPTOR_SET)
                .include_reflection_service(false)
                .with_service_name("tercet.v1.Admin")
        };
        let closing = CancellationToken::new();
        let server = Server::builder()
            .add_service(AdminServer::new(self.0))
            .add_service(reflection().build_v1().map_err(ServeError::Reflection)?)
            .add_service(reflection().build_v1alpha().map_err(ServeError::Reflection)?)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                closing.clone().cancelled_owned(),
            );
        let over = async {
            shutdown.await;
            closing.cancel();
            time::sleep(FLUSH).await;
        };
        tokio::select! {
            served = server => served.map_err(ServeError::Transport),
            () = over => Ok(()),
        }
    }
}

/// Tells how the gateway is.
#[derive(Clone, Debug)]
pub(crate) struct AdminService {
    shared: Arc<Shared>,
    view: watch::Receiver<Arc<View>>,
    started: Instant,
}

impl AdminService {
    fn status(&self) -> v1::GatewayStatus {
        let (now, shared) = (Instant::now(), &self.shared);
        let max_streams = shared.config.max_streams;
        let view = self.view.borrow().clone();
        let routes = shared.fleet.watch().borrow().clone();
        let workers = routes.worker_statuses(now);
        let draining = shared.draining.is_cancelled();
        let streams = if draining {
            // The drain takes the room of streams as it becomes free.
            workers.iter().map(|worker| worker.streams).sum()
        } else {
            let free = u32::try_from(shared.streams.available_permits()).unwrap_or(u32::MAX);
            max_streams.saturating_sub(free)
        };
        v1::GatewayStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: (now - self.started).as_secs_f64(),
            draining,
            streams,
            max_streams,
            registry: Some(v1::RegistryStatus { connected: view.current, revision: view.revision }),
            workers,
            models: shared.fleet.model_statuses(),
        }
    }

    fn statuses(&self, interval: Duration) -> impl Stream<Item = v1::GatewayStatus> + use<> {
        let mut ticks = time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        stream::unfold((self.clone(), ticks), |(service, mut ticks)| async move {
            let stop = service.shared.stop.clone();
            stop.run_until_cancelled(ticks.tick()).await?;
            Some((service.status(), (service, ticks)))
        })
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchStatusStream = BoxStream<'static, Result<v1::WatchStatusResponse, Status>>;

    async fn get_status(
        &self,
        _request: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(v1::GetStatusResponse { status: Some(self.status()) }))
    }

    async fn watch_status(
        &self,
        request: Request<v1::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let millis = match request.into_inner().interval_millis {
            0 => DEFAULT_INTERVAL_MILLIS,
            asked => asked.clamp(*INTERVAL_MILLIS.start(), *INTERVAL_MILLIS.end()),
        };
        let statuses = self.statuses(Duration::from_millis(millis.into()));
        let responses = statuses.map(|status| Ok(v1::WatchStatusResponse { status: Some(status) }));
        Ok(Response::new(responses.boxed()))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let id = request.into_inner().worker_id;
        let routes = self.shared.fleet.watch().borrow().clone();
        let Some(mut worker) = routes.worker_client(&id) else {
            return Err(Status::not_found(format!(
                "no worker {id:?} is known here, expected one of: {}",
                routes.worker_names()
            )));
        };
        tracing::info!(worker = id, "told to drain");
        let request = v1::DrainRequest { worker_id: id.clone() };
        let told = time::timeout(DRAIN_ANSWER, worker.drain(request)).await;
        match told {
            Ok(Ok(drained)) => {
                let streams = drained.into_inner().streams;
                Ok(Response::new(v1::DrainWorkerResponse { streams }))
            }
            Ok(Err(status)) if status.code() == Code::Unimplemented => {
                Err(Status::unimplemented(format!(
                    "worker {id} is of a version that cannot be told to drain: send it SIGTERM"
                )))
            }
            Ok(Err(status)) if tercet_proto::is_broken(&status) => Err(Status::unavailable(
                format!("worker {id} does not answer: {}", status.message()),
            )),
            Ok(Err(status)) => Err(Status::new(status.code(), status.message())),
            Err(_) => Err(Status::unavailable(format!(
                "worker {id} does not answer within {DRAIN_ANSWER:?}"
            ))),
        }
    }
}
