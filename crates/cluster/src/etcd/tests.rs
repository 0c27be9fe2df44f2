//! The registry on a real etcd, and what etcd can do to it.

mod cluster;
mod fake;
mod secured;
mod server;
mod simulation;

use std::{
    io,
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet, time};
use tracing::instrument::WithSubscriber as _;

use self::server::{EtcdServer, Place, free_port};
use super::{
    EtcdOptions, EtcdRegistry,
    follow::{Broken, Follower},
    prefix,
    stubs::{
        CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
        kv_client::KvClient, lease_client::LeaseClient, mvccpb::KeyValue,
    },
};
use crate::{
    Registry, View, WorkerRecord, WorkerState,
    suite::{self, PATIENCE, names, record, soon, view_where},
};

/// Leases as short as etcd grants them.
const TTL: Duration = Duration::from_secs(1);

/// Runs on a new etcd; ends the test without one.
macro_rules! etcd_or_return {
    () => {
        match server::find() {
            Some(binary) => EtcdServer::start(&binary),
            None => return,
        }
    };
}

macro_rules! on_etcd {
    ($($behaviour:ident)*) => {$(
        #[tokio::test]
        async fn $behaviour() {
            let etcd = etcd_or_return!();
            suite::$behaviour(&connect(&[etcd.address()])).await;
        }
    )*};
}
suite::every_behaviour!(on_etcd);

fn connect(endpoints: &[String]) -> EtcdRegistry {
    let options = EtcdOptions::new(endpoints.to_vec(), "test".parse().unwrap());
    EtcdRegistry::connect(EtcdOptions { lease_ttl: TTL, ..options }).unwrap()
}

fn key(id: &str) -> String {
    format!("{}{id}", prefix(&"test".parse().unwrap()))
}

/// Stores anything under a worker's key, past the registry; returns the revision.
async fn put(etcd: &EtcdServer, id: &str, value: &[u8], lease: i64) -> i64 {
    let request = PutRequest { key: key(id).into(), value: value.to_vec(), lease };
    let endpoints = etcd.endpoints();
    let put = endpoints.call(|channel| {
        let request = request.clone();
        async move { KvClient::new(channel).put(request).await }
    });
    put.await.unwrap().into_inner().header.unwrap().revision
}

/// Reads what is stored under a worker's key.
async fn stored(etcd: &EtcdServer, id: &str) -> Option<KeyValue> {
    let request = RangeRequest { key: key(id).into(), range_end: Vec::new() };
    let endpoints = etcd.endpoints();
    let range = endpoints.call(|channel| {
        let request = request.clone();
        async move { KvClient::new(channel).range(request).await }
    });
    range.await.unwrap().into_inner().kvs.pop()
}

/// Collects every view until told to stop.
fn record_views(
    mut views: watch::Receiver<Arc<View>>,
) -> impl Future<Output = Vec<Arc<View>>> + use<> {
    let (stop, mut stopped) = watch::channel(());
    let mut recording = JoinSet::new();
    recording.spawn(async move {
        let mut seen = vec![views.borrow_and_update().clone()];
        loop {
            tokio::select! {
                changed = views.changed() => match changed {
                    Ok(()) => seen.push(views.borrow_and_update().clone()),
                    Err(_) => return seen,
                },
                _ = stopped.changed() => return seen,
            }
        }
    });
    async move {
        drop(stop);
        recording.join_next().await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_worker_whose_lease_lapses_is_gone() {
    let etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let grant = LeaseGrantRequest { ttl: 1, id: 0 };
    let endpoints = etcd.endpoints();
    let granted =
        endpoints.call(|channel| async move { LeaseClient::new(channel).lease_grant(grant).await });
    let lease = granted.await.unwrap().into_inner().id;
    put(&etcd, "mortal", &record("mortal", 1).encode(), lease).await;
    view_where(&mut views, "the worker", |view| names(view) == ["mortal"]).await;
    let gone = view_where(&mut views, "its end", |view| view.workers.is_empty()).await;
    assert!(gone.current, "etcd itself said so");
}

#[tokio::test]
async fn a_living_worker_outlasts_its_first_lease() {
    let etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| names(view) == ["a"]).await;
    let lease = stored(&etcd, "a").await.unwrap().lease;
    // The clock is what is tested here: nothing may happen for four times the lease.
    let gone = time::timeout(TTL * 4, views.wait_for(|view| view.workers.is_empty())).await;
    assert!(gone.is_err(), "the lease was not renewed");
    assert_eq!(stored(&etcd, "a").await.unwrap().lease, lease, "renewed, not granted again");
    soon("leave", registration.leave()).await;
    assert!(stored(&etcd, "a").await.is_none(), "leaving revokes");
}

#[tokio::test]
async fn a_lost_lease_is_replaced_and_the_record_stored_again() {
    let etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    let draining = |record: &mut WorkerRecord| record.state = WorkerState::Draining;
    soon("update", registration.update(draining)).await.unwrap();
    view_where(&mut views, "the worker", |view| names(view) == ["a"]).await;

    let lost = stored(&etcd, "a").await.unwrap().lease;
    let endpoints = etcd.endpoints();
    let revoke = endpoints.call(|channel| async move {
        LeaseClient::new(channel).lease_revoke(LeaseRevokeRequest { id: lost }).await
    });
    revoke.await.unwrap();
    view_where(&mut views, "the loss", |view| view.workers.is_empty()).await;
    let back = view_where(&mut views, "the return", |view| names(view) == ["a"]).await;
    assert_eq!(back.workers.values().next().unwrap().state, WorkerState::Draining);
    assert_ne!(stored(&etcd, "a").await.unwrap().lease, lost);
}

#[tokio::test]
async fn a_restart_of_etcd_under_a_watch_empties_nothing() {
    let mut etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let seen = record_views(registry.watch());

    etcd.kill();
    view_where(&mut views, "the outage", |view| !view.current).await;
    // Told while nobody listens, stored once somebody does.
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    let waiting = time::timeout(TTL, registration.update(ready)).await;
    assert!(waiting.is_err(), "stored in a dead etcd: {waiting:?}");
    etcd.restart();
    etcd.ready();
    let is_ready = |view: &View| {
        view.current && view.workers.values().any(|worker| worker.state == WorkerState::Ready)
    };
    view_where(&mut views, "the update", is_ready).await;
    let seen = seen.await;
    assert!(seen.iter().all(|view| names(view) == ["a"]), "the outage reached readers: {seen:#?}");
    let newcomer = soon("register", registry.register(record("b", 1))).await.unwrap();
    view_where(&mut views, "a newcomer", |view| names(view) == ["a", "b"]).await;
    drop(newcomer);
}

#[tokio::test]
async fn a_store_that_lost_everything_gets_it_back_from_the_workers() {
    let mut etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let registration = soon("register", registry.register(record("alive", 1))).await.unwrap();
    put(&etcd, "dead", &record("dead", 1).encode(), 0).await;
    let both = |view: &View| view.current && names(view) == ["alive", "dead"];
    view_where(&mut views, "both workers", both).await;
    let seen = record_views(registry.watch());

    etcd.kill();
    etcd.wipe();
    etcd.restart();
    etcd.ready();
    let alive = |view: &View| view.current && names(view) == ["alive"];
    view_where(&mut views, "the survivor", alive).await;
    let seen = seen.await;
    let held = seen.iter().all(|view| names(view).contains(&"alive"));
    assert!(held, "the empty store reached readers: {seen:#?}");
    assert!(stored(&etcd, "alive").await.is_some());
    drop(registration);
}

#[tokio::test]
async fn a_frozen_etcd_is_noticed_and_its_return_too() {
    let etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    let registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let before = stored(&etcd, "a").await.unwrap().lease;

    // Its connections stay open and silent, and the lease ends meanwhile.
    etcd.signal("STOP");
    let outage = view_where(&mut views, "the outage", |view| !view.current).await;
    assert_eq!(names(&outage), ["a"]);
    etcd.signal("CONT");
    view_where(&mut views, "the return", |view| view.current && names(view) == ["a"]).await;
    let mut after = stored(&etcd, "a").await;
    let deadline = time::Instant::now() + PATIENCE;
    while after.as_ref().is_none_or(|kv| kv.lease == before) {
        assert!(time::Instant::now() < deadline, "no new lease: {after:?}");
        tokio::task::yield_now().await;
        after = stored(&etcd, "a").await;
    }
    drop(registration);
}

#[tokio::test]
async fn compacted_revisions_are_listed_again() {
    let etcd = etcd_or_return!();
    let (view_in, mut views) = watch::channel(Arc::<View>::default());
    let endpoints = Arc::new(etcd.endpoints());
    let mut follower =
        Follower::new(Arc::clone(&endpoints), prefix(&"test".parse().unwrap()), TTL, view_in);
    put(&etcd, "a", &record("a", 1).encode(), 0).await;
    let listed = follower.list().await.unwrap();
    let from = listed.revision() + 1;
    follower.replace(listed);

    // While nobody watches, history is made and forgotten.
    put(&etcd, "b", &record("b", 1).encode(), 0).await;
    put(&etcd, "b", &record("b", 2).encode(), 0).await;
    let last = put(&etcd, "c", &record("c", 1).encode(), 0).await;
    let compact = endpoints.call(|channel| async move {
        let request = CompactionRequest { revision: last, physical: false };
        KvClient::new(channel).compact(request).await
    });
    compact.await.unwrap();
    let mut backoff = endpoints.backoff();
    let broken = soon("the watch", follower.watch(from, &mut backoff)).await;
    assert!(matches!(broken, Broken::Compacted(oldest) if oldest == last), "{broken:?}");

    let mut following = JoinSet::new();
    following.spawn(follower.run());
    let all = |view: &View| view.current && names(view) == ["a", "b", "c"];
    view_where(&mut views, "what was missed", all).await;
    put(&etcd, "d", &record("d", 1).encode(), 0).await;
    view_where(&mut views, "what comes next", |view| names(view).contains(&"d")).await;
}

#[tokio::test]
async fn unusable_records_are_skipped_by_name() {
    let etcd = etcd_or_return!();
    let newer = String::from_utf8(record("newer", 1).encode()).unwrap();
    let newer = newer.replace("\"version\":1", "\"version\":2");
    put(&etcd, "broken", b"\xff{", 0).await;
    put(&etcd, "newer", newer.as_bytes(), 0).await;
    put(&etcd, "no/name", &record("a", 1).encode(), 0).await;
    put(&etcd, "good", &record("good", 1).encode(), 0).await;

    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer({
        let log = log.clone();
        move || log.clone()
    });
    let (view_in, _views) = watch::channel(Arc::default());
    let prefix = prefix(&"test".parse().unwrap());
    let follower = Follower::new(Arc::new(etcd.endpoints()), prefix, TTL, view_in);
    follower.list().with_subscriber(subscriber.finish()).await.unwrap();
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for skipped in ["broken", "newer", "no/name"] {
        let line = log.lines().find(|line| line.contains(&format!("key={}", key(skipped))));
        assert!(line.is_some_and(|line| line.contains("WARN")), "{skipped} in {log}");
    }
    assert!(!log.contains(&key("good")), "{log}");

    let registry = connect(&[etcd.address()]);
    let mut views = registry.watch();
    view_where(&mut views, "the good one", |view| view.current && names(view) == ["good"]).await;
    put(&etcd, "broken", &record("broken", 2).encode(), 0).await;
    view_where(&mut views, "the mended", |view| names(view) == ["broken", "good"]).await;
    put(&etcd, "good", b"", 0).await;
    view_where(&mut views, "the spoilt", |view| names(view) == ["broken"]).await;
}

/// Where a test reads what was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn dead_and_silent_members_are_passed_over() {
    let etcd = etcd_or_return!();
    let dead = format!("http://127.0.0.1:{}", free_port());
    // Accepts connections into its backlog and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_address = format!("http://{}", silent.local_addr().unwrap());
    let registry = connect(&[dead, silent_address, etcd.address()]);
    let mut views = registry.watch();
    let registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    drop(registration);
    view_where(&mut views, "its leave", |view| view.workers.is_empty()).await;
}

#[tokio::test]
async fn registering_waits_for_etcd_and_can_be_given_up() {
    let Some(binary) = server::find() else { return };
    let port = free_port();
    let registry = connect(&[format!("http://127.0.0.1:{port}")]);
    let mut views = registry.watch();
    assert_eq!(**views.borrow(), View::default());
    let given_up = time::timeout(TTL, registry.register(record("given-up", 1))).await;
    assert!(given_up.is_err(), "registered without etcd: {given_up:?}");
    let waiting = registry.register(record("waiting", 1));
    let place = Place { client_port: port, ..Place::alone(&binary) };
    let starting = tokio::task::spawn_blocking(move || EtcdServer::start_at(place));
    let (registration, etcd) = tokio::join!(soon("register", waiting), starting);
    view_where(&mut views, "the one waiting", |view| names(view) == ["waiting"]).await;
    soon("leave", registration.unwrap().leave()).await;
    drop(etcd);
}

#[tokio::test]
async fn leaving_a_dead_etcd_ends() {
    let mut etcd = etcd_or_return!();
    let registry = connect(&[etcd.address()]);
    let registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    etcd.kill();
    let left = time::timeout(Duration::from_secs(10), registration.leave()).await;
    assert!(left.is_ok(), "leave waits for an etcd that is not there");
}
