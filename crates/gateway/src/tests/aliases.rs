use tercet_proto::v1::inference_server::Inference;
use tercet_proto::{Reason, v1};
use tonic::Request;

use super::bench::{Bench, SEED, collect, expected, record, request};
use super::fake::Play;
use crate::{Aliases, Config, SESSION_ID};

fn config(aliases: &[&str]) -> Config {
    let aliases = Aliases::new(aliases.iter().map(|alias| alias.parse().unwrap())).unwrap();
    Config { aliases, ..Config::default() }
}

fn named(model: &str, seed: u64) -> v1::GenerateRequest {
    let sampling = v1::Sampling { seed: Some(seed), ..v1::Sampling::default() };
    v1::GenerateRequest { model: model.to_owned(), sampling: Some(sampling), ..request(4) }
}

async fn listed(bench: &Bench) -> Vec<(String, String)> {
    let models = bench.service.list_models(Request::new(v1::ListModelsRequest {})).await.unwrap();
    let models = models.into_inner().models.into_iter();
    models.map(|model| (model.name, model.identity)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_split_is_the_same_for_a_request_that_is_resumed() {
    let bench = Bench::new(config(&["chat=old=70,new=30", "best=new"]));
    let (_a, _a_registration) = bench.worker(record("a", &["old"])).await;
    let (_b, _b_registration) = bench.worker(record("b", &["new"])).await;
    let mut new = 0;
    for seed in 0..100 {
        let first = bench.get(named("chat", seed)).await;
        first.assert_undisturbed(seed, 4, 0);
        let model = first.started.unwrap().model;
        new += u32::from(model == "new");
        let resume = v1::Resume { seed, token_ids: first.ids[..2].to_vec() };
        let resumed =
            v1::GenerateRequest { resume: Some(resume), sampling: None, ..named("chat", seed) };
        assert_eq!(bench.get(resumed).await.started.unwrap().model, model);
    }
    assert!((20..40).contains(&new), "{new} of 100");
    assert_eq!(bench.get(named("best", SEED)).await.started.unwrap().model, "new");

    // A session stays with its model, whatever its seeds.
    for session in ["one", "two", "three", "four"] {
        let mut models = Vec::new();
        for seed in 0..8 {
            let mut request = Request::new(named("chat", seed));
            request.metadata_mut().insert(SESSION_ID, session.parse().unwrap());
            let stream = bench.generate(request).await.unwrap();
            models.push(collect(stream, Vec::new()).await.started.unwrap().model);
        }
        assert!(models.iter().all(|model| *model == models[0]), "{session}: {models:?}");
    }
    let own = |name: &str, identity: &str| (name.to_owned(), identity.to_owned());
    assert_eq!(
        listed(&bench).await,
        [own("best", "new"), own("chat", ""), own("new", "new"), own("old", "old")]
    );
}

#[tokio::test(start_paused = true)]
async fn an_alias_that_leads_nowhere_says_so() {
    let bench = Bench::new(config(&["chat=gone", "lost=chat"]));
    let (worker, _registration) = bench.worker(record("a", &["demo"])).await;
    for name in ["chat", "lost"] {
        let error = bench.get(named(name, SEED)).await.error.unwrap();
        assert_eq!(Reason::of(&error), Some(Reason::ModelUnknown));
        let expected =
            format!("alias {name:?} leads to \"gone\", which is not served here, only: demo");
        assert_eq!(error.message(), expected);
    }
    assert_eq!(listed(&bench).await.len(), 1);
    assert!(worker.seen().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_an_alias_moves_within_its_model() {
    let bench = Bench::new(config(&["chat=demo"]));
    let (a, _a) = bench.worker(record("a", &["demo"])).await;
    a.plays([Play::End { at: 2 }]);
    let got = bench.get(named("chat", SEED)).await;
    assert_eq!(got.ids, expected(SEED, 4));
    assert_eq!(a.seen().len(), 2);
}
