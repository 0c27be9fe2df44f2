use std::time::Duration;

use tercet_cluster::WorkerState;
use tercet_proto::v1::generate_response::Event;
use tercet_proto::{Reason, v1};
use tokio::time::Instant;
use tonic::Request;

use super::bench::{Bench, PATIENCE, Responses, SEED, read, record, request};
use super::fake::{Play, WireState};
use crate::Config;
use crate::fleet::Answer;

/// Begins a stream and reads it up to its first token.
async fn begun(bench: &Bench, tokens: u32) -> (Responses, Vec<u32>) {
    let mut stream = bench.generate(Request::new(request(tokens))).await.unwrap();
    loop {
        if let Event::Delta(delta) = read(&mut stream).await {
            return (stream, delta.token_ids);
        }
    }
}

/// Reads the rest of a stream and returns all its tokens.
async fn rest(stream: &mut Responses, mut ids: Vec<u32>) -> Vec<u32> {
    loop {
        match read(stream).await {
            Event::Delta(delta) => ids.extend(delta.token_ids),
            Event::Finished(_) => return ids,
            _ => {}
        }
    }
}

/// Waits until something that changes with the routes holds.
async fn until(bench: &Bench, holds: impl Fn(&Bench) -> bool) {
    let mut routes = bench.shared.fleet.watch();
    let wait = routes.wait_for(|_| holds(bench));
    tokio::time::timeout(PATIENCE, wait).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_leave_a_silent_worker_for_one_that_answers() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.plays([Play::Freeze { at: 3 }]);
    let (mut stream, ids) = begun(&bench, 12).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    let silent = Instant::now();
    let ids = rest(&mut stream, ids).await;
    assert_eq!(ids, super::bench::expected(SEED, 12));
    let after = Config::default().suspect_after;
    let took = silent.elapsed();
    assert!(took >= after && took <= after * 3 / 2, "{took:?}");
    let resumed = b.seen()[0].spec.resume.as_ref().unwrap().token_ids.len();
    assert!((1..=3).contains(&resumed), "{resumed}");
    assert_eq!(bench.metric("tercet_stream_moves_total{cause=\"silent\"}"), 1.0);
    assert_eq!(bench.metric("tercet_worker_suspected{worker=\"a\"}"), 1.0);
    assert_eq!(bench.metric("tercet_suspicions_total"), 1.0);

    // New requests avoid it, until it reports again.
    for _ in 0..4 {
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (1, 5));
    a.wire.state.send_replace(WireState::Up);
    bench.until_answer("a", Answer::Answering).await;
    assert_eq!(bench.metric("tercet_worker_suspected{worker=\"a\"}"), 0.0);
    for _ in 0..4 {
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    assert!(a.seen().len() > 1, "it is back");
}

#[tokio::test(start_paused = true)]
async fn a_stream_waits_for_a_silent_worker_that_is_the_only_one() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.plays([Play::Freeze { at: 3 }]);
    let (mut stream, ids) = begun(&bench, 12).await;
    // Another model's worker is no help.
    let (_other, _b) = bench.reporting(record("b", &["other"])).await;
    bench.until_answer("a", Answer::Silent).await;
    let (ids, late) = tokio::join!(rest(&mut stream, ids), async {
        // The connection's own keepalive has more patience than this.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let demo = v1::GenerateRequest { model: "demo".to_owned(), ..request(4) };
        let late = bench.get(demo);
        let up = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            a.wire.state.send_replace(WireState::Up);
        };
        tokio::join!(late, up).0
    });
    // The fake lost its place when its wire hung: the stream was taken up anew, at the same worker.
    assert_eq!(ids, super::bench::expected(SEED, 12));
    late.assert_undisturbed(SEED, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_stays_where_others_have_no_room() {
    let bench = Bench::new(Config { max_moves: 1, ..Config::default() });
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    a.plays([Play::Gate { at: 3, open: gate }]);
    let (mut stream, ids) = begun(&bench, 12).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    let full = Reason::Overloaded.status_retry_after("full", Duration::from_millis(300));
    b.plays((0..100).map(|_| Play::Refuse(full.clone())));
    let (ids, ()) = tokio::join!(rest(&mut stream, ids), async {
        a.wire.state.send_replace(WireState::Frozen);
        bench.until_answer("a", Answer::Silent).await;
        b.in_time_seen(5).await;
        a.wire.state.send_replace(WireState::Up);
        open.send_replace(true);
    });
    assert_eq!(ids, super::bench::expected(SEED, 12));
    assert_eq!(a.seen().len(), 1, "it went on where it was");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_hangs_and_reports_is_left_after_a_while() {
    let config = Config::default();
    let bench = Bench::new(config.clone());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 3 }]);
    a.reports(|report| report.models[0].steps = 7);
    let (mut stream, ids) = begun(&bench, 12).await;
    let (_b, _registration) = bench.reporting(record("b", &["demo"])).await;
    let begun = Instant::now();
    // Others are computed there for a while: the stream may wait for its turn.
    let (ids, ()) = tokio::join!(rest(&mut stream, ids), async {
        for steps in 8..16 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            a.reports(|report| report.models[0].steps = steps);
        }
    });
    assert_eq!(ids, super::bench::expected(SEED, 12));
    let stood = begun.elapsed() - Duration::from_secs(40);
    let timeout = config.progress_timeout;
    assert!(stood >= timeout && stood <= timeout * 2, "{stood:?}");
    assert_eq!(bench.metric("tercet_stream_moves_total{cause=\"stalled\"}"), 1.0);
    assert_eq!(bench.metric("tercet_ejections_total{cause=\"failed\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_lost_takes_no_worker_that_answers_away() {
    let bench = Bench::new(Config::default());
    let (a, registration) = bench.reporting(record("a", &["demo"])).await;
    bench.leave(registration).await;
    assert_eq!(bench.metric("tercet_workers_kept"), 1.0);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(60)).await;
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    // Its record is back: nothing is new.
    let link = bench.link("a");
    let registration = bench.register(record("a", &["demo"])).await;
    assert!(std::sync::Arc::ptr_eq(&link, &bench.link("a")));
    assert_eq!(bench.metric("tercet_workers_kept"), 0.0);

    // Once its heartbeat stops, it is gone.
    bench.leave(registration).await;
    a.wire.state.send_replace(WireState::Frozen);
    until(&bench, |bench| bench.metric("tercet_workers_kept") == 0.0).await;
    let error = bench.get(request(4)).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_leaves_is_not_kept() {
    let bench = Bench::new(Config::default());
    // Said by its reports alone.
    let (a, registration) = bench.reporting(record("a", &["demo"])).await;
    a.reports(|report| report.set_state(v1::WorkerState::Draining));
    let link = bench.link("a");
    while !link.is_leaving() {
        tokio::task::yield_now().await;
    }
    bench.leave(registration).await;
    assert_eq!(bench.metric("tercet_workers_kept"), 0.0);
    // Said by its record alone.
    let (_b, mut registration) = bench.reporting(record("b", &["demo"])).await;
    bench
        .noticed(registration.update(|record| record.state = WorkerState::Draining))
        .await
        .unwrap();
    bench.leave(registration).await;
    assert_eq!(bench.metric("tercet_workers_kept"), 0.0);
    // Said while it is kept.
    let (c, registration) = bench.reporting(record("c", &["demo"])).await;
    bench.leave(registration).await;
    assert_eq!(bench.metric("tercet_workers_kept"), 1.0);
    c.reports(|report| report.set_state(v1::WorkerState::Draining));
    until(&bench, |bench| bench.metric("tercet_workers_kept") == 0.0).await;
}

#[tokio::test(start_paused = true)]
async fn what_others_sent_to_a_worker_counts() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    a.reports(|report| {
        report.models[0].running = 3;
        report.models[0].outstanding_tokens = 900;
    });
    let stale = Duration::from_secs(1);
    let load = || bench.link("a").reported("demo", Instant::now());
    while load().is_none_or(|load| load.other_streams < 3) {
        tokio::task::yield_now().await;
    }
    for _ in 0..6 {
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (0, 6));
    // Nothing is known any more of a worker whose reports have stopped.
    a.wire.state.send_replace(WireState::Frozen);
    tokio::time::sleep(stale * 2).await;
    assert_eq!(load(), None);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_its_worker_reports_as_going_gets_nothing_new() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    let (b, _b) = bench.reporting(record("b", &["demo"])).await;
    a.reports(|report| report.models[0].set_state(v1::ModelState::Draining));
    let link = bench.link("a");
    while !link.is_draining("demo", 0) {
        tokio::task::yield_now().await;
    }
    for _ in 0..4 {
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (0, 4));
}

#[tokio::test(start_paused = true)]
async fn another_incarnation_at_the_address_is_not_the_worker() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.reports(|report| report.epoch = 2);
    bench.until_answer("a", Answer::Gone).await;
    let mut again = record("a", &["demo"]);
    again.epoch = 2;
    let _again = bench.register(again).await;
    bench.until_answer("a", Answer::Answering).await;
    bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_to_a_worker_that_lives_costs_no_time() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(record("a", &["demo"])).await;
    a.plays([Play::Reset { at: 3 }]);
    let begun = Instant::now();
    bench.get(request(12)).await.assert_undisturbed(SEED, 12, 0);
    assert!(begun.elapsed() < Config::default().ejection, "{:?}", begun.elapsed());
}
