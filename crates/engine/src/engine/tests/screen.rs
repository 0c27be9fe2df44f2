//! A screen of the head changes no answer.

use tercet_text::{Grammar, Tokenizer};

use super::*;

/// Parameters that few logits decide: every combination of what changes them.
fn deciding() -> Vec<SamplingParams> {
    (0..48_u64)
        .map(|i| {
            let grammar = Grammar::Regex("(KING|QUEEN) [A-Z][a-z]{2,9}: [a-z ,]{10,40}[.]".into());
            SamplingParams {
                temperature: if i % 4 == 0 { 0.0 } else { 1.4 },
                top_k: [40, 1, 5, 64][usize::try_from(i % 4).unwrap()],
                top_p: if i % 5 == 0 { 0.8 } else { 1.0 },
                grammar: (i % 7 == 3).then(|| Arc::new(grammar)),
                top_logprobs: None,
                ..sampled(i)
            }
        })
        .collect()
}

/// Returns the tokens of one sequence for each of `asked`, and what the screen did.
fn run(options: &EngineOptions, asked: &[SamplingParams]) -> (Vec<Vec<u32>>, ScreenTally) {
    let model = demo::model().unwrap();
    let tokenizer = Arc::new(Tokenizer::new(&model.tokenizer, model.special.clone()).unwrap());
    let grammars = Some(Arc::new(Grammars::new(tokenizer, model.config.vocab)));
    let options = EngineOptions { grammars, ..options.clone() };
    let engine = Engine::load(&model, &options).unwrap();
    let total = Arc::new(Mutex::new(ScreenTally::default()));
    let sum = Arc::clone(&total);
    engine.observe_steps(Box::new(move |report| *sum.lock().unwrap() += report.screen));
    let running: Vec<_> = asked
        .iter()
        .zip(prompts(asked.len()))
        .map(|(sampling, prompt)| submit(&engine, request(&prompt, 24, sampling.clone())))
        .collect();
    let tokens = running.iter().map(|(_, receiver)| tokens(receiver)).collect();
    drop(engine);
    let total = *total.lock().unwrap();
    (tokens, total)
}

#[test]
fn a_screen_changes_no_token() {
    let asked = deciding();
    let off = EngineOptions { head_screen: HeadScreen::Off, ..options() };
    let (expected, tally) = run(&off, &asked);
    assert_eq!(tally, ScreenTally::default());
    for (threads, max_sequences) in [(1, 1), (3, 1), (2, 3), (2, 8)] {
        let head_screen = HeadScreen::On;
        let on = EngineOptions { threads, max_sequences, head_screen, ..options() };
        let (found, tally) = run(&on, &asked);
        for ((found, expected), asked) in found.iter().zip(&expected).zip(&asked) {
            assert_eq!(found, expected, "{threads} threads, {max_sequences} at once: {asked:?}");
        }
        if max_sequences <= 3 {
            let all: usize = expected.iter().map(Vec::len).sum();
            assert!(tally.tokens * 2 > all as u64, "{tally:?} of {all} tokens");
            assert!(tally.rows >= tally.tokens, "{tally:?}");
        }
    }
}

#[test]
fn what_needs_the_whole_distribution_is_not_screened() {
    let on = EngineOptions { head_screen: HeadScreen::On, max_sequences: 1, ..options() };
    let greedy = SamplingParams::greedy();
    let (_, tally) = run(
        &on,
        &[
            SamplingParams { top_logprobs: Some(2), ..greedy.clone() },
            SamplingParams { temperature: 1.0, ..greedy.clone() },
            SamplingParams { temperature: 1.0, top_k: 65, ..greedy },
        ],
    );
    assert_eq!(tally, ScreenTally::default());
}

#[test]
fn choices_have_names() {
    for choice in HeadScreen::ALL {
        assert_eq!(choice.to_string().parse(), Ok(choice));
    }
    let error = "perhaps".parse::<HeadScreen>().unwrap_err().to_string();
    assert_eq!(error, "no way to screen a head \"perhaps\"; expected auto, off or on");
}
