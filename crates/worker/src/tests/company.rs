use super::*;

/// Returns a request that asks for nothing else to be computed for that many tokens.
fn alone(max_tokens: u32, alone_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest { alone_tokens, ..request(max_tokens) }
}

#[tokio::test]
async fn a_request_alone_lets_others_in_after_its_tokens() {
    let slow = EngineOptions { isa: Some("scalar".parse().unwrap()), ..options() };
    let (node, _registry) = whole(slow).await;
    let mut first = begin(&node, alone(400, 200)).await.unwrap();
    let mut other = JoinSet::new();
    let mut client = node.client();
    other.spawn(async move { client.generate(request(4)).await.map(drop) });
    let mut ids = 0;
    while ids < 100 {
        match next(&mut first).await.unwrap() {
            Some(Event::Delta(delta)) => ids += delta.token_ids.len(),
            event => assert!(matches!(event, Some(Event::Started(_))), "{event:?}"),
        }
        assert!(ids >= 200 || other.try_join_next().is_none(), "let in after {ids} tokens");
    }
    // It goes on with others beside it.
    soon("the other", other.join_next()).await.unwrap().unwrap().unwrap();
    while next(&mut first).await.unwrap().is_some() {}
}

#[tokio::test]
async fn a_request_that_asks_to_be_alone_waits_for_the_others() {
    let (node, _registry) = whole(options()).await;
    let mut first = begin(&node, request(1000)).await.unwrap();
    next(&mut first).await.unwrap();
    let mut lone = JoinSet::new();
    let mut client = node.client();
    lone.spawn(async move { client.generate(alone(4, 2)).await.map(drop) });
    next(&mut first).await.unwrap();
    assert!(lone.try_join_next().is_none(), "another request is computed");
    drop(first);
    soon("its turn", lone.join_next()).await.unwrap().unwrap().unwrap();
}
