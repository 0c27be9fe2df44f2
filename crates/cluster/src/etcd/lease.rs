//! Keeps one worker's record in etcd for as long as its registration lives.
//!
//! ```text
//!           grant            lease gone, or not renewed in time
//! no lease -------> leased ------------------------------------> no lease
//!                     |  store, renew
//!                     +--> left (revoked) | superseded by a later incarnation
//! ```

use std::{future, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture, stream};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tonic::{Code, Status};
use tracing::{debug, info, warn};

use super::{
    endpoints::{Endpoints, Right, told, with_leader},
    stubs::{
        Compare, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest,
        RangeRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        kv_client::KvClient,
        lease_client::LeaseClient,
        request_op,
    },
};
use crate::{ClusterError, View, WorkerRecord, registration::Keeper};

/// Shortest pause between two attempts to renew a lease about to end.
const RENEWAL_PAUSE: Duration = Duration::from_millis(100);
/// How long leaving may take before the lease is left to lapse.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What should be in the store.
#[derive(Clone)]
pub(super) struct Desired {
    record: WorkerRecord,
    /// Counts the changes of `record`.
    version: u64,
    leaving: bool,
}

/// What is in the store.
#[derive(Clone, Copy, Debug)]
pub(super) enum Progress {
    /// Nothing of this registration yet.
    Nothing,
    /// That version of the record.
    Stored(u64),
    /// The record of a later incarnation.
    Superseded(u64),
}

/// The registration's side: tells what should be stored, learns what is.
pub(super) struct EtcdKeeper {
    desired: watch::Sender<Desired>,
    progress: watch::Receiver<Progress>,
}

/// The membership thread's side: makes it so.
pub(super) struct Tenant {
    pub(super) key: String,
    desired: watch::Receiver<Desired>,
    progress: watch::Sender<Progress>,
}

/// Returns both sides of a new registration; `key` is where the record belongs.
pub(super) fn registration(key: String, record: &WorkerRecord) -> (EtcdKeeper, Tenant) {
    let desired = Desired { record: record.clone(), version: 0, leaving: false };
    let (desired_in, desired) = watch::channel(desired);
    let (progress, progress_out) = watch::channel(Progress::Nothing);
    (EtcdKeeper { desired: desired_in, progress: progress_out }, Tenant { key, desired, progress })
}

impl EtcdKeeper {
    /// Waits until the present version is stored.
    pub(super) async fn stored(&mut self) -> Result<(), ClusterError> {
        let Desired { record, version, .. } = self.desired.borrow().clone();
        let decided = self.progress.wait_for(|progress| match progress {
            Progress::Nothing => false,
            Progress::Stored(stored) => *stored >= version,
            Progress::Superseded(_) => true,
        });
        match decided.await.as_deref() {
            Ok(Progress::Superseded(theirs)) => {
                Err(ClusterError::Superseded { id: record.id, ours: record.epoch, theirs: *theirs })
            }
            Ok(_) => Ok(()),
            Err(_) => Err(ClusterError::Closed),
        }
    }
}

impl Keeper for EtcdKeeper {
    fn put(&mut self, record: &WorkerRecord) -> BoxFuture<'_, Result<(), ClusterError>> {
        self.desired.send_modify(|desired| {
            desired.record = record.clone();
            desired.version += 1;
        });
        self.stored().boxed()
    }

    fn leave(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        async move {
            self.desired.send_modify(|desired| desired.leaving = true);
            // The other side drops its end once it has left. Its own deadline is the tighter one.
            let left = async { while self.progress.changed().await.is_ok() {} };
            if time::timeout(LEAVE_TIMEOUT + Duration::from_secs(1), left).await.is_err() {
                warn!("the membership thread does not answer; the record lapses with its lease");
            }
        }
        .boxed()
    }
}

/// A lease as far as this side knows.
struct Lease {
    id: i64,
    /// When it ends unless renewed: counted from before the request that prolonged it was sent.
    ends: Instant,
}

/// How holding a lease ended.
enum End {
    /// The lease is gone or may be.
    Lost,
    /// The registration left or was dropped, or a later incarnation took the key.
    Over,
}

impl Tenant {
    /// Keeps the record stored until the registration is over.
    ///
    /// `view` tells what others see: a record that is gone from the store though its lease is not,
    /// or that another has taken the place of, shows there.
    pub(super) async fn keep(
        mut self,
        endpoints: Arc<Endpoints>,
        ttl: Duration,
        mut view: watch::Receiver<Arc<View>>,
    ) {
        // ## no lease => (leased | left)
        while let Some(lease) = self.acquire(&endpoints, ttl).await {
            let (id, key) = (lease.id, self.key.clone());
            let end = tokio::select! {
                biased;
                end = renew(&endpoints, &key, lease) => end,
                end = self.store(&endpoints, id, &mut view) => end,
            };
            match end {
                // ## leased => no lease
                End::Lost => {}
                // ## leased => left
                End::Over => {
                    match time::timeout(LEAVE_TIMEOUT, revoke(&endpoints, id)).await {
                        Ok(Ok(())) => debug!(key = %self.key, "left the registry"),
                        Ok(Err(status)) => {
                            let reason = told(&status);
                            warn!(key = %self.key, reason, "could not leave; the lease will lapse");
                        }
                        Err(_) => warn!(key = %self.key, "etcd is away; the lease will lapse"),
                    }
                    return;
                }
            }
        }
    }

    /// Grants a lease, however long that takes; `None` when the registration is over before.
    async fn acquire(&mut self, endpoints: &Endpoints, ttl: Duration) -> Option<Lease> {
        let mut backoff = endpoints.backoff();
        loop {
            let granted = tokio::select! {
                biased;
                () = over(&mut self.desired) => return None,
                granted = grant(endpoints, ttl) => granted,
            };
            match granted {
                Ok(lease) => return Some(lease),
                Err(status) => {
                    warn!(key = %self.key, reason = told(&status), "could not get a lease from etcd");
                }
            }
            tokio::select! {
                biased;
                () = over(&mut self.desired) => return None,
                () = time::sleep(backoff.pause()) => {}
            }
        }
    }

    /// Stores each version of the record under the lease.
    async fn store(
        &mut self,
        endpoints: &Endpoints,
        lease: i64,
        view: &mut watch::Receiver<Arc<View>>,
    ) -> End {
        let mut backoff = endpoints.backoff();
        // Two that hold each other for the intruder must not write all the time.
        let mut displaced = endpoints.backoff();
        loop {
            let Desired { record, version, leaving } = self.desired.borrow_and_update().clone();
            if leaving {
                return End::Over;
            }
            let stored = put(endpoints, &self.key, &record, lease).await;
            endpoints.judge(Right::Write, stored.as_ref());
            match stored {
                Ok(Put::Stored(revision)) => {
                    info!(key = %self.key, state = ?record.state, lease, "stored in the registry");
                    self.progress.send_replace(Progress::Stored(version));
                    backoff.reset();
                    tokio::select! {
                        biased;
                        changed = self.desired.changed() => if changed.is_err() {
                            return End::Over;
                        },
                        () = lost(view, &record, revision) => {
                            warn!(key = %self.key, lease, "the record is not in the store any more");
                            time::sleep(displaced.pause()).await;
                        }
                    }
                }
                Ok(Put::Raced) => {}
                Ok(Put::Superseded(theirs)) => {
                    warn!(key = %self.key, theirs, ours = record.epoch, "replaced in the registry");
                    self.progress.send_replace(Progress::Superseded(theirs));
                    return End::Over;
                }
                // Only a lease is ever looked for in this call.
                Err(status) if status.code() == Code::NotFound => {
                    warn!(key = %self.key, lease, "the lease is gone");
                    return End::Lost;
                }
                Err(status) => {
                    warn!(key = %self.key, reason = told(&status), "could not store in the registry");
                    tokio::select! {
                        biased;
                        changed = self.desired.changed() => if changed.is_err() {
                            return End::Over;
                        },
                        () = time::sleep(backoff.pause()) => {}
                    }
                }
            }
        }
    }
}

/// Returns when others do not see a record that was stored at a revision.
async fn lost(view: &mut watch::Receiver<Arc<View>>, record: &WorkerRecord, revision: u64) {
    let is_lost = |view: &Arc<View>| {
        let seen = view.workers.get(&record.id);
        view.current && view.revision >= revision && seen.is_none_or(|seen| **seen != *record)
    };
    if view.wait_for(is_lost).await.is_err() {
        // Nobody looks any more: the registry is gone, its registrations are not.
        future::pending::<()>().await;
    }
}

/// Returns when the registration has left or was dropped.
async fn over(desired: &mut watch::Receiver<Desired>) {
    // An error means dropped: over as well.
    if desired.wait_for(|desired| desired.leaving).await.is_err() {
        debug!("a registration was dropped");
    }
}

/// Renews a lease at half of its remaining time, again and again; returns when it is gone.
///
/// Half of what *remains*: after a failure the next attempt comes sooner, and several fit in.
async fn renew(endpoints: &Endpoints, key: &str, mut lease: Lease) -> End {
    loop {
        let remaining = lease.ends.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            warn!(key, lease = lease.id, "the lease could not be renewed in time");
            return End::Lost;
        }
        time::sleep((remaining / 2).max(RENEWAL_PAUSE).min(remaining)).await;
        let sent = Instant::now();
        match time::timeout_at(lease.ends, keep_alive(endpoints, lease.id)).await {
            Ok(Ok(Some(ttl))) => lease.ends = sent + ttl,
            Ok(Ok(None)) => {
                warn!(key, lease = lease.id, "the lease is gone");
                return End::Lost;
            }
            Ok(Err(status)) => {
                warn!(key, lease = lease.id, reason = told(&status), "could not renew the lease");
            }
            Err(_) => {}
        }
    }
}

/// Returns etcd's whole seconds as a duration; `None` when there are none.
fn seconds(ttl: i64) -> Option<Duration> {
    u64::try_from(ttl).ok().filter(|ttl| *ttl > 0).map(Duration::from_secs)
}

async fn grant(endpoints: &Endpoints, ttl: Duration) -> Result<Lease, Status> {
    // Rounded up: never shorter than asked for.
    let ttl = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
    let sent = Instant::now();
    let granted = endpoints
        .call(|channel| async move {
            LeaseClient::new(channel).lease_grant(LeaseGrantRequest { ttl, id: 0 }).await
        })
        .await?
        .into_inner();
    match seconds(granted.ttl) {
        Some(ttl) if granted.error.is_empty() => Ok(Lease { id: granted.id, ends: sent + ttl }),
        _ => Err(Status::failed_precondition(format!("no lease granted: {}", granted.error))),
    }
}

/// Prolongs a lease; returns its new length, or `None` when it is gone.
async fn keep_alive(endpoints: &Endpoints, id: i64) -> Result<Option<Duration>, Status> {
    // One request to a stream: a long-lived one would stay with a member that went silent.
    let answer = endpoints
        .call(|channel| async move {
            let request = with_leader(stream::iter([LeaseKeepAliveRequest { id }]));
            let mut answers =
                LeaseClient::new(channel).lease_keep_alive(request).await?.into_inner();
            let ended = || Status::unavailable("etcd ended the stream without an answer");
            answers.message().await?.ok_or_else(ended)
        })
        .await?;
    Ok(seconds(answer.ttl))
}

async fn revoke(endpoints: &Endpoints, id: i64) -> Result<(), Status> {
    let revoked = endpoints
        .call(|channel| async move {
            LeaseClient::new(channel).lease_revoke(LeaseRevokeRequest { id }).await
        })
        .await;
    match revoked {
        Err(status) if status.code() != Code::NotFound => Err(status),
        _ => Ok(()),
    }
}

enum Put {
    /// At that revision.
    Stored(u64),
    /// The key changed between reading and writing it.
    Raced,
    /// A later incarnation, of that epoch, holds the key.
    Superseded(u64),
}

/// Stores a record unless a later incarnation's is there.
async fn put(
    endpoints: &Endpoints,
    key: &str,
    record: &WorkerRecord,
    lease: i64,
) -> Result<Put, Status> {
    let read = RangeRequest { key: key.into(), range_end: Vec::new() };
    let read = endpoints
        .call(|channel| {
            let read = read.clone();
            async move { KvClient::new(channel).range(read).await }
        })
        .await?
        .into_inner();
    let stored = read.kvs.first();
    // What tells no epoch is no record, and not worth keeping.
    let present = stored.and_then(|kv| WorkerRecord::epoch_of(&kv.value));
    if let Some(theirs) = present.filter(|theirs| *theirs > record.epoch) {
        return Ok(Put::Superseded(theirs));
    }
    let write = PutRequest { key: key.into(), value: record.encode(), lease };
    let transaction = TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.into(),
            target_union: Some(TargetUnion::ModRevision(stored.map_or(0, |kv| kv.mod_revision))),
        }],
        success: vec![RequestOp { request: Some(request_op::Request::RequestPut(write)) }],
        failure: Vec::new(),
    };
    let written = endpoints
        .call(|channel| {
            let transaction = transaction.clone();
            async move { KvClient::new(channel).txn(transaction).await }
        })
        .await?
        .into_inner();
    let revision = written.header.map_or(0, |header| header.revision);
    let revision = u64::try_from(revision).unwrap_or_default();
    Ok(if written.succeeded { Put::Stored(revision) } else { Put::Raced })
}
