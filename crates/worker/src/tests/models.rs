//! Several models in one worker, loaded and unloaded while streams run.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use tercet_cluster::ModelState;
use tercet_engine::{Output, SamplingParams, SequenceRequest};
use tercet_proto::{
    InvalidRequest, Reason,
    v1::{load_model_response, worker_client::WorkerClient},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;
use crate::{ModelSource, ModelSpec};

/// A folder of models, removed at the end.
struct ModelDir(PathBuf);

impl ModelDir {
    /// Returns a folder with the built-in model as `good.gguf`, and a damaged one.
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "tercet-models-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/demo-model/demo.gguf");
        let bytes = fs::read(demo).unwrap();
        fs::write(dir.join("good.gguf"), &bytes).unwrap();
        fs::write(dir.join("cut.gguf"), &bytes[..bytes.len() / 2]).unwrap();
        // A weight code that does not exist: found only when the weights are read.
        let mut damaged = bytes;
        let end = damaged.len();
        damaged[end - 200_000..].fill(0xff);
        fs::write(dir.join("damaged.gguf"), damaged).unwrap();
        Self(dir)
    }
}

impl Drop for ModelDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Returns a worker with the built-in model under two names.
async fn two(dir: Option<&ModelDir>) -> (Node, MemoryRegistry) {
    let registry = MemoryRegistry::new();
    let node = Node::start_with("two", &registry, |config| {
        config.models = vec![named("a"), named("b")];
        config.model_dir = dir.map(|dir| dir.0.clone());
    })
    .await;
    for name in ["a", "b"] {
        state_of(&registry, name, ModelState::Ready).await;
    }
    (node, registry)
}

fn named(name: &str) -> ModelSpec {
    ModelSpec { source: ModelSource::BuiltIn, name: Some(name.to_owned()), kv_bytes: None }
}

/// Waits until the registry says so of a model.
async fn state_of(registry: &MemoryRegistry, name: &str, state: ModelState) {
    view_where(registry, &format!("{name} {state:?}"), |view| {
        let mut models = view.workers.values().flat_map(|worker| &worker.models);
        models.any(|model| model.name == name && model.state == state)
    })
    .await;
}

fn asking(model: &str, request: v1::GenerateRequest) -> v1::GenerateRequest {
    v1::GenerateRequest { model: model.to_owned(), ..request }
}

fn tokens_of(answer: &Answer) -> (&[u32], &str) {
    (&answer.ids, &answer.text)
}

async fn load(node: &Node, path: &str, name: &str, kv: u64) -> Result<v1::ModelInfo, Status> {
    let request =
        v1::LoadModelRequest { path: path.to_owned(), name: name.to_owned(), kv_memory: kv };
    let mut client = WorkerClient::new(node.channel());
    let mut events = soon("the loading", client.load_model(request)).await?.into_inner();
    let mut stages = Vec::new();
    loop {
        let message = soon("progress", events.message()).await?.expect("ready comes last");
        match message.event.unwrap() {
            load_model_response::Event::Progress(progress) => {
                assert!(progress.done_bytes <= progress.total_bytes, "{progress:?}");
                stages.push(progress.stage());
            }
            load_model_response::Event::Ready(info) => {
                assert!(stages.is_sorted(), "{stages:?}");
                assert_eq!(soon("the end", events.message()).await?, None);
                return Ok(info);
            }
        }
    }
}

async fn unload(node: &Node, name: &str, grace: Option<u64>) -> Result<u32, Status> {
    let request = v1::UnloadModelRequest { name: name.to_owned(), grace_millis: grace };
    let mut client = WorkerClient::new(node.channel());
    let unloaded = soon("the unloading", client.unload_model(request)).await?;
    Ok(unloaded.into_inner().moved_streams)
}

async fn describe(node: &Node) -> v1::DescribeResponse {
    let mut client = WorkerClient::new(node.channel());
    client.describe(v1::DescribeRequest {}).await.unwrap().into_inner()
}

/// Returns the models, after checking that their KV memory is that of the worker.
async fn models(node: &Node) -> Vec<String> {
    let described = describe(node).await;
    let held: u64 = described.models.iter().map(|held| held.kv_memory).sum();
    assert_eq!(held + described.unassigned_kv_memory, described.kv_memory);
    let info = described.models.into_iter().map(|held| held.model.unwrap());
    info.map(|model| model.name).collect()
}

async fn health(node: &Node, service: &str) -> Result<ServingStatus, Code> {
    let asked = HealthCheckRequest { service: service.to_owned() };
    let checked = soon("health", HealthClient::new(node.channel()).check(asked)).await;
    checked.map(|checked| checked.into_inner().status()).map_err(|status| status.code())
}

/// Breaks the compute thread of a model, as a defect of the engine would.
async fn break_down(model: &Hosted) {
    let (_, engine) = model.serving().unwrap();
    let request = SequenceRequest {
        prompt: vec![1],
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        output: Output::Generate { max_tokens: 3, stop_ids: Vec::new() },
        traceparent: String::new(),
        cache_salt: String::new(),
    };
    // Is told on the compute thread.
    let _handle = engine.submit(request, Box::new(|_| panic!("on purpose"))).unwrap();
    eventually("the end of the compute thread", || !engine.is_alive()).await;
}

#[tokio::test]
async fn each_request_gets_the_model_it_names() {
    let (node, _registry) = two(None).await;
    let (alone, _other) = whole(options()).await;
    let expected = generate(&alone, request(30)).await.unwrap();
    let (a, b) = tokio::join!(
        generate(&node, asking("a", request(30))),
        generate(&node, asking("b", request(30)))
    );
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!((a.started.model.as_str(), b.started.model.as_str()), ("a", "b"));
    assert_eq!((tokens_of(&a), tokens_of(&b)), (tokens_of(&expected), tokens_of(&expected)));

    let status = generate(&node, request(5)).await.unwrap_err();
    let violations = InvalidRequest::of(&status).unwrap();
    let [violation] = violations.violations() else { panic!("{status}") };
    assert_eq!(violation.field, "model");
    assert!(violation.description.contains("\"a\", \"b\""), "{status}");
    let status = generate(&node, asking("c", request(5))).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::NotFound, Some(Reason::ModelUnknown)));
    assert!(status.message().contains("\"a\", \"b\" are"), "{status}");

    let listed = node.client().list_models(v1::ListModelsRequest {}).await.unwrap().into_inner();
    let names: Vec<_> = listed.models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(models(&node).await, ["a", "b"]);
    assert_eq!(health(&node, "tercet.v1.Inference/a").await, Ok(ServingStatus::Serving));
    assert_eq!(health(&node, "tercet.v1.Inference/c").await, Err(Code::NotFound));
    let metrics = node.metrics.encode();
    let ready = "tercet_model_state{gen_ai_request_model=\"b\",state=\"ready\"} 1";
    assert!(metrics.contains(ready), "{metrics}");
}

#[tokio::test]
async fn a_model_is_loaded_while_streams_run() {
    let dir = ModelDir::new();
    let (node, registry) = two(Some(&dir)).await;
    let expected = generate(&node, asking("a", request(400))).await.unwrap();
    let mut stream = begin(&node, asking("a", request(400))).await.unwrap();
    let Ok(Some(Event::Started(started))) = next(&mut stream).await else { panic!("no start") };

    let info = load(&node, "good.gguf", "third", 0).await.unwrap();
    assert_eq!((info.name.as_str(), info.identity.len()), ("third", 64));
    state_of(&registry, "third", ModelState::Ready).await;
    assert_eq!(health(&node, "tercet.v1.Inference/third").await, Ok(ServingStatus::Serving));
    let third = generate(&node, asking("third", request(400))).await.unwrap();
    assert_eq!(tokens_of(&third), tokens_of(&expected));
    let during = read_on(&mut stream, started, 0).await.unwrap();
    assert_eq!(during, expected, "a stream that ran during the loading");

    let again = load(&node, "good.gguf", "third", 0).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    assert_eq!(models(&node).await, ["a", "b", "third"]);
}

#[tokio::test]
async fn of_two_loads_of_one_name_the_second_is_refused() {
    let dir = ModelDir::new();
    let (node, _registry) = two(Some(&dir)).await;
    let mut answers =
        futures::future::join_all((0..4).map(|_| load(&node, "good.gguf", "c", 1 << 20))).await;
    answers.sort_by_key(Result::is_err);
    assert!(answers[0].is_ok(), "{answers:?}");
    for refused in &answers[1..] {
        assert_eq!(refused.as_ref().unwrap_err().code(), Code::AlreadyExists, "{answers:?}");
    }
    assert_eq!(models(&node).await, ["a", "b", "c"]);
}

#[tokio::test]
async fn a_load_that_fails_changes_nothing() {
    let dir = ModelDir::new();
    let (node, _registry) = two(Some(&dir)).await;
    let before = describe(&node).await;
    for file in ["cut.gguf", "damaged.gguf", "nothing.gguf", "."] {
        let status = load(&node, file, "c", 0).await.unwrap_err();
        let invalid = InvalidRequest::of(&status).unwrap_or_else(|| panic!("{file}: {status:?}"));
        assert_eq!(invalid.violations()[0].field, "path", "{file}");
        assert_eq!(describe(&node).await, before, "{file}");
    }
    let status = load(&node, "good.gguf", "c", 100).await.unwrap_err();
    assert_eq!(InvalidRequest::of(&status).unwrap().violations()[0].field, "kv_memory");
    let status = load(&node, "good.gguf", "c", 1 << 40).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let numbers = [1 << 40, before.unassigned_kv_memory, before.kv_memory];
    for number in numbers {
        assert!(status.message().contains(&number.to_string()), "{number} in {status}");
    }
    assert_eq!(describe(&node).await, before);
    load(&node, "good.gguf", "c", 0).await.unwrap();
    assert_eq!(generate(&node, asking("a", request(5))).await.unwrap().ids.len(), 5);
}

#[tokio::test]
async fn without_a_folder_nothing_is_loaded_or_unloaded() {
    let (node, _registry) = two(None).await;
    let refused = [
        load(&node, "good.gguf", "c", 0).await.map(drop).unwrap_err(),
        unload(&node, "a", None).await.map(drop).unwrap_err(),
    ];
    for status in refused {
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains("--model-dir"), "{status}");
    }
    assert_eq!(models(&node).await, ["a", "b"]);
}

#[tokio::test]
async fn streams_finish_before_their_model_is_unloaded() {
    let dir = ModelDir::new();
    let (node, registry) = two(Some(&dir)).await;
    let expected = generate(&node, asking("b", request(300))).await.unwrap();
    let mut stream = begin(&node, asking("a", request(300))).await.unwrap();
    let Ok(Some(Event::Started(started))) = next(&mut stream).await else { panic!("no start") };
    let unloading = async {
        let reading = async {
            state_of(&registry, "a", ModelState::Draining).await;
            let refused = begin(&node, asking("a", request(5))).await.unwrap_err();
            assert_eq!(Reason::of(&refused), Some(Reason::Draining), "nothing new begins");
            let again = unload(&node, "a", None).await.unwrap_err();
            assert_eq!(again.code(), Code::FailedPrecondition, "{again}");
            let unnamed = generate(&node, request(5)).await.unwrap();
            assert_eq!(unnamed.started.model, "b", "the only one that stays");
            read_on(&mut stream, started, 0).await
        };
        tokio::join!(unload(&node, "a", None), reading)
    };
    let (moved, answer) = unloading.await;
    assert_eq!(moved.unwrap(), 0);
    assert_eq!(tokens_of(&answer.unwrap()), tokens_of(&expected));
    assert_eq!(models(&node).await, ["b"]);
    // Now the only one.
    assert_eq!(tokens_of(&generate(&node, request(300)).await.unwrap()), tokens_of(&expected));
    let gone = generate(&node, asking("a", request(5))).await.unwrap_err();
    assert_eq!(Reason::of(&gone), Some(Reason::ModelUnknown));
    assert_eq!(health(&node, "tercet.v1.Inference/a").await, Err(Code::NotFound));
    assert!(!node.metrics.encode().contains("tercet_model_state{gen_ai_request_model=\"a\""));
}

#[tokio::test]
async fn streams_that_take_too_long_move_and_go_on_exactly() {
    let dir = ModelDir::new();
    let (node, registry) = two(Some(&dir)).await;
    let expected = generate(&node, asking("b", request(900))).await.unwrap();
    for round in 0..3 {
        let mut stream = begin(&node, asking("a", request(900))).await.unwrap();
        // A second one, that nobody reads, holds nothing up.
        let unread = begin(&node, asking("a", request(900))).await.unwrap();
        let mut ids = Vec::new();
        while ids.len() < 5 {
            if let Some(Event::Delta(delta)) = next(&mut stream).await.unwrap() {
                ids.extend(delta.token_ids);
            }
        }
        let (moved, broken) = tokio::join!(unload(&node, "a", Some(0)), async {
            loop {
                match next(&mut stream).await {
                    Ok(Some(Event::Delta(delta))) => ids.extend(delta.token_ids),
                    Ok(other) => panic!("{other:?}"),
                    Err(status) => break status,
                }
            }
        });
        assert!(moved.unwrap() >= 1);
        assert_eq!(Reason::of(&broken), Some(Reason::Draining), "{broken}");
        assert_eq!(models(&node).await, ["b"], "round {round}");
        drop(unread);

        let resume = Some(v1::Resume { seed: 7, token_ids: ids.clone() });
        let rest = asking("b", v1::GenerateRequest { resume, ..request(900) });
        ids.extend(generate(&node, rest).await.unwrap().ids);
        assert_eq!(ids, expected.ids, "round {round}");
        load(&node, "good.gguf", "a", 0).await.unwrap();
        state_of(&registry, "a", ModelState::Ready).await;
    }
}

#[tokio::test]
async fn a_model_that_breaks_down_leaves_the_others_and_can_be_loaded_again() {
    let dir = ModelDir::new();
    let (node, registry) = two(Some(&dir)).await;
    let expected = generate(&node, asking("b", request(200))).await.unwrap();
    let mut stream = begin(&node, asking("b", request(200))).await.unwrap();
    let Ok(Some(Event::Started(started))) = next(&mut stream).await else { panic!("no start") };
    let mut lost = begin(&node, asking("a", request(900))).await.unwrap();
    assert!(matches!(next(&mut lost).await, Ok(Some(Event::Started(_)))));
    break_down(&node.condition.core.model("a").unwrap()).await;
    let broken = loop {
        match next(&mut lost).await {
            Ok(Some(Event::Delta(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(status) => break status,
        }
    };
    assert_eq!(Reason::of(&broken), Some(Reason::WorkerFailed), "{broken}");
    state_of(&registry, "a", ModelState::Failed).await;
    assert_eq!(read_on(&mut stream, started, 0).await.unwrap(), expected);
    assert_eq!(health(&node, "tercet.v1.Inference/a").await, Ok(ServingStatus::NotServing));
    assert!(node.condition.live().is_ok() && node.condition.ready().is_ok());
    let failed = "tercet_model_state{gen_ai_request_model=\"a\",state=\"failed\"} 1";
    assert!(node.metrics.encode().contains(failed));
    let refused = begin(&node, asking("a", request(5))).await.unwrap_err();
    assert_eq!(Reason::of(&refused), Some(Reason::WorkerFailed), "{refused}");

    unload(&node, "a", None).await.unwrap();
    load(&node, "good.gguf", "a", 0).await.unwrap();
    let again = generate(&node, asking("a", request(200))).await.unwrap();
    assert_eq!(tokens_of(&again), tokens_of(&expected));
}

#[tokio::test]
async fn a_worker_whose_only_model_breaks_down_ends() {
    let (mut node, _registry) = whole(options()).await;
    break_down(&node.model()).await;
    assert!(matches!(node.ended().await, Err(ServeError::EngineLost)));
}

#[tokio::test]
async fn what_cannot_be_configured_is_refused() {
    let build = |configure: fn(&mut Config)| {
        let mut config = Config::new("w".parse().unwrap(), "w:1".to_owned());
        config.engine = options();
        configure(&mut config);
        let registry = Arc::new(MemoryRegistry::new());
        Worker::build(config, registry, Metrics::new()).unwrap_err().to_string()
    };
    let same = build(|config| config.models = vec![named("a"), named("a")]);
    assert!(same.contains("\"a\""), "{same}");
    let stage = build(|config| {
        config.models = vec![named("a"), named("b")];
        config.engine.layers = Some(0..1);
    });
    assert!(stage.contains("2 models"), "{stage}");
    let kv = build(|config| {
        config.models = vec![ModelSpec { kv_bytes: Some(1 << 40), ..named("a") }];
    });
    assert!(kv.contains(&(1_u64 << 40).to_string()) && kv.contains("67108864"), "{kv}");
}

#[tokio::test]
async fn a_model_can_be_unloaded_while_it_is_loaded() {
    let dir = ModelDir::new();
    let (node, _registry) = two(Some(&dir)).await;
    let before = describe(&node).await;
    for _ in 0..5 {
        let (loaded, unloaded) = tokio::join!(load(&node, "good.gguf", "c", 0), async {
            let core = &node.condition.core;
            eventually("the model on its way", || core.model("c").is_some()).await;
            unload(&node, "c", Some(0)).await
        });
        assert_eq!(unloaded.unwrap(), 0);
        if let Err(status) = loaded {
            assert_eq!(Reason::of(&status), Some(Reason::Draining), "{status}");
        }
        assert_eq!(describe(&node).await, before);
    }
    assert_eq!(generate(&node, asking("a", request(5))).await.unwrap().ids.len(), 5);
}
