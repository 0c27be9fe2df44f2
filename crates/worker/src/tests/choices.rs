//! What a request can ask for besides the completion itself.

use tercet_proto::{
    InvalidRequest,
    v1::{FinishReason, finished::Matched},
};

use super::*;

/// Returns every token that a stream tells, with its log-probabilities.
fn tokens(events: &[Event]) -> Vec<(u32, v1::TokenLogprob)> {
    let deltas = events.iter().filter_map(|event| match event {
        Event::Delta(delta) => Some(delta),
        _ => None,
    });
    deltas
        .flat_map(|delta| {
            assert_eq!(delta.token_ids.len(), delta.logprobs.len());
            delta.token_ids.iter().copied().zip(delta.logprobs.clone())
        })
        .collect()
}

#[tokio::test]
async fn prompt_and_logprobs_come_at_every_resume_as_if_undisturbed() {
    let (node, _registry) = whole(options()).await;
    let mut asked = request(16);
    asked.echo = Some(true);
    asked.logprobs = Some(v1::Logprobs { top: 3 });
    let sampling = asked.sampling.as_mut().unwrap();
    sampling.repetition_penalty = Some(1.2);
    sampling.frequency_penalty = Some(0.5);
    sampling.min_p = Some(0.01);
    sampling.logit_bias = [(5, 2.0)].into();
    let whole = events(&node, asked.clone()).await;
    let prompt = tokenizer().encode_prompt(PROMPT).unwrap();
    let Event::Prompt(told) = &whole[1] else { panic!("{:?}", whole[1]) };
    assert_eq!((&told.token_ids, told.text.as_str()), (&prompt, PROMPT));
    let expected = tokens(&whole);
    assert_eq!(expected.len(), 16);
    for (id, logprob) in &expected {
        assert_eq!(logprob.token, tokenizer().token_bytes(*id));
        assert_eq!(logprob.top.len(), 3);
    }
    for cut in 0..=expected.len() {
        let token_ids = expected[..cut].iter().map(|(id, _)| *id).collect();
        let resume = Some(v1::Resume { seed: 7, token_ids });
        let rest = events(&node, v1::GenerateRequest { resume, ..asked.clone() }).await;
        assert_eq!(rest[..2], whole[..2], "after {cut}");
        assert_eq!(tokens(&rest), expected[cut..], "after {cut}");
        assert_eq!(rest.last(), whole.last(), "after {cut}");
    }
}

#[tokio::test]
async fn what_ended_a_completion_is_named() {
    let (node, _registry) = whole(options()).await;
    let undisturbed = generate(&node, request(24)).await.unwrap();
    let last = undisturbed.ids[9];
    let first = undisturbed.ids.iter().position(|id| *id == last).unwrap();
    let mut asked = request(24);
    asked.stop.as_mut().unwrap().token_ids = vec![last];
    let stopped = generate(&node, asked.clone()).await.unwrap();
    assert_eq!(stopped.ids, undisturbed.ids[..=first]);
    assert_eq!(stopped.finished.reason(), FinishReason::StopToken);
    assert_eq!(stopped.finished.matched, Some(Matched::StopToken(last)));

    let stop: String = undisturbed.text.chars().skip(5).take(2).collect();
    let mut by_text = request(24);
    by_text.stop.as_mut().unwrap().strings = vec!["no such text".to_owned(), stop.clone()];
    let stopped = generate(&node, by_text).await.unwrap();
    assert!(!stopped.text.contains(&stop), "{:?} has {stop:?}", stopped.text);
    assert_eq!(stopped.finished.matched, Some(Matched::StopString(stop)));

    asked.stop.as_mut().unwrap().token_ids = vec![1, u32::MAX];
    let refused = generate(&node, asked).await.unwrap_err();
    let violations = InvalidRequest::of(&refused).unwrap();
    assert_eq!(violations.violations()[0].field, "stop.token_ids[1]");
    let mut biased = request(4);
    biased.sampling.as_mut().unwrap().logit_bias = [(u32::MAX, 1.0)].into();
    let refused = generate(&node, biased).await.unwrap_err();
    let violations = InvalidRequest::of(&refused).unwrap();
    assert_eq!(violations.violations()[0].field, format!("sampling.logit_bias[{}]", u32::MAX));
}
