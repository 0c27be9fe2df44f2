//! An etcd of three members, and what happens to members.

use std::{env, ffi::OsString, path::Path, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{self, Instant},
};

use super::{
    super::stubs::{
        CompactionRequest, LeaseGrantRequest, MemberAddRequest, MemberRemoveRequest, StatusRequest,
        cluster_client::ClusterClient, kv_client::KvClient, lease_client::LeaseClient,
        maintenance_client::MaintenanceClient,
    },
    TTL, connect, put, record_views,
    server::{self, EtcdServer, Place, free_port, scratch},
    stored,
};
use crate::{
    EtcdOptions, EtcdRegistry, Registry, View, WorkerRecord, WorkerState,
    suite::{PATIENCE, names, record, soon, view_where},
};

/// Within what time of etcd's return everything is as it should be.
const RETURN: Duration = Duration::from_secs(5);

/// Three members, one of which leads.
struct Trio {
    members: Vec<EtcdServer>,
}

/// How one member is.
struct Status {
    id: u64,
    leader: u64,
}

impl Trio {
    fn start(binary: &Path) -> Self {
        let names = ["one", "two", "three"];
        let ports = names.map(|name| (name, free_port()));
        let urls = ports.map(|(name, port)| format!("{name}=http://127.0.0.1:{port}"));
        let place = |(name, peer_port): (&str, u16)| Place {
            name: name.to_owned(),
            directory: scratch("etcd"),
            client_port: free_port(),
            peer_port,
            initial_cluster: urls.join(","),
            // Long enough that a crowded machine does not elect all the time.
            arguments: ["--heartbeat-interval", "100", "--election-timeout", "1000"]
                .map(OsString::from)
                .to_vec(),
            ..Place::alone(binary)
        };
        let members: Vec<_> = ports.map(place).into_iter().map(Place::launch).collect();
        members.iter().for_each(EtcdServer::ready);
        Self { members }
    }

    fn addresses(&self) -> Vec<String> {
        self.members.iter().map(EtcdServer::address).collect()
    }

    /// Returns the index of the member that leads, among those that run.
    async fn leader(&self, running: &[usize]) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for &index in running {
                let Some(Status { id, leader }) = status(&self.members[index]).await else {
                    continue;
                };
                if id == leader {
                    return index;
                }
            }
            assert!(Instant::now() < deadline, "nobody leads");
        }
    }

    /// Starts the dead among them anew.
    fn restart(&mut self, dead: &[usize]) {
        for &index in dead {
            self.members[index].restart();
        }
        dead.iter().for_each(|&index| self.members[index].ready());
    }
}

async fn status(member: &EtcdServer) -> Option<Status> {
    let endpoints = member.endpoints();
    let answer = endpoints.call(|connection| async move {
        MaintenanceClient::new(connection).status(StatusRequest {}).await
    });
    let answer = answer.await.ok()?.into_inner();
    Some(Status { id: answer.header?.member_id, leader: answer.leader })
}

fn is_ready(view: &View, id: &str) -> bool {
    let mut workers = view.workers.iter();
    workers.any(|(name, worker)| name.as_str() == id && worker.state == WorkerState::Ready)
}

fn ready(record: &mut WorkerRecord) {
    record.state = WorkerState::Ready;
}

fn draining(record: &mut WorkerRecord) {
    record.state = WorkerState::Draining;
}

#[tokio::test]
async fn a_leader_that_dies_under_a_watch_is_not_missed() {
    let Some(binary) = server::find() else { return };
    let mut etcd = Trio::start(&binary);
    let registry = connect(&etcd.addresses());
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let seen = record_views(registry.watch());

    let leader = etcd.leader(&[0, 1, 2]).await;
    etcd.members[leader].kill();
    soon("update", registration.update(ready)).await.unwrap();
    view_where(&mut views, "the update", |view| view.current && is_ready(view, "a")).await;
    let others: Vec<_> = (0..3).filter(|index| *index != leader).collect();
    let next = etcd.leader(&others).await;
    assert_ne!(next, leader);
    let seen = seen.await;
    assert!(seen.iter().all(|view| names(view) == ["a"]), "readers saw it: {seen:#?}");

    // The one that is back follows, and serves as well.
    etcd.restart(&[leader]);
    let through = connect(&[etcd.members[leader].address()]);
    let mut views = through.watch();
    view_where(&mut views, "the worker", |view| view.current && is_ready(view, "a")).await;
    soon("leave", registration.leave()).await;
    view_where(&mut views, "the leave", |view| view.workers.is_empty()).await;
}

#[tokio::test]
async fn a_member_that_missed_something_is_not_believed() {
    let Some(binary) = server::find() else { return };
    let etcd = Trio::start(&binary);
    let leader = etcd.leader(&[0, 1, 2]).await;
    let (stale, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let others = [leader, other];
    // The reader asks the stale member first, and has no other.
    let reader = connect(&[etcd.members[stale].address()]);
    let mut views = reader.watch();
    // No lease ends while nobody answers: what a reader sees go is the reader's own doing.
    let addresses = others.map(|index| etcd.members[index].address()).to_vec();
    let options = EtcdOptions::new(addresses, "test".parse().unwrap());
    let lease_ttl = PATIENCE * 2;
    let writer = EtcdRegistry::connect(EtcdOptions { lease_ttl, ..options }).unwrap();
    let kept = soon("register", writer.register(record("kept", 1))).await.unwrap();
    let left = soon("register", writer.register(record("left", 1))).await.unwrap();
    let both = |view: &View| view.current && names(view) == ["kept", "left"];
    view_where(&mut views, "both workers", both).await;

    etcd.members[stale].signal("STOP");
    view_where(&mut views, "the silence", |view| !view.current).await;
    soon("leave", left.leave()).await;
    let new = soon("register", writer.register(record("new", 1))).await.unwrap();
    // Now it alone answers, and knows nothing of this.
    others.iter().for_each(|&index| etcd.members[index].signal("STOP"));
    etcd.members[stale].signal("CONT");
    let believed = views.wait_for(|view| view.current);
    let believed = time::timeout(TTL * 4, believed).await.is_ok();
    assert!(!believed, "a member without the majority was believed");
    assert_eq!(names(&views.borrow()), ["kept", "left"]);
    let seen = record_views(reader.watch());
    others.iter().for_each(|&index| etcd.members[index].signal("CONT"));
    let now = |view: &View| view.current && names(view) == ["kept", "new"];
    view_where(&mut views, "the truth", now).await;
    let seen = seen.await;
    assert!(seen.iter().all(|view| names(view).contains(&"kept")), "readers saw it: {seen:#?}");
    drop((kept, new));
}

#[tokio::test]
async fn a_lost_majority_stops_changes_and_nothing_else() {
    let Some(binary) = server::find() else { return };
    let mut etcd = Trio::start(&binary);
    let registry = connect(&etcd.addresses());
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let seen = record_views(registry.watch());
    let leader = etcd.leader(&[0, 1, 2]).await;
    let dead = [leader, (leader + 1) % 3];
    dead.iter().for_each(|&index| etcd.members[index].kill());
    view_where(&mut views, "the loss", |view| !view.current).await;
    let waiting = time::timeout(TTL, registration.update(ready)).await;
    assert!(waiting.is_err(), "stored by a minority: {waiting:?}");
    etcd.restart(&dead);
    view_where(&mut views, "the update", |view| view.current && is_ready(view, "a")).await;
    let seen = seen.await;
    assert!(seen.iter().all(|view| names(view) == ["a"]), "readers saw it: {seen:#?}");
    soon("leave", registration.leave()).await;
}

#[tokio::test]
async fn every_member_can_be_replaced() {
    let Some(binary) = server::find() else { return };
    let mut etcd = Trio::start(&binary);
    let registry = connect(&etcd.addresses());
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let seen = record_views(registry.watch());
    for index in 0..3 {
        // At the address of the one before, as a pod of a stateful set, and with nothing on disk.
        let old = status(&etcd.members[index]).await.unwrap().id;
        etcd.members[index].kill();
        etcd.members[index].wipe();
        let survivor = &etcd.members[(index + 1) % 3];
        let removed = change(survivor, |connection| async move {
            let request = MemberRemoveRequest { id: old };
            ClusterClient::new(connection).member_remove(request).await
        });
        removed.await;
        let peer_port = free_port();
        let added = change(survivor, |connection| async move {
            let peer_ur_ls = vec![format!("http://127.0.0.1:{peer_port}")];
            ClusterClient::new(connection).member_add(MemberAddRequest { peer_ur_ls }).await
        });
        added.await;
        let mut place = etcd.members[index].place.clone();
        place.peer_port = peer_port;
        place.directory = scratch("etcd");
        for member in &mut etcd.members {
            member.place.peer_port =
                if member.place.name == place.name { peer_port } else { member.place.peer_port };
        }
        let urls = etcd.members.iter().map(|EtcdServer { place, .. }| {
            format!("{}=http://127.0.0.1:{}", place.name, place.peer_port)
        });
        place.initial_cluster = urls.collect::<Vec<_>>().join(",");
        place.arguments.extend(["--initial-cluster-state", "existing"].map(OsString::from));
        etcd.members[index] = place.launch();
        etcd.members[index].ready();
        soon("update", registration.update(|record| record.max_sequences += 1)).await.unwrap();
    }
    let all = record("a", 1).max_sequences + 3;
    let changed =
        |view: &View| view.current && view.workers.values().all(|w| w.max_sequences == all);
    view_where(&mut views, "the changes", changed).await;
    let seen = seen.await;
    assert!(seen.iter().all(|view| names(view) == ["a"]), "readers saw it: {seen:#?}");
    soon("leave", registration.leave()).await;
}

/// Changes the members, which is refused for a moment after every other change.
async fn change<T, F>(
    member: &EtcdServer,
    call: impl Fn(super::super::session::Connection) -> F,
) -> T
where
    F: Future<Output = Result<T, tonic::Status>>,
{
    let endpoints = member.endpoints();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match endpoints.call(&call).await {
            Ok(changed) => return changed,
            Err(status) => assert!(Instant::now() < deadline, "{status}"),
        }
        // Not to hurry: nothing tells when it will be taken.
        time::sleep(Duration::from_millis(100)).await;
    }
}

/// A TCP relay that can be cut: what etcd is to those who cannot reach it.
struct Relay {
    address: String,
    is_cut: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Relay {
    async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let is_cut = watch::Sender::new(false);
        let cut = is_cut.subscribe();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut cut = cut.clone();
                connections.spawn(async move {
                    let carry = async {
                        let Ok(mut etcd) = TcpStream::connect(("127.0.0.1", target)).await else {
                            return;
                        };
                        drop(tokio::io::copy_bidirectional(&mut client, &mut etcd).await);
                    };
                    // Reset at once while it is cut.
                    tokio::select! {
                        biased;
                        _ = cut.wait_for(|is_cut| *is_cut) => {}
                        () = carry => {}
                    }
                });
            }
        });
        Self { address, is_cut, _tasks: tasks }
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }
}

/// How long an outage is; `TERCET_OUTAGE_SECONDS` makes it as long as an operator would see.
fn outage() -> Duration {
    let seconds = env::var("TERCET_OUTAGE_SECONDS").ok();
    Duration::from_secs(seconds.map_or(8, |seconds| seconds.parse().expect("whole seconds")))
}

/// Members killed one after another, then all away for long, workers that die and start meanwhile,
/// and history forgotten before anybody has caught up.
#[tokio::test]
async fn after_a_long_outage_membership_is_right_within_seconds() {
    let Some(binary) = server::find() else { return };
    let mut etcd = Trio::start(&binary);
    let mut relays = Vec::new();
    for member in &etcd.members {
        relays.push(Relay::start(member.place.client_port).await);
    }
    let addresses: Vec<_> = relays.iter().map(|relay| relay.address.clone()).collect();
    // The lease that is the default.
    let connect = || {
        let options = EtcdOptions::new(addresses.clone(), "test".parse().unwrap());
        EtcdRegistry::connect(options).unwrap()
    };
    let ttl = EtcdOptions::new(Vec::new(), "test".parse().unwrap()).lease_ttl;
    let (gateway, worker, latecomer) = (connect(), connect(), connect());
    let mut views = gateway.watch();
    let mut kept = soon("register", worker.register(record("kept", 1))).await.unwrap();
    let mut changed = soon("register", worker.register(record("changed", 1))).await.unwrap();
    // Dies with the outage: nobody renews its lease.
    let ttl = i64::try_from(ttl.as_secs()).unwrap();
    let endpoints = etcd.members[0].endpoints();
    let granted = endpoints.call(move |connection| async move {
        LeaseClient::new(connection).lease_grant(LeaseGrantRequest { ttl, id: 0 }).await
    });
    let lease = granted.await.unwrap().into_inner().id;
    let all = |view: &View| view.current && names(view) == ["changed", "dead", "kept"];
    put(&etcd.members[0], "dead", &record("dead", 1).encode(), lease).await;
    view_where(&mut views, "all workers", all).await;
    let seen = record_views(gateway.watch());

    let order = [etcd.leader(&[0, 1, 2]).await];
    let order = [order[0], (order[0] + 1) % 3, (order[0] + 2) % 3];
    for index in order {
        etcd.members[index].kill();
        time::sleep(Duration::from_millis(500)).await;
    }
    view_where(&mut views, "the outage", |view| !view.current).await;
    assert_eq!(names(&views.borrow()), ["changed", "dead", "kept"]);
    let coming = latecomer.register(record("new", 1));
    tokio::pin!(coming);
    let waited =
        time::timeout(outage(), async { tokio::join!(&mut coming, changed.update(draining)) });
    assert!(waited.await.is_err(), "stored in a dead etcd");
    assert_eq!(names(&views.borrow()), ["changed", "dead", "kept"], "through all of it");

    // Back, but not for them: history is made and forgotten meanwhile.
    relays.iter().for_each(|relay| relay.cut(true));
    etcd.restart(&order);
    put(&etcd.members[0], "other", &record("other", 1).encode(), 0).await;
    let last = put(&etcd.members[0], "other", &record("other", 2).encode(), 0).await;
    let compacted = endpoints.call(|connection| async move {
        let request = CompactionRequest { revision: last, physical: true };
        KvClient::new(connection).compact(request).await
    });
    compacted.await.unwrap();
    relays.iter().for_each(|relay| relay.cut(false));

    let back = Instant::now();
    let right = |view: &View| {
        let drains = |(id, worker): (&crate::WorkerId, &std::sync::Arc<WorkerRecord>)| {
            id.as_str() != "changed" || worker.state == WorkerState::Draining
        };
        view.current
            && names(view) == ["changed", "kept", "new", "other"]
            && view.workers.iter().all(drains)
    };
    let (_, registration) =
        tokio::join!(view_where(&mut views, "the right view", right), soon("register", coming));
    let took = back.elapsed();
    assert!(took < RETURN, "right after {took:?} only");
    let living = |view: &View| ["changed", "kept"].iter().all(|id| names(view).contains(id));
    let seen = seen.await;
    assert!(seen.iter().all(|view| living(view)), "readers lost the living: {seen:#?}");
    assert!(stored(&etcd.members[0], "dead").await.is_none());
    soon("update", kept.update(ready)).await.unwrap();
    drop((kept, changed, registration));
}
