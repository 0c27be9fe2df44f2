use std::cell::Cell;

use tercet_proto::{
    InvalidRequest,
    v1::{FinishReason, worker_client::WorkerClient},
};
use tonic::Code;

use super::*;

#[tokio::test]
async fn a_request_is_answered_from_started_to_finished() {
    let (node, _registry) = whole(options()).await;
    let answer = generate(&node, request(40)).await.unwrap();
    let prompt = tokenizer().encode_prompt(PROMPT).unwrap();
    let prompt_tokens = u32::try_from(prompt.len()).unwrap();
    assert_eq!(answer.started, v1::Started { model: "demo".to_owned(), seed: 7, prompt_tokens });
    assert_eq!(answer.ids.len(), 40);
    let mut decoder = StreamDecoder::new(tokenizer(), Vec::new());
    let mut text: String = answer.ids.iter().map(|id| decoder.push(*id).text).collect();
    text.push_str(&decoder.finish());
    assert_eq!(answer.text, text);
    assert_eq!(answer.finished.reason(), FinishReason::MaxTokens);
    let usage = v1::Usage { prompt_tokens, completion_tokens: 40, ..v1::Usage::default() };
    assert_eq!(answer.finished.usage, Some(usage));

    let ids = v1::TokenIds { ids: prompt };
    let by_ids = v1::GenerateRequest { input: Some(Input::Tokens(ids)), ..request(40) };
    assert_eq!(generate(&node, by_ids).await.unwrap(), answer, "ids are used as given");

    let again = generate(&node, request(40)).await.unwrap();
    assert_eq!(again, answer);
    let reseeded = v1::Sampling { seed: Some(8), ..request(1).sampling.unwrap() };
    let other = v1::GenerateRequest { sampling: Some(reseeded), ..request(40) };
    assert_ne!(generate(&node, other).await.unwrap().ids, answer.ids);

    let metrics = node.metrics.encode();
    let counted = metrics.lines().find(|line| {
        line.starts_with("gen_ai_server_request_duration_seconds_count")
            && line.contains("component=\"worker\"")
            && line.contains("error_type=\"\"")
    });
    assert!(counted.is_some_and(|line| line.ends_with(" 4")), "{metrics}");
}

#[tokio::test]
async fn an_absent_seed_is_drawn_and_told() {
    let (node, _registry) = whole(options()).await;
    let sampling = v1::Sampling { seed: None, ..request(1).sampling.unwrap() };
    let unseeded = v1::GenerateRequest { sampling: Some(sampling), ..request(30) };
    let first = generate(&node, unseeded.clone()).await.unwrap();
    let second = generate(&node, unseeded.clone()).await.unwrap();
    assert_ne!(first.started.seed, second.started.seed);
    let mut repeated = unseeded;
    repeated.sampling.as_mut().unwrap().seed = Some(first.started.seed);
    assert_eq!(generate(&node, repeated).await.unwrap(), first);
}

#[tokio::test]
async fn a_resume_at_every_index_goes_on_exactly() {
    let (node, _registry) = whole(options()).await;
    let undisturbed = generate(&node, request(24)).await.unwrap();
    // One that ends by a stop string whose start is withheld for a while.
    let stop = stop_inside(&undisturbed.text);
    let mut stopped = request(24);
    stopped.stop.as_mut().unwrap().strings = vec![stop.clone()];
    for (asked, stops) in [(request(24), Vec::new()), (stopped, vec![stop])] {
        let whole = generate(&node, asked.clone()).await.unwrap();
        assert!(whole.ids.len() > 4, "{whole:?}");
        for cut in 0..=whole.ids.len() {
            let token_ids = whole.ids[..cut].to_vec();
            let mut resumed = asked.clone();
            resumed.resume = Some(v1::Resume { seed: 7, token_ids: token_ids.clone() });
            let rest = generate(&node, resumed).await.unwrap();
            assert_eq!(rest.started, whole.started);
            assert_eq!(rest.ids, whole.ids[cut..], "after {cut}");
            assert_eq!(rest.finished, whole.finished, "after {cut}");
            let before = if cut == whole.ids.len() {
                whole.text.clone()
            } else {
                released(&token_ids, &stops)
            };
            assert_eq!(before + &rest.text, whole.text, "after {cut}");
        }
    }
}

/// Returns a stop string from the second half of a text that no earlier part contains.
fn stop_inside(text: &str) -> String {
    let middle = (text.len() / 2..).find(|at| text.is_char_boundary(*at)).unwrap();
    let rest = &text[middle..];
    let mut ends = rest.char_indices().map(|(at, _)| at).skip(3);
    let stop = ends.find_map(|end| {
        let candidate = &rest[..end];
        (text.find(candidate) == Some(middle)).then(|| candidate.to_owned())
    });
    stop.expect("the text does not repeat itself throughout")
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it_and_the_sequence() {
    let (node, _registry) = whole(options()).await;
    let undisturbed = generate(&node, request(60)).await.unwrap();
    let stop = stop_inside(&undisturbed.text);
    let mut asked = request(900);
    asked.stop.as_mut().unwrap().strings = vec!["\u{1}never".to_owned(), stop.clone()];
    let stopped = generate(&node, asked).await.unwrap();
    assert_eq!(stopped.finished.reason(), FinishReason::StopString);
    let (before, _) = undisturbed.text.split_once(&stop).unwrap();
    assert_eq!(stopped.text, before);
    assert_eq!(stopped.ids, undisturbed.ids[..stopped.ids.len()]);
    let completion_tokens = stopped.finished.usage.unwrap().completion_tokens;
    assert_eq!(usize::try_from(completion_tokens), Ok(stopped.ids.len()));
    eventually("the engine is idle", || node.load().running == 0).await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_sequence() {
    let (node, _registry) = whole(options()).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = begin(&node, request(1000)).await.unwrap();
        assert!(matches!(next(&mut stream).await, Ok(Some(Event::Started(_)))));
        assert!(matches!(next(&mut stream).await, Ok(Some(Event::Delta(_)))));
        streams.push(stream);
    }
    drop(streams);
    let most_pages = Cell::new(0);
    eventually("the engine is idle", || {
        let load = node.load();
        most_pages.set(load.pages_referenced.max(most_pages.get()));
        load.running + load.waiting + load.pages_referenced == 0
    })
    .await;
    // Completions computed to their ends would have filled 16 pages each.
    assert!(most_pages.get() < 4 * 8, "{} pages were filled for nobody", most_pages.get());
    let cancelled = |line: &str| {
        line.starts_with("gen_ai_server_request_duration_seconds_count")
            && line.contains("error_type=\"CANCELLED\"")
            && line.ends_with(" 4")
    };
    eventually("the streams are counted", || node.metrics.encode().lines().any(cancelled)).await;
}

#[tokio::test]
async fn a_deadline_stops_the_decoding() {
    let slow = EngineOptions { isa: Some("scalar".parse().unwrap()), ..options() };
    let (node, _registry) = whole(slow).await;
    let mut streams = JoinSet::new();
    for _ in 0..16 {
        let mut asked = tonic::Request::new(request(1000));
        asked.set_timeout(Duration::from_millis(150));
        let mut client = node.client();
        streams.spawn(async move {
            let mut stream = client.generate(asked).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok::<_, Status>(())
        });
    }
    let mut passed = 0;
    while let Some(ended) = soon("the deadlines", streams.join_next()).await {
        match ended.unwrap() {
            Err(status) if status.code() == Code::DeadlineExceeded => passed += 1,
            // tonic itself, before the response headers.
            Err(status) if status.code() == Code::Cancelled => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(passed > 0, "no stream was under way when its deadline passed");
    eventually("the engine is idle", || node.load().running == 0).await;
}

#[tokio::test]
async fn chats_need_a_template_and_unusable_ones_are_refused() {
    let (node, _registry) = whole(options()).await;
    let message = v1::ChatMessage { role: "user".to_owned(), content: "Speak!".to_owned() };
    let chat = v1::Chat { messages: vec![message], ..v1::Chat::default() };
    let asked = v1::GenerateRequest { input: Some(Input::Chat(chat)), ..request(5) };
    let answered = generate(&node, asked).await;
    if demo::model().unwrap().chat_template.is_some() {
        assert_eq!(answered.unwrap().ids.len(), 5);
    } else {
        let refused = InvalidRequest::of(&answered.unwrap_err()).unwrap();
        assert_eq!(refused.violations()[0].field, "chat");
    }
}

#[tokio::test]
async fn the_model_is_described() {
    let (node, registry) = whole(options()).await;
    let mut client = node.client();
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let [model] = &models[..] else { panic!("{models:?}") };
    assert_eq!((model.name.as_str(), model.identity.len()), ("demo", 64));

    let view = registry.watch().borrow().clone();
    let worker = &view.workers[&"whole".parse().unwrap()];
    assert_eq!(worker.serves("demo").unwrap().identity, model.identity);
    assert_eq!(worker.address, node.address);

    let mut describer = WorkerClient::new(node.channel());
    let described = describer.describe(v1::DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((described.worker_id.as_str(), described.epoch), ("whole", worker.epoch));
    let held = &described.models[0];
    assert_eq!(held.model.as_ref(), Some(model));
    let layers = demo::model().unwrap().config.layers;
    assert_eq!(held.parts.len(), layers + 2);
    assert_eq!(usize::try_from(held.layer_count), Ok(layers));

    let text = v1::TokenizeRequest {
        model: "demo".to_owned(),
        text: PROMPT.to_owned(),
        ..v1::TokenizeRequest::default()
    };
    let tokens = client.tokenize(text).await.unwrap().into_inner().tokens.unwrap();
    assert_eq!(tokens.ids, tokenizer().encode_prompt(PROMPT).unwrap());
    let scored = v1::ScoreRequest { model: String::new(), tokens: Some(tokens.clone()) };
    let scores = client.score(scored).await.unwrap().into_inner();
    assert_eq!(scores.logprobs.len() + 1, tokens.ids.len());
    assert_eq!(scores.top_ids.len(), tokens.ids.len());
    assert!(scores.logprobs.iter().all(|logprob| *logprob <= 0.0 && logprob.is_finite()));

    // The likeliest token after the prompt is what greedy generation takes.
    let greedy = v1::GenerateRequest {
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..v1::Sampling::default() }),
        ..request(1)
    };
    let answer = generate(&node, greedy).await.unwrap();
    assert_eq!(answer.ids.first(), scores.top_ids.last());
}
