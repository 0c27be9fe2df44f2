//! The synthetic worker keeps the promises of a real one: tests of the cluster stand on that.

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use tercet_proto::{
    Reason,
    v1::{
        FinishReason, Resume, WatchLoadRequest, WorkerState, generate_request::Input,
        worker_client::WorkerClient,
    },
};
use tercet_tests::{
    Client, PATIENCE, collect, connect, sampled, serving,
    synthetic::{Options, SyntheticWorker},
};
use tokio::time;

#[tokio::test]
async fn a_stream_goes_on_at_any_index_on_another_worker() -> Result<()> {
    const TOKENS: u32 = 12;
    let fast = Options { rate: 2000.0, ..Options::new("fast".parse()?) };
    let one = SyntheticWorker::start(&fast)?;
    let other = SyntheticWorker::start(&Options { id: "other".parse()?, ..fast })?;
    for worker in [&one, &other] {
        serving(worker.address()).await?;
    }
    let first = Client::connect(one.address()).await?;
    let second = Client::connect(other.address()).await?;
    let request = sampled(Input::Prompt("To be".to_owned()), 7, TOKENS);
    let whole = first.generate(request.clone()).await?;
    ensure!(whole.ids.len() == usize::try_from(TOKENS)?);
    ensure!(whole.finished.reason() == FinishReason::MaxTokens);

    let mut texts = vec![0];
    let messages = first.open(request.clone()).await?;
    collect(messages, |delta| texts.push(texts[texts.len() - 1] + delta.text.len())).await?;
    ensure!(texts.len() == whole.ids.len() + 1);
    for (cut, told) in texts.into_iter().enumerate() {
        let mut resumed = request.clone();
        resumed.resume = Some(Resume { seed: 7, token_ids: whole.ids[..cut].to_vec() });
        let mut stream = second.open(resumed).await?;
        let (mut ids, mut text, mut finished) = (whole.ids[..cut].to_vec(), String::new(), None);
        while let Some(message) = stream.message().await? {
            use tercet_proto::v1::generate_response::Event;
            match message.event {
                Some(Event::Delta(delta)) => {
                    ensure!(usize::try_from(delta.index)? == ids.len());
                    ids.extend(delta.token_ids);
                    text.push_str(&delta.text);
                }
                Some(Event::Finished(end)) => finished = Some(end),
                _ => {}
            }
        }
        ensure!(ids == whole.ids, "resumed at {cut}: {ids:?}");
        ensure!(text == whole.text[told..], "resumed at {cut}: {text:?}");
        let mut finished = finished.unwrap_or_default();
        ensure!(finished.timings.take().is_some());
        ensure!(finished == whole.finished, "resumed at {cut}: {finished:?}");
    }
    Ok(())
}

#[tokio::test]
async fn what_finds_no_room_is_refused_and_what_is_left_in_a_drain_moves() -> Result<()> {
    let options = Options {
        rate: 20.0,
        slots: 2,
        queue: 1,
        drain_millis: 100,
        ..Options::new("narrow".parse()?)
    };
    let mut worker = SyntheticWorker::start(&options)?;
    serving(worker.address()).await?;
    let client = Client::connect(worker.address()).await?;
    let request = |seed| sampled(Input::Prompt("To be".to_owned()), seed, 10_000);
    let mut streams = try_join_all((0..3).map(|seed| client.open(request(seed)))).await?;
    let refused = client.open(request(3)).await.expect_err("two run and one waits");
    let refused = refused.downcast::<tonic::Status>()?;
    ensure!(Reason::of(&refused) == Some(Reason::Overloaded), "{refused}");
    ensure!(tercet_proto::retry_after(&refused).is_some());

    worker.process().signal("TERM")?;
    for stream in &mut streams {
        let status = loop {
            match stream.message().await {
                Ok(message) => ensure!(message.is_some(), "ended without a word"),
                Err(status) => break status,
            }
        };
        ensure!(Reason::of(&status) == Some(Reason::Draining), "{status}");
    }
    ensure!(worker.process().wait()?.success());
    Ok(())
}

#[tokio::test]
async fn reports_tell_what_goes_on() -> Result<()> {
    let options = Options { rate: 50.0, slots: 1, queue: 1, ..Options::new("told".parse()?) };
    let worker = SyntheticWorker::start(&options)?;
    serving(worker.address()).await?;
    let client = Client::connect(worker.address()).await?;
    let mut load = WorkerClient::new(connect(worker.address()).await?);
    let request = WatchLoadRequest { interval_millis: 50 };
    let mut reports = load.watch_load(request).await?.into_inner();
    let _streams = try_join_all(
        (0..2).map(|seed| client.open(sampled(Input::Prompt("To be".to_owned()), seed, 10_000))),
    )
    .await?;
    let steps = async {
        let mut before = None;
        loop {
            let report = reports.message().await?.context("the reports ended")?;
            ensure!(report.state() == WorkerState::Ready, "{report:?}");
            let model = report.models.first().context("no model")?;
            if (model.running, model.waiting) == (1, 1) {
                ensure!((1..=20_000).contains(&model.outstanding_tokens), "{model:?}");
                match before {
                    Some(before) if model.steps > before => return Ok(()),
                    _ => before = Some(model.steps),
                }
            }
        }
    };
    time::timeout(PATIENCE, steps).await?
}
