//! Drafts, right and wrong, change nothing but the number of steps.

use super::*;
use crate::{
    drafter::{Drafter, Undrafted},
    sampler::uniform,
};

/// Knows the stand-in for a model, and errs as often as it is told to.
#[derive(Debug)]
pub(super) struct Guesses {
    pub(super) acceptance: f64,
    pub(super) drawn: u64,
}

impl Drafter for Guesses {
    fn draft(&mut self, sequences: &[Undrafted<'_>]) -> Vec<Vec<u32>> {
        let mut all = Vec::new();
        for sequence in sequences {
            let mut tokens = sequence.tokens.to_vec();
            for _ in 0..sequence.most {
                self.drawn += 1;
                let right = uniform(1, self.drawn) < self.acceptance;
                let next = next_token(&tokens);
                tokens.push(if right { next } else { (next + 1) % 997 });
            }
            all.push(tokens.split_off(sequence.tokens.len()));
        }
        all
    }
}

fn drafting(config: SchedulerConfig, acceptance: f64, tokens: usize) -> Simulation {
    let mut simulation = Simulation::new(config);
    simulation.scheduler.draft_with(Some(Box::new(Guesses { acceptance, drawn: 0 })), tokens);
    simulation
}

/// Runs one request to its end; returns the number of steps.
fn steps(simulation: &mut Simulation) -> usize {
    let mut steps = 0;
    while let Some(shape) = simulation.plan() {
        // More rows take hardly longer.
        let rows = (shape.decode_rows + shape.draft_rows) as u64;
        simulation.scheduler.observe(&shape, Duration::from_millis(20 + rows));
        simulation.apply();
        steps += 1;
    }
    steps
}

#[test]
fn right_drafts_save_steps_and_wrong_ones_cost_few_rows() {
    let prompt: Vec<u32> = (0..20).collect();
    let run = |acceptance| {
        let mut simulation = drafting(config(8, 1, 100), acceptance, 3);
        simulation.submit(1, request(&prompt, 300));
        let steps = steps(&mut simulation);
        assert_eq!(simulation.completion(1), expected(&prompt, 300));
        (steps, simulation.tally)
    };
    let (plain, tally) = run(0.0);
    assert_eq!((plain, tally.accepted), (301, 0), "one step for each token, and the end");
    assert!((1..25).contains(&tally.drafted), "{tally:?}");
    let (half, tally) = run(0.5);
    assert!(half < 220 && 2 * tally.accepted > tally.drafted / 2, "{half} {tally:?}");
    assert_eq!(half + tally.accepted, 301);
    let (all, tally) = run(1.0);
    assert!(all < 100, "{all}");
    assert_eq!((all + tally.accepted, tally.drafted), (301, tally.accepted));
}

#[test]
fn nothing_is_drafted_beyond_the_end_beside_prompts_or_in_a_pipeline() {
    for max_tokens in 1..12 {
        let mut simulation = drafting(config(8, 4, 10), 1.0, 7);
        simulation.submit(1, request(&[1, 2], max_tokens));
        let mut rows = 0;
        while let Some(shape) = simulation.plan() {
            rows += shape.decode_rows + shape.draft_rows;
            simulation.scheduler.observe(&shape, Duration::from_millis(1));
            simulation.apply();
        }
        assert_eq!(rows, max_tokens - 1, "a row for each token after the first");
        assert_eq!(simulation.completion(1).len(), max_tokens);
    }
    for (steps_in_flight, score) in [(2, false), (1, true)] {
        let mut simulation =
            drafting(SchedulerConfig { steps_in_flight, ..config(30, 4, 1) }, 1.0, 7);
        simulation.submit(1, request(&[1, 2], 100));
        if score {
            let mut asked = request(&made_up(1, 150), 1);
            asked.output = Output::Score;
            simulation.submit(2, asked);
        }
        for _ in 0..100 {
            if let Some(shape) = simulation.plan() {
                assert_eq!(shape.draft_rows, 0);
                simulation.scheduler.observe(&shape, Duration::from_millis(1));
            }
            simulation.apply();
        }
    }
}

#[test]
fn what_comes_after_a_stop_token_is_dropped() {
    let prompt = [1, 2, 3];
    let completion = expected(&prompt, 40);
    for (stop, id) in completion.iter().enumerate() {
        let mut simulation = drafting(config(8, 4, 10), 1.0, 7);
        let mut asked = request(&prompt, 40);
        asked.output = Output::Generate { max_tokens: 40, stop_ids: vec![*id] };
        simulation.submit(1, asked);
        simulation.drain();
        let first = completion.iter().position(|other| other == id).unwrap();
        assert_eq!(simulation.completion(1), completion[..=first], "{stop}");
        let told = &simulation.told[&RequestKey(1)];
        let finished = told.iter().filter(|event| matches!(event, SequenceEvent::Finished(_)));
        assert_eq!(finished.count(), 1);
    }
}

#[test]
fn tokens_that_do_not_follow_the_drafts_are_refused() {
    for (answer, fits) in [(&[4_u32][..], true), (&[5, 4], true), (&[4, 4], false), (&[], false)] {
        let mut simulation = drafting(config(8, 4, 10), 1.0, 1);
        simulation.submit(1, request(&[1], 100));
        let planned = loop {
            let planned = simulation.scheduler.plan().unwrap();
            simulation.scheduler.observe(&planned.shape, Duration::from_millis(1));
            if planned.shape.draft_rows > 0 {
                break planned;
            }
            let result = simulation.stages.compute(&planned);
            simulation.scheduler.apply(result).unwrap();
        };
        let RunOutput::Verify(drafts) = &planned.plan.runs[0].output else { unreachable!() };
        let id = |id: u32| if id == 5 { drafts[0] } else { drafts[0] ^ 1 };
        let tokens = answer.iter().map(|n| SampledToken { id: id(*n), logprobs: None });
        let outcome = RunOutcome::Tokens(tokens.collect());
        let results = vec![RunResult { sequence: planned.plan.runs[0].sequence, outcome }];
        let result = StepResult { step: planned.plan.step, results };
        assert_eq!(simulation.scheduler.apply(result).is_ok(), fits, "{answer:?}");
    }
}
