//! Models that come and go while their workers stay.

use std::time::Duration;

use tercet_cluster::ModelState;
use tercet_proto::v1::inference_server::Inference;
use tercet_proto::{InvalidRequest, Reason, v1};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::bench::{Bench, SEED, record, request};
use super::fake::Play;
use crate::Config;

fn named(model: &str) -> v1::GenerateRequest {
    v1::GenerateRequest { model: model.to_owned(), ..request(4) }
}

#[tokio::test(start_paused = true)]
async fn a_model_that_drains_takes_its_neighbours_along_nowhere() {
    let bench = Bench::new(Config::default());
    let (worker, mut registration) = bench.worker(record("a", &["one", "two"])).await;
    // Told by the worker before the registry knows.
    worker.plays([Play::Refuse(Reason::Draining.status("on its way out"))]);
    let error = bench.get(named("one")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
    bench.get(named("two")).await.assert_undisturbed(SEED, 4, 0);

    // Loaded again, by the same worker: a view in between may never have been seen.
    let reloaded = registration.update(|record| record.models[0].generation += 1);
    bench.noticed(reloaded).await.unwrap();
    bench.get(named("one")).await.assert_undisturbed(SEED, 4, 0);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_fails_takes_its_neighbours_along_nowhere() {
    let bench = Bench::new(Config::default());
    let (worker, mut registration) = bench.worker(record("a", &["one", "two"])).await;
    worker.plays([Play::Refuse(Reason::WorkerFailed.status("its compute thread broke down"))]);
    let begun = Instant::now();
    let (one, two) = tokio::join!(bench.get(named("one")), bench.get(named("two")));
    one.assert_undisturbed(SEED, 4, 0);
    two.assert_undisturbed(SEED, 4, 0);
    assert!(begun.elapsed() > Duration::ZERO, "the model was left alone for a while");
    let begun = Instant::now();
    let failed = registration.update(|record| record.models[0].state = ModelState::Failed);
    bench.noticed(failed).await.unwrap();
    bench.get(named("two")).await.assert_undisturbed(SEED, 4, 0);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let error = bench.get(named("one")).await.error.unwrap();
    assert_eq!(Reason::of(&error), Some(Reason::NoWorker), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_model_that_was_unloaded_is_unknown_at_once() {
    let bench = Bench::new(Config::default());
    let (_worker, mut registration) = bench.worker(record("a", &["one", "two"])).await;
    let unloaded = registration.update(|record| drop(record.models.remove(0)));
    bench.noticed(unloaded).await.unwrap();
    let begun = Instant::now();
    let error = bench.get(named("one")).await.error.unwrap();
    assert_eq!((error.code(), begun.elapsed()), (Code::NotFound, Duration::ZERO), "{error}");
    assert!(error.message().contains("two"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_lists_a_few_of_many_models() {
    let bench = Bench::new(Config::default());
    let names: Vec<_> = (10..40).map(|nth| format!("model-{nth}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let (_worker, _registration) = bench.worker(record("a", &names)).await;
    let error = bench.get(named("another")).await.error.unwrap();
    assert!(error.message().ends_with("model-16, model-17 and 22 more"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_has_just_unloaded_a_model_is_passed_over() {
    let bench = Bench::new(Config::default());
    let unknown = || Play::Refuse(Reason::ModelUnknown.status("not served here"));
    let (a, _a) = bench.worker(record("a", &["one"])).await;
    let (b, _b) = bench.worker(record("b", &["one"])).await;
    a.plays([unknown()]);
    for _ in 0..3 {
        bench.get(named("one")).await.assert_undisturbed(SEED, 4, 0);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (1, 3));
}

/// Has the gateway answer each call that any worker with the model can.
async fn ask(bench: &Bench, model: &str) -> Result<[String; 3], Status> {
    let model = model.to_owned();
    let chat = v1::Chat {
        messages: vec![v1::ChatMessage { role: "user".to_owned(), content: "hi".to_owned() }],
        ..Default::default()
    };
    let request =
        v1::TokenizeRequest { model: model.clone(), chat: Some(chat), ..Default::default() };
    let tokenized = bench.service.tokenize(Request::new(request)).await?.into_inner();
    assert_eq!(tokenized.tokens.as_ref().unwrap().ids, [104, 105]);
    let request = v1::DetokenizeRequest {
        model: model.clone(),
        tokens: tokenized.tokens,
        ..Default::default()
    };
    let detokenized = bench.service.detokenize(Request::new(request)).await?.into_inner();
    let described = bench.service.get_model(Request::new(v1::GetModelRequest { model })).await?;
    let name = described.into_inner().model.unwrap().name;
    Ok([tokenized.rendered, detokenized.text, name])
}

#[tokio::test(start_paused = true)]
async fn any_worker_with_the_model_tells_of_it() {
    let bench = Bench::new(Config::default());
    let (one, _one) = bench.worker(record("a", &["one"])).await;
    // The only model goes by no name, and the worker is told which it is.
    assert_eq!(ask(&bench, "").await.unwrap(), ["hi", "hi", "one"]);
    let (two, _two) = bench.worker(record("b", &["two"])).await;
    assert_eq!(ask(&bench, "two").await.unwrap(), ["hi", "hi", "two"]);
    let calls = || [&one, &two].map(|worker| *worker.unary_calls.lock().unwrap());
    assert_eq!(calls(), [3, 3]);

    let refusals = async |model: &str| -> Vec<Status> {
        let model = model.to_owned();
        let text = v1::TokenizeRequest { model: model.clone(), ..Default::default() };
        let ids = v1::DetokenizeRequest { model: model.clone(), ..Default::default() };
        vec![
            bench.service.tokenize(Request::new(text)).await.unwrap_err(),
            bench.service.detokenize(Request::new(ids)).await.unwrap_err(),
            bench.service.get_model(Request::new(v1::GetModelRequest { model })).await.unwrap_err(),
        ]
    };
    for refused in refusals("three").await {
        let expected = (Code::NotFound, Some(Reason::ModelUnknown));
        assert_eq!((refused.code(), Reason::of(&refused)), expected, "{refused}");
    }
    for refused in refusals("").await {
        let invalid = InvalidRequest::of(&refused).unwrap();
        assert_eq!(invalid.violations()[0].field, "model", "{refused}");
    }
    let both = v1::TokenizeRequest {
        model: "one".to_owned(),
        text: "a".to_owned(),
        chat: Some(v1::Chat::default()),
        ..Default::default()
    };
    let refused = bench.service.tokenize(Request::new(both)).await.unwrap_err();
    let invalid = InvalidRequest::of(&refused).unwrap();
    let fields: Vec<_> = invalid.violations().iter().map(|v| v.field.as_str()).collect();
    assert_eq!(fields, ["text", "chat.messages"]);
    assert_eq!(calls(), [3, 3], "refused without a worker");

    // What a worker finds wrong is passed on, field by field.
    let wrong = InvalidRequest::new("tokens.ids[0]", "must be below 7, got 9");
    two.unary.lock().unwrap().push_back(wrong.clone().into());
    let refused = ask(&bench, "two").await.unwrap_err();
    assert_eq!(InvalidRequest::of(&refused), Some(wrong));
}
