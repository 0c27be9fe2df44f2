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
            }),
            stop: Some(v1::Stop {
                max_tokens: Some(2),
                strings: vec!["\n\n".to_owned()],
                ignore_eos: Some(true),
            }),
            resume: Some(v1::Resume { seed: u64::MAX, token_ids: vec![1, 2] }),
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
fn stops_are_bounded() {
    assert_eq!(
        refused(stop(v1::Stop { max_tokens: Some(0), ..Default::default() })),
        ["stop.max_tokens"]
    );
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
