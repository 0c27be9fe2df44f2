//! A store in etcd's place, in the time of the test's clock, that does as a script says.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{self, Instant},
};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

use super::super::stubs::{
    CompactionRequest, CompactionResponse, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    PutRequest, PutResponse, RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
    WatchRequest, WatchResponse,
    compare::TargetUnion,
    kv_server::{Kv, KvServer},
    lease_server::{Lease, LeaseServer},
    mvccpb::{Event, KeyValue, event::EventType},
    request_op,
    watch_request::RequestUnion,
    watch_server::{Watch, WatchServer},
};

pub(super) const MEMBERS: usize = 3;

/// How often leases are looked at, as etcd does.
const LEASE_PERIOD: Duration = Duration::from_millis(500);

/// Numbers that follow from a seed.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// How a member is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Health {
    /// Serves, as long as most do.
    Up,
    /// Answers that nobody leads.
    CutOff,
    /// Keeps its connections and says nothing on them.
    Silent,
    /// Takes no connections.
    Dead,
}

/// Something that happened to a key.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Which store it was, counted from 1.
    pub(super) cluster: u64,
    pub(super) revision: i64,
    pub(super) key: Vec<u8>,
    /// `None` for a deletion.
    pub(super) value: Option<Vec<u8>>,
}

#[derive(Clone)]
pub(super) struct Fake(Arc<Inner>);

struct Inner {
    store: Mutex<Store>,
    /// Counts changes of the store and of the members' health.
    changes: watch::Sender<u64>,
    health: watch::Sender<[Health; MEMBERS]>,
    /// The ends of connections that members serve.
    accepted: [mpsc::UnboundedSender<io::Result<DuplexStream>>; MEMBERS],
    carried: [Mutex<JoinSet<()>>; MEMBERS],
    /// Of a thousand answers, how many are lost after what was asked is done; and the draw.
    losses: Mutex<(u64, Dice)>,
    tasks: Mutex<JoinSet<()>>,
}

struct Store {
    cluster: u64,
    revision: i64,
    compacted: i64,
    keys: BTreeMap<Vec<u8>, KeyValue>,
    leases: HashMap<i64, (Duration, Instant)>,
    next_lease: i64,
    /// Everything that ever happened, also in the stores before.
    changes: Vec<Change>,
}

impl Store {
    fn header(&self) -> Option<ResponseHeader> {
        Some(ResponseHeader { cluster_id: self.cluster, member_id: 0, revision: self.revision })
    }

    fn put(&mut self, PutRequest { key, value, lease }: PutRequest) -> Result<(), Status> {
        if lease != 0 && !self.leases.contains_key(&lease) {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        self.revision += 1;
        let mod_revision = self.revision;
        let create_revision =
            self.keys.get(&key).map_or(mod_revision, |present| present.create_revision);
        let (cluster, revision) = (self.cluster, self.revision);
        let change = Change { cluster, revision, key: key.clone(), value: Some(value.clone()) };
        self.changes.push(change);
        let stored = KeyValue { key: key.clone(), create_revision, mod_revision, value, lease };
        self.keys.insert(key, stored);
        Ok(())
    }

    fn delete(&mut self, key: Vec<u8>) {
        if self.keys.remove(&key).is_some() {
            self.revision += 1;
            let (cluster, revision) = (self.cluster, self.revision);
            self.changes.push(Change { cluster, revision, key, value: None });
        }
    }

    fn revoke(&mut self, lease: i64) -> bool {
        let held = self.keys.values().filter(|kv| kv.lease == lease);
        let held: Vec<_> = held.map(|kv| kv.key.clone()).collect();
        held.into_iter().for_each(|key| self.delete(key));
        self.leases.remove(&lease).is_some()
    }

    /// Returns the events from a revision on, or the oldest that is remembered.
    fn since(&self, from: i64) -> Result<Vec<Event>, i64> {
        if from <= self.compacted {
            return Err(self.compacted);
        }
        let news = self.changes.iter().rev();
        let news = news
            .take_while(|change| change.cluster == self.cluster && change.revision >= from)
            .map(|Change { revision, key, value, .. }| {
                let kind = if value.is_some() { EventType::Put } else { EventType::Delete };
                let kv = KeyValue {
                    key: key.clone(),
                    mod_revision: *revision,
                    value: value.clone().unwrap_or_default(),
                    ..KeyValue::default()
                };
                Event { r#type: kind.into(), kv: Some(kv) }
            });
        let mut news: Vec<_> = news.collect();
        news.reverse();
        Ok(news)
    }
}

impl Fake {
    /// Must be called inside the runtime that will drive the connections.
    pub(super) fn start(seed: u64) -> Self {
        let store = Store {
            cluster: 1,
            revision: 1,
            compacted: 0,
            keys: BTreeMap::new(),
            leases: HashMap::new(),
            next_lease: 1,
            changes: Vec::new(),
        };
        let mut incoming = Vec::new();
        let accepted = [(); MEMBERS].map(|()| {
            let (accepted, connections) = mpsc::unbounded_channel();
            incoming.push(connections);
            accepted
        });
        let fake = Self(Arc::new(Inner {
            store: Mutex::new(store),
            changes: watch::Sender::new(0),
            health: watch::Sender::new([Health::Up; MEMBERS]),
            accepted,
            carried: Default::default(),
            losses: Mutex::new((0, Dice::new(seed))),
            tasks: Mutex::default(),
        }));
        let mut tasks = fake.0.tasks.lock().unwrap();
        for (index, connections) in incoming.into_iter().enumerate() {
            let member = Member { fake: fake.clone(), index };
            let server = Server::builder()
                .add_service(KvServer::new(member.clone()))
                .add_service(LeaseServer::new(member.clone()))
                .add_service(WatchServer::new(member))
                .serve_with_incoming(UnboundedReceiverStream::new(connections));
            tasks.spawn(async move { server.await.unwrap() });
        }
        tasks.spawn(fake.clone().expire_leases());
        drop(tasks);
        fake
    }

    /// Returns a channel to each member.
    pub(super) fn channels(&self) -> Vec<Channel> {
        let channel = |member| {
            let fake = self.clone();
            let connector = tower::service_fn(move |_| {
                let connected = fake.dial(member);
                async move { connected.map(TokioIo::new) }
            });
            let endpoint = Endpoint::from_static("http://fake");
            endpoint.connect_with_connector_lazy(connector)
        };
        (0..MEMBERS).map(channel).collect()
    }

    fn dial(&self, member: usize) -> io::Result<DuplexStream> {
        if self.0.health.borrow()[member] == Health::Dead {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (client, mut near) = duplex(1 << 16);
        let (mut far, server) = duplex(1 << 16);
        let mut health = self.0.health.subscribe();
        self.0.carried[member].lock().unwrap().spawn(async move {
            let mut carry = pin!(copy_bidirectional(&mut near, &mut far));
            loop {
                tokio::select! {
                    biased;
                    _ = health.wait_for(|health| health[member] == Health::Silent) => {}
                    _ = &mut carry => return,
                }
                drop(health.wait_for(|health| health[member] != Health::Silent).await);
            }
        });
        let taken = self.0.accepted[member].send(Ok(server));
        taken.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(client)
    }

    /// Changes how a member is.
    pub(super) fn set(&self, member: usize, health: Health) {
        let had = self.has_majority();
        self.0.health.send_modify(|all| all[member] = health);
        if health == Health::Dead {
            self.0.carried[member].lock().unwrap().abort_all();
        }
        if !had && self.has_majority() {
            // A new leader counts all leases anew.
            let now = Instant::now();
            for (ttl, ends) in self.0.store.lock().unwrap().leases.values_mut() {
                *ends = now + *ttl;
            }
        }
        self.0.changes.send_modify(|changes| *changes += 1);
    }

    /// Loses that many of a thousand answers from now on.
    pub(super) fn lose(&self, of_1000: u64) {
        self.0.losses.lock().unwrap().0 = of_1000;
    }

    /// Forgets all revisions but the present one.
    pub(super) fn compact(&self) {
        let mut store = self.0.store.lock().unwrap();
        store.compacted = store.revision;
    }

    /// Ends a lease as an operator may, or deletes only what it holds; which one is drawn.
    pub(super) fn meddle(&self, dice: &mut Dice) {
        let mut store = self.0.store.lock().unwrap();
        let leases: Vec<_> = store.keys.values().map(|kv| (kv.lease, kv.key.clone())).collect();
        let count = u64::try_from(leases.len()).unwrap();
        if count > 0 {
            let (lease, key) = leases[usize::try_from(dice.below(count)).unwrap()].clone();
            if dice.below(2) == 0 {
                store.revoke(lease);
            } else {
                store.delete(key);
            }
        }
        drop(store);
        self.0.changes.send_modify(|changes| *changes += 1);
    }

    /// Begins with nothing. All members must be dead.
    pub(super) fn replace(&self) {
        let mut store = self.0.store.lock().unwrap();
        store.cluster += 1;
        (store.revision, store.compacted) = (1, 0);
        store.keys.clear();
        store.leases.clear();
    }

    /// Returns what is stored.
    pub(super) fn values(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let store = self.0.store.lock().unwrap();
        store.keys.values().map(|kv| (kv.key.clone(), kv.value.clone())).collect()
    }

    /// Returns all that ever happened, and which store it is now.
    pub(super) fn changes(&self) -> (Vec<Change>, u64) {
        let store = self.0.store.lock().unwrap();
        (store.changes.clone(), store.cluster)
    }

    /// Returns the number of leases there are.
    pub(super) fn leases(&self) -> usize {
        self.0.store.lock().unwrap().leases.len()
    }

    fn has_majority(&self) -> bool {
        let up = self.0.health.borrow().iter().filter(|health| **health == Health::Up).count();
        up * 2 > MEMBERS
    }

    async fn expire_leases(self) {
        loop {
            time::sleep(LEASE_PERIOD).await;
            if !self.has_majority() {
                continue;
            }
            let now = Instant::now();
            let mut store = self.0.store.lock().unwrap();
            let ended = store.leases.iter().filter(|(_, (_, ends))| *ends <= now);
            let mut ended: Vec<_> = ended.map(|(lease, _)| *lease).collect();
            ended.sort_unstable();
            let any = !ended.is_empty();
            for lease in ended {
                store.revoke(lease);
            }
            drop(store);
            if any {
                self.0.changes.send_modify(|changes| *changes += 1);
            }
        }
    }
}

#[derive(Clone)]
struct Member {
    fake: Fake,
    index: usize,
}

impl Member {
    fn serves(&self) -> Result<(), Status> {
        let is_up = self.fake.0.health.borrow()[self.index] == Health::Up;
        if is_up && self.fake.has_majority() {
            return Ok(());
        }
        Err(Status::unavailable("etcdserver: no leader"))
    }

    /// Does something to the store; the answer may be lost.
    fn answer<T>(
        &self,
        act: impl FnOnce(&mut Store) -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        self.serves()?;
        let answer = act(&mut self.fake.0.store.lock().unwrap());
        self.fake.0.changes.send_modify(|changes| *changes += 1);
        let (of_1000, dice) = &mut *self.fake.0.losses.lock().unwrap();
        if dice.below(1000) < *of_1000 {
            return Err(Status::unavailable("the answer is lost"));
        }
        answer.map(Response::new)
    }

    /// Tells of changes until that is no longer possible.
    async fn tell(
        self,
        mut next: i64,
        mut requests: Streaming<WatchRequest>,
        responses: mpsc::Sender<Result<WatchResponse, Status>>,
    ) {
        let mut changes = self.fake.0.changes.subscribe();
        let cluster = self.fake.changes().1;
        let mut created = true;
        loop {
            changes.mark_unchanged();
            let told = self.serves().map(|()| {
                let store = self.fake.0.store.lock().unwrap();
                let response = WatchResponse { header: store.header(), ..Default::default() };
                if store.cluster != cluster {
                    return WatchResponse { canceled: true, ..response };
                }
                if created {
                    return WatchResponse { created, ..response };
                }
                match store.since(next) {
                    Ok(events) => {
                        next = next.max(store.revision + 1);
                        WatchResponse { events, ..response }
                    }
                    Err(oldest) => {
                        WatchResponse { canceled: true, compact_revision: oldest, ..response }
                    }
                }
            });
            let is_last = !matches!(&told, Ok(response) if !response.canceled);
            let is_news =
                created || is_last || matches!(&told, Ok(response) if !response.events.is_empty());
            let was_created = std::mem::take(&mut created);
            if (is_news && responses.send(told).await.is_err()) || is_last {
                return;
            }
            if was_created {
                continue;
            }
            tokio::select! {
                biased;
                changed = changes.changed() => changed.unwrap(),
                request = requests.message() => {
                    // A sign of life is asked for.
                    if !matches!(request, Ok(Some(_)))
                        || responses.send(Ok(WatchResponse::default())).await.is_err()
                    {
                        return;
                    }
                }
            }
        }
    }
}

#[tonic::async_trait]
impl Kv for Member {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let RangeRequest { key, range_end } = request.into_inner();
        self.answer(|store| {
            let is_asked = |kv: &&KeyValue| match range_end.is_empty() {
                true => kv.key == key,
                false => (&key..&range_end).contains(&&kv.key),
            };
            let kvs = store.keys.values().filter(is_asked).cloned().collect();
            Ok(RangeResponse { header: store.header(), kvs })
        })
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.answer(|store| {
            store.put(request.into_inner())?;
            Ok(PutResponse { header: store.header() })
        })
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let TxnRequest { compare, success, .. } = request.into_inner();
        self.answer(|store| {
            let succeeded = compare.iter().all(|compare| {
                let held = store.keys.get(&compare.key).map_or(0, |kv| kv.mod_revision);
                matches!(&compare.target_union, Some(TargetUnion::ModRevision(wanted)) if *wanted == held)
            });
            for operation in success.into_iter().filter(|_| succeeded) {
                let Some(request_op::Request::RequestPut(put)) = operation.request else {
                    return Err(Status::unimplemented("only puts"));
                };
                store.put(put)?;
            }
            Ok(TxnResponse { header: store.header(), succeeded, responses: Vec::new() })
        })
    }

    async fn compact(
        &self,
        _: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        Err(Status::unimplemented("the script does it"))
    }
}

#[tonic::async_trait]
impl Lease for Member {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let ttl = request.into_inner().ttl;
        self.answer(|store| {
            let id = store.next_lease;
            store.next_lease += 1;
            let length = Duration::from_secs(ttl.unsigned_abs());
            store.leases.insert(id, (length, Instant::now() + length));
            Ok(LeaseGrantResponse { header: store.header(), id, ttl, error: String::new() })
        })
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        self.answer(|store| match store.revoke(request.into_inner().id) {
            true => Ok(LeaseRevokeResponse { header: store.header() }),
            false => Err(Status::not_found("etcdserver: requested lease not found")),
        })
    }

    type LeaseKeepAliveStream = ReceiverStream<Result<LeaseKeepAliveResponse, Status>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let asked = request.into_inner().next().await;
        let id = asked.ok_or_else(|| Status::invalid_argument("nothing asked"))??.id;
        let answer = self.answer(|store| {
            let ttl = store.leases.get_mut(&id).map_or(0, |(ttl, ends)| {
                *ends = Instant::now() + *ttl;
                i64::try_from(ttl.as_secs()).unwrap()
            });
            Ok(LeaseKeepAliveResponse { header: store.header(), id, ttl })
        })?;
        let (responses, outgoing) = mpsc::channel(1);
        responses.try_send(Ok(answer.into_inner())).unwrap();
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[tonic::async_trait]
impl Watch for Member {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.serves()?;
        let mut requests = request.into_inner();
        let asked = requests.message().await?.and_then(|request| request.request_union);
        let Some(RequestUnion::CreateRequest(create)) = asked else {
            return Err(Status::invalid_argument("a watch is created first"));
        };
        let (responses, outgoing) = mpsc::channel(16);
        let told = self.clone().tell(create.start_revision, requests, responses);
        self.fake.0.tasks.lock().unwrap().spawn(told);
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
