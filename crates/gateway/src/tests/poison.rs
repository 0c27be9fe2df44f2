use std::sync::Arc;

use tercet_proto::v1::generate_response::Event;
use tercet_proto::{Reason, v1};
use tonic::{Code, Request};

use super::bench::{Bench, PATIENCE, SEED, collect, read, record, request};
use super::fake::{FakeWorker, Play, WireState};
use crate::Config;

/// Lets a worker crash as often as a request comes to token `at`, and start anew each time.
async fn crash_and_restart(bench: &Bench, id: &str, worker: Arc<FakeWorker>) {
    let mut state = worker.wire.state.subscribe();
    let mut registrations = Vec::new();
    for epoch in 2.. {
        state.wait_for(|state| *state == WireState::Down).await.unwrap();
        bench.until_answer(id, crate::fleet::Answer::Gone).await;
        let mut record = record(id, &["demo"]);
        record.epoch = epoch;
        worker.reports(|report| report.epoch = epoch);
        worker.wire.state.send_replace(WireState::Up);
        // Replaces the registration of its earlier life.
        registrations.push(bench.register(record).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_crashes_workers_is_tried_alone_and_ended_once() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    for worker in [&a, &b] {
        worker.plays((0..8).map(|_| Play::Cut { at: 3 }));
    }
    let restarts = async {
        tokio::join!(
            crash_and_restart(&bench, "a", a.clone()),
            crash_and_restart(&bench, "b", b.clone())
        );
    };
    let got = tokio::select! {
        got = bench.get(request(12)) => got,
        () = restarts => unreachable!("they go on for ever"),
    };
    let error = got.error.unwrap();
    assert_eq!(
        (error.code(), Reason::of(&error)),
        (Code::Internal, Some(Reason::Poison)),
        "{error}"
    );
    assert!(!tercet_proto::is_movable(&error));
    assert!(error.message().starts_with("3 workers crashed"), "{error}");
    let mut asked: Vec<_> = [&a, &b].iter().flat_map(|worker| worker.seen()).collect();
    asked.sort_by_key(|seen| seen.spec.alone_tokens);
    let alone: Vec<_> = asked.iter().map(|seen| seen.spec.alone_tokens).collect();
    assert_eq!(alone, [0, 0, 16]);
    assert_eq!(bench.metric("tercet_lone_runs_total"), 1.0);
    assert_eq!(bench.metric("tercet_poison_total"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_was_there_by_chance_is_cleared() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    for worker in [&a, &b] {
        worker.plays([Play::Cut { at: 3 }]);
    }
    let restarts = async {
        tokio::join!(
            crash_and_restart(&bench, "a", a.clone()),
            crash_and_restart(&bench, "b", b.clone())
        );
    };
    let got = tokio::select! {
        got = bench.get(request(40)) => got,
        () = restarts => unreachable!("they go on for ever"),
    };
    got.assert_undisturbed(SEED, 40, 0);
    assert_eq!(bench.metric("tercet_lone_runs_total"), 1.0);
    assert_eq!(bench.metric("tercet_poison_total"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_request_alone_waits_for_a_worker_without_others_and_keeps_them_off() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let crash = || Play::Fail { at: 3, status: Reason::WorkerFailed.status("the engine panicked") };
    let (open, gate) = tokio::sync::watch::channel(false);
    let (go_on, gone_on) = tokio::sync::watch::channel(false);
    a.plays([
        Play::Gate { at: 2, open: gate },
        crash(),
        crash(),
        Play::Gate { at: 5, open: gone_on },
    ]);
    let mut other = bench.generate(Request::new(request(4))).await.unwrap();
    read(&mut other).await;
    a.until_active(1).await;

    let suspect = bench.generate(Request::new(request(40))).await.unwrap();
    let mut suspect = Box::pin(collect(suspect, Vec::new()));
    // Two crashes, then it waits: the other stream is still there.
    let early = tokio::time::timeout(std::time::Duration::from_secs(20), &mut suspect).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(a.seen().len(), 3);
    open.send_replace(true);
    while !matches!(read(&mut other).await, Event::Finished(_)) {}
    tokio::select! {
        got = &mut suspect => panic!("it is held at its fifth token: {got:?}"),
        () = a.in_time_seen(4) => {}
    }
    assert_eq!(a.seen()[3].spec.alone_tokens, 16);
    // Nothing else goes there meanwhile.
    let third = bench.get(request(4));
    let mut third = Box::pin(third);
    let early = tokio::time::timeout(std::time::Duration::from_secs(5), async {
        tokio::select! {
            got = &mut third => panic!("{got:?}"),
            got = &mut suspect => panic!("{got:?}"),
        }
    });
    assert!(early.await.is_err());
    assert_eq!(a.seen().len(), 4);
    go_on.send_replace(true);
    let both = async { tokio::join!(suspect, third) };
    let (suspect, third) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    suspect.assert_undisturbed(SEED, 40, 0);
    third.assert_undisturbed(SEED, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn resets_are_no_crashes() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.plays((1..6).map(|at| Play::Reset { at: 2 * at }));
    bench.get(request(12)).await.assert_undisturbed(SEED, 12, 0);
    assert_eq!(a.seen().len(), 6);
    assert!(a.seen().iter().all(|seen| seen.spec.alone_tokens == 0));
}

#[tokio::test(start_paused = true)]
async fn clients_cannot_ask_to_be_alone() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    bench.get(v1::GenerateRequest { alone_tokens: 9, ..request(4) }).await;
    assert_eq!(a.seen()[0].spec.alone_tokens, 0);
}
