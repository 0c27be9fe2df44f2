use tercet_proto::{Reason, v1::FinishReason};
use tonic::Code;

use super::*;

/// A long generation that has begun.
async fn begun(node: &Node) -> (Streaming<v1::GenerateResponse>, v1::Started) {
    let mut stream = begin(node, request(1000)).await.unwrap();
    match next(&mut stream).await {
        Ok(Some(Event::Started(started))) => (stream, started),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_drain_finishes_streams_and_refuses_new_ones() {
    let (mut node, registry) = whole(options()).await;
    let (mut stream, started) = begun(&node).await;
    // Connected before the listener closes.
    let mut client = node.client();
    client.list_models(v1::ListModelsRequest {}).await.unwrap();
    node.stop();
    in_state(&registry, "whole", WorkerState::Draining).await;
    let refused = client.generate(request(5)).await.unwrap_err();
    assert_eq!((refused.code(), Reason::of(&refused)), (Code::Unavailable, Some(Reason::Draining)));
    let answer = read_on(&mut stream, started, 0).await.unwrap();
    assert_eq!(answer.finished.reason(), FinishReason::MaxTokens);
    node.ended().await.unwrap();
    assert!(registry.watch().borrow().workers.is_empty(), "it has left");
}

#[tokio::test]
async fn streams_that_take_too_long_are_told_to_move() {
    let registry = MemoryRegistry::new();
    let mut node = Node::start_with("hasty", &registry, |config| {
        config.drain_timeout = Duration::ZERO;
        config.engine.isa = Some("scalar".parse().unwrap());
    })
    .await;
    in_state(&registry, "hasty", WorkerState::Ready).await;
    let (mut stream, started) = begun(&node).await;
    node.stop();
    let moved = read_on(&mut stream, started, 0).await.unwrap_err();
    assert_eq!((moved.code(), Reason::of(&moved)), (Code::Unavailable, Some(Reason::Draining)));
    assert!(tercet_proto::is_movable(&moved));
    node.ended().await.unwrap();
    view_where(&registry, "it has left", |view| view.workers.is_empty()).await;
}

#[tokio::test]
async fn a_worker_that_was_replaced_stops() {
    let (mut node, registry) = whole(options()).await;
    let replacement = Node::start("whole", options(), &registry).await;
    view_where(&registry, "the replacement", |view| {
        view.workers.values().all(|worker| worker.address == replacement.address)
    })
    .await;
    // The first one finds out when it has something to tell.
    node.model().enter(crate::core::Phase::Loading("a test"));
    assert!(matches!(node.ended().await, Err(ServeError::Cluster(_))));
    let view = in_state(&registry, "whole", WorkerState::Ready).await;
    assert_eq!(view.workers.values().next().unwrap().address, replacement.address);
}
