//! Load reports: how busy the worker is, for those who choose among workers.

use std::{sync::Arc, time::Duration};

use futures::{Stream, stream};
use tercet_cluster::WorkerState;
use tercet_engine::PAGE_POSITIONS;
use tercet_proto::v1;
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tonic::Status;

use crate::core::{Core, Hosted, Role, wire};

/// Time between two reports to one who does not say.
const DEFAULT_INTERVAL_MILLIS: u32 = 250;
/// What may be asked for: less would be a burden, more no sign of life.
const INTERVAL_MILLIS: std::ops::RangeInclusive<u32> = 50..=10_000;
/// Least time between two reports of which nothing but counts differ. A burst of requests is told
/// once.
const LEAST_GAP: Duration = Duration::from_millis(25);

/// Tells one caller of `WatchLoad`.
struct Reporter {
    core: Arc<Core>,
    /// Longest time between two reports.
    interval: Duration,
    changes: watch::Receiver<u64>,
    traffic: watch::Receiver<u64>,
    told: Option<Instant>,
}

/// Returns the time between two reports that a caller asks for.
pub(crate) fn interval(request: &v1::WatchLoadRequest) -> Duration {
    let millis = match request.interval_millis {
        0 => DEFAULT_INTERVAL_MILLIS,
        asked => asked.clamp(*INTERVAL_MILLIS.start(), *INTERVAL_MILLIS.end()),
    };
    Duration::from_millis(millis.into())
}

/// Returns reports: the first at once, until the worker stops.
pub(crate) fn reports(
    core: Arc<Core>,
    interval: Duration,
) -> impl Stream<Item = Result<v1::LoadReport, Status>> {
    let (changes, traffic) = (core.changes(), core.traffic());
    let reporter = Reporter { core, interval, changes, traffic, told: None };
    stream::unfold(reporter, |mut reporter| async move {
        let report = reporter.next().await?;
        Some((Ok(report), reporter))
    })
}

impl Reporter {
    async fn next(&mut self) -> Option<v1::LoadReport> {
        let stopped = self.core.evicted.clone();
        stopped.run_until_cancelled(self.due()).await?;
        self.changes.mark_unchanged();
        self.traffic.mark_unchanged();
        self.told = Some(Instant::now());
        Some(report(&self.core))
    }

    /// Returns when the next report is due.
    async fn due(&mut self) {
        let Some(told) = self.told else { return };
        let busier = async {
            let changed = self.traffic.changed().await;
            time::sleep_until(told + LEAST_GAP).await;
            changed
        };
        // Their senders are in the core.
        tokio::select! {
            _ = self.changes.changed() => {}
            _ = busier => {}
            () = time::sleep_until(told + self.interval) => {}
        }
    }
}

/// Returns how busy the worker is now.
fn report(core: &Core) -> v1::LoadReport {
    let state = match core.state() {
        WorkerState::Loading => v1::WorkerState::Loading,
        WorkerState::Ready => v1::WorkerState::Ready,
        WorkerState::Draining => v1::WorkerState::Draining,
    };
    v1::LoadReport {
        epoch: core.config.epoch,
        state: state.into(),
        models: core.models().iter().map(|model| load(model)).collect(),
    }
}

fn load(model: &Hosted) -> v1::ModelLoad {
    let (admitted, outstanding_tokens) = (model.meter.admitted(), model.meter.outstanding());
    let engine = match model.loaded().as_ref().map(|loaded| &loaded.role) {
        Some(Role::Engine(engine)) => engine.load_now(),
        // A later stage admits nothing.
        Some(Role::Stage(_)) | None => Default::default(),
    };
    let running = engine.running.min(admitted);
    let free = engine.pages.saturating_sub(engine.pages_referenced) * PAGE_POSITIONS;
    let speed = model.meter.speed();
    v1::ModelLoad {
        name: model.facts.name.clone(),
        generation: model.generation,
        running: wire(running),
        waiting: wire(admitted - running),
        outstanding_tokens,
        free_kv_tokens: u64::try_from(free).unwrap_or(u64::MAX),
        steps: speed.steps,
        decode_tokens_per_second: speed.decode(),
        prefill_tokens_per_second: speed.prefill(),
        state: model.phase().wire().into(),
    }
}
