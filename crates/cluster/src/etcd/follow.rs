//! Follows the workers of a cluster: lists them at a revision, then watches from the next one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{info, warn};

use super::{
    endpoints::{Backoff, CALL_TIMEOUT, Endpoints, Right, told, with_leader},
    stubs::{
        RangeRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
        kv_client::KvClient,
        mvccpb::{Event, KeyValue, event::EventType},
        watch_client::WatchClient,
        watch_request::RequestUnion,
    },
};
use crate::{View, WorkerId, WorkerRecord};

/// How long a watch may be silent before a sign of life is asked for.
const SILENCE: Duration = Duration::from_secs(10);
/// Largest list or batch of events taken: tens of thousands of workers.
const MESSAGE_LIMIT: usize = 64 << 20;

/// Keeps the view up to date.
pub(super) struct Follower {
    pub(super) endpoints: Arc<Endpoints>,
    /// What the keys of all workers begin with.
    pub(super) prefix: String,
    /// How long workers that a replaced store does not know have to come back.
    pub(super) grace: Duration,
    pub(super) view: watch::Sender<Arc<View>>,
    store: Option<Store>,
    missing: Option<Missing>,
    /// Attempts in a row that failed.
    failures: u32,
    /// Why etcd could not be followed, as last logged.
    logged: Option<String>,
}

/// How far which store was read.
#[derive(Clone, Copy)]
struct Store {
    cluster: u64,
    revision: i64,
}

/// Workers that a replaced store does not know (yet).
struct Missing {
    workers: Vec<WorkerId>,
    /// When they are taken for gone.
    until: Instant,
}

/// All workers at one revision.
pub(super) struct Listed {
    store: Store,
    workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
}

impl Listed {
    /// Returns the revision of the list.
    pub(super) fn revision(&self) -> i64 {
        self.store.revision
    }
}

/// Why following ended.
#[derive(Debug)]
pub(super) enum Broken {
    /// The revisions to be watched are forgotten: everything must be listed again.
    Compacted(i64),
    /// etcd does not answer as it should.
    Trouble(Status),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        Self::Trouble(status)
    }
}

impl Follower {
    pub(super) fn new(
        endpoints: Arc<Endpoints>,
        prefix: String,
        grace: Duration,
        view: watch::Sender<Arc<View>>,
    ) -> Self {
        Self {
            endpoints,
            prefix,
            grace,
            view,
            store: None,
            missing: None,
            failures: 0,
            logged: None,
        }
    }

    /// Follows for ever.
    pub(super) async fn run(mut self) {
        let mut backoff = self.endpoints.backoff();
        loop {
            let broken = match self.list().await {
                Ok(listed) => {
                    let from = listed.revision() + 1;
                    self.replace(listed);
                    self.watch(from, &mut backoff).await
                }
                Err(status) => Broken::Trouble(status),
            };
            match broken {
                Broken::Compacted(oldest) => {
                    info!(oldest, "etcd forgot the revisions watched; listing again");
                }
                Broken::Trouble(status) => {
                    self.lose(&status);
                    self.endpoints.rotate();
                    let pause = Instant::now() + backoff.pause();
                    self.pause_until(pause).await;
                }
            }
        }
    }

    /// Makes the view one that nobody stands behind, and says why: once for each reason, and not of
    /// the first attempt, since the next one is about to follow and may do better.
    fn lose(&mut self, status: &Status) {
        self.view.send_if_modified(|view| {
            view.current.then(|| Arc::make_mut(view).current = false).is_some()
        });
        let reason = told(status);
        self.failures = self.failures.saturating_add(1);
        if self.failures > 1 && self.logged.as_ref() != Some(&reason) {
            warn!(reason, "cannot follow etcd; the last known workers stay in view");
            self.logged = Some(reason);
        }
    }

    /// Reads all workers.
    pub(super) async fn list(&self) -> Result<Listed, Status> {
        let (key, range_end) = self.range();
        let request = RangeRequest { key, range_end };
        let answer = self
            .endpoints
            .call(|channel| {
                let request = request.clone();
                async move {
                    KvClient::new(channel)
                        .max_decoding_message_size(MESSAGE_LIMIT)
                        .range(request)
                        .await
                }
            })
            .await;
        self.endpoints.judge(Right::Read, answer.as_ref());
        let answer = answer?.into_inner();
        let header = answer.header.unwrap_or_default();
        let workers = answer.kvs.iter().filter_map(|kv| {
            let (_, record) = self.read(kv)?;
            record.map(|record| (record.id.clone(), record))
        });
        Ok(Listed {
            store: Store { cluster: header.cluster_id, revision: header.revision },
            workers: workers.collect(),
        })
    }

    /// Makes the view what was listed.
    ///
    /// A store that has lost history (restored from a backup, or begun anew) knows workers only
    /// once they notice that their leases are gone: until then the known ones stay.
    pub(super) fn replace(&mut self, listed: Listed) {
        let Listed { store, mut workers } = listed;
        let replaced = self
            .store
            .is_some_and(|last| last.cluster != store.cluster || last.revision > store.revision);
        let kept: Vec<_> = {
            let view = self.view.borrow();
            let missed = |id: &WorkerId| match &self.missing {
                _ if replaced => true,
                Some(missing) => missing.workers.contains(id),
                None => false,
            };
            let absent = view.workers.iter().filter(|(id, _)| !workers.contains_key(*id));
            absent
                .filter(|(id, _)| missed(id))
                .map(|(id, record)| (id.clone(), Arc::clone(record)))
                .collect()
        };
        if replaced {
            warn!(kept = kept.len(), "etcd lost its history; unknown workers stay for a while");
        }
        self.missing = if kept.is_empty() {
            None
        } else {
            let until = match &self.missing {
                Some(missing) if !replaced => missing.until,
                _ => Instant::now() + self.grace,
            };
            Some(Missing { workers: kept.iter().map(|(id, _)| id.clone()).collect(), until })
        };
        workers.extend(kept);
        self.store = Some(store);
        self.view.send_if_modified(|view| {
            // Equal records keep their place in memory: readers may compare pointers.
            for (id, record) in &mut workers {
                if let Some(known) = view.workers.get(id).filter(|known| *known == record) {
                    *record = Arc::clone(known);
                }
            }
            let revision = u64::try_from(store.revision).unwrap_or_default();
            if view.workers == workers && view.revision == revision {
                return false;
            }
            let view = Arc::make_mut(view);
            view.workers = workers;
            view.revision = revision;
            true
        });
    }

    /// Applies changes from a revision on, until that is no longer possible.
    pub(super) async fn watch(&mut self, from: i64, backoff: &mut Backoff) -> Broken {
        let (requests, mut responses) = match self.open(from).await {
            Ok(opened) => opened,
            Err(status) => return status.into(),
        };
        let mut asked = false;
        loop {
            let patience = if asked { CALL_TIMEOUT } else { SILENCE };
            let expiry = self.missing.as_ref().map(|missing| missing.until);
            let response = tokio::select! {
                biased;
                () = time::sleep_until(expiry.unwrap_or_else(Instant::now)), if expiry.is_some() => {
                    self.forget_missing();
                    continue;
                }
                response = time::timeout(patience, responses.message()) => response,
            };
            match response {
                Ok(Ok(Some(response))) => {
                    asked = false;
                    if let Err(broken) = self.apply(response) {
                        return broken;
                    }
                    backoff.reset();
                }
                Ok(Ok(None)) => return Status::unavailable("etcd ended the watch").into(),
                Ok(Err(status)) => return status.into(),
                Err(_) if asked => return Status::unavailable("the watch went silent").into(),
                Err(_) => {
                    asked = true;
                    let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
                    if requests.try_send(progress.into()).is_err() {
                        return Status::unavailable("the watch takes no requests").into();
                    }
                }
            }
        }
    }

    /// Begins a watch. The sender keeps it open.
    async fn open(
        &self,
        from: i64,
    ) -> Result<(mpsc::Sender<WatchRequest>, Streaming<WatchResponse>), Status> {
        let (key, range_end) = self.range();
        let create = WatchCreateRequest { key, range_end, start_revision: from, fragment: true };
        self.endpoints
            .call(|channel| {
                let create = RequestUnion::CreateRequest(create.clone());
                async move {
                    // One request to begin, then at most one unanswered request for progress.
                    let (requests, outgoing) = mpsc::channel(2);
                    let sent = requests.try_send(create.into());
                    sent.expect("a new channel has room");
                    let responses = WatchClient::new(channel)
                        .max_decoding_message_size(MESSAGE_LIMIT)
                        .watch(with_leader(ReceiverStream::new(outgoing)))
                        .await?;
                    Ok((requests, responses.into_inner()))
                }
            })
            .await
    }

    /// Applies one message of a watch.
    fn apply(&mut self, response: WatchResponse) -> Result<(), Broken> {
        if response.canceled {
            return Err(match response.compact_revision {
                0 => Status::unavailable(format!("watch canceled: {}", response.cancel_reason))
                    .into(),
                oldest => Broken::Compacted(oldest),
            });
        }
        let mut changes = Vec::with_capacity(response.events.len());
        for Event { r#type, kv } in response.events {
            let Some(kv) = kv else { continue };
            if let Some(store) = &mut self.store {
                store.revision = store.revision.max(kv.mod_revision);
            }
            if r#type == i32::from(EventType::Delete) {
                let id = self.id(&kv).map(str::to_owned);
                changes.extend(id.and_then(|id| Some((id.parse().ok()?, None))));
            } else {
                changes.extend(self.read(&kv));
            }
        }
        if let Some(missing) = &mut self.missing {
            missing.workers.retain(|id| changes.iter().all(|(changed, _)| changed != id));
        }
        let created = response.created;
        if created {
            self.failures = 0;
            self.logged = None;
        }
        let revision =
            self.store.map_or(0, |store| u64::try_from(store.revision).unwrap_or_default());
        self.view.send_if_modified(|view| {
            if changes.is_empty() && (view.current || !created) {
                return false;
            }
            let view = Arc::make_mut(view);
            // A list alone does not make the view current: without a watch it ages.
            view.current |= created;
            view.revision = view.revision.max(revision);
            for (id, record) in changes {
                match record {
                    Some(record) => {
                        info!(worker = %id, state = ?record.state, "worker is in the registry");
                        view.workers.insert(id, record);
                    }
                    None => {
                        if view.workers.remove(&id).is_some() {
                            info!(worker = %id, "worker left the registry");
                        }
                    }
                }
            }
            true
        });
        Ok(())
    }

    /// Waits before the next attempt.
    async fn pause_until(&mut self, end: Instant) {
        // Only a current view can tell that a worker is gone: grace waits for the next list.
        if let Some(missing) = &mut self.missing {
            missing.until = missing.until.max(end + CALL_TIMEOUT);
        }
        time::sleep_until(end).await;
    }

    /// Drops the workers that did not come back to a replaced store.
    fn forget_missing(&mut self) {
        let Some(missing) = self.missing.take() else { return };
        self.view.send_if_modified(|view| {
            let view = Arc::make_mut(view);
            for id in missing.workers {
                warn!(worker = %id, "worker did not come back to the registry");
                view.workers.remove(&id);
            }
            true
        });
    }

    /// Returns the keys of all workers: first, and one past the last.
    fn range(&self) -> (Vec<u8>, Vec<u8>) {
        let first = self.prefix.as_bytes().to_vec();
        let mut end = first.clone();
        // The prefix ends in `/`, which has a successor.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        (first, end)
    }

    /// Returns the name a key ends in.
    fn id<'a>(&self, kv: &'a KeyValue) -> Option<&'a str> {
        str::from_utf8(&kv.key).ok()?.strip_prefix(&self.prefix)
    }

    /// Returns the worker and its record; `None` for a record this release cannot read, since what
    /// was known of that worker before is no longer true.
    fn read(&self, kv: &KeyValue) -> Option<(WorkerId, Option<Arc<WorkerRecord>>)> {
        let key = String::from_utf8_lossy(&kv.key);
        let Some(id) = self.id(kv).and_then(|id| id.parse::<WorkerId>().ok()) else {
            warn!(%key, "skipped a key that names no worker");
            return None;
        };
        match WorkerRecord::decode(id.as_str(), &kv.value) {
            Ok(record) => Some((id, Some(Arc::new(record)))),
            Err(error) => {
                warn!(%key, %error, "skipped an unusable record");
                Some((id, None))
            }
        }
    }
}

impl From<RequestUnion> for WatchRequest {
    fn from(request: RequestUnion) -> Self {
        Self { request_union: Some(request) }
    }
}
