//! `tercet serve`, `worker` and `gateway`: the parts wired to sockets and signals.

use std::{future::Future, io, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result, anyhow};
use futures::FutureExt as _;
use tercet_cluster::{EtcdRegistry, MemoryRegistry, WorkerId};
use tercet_gateway::{Administration, Aliases, Gateway, LocalDialer, TcpDialer};
use tercet_telemetry::{Admin, Metrics, Probe, serve_admin};
use tercet_worker::Worker;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::{
    args::{
        AdminArgs, ClusterArgs, DEFAULT_ADMIN_ADDRESS, GatewayArgs, GatewayLimits, LogArgs,
        ServeArgs, ServerArgs, WorkerArgs,
    },
    failure::{misconfigured, unbuilt},
    output::print_line,
    process::{self, Identity},
    shutdown::Signals,
};

/// Runs `tercet serve`.
pub(crate) fn serve(args: &ServeArgs, log: &LogArgs) -> Result<()> {
    process::run(identity("tercet", args.listen.clone(), &args.server), log, || {
        serve_until_stopped(args).boxed()
    })
}

/// Runs `tercet worker`.
pub(crate) fn worker(args: &WorkerArgs, log: &LogArgs) -> Result<()> {
    let instance = match (&args.id, &args.advertise) {
        (Some(id), _) => id.to_string(),
        (None, Some(advertise)) => advertise.clone(),
        (None, None) => args.listen.clone(),
    };
    process::run(identity("tercet-worker", instance, &args.server), log, || {
        work_until_stopped(args).boxed()
    })
}

/// Runs `tercet gateway`.
pub(crate) fn gateway(args: &GatewayArgs, log: &LogArgs) -> Result<()> {
    let identity = identity("tercet-gateway", args.listen.clone(), &args.server);
    process::run_on(args.io_threads, identity, log, || route_until_stopped(args).boxed())
}

fn identity<'a>(service: &'static str, instance: String, args: &'a ServerArgs) -> Identity<'a> {
    Identity { service, instance, otlp_endpoint: args.otlp_endpoint.as_deref(), filter: "info" }
}

async fn serve_until_stopped(args: &ServeArgs) -> Result<()> {
    let id: WorkerId = "local".parse().context("name the worker of this process")?;
    let registry = Arc::new(MemoryRegistry::new());
    let metrics = Metrics::new();
    let (dialer, connections) = LocalDialer::new(id.clone());
    let mut config = tercet_worker::Config::new(id, "local".to_owned());
    config.models = args.model.specs()?;
    config.model_dir.clone_from(&args.model.model_dir);
    config.engine = args.engine.options(None);
    config.drain_timeout = args.server.drain_timeout;
    let worker = Worker::build(config, registry.clone(), metrics.clone()).map_err(unbuilt)?;
    let config = gateway_config(&args.gateway, &args.server)?;
    let gateway = Gateway::build(config, &*registry, Arc::new(dialer), metrics.clone())
        .beside(worker.administration());

    let listener = bind(&args.listen, "listen").await?;
    let (condition, readiness) = (worker.condition(), gateway.readiness());
    let admin = Admin {
        metrics,
        live: Probe::new(move || condition.live()),
        ready: Probe::new(move || readiness.check()),
    };
    let beside = Beside {
        metrics: bind_metrics(&args.server, admin).await?,
        operators: bind_operators(&args.admin, gateway.administration()).await?,
    };
    args.engine.log();
    announce(&listener)?;
    until_stopped(beside, |stop| async move {
        // The gateway drains first: the streams it finishes are the worker's.
        let worker_stop = CancellationToken::new();
        let gateway = gateway.serve(listener, stop.clone().cancelled_owned());
        let gateway = gateway.inspect(|_| worker_stop.cancel());
        let worker = worker.serve(connections, worker_stop.clone().cancelled_owned());
        let worker = worker.inspect(|_| stop.cancel());
        let (worked, routed) = tokio::join!(worker.boxed(), gateway.boxed());
        worked?;
        Ok(routed?)
    })
    .await
}

async fn work_until_stopped(args: &WorkerArgs) -> Result<()> {
    let registry = Arc::new(etcd(&args.cluster)?);
    let refused = registry.refused();
    let metrics = Metrics::new();
    let listener = bind(&args.listen, "listen").await?;
    let address = match &args.advertise {
        Some(address) => address.clone(),
        None => reachable(local_address(&listener)?)?.to_string(),
    };
    let id = match &args.id {
        Some(id) => id.clone(),
        None => worker_id(&address)?,
    };
    let mut config = tercet_worker::Config::new(id, address);
    config.models = args.model.specs()?;
    config.model_dir.clone_from(&args.model.model_dir);
    config.engine = args.engine.options(args.layers.as_ref());
    config.drain_timeout = args.server.drain_timeout;
    let worker = Worker::build(config, registry, metrics.clone()).map_err(unbuilt)?;

    let (live, ready) = (worker.condition(), worker.condition());
    let admin = Admin {
        metrics,
        live: Probe::new(move || live.live()),
        ready: Probe::new(move || ready.ready()),
    };
    let beside = Beside { metrics: bind_metrics(&args.server, admin).await?, operators: None };
    args.engine.log();
    announce(&listener)?;
    until_stopped(beside, |stop| async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tokio::select! {
            biased;
            // Nothing was served before etcd lets the worker in: nothing is to be drained.
            refused = refused => Err(misconfigured(refused)),
            served = worker.serve(incoming, stop.cancelled_owned()).boxed() => Ok(served?),
        }
    })
    .await
}

async fn route_until_stopped(args: &GatewayArgs) -> Result<()> {
    let registry = etcd(&args.cluster)?;
    let metrics = Metrics::new();
    let config = gateway_config(&args.limits, &args.server)?;
    let dialer = Arc::new(TcpDialer::default());
    let refused = registry.refused();
    let gateway = Gateway::build(config, &registry, dialer, metrics.clone());

    let listener = bind(&args.listen, "listen").await?;
    let readiness = gateway.readiness();
    let ready = Probe::new(move || readiness.check());
    let admin = Admin { metrics, live: Probe::always(), ready };
    let beside = Beside {
        metrics: bind_metrics(&args.server, admin).await?,
        operators: bind_operators(&args.admin, gateway.administration()).await?,
    };
    announce(&listener)?;
    until_stopped(beside, |stop| async move {
        tokio::select! {
            served = gateway.serve(listener, stop.cancelled_owned()).boxed() => Ok(served?),
            refused = refused => Err(misconfigured(refused)),
        }
    })
    .await
}

/// What a process serves besides its service.
struct Beside {
    metrics: Option<(TcpListener, Admin)>,
    operators: Option<(TcpListener, Administration)>,
}

/// Runs a server, and what is beside it, until a signal has drained it. A second signal does not
/// wait for the drain.
async fn until_stopped<F>(beside: Beside, serve: impl FnOnce(CancellationToken) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let signals = Signals::listen()?;
    let stop = CancellationToken::new();
    // Told to the last: probes and scrapes see the drain.
    let admin_stop = CancellationToken::new();
    let Beside { metrics, operators } = beside;
    let metrics = async {
        match metrics {
            Some((listener, admin)) => {
                serve_admin(listener, admin, admin_stop.clone().cancelled_owned())
                    .await
                    .context("serve metrics")
            }
            None => Ok(()),
        }
    };
    let operators = async {
        match operators {
            Some((listener, operators)) => {
                let stopped = admin_stop.clone().cancelled_owned();
                operators.serve(listener, stopped).await.context("serve operators")
            }
            None => Ok(()),
        }
    };
    let served = async {
        let served = tokio::select! {
            served = serve(stop.clone()) => served,
            cut_off = signals.watch(&stop) => cut_off,
        };
        admin_stop.cancel();
        served
    };
    let (served, metrics, operators) = tokio::join!(served, metrics, operators);
    served.and(metrics).and(operators)
}

fn etcd(args: &ClusterArgs) -> Result<EtcdRegistry> {
    EtcdRegistry::connect(args.options()?).map_err(misconfigured)
}

fn gateway_config(limits: &GatewayLimits, server: &ServerArgs) -> Result<tercet_gateway::Config> {
    let aliases = Aliases::new(limits.alias.clone()).map_err(misconfigured)?;
    Ok(tercet_gateway::Config {
        aliases,
        max_streams: limits.max_streams,
        routing: limits.routing,
        max_queue: limits.max_queue,
        max_queue_wait: limits.max_queue_wait,
        worker_wait: limits.worker_wait,
        suspect_after: limits.suspect_after,
        progress_timeout: limits.progress_timeout,
        drain_delay: limits.drain_delay,
        drain_timeout: server.drain_timeout,
        ..tercet_gateway::Config::default()
    })
}

/// Binds an address given by `flag`.
async fn bind(address: &str, flag: &'static str) -> Result<TcpListener> {
    let error = match TcpListener::bind(address).await {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    let kind = error.kind();
    let failed = anyhow::Error::from(error);
    Err(match kind {
        io::ErrorKind::AddrInUse => failed
            .context(format!("listen on {address}: another process does; give another --{flag}")),
        io::ErrorKind::InvalidInput => misconfigured(failed.context(format!(
            "--{flag} {address} is no address to listen on: expected HOST:PORT such as \
             127.0.0.1:7171"
        ))),
        _ => failed.context(format!("listen on {address}, as --{flag} says")),
    })
}

async fn bind_metrics(args: &ServerArgs, admin: Admin) -> Result<Option<(TcpListener, Admin)>> {
    let Some(address) = &args.metrics_listen else { return Ok(None) };
    let listener = bind(address, "metrics-listen").await?;
    print_line(&format!("metrics listening on {}", local_address(&listener)?))?;
    Ok(Some((listener, admin)))
}

/// Binds where operators are served, unless that is off. The default address gives way to whoever
/// has it already: several gateways may share a machine.
async fn bind_operators(
    args: &AdminArgs,
    operators: Administration,
) -> Result<Option<(TcpListener, Administration)>> {
    let listener = match args.admin_listen.as_deref() {
        Some("off") => return Ok(None),
        Some(address) => {
            let listener = bind(address, "admin-listen").await?;
            print_line(&format!("admin listening on {}", local_address(&listener)?))?;
            listener
        }
        None => match TcpListener::bind(DEFAULT_ADMIN_ADDRESS).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::info!(
                    address = DEFAULT_ADMIN_ADDRESS,
                    %error,
                    "operators are not served: another process may have the address, give \
                     --admin-listen"
                );
                return Ok(None);
            }
        },
    };
    Ok(Some((listener, operators)))
}

/// Tells scripts where gRPC is served.
fn announce(listener: &TcpListener) -> Result<()> {
    Ok(print_line(&format!("listening on {}", local_address(listener)?))?)
}

fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().context("ask for the bound address")
}

/// Refuses a bound address that means something else on other machines.
fn reachable(address: SocketAddr) -> Result<SocketAddr> {
    if address.ip().is_unspecified() {
        return Err(misconfigured(anyhow!(
            "others cannot connect to {address}: give the address of this machine as --advertise \
             HOST:PORT"
        )));
    }
    Ok(address)
}

/// Names a worker by its address, with what a name cannot hold replaced.
fn worker_id(address: &str) -> Result<WorkerId> {
    let usable = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let name: String = address.chars().map(usable).collect();
    name.parse().map_err(|error| {
        misconfigured(
            anyhow::Error::from(error).context("name the worker by its address; give --id"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_named_by_their_address() {
        assert_eq!(worker_id("10.0.0.1:7172").unwrap().as_str(), "10.0.0.1-7172");
        assert_eq!(worker_id("[::1]:80").unwrap().as_str(), "---1--80");
        assert!(worker_id("").is_err());
    }

    #[test]
    fn wildcard_addresses_are_not_advertised() {
        assert!(reachable("127.0.0.1:1".parse().unwrap()).is_ok());
        let error = reachable("0.0.0.0:7172".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("--advertise"), "{error}");
        assert!(reachable("[::]:7172".parse().unwrap()).is_err());
    }
}
