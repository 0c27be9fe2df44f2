use tercet_proto::Reason;

use super::*;

/// Starts a head and its later stages, cut at the given layers, and waits until all are ready.
pub(super) async fn pipeline(cuts: &[usize], registry: &MemoryRegistry) -> Vec<Node> {
    let bounds: Vec<usize> =
        [0].iter().chain(cuts).copied().chain([demo::model().unwrap().config.layers]).collect();
    let mut nodes = Vec::new();
    for (nth, range) in bounds.windows(2).enumerate() {
        let engine = EngineOptions { prefill_chunk: 7, ..stage(range[0]..range[1]) };
        nodes.push(Node::start(&format!("stage-{nth}"), engine, registry).await);
    }
    in_state(registry, "stage-0", WorkerState::Ready).await;
    nodes
}

/// What is compared between ways to compute.
#[derive(Debug, PartialEq)]
struct Outcome {
    answers: Vec<Answer>,
    logprobs: Vec<u32>,
    top_ids: Vec<u32>,
}

async fn outcome(node: &Node) -> Outcome {
    let mut asked = vec![request(30)];
    for seed in 1..6 {
        let mut other = request(20 + seed);
        other.sampling.as_mut().unwrap().seed = Some(seed.into());
        other.input = Some(Input::Prompt(PROMPT.repeat(usize::try_from(seed).unwrap())));
        asked.push(other);
    }
    let answers = futures::future::join_all(asked.into_iter().map(|asked| generate(node, asked)));
    let answers = answers.await.into_iter().collect::<Result<_, _>>().unwrap();
    let ids = tokenizer().encode_prompt(&PROMPT.repeat(9)).unwrap();
    let tokens = Some(v1::TokenIds { ids });
    let mut client = node.client();
    let scored = client.score(v1::ScoreRequest { model: String::new(), tokens });
    let scores = soon("the scores", scored).await.unwrap().into_inner();
    Outcome {
        answers,
        logprobs: scores.logprobs.iter().map(|logprob| logprob.to_bits()).collect(),
        top_ids: scores.top_ids,
    }
}

fn identity(registry: &MemoryRegistry, id: &str) -> String {
    let view = registry.watch().borrow().clone();
    view.workers[&id.parse().unwrap()].serves("demo").unwrap().identity.clone()
}

#[tokio::test]
async fn stages_change_no_bit_and_no_identity() {
    let (whole, whole_registry) = whole(options()).await;
    let expected = outcome(&whole).await;
    for cuts in [&[1][..], &[1, 2]] {
        let registry = MemoryRegistry::new();
        let nodes = pipeline(cuts, &registry).await;
        assert_eq!(outcome(&nodes[0]).await, expected, "cut at {cuts:?}");
        assert_eq!(identity(&registry, "stage-0"), identity(&whole_registry, "whole"));
        let view = registry.watch().borrow().clone();
        let serving: Vec<_> =
            view.workers.values().filter(|worker| worker.serves("demo").is_some()).collect();
        assert_eq!(serving.len(), 1, "only the head takes requests");
    }
}

#[tokio::test]
async fn a_lost_stage_breaks_streams_that_go_on_exactly_with_a_new_one() {
    let registry = MemoryRegistry::new();
    let mut nodes = pipeline(&[1], &registry).await;
    let undisturbed = generate(&nodes[0], request(200)).await.unwrap();

    let mut stream = begin(&nodes[0], request(200)).await.unwrap();
    let mut ids = Vec::new();
    let mut text = String::new();
    while ids.len() < 3 {
        if let Some(Event::Delta(delta)) = next(&mut stream).await.unwrap() {
            ids.extend(delta.token_ids);
            text.push_str(&delta.text);
        }
    }
    // Killed, without a word to anybody.
    let mut lost = nodes.pop().unwrap();
    lost.serving.shutdown().await;
    drop(lost);
    let broken = loop {
        match next(&mut stream).await {
            Ok(Some(Event::Delta(delta))) => {
                ids.extend(delta.token_ids);
                text.push_str(&delta.text);
            }
            Ok(other) => panic!("{other:?}"),
            Err(status) => break status,
        }
    };
    assert_eq!(Reason::of(&broken), Some(Reason::PipelineBroken), "{broken}");
    assert!(tercet_proto::is_movable(&broken));
    in_state(&registry, "stage-0", WorkerState::Loading).await;

    let new = Node::start("stage-1", stage(1..3), &registry).await;
    in_state(&registry, "stage-0", WorkerState::Ready).await;
    let resume = Some(v1::Resume { seed: 7, token_ids: ids.clone() });
    let rest = generate(&nodes[0], v1::GenerateRequest { resume, ..request(200) }).await.unwrap();
    ids.extend(rest.ids);
    assert_eq!(ids, undisturbed.ids);
    assert_eq!(text + &rest.text, undisturbed.text);
    assert_eq!(rest.finished, undisturbed.finished);
    drop(new);
}

#[tokio::test]
async fn a_stage_that_drains_is_let_go_when_the_streams_are_done() {
    let registry = MemoryRegistry::new();
    let mut nodes = pipeline(&[1], &registry).await;
    let mut stream = begin(&nodes[0], request(400)).await.unwrap();
    let started = match next(&mut stream).await {
        Ok(Some(Event::Started(started))) => started,
        other => panic!("{other:?}"),
    };
    nodes[1].stop();
    in_state(&registry, "stage-0", WorkerState::Loading).await;
    let refused = begin(&nodes[0], request(1)).await.unwrap_err();
    assert_eq!(Reason::of(&refused), Some(Reason::Loading), "nothing new begins");
    let answer = read_on(&mut stream, started, 0).await.unwrap();
    assert_eq!(answer.ids.len(), 400);
    nodes[1].ended().await.unwrap();
    assert!(nodes[0].condition.ready().is_err());
}

#[tokio::test]
async fn a_head_passes_over_a_stage_that_another_head_has() {
    let registry = MemoryRegistry::new();
    let nodes = pipeline(&[1], &registry).await;
    let second = Node::start("second", stage(0..1), &registry).await;
    in_state(&registry, "second", WorkerState::Loading).await;
    let spare = Node::start("stage-9", stage(1..3), &registry).await;
    in_state(&registry, "second", WorkerState::Ready).await;
    let (one, other) =
        tokio::join!(generate(&nodes[0], request(20)), generate(&second, request(20)));
    assert_eq!(one.unwrap(), other.unwrap());
    drop(spare);
}
