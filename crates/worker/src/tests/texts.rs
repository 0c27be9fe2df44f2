//! Texts, chats and token ids, and what a model says of itself.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::Value;
use tercet_proto::{InvalidRequest, Reason};
use tonic::Code;

use super::*;
use crate::{ModelSource, ModelSpec};

/// What the template of [`chatty`] adds where it is told not to think.
const QUIET: &str = "(quietly) ";

/// Returns a worker with a model whose chat template knows `enable_thinking`, and what else is
/// expected of it.
async fn chatty() -> (Node, MemoryRegistry, Value) {
    // Tests of one process run side by side.
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/bitnet-packed");
    let read = |name: &str| fs::read_to_string(fixture.join(name)).unwrap();
    let (process, number) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(format!("tercet-chatty-{process}-{number}"));
    fs::create_dir_all(&dir).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(fixture.join(file), dir.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_str(&read("tokenizer_config.json")).unwrap();
    let template = config["chat_template"].as_str().unwrap().to_owned();
    config["chat_template"] = Value::String(format!(
        "{template}{{% if enable_thinking is false %}}{{{{ '{QUIET}' }}}}{{% endif %}}"
    ));
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    let registry = MemoryRegistry::new();
    let source = ModelSource::Path(dir.clone());
    let node = Node::start_with("whole", &registry, |config| {
        config.models = vec![ModelSpec { source, ..ModelSpec::default() }];
    })
    .await;
    in_state(&registry, "whole", WorkerState::Ready).await;
    // The weights stay mapped.
    fs::remove_dir_all(dir).unwrap();
    let expected: Value = serde_json::from_str(&read("expected.json")).unwrap();
    (node, registry, expected["chat"].clone())
}

/// Returns the conversation of a fixture.
fn chat(expected: &Value) -> v1::Chat {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let message = |message: &Value| v1::ChatMessage {
        role: text(&message["role"]),
        content: text(&message["content"]),
    };
    let messages = expected["messages"].as_array().unwrap().iter().map(message).collect();
    v1::Chat { messages, ..v1::Chat::default() }
}

fn with_variable(chat: &v1::Chat, name: &str, json: &str) -> v1::Chat {
    let template_variables = [(name.to_owned(), json.to_owned())].into();
    v1::Chat { template_variables, ..chat.clone() }
}

async fn tokenize(node: &Node, chat: v1::Chat) -> Result<v1::TokenizeResponse, Status> {
    let request = v1::TokenizeRequest { chat: Some(chat), token_bytes: true, ..Default::default() };
    Ok(soon("the ids", node.client().tokenize(request)).await?.into_inner())
}

async fn detokenize(node: &Node, ids: Vec<u32>, skip_special: bool) -> Result<String, Status> {
    let request = v1::DetokenizeRequest {
        tokens: Some(v1::TokenIds { ids }),
        skip_special_tokens: skip_special,
        ..Default::default()
    };
    Ok(soon("the text", node.client().detokenize(request)).await?.into_inner().text)
}

/// Returns the first violation of a refused call.
fn field(refused: &Status) -> String {
    InvalidRequest::of(refused).unwrap().violations()[0].field.clone()
}

#[tokio::test]
async fn chats_and_ids_turn_into_each_other() {
    let (node, _registry, expected) = chatty().await;
    let chat = chat(&expected);
    let told = tokenize(&node, chat.clone()).await.unwrap();
    let ids = told.tokens.unwrap().ids;
    let rendered = expected["rendered"].as_str().unwrap();
    assert_eq!(serde_json::to_value(&ids).unwrap(), expected["ids"]);
    assert_eq!(told.rendered, rendered);
    assert_eq!(told.token_bytes.len(), ids.len());
    let plain = rendered.replace("<|eot_id|>", "");
    assert_eq!(String::from_utf8(told.token_bytes.concat()).unwrap(), plain);

    assert_eq!(detokenize(&node, ids.clone(), true).await.unwrap(), plain);
    let spelt = detokenize(&node, ids.clone(), false).await.unwrap();
    assert_eq!(spelt, format!("<|begin_of_text|>{rendered}"));
    assert_eq!(detokenize(&node, Vec::new(), false).await.unwrap(), "");

    let quiet = with_variable(&chat, "enable_thinking", "false");
    let told = tokenize(&node, quiet.clone()).await.unwrap();
    assert_eq!(told.rendered, format!("{rendered}{QUIET}"));
    // What is tokenized is what is continued.
    for (chat, ids) in [(chat, ids), (quiet, told.tokens.unwrap().ids)] {
        let input = Some(Input::Chat(chat));
        let asked = v1::GenerateRequest { input, echo: Some(true), ..request(4) };
        let events = events(&node, asked).await;
        let Event::Prompt(prompt) = &events[1] else { panic!("{:?}", events[1]) };
        assert_eq!(prompt.token_ids, ids);
    }

    let text = v1::TokenizeRequest { text: "Hello".to_owned(), ..Default::default() };
    let told = node.client().tokenize(text).await.unwrap().into_inner();
    assert_eq!((told.rendered.as_str(), told.token_bytes), ("", Vec::new()));
    assert_eq!(detokenize(&node, told.tokens.unwrap().ids, true).await.unwrap(), "Hello");
}

#[tokio::test]
async fn what_is_wrong_with_chats_and_ids_is_named() {
    let (node, _registry, expected) = chatty().await;
    let chat = chat(&expected);
    for (name, json, at) in [
        ("enable_thinking", "no", "chat.template_variables[enable_thinking]"),
        ("messages", "[]", "chat.template_variables[messages]"),
    ] {
        let chat = with_variable(&chat, name, json);
        assert_eq!(field(&tokenize(&node, chat.clone()).await.unwrap_err()), at);
        let asked = v1::GenerateRequest { input: Some(Input::Chat(chat)), ..request(4) };
        assert_eq!(field(&generate(&node, asked).await.unwrap_err()), at);
    }
    assert_eq!(field(&detokenize(&node, vec![1, 512], false).await.unwrap_err()), "tokens.ids[1]");

    let model = "other".to_owned();
    let mut client = node.client();
    let text = v1::TokenizeRequest { model: model.clone(), ..Default::default() };
    let ids = v1::DetokenizeRequest { model: model.clone(), ..Default::default() };
    for refused in [
        client.tokenize(text).await.unwrap_err(),
        client.detokenize(ids).await.unwrap_err(),
        client.get_model(v1::GetModelRequest { model }).await.unwrap_err(),
    ] {
        let expected = (Code::NotFound, Some(Reason::ModelUnknown));
        assert_eq!((refused.code(), Reason::of(&refused)), expected, "{refused}");
    }
}

#[tokio::test]
async fn a_model_tells_what_clients_need() {
    let (node, _registry, _) = chatty().await;
    let mut client = node.client();
    let listed = client.list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let told = client.get_model(v1::GetModelRequest::default()).await.unwrap().into_inner();
    let defaults = told.sampling_defaults.clone().unwrap();
    assert_eq!(told.model.as_ref(), listed.first());
    let expected = v1::GetModelResponse {
        model: told.model.clone(),
        architecture: "bitnet".to_owned(),
        quantization: "packed ternary".to_owned(),
        layer_count: 3,
        hidden_size: 256,
        head_count: 4,
        kv_head_count: 2,
        // Per layer the matrices and four norms, of which one is as wide as the MLP; then the last
        // norm and the embedding.
        parameter_count: 3 * (589_824 + 3 * 256 + 512) + 256 + 512 * 256,
        ternary_parameter_count: 3 * 589_824,
        weight_bytes: told.weight_bytes,
        // Keys and values in three layers.
        kv_bytes_per_token: 3 * 2 * (2 * 64) * 4,
        bos_token_id: Some(509),
        adds_bos: true,
        eos_token_ids: vec![510, 511],
        has_chat_template: true,
        sampling_defaults: Some(v1::Sampling {
            temperature: Some(0.6),
            top_k: defaults.top_k,
            top_p: Some(0.9),
            seed: None,
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            frequency_penalty: Some(0.0),
            presence_penalty: Some(0.0),
            logit_bias: Default::default(),
        }),
    };
    assert_eq!(told, expected);
    assert!(told.weight_bytes > told.ternary_parameter_count / 4, "{}", told.weight_bytes);

    // Saying the defaults changes nothing.
    let seeded = v1::Sampling { seed: Some(3), ..v1::Sampling::default() };
    let silent = v1::GenerateRequest { sampling: Some(seeded), ..request(24) };
    let spoken = v1::GenerateRequest {
        sampling: Some(v1::Sampling { seed: Some(3), ..defaults }),
        ..silent.clone()
    };
    assert_eq!(generate(&node, silent).await.unwrap(), generate(&node, spoken).await.unwrap());
}
