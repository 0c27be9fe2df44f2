//! A cluster for programs.

use serde_json::{Value, json};
use tercet_proto::v1::{GatewayStatus, ModelLoad, ModelStatus, WorkerModelStatus, WorkerStatus};

use super::table::{health, model_state, worker_state};

/// Returns a status as JSON.
pub(super) fn status(status: &GatewayStatus) -> String {
    let registry = status.registry.unwrap_or_default();
    let value = json!({
        "version": status.version,
        "uptime_seconds": status.uptime_seconds,
        "draining": status.draining,
        "streams": status.streams,
        "max_streams": status.max_streams,
        "registry": { "connected": registry.connected, "revision": registry.revision },
        "models": status.models.iter().map(model).collect::<Vec<_>>(),
        "workers": status.workers.iter().map(worker).collect::<Vec<_>>(),
    });
    format!("{value:#}\n")
}

fn model(model: &ModelStatus) -> Value {
    json!({
        "name": model.name,
        "identity": model.identity,
        "ready_workers": model.ready_workers,
        "workers": model.workers,
        "running": model.running,
        "waiting": model.waiting,
        "queued": model.queued,
    })
}

fn worker(worker: &WorkerStatus) -> Value {
    json!({
        "worker_id": worker.worker_id,
        "address": worker.address,
        "state": worker_state(worker.state()),
        "epoch": worker.epoch,
        "health": health(worker.health()),
        "suspected": worker.suspected,
        "kept": worker.kept,
        "report_age_seconds": worker.report_age_seconds,
        "ejected_seconds": worker.ejected_seconds,
        "max_sequences": worker.max_sequences,
        "streams": worker.streams,
        "outstanding_tokens": worker.outstanding_tokens,
        "models": worker.models.iter().map(held).collect::<Vec<_>>(),
    })
}

fn held(model: &WorkerModelStatus) -> Value {
    let layers = model.layers.unwrap_or_default();
    json!({
        "name": model.name,
        "identity": model.identity,
        "layers": [layers.start, layers.end],
        "layer_count": model.layer_count,
        "state": model_state(model.state()),
        "ejected_seconds": model.ejected_seconds,
        "slow": model.slow,
        "load": model.load.as_ref().map(load),
    })
}

fn load(load: &ModelLoad) -> Value {
    json!({
        "running": load.running,
        "waiting": load.waiting,
        "outstanding_tokens": load.outstanding_tokens,
        "free_kv_tokens": load.free_kv_tokens,
        "steps": load.steps,
        "decode_tokens_per_second": load.decode_tokens_per_second,
        "prefill_tokens_per_second": load.prefill_tokens_per_second,
    })
}
