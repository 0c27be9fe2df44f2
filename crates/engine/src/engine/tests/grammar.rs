//! Structured output: always of the form, and the same whatever computes it.

use tercet_text::{Grammar, Tokenizer};

use super::*;

/// Bytes of a KV page of the built-in model.
const PAGE: usize = 3 * 2 * 2 * 64 * 64 * 4;

fn tokenizer() -> Arc<Tokenizer> {
    let model = demo::model().unwrap();
    Arc::new(Tokenizer::new(&model.tokenizer, model.special).unwrap())
}

fn with_grammars() -> EngineOptions {
    let vocab = demo::model().unwrap().config.vocab;
    EngineOptions { grammars: Some(Arc::new(Grammars::new(tokenizer(), vocab))), ..options() }
}

fn grammars() -> Vec<Grammar> {
    vec![
        Grammar::JsonSchema(
            r#"{"type":"object","properties":{"king":{"enum":["Henry","Richard"]},
                "age":{"type":"integer","minimum":0,"maximum":99}},
                "required":["king","age"],"additionalProperties":false}"#
                .to_owned(),
        ),
        Grammar::Regex("(KING|QUEEN) [A-Z][a-z]{2,9}: [a-z ,]{10,40}[.]".to_owned()),
        Grammar::Choice(vec!["to be".to_owned(), "not to be".to_owned(), "to sleep".to_owned()]),
    ]
}

/// One request for each grammar and seed, with penalties and biases for some.
fn asked() -> Vec<SequenceRequest> {
    let end = tokenizer().special().eos.clone();
    let mut asked = Vec::new();
    for (number, grammar) in grammars().into_iter().enumerate() {
        for (seed, prompt) in (0..3).zip(prompts(3)) {
            let sampling = SamplingParams {
                grammar: Some(Arc::new(grammar.clone())),
                repetition_penalty: if seed == 1 { 1.2 } else { 1.0 },
                // Nothing that is added lets in what the grammar leaves out.
                logit_bias: if seed == 2 { [(5, 100.0)].into() } else { BTreeMap::new() },
                ..sampled(number as u64 * 10 + seed)
            };
            let output = Output::Generate { max_tokens: 160, stop_ids: end.clone() };
            asked.push(SequenceRequest { output, ..request(&prompt, 160, sampling) });
        }
    }
    asked
}

fn all(engine: &Engine, asked: &[SequenceRequest]) -> Vec<Vec<u32>> {
    let running: Vec<_> = asked.iter().map(|asked| submit(engine, asked.clone())).collect();
    running.iter().map(|(_, receiver)| tokens(receiver)).collect()
}

fn alone(asked: &[SequenceRequest]) -> Vec<Vec<u32>> {
    let options = EngineOptions { max_sequences: 1, isa: Some(Isa::Scalar), ..with_grammars() };
    let engine = Engine::load(&demo::model().unwrap(), &options).unwrap();
    asked.iter().map(|asked| all(&engine, std::slice::from_ref(asked)).remove(0)).collect()
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn answers_are_of_the_form() {
    let tokenizer = tokenizer();
    let asked = asked();
    for (asked, ids) in asked.iter().zip(alone(&asked)) {
        let shown = text(&tokenizer, &ids);
        assert!(tokenizer.special().eos.contains(ids.last().unwrap()), "{shown}");
        match asked.sampling.grammar.as_deref().unwrap() {
            Grammar::JsonSchema(_) => {
                let value: serde_json::Value = serde_json::from_str(&shown).unwrap();
                assert!(["Henry", "Richard"].contains(&value["king"].as_str().unwrap()));
                assert!(value["age"].as_u64().unwrap() < 100);
            }
            Grammar::Regex(_) => {
                let (who, what) = shown.split_once(": ").unwrap();
                assert!(who.starts_with("KING ") || who.starts_with("QUEEN "), "{shown}");
                assert!((11..=41).contains(&what.len()) && what.ends_with('.'), "{shown}");
            }
            Grammar::Choice(texts) => assert!(texts.contains(&shown), "{shown}"),
            Grammar::JsonObject => unreachable!("none asks for it"),
        }
    }
}

#[test]
fn batches_stages_and_preemption_change_no_token() {
    let asked = asked();
    let expected = alone(&asked);
    let model = demo::model().unwrap();
    for (threads, prefill_chunk, pages) in [(2, 7, 256), (1, 64, 8)] {
        let kv_bytes = pages * PAGE;
        let options = EngineOptions { threads, prefill_chunk, kv_bytes, ..with_grammars() };
        let engine = Engine::load(&model, &options).unwrap();
        assert_eq!(all(&engine, &asked), expected, "{threads}, {prefill_chunk}, {pages}");
    }
    let engine = pipeline(&[1, 2], &Seen::default(), &with_grammars());
    assert_eq!(all(&engine, &asked), expected, "three stages");
}

#[test]
fn a_resume_at_any_index_goes_on_alike() {
    let asked = asked();
    let expected = alone(&asked);
    let engine = Engine::load(&demo::model().unwrap(), &with_grammars()).unwrap();
    // One of each form; every index of it.
    for number in [0, 4, 8] {
        let ids = &expected[number];
        let resumed: Vec<_> = (0..ids.len())
            .map(|cut| SequenceRequest { resumed: ids[..cut].to_vec(), ..asked[number].clone() })
            .collect();
        for (cut, rest) in all(&engine, &resumed).into_iter().enumerate() {
            assert_eq!(rest, ids[cut..], "request {number} resumed at {cut}");
        }
    }
}

#[test]
fn what_cannot_be_followed_fails_alone() {
    let engine = Engine::load(&demo::model().unwrap(), &with_grammars()).unwrap();
    let prompt = &prompts(1)[0];
    let choice = |text: &str| SamplingParams {
        grammar: Some(Arc::new(Grammar::Choice(vec![text.to_owned()]))),
        ..SamplingParams::greedy()
    };
    let bad = SamplingParams {
        grammar: Some(Arc::new(Grammar::Regex("(".to_owned()))),
        ..SamplingParams::greedy()
    };
    let misfit = SequenceRequest { resumed: vec![7], ..request(prompt, 5, choice("x")) };
    let failing = [request(prompt, 5, bad), misfit];
    let good = submit(&engine, request(prompt, 3, choice("to be")));
    for asked in failing {
        let (_handle, receiver) = submit(&engine, asked);
        assert_eq!(receiver.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached: 0 }));
        let failed = receiver.recv_timeout(WAIT).unwrap();
        let is_grammar = matches!(failed, SequenceEvent::Failed(SequenceFailure::Grammar(_)));
        assert!(is_grammar, "{failed:?}");
    }
    assert!(!tokens(&good.1).is_empty());

    let without = Engine::load(&demo::model().unwrap(), &options()).unwrap();
    let (_handle, receiver) = submit(&without, request(prompt, 3, choice("to be")));
    drop(receiver.recv_timeout(WAIT));
    let failed = receiver.recv_timeout(WAIT).unwrap();
    assert!(matches!(failed, SequenceEvent::Failed(SequenceFailure::Grammar(_))), "{failed:?}");
}

/// What a grammar forbids is never accepted, and what fails behind right drafts fails as without.
#[test]
fn drafts_change_no_token_of_a_form() {
    use crate::drafter::Forced;

    let mut asked = asked();
    // Nothing stops these at the end of their form: they go on, or fail, as without drafts.
    for number in [0, 4, 8] {
        let output = Output::Generate { max_tokens: 160, stop_ids: Vec::new() };
        asked.push(SequenceRequest { output, ..asked[number].clone() });
    }
    let answers = |engine: &Engine| -> Vec<Vec<SequenceEvent>> {
        let running: Vec<_> = asked.iter().map(|asked| submit(engine, asked.clone())).collect();
        let told = running.iter().map(|(_, receiver)| {
            let told = receiver.iter();
            told.filter(|event| !matches!(event, SequenceEvent::Scheduled { .. })).collect()
        });
        told.collect()
    };
    let model = demo::model().unwrap();
    let options = EngineOptions { max_sequences: 2, ..with_grammars() };
    let expected = answers(&Engine::load(&model, &options).unwrap());
    let text = |(asked, told): (&SequenceRequest, &Vec<SequenceEvent>)| {
        let ids = told.iter().filter_map(|event| match event {
            SequenceEvent::Token { id, .. } => Some(*id),
            _ => None,
        });
        asked.prompt.iter().copied().chain(ids).collect::<Vec<u32>>()
    };
    let texts: Vec<_> = asked.iter().zip(&expected).map(text).collect();
    for acceptance in [0.0, 0.5, 0.8, 1.0] {
        let engine = Engine::load(&model, &options).unwrap();
        engine.draft_with(Some(Box::new(Forced::new(texts.clone(), acceptance, 1))), 5);
        assert_eq!(answers(&engine), expected, "{acceptance} right");
    }
}
