use std::time::Duration;

use tercet_proto::v1::generate_response::Event;
use tercet_proto::{Reason, ResumeSpec, v1};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::bench::{Bench, SEED, collect, expected, model, read, record, request};
use super::fake::{Play, WireState};
use crate::Config;

const TOKENS: u32 = 12;

/// Every way in which a worker can lose a stream before index `at`.
fn breaks(at: u32) -> Vec<(&'static str, Play)> {
    let fail = |status| Play::Fail { at, status };
    vec![
        ("unavailable", fail(Status::unavailable("gone"))),
        ("unknown", fail(Status::unknown("torn down"))),
        ("draining", fail(Reason::Draining.status("stopping"))),
        ("pipeline", fail(Reason::PipelineBroken.status("stage 2 is gone"))),
        ("failed", fail(Reason::WorkerFailed.status("engine panicked"))),
        ("ended", Play::End { at }),
        ("cut", Play::Cut { at }),
        ("frozen", Play::Freeze { at }),
        ("gap", Play::Gap { at: at.min(TOKENS - 2) }),
    ]
}

#[tokio::test(start_paused = true)]
async fn an_undisturbed_stream_is_passed_through() {
    let bench = Bench::new(Config::default());
    let (worker, _registration) = bench.worker(record("a", &["demo"])).await;
    let got = bench.get(request(TOKENS)).await;
    got.assert_undisturbed(SEED, 12, 0);
    assert_eq!(got.started.unwrap().model, "demo");
    let seen = worker.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].spec.model.as_deref(), Some("demo"));
    assert_eq!(seen[0].spec.resume, None);
}

#[tokio::test(start_paused = true)]
async fn a_stream_broken_anywhere_goes_on_exactly() {
    for at in 0..=TOKENS {
        for (name, play) in breaks(at) {
            let bench = Bench::new(Config::default());
            let (a, _a) = bench.worker(record("a", &["demo"])).await;
            a.plays([play.clone()]);
            let (got, (b, _b)) = tokio::join!(bench.get(request(TOKENS)), async {
                a.until_seen(1).await;
                bench.worker(record("b", &["demo"])).await
            });
            got.assert_undisturbed(SEED, 12, 0);
            assert_eq!(a.seen().len(), 1, "{name} at {at}");
            assert_eq!(b.seen().len(), 1, "{name} at {at}");

            // Resumed from what had come, without a resume if nothing had.
            let resumed = b.seen()[0].spec.resume.clone();
            let index = if let Play::Gap { at } = play { at } else { at };
            let ids = expected(SEED, usize::try_from(index).unwrap());
            if matches!(play, Play::Cut { .. } | Play::Freeze { .. }) {
                // The wire may have swallowed the last messages.
                let came = resumed.map(|resume| resume.token_ids).unwrap_or_default();
                assert!(ids.starts_with(&came), "{name} at {at}");
            } else {
                let resume = ResumeSpec { seed: SEED, token_ids: ids };
                let resume = Some(resume).filter(|resume| !resume.token_ids.is_empty());
                assert_eq!(resumed, resume, "{name} at {at}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_refuses_is_passed_over() {
    for status in [
        Status::unavailable("gone"),
        Reason::Draining.status("stopping"),
        Reason::Loading.status("not warm"),
        Reason::Overloaded.status("full"),
    ] {
        let bench = Bench::new(Config::default());
        let (a, _a) = bench.worker(record("a", &["demo"])).await;
        a.plays([Play::Refuse(status.clone())]);
        let (_worker, _b) = bench.worker(record("b", &["demo"])).await;
        let begun = Instant::now();
        while a.seen().is_empty() {
            bench.get(request(TOKENS)).await.assert_undisturbed(SEED, 12, 0);
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_resumes_and_is_moved_again() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::End { at: 7 }, Play::End { at: 9 }]);
    let ids = expected(SEED, 12);
    let resume = v1::Resume { seed: SEED, token_ids: ids[..5].to_vec() };
    let request = v1::GenerateRequest { resume: Some(resume), sampling: None, ..request(TOKENS) };
    bench.get(request).await.assert_undisturbed(SEED, 12, 5);
    let resumed: Vec<_> =
        a.seen().into_iter().map(|seen| seen.spec.resume.unwrap().token_ids).collect();
    assert_eq!(resumed, [&ids[..5], &ids[..7], &ids[..9]]);
    assert!(a.seen().iter().all(|seen| seen.spec.seed() == Some(SEED)));
}

#[tokio::test(start_paused = true)]
async fn an_absent_seed_is_drawn_once_and_kept() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    let unseeded = || v1::GenerateRequest { sampling: None, ..request(TOKENS) };
    a.plays([Play::End { at: 4 }]);
    let first = bench.get(unseeded()).await;
    let seed = first.started.as_ref().unwrap().seed;
    first.assert_undisturbed(seed, 12, 0);
    let second = bench.get(unseeded()).await;
    assert_ne!(second.started.unwrap().seed, seed, "each request has its own");
    assert!(a.seen().iter().all(|seen| seen.spec.sampling.seed.is_some()));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_a_worker_repeats_are_dropped() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::End { at: 6 }, Play::Repeat { tokens: 4 }]);
    bench.get(request(TOKENS)).await.assert_undisturbed(SEED, 12, 0);
    assert_eq!(a.seen().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn moves_are_bounded() {
    let bench = Bench::new(Config { max_moves: 3, ..Config::default() });
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    let (b, _b) = bench.worker(record("b", &["demo"])).await;
    let fail = |at| Play::Fail { at, status: Reason::PipelineBroken.status("stage 2 is gone") };
    for worker in [&a, &b] {
        worker.plays((0..20).map(|_| fail(2)));
    }
    let got = bench.get(request(TOKENS)).await;
    assert_eq!(a.seen().len() + b.seen().len(), 4);
    assert_eq!(got.ids, expected(SEED, 2), "what came is kept");
    let error = got.error.unwrap();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(Reason::of(&error), Some(Reason::PipelineBroken));
    assert_eq!(error.message(), "gave up after 3 moves, the last worker: stage 2 is gone");
    assert_eq!(bench.metric("tercet_stream_moves_total{cause=\"pipeline\"}"), 3.0);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_at_fault_is_not_retried() {
    for status in [
        Reason::NonFinite.status("logits are not finite"),
        Reason::Poison.status("computing this panics"),
        Reason::InvalidRequest.status("token 99999 is out of the vocabulary"),
        Status::invalid_argument("prompt too long"),
        Status::internal("a bug"),
    ] {
        for play in [Play::Refuse(status.clone()), Play::Fail { at: 2, status: status.clone() }] {
            let bench = Bench::new(Config::default());
            let (a, _a) = bench.worker(record("a", &["demo"])).await;
            let (b, _b) = bench.worker(record("b", &["demo"])).await;
            a.plays([play.clone(), play.clone()]);
            b.plays([play.clone(), play]);
            let error = bench.get(request(TOKENS)).await.error.unwrap();
            assert_eq!(a.seen().len() + b.seen().len(), 1, "{status}");
            assert_eq!(error.code(), status.code());
            assert_eq!(error.message(), status.message());
            assert_eq!(Reason::of(&error), Reason::of(&status));
            bench.get(request(TOKENS)).await;
            assert_eq!(a.seen().len() + b.seen().len(), 2, "no worker was blamed for {status}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_waits_for_its_worker_to_come_back() {
    let bench = Bench::new(Config::default());
    let (a, registration) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Cut { at: 5 }]);
    let mut stream = bench.generate(Request::new(request(TOKENS))).await.unwrap();
    read(&mut stream).await;
    bench.leave(registration).await;
    let returns = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        a.wire.state.send_replace(WireState::Up);
        let mut again = record("a", &["demo"]);
        again.epoch = 2;
        bench.register(again).await
    };
    let begun = Instant::now();
    let (got, _registration) = tokio::join!(rest(&mut stream), returns);
    assert_eq!(got, expected(SEED, 12));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_a_worker_ends_in_time() {
    let bench = Bench::new(Config::default());
    let (a, registration) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Cut { at: 5 }]);
    let mut stream = bench.generate(Request::new(request(TOKENS))).await.unwrap();
    read(&mut stream).await;
    bench.leave(registration).await;
    let begun = Instant::now();
    let error = loop {
        let message = futures::StreamExt::next(&mut stream).await.unwrap();
        if let Err(error) = message {
            break error;
        }
    };
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    assert_eq!(begun.elapsed(), Config::default().worker_wait);
}

#[tokio::test(start_paused = true)]
async fn a_stream_never_goes_on_with_another_model() {
    let bench = Bench::new(Config::default());
    let other = |id: &str| {
        let mut other = record(id, &[]);
        other.models.push(model("demo", "another identity"));
        other
    };
    let (open, gate) = watch::channel(false);
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Gate { at: 5, open: gate }, Play::Whole]);
    let mut stream = bench.generate(Request::new(request(TOKENS))).await.unwrap();
    read(&mut stream).await;
    // From now on the other one is what the name stands for.
    let (b, _b) = bench.worker(other("b")).await;
    let (c, _c) = bench.worker(other("c")).await;
    bench.get(request(TOKENS)).await.assert_undisturbed(SEED, 12, 0);
    assert_eq!(b.seen().len() + c.seen().len(), 1);

    a.wire.state.send_replace(WireState::Down);
    open.send_replace(true);
    let (ids, ()) = tokio::join!(rest(&mut stream), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        a.wire.state.send_replace(WireState::Up);
    });
    assert_eq!(ids, expected(SEED, 12));
    assert_eq!(a.seen().len(), 2);
    assert_eq!(b.seen().len() + c.seen().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_hung_worker_is_found_by_keepalive() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Freeze { at: 3 }]);
    let mut stream = bench.generate(Request::new(request(TOKENS))).await.unwrap();
    read(&mut stream).await;
    let (b, _b) = bench.worker(record("b", &["demo"])).await;
    let begun = Instant::now();
    let ids = rest(&mut stream).await;
    assert_eq!(ids, expected(SEED, 12));
    assert_eq!((a.seen().len(), b.seen().len()), (1, 1));
    let dialer = crate::TcpDialer::default();
    let bound = dialer.keepalive_interval + dialer.keepalive_timeout;
    let elapsed = begun.elapsed();
    assert!(elapsed >= dialer.keepalive_timeout && elapsed <= bound, "took {elapsed:?}");
}

/// Reads a stream after `started` to its end and returns its tokens.
async fn rest(stream: &mut super::bench::Responses) -> Vec<u32> {
    let mut ids = Vec::new();
    loop {
        match read(stream).await {
            Event::Delta(delta) => ids.extend(delta.token_ids),
            Event::Finished(_) => return ids,
            event => panic!("neither a delta nor the end: {event:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_trace_of_the_client_goes_on_at_the_worker() {
    let telemetry = tercet_telemetry::init(&tercet_telemetry::Config {
        service_name: "tercet-gateway".to_owned(),
        instance: "test".to_owned(),
        otlp_endpoint: None,
        log_format: tercet_telemetry::LogFormat::Text,
        log_filter: "off".to_owned(),
    })
    .unwrap();
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::End { at: 4 }]);
    let mut request = Request::new(request(TOKENS));
    let client = "00-0123456789abcdef0123456789abcdef-00000000000000aa-01";
    request.metadata_mut().insert("traceparent", client.parse().unwrap());
    let stream = bench.generate(request).await.unwrap();
    collect(stream, Vec::new()).await.assert_undisturbed(SEED, 12, 0);
    let parents: Vec<_> = a
        .seen()
        .iter()
        .map(|seen| seen.metadata.get("traceparent").unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(parents.len(), 2);
    assert!(
        parents.iter().all(|parent| parent.starts_with("00-0123456789abcdef0123456789abcdef-"))
    );
    assert!(parents.iter().all(|parent| !parent.contains("00000000000000aa")), "{parents:?}");
    assert_ne!(parents[0], parents[1], "each attempt has a span of its own");
    drop(telemetry);
}
