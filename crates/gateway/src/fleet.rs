//! The workers as this gateway sees them: what the registry says, and how they behave.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tercet_cluster::{View, WorkerId, WorkerRecord};
use tercet_proto::v1;
use tercet_telemetry::Metrics;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::{Candidate, Config, Dialer, Policy};

mod lease;
mod link;

pub(crate) use self::{lease::Lease, link::Link};

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
    ejection: Duration,
    max_ejection: Duration,
    routes: watch::Sender<Arc<Routes>>,
    /// Held while a worker is chosen and its load raised, so that the next choice sees it.
    choosing: Mutex<()>,
}

/// Where requests can go, computed once per change of the view.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    links: HashMap<WorkerId, Arc<Link>>,
    models: BTreeMap<String, Model>,
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

/// No worker could take a request in the time given.
#[derive(Debug)]
pub(crate) struct NoWorker;

/// What a request needs of a worker.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    /// Name of the model.
    pub(crate) model: String,
    /// The identity a stream began with; `None` takes the one in use.
    pub(crate) identity: Option<String>,
    /// Tokens the request may still take.
    pub(crate) tokens: u64,
}

impl Fleet {
    pub(crate) fn new(
        config: &Config,
        dialer: Arc<dyn Dialer>,
        policy: Box<dyn Policy>,
        metrics: Metrics,
    ) -> Self {
        Self {
            dialer,
            policy,
            metrics,
            ejection: config.ejection,
            max_ejection: config.max_ejection,
            routes: watch::Sender::new(Arc::default()),
            choosing: Mutex::default(),
        }
    }

    /// Follows the registry's view until the registry goes away.
    pub(crate) async fn follow(&self, mut view: watch::Receiver<Arc<View>>) {
        loop {
            let latest = Arc::clone(&view.borrow_and_update());
            self.apply(&latest);
            if view.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes over a view.
    pub(crate) fn apply(&self, view: &View) {
        let before = Arc::clone(&self.routes.borrow());
        let now = Instant::now();
        let mut links = HashMap::with_capacity(view.workers.len());
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        for record in view.workers.values() {
            let Some(link) = self.link(&before, record) else { continue };
            links.insert(record.id.clone(), Arc::clone(&link));
            for held in record.models.iter().filter(|held| held.layers.start == 0) {
                let model = models.entry(held.name.clone()).or_default();
                model.holders.push((record.id.clone(), record.epoch));
            }
            let max_sequences = usize::try_from(record.max_sequences).unwrap_or(usize::MAX);
            for held in record.served_models() {
                let Some(model) = models.get_mut(&held.name) else { continue };
                let generation = held.generation;
                let member = Member { link: Arc::clone(&link), generation, max_sequences };
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
        self.publish(&before, Routes { links, models });
    }

    /// Returns the link to a worker: the one in use, unless the worker started anew.
    fn link(&self, before: &Routes, record: &WorkerRecord) -> Option<Arc<Link>> {
        if let Some(link) = before.links.get(&record.id).filter(|link| link.leads_to(record)) {
            return Some(Arc::clone(link));
        }
        match self.dialer.dial(record) {
            Ok(channel) => {
                let outstanding = self.metrics.worker_outstanding(record.id.as_str());
                Some(Arc::new(Link::new(record, channel, outstanding)))
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(worker = %record.id, error, "worker cannot be reached");
                None
            }
        }
    }

    fn publish(&self, before: &Routes, after: Routes) {
        for id in before.links.keys().filter(|id| !after.links.contains_key(*id)) {
            self.metrics.forget_worker(id.as_str());
        }
        for name in before.models.keys().filter(|name| !after.models.contains_key(*name)) {
            self.metrics.set_workers(name, 0);
        }
        for (name, model) in &after.models {
            let workers = model.groups.first().map_or(0, |group| group.members.len());
            self.metrics.set_workers(name, workers);
        }
        self.routes.send_replace(Arc::new(after));
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
            match tokio::time::timeout_at(until, routes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return resolved,
            }
        }
    }

    /// Returns a place at a worker, waiting for one until `until`.
    pub(crate) async fn acquire(&self, want: &Want, until: Instant) -> Result<Lease, NoWorker> {
        let mut routes = self.watch();
        loop {
            let latest = Arc::clone(&routes.borrow_and_update());
            let retry_at = match self.choose(&latest, want) {
                Ok(lease) => return Ok(lease),
                Err(retry_at) => retry_at,
            };
            if Instant::now() >= until {
                return Err(NoWorker);
            }
            let wake = retry_at.map_or(until, |at| at.min(until));
            tokio::select! {
                changed = routes.changed() => changed.map_err(|_| NoWorker)?,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Chooses a worker, or says when one that is being left alone can be tried again.
    fn choose(&self, routes: &Routes, want: &Want) -> Result<Lease, Option<Instant>> {
        let Some(group) = routes.group(want) else { return Err(None) };
        let _choosing = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let mut retry_at: Option<Instant> = None;
        let mut usable = Vec::with_capacity(group.members.len());
        let mut candidates = Vec::with_capacity(group.members.len());
        for member in &group.members {
            if member.link.is_draining(&want.model, member.generation) {
                continue;
            }
            match member.link.ejected_until(&want.model, now) {
                Some(until) => {
                    retry_at = Some(retry_at.map_or(until, |earliest| earliest.min(until)));
                }
                None => {
                    let (streams, tokens) = member.link.load();
                    let max_sequences = member.max_sequences;
                    candidates.push(Candidate { streams, tokens, max_sequences });
                    usable.push(member);
                }
            }
        }
        if usable.is_empty() {
            return Err(retry_at);
        }
        let chosen = self.policy.choose(&candidates).min(usable.len() - 1);
        let identity = group.info.identity.clone();
        let Member { link, generation, .. } = usable[chosen];
        Ok(Lease::new(Arc::clone(link), *generation, identity, want))
    }

    /// Leaves the worker of `lease`, or only the model there, alone for a while, since it failed.
    pub(crate) fn eject(&self, lease: &Lease, only_model: bool) {
        lease.eject(only_model, self.ejection, self.max_ejection);
    }
}

impl Routes {
    /// Returns whether any request can be routed.
    pub(crate) fn is_serving(&self) -> bool {
        self.models.values().any(|model| !model.groups.is_empty())
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
