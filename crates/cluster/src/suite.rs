//! What every registry does, run against each of them.

use std::{future::Future, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::join_all};
use tokio::{sync::watch, time};

use crate::{
    ClusterError, LayerRange, ModelRecord, ModelState, Rate, Registry, View, WorkerId,
    WorkerRecord, WorkerState,
};

/// Longest any step of a test may take, on a machine with other things to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

macro_rules! every_behaviour {
    ($test:ident) => {
        $test! {
            a_record_is_seen_changed_and_withdrawn
            a_dropped_registration_is_withdrawn
            late_readers_see_everybody
            a_change_keeps_name_and_epoch
            a_later_incarnation_takes_over
            a_worker_that_left_comes_back
            a_reader_that_looked_away_sees_what_is
            an_update_given_up_is_stored_all_the_same
            everybody_can_come_at_once
        }
    };
}
pub(crate) use every_behaviour;

pub(crate) fn record(id: &str, epoch: u64) -> WorkerRecord {
    WorkerRecord {
        id: id.parse().unwrap(),
        address: format!("{id}.workers:7171"),
        epoch,
        state: WorkerState::Loading,
        models: vec![ModelRecord {
            name: "demo".to_owned(),
            identity: "00ff".to_owned(),
            header_digest: "ff00".to_owned(),
            layers: LayerRange { start: 0, end: 4 },
            layer_count: 4,
            context_length: 128,
            vocab_size: 1000,
            state: ModelState::Ready,
            generation: 0,
            kv_tokens: 512,
            decode_rate: Rate::measured(40.0),
            prefill_rate: Rate::measured(900.0),
        }],
        max_sequences: 8,
    }
}

/// Returns what `future` gives, which must come soon.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let given = time::timeout(PATIENCE, future).await;
    given.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// Returns the first view, now or soon, that is as wanted.
pub(crate) async fn view_where(
    views: &mut watch::Receiver<Arc<View>>,
    what: &str,
    wanted: impl Fn(&View) -> bool,
) -> Arc<View> {
    let found = time::timeout(PATIENCE, views.wait_for(|view| wanted(view))).await;
    match found.map(|found| found.map(|view| Arc::clone(&view))) {
        Ok(Ok(view)) => view,
        Ok(Err(_)) => panic!("{what}: the registry closed"),
        Err(_) => panic!("{what}: not within {PATIENCE:?}; last view: {:#?}", views.borrow()),
    }
}

pub(crate) fn names(view: &View) -> Vec<&str> {
    view.workers.keys().map(WorkerId::as_str).collect()
}

pub(crate) async fn a_record_is_seen_changed_and_withdrawn(registry: &dyn Registry) {
    let mut views = registry.watch();
    view_where(&mut views, "an empty registry", |view| view.current && view.workers.is_empty())
        .await;
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    let seen = view_where(&mut views, "the new worker", |view| names(view) == ["a"]).await;
    assert_eq!(*seen.workers.values().next().unwrap().as_ref(), record("a", 1));

    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    soon("update", registration.update(ready)).await.unwrap();
    let changed = view_where(&mut views, "the change", |view| {
        view.workers.values().any(|worker| worker.state == WorkerState::Ready)
    })
    .await;
    assert!(changed.revision > seen.revision, "{} after {}", changed.revision, seen.revision);

    soon("leave", registration.leave()).await;
    let left = view_where(&mut views, "the leave", |view| view.workers.is_empty()).await;
    assert!(left.revision > changed.revision && left.current, "{left:?}");
}

pub(crate) async fn a_dropped_registration_is_withdrawn(registry: &dyn Registry) {
    let mut views = registry.watch();
    let kept = soon("register", registry.register(record("kept", 1))).await.unwrap();
    let dropped = soon("register", registry.register(record("dropped", 1))).await.unwrap();
    view_where(&mut views, "both workers", |view| names(view) == ["dropped", "kept"]).await;
    drop(dropped);
    view_where(&mut views, "the one left", |view| names(view) == ["kept"]).await;
    soon("leave", kept.leave()).await;
}

pub(crate) async fn late_readers_see_everybody(registry: &dyn Registry) {
    let mut registrations = Vec::new();
    for id in ["c", "a", "b"] {
        registrations.push(soon("register", registry.register(record(id, 1))).await.unwrap());
    }
    let mut views = registry.watch();
    let all = |view: &View| view.current && names(view) == ["a", "b", "c"];
    view_where(&mut views, "everybody, by name", all).await;
    for registration in registrations {
        soon("leave", registration.leave()).await;
    }
    view_where(&mut views, "nobody", |view| view.workers.is_empty()).await;
}

pub(crate) async fn a_change_keeps_name_and_epoch(registry: &dyn Registry) {
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 5))).await.unwrap();
    let rename = |record: &mut WorkerRecord| {
        record.id = "b".parse().unwrap();
        record.epoch = 1;
        record.max_sequences = 99;
    };
    soon("update", registration.update(rename)).await.unwrap();
    let view = view_where(&mut views, "the change", |view| {
        view.workers.values().any(|worker| worker.max_sequences == 99)
    })
    .await;
    assert_eq!(names(&view), ["a"]);
    assert_eq!(view.workers.values().next().unwrap().epoch, 5);
    assert_eq!(registration.record().id.as_str(), "a");
}

pub(crate) async fn a_later_incarnation_takes_over(registry: &dyn Registry) {
    let mut views = registry.watch();
    let mut first = soon("register", registry.register(record("a", 1))).await.unwrap();
    let second = soon("register", registry.register(record("a", 2))).await.unwrap();
    let second_alone =
        |view: &View| names(view) == ["a"] && view.workers.values().all(|worker| worker.epoch == 2);
    view_where(&mut views, "the later incarnation", second_alone).await;

    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    let refused = soon("update", first.update(ready)).await;
    assert!(matches!(refused, Err(ClusterError::Superseded { ours: 1, theirs: 2, .. })));
    let refused = soon("register", registry.register(record("a", 1))).await;
    assert!(matches!(refused, Err(ClusterError::Superseded { ours: 1, theirs: 2, .. })));

    // Whoever is registered next is seen after everything that the leave of the first did.
    soon("leave", first.leave()).await;
    let marker = soon("register", registry.register(record("marker", 1))).await.unwrap();
    view_where(&mut views, "the marker", |view| names(view).contains(&"marker")).await;
    let view = registry.watch().borrow().clone();
    assert_eq!(names(&view), ["a", "marker"], "the leave of the first took the second along");
    soon("leave", marker.leave()).await;
    soon("leave", second.leave()).await;
}

pub(crate) async fn a_worker_that_left_comes_back(registry: &dyn Registry) {
    let mut views = registry.watch();
    let mut revision = 0;
    for epoch in [1, 1, 2, 1] {
        let registration = soon("register", registry.register(record("a", epoch))).await.unwrap();
        let there = |view: &View| view.workers.values().any(|worker| worker.epoch == epoch);
        let view = view_where(&mut views, "the worker", there).await;
        assert!(view.revision > revision, "{} after {revision}", view.revision);
        soon("leave", registration.leave()).await;
        let view = view_where(&mut views, "its leave", |view| view.workers.is_empty()).await;
        revision = view.revision;
    }
}

pub(crate) async fn a_reader_that_looked_away_sees_what_is(registry: &dyn Registry) {
    let mut views = registry.watch();
    let mut kept = soon("register", registry.register(record("kept", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| names(view) == ["kept"]).await;
    let before = views.borrow_and_update().clone();
    let gone = soon("register", registry.register(record("gone", 1))).await.unwrap();
    for _ in 0..20 {
        soon("update", kept.update(|record| record.max_sequences += 1)).await.unwrap();
    }
    soon("leave", gone.leave()).await;
    let last = record("kept", 1).max_sequences + 20;
    let now = |view: &View| {
        names(view) == ["kept"] && view.workers.values().all(|worker| worker.max_sequences == last)
    };
    let after = view_where(&mut views, "the last state", now).await;
    assert!(after.revision >= before.revision + 22, "each of the changes has its revision");
    assert_eq!(*before.workers.values().next().unwrap().as_ref(), record("kept", 1), "held");
    soon("leave", kept.leave()).await;
}

pub(crate) async fn an_update_given_up_is_stored_all_the_same(registry: &dyn Registry) {
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    // Looked at once and dropped.
    drop(registration.update(ready).now_or_never());
    view_where(&mut views, "the change", |view| {
        view.workers.values().any(|worker| worker.state == WorkerState::Ready)
    })
    .await;
    soon("leave", registration.leave()).await;
}

pub(crate) async fn everybody_can_come_at_once(registry: &dyn Registry) {
    const WORKERS: usize = 20;
    let mut views = registry.watch();
    let all = (0..WORKERS).map(|number| registry.register(record(&format!("w-{number}"), 1)));
    let all = soon("register", join_all(all)).await;
    view_where(&mut views, "all", |view| view.workers.len() == WORKERS).await;
    let leaving = all.into_iter().map(|registration| registration.unwrap().leave());
    soon("leave", join_all(leaving)).await;
    view_where(&mut views, "nobody", |view| view.workers.is_empty()).await;
}
