use tercet_proto::{
    InvalidRequest,
    v1::{FinishReason, grammar::Form},
};

use super::{pipeline::pipeline, *};

const SCHEMA: &str = r#"{"type":"object","properties":{"king":{"enum":["Henry","Richard"]},
    "dead":{"type":"boolean"}},"required":["king","dead"],"additionalProperties":false}"#;

fn formed(form: Form) -> v1::GenerateRequest {
    let stop = v1::Stop { max_tokens: Some(200), ..v1::Stop::default() };
    v1::GenerateRequest {
        grammar: Some(v1::Grammar { form: Some(form) }),
        stop: Some(stop),
        ..request(1)
    }
}

#[tokio::test]
async fn a_schema_is_kept_to_by_one_stage_and_by_several_and_after_a_resume() {
    let (node, _registry) = whole(options()).await;
    let asked = formed(Form::JsonSchema(SCHEMA.to_owned()));
    let answer = generate(&node, asked.clone()).await.unwrap();
    assert_eq!(answer.finished.reason(), FinishReason::Eos, "{}", answer.text);
    let value: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert!(value["king"].is_string() && value["dead"].is_boolean(), "{value}");

    let registry = MemoryRegistry::new();
    let stages = pipeline(&[1], &registry).await;
    let staged = generate(&stages[0], asked.clone()).await.unwrap();
    assert_eq!((&staged.ids, &staged.text), (&answer.ids, &answer.text));

    let cut = answer.ids.len() / 2;
    let resume = v1::Resume { seed: 7, token_ids: answer.ids[..cut].to_vec() };
    let resumed = v1::GenerateRequest { resume: Some(resume), ..asked };
    for node in [&node, &stages[0]] {
        let rest = generate(node, resumed.clone()).await.unwrap();
        assert_eq!(rest.ids, answer.ids[cut..]);
        assert!(answer.text.ends_with(&rest.text), "{:?} of {:?}", rest.text, answer.text);
    }
}

#[tokio::test]
async fn a_grammar_that_cannot_be_used_is_refused_by_its_field() {
    let (node, _registry) = whole(options()).await;
    for (form, field) in [
        (Form::JsonSchema(r#"{"type":"strong"}"#.to_owned()), "grammar.json_schema"),
        (Form::Regex("(".to_owned()), "grammar.regex"),
    ] {
        let status = generate(&node, formed(form)).await.unwrap_err();
        let invalid = InvalidRequest::of(&status).unwrap();
        assert_eq!(invalid.violations()[0].field, field, "{status}");
    }
    // Others are served on.
    let choice = v1::Choice { texts: vec!["to be".to_owned()] };
    assert_eq!(generate(&node, formed(Form::Choice(choice))).await.unwrap().text, "to be");
}
