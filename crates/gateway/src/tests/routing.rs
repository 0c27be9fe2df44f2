use std::time::Duration;

use tercet_cluster::WorkerState;
use tercet_proto::v1::inference_server::Inference;
use tercet_proto::{InvalidRequest, Reason, v1};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::bench::{Bench, SEED, collect, model, read, record, request};
use super::fake::{Play, WireState};
use crate::Config;

fn named(model: &str) -> v1::GenerateRequest {
    v1::GenerateRequest { model: model.to_owned(), ..request(4) }
}

#[tokio::test(start_paused = true)]
async fn the_model_is_found_or_its_absence_told() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["small"])).await;
    assert!(bench.get(named("")).await.error.is_none(), "the only one");

    let (b, _b) = bench.worker(record("b", &["large"])).await;
    for (name, worker) in [("small", &a), ("large", &b)] {
        let before = worker.seen().len();
        let got = bench.get(named(name)).await;
        got.assert_undisturbed(SEED, 4, 0);
        assert_eq!(got.started.unwrap().model, name);
        assert_eq!(worker.seen().len(), before + 1);
    }

    let error = bench.get(named("")).await.error.unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("large, small"), "{error}");
    assert_eq!(InvalidRequest::of(&error).unwrap().violations()[0].field, "model");

    let begun = Instant::now();
    let error = bench.get(named("medium")).await.error.unwrap();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(Reason::of(&error), Some(Reason::ModelUnknown));
    assert!(error.message().contains("\"medium\""), "{error}");
    assert!(error.message().contains("large, small"), "{error}");
    assert_eq!(begun.elapsed(), Duration::ZERO, "nothing to wait for");

    let models = bench.service.list_models(Request::new(v1::ListModelsRequest {})).await.unwrap();
    let names: Vec<_> = models.into_inner().models.into_iter().map(|model| model.name).collect();
    assert_eq!(names, ["large", "small"]);
}

#[tokio::test(start_paused = true)]
async fn only_ready_heads_get_requests() {
    let bench = Bench::new(Config::default());
    let mut later_stage = record("stage", &["demo"]);
    later_stage.models[0].layers.start = 2;
    later_stage.models[0].identity.clear();
    let mut headless = record("head", &["demo"]);
    headless.models[0].identity.clear();
    let mut loading = record("loading", &["demo"]);
    loading.state = WorkerState::Loading;
    let mut draining = record("draining", &["demo"]);
    draining.state = WorkerState::Draining;
    let mut idle = Vec::new();
    for record in [later_stage, headless, loading, draining] {
        idle.push(bench.worker(record).await);
    }
    let begun = Instant::now();
    let error = bench.get(named("demo")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    assert_eq!(begun.elapsed(), Config::default().worker_wait, "it may become ready");
    assert!(idle.iter().all(|(worker, _)| worker.seen().is_empty()));

    // One becomes ready while a request waits.
    let (loading, registration) = &mut idle[2];
    let (got, updated) = tokio::join!(bench.get(named("demo")), async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        registration.update(|record| record.state = WorkerState::Ready).await
    });
    updated.unwrap();
    got.assert_undisturbed(SEED, 4, 0);
    assert_eq!(loading.seen().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_the_first_worker_of_all() {
    let bench = Bench::new(Config::default());
    let error = bench.get(named("demo")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    let (got, worker) = tokio::join!(bench.get(named("demo")), async {
        tokio::time::sleep(Duration::from_secs(9)).await;
        bench.worker(record("a", &["demo"])).await
    });
    got.assert_undisturbed(SEED, 4, 0);
    drop(worker);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_has_just_gone_is_unavailable_rather_than_unknown() {
    let bench = Bench::new(Config::default());
    let (_other, _b) = bench.worker(record("b", &["other"])).await;
    let (_worker, registration) = bench.worker(record("a", &["demo"])).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    bench.leave(registration).await;
    let error = bench.get(named("demo")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    tokio::time::sleep(Duration::from_secs(301)).await;
    let error = bench.get(named("demo")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::ModelUnknown), "{error}");
}

#[tokio::test(start_paused = true)]
async fn streams_spread_over_workers() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    let (b, _b) = bench.worker(record("b", &["demo"])).await;
    for worker in [&a, &b] {
        worker.plays((0..8).map(|_| Play::Hold { at: 2 }));
    }
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = bench.generate(Request::new(request(100))).await.unwrap();
        read(&mut stream).await;
        streams.push(stream);
    }
    a.until_active(4).await;
    b.until_active(4).await;
    assert_eq!(bench.metric("tercet_worker_outstanding{worker=\"a\"}"), 4.0);
    // Room at one: it gets the next, and the ones after it until they are even.
    let at_a = a.seen().len();
    drop(streams);
    a.until_active(0).await;
    b.until_active(0).await;
    assert_eq!(bench.metric("tercet_worker_outstanding{worker=\"a\"}"), 0.0);

    // A long request weighs more than two short ones.
    a.script.lock().unwrap().clear();
    b.script.lock().unwrap().clear();
    for worker in [&a, &b] {
        worker.plays((0..8).map(|_| Play::Hold { at: 2 }));
    }
    let mut held = Vec::new();
    for max_tokens in [1000, 10, 10] {
        let mut stream = bench.generate(Request::new(request(max_tokens))).await.unwrap();
        read(&mut stream).await;
        held.push(stream);
    }
    let counts = [a.seen().len() - at_a, b.seen().len() - (8 - at_a)];
    assert!(counts == [1, 2] || counts == [2, 1], "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_draining_worker_gets_no_more_requests() {
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Refuse(Reason::Draining.status("stopping"))]);
    let (b, registration) = bench.worker(record("b", &["demo"])).await;
    while a.seen().is_empty() {
        bench.get(named("")).await.assert_undisturbed(SEED, 4, 0);
    }
    for _ in 0..4 {
        bench.get(named("")).await.assert_undisturbed(SEED, 4, 0);
    }
    assert_eq!(a.seen().len(), 1);
    assert!(b.seen().len() >= 4);

    // Not even when it is the last one, nor after any time.
    bench.leave(registration).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let error = bench.get(named("")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    assert_eq!(a.seen().len(), 1);

    // Its next incarnation is another worker.
    let mut again = record("a", &["demo"]);
    again.epoch = 2;
    let _again = bench.register(again).await;
    bench.get(named("")).await.assert_undisturbed(SEED, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn a_failing_worker_is_left_alone_for_longer_each_time() {
    let config = Config::default();
    let bench = Bench::new(config.clone());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.wire.state.send_replace(WireState::Down);
    let begun = Instant::now();
    let (got, ()) = tokio::join!(bench.get(request(4)), async {
        // Tried at 0, 250, 750 and 1750 ms: each try refused doubles the wait.
        tokio::time::sleep(Duration::from_millis(800)).await;
        a.wire.state.send_replace(WireState::Up);
    });
    got.assert_undisturbed(SEED, 4, 0);
    let elapsed = begun.elapsed();
    assert!(elapsed >= config.ejection * 7, "{elapsed:?}");
    assert!(elapsed < config.ejection * 8, "{elapsed:?}");
    assert_eq!(a.seen().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_broken_connection_counts_once_however_many_streams_it_had() {
    let config = Config::default();
    let bench = Bench::new(config.clone());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays((0..7).map(|_| Play::Hold { at: 2 }));
    let mut streams = Vec::new();
    for _ in 0..7 {
        let mut stream = bench.generate(Request::new(request(4))).await.unwrap();
        read(&mut stream).await;
        streams.push(stream);
    }
    a.until_active(7).await;
    a.wire.state.send_replace(WireState::Down);
    a.until_active(0).await;
    a.wire.state.send_replace(WireState::Up);
    let begun = Instant::now();
    let all = futures::future::join_all(streams.into_iter().map(async |mut stream| {
        loop {
            if let v1::generate_response::Event::Finished(_) = read(&mut stream).await {
                return;
            }
        }
    }));
    all.await;
    assert!(begun.elapsed() < config.ejection * 2, "{:?}", begun.elapsed());
    assert_eq!(a.seen().len(), 14);
}

#[tokio::test(start_paused = true)]
async fn a_worker_without_room_costs_no_move() {
    let bench = Bench::new(Config { max_moves: 0, ..Config::default() });
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    let full =
        || Play::Refuse(Reason::Overloaded.status_retry_after("full", Duration::from_secs(1)));
    a.plays((0..3).map(|_| full()));
    let begun = Instant::now();
    bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    assert_eq!(begun.elapsed(), Duration::from_secs(3), "it asked when it was told to");

    a.plays((0..100).map(|_| full()));
    let error = bench.get(request(4)).await.error.unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(tercet_proto::retry_after(&error), Some(Duration::from_secs(1)));
}

#[tokio::test(start_paused = true)]
async fn workers_that_disagree_about_a_model_do_not_share_it() {
    let bench = Bench::new(Config::default());
    let mut odd = record("a", &[]);
    odd.models.push(model("demo", "odd one"));
    let (a, _a) = bench.worker(odd).await;
    let (b, _b) = bench.worker(record("b", &["demo"])).await;
    let (c, _c) = bench.worker(record("c", &["demo"])).await;
    for _ in 0..6 {
        bench.get(request(4)).await.assert_undisturbed(SEED, 4, 0);
    }
    assert!(a.seen().is_empty());
    assert_eq!(b.seen().len() + c.seen().len(), 6);
    let models = bench.service.list_models(Request::new(v1::ListModelsRequest {})).await.unwrap();
    let models = models.into_inner().models;
    assert_eq!(models.len(), 1);
    assert_eq!(models[0].identity, "demo");
}

#[tokio::test(start_paused = true)]
async fn single_answers_are_tried_twice() {
    let tokenize =
        || Request::new(v1::TokenizeRequest { text: "hi".to_owned(), ..Default::default() });
    let bench = Bench::new(Config::default());
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    let (b, _b) = bench.worker(record("b", &["demo"])).await;
    let calls = || *a.unary_calls.lock().unwrap() + *b.unary_calls.lock().unwrap();
    for worker in [&a, &b] {
        worker.unary.lock().unwrap().push_back(Status::unavailable("gone"));
    }
    let error = bench.service.tokenize(tokenize()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(calls(), 2);

    tokio::time::sleep(Duration::from_secs(1)).await;
    a.wire.state.send_replace(WireState::Down);
    for _ in 0..2 {
        let answer = bench.service.tokenize(tokenize()).await.unwrap().into_inner();
        assert_eq!(answer.tokens.unwrap().ids, [104, 105]);
    }
    assert_eq!(calls(), 4);

    b.unary.lock().unwrap().push_back(Status::invalid_argument("no"));
    let score = |ids| {
        Request::new(v1::ScoreRequest { tokens: Some(v1::TokenIds { ids }), ..Default::default() })
    };
    let error = bench.service.score(score(vec![1, 2])).await.unwrap_err();
    assert_eq!(error.message(), "no");
    assert_eq!(calls(), 5);
    let answer = bench.service.score(score(vec![1, 2])).await.unwrap().into_inner();
    assert_eq!(answer.top_ids, [1, 2]);
    let error = bench.service.score(score(vec![1])).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(calls(), 6, "not sent to a worker");
}

#[tokio::test(start_paused = true)]
async fn a_worker_dialed_anew_keeps_streams_apart() {
    let bench = Bench::new(Config::default());
    let (a, mut registration) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::Hold { at: 2 }]);
    let mut stream = bench.generate(Request::new(request(4))).await.unwrap();
    read(&mut stream).await;
    // A changed record of the same incarnation keeps the channel and the load.
    let changed = registration.update(|record| record.max_sequences = 2);
    bench.noticed(changed).await.unwrap();
    assert_eq!(bench.metric("tercet_worker_outstanding{worker=\"a\"}"), 1.0);
    let got = collect(bench.generate(Request::new(request(4))).await.unwrap(), Vec::new()).await;
    got.assert_undisturbed(SEED, 4, 0);
    drop(stream);
    a.until_active(0).await;
    assert_eq!(bench.metric("tercet_worker_outstanding{worker=\"a\"}"), 0.0);
}
