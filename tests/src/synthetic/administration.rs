//! The `Worker` service of a synthetic worker.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream, stream::BoxStream};
use tercet_proto::v1::{self, worker_server::Worker};
use tokio::time::{self, Instant};
use tonic::{Request, Response, Status};

use super::{Omission, inference::Shared, load::Counts};

/// Least time between two reports of which nothing but counts differ.
const LEAST_GAP: Duration = Duration::from_millis(25);

/// Layers of the model, for the registry.
pub(super) const LAYERS: u32 = 1;

/// Tells what a synthetic worker is.
#[derive(Clone, Debug)]
pub(super) struct Administration(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl Worker for Administration {
    type LoadModelStream = BoxStream<'static, Result<v1::LoadModelResponse, Status>>;
    type WatchLoadStream = BoxStream<'static, Result<v1::LoadReport, Status>>;

    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let shared = &self.0;
        let model = v1::HeldModel {
            model: Some(shared.model()),
            layers: Some(v1::LayerRange { start: 0, end: LAYERS }),
            layer_count: LAYERS,
            state: (*shared.state.borrow()).into(),
            ..v1::HeldModel::default()
        };
        Ok(Response::new(v1::DescribeResponse {
            worker_id: shared.options.id.to_string(),
            epoch: shared.epoch,
            models: vec![model],
            ..v1::DescribeResponse::default()
        }))
    }

    async fn load_model(
        &self,
        _request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<Self::LoadModelStream>, Status> {
        Err(only_one())
    }

    async fn unload_model(
        &self,
        _request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        Err(only_one())
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let (shared, asked) = (&self.0, request.into_inner().worker_id);
        if !self.0.options.has(Omission::Drain) {
            return Err(Status::unimplemented("this worker is of an older release"));
        }
        if !asked.is_empty() && asked != shared.options.id.as_str() {
            return Err(Status::failed_precondition("another worker is meant"));
        }
        shared.state.send_replace(v1::ModelState::Draining);
        shared.told_to_stop.cancel();
        let Counts { running, waiting, .. } = shared.load.counts();
        Ok(Response::new(v1::DrainResponse { streams: running + waiting }))
    }

    async fn watch_load(
        &self,
        request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        if !self.0.options.has(Omission::WatchLoad) {
            return Err(Status::unimplemented("this worker is of an older release"));
        }
        let interval = match request.into_inner().interval_millis {
            0 => 250,
            asked => asked.clamp(50, 10_000),
        };
        Ok(Response::new(reports(Arc::clone(&self.0), Duration::from_millis(interval.into()))))
    }
}

/// Returns reports: the first at once, until the worker stops.
fn reports(
    shared: Arc<Shared>,
    interval: Duration,
) -> BoxStream<'static, Result<v1::LoadReport, Status>> {
    let (states, aboard) = (shared.state.subscribe(), shared.load.aboard.subscribe());
    let told: Option<Instant> = None;
    stream::unfold(
        (shared, states, aboard, told),
        move |(shared, mut states, mut aboard, told)| async move {
            if let Some(told) = told {
                let busier = async {
                    // Its sender is in `shared`, as that of the states.
                    _ = aboard.changed().await;
                    time::sleep_until(told + LEAST_GAP).await;
                };
                tokio::select! {
                    _ = states.changed() => {}
                    () = busier => {}
                    () = time::sleep_until(told + interval) => {}
                    () = shared.evicted.cancelled() => return None,
                }
            }
            states.mark_unchanged();
            aboard.mark_unchanged();
            let report = report(&shared);
            Some((Ok(report), (shared, states, aboard, Some(Instant::now()))))
        },
    )
    .boxed()
}

fn report(shared: &Shared) -> v1::LoadReport {
    let options = &shared.options;
    let Counts { running, waiting, outstanding, steps } = shared.load.counts();
    let model = *shared.state.borrow();
    let state = match model {
        v1::ModelState::Ready => v1::WorkerState::Ready,
        v1::ModelState::Draining => v1::WorkerState::Draining,
        _ => v1::WorkerState::Loading,
    };
    let kv_tokens = u64::from(options.context) * u64::from(options.slots);
    let load = v1::ModelLoad {
        name: options.model.clone(),
        generation: shared.generation(),
        running,
        waiting,
        outstanding_tokens: outstanding,
        free_kv_tokens: kv_tokens.saturating_sub(u64::from(running) * u64::from(options.context)),
        steps,
        decode_tokens_per_second: options.rate * f64::from(options.slots),
        // A prompt that takes no time says nothing about how long another one takes.
        prefill_tokens_per_second: match options.prefill_micros {
            0 => 0.0,
            _ => 1.0 / options.prefill(1).as_secs_f64(),
        },
        state: model.into(),
    };
    v1::LoadReport { epoch: shared.epoch, state: state.into(), models: vec![load] }
}

fn only_one() -> Status {
    Status::permission_denied("a synthetic worker has one model, always")
}
