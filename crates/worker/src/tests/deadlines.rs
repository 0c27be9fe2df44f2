//! A request whose caller has stopped waiting is not computed.

use tonic::{Code, Request};

use super::*;

/// Computes one row a step, slowly, of one sequence at a time.
fn slow() -> EngineOptions {
    let isa = Some("scalar".parse().unwrap());
    EngineOptions { isa, max_sequences: 1, prefill_chunk: 1, ..options() }
}

/// Asks with a deadline that only the server watches over, and returns the tokens that came before
/// it passed.
async fn expire(node: &Node, asked: v1::GenerateRequest, deadline: &'static str) -> usize {
    let mut asked = Request::new(asked);
    asked.metadata_mut().insert("grpc-timeout", deadline.parse().unwrap());
    let mut tokens = 0;
    let ended = async {
        let mut stream = node.client().generate(asked).await?.into_inner();
        while let Some(message) = stream.message().await? {
            if let Some(Event::Delta(delta)) = message.event {
                tokens += delta.token_ids.len();
            }
        }
        Ok(())
    };
    let status: Status = soon("the deadline", ended).await.unwrap_err();
    // CANCELLED is tonic's, before the response headers.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status}");
    tokens
}

#[tokio::test]
async fn a_deadline_in_the_queue_is_kept_and_nothing_is_computed() {
    let (node, _registry) = whole(slow()).await;
    let expected = generate(&node, request(200)).await.unwrap();
    let mut stream = begin(&node, request(200)).await.unwrap();
    let Ok(Some(Event::Started(started))) = next(&mut stream).await else { panic!("no start") };
    eventually("the first one runs", || node.load().running == 1).await;
    assert_eq!(expire(&node, request(5), "20m").await, 0);
    eventually("the queue is empty", || node.load().waiting == 0).await;
    assert_eq!(read_on(&mut stream, started, 0).await.unwrap(), expected);
}

#[tokio::test]
async fn a_deadline_in_the_prefill_ends_it() {
    let (node, _registry) = whole(slow()).await;
    let context = demo::model().unwrap().config.context;
    let long = v1::TokenIds { ids: vec![1; context - 10] };
    let asked = v1::GenerateRequest { input: Some(Input::Tokens(long)), ..request(5) };
    assert_eq!(expire(&node, asked, "60m").await, 0, "the prefill takes longer than that");
    eventually("the engine is idle", || node.load().running == 0).await;
    assert_eq!(generate(&node, request(5)).await.unwrap().ids.len(), 5);
}
