use super::*;

fn prompt() -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Prompt("KING HENRY.\n".to_owned())),
        ..Default::default()
    }
}

/// Returns the fields that a request is refused for.
fn refused(request: v1::GenerateRequest) -> Vec<String> {
    let invalid = GenerateSpec::try_from(request).unwrap_err();
    invalid.violations().iter().map(|violation| violation.field.clone()).collect()
}

fn sampling(sampling: v1::Sampling) -> v1::GenerateRequest {
    v1::GenerateRequest { sampling: Some(sampling), ..prompt() }
}

fn stop(stop: v1::Stop) -> v1::GenerateRequest {
    v1::GenerateRequest { stop: Some(stop), ..prompt() }
}

#[test]
fn absent_fields_are_no_overrides() {
    let spec = GenerateSpec::try_from(prompt()).unwrap();
    assert_eq!(
        spec,
        GenerateSpec {
            model: None,
            input: Input::Prompt("KING HENRY.\n".to_owned()),
            sampling: SamplingSpec::default(),
            stop: StopSpec::default(),
            resume: None,
            logprobs: None,
            echo: false,
            cache_salt: String::new(),
            grammar: None,
            alone_tokens: 0,
        }
    );
    assert_eq!(spec.seed(), None);
}

#[test]
fn specs_turn_back_into_the_request() {
    let inputs = [
        v1::generate_request::Input::Prompt(String::new()),
        v1::generate_request::Input::Tokens(v1::TokenIds { ids: vec![0, 7] }),
        v1::generate_request::Input::Chat(v1::Chat {
            messages: vec![v1::ChatMessage { role: "user".to_owned(), content: String::new() }],
            template_variables: [("enable_thinking".to_owned(), "false".to_owned())].into(),
        }),
    ];
    for input in inputs {
        let request = v1::GenerateRequest {
            model: "demo".to_owned(),
            input: Some(input),
            sampling: Some(v1::Sampling {
                temperature: Some(0.0),
                top_k: Some(0),
                top_p: Some(1.0),
                seed: Some(u64::MAX),
                min_p: Some(0.0),
                repetition_penalty: Some(f32::MIN_POSITIVE),
                frequency_penalty: Some(-2.0),
                presence_penalty: Some(2.0),
                logit_bias: [(0, -100.0), (u32::MAX, 100.0)].into(),
            }),
            stop: Some(v1::Stop {
                max_tokens: Some(2),
                strings: vec!["\n\n".to_owned()],
                ignore_eos: Some(true),
                token_ids: vec![3, 1],
            }),
            resume: Some(v1::Resume { seed: u64::MAX, token_ids: vec![1, 2] }),
            logprobs: Some(v1::Logprobs { top: 20 }),
            echo: Some(true),
            cache_salt: "tenant".to_owned(),
            grammar: None,
            alone_tokens: 32,
        };
        let spec = GenerateSpec::try_from(request.clone()).unwrap();
        assert_eq!(spec.seed(), Some(u64::MAX));
        assert_eq!(v1::GenerateRequest::from(spec), request);
    }
}

#[test]
fn an_input_is_required() {
    assert_eq!(refused(v1::GenerateRequest::default()), ["input"]);
    let tokens = v1::generate_request::Input::Tokens(v1::TokenIds::default());
    assert_eq!(refused(v1::GenerateRequest { input: Some(tokens), ..prompt() }), ["tokens.ids"]);
    let chat = v1::generate_request::Input::Chat(v1::Chat::default());
    assert_eq!(refused(v1::GenerateRequest { input: Some(chat), ..prompt() }), ["chat.messages"]);
    let chat = v1::generate_request::Input::Chat(v1::Chat {
        messages: vec![
            v1::ChatMessage { role: "system".to_owned(), content: String::new() },
            v1::ChatMessage::default(),
        ],
        ..Default::default()
    });
    assert_eq!(
        refused(v1::GenerateRequest { input: Some(chat), ..prompt() }),
        ["chat.messages[1].role"]
    );
}

#[test]
fn sampling_is_bounded() {
    for temperature in [-0.1, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let request =
            sampling(v1::Sampling { temperature: Some(temperature), ..Default::default() });
        assert_eq!(refused(request), ["sampling.temperature"], "{temperature}");
    }
    for top_p in [0.0, -1.0, 1.000_001, f32::NAN, f32::INFINITY] {
        let request = sampling(v1::Sampling { top_p: Some(top_p), ..Default::default() });
        assert_eq!(refused(request), ["sampling.top_p"], "{top_p}");
    }
    for (temperature, top_p) in [(0.0, 1.0), (-0.0, f32::MIN_POSITIVE), (f32::MAX, 0.5)] {
        let request = sampling(v1::Sampling {
            temperature: Some(temperature),
            top_p: Some(top_p),
            ..Default::default()
        });
        assert!(GenerateSpec::try_from(request).is_ok(), "{temperature} {top_p}");
    }
}

#[test]
fn penalties_and_biases_are_bounded() {
    let refused_fields = |change: &dyn Fn(&mut v1::Sampling)| {
        let mut asked = v1::Sampling::default();
        change(&mut asked);
        refused(sampling(asked))
    };
    for min_p in [-0.1, 1.1, f32::NAN] {
        let fields = refused_fields(&|s| s.min_p = Some(min_p));
        assert_eq!(fields, ["sampling.min_p"], "{min_p}");
    }
    for penalty in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let fields = refused_fields(&|s| s.repetition_penalty = Some(penalty));
        assert_eq!(fields, ["sampling.repetition_penalty"], "{penalty}");
    }
    for penalty in [-2.1, 2.1, f32::NAN, f32::NEG_INFINITY] {
        let fields = refused_fields(&|s| s.frequency_penalty = Some(penalty));
        assert_eq!(fields, ["sampling.frequency_penalty"], "{penalty}");
        let fields = refused_fields(&|s| s.presence_penalty = Some(penalty));
        assert_eq!(fields, ["sampling.presence_penalty"], "{penalty}");
    }
    for bias in [-100.5, 101.0, f32::NAN, f32::INFINITY] {
        let fields = refused_fields(&|s| s.logit_bias = [(3, 0.0), (7, bias)].into());
        assert_eq!(fields, ["sampling.logit_bias[7]"], "{bias}");
    }
    let biases =
        |n: u32| move |s: &mut v1::Sampling| s.logit_bias = (0..n).map(|id| (id, 1.0)).collect();
    let most = u32::try_from(MAX_LOGIT_BIASES).unwrap();
    assert_eq!(refused_fields(&biases(most + 1)), ["sampling.logit_bias"]);
    let mut full = v1::Sampling::default();
    biases(most)(&mut full);
    assert!(GenerateSpec::try_from(sampling(full)).is_ok());
}

#[test]
fn what_else_is_asked_for_is_bounded() {
    let logprobs = |top| v1::GenerateRequest { logprobs: Some(v1::Logprobs { top }), ..prompt() };
    assert_eq!(refused(logprobs(MAX_TOP_LOGPROBS + 1)), ["logprobs.top"]);
    assert_eq!(GenerateSpec::try_from(logprobs(0)).unwrap().logprobs, Some(0));
    let salted = |length| v1::GenerateRequest { cache_salt: "s".repeat(length), ..prompt() };
    assert_eq!(refused(salted(MAX_CACHE_SALT_BYTES + 1)), ["cache_salt"]);
    assert!(GenerateSpec::try_from(salted(MAX_CACHE_SALT_BYTES)).is_ok());
}

#[test]
fn stops_are_bounded() {
    assert_eq!(
        refused(stop(v1::Stop { max_tokens: Some(0), ..Default::default() })),
        ["stop.max_tokens"]
    );
    let tokens = |n| stop(v1::Stop { token_ids: vec![0; n], ..Default::default() });
    assert_eq!(refused(tokens(MAX_STOP_TOKENS + 1)), ["stop.token_ids"]);
    assert!(GenerateSpec::try_from(tokens(MAX_STOP_TOKENS)).is_ok());
    let strings = |strings: Vec<String>| stop(v1::Stop { strings, ..Default::default() });
    assert_eq!(refused(strings(vec!["a".to_owned(), String::new()])), ["stop.strings[1]"]);
    assert_eq!(refused(strings(vec!["a".repeat(MAX_STOP_STRING_BYTES + 1)])), ["stop.strings[0]"]);
    assert_eq!(refused(strings(vec!["a".to_owned(); MAX_STOP_STRINGS + 1])), ["stop.strings"]);
    let most = vec!["a".repeat(MAX_STOP_STRING_BYTES); MAX_STOP_STRINGS];
    assert!(GenerateSpec::try_from(strings(most)).is_ok());
}

#[test]
fn a_resume_must_fit_its_request() {
    let request = |seed, max_tokens| v1::GenerateRequest {
        sampling: Some(v1::Sampling { seed, ..Default::default() }),
        stop: Some(v1::Stop { max_tokens, ..Default::default() }),
        resume: Some(v1::Resume { seed: 5, token_ids: vec![1, 2, 3] }),
        ..prompt()
    };
    assert_eq!(refused(request(Some(6), None)), ["resume.seed"]);
    assert_eq!(refused(request(None, Some(2))), ["resume.token_ids"]);
    assert_eq!(GenerateSpec::try_from(request(Some(5), Some(3))).unwrap().seed(), Some(5));
    assert_eq!(GenerateSpec::try_from(request(None, None)).unwrap().seed(), Some(5));
}

#[test]
fn every_violation_is_told_at_once_and_survives_the_wire() {
    let request = v1::GenerateRequest {
        sampling: Some(v1::Sampling { top_p: Some(2.0), ..Default::default() }),
        stop: Some(v1::Stop { max_tokens: Some(0), ..Default::default() }),
        ..Default::default()
    };
    let invalid = GenerateSpec::try_from(request).unwrap_err();
    assert_eq!(invalid.violations().len(), 3);
    let status = tonic::Status::from(invalid.clone());
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(
        status.message().contains("sampling.top_p: must be above 0 and at most 1, got 2"),
        "{}",
        status.message()
    );
    assert_eq!(InvalidRequest::of(&status), Some(invalid));
    assert_eq!(crate::Reason::of(&status), Some(crate::Reason::InvalidRequest));
}

#[test]
fn scores_need_two_tokens() {
    for ids in [vec![], vec![3]] {
        let request = v1::ScoreRequest { model: String::new(), tokens: Some(v1::TokenIds { ids }) };
        let invalid = ScoreSpec::try_from(request).unwrap_err();
        assert_eq!(invalid.violations()[0].field, "tokens.ids");
    }
    let request = v1::ScoreRequest {
        model: "demo".to_owned(),
        tokens: Some(v1::TokenIds { ids: vec![3, 4] }),
    };
    let spec = ScoreSpec::try_from(request.clone()).unwrap();
    assert_eq!(spec.model.as_deref(), Some("demo"));
    assert_eq!(v1::ScoreRequest::from(spec), request);
}

/// Returns a chat of one message.
fn chat() -> v1::Chat {
    let message = v1::ChatMessage { role: "user".to_owned(), content: "Hello".to_owned() };
    v1::Chat { messages: vec![message], ..Default::default() }
}

/// Returns the fields that a text or chat is not tokenized for.
fn not_tokenized(request: v1::TokenizeRequest) -> Vec<String> {
    let invalid = TokenizeSpec::try_from(request).unwrap_err();
    invalid.violations().iter().map(|violation| violation.field.clone()).collect()
}

#[test]
fn template_variables_are_bounded() {
    let many = |n: usize| -> BTreeMap<String, String> {
        (0..n).map(|nth| (format!("v{nth:02}"), "1".to_owned())).collect()
    };
    let long = |n: usize| BTreeMap::from([("v".to_owned(), "x".repeat(n - 1))]);
    let with = |template_variables| v1::Chat { template_variables, ..chat() };
    let generate = |chat| v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(chat)),
        ..Default::default()
    };
    let tokenize = |chat| v1::TokenizeRequest { chat: Some(chat), ..Default::default() };
    for variables in [many(MAX_TEMPLATE_VARIABLES), long(MAX_TEMPLATE_VARIABLES_BYTES)] {
        assert!(GenerateSpec::try_from(generate(with(variables.clone()))).is_ok());
        assert!(TokenizeSpec::try_from(tokenize(with(variables))).is_ok());
    }
    for variables in [many(MAX_TEMPLATE_VARIABLES + 1), long(MAX_TEMPLATE_VARIABLES_BYTES + 1)] {
        assert_eq!(refused(generate(with(variables.clone()))), ["chat.template_variables"]);
        assert_eq!(not_tokenized(tokenize(with(variables))), ["chat.template_variables"]);
    }
}

#[test]
fn a_text_or_a_chat_is_tokenized() {
    let text = v1::TokenizeRequest { text: "a".to_owned(), ..Default::default() };
    let chat = v1::TokenizeRequest {
        model: "demo".to_owned(),
        chat: Some(chat()),
        token_bytes: true,
        ..Default::default()
    };
    for request in [v1::TokenizeRequest::default(), text.clone(), chat.clone()] {
        let spec = TokenizeSpec::try_from(request.clone()).unwrap();
        assert_eq!(v1::TokenizeRequest::from(spec), request);
    }
    assert_eq!(not_tokenized(v1::TokenizeRequest { text: text.text, ..chat }), ["text"]);
    let empty = v1::TokenizeRequest { chat: Some(v1::Chat::default()), ..Default::default() };
    assert_eq!(not_tokenized(empty), ["chat.messages"]);
}

#[test]
fn what_is_asked_of_tokens_and_models_turns_back() {
    let request = v1::DetokenizeRequest {
        model: "demo".to_owned(),
        tokens: Some(v1::TokenIds { ids: vec![3, 4] }),
        skip_special_tokens: true,
    };
    assert_eq!(v1::DetokenizeRequest::from(DetokenizeSpec::from(request.clone())), request);
    let nothing = DetokenizeSpec::from(v1::DetokenizeRequest::default());
    assert_eq!((nothing.model, nothing.tokens), (None, Vec::new()));

    let request = v1::GetModelRequest { model: "demo".to_owned() };
    assert_eq!(v1::GetModelRequest::from(GetModelSpec::from(request.clone())), request);
    assert_eq!(GetModelSpec::from(v1::GetModelRequest::default()).model, None);
}

#[test]
fn grammars_turn_back_and_bad_ones_are_named() {
    use crate::{GrammarSpec, MAX_GRAMMAR_BYTES, v1::grammar::Form};

    let ask = |form: Option<Form>| v1::GenerateRequest {
        grammar: Some(v1::Grammar { form }),
        ..prompt()
    };
    let choice = |texts: &[&str]| {
        Form::Choice(v1::Choice { texts: texts.iter().map(|&text| text.to_owned()).collect() })
    };
    for form in [
        Form::JsonSchema("{}".to_owned()),
        Form::JsonObject(v1::JsonObject {}),
        Form::Regex("a".repeat(MAX_GRAMMAR_BYTES)),
        choice(&["yes", "no"]),
    ] {
        let spec = GenerateSpec::try_from(ask(Some(form.clone()))).unwrap();
        let field = spec.grammar.as_ref().map(GrammarSpec::field).unwrap();
        assert!(field.starts_with("grammar."), "{field}");
        assert_eq!(v1::GenerateRequest::from(spec).grammar, ask(Some(form)).grammar);
    }
    for (request, field) in [
        (ask(None), "grammar"),
        (ask(Some(choice(&[]))), "grammar.choice.texts"),
        (ask(Some(choice(&["a", ""]))), "grammar.choice.texts[1]"),
        (ask(Some(Form::JsonSchema(" ".repeat(MAX_GRAMMAR_BYTES + 1)))), "grammar.json_schema"),
        (
            v1::GenerateRequest {
                stop: Some(v1::Stop { ignore_eos: Some(true), ..Default::default() }),
                ..ask(Some(Form::JsonObject(v1::JsonObject {})))
            },
            "stop.ignore_eos",
        ),
    ] {
        let error = GenerateSpec::try_from(request).unwrap_err();
        let fields: Vec<_> = error.violations().iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, [field]);
    }
}
