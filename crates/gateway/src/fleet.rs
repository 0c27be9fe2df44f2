//! The workers as this gateway sees them: what the registry says, and how they behave.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tercet_cluster::{View, WorkerId, WorkerRecord, WorkerState};
use tercet_proto::v1;
use tercet_telemetry::{EjectionCause, Metrics};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};

use crate::{Config, Dialer, Offer, Policy};

mod choice;
mod health;
mod lease;
mod lines;
mod link;
mod pace;
mod pulse;
mod report;
mod status;
mod vigil;

use self::health::Ejection;
use self::lines::Lines;
pub use self::report::Reported;
pub(crate) use self::{
    choice::{NoPlace, Patience},
    lease::Lease,
    link::Link,
    pulse::Answer,
};

/// How long a model whose last worker is gone stays known: asking for it is then answered with
/// UNAVAILABLE, as for a restart, rather than with NOT_FOUND.
const REMEMBERED: Duration = Duration::from_secs(300);

/// Most names of models that a message lists.
const LISTED: usize = 8;

/// The workers, and the choice among them.
#[derive(Debug)]
pub(crate) struct Fleet {
    dialer: Arc<dyn Dialer>,
    policy: Box<dyn Policy>,
    metrics: Metrics,
    ejection: Ejection,
    suspect_after: Duration,
    slow_factor: f64,
    routes: watch::Sender<Arc<Routes>>,
    /// Grows when the choice among the same workers has changed.
    stir: watch::Sender<u64>,
    /// Held while a worker is chosen and its load raised, so that the next choice sees it.
    choosing: Mutex<()>,
    lines: Arc<Lines>,
}

/// Where requests can go, computed once per change of the view.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    workers: HashMap<WorkerId, Known>,
    models: BTreeMap<String, Model>,
}

/// A worker in use.
#[derive(Clone, Debug)]
struct Known {
    link: Arc<Link>,
    /// What the registry says of it, or said last.
    record: Arc<WorkerRecord>,
    /// Whether the registry has lost it.
    kept: bool,
}

/// A model that is or recently was served.
#[derive(Debug, Default)]
struct Model {
    /// Workers by identity; the one that is routed to first. Empty while no worker is ready.
    groups: Vec<Group>,
    /// Incarnations of the workers that hold it, ready or not.
    holders: Vec<(WorkerId, u64)>,
    /// Since when no worker holds it.
    gone: Option<Instant>,
}

/// Workers that give equal answers.
#[derive(Clone, Debug)]
struct Group {
    info: v1::ModelInfo,
    members: Vec<Member>,
}

#[derive(Clone, Debug)]
struct Member {
    link: Arc<Link>,
    /// Of the model at the worker.
    generation: u64,
    max_sequences: usize,
    /// Tokens that the KV memory of the model holds; 0 if the worker does not say.
    kv_tokens: u64,
}

/// Why a request cannot be routed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RouteError {
    /// Fault: the caller.
    #[error("no model {model:?} is served here, expected one of: {served}")]
    Unknown { model: String, served: String },
    /// Fault: the caller.
    #[error("several models are served, name one of: {served}")]
    Ambiguous { served: String },
    /// Nobody's fault.
    #[error("no model is served yet, try again later")]
    Nothing,
}

/// What a request needs of a worker.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    /// Name of the model.
    pub(crate) model: String,
    /// The identity a stream began with; `None` takes the one in use.
    pub(crate) identity: Option<String>,
    /// Tokens the request may still take.
    pub(crate) tokens: u64,
    /// Whether no other request of this gateway may be there.
    pub(crate) alone: bool,
    /// Whether it takes a slot there.
    pub(crate) computes: bool,
    /// Its number among all requests: who has a lower one goes first.
    pub(crate) number: u64,
    /// Whether it has had a worker already, and is not sent away for want of room.
    pub(crate) admitted: bool,
    /// What a worker is chosen by.
    pub(crate) offer: Arc<Offer>,
}

impl Fleet {
    pub(crate) fn new(
        config: &Config,
        dialer: Arc<dyn Dialer>,
        policy: Box<dyn Policy>,
        metrics: Metrics,
    ) -> Self {
        let limits = lines::Limits { length: config.max_queue, wait: config.max_queue_wait };
        Self {
            lines: Arc::new(Lines::new(limits, metrics.clone())),
            dialer,
            policy,
            metrics,
            ejection: Ejection { first: config.ejection, longest: config.max_ejection },
            suspect_after: config.suspect_after,
            slow_factor: config.slow_factor,
            routes: watch::Sender::new(Arc::default()),
            stir: watch::Sender::new(0),
            choosing: Mutex::default(),
        }
    }

    /// Follows the registry's view, and the pace of the workers, until the registry goes away.
    pub(crate) async fn follow(&self, mut view: watch::Receiver<Arc<View>>) {
        let mut stirred = self.stir.subscribe();
        let mut windows = time::interval(pace::WINDOW);
        windows.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut judged = Instant::now();
        loop {
            let latest = Arc::clone(&view.borrow_and_update());
            self.apply(&latest);
            let kept = self.routes.borrow().workers.values().any(|known| known.kept);
            loop {
                tokio::select! {
                    changed = view.changed() => if changed.is_ok() { break } else { return },
                    // A kept worker may have fallen silent, or said that it leaves.
                    _ = stirred.changed(), if kept => break,
                    now = windows.tick() => {
                        self.judge(now, now.saturating_duration_since(judged));
                        judged = now;
                    }
                }
            }
        }
    }

    /// Takes over a view.
    pub(crate) fn apply(&self, view: &View) {
        let before = Arc::clone(&self.routes.borrow());
        let now = Instant::now();
        let workers = self.workers(&before, view);
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        // In order of their names, so that equal views give equal routes.
        let mut known: Vec<_> = workers.values().collect();
        known.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        for Known { link, record, .. } in known {
            for held in record.models.iter().filter(|held| held.layers.start == 0) {
                let model = models.entry(held.name.clone()).or_default();
                model.holders.push((record.id.clone(), record.epoch));
            }
            let max_sequences = usize::try_from(record.max_sequences).unwrap_or(usize::MAX);
            for held in record.served_models() {
                let Some(model) = models.get_mut(&held.name) else { continue };
                let generation = held.generation;
                let kv_tokens = held.kv_tokens;
                let link = Arc::clone(link);
                let member = Member { link, generation, max_sequences, kv_tokens };
                match model.groups.iter_mut().find(|group| group.info.identity == held.identity) {
                    Some(group) => group.members.push(member),
                    None => model.groups.push(Group {
                        info: v1::ModelInfo {
                            name: held.name.clone(),
                            identity: held.identity.clone(),
                            context_length: held.context_length,
                            vocab_size: held.vocab_size,
                        },
                        members: vec![member],
                    }),
                }
            }
        }
        for (name, model) in &mut models {
            model.groups.sort_by(|a, b| {
                let sizes = b.members.len().cmp(&a.members.len());
                sizes.then_with(|| a.info.identity.cmp(&b.info.identity))
            });
            if let [used, others @ ..] = model.groups.as_slice()
                && !others.is_empty()
            {
                tracing::warn!(
                    model = name,
                    identity = used.info.identity,
                    others = others.len(),
                    "workers hold different models under one name, new requests go to one of them"
                );
            }
        }
        for (name, model) in &before.models {
            let gone = model.gone.unwrap_or(now);
            let is_here = |(id, epoch): &(WorkerId, u64)| {
                view.workers.get(id).is_some_and(|worker| worker.epoch == *epoch)
            };
            // Workers that are still here have unloaded it: nobody waits for them to be back.
            let unloaded = model.holders.iter().all(is_here);
            if !models.contains_key(name) && !unloaded && now - gone < REMEMBERED {
                let holders = model.holders.clone();
                models
                    .insert(name.clone(), Model { groups: Vec::new(), holders, gone: Some(gone) });
            }
        }
        self.publish(&before, Routes { workers, models });
    }

    /// Returns the workers of a view, and those that it has lost and that answer all the same: a
    /// lease that lapses while the registry is out of reach says nothing about the worker.
    fn workers(&self, before: &Routes, view: &View) -> HashMap<WorkerId, Known> {
        let mut workers = HashMap::with_capacity(view.workers.len());
        for record in view.workers.values() {
            let Some(link) = self.link(before, record) else { continue };
            let known = Known { link, record: Arc::clone(record), kept: false };
            workers.insert(record.id.clone(), known);
        }
        for (id, known) in &before.workers {
            let lost = !view.workers.contains_key(id);
            let stays = known.link.answer() == Answer::Answering
                && !known.link.is_leaving()
                && known.record.state != WorkerState::Draining;
            if lost && stays {
                if !known.kept {
                    tracing::warn!(worker = %id, "the registry has lost a worker that answers");
                }
                workers.insert(id.clone(), Known { kept: true, ..known.clone() });
            }
        }
        workers
    }

    /// Compares the paces of workers that serve the same model.
    fn judge(&self, now: Instant, window: Duration) {
        let routes = Arc::clone(&self.routes.borrow());
        for (name, model) in &routes.models {
            for group in &model.groups {
                let links = || group.members.iter().map(|member| &member.link);
                let samples: Vec<_> = links().map(|link| link.sample(name, now, window)).collect();
                let verdicts = pace::verdicts(&samples, self.slow_factor);
                for (link, verdict) in links().zip(verdicts) {
                    if link.judge(name, verdict, now) {
                        let worker = link.worker();
                        tracing::warn!(%worker, model = name, "a worker far slower than its peers");
                        self.metrics.worker_ejected(EjectionCause::Slow);
                    }
                }
            }
        }
    }

    /// Returns the link to a worker: the one in use, unless the worker started anew.
    fn link(&self, before: &Routes, record: &WorkerRecord) -> Option<Arc<Link>> {
        if let Some(known) = before.workers.get(&record.id)
            && known.link.leads_to(record)
        {
            return Some(Arc::clone(&known.link));
        }
        match self.dialer.dial(record) {
            Ok(channel) => {
                let (after, stir) = (self.suspect_after, self.stir.clone());
                let lines = Arc::clone(&self.lines);
                Some(Link::connect(record, channel, after, stir, lines, &self.metrics))
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(worker = %record.id, error, "worker cannot be reached");
                None
            }
        }
    }

    fn publish(&self, before: &Routes, after: Routes) {
        for id in before.workers.keys().filter(|id| !after.workers.contains_key(*id)) {
            self.metrics.forget_worker(id.as_str());
        }
        self.metrics.set_workers_kept(after.workers.values().filter(|known| known.kept).count());
        for name in before.models.keys().filter(|name| !after.models.contains_key(*name)) {
            self.metrics.set_workers(name, 0);
        }
        for (name, model) in &after.models {
            let workers = model.groups.first().map_or(0, |group| group.members.len());
            self.metrics.set_workers(name, workers);
        }
        self.lines.forget(|model| !after.models.contains_key(model));
        self.routes.send_replace(Arc::new(after));
        self.lines.call();
    }

    /// Returns what a new request needs.
    pub(crate) fn want(&self, model: String, tokens: u64) -> Want {
        Want {
            model,
            identity: None,
            tokens,
            alone: false,
            computes: true,
            number: self.lines.number(),
            admitted: false,
            offer: Arc::default(),
        }
    }

    /// Returns whether workers are chosen by the pages of prompts.
    pub(crate) fn needs_pages(&self) -> bool {
        self.policy.needs_pages()
    }

    /// Returns the identity of the model that requests for that name go to.
    pub(crate) fn identity(&self, model: &str) -> Option<String> {
        let routes = self.routes.borrow();
        let group = routes.models.get(model)?.groups.first()?;
        Some(group.info.identity.clone())
    }

    /// Returns a receiver that changes with the routes.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Routes>> {
        self.routes.subscribe()
    }

    /// Returns the name of the model that a request means, waiting until `until` for the first
    /// model to appear.
    pub(crate) async fn resolve(
        &self,
        model: Option<&str>,
        until: Instant,
    ) -> Result<String, RouteError> {
        let mut routes = self.watch();
        loop {
            let resolved = routes.borrow_and_update().resolve(model);
            if !matches!(resolved, Err(RouteError::Nothing)) {
                return resolved;
            }
            match time::timeout_at(until, routes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return resolved,
            }
        }
    }

    /// Leaves the worker of `lease`, or only the model there, alone for a while, since it failed.
    pub(crate) fn eject(&self, lease: &Lease, only_model: bool) {
        if lease.eject(only_model, self.ejection) {
            let cause = if only_model { EjectionCause::Failed } else { EjectionCause::Broken };
            self.metrics.worker_ejected(cause);
            let worker = lease.link().worker().as_str();
            tracing::info!(worker, cause = cause.as_str(), "ejection");
        }
    }
}

impl Routes {
    /// Returns whether any request can be routed.
    pub(crate) fn is_serving(&self) -> bool {
        self.models.values().any(|model| !model.groups.is_empty())
    }

    /// Returns the link to a worker.
    #[cfg(test)]
    pub(crate) fn link(&self, worker: &WorkerId) -> Option<Arc<Link>> {
        self.workers.get(worker).map(|known| Arc::clone(&known.link))
    }

    /// Returns the models that can be asked for, by name.
    pub(crate) fn models(&self) -> Vec<v1::ModelInfo> {
        let groups = self.models.values().filter_map(|model| model.groups.first());
        groups.map(|group| group.info.clone()).collect()
    }

    fn group(&self, want: &Want) -> Option<&Group> {
        let groups = &self.models.get(&want.model)?.groups;
        match &want.identity {
            None => groups.first(),
            Some(identity) => groups.iter().find(|group| group.info.identity == *identity),
        }
    }

    fn resolve(&self, model: Option<&str>) -> Result<String, RouteError> {
        let now = Instant::now();
        let is_known = |model: &Model| model.gone.is_none_or(|gone| now - gone < REMEMBERED);
        if let Some(name) = model
            && self.models.get(name).is_some_and(is_known)
        {
            return Ok(name.to_owned());
        }
        let mut names: Vec<&str> = self
            .models
            .iter()
            .filter(|(_, model)| !model.groups.is_empty())
            .map(|(name, _)| name.as_str())
            .collect();
        if names.is_empty() {
            let known = self.models.iter().filter(|(_, model)| is_known(model));
            names = known.map(|(name, _)| name.as_str()).collect();
        }
        match (model, names.as_slice()) {
            (_, []) => Err(RouteError::Nothing),
            (Some(name), _) => {
                Err(RouteError::Unknown { model: name.to_owned(), served: listed(&names) })
            }
            (None, [only]) => Ok((*only).to_owned()),
            (None, _) => Err(RouteError::Ambiguous { served: listed(&names) }),
        }
    }
}

/// Returns names for a message, not too many.
fn listed(names: &[&str]) -> String {
    match names.len().saturating_sub(LISTED) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..LISTED].join(", ")),
    }
}
