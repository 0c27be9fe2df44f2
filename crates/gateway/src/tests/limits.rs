use std::time::Duration;

use futures::StreamExt;
use tercet_proto::{Reason, v1};
use tokio::time::Instant;
use tonic::{Code, Request};

use super::bench::{Bench, SEED, collect, expected, read, record, request};
use super::fake::Play;
use crate::Config;

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_stops_the_worker() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 3 }]);
    let mut stream = bench.generate(Request::new(request(100))).await.unwrap();
    for _ in 0..4 {
        read(&mut stream).await;
    }
    a.until_active(1).await;
    drop(stream);
    a.until_active(0).await;
    assert_eq!(bench.metric("tercet_worker_outstanding{worker=\"a\"}"), 0.0);
    let labels = concat!(
        "{component=\"gateway\",gen_ai_operation_name=\"text_completion\",",
        "gen_ai_provider_name=\"tercet\",gen_ai_request_model=\"demo\",error_type=\"CANCELLED\"}"
    );
    let series = format!("gen_ai_server_request_duration_seconds_count{labels}");
    assert_eq!(bench.metric(&series), 1.0, "{}", bench.metrics.encode());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_stream_and_the_work() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 3 }]);
    let mut request = Request::new(request(100));
    request.set_timeout(Duration::from_secs(7));
    let begun = Instant::now();
    let stream = bench.generate(request).await.unwrap();
    let got = collect(stream, Vec::new()).await;
    assert_eq!(got.error.unwrap().code(), Code::DeadlineExceeded);
    assert_eq!(got.ids, expected(SEED, 3), "what came in time was passed on");
    assert_eq!(begun.elapsed(), Duration::from_secs(7));
    a.until_active(0).await;
    let timeout = tercet_proto::timeout(&a.seen()[0].metadata).unwrap();
    assert!(timeout <= Duration::from_secs(7), "the worker knows: {timeout:?}");
    // The worker is not to blame.
    bench.get(super::bench::request(4)).await.assert_undisturbed(SEED, 4, 0);
    assert_eq!(begun.elapsed(), Duration::from_secs(7));
}

#[tokio::test(start_paused = true)]
async fn a_worker_too_slow_for_a_deadline_is_not_blamed() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Stall]);
    let mut hurried = Request::new(request(4));
    hurried.set_timeout(Duration::from_secs(2));
    let begun = Instant::now();
    let stream = bench.generate(hurried).await.unwrap();
    let got = collect(stream, Vec::new()).await;
    assert_eq!(got.error.unwrap().code(), Code::DeadlineExceeded);
    bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_also_bounds_the_search_for_a_worker() {
    let bench = Bench::new(Config::default());
    let (_worker, registration) = bench.worker(record("a", &["demo"])).await;
    bench.leave(registration).await;
    let mut request = Request::new(request(4));
    request.set_timeout(Duration::from_secs(2));
    let begun = Instant::now();
    let stream = bench.generate(request).await.unwrap();
    let got = collect(stream, Vec::new()).await;
    assert_eq!(got.error.unwrap().code(), Code::DeadlineExceeded);
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn streams_beyond_the_bound_are_refused() {
    let bench = Bench::new(Config { max_streams: 2, ..Config::default() });
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 1 }, Play::Hold { at: 1 }]);
    let mut first = bench.generate(Request::new(request(4))).await.unwrap();
    let mut second = bench.generate(Request::new(request(4))).await.unwrap();
    for stream in [&mut first, &mut second] {
        read(stream).await;
    }
    let Err(error) = bench.generate(Request::new(request(4))).await else {
        panic!("a third stream was admitted")
    };
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(Reason::of(&error), Some(Reason::Overloaded));
    assert!(tercet_proto::retry_after(&error).is_some());
    let series = "tercet_rejections_total{component=\"gateway\",reason=\"OVERLOADED\"}";
    assert_eq!(bench.metric(series), 1.0);
    drop(first);
    let third = bench.generate(Request::new(request(4))).await.unwrap();
    collect(third, Vec::new()).await;
    drop(second);
    // A refused request leaves nothing behind.
    for _ in 0..5 {
        let invalid = v1::GenerateRequest { input: None, ..request(4) };
        assert_eq!(bench.get(invalid).await.error.unwrap().code(), Code::InvalidArgument);
    }
    assert_eq!(bench.shared.streams.available_permits(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stopping_gateway_tells_clients_to_resume_elsewhere() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 3 }]);
    let mut stream = bench.generate(Request::new(request(100))).await.unwrap();
    for _ in 0..4 {
        read(&mut stream).await;
    }
    bench.shared.draining.cancel();
    let error = bench.get(request(4)).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::Draining));
    bench.shared.stop.cancel();
    let error = stream.next().await.unwrap().unwrap_err();
    assert_eq!(Reason::of(&error), Some(Reason::Draining));
    assert!(stream.next().await.is_none());
    a.until_active(0).await;
}

#[tokio::test(start_paused = true)]
async fn tokens_and_times_are_measured() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::End { at: 6 }]);
    bench.get(request(12)).await.assert_undisturbed(SEED, 12, 0);
    let tokens = |kind: &str| {
        let labels = format!("component=\"gateway\",gen_ai_request_model=\"demo\",kind=\"{kind}\"");
        bench.metric(&format!("tercet_tokens_total{{{labels}}}"))
    };
    assert_eq!(tokens("prompt"), 12.0, "the prompt counts once, however often it was moved");
    assert_eq!(tokens("completion"), 12.0);
    assert_eq!(bench.metric("tercet_stream_moves_total{cause=\"broken\"}"), 1.0);
    assert_eq!(bench.metric("tercet_workers{gen_ai_request_model=\"demo\"}"), 1.0);
    let streams = "tercet_streams{component=\"gateway\",gen_ai_request_model=\"demo\"}";
    assert_eq!(bench.metric(streams), 0.0);
}
