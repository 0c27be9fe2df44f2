use std::time::Duration;

use tercet_cluster::Registry as _;
use tercet_proto::v1::{self, admin_server::Admin as _};
use tonic::{Code, Request};

use super::bench::{Bench, PATIENCE, read, record, request};
use crate::Config;
use crate::admin::{AdminService, Administration};
use crate::fleet::Answer;

fn admin(bench: &Bench) -> AdminService {
    Administration::new(bench.shared.clone(), bench.registry.watch()).service()
}

async fn status(admin: &AdminService) -> v1::GatewayStatus {
    let answer = admin.get_status(Request::new(v1::GetStatusRequest {})).await.unwrap();
    answer.into_inner().status.unwrap()
}

#[tokio::test(start_paused = true)]
async fn operators_see_what_the_gateway_knows() {
    let bench = Bench::new(Config { max_streams: 9, ..Config::default() });
    let admin = admin(&bench);
    assert_eq!(status(&admin).await.workers, []);
    let (_a, place) = bench.reporting(record("a", &["demo"])).await;
    let (_b, _stays) = bench.worker(record("b", &["demo"])).await;
    bench.until_answer("b", Answer::Unjudged).await;
    let mut stream = bench.generate(Request::new(request(12))).await.unwrap();
    read(&mut stream).await;

    let seen = status(&admin).await;
    assert_eq!((seen.streams, seen.max_streams, seen.draining), (1, 9, false));
    let [first, second] = seen.workers.as_slice() else { panic!("{seen:?}") };
    assert_eq!((first.worker_id.as_str(), second.worker_id.as_str()), ("a", "b"));
    assert_eq!(
        (first.health(), second.health()),
        (v1::WorkerHealth::Answering, v1::WorkerHealth::Unjudged)
    );
    assert_eq!(first.streams + second.streams, 1);
    assert!(first.report_age_seconds.is_some_and(|age| age < 1.0), "{first:?}");
    assert!(first.models[0].load.is_some() && second.models[0].load.is_none());
    assert_eq!(first.state(), v1::WorkerState::Ready);
    let [model] = seen.models.as_slice() else { panic!("{seen:?}") };
    assert_eq!((model.name.as_str(), model.ready_workers, model.workers), ("demo", 2, 2));
    assert_eq!(model.identity, first.models[0].identity);

    // The registry loses one that answers all the same.
    assert!(!first.kept);
    bench.leave(place).await;
    let kept: Vec<_> = status(&admin).await.workers.iter().map(|worker| worker.kept).collect();
    assert_eq!(kept, [true, false]);
}

#[tokio::test(start_paused = true)]
async fn workers_are_told_to_drain_by_their_names() {
    let bench = Bench::new(Config::default());
    let (_a, _place) = bench.reporting(record("a", &["demo"])).await;
    let (_b, _stays) = bench.worker(record("b", &["demo"])).await;
    bench.until_answer("b", Answer::Unjudged).await;
    let admin = admin(&bench);
    let drain = |worker: &str| {
        let worker_id = worker.to_owned();
        admin.drain_worker(Request::new(v1::DrainWorkerRequest { worker_id }))
    };
    let unknown = drain("c").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("\"c\"") && unknown.message().contains("a, b"), "{unknown}");
    let older = drain("b").await.unwrap_err();
    assert_eq!(older.code(), Code::Unimplemented);
    assert!(older.message().contains("SIGTERM"), "{older}");

    drain("a").await.unwrap();
    let gone = async {
        while status(&admin).await.workers[0].state() != v1::WorkerState::Draining {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    assert!(bench.link("a").is_leaving());
}
