use std::time::Duration;

use tercet_proto::v1::generate_response::Event;
use tercet_proto::v1::inference_server::Inference;
use tercet_proto::{Reason, v1};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tonic::{Code, Request};

use super::bench::{Bench, Responses, SEED, collect, model, read, record, request};
use super::fake::{Play, WireState, spawn};
use crate::Config;

const FREED: Duration = Duration::from_millis(20);

/// Returns a request that can be told from others.
fn seeded(seed: u64) -> v1::GenerateRequest {
    let sampling = v1::Sampling { seed: Some(seed), ..v1::Sampling::default() };
    v1::GenerateRequest { sampling: Some(sampling), ..request(4) }
}

/// Returns the record of a worker that computes that many at once.
fn narrow(id: &str, max_sequences: u32) -> tercet_cluster::WorkerRecord {
    tercet_cluster::WorkerRecord { max_sequences, ..record(id, &["demo"]) }
}

/// Starts a stream and waits until a worker has it.
async fn begun(bench: &Bench, seed: u64) -> Responses {
    let mut stream = bench.generate(Request::new(seeded(seed))).await.unwrap();
    assert!(matches!(read(&mut stream).await, Event::Started(_)));
    stream
}

/// Reads a stream to its end.
async fn finish(mut stream: Responses) {
    while !matches!(read(&mut stream).await, Event::Finished(_)) {}
}

fn queued(bench: &Bench) -> f64 {
    bench.metric("tercet_queue_length{gen_ai_request_model=\"demo\"}")
}

fn refused(bench: &Bench, reason: &str) -> f64 {
    bench.metric(&format!("tercet_queue_refusals_total{{reason=\"{reason}\"}}"))
}

#[tokio::test(start_paused = true)]
async fn requests_wait_in_the_order_in_which_they_came() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(narrow("a", 2)).await;
    let (open, gate) = watch::channel(false);
    a.plays((0..2).map(|_| Play::Gate { at: 1, open: gate.clone() }));
    let (_first, _second) = (begun(&bench, 0).await, begun(&bench, 1).await);
    let mut waiting = Vec::new();
    for seed in 2..12 {
        let stream = bench.generate(Request::new(seeded(seed))).await.unwrap();
        let (done, ended) = tokio::sync::oneshot::channel();
        spawn(async move { drop(done.send(collect(stream, Vec::new()).await)) });
        tokio::task::yield_now().await;
        waiting.push((seed, ended));
    }
    sleep(Duration::from_secs(5)).await;
    assert_eq!(a.seen().len(), 2, "no more than it computes");
    assert_eq!(queued(&bench), 10.0);
    drop((_first, _second));
    let freed = Instant::now();
    for (seed, ended) in waiting {
        ended.await.unwrap().assert_undisturbed(seed, 4, 0);
    }
    assert!(freed.elapsed() < FREED, "{:?}", freed.elapsed());
    let seeds: Vec<_> = a.seen().iter().map(|seen| seen.spec.seed().unwrap()).collect();
    assert_eq!(seeds, (0..12).collect::<Vec<_>>());
    assert_eq!(queued(&bench), 0.0);
    let waits = "tercet_queue_wait_seconds_count{gen_ai_request_model=\"demo\"}";
    assert_eq!(bench.metric(waits), 12.0);
    drop(open);
}

#[tokio::test(start_paused = true)]
async fn a_full_line_is_told_at_once() {
    let bench = Bench::new(Config { max_queue: 2, ..Config::default() });
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    a.plays([Play::Hold { at: 1 }]);
    let first = begun(&bench, 0).await;
    let mut waiting = Vec::new();
    for seed in 1..3 {
        let mut stream = bench.generate(Request::new(seeded(seed))).await.unwrap();
        assert!(futures::poll!(futures::StreamExt::next(&mut stream)).is_pending());
        waiting.push(stream);
    }
    let asked = Instant::now();
    let Err(error) = bench.generate(Request::new(seeded(3))).await else {
        panic!("a third one waits")
    };
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(Reason::of(&error), Some(Reason::Overloaded));
    assert!(error.message().contains("2 requests wait already"), "{error}");
    let retry = tercet_proto::retry_after(&error).unwrap();
    assert!(retry >= Duration::from_millis(100) && retry <= Duration::from_secs(30), "{retry:?}");
    assert_eq!(refused(&bench, "full"), 1.0);
    // What needs no slot is answered all the same.
    let text = v1::TokenizeRequest { text: "hi".to_owned(), ..v1::TokenizeRequest::default() };
    bench.service.tokenize(Request::new(text)).await.unwrap();
    // One that goes away makes room, in the line and at its end.
    drop(waiting.pop());
    assert_eq!(queued(&bench), 1.0);
    let last = bench.generate(Request::new(seeded(4))).await.unwrap();
    drop((first, waiting));
    collect(last, Vec::new()).await.assert_undisturbed(4, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_line_a_busy_cluster_refuses() {
    let bench = Bench::new(Config { max_queue: 0, ..Config::default() });
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    a.plays([Play::Hold { at: 1 }]);
    let first = begun(&bench, 0).await;
    let error = bench.get(seeded(1)).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::Overloaded), "{error}");
    drop(first);
    a.until_active(0).await;
    bench.get(seeded(2)).await.assert_undisturbed(2, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_may_be() {
    let max_queue_wait = Duration::from_secs(7);
    let bench = Bench::new(Config { max_queue_wait, ..Config::default() });
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    a.plays([Play::Hold { at: 1 }]);
    let _first = begun(&bench, 0).await;
    let asked = Instant::now();
    let error = bench.get(seeded(1)).await.error.unwrap();
    assert_eq!(asked.elapsed(), max_queue_wait);
    assert_eq!(Reason::of(&error), Some(Reason::Overloaded), "{error}");
    assert!(tercet_proto::retry_after(&error).is_some());
    assert_eq!(refused(&bench, "waited"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_cannot_be_served_in_time_is_told_at_once() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    // A line that moves once in 100 ms: enough of it to know.
    let held = Duration::from_millis(100);
    let mut waiting = Vec::new();
    a.plays((0..40).map(|_| Play::Hold { at: 1 }));
    for seed in 0..30 {
        let mut stream = bench.generate(Request::new(seeded(seed))).await.unwrap();
        drop(futures::poll!(futures::StreamExt::next(&mut stream)));
        waiting.push(stream);
    }
    waiting.reverse();
    for _ in 0..20 {
        let mut stream = waiting.pop().unwrap();
        read(&mut stream).await;
        sleep(held).await;
    }
    assert_eq!(queued(&bench), 10.0);
    let timed = |millis| {
        let mut request = Request::new(seeded(99));
        request.set_timeout(Duration::from_millis(millis));
        request
    };
    let asked = Instant::now();
    let Err(error) = bench.generate(timed(900)).await else { panic!("it would wait 1.1 s") };
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("1.1s"), "{error}");
    assert_eq!(refused(&bench, "hopeless"), 1.0);
    assert!(bench.generate(timed(1300)).await.is_ok(), "in time for all that is known");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_lost_its_worker_goes_before_new_requests() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    let (open, gate) = watch::channel(false);
    a.plays([Play::Gate { at: 2, open: gate.clone() }]);
    let moved = begun(&bench, SEED).await;
    let (b, _b) = bench.worker(narrow("b", 1)).await;
    b.plays([Play::Gate { at: 1, open: gate }]);
    let held = begun(&bench, 1).await;
    let mut later = bench.generate(Request::new(seeded(2))).await.unwrap();
    assert!(futures::poll!(futures::StreamExt::next(&mut later)).is_pending());
    a.wire.state.send_replace(WireState::Down);
    let freed = async {
        sleep(Duration::from_millis(50)).await;
        open.send_replace(true);
        finish(held).await;
    };
    tokio::join!(finish(moved), finish(later), freed);
    let seeds: Vec<_> = b.seen().iter().map(|seen| seen.spec.seed().unwrap()).collect();
    assert_eq!(seeds, [1, SEED, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_waits_for_its_own_model_holds_nobody_up() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(narrow("a", 1)).await;
    a.plays([Play::Hold { at: 2 }]);
    let mut stream = begun(&bench, SEED).await;
    let mut other = narrow("b", 1);
    other.models = vec![model("demo", "another identity")];
    let (b, _b) = bench.worker(other).await;
    a.wire.state.send_replace(WireState::Down);
    bench.leave(_a).await;
    let waits = async {
        loop {
            let event = read(&mut stream).await;
            assert!(!matches!(event, Event::Finished(_)), "nobody has its model");
        }
    };
    let served = async {
        sleep(Duration::from_millis(500)).await;
        bench.get(seeded(3)).await
    };
    tokio::select! {
        () = waits => {}
        got = served => got.assert_undisturbed(3, 4, 0),
    }
    assert_eq!(b.seen().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_other_gateways_sent_takes_slots_until_it_ends() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.reporting(narrow("a", 2)).await;
    let others = |running| a.reports(|report| report.models[0].running = running);
    others(2);
    sleep(Duration::from_millis(300)).await;
    let asked = Instant::now();
    let (got, ()) = tokio::join!(bench.get(seeded(1)), async {
        sleep(Duration::from_secs(3)).await;
        assert!(a.seen().is_empty());
        others(1);
    });
    got.assert_undisturbed(1, 4, 0);
    assert!(asked.elapsed() < Duration::from_secs(3) + FREED, "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_worker_without_memory_is_left_to_what_it_has() {
    let bench = Bench::new(Config::default());
    let mut roomy = narrow("a", 8);
    roomy.models[0].kv_tokens = 1024;
    let (a, _a) = bench.reporting(roomy).await;
    a.plays([Play::Hold { at: 1 }]);
    let free = |tokens| a.reports(|report| report.models[0].free_kv_tokens = tokens);
    free(60);
    sleep(Duration::from_millis(300)).await;
    let _held = begun(&bench, 0).await;
    let (got, ()) = tokio::join!(bench.get(seeded(1)), async {
        sleep(Duration::from_secs(3)).await;
        assert_eq!(a.seen().len(), 1, "an idle worker was asked, a full one was not");
        free(512);
    });
    got.assert_undisturbed(1, 4, 0);
}
