use tercet_proto::{InvalidRequest, Reason};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;

fn violation(status: &Status) -> (String, String) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let invalid = InvalidRequest::of(status).unwrap();
    let violation = &invalid.violations()[0];
    (violation.field.clone(), violation.description.clone())
}

fn with_ids(ids: Vec<u32>) -> v1::GenerateRequest {
    v1::GenerateRequest { input: Some(Input::Tokens(v1::TokenIds { ids })), ..request(5) }
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let (node, _registry) = whole(options()).await;
    let config = demo::model().unwrap().config;
    let (context, vocab) = (config.context, u32::try_from(config.vocab).unwrap());

    let named = v1::GenerateRequest { model: "other".to_owned(), ..request(5) };
    let status = generate(&node, named).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::NotFound, Some(Reason::ModelUnknown)));

    let status = generate(&node, with_ids(vec![1; context + 1])).await.unwrap_err();
    let (field, description) = violation(&status);
    assert_eq!(field, "tokens.ids");
    assert!(description.contains(&(context + 1).to_string()), "{description}");
    assert!(description.contains(&context.to_string()), "{description}");

    let status = generate(&node, with_ids(vec![1, vocab])).await.unwrap_err();
    assert_eq!(violation(&status).0, "tokens.ids[1]");

    let resume = |token_ids| Some(v1::Resume { seed: 7, token_ids });
    let asked = v1::GenerateRequest { resume: resume(vec![1, 2, vocab]), ..with_ids(vec![1]) };
    assert_eq!(violation(&generate(&node, asked).await.unwrap_err()).0, "resume.token_ids[2]");

    let eos = demo::model().unwrap().special.eos[0];
    let mut asked = v1::GenerateRequest { resume: resume(vec![1, eos, 2]), ..with_ids(vec![1]) };
    asked.stop.as_mut().unwrap().ignore_eos = None;
    assert_eq!(violation(&generate(&node, asked).await.unwrap_err()).0, "resume.token_ids[1]");

    let ids = v1::TokenIds { ids: vec![1, vocab] };
    let scored = v1::ScoreRequest { model: String::new(), tokens: Some(ids) };
    let status = node.client().score(scored).await.unwrap_err();
    assert_eq!(violation(&status).0, "tokens.ids[1]");

    // Nothing of this was a fault of the worker.
    assert_eq!(generate(&node, request(3)).await.unwrap().ids.len(), 3);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let narrow = EngineOptions { max_sequences: 1, max_waiting: 1, ..options() };
    let (node, _registry) = whole(narrow).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = begin(&node, request(1000)).await.unwrap();
        assert!(matches!(next(&mut stream).await, Ok(Some(Event::Started(_)))));
        held.push(stream);
    }
    let refused = begin(&node, request(5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(Reason::of(&refused), Some(Reason::Overloaded));
    assert!(tercet_proto::retry_after(&refused).is_some());
    assert!(tercet_proto::is_movable(&refused));
    assert!(node.metrics.encode().contains("reason=\"OVERLOADED\"} 1"));
    drop(held);
    eventually("there is room again", || node.load().running + node.load().waiting == 0).await;
    soon("room for a request", async {
        while let Err(status) = generate(&node, request(5)).await {
            assert_eq!(status.code(), Code::ResourceExhausted);
        }
    })
    .await;
}

#[tokio::test]
async fn requests_wait_elsewhere_until_the_worker_is_ready() {
    let registry = MemoryRegistry::new();
    // A head without later stages never gets ready.
    let node = Node::start("head", stage(0..1), &registry).await;
    in_state(&registry, "head", WorkerState::Loading).await;
    let mut health = HealthClient::new(node.channel());
    for service in ["", "tercet.v1.Inference"] {
        let asked = HealthCheckRequest { service: service.to_owned() };
        let status = soon("health", health.check(asked)).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::NotServing);
    }
    let refused = begin(&node, request(5)).await.unwrap_err();
    assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unavailable, Some(Reason::Loading)));
    assert!(tercet_proto::retry_after(&refused).is_some());
    assert!(node.condition.ready().is_err() && node.condition.live().is_ok());
}

#[tokio::test]
async fn health_turns_serving_once_the_model_is_warm() {
    let (node, _registry) = whole(options()).await;
    let mut health = HealthClient::new(node.channel());
    let asked = HealthCheckRequest { service: "tercet.v1.Inference".to_owned() };
    let mut watch = health.watch(asked).await.unwrap().into_inner();
    soon("serving", async {
        while watch.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    })
    .await;
    assert!(node.condition.ready().is_ok());
}
