//! What an operator is told of the workers and the models.

use tercet_cluster::{ModelState, WorkerId, WorkerState};
use tercet_proto::v1::{self, worker_client::WorkerClient};
use tokio::time::Instant;
use tonic::transport::Channel;

use super::{Answer, Fleet, Known, Model, Routes, listed};

impl Fleet {
    /// Returns how the models are, by name.
    pub(crate) fn model_statuses(&self) -> Vec<v1::ModelStatus> {
        let mut models = self.watch().borrow().model_statuses();
        for model in &mut models {
            model.queued = count(self.lines.waiting(&model.name));
        }
        models
    }
}

impl Routes {
    /// Returns a client of the `Worker` service of a worker; `None` if there is no such worker.
    pub(crate) fn worker_client(&self, id: &str) -> Option<WorkerClient<Channel>> {
        let id: WorkerId = id.parse().ok()?;
        Some(self.workers.get(&id)?.link.worker_client())
    }

    /// Returns the names of the workers for a message, not too many.
    pub(crate) fn worker_names(&self) -> String {
        let mut names: Vec<&str> = self.workers.keys().map(WorkerId::as_str).collect();
        names.sort_unstable();
        if names.is_empty() { "none".to_owned() } else { listed(&names) }
    }

    /// Returns how the workers are, by name.
    pub(crate) fn worker_statuses(&self, now: Instant) -> Vec<v1::WorkerStatus> {
        let mut workers: Vec<_> = self.workers.values().map(|known| known.status(now)).collect();
        workers.sort_by(|a, b| a.worker_id.cmp(&b.worker_id));
        workers
    }

    fn model_statuses(&self) -> Vec<v1::ModelStatus> {
        let status = |(name, model): (&String, &Model)| {
            let (mut running, mut waiting) = (0_u32, 0_u32);
            let loads = self.workers.values().filter_map(|known| known.link.last_load(name));
            for load in loads {
                running = running.saturating_add(load.running);
                waiting = waiting.saturating_add(load.waiting);
            }
            let used = model.groups.first();
            v1::ModelStatus {
                name: name.clone(),
                identity: used.map(|group| group.info.identity.clone()).unwrap_or_default(),
                ready_workers: count(used.map_or(0, |group| group.members.len())),
                workers: if model.gone.is_some() { 0 } else { count(model.holders.len()) },
                running,
                waiting,
                queued: 0,
            }
        };
        self.models.iter().map(status).collect()
    }
}

impl Known {
    fn status(&self, now: Instant) -> v1::WorkerStatus {
        let Self { link, record, kept } = self;
        let answer = link.answer();
        let (streams, outstanding_tokens) = link.load();
        let state = match record.state {
            _ if link.is_leaving() => v1::WorkerState::Draining,
            WorkerState::Loading => v1::WorkerState::Loading,
            WorkerState::Ready => v1::WorkerState::Ready,
            WorkerState::Draining => v1::WorkerState::Draining,
        };
        let left = |until: Option<Instant>| until.map(|until| (until - now).as_secs_f64());
        let models = record.models.iter().map(|held| {
            let state = match held.state {
                ModelState::Loading => v1::ModelState::Loading,
                ModelState::Ready => v1::ModelState::Ready,
                ModelState::Draining => v1::ModelState::Draining,
                ModelState::Failed => v1::ModelState::Failed,
            };
            v1::WorkerModelStatus {
                name: held.name.clone(),
                identity: held.identity.clone(),
                layers: Some(v1::LayerRange { start: held.layers.start, end: held.layers.end }),
                layer_count: held.layer_count,
                state: state.into(),
                load: link.last_load(&held.name),
                ejected_seconds: left(link.ejected_until(&held.name, now)),
                slow: link.is_slow(&held.name, now),
            }
        });
        v1::WorkerStatus {
            worker_id: record.id.to_string(),
            address: record.address.clone(),
            state: state.into(),
            epoch: record.epoch,
            health: health(answer).into(),
            suspected: answer.is_suspect(),
            kept: *kept,
            report_age_seconds: link.report_age(now).map(|age| age.as_secs_f64()),
            ejected_seconds: left(link.worker_ejected_until(now)),
            max_sequences: record.max_sequences,
            streams: count(streams),
            outstanding_tokens,
            models: models.collect(),
        }
    }
}

fn health(answer: Answer) -> v1::WorkerHealth {
    match answer {
        Answer::Unheard => v1::WorkerHealth::Unheard,
        Answer::Answering => v1::WorkerHealth::Answering,
        Answer::Lost => v1::WorkerHealth::Lost,
        Answer::Silent => v1::WorkerHealth::Silent,
        Answer::Gone => v1::WorkerHealth::Gone,
        Answer::Unjudged => v1::WorkerHealth::Unjudged,
    }
}

fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
