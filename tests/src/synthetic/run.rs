//! The life of a synthetic worker.

use std::{
    io::{self, Write as _},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tercet_cluster::{
    EtcdOptions, EtcdRegistry, LayerRange, ModelRecord, ModelState, Rate, Registration,
    Registry as _, WorkerRecord, WorkerState,
};
use tercet_proto::{
    convention,
    v1::{self, inference_server::InferenceServer, worker_server::WorkerServer},
};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    Omission, Options,
    administration::{Administration, LAYERS},
    inference::{Shared, SyntheticInference},
    load::Load,
    micros_now,
};

/// How long the last messages of ended streams get to reach their callers.
const FLUSH: Duration = Duration::from_millis(100);

/// Between two tokens of a worker that hangs.
const FOR_EVER: Duration = Duration::from_secs(86_400);

/// Registers and serves until SIGTERM, then drains.
///
/// Says `listening on HOST:PORT` on standard output once it is bound, and `registered` once others
/// can see it in the registry. SIGUSR1 makes it slower, SIGHUP lets it compute no more while it still
/// answers and reports, and SIGUSR2 puts it right again.
///
/// # Errors
///
/// Returns an error if the address cannot be bound or the registry refuses the worker.
pub async fn run(options: Options) -> Result<()> {
    let listener = TcpListener::bind(&options.listen)
        .await
        .with_context(|| format!("listen on {}", options.listen))?;
    let bound = listener.local_addr()?;
    let mut signals = Signals::new()?;
    let shared = Arc::new(Shared {
        load: Load::new(&options),
        pace: watch::Sender::new(options.pace()),
        state: watch::Sender::new(v1::ModelState::Loading),
        told_to_stop: CancellationToken::new(),
        evicted: CancellationToken::new(),
        // Greater for everything that happens later.
        epoch: micros_now(),
        options,
    });
    writeln!(io::stdout(), "listening on {bound}")?;

    let (health, health_service) = tonic_health::server::health_reporter();
    report(&health, &shared, ServingStatus::NotServing).await;
    let closing = CancellationToken::new();
    let server = Server::builder()
        .add_service(health_service)
        .add_service(InferenceServer::new(SyntheticInference(Arc::clone(&shared))))
        .add_service(WorkerServer::new(Administration(Arc::clone(&shared))))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            closing.clone().cancelled_owned(),
        );
    let address = shared.options.advertise.clone().unwrap_or_else(|| bound.to_string());
    let live = pin!(async {
        let mut registration = register(&shared, address).await?;
        time::sleep(Duration::from_millis(shared.options.load_millis)).await;
        enter(&shared, &mut registration, v1::ModelState::Ready).await?;
        report(&health, &shared, ServingStatus::Serving).await;
        writeln!(io::stdout(), "registered")?;
        signals.until_term(&shared).await;
        report(&health, &shared, ServingStatus::NotServing).await;
        shared.state.send_replace(v1::ModelState::Draining);
        let patience = Duration::from_millis(shared.options.drain_millis);
        let drained = time::timeout(patience, async {
            enter(&shared, &mut registration, v1::ModelState::Draining).await?;
            // Its sender is in `shared`.
            _ = shared.load.aboard.subscribe().wait_for(|aboard| *aboard == 0).await;
            anyhow::Ok(())
        });
        drained.await.unwrap_or(Ok(()))?;
        shared.evicted.cancel();
        if let Some(registration) = registration {
            registration.leave().await;
        }
        time::sleep(FLUSH).await;
        Ok(())
    });
    tokio::select! {
        served = server => served.context("serve gRPC"),
        lived = live => lived,
    }
}

/// What a test tells a worker while it runs.
struct Signals {
    term: Signal,
    slower: Signal,
    hang: Signal,
    as_before: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            slower: signal(SignalKind::user_defined1())?,
            hang: signal(SignalKind::hangup())?,
            as_before: signal(SignalKind::user_defined2())?,
        })
    }

    async fn until_term(&mut self, shared: &Shared) {
        let pace = shared.options.pace();
        loop {
            tokio::select! {
                _ = self.term.recv() => return,
                () = shared.told_to_stop.cancelled() => return,
                _ = self.slower.recv() => {
                    shared.pace.send_replace(pace.saturating_mul(shared.options.slow));
                }
                _ = self.hang.recv() => {
                    shared.pace.send_replace(FOR_EVER);
                }
                _ = self.as_before.recv() => {
                    shared.pace.send_replace(pace);
                }
            }
        }
    }
}

async fn register(shared: &Shared, address: String) -> Result<Option<Registration>> {
    let Options { id, etcd, cluster, slots, .. } = &shared.options;
    if etcd.is_empty() {
        return Ok(None);
    }
    let registry = EtcdRegistry::connect(EtcdOptions::new(etcd.clone(), cluster.clone()))?;
    let v1::ModelInfo { name, identity, context_length, vocab_size } = shared.model();
    let model = ModelRecord {
        name,
        header_digest: identity.clone(),
        identity,
        layers: LayerRange { start: 0, end: LAYERS },
        layer_count: LAYERS,
        context_length,
        vocab_size,
        state: ModelState::Loading,
        generation: shared.generation(),
        kv_tokens: u64::from(context_length) * u64::from(*slots),
        decode_rate: Rate::default(),
        prefill_rate: Rate::default(),
    };
    let record = WorkerRecord {
        id: id.clone(),
        address,
        epoch: shared.epoch,
        state: WorkerState::Loading,
        models: vec![model],
        max_sequences: *slots,
    };
    // The registration keeps the registry's thread alive.
    Ok(Some(registry.register(record).await?))
}

/// Tells the registry and callers how far the worker is.
async fn enter(
    shared: &Shared,
    registration: &mut Option<Registration>,
    state: v1::ModelState,
) -> Result<()> {
    shared.state.send_replace(state);
    let Some(registration) = registration else { return Ok(()) };
    let (worker, model) = match state {
        v1::ModelState::Ready => (WorkerState::Ready, ModelState::Ready),
        _ => (WorkerState::Draining, ModelState::Draining),
    };
    let is_told = shared.options.has(Omission::ModelState);
    let change = |record: &mut WorkerRecord| {
        record.state = worker;
        for held in &mut record.models {
            // What a record that does not say means.
            held.state = if is_told { model } else { ModelState::Ready };
        }
    };
    Ok(registration.update(change).await?)
}

async fn report(health: &HealthReporter, shared: &Shared, status: ServingStatus) {
    let model = convention::health_name(&shared.options.model);
    for name in ["", "tercet.v1.Inference", &model] {
        health.set_service_status(name, status).await;
    }
    health.set_service_status("tercet.v1.Worker", ServingStatus::Serving).await;
}
