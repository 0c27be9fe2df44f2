use tercet_proto::v1::worker_client::WorkerClient;

use super::*;

/// Asks for load reports.
async fn watch(node: &Node, interval_millis: u32) -> Streaming<v1::LoadReport> {
    let request = v1::WatchLoadRequest { interval_millis };
    let reports = soon("reports", WorkerClient::new(node.channel()).watch_load(request)).await;
    reports.unwrap().into_inner()
}

/// Returns the next report that is as wanted.
async fn report_where(
    reports: &mut Streaming<v1::LoadReport>,
    what: &str,
    wanted: impl Fn(&v1::LoadReport) -> bool,
) -> v1::LoadReport {
    soon(what, async {
        loop {
            let report = reports.message().await.unwrap().expect("the worker still runs");
            if wanted(&report) {
                return report;
            }
        }
    })
    .await
}

#[tokio::test]
async fn reports_tell_what_is_computed() {
    let (node, registry) = whole(options()).await;
    // Nothing but the first report and changes comes within the patience of a test.
    let mut reports = watch(&node, 10_000).await;
    let idle = report_where(&mut reports, "the first report", |_| true).await;
    let view = registry.watch().borrow().clone();
    let record = view.workers.values().next().unwrap();
    assert_eq!((idle.epoch, idle.state()), (record.epoch, v1::WorkerState::Ready));
    let [model] = idle.models.as_slice() else { panic!("{idle:?}") };
    assert_eq!(model.generation, record.models[0].generation);
    assert_eq!((model.name.as_str(), model.state()), ("demo", v1::ModelState::Ready));
    assert_eq!((model.running, model.waiting, model.outstanding_tokens), (0, 0, 0));
    assert!(model.steps >= 1, "the warm-up took a step: {model:?}");
    let before = model.clone();

    let mut stream = begin(&node, request(1000)).await.unwrap();
    let busy = report_where(&mut reports, "a busy worker", |report| {
        report.models[0].running + report.models[0].waiting == 1
            && report.models[0].outstanding_tokens > 0
    })
    .await;
    let owed = busy.models[0].outstanding_tokens;
    assert!((1..=1000 + 64).contains(&owed), "{busy:?}");
    while !matches!(next(&mut stream).await.unwrap(), Some(Event::Delta(_))) {}
    let load = node.model().meter.outstanding();
    assert!(load < 1000, "the prompt is read and a token has come, yet {load} are owed");
    drop(stream);
    let after = report_where(&mut reports, "an idle worker", |report| {
        let model = &report.models[0];
        model.running + model.waiting == 0 && model.outstanding_tokens == 0
    })
    .await;
    let model = &after.models[0];
    assert!(model.steps > before.steps, "{before:?}, then {model:?}");
    assert!(model.decode_tokens_per_second > 0.0, "{model:?}");
    assert!(model.prefill_tokens_per_second > 0.0, "{model:?}");
    assert!(model.free_kv_tokens >= before.free_kv_tokens.min(64), "{model:?}");
}

#[tokio::test]
async fn reports_come_as_often_as_asked_for() {
    let (node, _registry) = whole(options()).await;
    let begun = time::Instant::now();
    let mut reports = watch(&node, 1).await;
    for _ in 0..5 {
        report_where(&mut reports, "a report", |_| true).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(4 * 50), "never more often than that");
    let default = crate::report::interval(&v1::WatchLoadRequest::default());
    assert_eq!(default, Duration::from_millis(250));
    let seldom = v1::WatchLoadRequest { interval_millis: u32::MAX };
    assert_eq!(crate::report::interval(&seldom), Duration::from_secs(10));
}

#[tokio::test]
async fn a_drain_is_reported_and_ends_the_reports() {
    let (mut node, _registry) = whole(options()).await;
    let mut reports = watch(&node, 10_000).await;
    report_where(&mut reports, "the first report", |_| true).await;
    let mut stream = begin(&node, request(200)).await.unwrap();
    node.stop();
    let draining = report_where(&mut reports, "the drain", |report| {
        report.state() == v1::WorkerState::Draining
    })
    .await;
    assert_eq!(draining.models[0].state(), v1::ModelState::Draining);
    while next(&mut stream).await.unwrap().is_some() {}
    soon("the end of the reports", async {
        // Closed in good order, or with the connection.
        while let Ok(Some(_)) = reports.message().await {}
    })
    .await;
    node.ended().await.unwrap();
}
