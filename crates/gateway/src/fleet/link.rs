use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tercet_cluster::{WorkerId, WorkerRecord};
use tercet_proto::v1::{self, inference_client::InferenceClient, worker_client::WorkerClient};
use tercet_telemetry::Metrics;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::health::{Ejection, Health};
use super::lines::Lines;
use super::pace::{Pace, Sample};
use super::pulse::{Answer, Pulse};
use super::report::{Own, Reported, Reports};
use super::vigil;

/// Longest wait for the truth about a worker whose connection broke.
const VERDICT: Duration = Duration::from_secs(1);

/// The gateway's side of one incarnation of a worker: its channel, its load, its health.
#[derive(Debug)]
pub(crate) struct Link {
    worker: WorkerId,
    epoch: u64,
    address: String,
    channel: Channel,
    suspect_after: Duration,
    /// Requests in progress.
    streams: AtomicUsize,
    /// Tokens these may still take.
    tokens: AtomicU64,
    /// Whether one request has the worker for itself, as far as this gateway is concerned.
    alone: AtomicBool,
    /// Whether a message came since the last look at the pulse.
    stirred: AtomicBool,
    /// Whether the worker said that it is about to stop. It never takes that back.
    leaving: AtomicBool,
    /// Connections over which reports came.
    connections: AtomicU64,
    /// Locked for single reads and writes, never across an await; as the next two.
    pulse: Mutex<Pulse>,
    reports: Mutex<Reports>,
    standing: Mutex<Standing>,
    answer: watch::Sender<Answer>,
    /// Grows when waiting requests should look again.
    stir: watch::Sender<u64>,
    /// Where requests wait for room.
    lines: Arc<Lines>,
    metrics: Metrics,
    outstanding: Gauge,
    suspected: Gauge,
    vigil: OnceLock<JoinSet<()>>,
}

/// What is known of a worker besides what the registry says.
#[derive(Debug, Default)]
struct Standing {
    /// Of the connection.
    health: Health,
    /// Of its models, by name.
    models: HashMap<String, ModelStanding>,
}

/// What is known of a model of a worker.
#[derive(Debug, Default)]
struct ModelStanding {
    /// The latest generation of the model that the worker said is about to go. It never takes that
    /// back.
    draining: Option<u64>,
    health: Health,
    pace: Pace,
    traffic: Arc<Traffic>,
    /// Tokens received before the present window.
    sampled: u64,
}

/// What comes from a model of a worker.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// Streams whose first token has come.
    pub(super) streams: AtomicUsize,
    /// Tokens that came.
    pub(super) tokens: AtomicU64,
}

impl Link {
    pub(super) fn connect(
        record: &WorkerRecord,
        channel: Channel,
        suspect_after: Duration,
        stir: watch::Sender<u64>,
        lines: Arc<Lines>,
        metrics: &Metrics,
    ) -> Arc<Self> {
        let link = Arc::new(Self {
            worker: record.id.clone(),
            epoch: record.epoch,
            address: record.address.clone(),
            channel: channel.clone(),
            suspect_after,
            streams: AtomicUsize::new(0),
            tokens: AtomicU64::new(0),
            alone: AtomicBool::new(false),
            stirred: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            pulse: Mutex::new(Pulse::new(suspect_after, Instant::now())),
            reports: Mutex::default(),
            standing: Mutex::default(),
            answer: watch::Sender::new(Answer::Unheard),
            stir,
            lines,
            outstanding: metrics.worker_outstanding(record.id.as_str()),
            suspected: metrics.worker_suspected(record.id.as_str()),
            metrics: metrics.clone(),
            vigil: OnceLock::new(),
        });
        let vigil = vigil::keep(Arc::downgrade(&link), channel, suspect_after);
        link.vigil.get_or_init(|| vigil);
        link
    }

    /// Returns whether this is the link to the worker of that record, not to an earlier incarnation.
    pub(super) fn leads_to(&self, record: &WorkerRecord) -> bool {
        self.epoch == record.epoch && self.address == record.address
    }

    pub(crate) fn worker(&self) -> &WorkerId {
        &self.worker
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Returns a client on the link's channel.
    pub(crate) fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel())
    }

    /// Returns a client of its other service on the same channel.
    pub(super) fn worker_client(&self) -> WorkerClient<Channel> {
        WorkerClient::new(self.channel())
    }

    // === its life ===

    /// Returns how the worker answers.
    pub(crate) fn answer(&self) -> Answer {
        *self.answer.borrow()
    }

    /// Returns a receiver that changes with that.
    pub(crate) fn answers(&self) -> watch::Receiver<Answer> {
        self.answer.subscribe()
    }

    /// Tells that a message came on a stream.
    pub(crate) fn stir(&self) {
        // Mostly set already: a read does not take the cache line from the other streams.
        if !self.stirred.load(Ordering::Relaxed) {
            self.stirred.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn look(&self, now: Instant) {
        let stirred = self.stirred.swap(false, Ordering::Relaxed);
        self.feel(|pulse| pulse.look(now, stirred));
    }

    /// Takes over a report; the `first` of its connection says that failures are over.
    pub(super) fn take_in(&self, report: v1::LoadReport, first: bool, now: Instant) {
        if report.epoch != self.epoch {
            // Another incarnation at the same address, which the registry will tell of.
            return self.refuse();
        }
        if first {
            self.connections.fetch_add(1, Ordering::Relaxed);
            self.standing().health.reconnect();
        }
        let stops = report.state() == v1::WorkerState::Draining;
        for model in &report.models {
            let goes = matches!(model.state(), v1::ModelState::Draining | v1::ModelState::Failed);
            if stops || goes {
                self.set_draining(&model.name, model.generation);
            }
        }
        let own = Own {
            streams: self.streams.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
        };
        self.reports().take_in(report.models, own, now);
        if stops && !self.leaving.swap(true, Ordering::Relaxed) {
            self.wake();
        }
        self.feel(|pulse| pulse.report(now));
        // What other gateways had there may have ended.
        self.lines.call();
    }

    /// The reports broke off.
    pub(super) fn lose(&self) {
        self.feel(Pulse::lose);
    }

    /// A connection was refused.
    pub(super) fn refuse(&self) {
        self.feel(Pulse::refuse);
    }

    /// The worker is of a version without reports.
    pub(super) fn give_up(&self) {
        tracing::info!(worker = %self.worker, "sends no load reports: an older version");
        self.feel(Pulse::give_up);
    }

    /// Tells of a change of the pulse, if `change` makes one.
    fn feel(&self, change: impl FnOnce(&mut Pulse)) {
        let mut pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pulse);
        let (before, answer) = (self.answer(), pulse.answer());
        if before == answer {
            return;
        }
        self.answer.send_replace(answer);
        drop(pulse);
        if before.is_suspect() != answer.is_suspect() {
            let worker = self.worker.as_str();
            self.suspected.set(i64::from(answer.is_suspect()));
            if answer.is_suspect() {
                self.metrics.suspicion();
            }
            tracing::info!(worker, answer = answer.as_str(), "suspicion");
        }
        self.wake();
    }

    fn wake(&self) {
        self.stir.send_modify(|changes| *changes += 1);
        self.lines.call();
    }

    /// Returns whether the worker said that it is about to stop.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Returns the number of connections over which reports came.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Returns whether the worker crashed since it had had that many connections, waiting a moment
    /// for what becomes of it. A worker that answers again has not, nor one that said that it is
    /// about to stop, and of one that is merely out of reach nobody knows.
    pub(crate) async fn has_crashed(&self, connections: u64) -> bool {
        let mut answers = self.answers();
        let known = answers.wait_for(|answer| match answer {
            Answer::Gone | Answer::Silent | Answer::Unjudged => true,
            Answer::Answering => self.connections() > connections,
            Answer::Unheard | Answer::Lost => false,
        });
        let known = tokio::time::timeout(VERDICT, known).await;
        let gone = matches!(known, Ok(Ok(answer)) if *answer == Answer::Gone);
        gone && !self.is_leaving()
    }

    // === its reports ===

    /// Returns what the worker reports, as it concerns a model, unless that is stale.
    pub(crate) fn reported(&self, model: &str, now: Instant) -> Option<Reported> {
        self.reports().of(model, now, self.suspect_after)
    }

    /// Returns the steps that the worker has computed of a model, unless the report is stale.
    pub(crate) fn steps(&self, model: &str, now: Instant) -> Option<u64> {
        self.reports().steps(model, now, self.suspect_after)
    }

    /// Returns what the worker reported last of a model, however old that is.
    pub(super) fn last_load(&self, model: &str) -> Option<v1::ModelLoad> {
        self.reports().last(model)
    }

    /// Returns the time since the last report.
    pub(super) fn report_age(&self, now: Instant) -> Option<Duration> {
        self.reports().age(now)
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === its standing ===

    /// Takes no new requests for this generation of a model from here on.
    pub(super) fn set_draining(&self, model: &str, generation: u64) {
        self.standing().of(model).draining = Some(generation);
    }

    pub(crate) fn is_draining(&self, model: &str, generation: u64) -> bool {
        let standing = self.standing();
        standing.models.get(model).is_some_and(|model| model.draining == Some(generation))
    }

    /// Leaves a model of the worker alone until then, without holding it against it.
    pub(super) fn back_off(&self, model: &str, until: Instant) {
        self.standing().of(model).health.back_off(until);
    }

    /// Forgets past failures: the worker answers for the model.
    pub(super) fn set_alive(&self, model: &str) {
        let mut standing = self.standing();
        standing.health.forget();
        if let Some(model) = standing.models.get_mut(model) {
            model.health.forget();
        }
    }

    /// Leaves the worker, or only a model of it, alone for a while, longer with each failure in a
    /// row. Returns whether it does.
    pub(super) fn eject(&self, model: Option<&str>, since: Instant, ejection: Ejection) -> bool {
        let mut standing = self.standing();
        let health = match model {
            Some(model) => &mut standing.of(model).health,
            None => &mut standing.health,
        };
        health.fail(since, Instant::now(), ejection)
    }

    /// Returns until when a model of the worker is left alone; `None` if it is not.
    pub(super) fn ejected_until(&self, model: &str, now: Instant) -> Option<Instant> {
        let standing = self.standing();
        let of_model = standing.models.get(model).and_then(|model| model.health.ejected_until());
        of_model.max(standing.health.ejected_until()).filter(|until| *until > now)
    }

    /// Returns until when all of the worker is left alone; `None` if it is not.
    pub(super) fn worker_ejected_until(&self, now: Instant) -> Option<Instant> {
        self.standing().health.ejected_until().filter(|until| *until > now)
    }

    /// Returns what came of a model in the window that ends now.
    pub(super) fn sample(&self, model: &str, now: Instant, window: Duration) -> Option<Sample> {
        let reported = self.reported(model, now);
        let mut standing = self.standing();
        let ModelStanding { traffic, sampled, .. } = standing.models.get_mut(model)?;
        let total = traffic.tokens.load(Ordering::Relaxed);
        let tokens = total - std::mem::replace(sampled, total);
        let streams = traffic.streams.load(Ordering::Relaxed);
        Sample::new(streams, tokens, window, reported?.decode_tokens_per_second)
    }

    /// Takes a verdict on its pace; returns whether a model of it is avoided from now on.
    pub(super) fn judge(&self, model: &str, slow: Option<bool>, now: Instant) -> bool {
        self.standing().models.get_mut(model).is_some_and(|model| model.pace.judge(slow, now))
    }

    /// Returns whether a model of it is far slower than at its peers.
    pub(super) fn is_slow(&self, model: &str, now: Instant) -> bool {
        let standing = self.standing();
        standing.models.get(model).is_some_and(|model| model.pace.is_avoided(now))
    }

    pub(super) fn traffic(&self, model: &str) -> Arc<Traffic> {
        Arc::clone(&self.standing().of(model).traffic)
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === its load ===

    /// Returns requests in progress and the tokens they may still take.
    pub(super) fn load(&self) -> (usize, u64) {
        (self.streams.load(Ordering::Relaxed), self.tokens.load(Ordering::Relaxed))
    }

    pub(super) fn begin(&self, tokens: u64) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.outstanding.inc();
    }

    pub(super) fn progress(&self, tokens: u64) {
        self.tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    pub(super) fn end(&self, tokens: u64) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        self.tokens.fetch_sub(tokens, Ordering::Relaxed);
        self.outstanding.dec();
        self.lines.call();
    }

    /// Returns whether one request has the worker for itself.
    pub(super) fn is_alone(&self) -> bool {
        self.alone.load(Ordering::Relaxed)
    }

    /// Gives the worker to one request alone, or to all again. Called with the choice locked, or
    /// by the request that has it.
    pub(super) fn set_alone(&self, alone: bool) {
        self.alone.store(alone, Ordering::Relaxed);
        if !alone {
            self.wake();
        }
    }
}

impl Standing {
    /// Returns the standing of a model; only models that the registry named are asked for.
    fn of(&mut self, model: &str) -> &mut ModelStanding {
        self.models.entry(model.to_owned()).or_default()
    }
}
