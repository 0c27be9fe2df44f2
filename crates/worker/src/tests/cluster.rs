use tercet_proto::Reason;
use tercet_proto::v1::{connect_request, connect_response, pipeline_client::PipelineClient};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::*;

type Sender = mpsc::Sender<v1::ConnectRequest>;
type Receiver = Streaming<v1::ConnectResponse>;

/// The hello of a head to the last layers of the built-in model.
fn hello(head: &str, epoch: u64) -> v1::Hello {
    let model = demo::model().unwrap();
    v1::Hello {
        model: "demo".to_owned(),
        header_digest: model.header_digest().to_vec(),
        epoch,
        first_layer: 1,
        next_addresses: Vec::new(),
        head: head.to_owned(),
    }
}

async fn connect(node: &Node, hello: v1::Hello) -> Result<(Sender, Receiver), Status> {
    let (sender, outgoing) = mpsc::channel(8);
    send(&sender, connect_request::Kind::Hello(hello)).await;
    let mut client = PipelineClient::new(node.channel());
    let answers = soon("the link", client.connect(ReceiverStream::new(outgoing))).await?;
    let mut answers = answers.into_inner();
    match answer(&mut answers).await? {
        connect_response::Kind::Ready(ready) => assert_eq!(ready.parts.len(), 3),
        other => panic!("{other:?}"),
    }
    Ok((sender, answers))
}

async fn send(sender: &Sender, kind: connect_request::Kind) {
    sender.send(v1::ConnectRequest { kind: Some(kind) }).await.unwrap();
}

async fn answer(answers: &mut Receiver) -> Result<connect_response::Kind, Status> {
    let message = soon("an answer", answers.message()).await?.expect("a status ends the link");
    Ok(message.kind.unwrap())
}

fn refusal(refused: Result<(Sender, Receiver), Status>) -> Option<Reason> {
    Reason::of(&refused.unwrap_err())
}

async fn last_stage() -> Node {
    let registry = MemoryRegistry::new();
    let node = Node::start("stage", stage(1..3), &registry).await;
    in_state(&registry, "stage", WorkerState::Ready).await;
    node
}

#[tokio::test]
async fn a_stage_serves_one_head_and_only_its_latest_epoch() {
    let node = last_stage().await;
    let (_sender, mut first) = connect(&node, hello("a", 5)).await.unwrap();
    assert_eq!(refusal(connect(&node, hello("a", 5)).await), Some(Reason::StaleEpoch));
    assert_eq!(refusal(connect(&node, hello("a", 4)).await), Some(Reason::StaleEpoch));
    assert_eq!(refusal(connect(&node, hello("b", 9)).await), Some(Reason::Overloaded));

    let (sender, second) = connect(&node, hello("a", 6)).await.unwrap();
    let replaced = answer(&mut first).await.unwrap_err();
    assert_eq!(Reason::of(&replaced), Some(Reason::StaleEpoch), "{replaced}");

    drop((sender, second));
    soon("the seat of a head that is gone", async {
        // The stage learns of the end by itself.
        while let Err(status) = connect(&node, hello("b", 1)).await {
            assert_eq!(Reason::of(&status), Some(Reason::Overloaded), "{status}");
        }
    })
    .await;
}

#[tokio::test]
async fn frames_that_do_not_belong_end_the_link() {
    let node = last_stage().await;
    let hidden = demo::model().unwrap().config.hidden;
    let run = |sequence: u64| v1::Run {
        sequence,
        position: 0,
        rows: 1,
        pages: vec![u32::try_from(sequence - 1).unwrap()],
        output: Some(v1::run::Output::Sample(v1::SampleOutput {})),
    };
    let sampler = v1::SamplerParameters {
        top_p: 1.0,
        repetition_penalty: 1.0,
        ..v1::SamplerParameters::default()
    };
    let opened = |sequence, pages| v1::OpenSequence {
        sequence,
        sampler: Some(sampler.clone()),
        traceparent: String::new(),
        pages,
        prompt_ids: Vec::new(),
        completion_ids: Vec::new(),
    };
    let good = v1::Step {
        epoch: 2,
        step: 0,
        open: vec![opened(1, Vec::new())],
        close: Vec::new(),
        runs: vec![run(1)],
        activations: vec![0; hidden * 4].into(),
    };
    let spoilt = [
        (v1::Step { epoch: 1, ..good.clone() }, Reason::StaleEpoch),
        (v1::Step { runs: vec![run(9)], ..good.clone() }, Reason::PipelineBroken),
        // Shares a page that is not full.
        (
            v1::Step { open: vec![opened(2, vec![0])], runs: vec![run(2)], ..good.clone() },
            Reason::PipelineBroken,
        ),
        // Writes a page that another sequence has.
        (
            v1::Step {
                open: vec![opened(2, Vec::new())],
                runs: vec![v1::Run { sequence: 2, ..run(1) }],
                ..good.clone()
            },
            Reason::PipelineBroken,
        ),
        (v1::Step { activations: vec![0; 8].into(), ..good.clone() }, Reason::PipelineBroken),
        (v1::Step { activations: vec![0; 7].into(), ..good.clone() }, Reason::InvalidRequest),
    ];
    for (head, (step, reason)) in spoilt.into_iter().enumerate() {
        let reached = soon("the seat", async {
            loop {
                if let Ok(link) = connect(&node, hello(&head.to_string(), 2)).await {
                    return link;
                }
            }
        });
        let (sender, mut answers) = reached.await;
        send(&sender, connect_request::Kind::Step(good.clone())).await;
        let result = answer(&mut answers).await.unwrap();
        assert!(
            matches!(&result, connect_response::Kind::Result(result) if result.results.len() == 1),
            "{result:?}"
        );
        let open = if step.runs == good.runs { Vec::new() } else { step.open.clone() };
        let second = v1::Step { step: 1, open, ..step };
        send(&sender, connect_request::Kind::Step(second)).await;
        let ended = answer(&mut answers).await.unwrap_err();
        assert_eq!(Reason::of(&ended), Some(reason), "{ended}");
    }
}

#[tokio::test]
async fn stages_of_other_models_are_refused() {
    let node = last_stage().await;
    let refused = |hello| async { refusal(connect(&node, hello).await) };
    let mismatch = Some(Reason::ModelMismatch);
    let other = v1::Hello { header_digest: vec![0; 32], ..hello("a", 1) };
    assert_eq!(refused(other).await, mismatch);
    assert_eq!(refused(v1::Hello { first_layer: 2, ..hello("a", 1) }).await, mismatch);
    let next_addresses = vec!["127.0.0.1:1".to_owned()];
    assert_eq!(refused(v1::Hello { next_addresses, ..hello("a", 1) }).await, mismatch);

    let (whole, _registry) = whole(options()).await;
    let status = connect(&whole, hello("a", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    let status = begin(&node, request(1)).await.unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::ModelUnknown), "a stage takes no requests");
}
