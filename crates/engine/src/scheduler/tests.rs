use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::{
    plan::{RunOutcome, RunResult},
    request::{Output, StopReason},
    sampler::SamplingParams,
};

fn config(pages: usize, max_sequences: usize, prefill_chunk: usize) -> SchedulerConfig {
    SchedulerConfig {
        vocab: 1000,
        context: 512,
        pages,
        max_sequences,
        max_waiting: 1000,
        prefill_chunk,
        steps_in_flight: 1,
    }
}

fn request(prompt: &[u32], max_tokens: usize) -> SequenceRequest {
    SequenceRequest {
        prompt: prompt.to_vec(),
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        output: Output::Generate { max_tokens, stop_ids: Vec::new() },
        traceparent: String::new(),
    }
}

/// The token that the stand-in for a model samples after `tokens`.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7_u32, |sum, id| sum.wrapping_mul(31).wrapping_add(*id)) % 997
}

/// Stands in for the stages: checks that rows follow each other and that pages suffice.
#[derive(Default)]
struct Stages {
    held: HashMap<SequenceId, Vec<u32>>,
    pages: usize,
}

impl Stages {
    fn compute(&mut self, planned: &Planned) -> StepResult {
        for id in &planned.plan.close {
            assert!(self.held.remove(id).is_some(), "closed {id} without opening it");
        }
        for open in &planned.plan.open {
            assert!(self.held.insert(open.id, Vec::new()).is_none(), "opened {} twice", open.id);
        }
        let mut ids = planned.ids.iter().copied();
        let mut results = Vec::new();
        let mut seen = HashSet::new();
        for run in &planned.plan.runs {
            assert!(seen.insert(run.sequence), "two runs of one sequence in a step");
            let held = self.held.get_mut(&run.sequence).expect("run of an open sequence");
            assert_eq!(held.len(), run.position, "rows follow each other");
            assert!(run.rows > 0);
            held.extend(ids.by_ref().take(run.rows));
            let outcome = match &run.output {
                RunOutput::None => continue,
                RunOutput::Sample => RunOutcome::Token(next_token(held)),
                RunOutput::Score(targets) => RunOutcome::Scores(Scores {
                    logprobs: targets.iter().map(|id| -(*id as f32)).collect(),
                    top_ids: held[run.position..].to_vec(),
                }),
            };
            results.push(RunResult { sequence: run.sequence, outcome });
        }
        assert_eq!(ids.next(), None);
        let used: usize = self.held.values().map(|held| pages_for(held.len())).sum();
        assert!(used <= self.pages, "{used} of {} pages", self.pages);
        StepResult { step: planned.plan.step, results }
    }
}

/// Runs until nothing is left, returns what each request was told.
fn drain(scheduler: &mut Scheduler) -> HashMap<RequestKey, Vec<SequenceEvent>> {
    let mut stages = Stages { pages: scheduler.config.pages, ..Stages::default() };
    let mut told: HashMap<RequestKey, Vec<SequenceEvent>> = HashMap::new();
    let mut under_way = VecDeque::new();
    for _ in 0..100_000 {
        while let Some(planned) = scheduler.plan() {
            for (key, event) in &planned.events {
                told.entry(*key).or_default().push(event.clone());
            }
            under_way.push_back(stages.compute(&planned));
        }
        let Some(result) = under_way.pop_front() else { return told };
        for (key, event) in scheduler.apply(result).unwrap() {
            told.entry(key).or_default().push(event);
        }
    }
    panic!("no end in 100000 steps");
}

fn tokens_of(events: &[SequenceEvent]) -> Vec<u32> {
    let mut tokens = Vec::new();
    for event in events {
        if let SequenceEvent::Token { index, id } = event {
            assert_eq!(*index, tokens.len(), "indices ascend by one");
            tokens.push(*id);
        }
    }
    tokens
}

fn expected(prompt: &[u32], n: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..n {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

#[test]
fn long_prompts_are_cut_into_chunks() {
    let mut scheduler = Scheduler::new(config(8, 4, 10));
    let prompt: Vec<u32> = (0..25).collect();
    scheduler.submit(RequestKey(1), request(&prompt, 2)).unwrap();
    let mut sizes = Vec::new();
    let mut stages = Stages { pages: 8, ..Stages::default() };
    while let Some(planned) = scheduler.plan() {
        sizes.push(planned.plan.rows());
        let result = stages.compute(&planned);
        scheduler.apply(result).unwrap();
    }
    // Three chunks, one more row for the second token, and the step that closes.
    assert_eq!(sizes, [10, 10, 5, 1, 0]);
}

#[test]
fn eos_max_tokens_and_context_end_a_completion() {
    let prompt = [1, 2, 3];
    let completion = expected(&prompt, 3);
    for (max_tokens, stop_ids, reason, n) in [
        (3, vec![], StopReason::MaxTokens, 3),
        (9, vec![completion[1]], StopReason::Eos, 2),
        (9999, vec![], StopReason::Context, 509),
    ] {
        let mut scheduler = Scheduler::new(config(8, 4, 10));
        let mut asked = request(&prompt, max_tokens);
        asked.output = Output::Generate { max_tokens, stop_ids };
        scheduler.submit(RequestKey(1), asked).unwrap();
        let told = drain(&mut scheduler).remove(&RequestKey(1)).unwrap();
        assert_eq!(tokens_of(&told).len(), n);
        assert_eq!(told.last(), Some(&SequenceEvent::Finished(reason)));
        assert_eq!(scheduler.load(), Load { pages: 8, ..Load::default() });
    }
}

#[test]
fn a_resume_goes_on_at_the_next_index_or_is_complete() {
    let prompt = [4, 5];
    let completion = expected(&prompt, 6);
    for cut in 0..=6 {
        let mut scheduler = Scheduler::new(config(8, 4, 10));
        let mut asked = request(&prompt, 6);
        asked.resumed = completion[..cut].to_vec();
        let at_once = scheduler.submit(RequestKey(1), asked).unwrap();
        if cut == 6 {
            assert_eq!(at_once, Some(SequenceEvent::Finished(StopReason::MaxTokens)));
            continue;
        }
        assert_eq!(at_once, None);
        let told = drain(&mut scheduler).remove(&RequestKey(1)).unwrap();
        let rest: Vec<(usize, u32)> = told
            .iter()
            .filter_map(|event| match event {
                SequenceEvent::Token { index, id } => Some((*index, *id)),
                _ => None,
            })
            .collect();
        let expected: Vec<(usize, u32)> =
            completion.iter().copied().enumerate().skip(cut).collect();
        assert_eq!(rest, expected);
    }
}

#[test]
fn scores_of_chunks_are_put_together() {
    let mut scheduler = Scheduler::new(config(8, 4, 3));
    let prompt: Vec<u32> = (10..18).collect();
    let mut asked = request(&prompt, 1);
    asked.output = Output::Score;
    scheduler.submit(RequestKey(1), asked).unwrap();
    let told = drain(&mut scheduler).remove(&RequestKey(1)).unwrap();
    let scores = Scores {
        logprobs: prompt[1..].iter().map(|id| -(*id as f32)).collect(),
        top_ids: prompt.clone(),
    };
    assert_eq!(told.last(), Some(&SequenceEvent::Scores(scores)));
}

#[test]
fn bad_requests_name_the_limit() {
    let mut scheduler = Scheduler::new(config(2, 4, 3));
    let mut submit = |asked| scheduler.submit(RequestKey(1), asked).unwrap_err();
    assert_eq!(submit(request(&[], 1)), SubmitError::EmptyPrompt);
    assert_eq!(
        submit(request(&[1, 1000], 1)),
        SubmitError::InvalidId { index: 1, id: 1000, vocab: 1000 }
    );
    assert_eq!(submit(request(&[1; 129], 1)), SubmitError::TooLong { tokens: 129, limit: 128 });
}

#[test]
fn a_result_that_does_not_fit_is_refused() {
    let mut scheduler = Scheduler::new(config(2, 4, 3));
    assert!(scheduler.apply(StepResult { step: 0, results: vec![] }).is_err());
    scheduler.submit(RequestKey(1), request(&[1, 2], 1)).unwrap();
    let planned = scheduler.plan().unwrap();
    let stray = RunResult { sequence: SequenceId(99), outcome: RunOutcome::Token(1) };
    let result = StepResult { step: planned.plan.step, results: vec![stray] };
    assert!(scheduler.apply(result).is_err());
    assert_eq!(scheduler.abandon(), [RequestKey(1)]);
    assert_eq!(scheduler.load().pages_used, 0);
}

fn made_up(index: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| u32::try_from((i * 7 + index) % 1000).unwrap()).collect()
}

proptest! {
    /// Whatever the limits, every request gets the tokens that it would get alone, whoever is
    /// preempted or cancelled, and no page is lost.
    #[test]
    fn every_completion_equals_its_solo_run(
        lengths in prop::collection::vec((1_usize..150, 1_usize..150), 1..12),
        pages in 5_usize..9,
        max_sequences in 1_usize..6,
        prefill_chunk in 1_usize..70,
        steps_in_flight in 1_usize..4,
        cancelled in prop::collection::hash_set(0_usize..12, 0..4),
    ) {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            steps_in_flight,
            ..config(pages, max_sequences, prefill_chunk)
        });
        for (index, (prompt_tokens, max_tokens)) in lengths.iter().enumerate() {
            let prompt = made_up(index, *prompt_tokens);
            scheduler
                .submit(RequestKey(index as u64), request(&prompt, *max_tokens))
                .unwrap();
        }
        for index in &cancelled {
            scheduler.cancel(RequestKey(*index as u64));
        }
        let told = drain(&mut scheduler);
        prop_assert_eq!(scheduler.load(), Load { pages, ..Load::default() });
        for (index, (prompt_tokens, max_tokens)) in lengths.iter().enumerate() {
            let told = told.get(&RequestKey(index as u64));
            if cancelled.contains(&index) {
                prop_assert!(told.is_none());
                continue;
            }
            let told = told.expect("every request is answered");
            let prompt = made_up(index, *prompt_tokens);
            let n = (*max_tokens).min(pages * PAGE_POSITIONS - prompt_tokens);
            prop_assert_eq!(tokens_of(told), expected(&prompt, n));
            prop_assert!(matches!(told.last(), Some(SequenceEvent::Finished(_))));
        }
    }
}
