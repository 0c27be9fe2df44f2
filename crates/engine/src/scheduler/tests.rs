mod drafts;
mod prefixes;
mod random;

use std::collections::{HashMap, HashSet};

use super::*;
use crate::{
    kv::{KvCache, KvShape},
    plan::{RunOutcome, RunOutput, RunResult, SampledToken},
    request::{Output, SequenceFailure, StopReason},
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
        prefill_stretch: 1.6,
        model: [7; 32],
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
        cache_salt: String::new(),
    }
}

/// The token that the stand-in for a model samples after `tokens`.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7_u32, |sum, id| sum.wrapping_mul(31).wrapping_add(*id)) % 997
}

/// In a prompt, makes the computation fail there.
const POISON: u32 = 999;

/// Stands in for the stages: the real page array, where the key of a position stands for its id.
struct Stages {
    kv: KvCache,
    open: HashSet<SequenceId>,
}

impl Stages {
    fn new(pages: usize) -> Self {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 1 };
        Self { kv: KvCache::new(shape, pages), open: HashSet::new() }
    }

    fn compute(&mut self, planned: &Planned) -> StepResult {
        for id in &planned.plan.close {
            assert!(self.open.remove(id), "closed {id} without opening it");
            self.kv.release(*id);
        }
        for open in &planned.plan.open {
            assert!(self.open.insert(open.id), "opened {} twice", open.id);
            self.kv.open(open.id, &open.pages).unwrap();
        }
        let mut ids = planned.ids.iter().copied();
        let mut results = Vec::new();
        let mut seen = HashSet::new();
        for run in &planned.plan.runs {
            assert!(seen.insert(run.sequence), "two runs of one sequence in a step");
            assert!(self.open.contains(&run.sequence) && run.rows > 0);
            self.kv.extend(run.sequence, run.position, run.rows, run.drafts(), &run.pages).unwrap();
            let (mut failed, due) = (false, run.position + run.rows - run.drafts());
            for (position, id) in (run.position..).zip(ids.by_ref().take(run.rows)) {
                failed |= id == POISON && position < due;
                // What is computed from a failed row on is of no use.
                let key = if failed { f32::NAN } else { f32::from_bits(id + 1) };
                self.kv.write(run.sequence, 0, position, &[key], &[0.0]);
            }
            let held = || self.held(run.sequence, run.position + run.rows);
            let outcome = match &run.output {
                _ if failed => RunOutcome::NonFinite,
                RunOutput::None => continue,
                RunOutput::Sample => RunOutcome::Token { id: next_token(&held()), logprobs: None },
                RunOutput::Verify(drafts) => RunOutcome::Tokens(self.verify(run, drafts)),
                RunOutput::Score(targets) => RunOutcome::Scores(Scores {
                    logprobs: targets.iter().map(|id| -(*id as f32)).collect(),
                    top_ids: held().split_off(run.position),
                }),
            };
            results.push(RunResult { sequence: run.sequence, outcome });
        }
        assert_eq!(ids.next(), None);
        StepResult { step: planned.plan.step, results }
    }

    fn verify(&self, run: &Run, drafts: &[u32]) -> Vec<SampledToken> {
        let mut sampled = Vec::new();
        for row in 0..run.rows {
            let id = next_token(&self.held(run.sequence, run.position + row + 1));
            sampled.push(SampledToken { id, logprobs: None });
            if drafts.get(row) != Some(&id) {
                break;
            }
        }
        sampled
    }

    /// Reads the ids of a sequence, as attention would.
    fn held(&self, sequence: SequenceId, positions: usize) -> Vec<u32> {
        let table = self.kv.table(sequence);
        let id = |position: usize| {
            let key =
                self.kv.block(table, position / PAGE_POSITIONS, 0, 0).0[position % PAGE_POSITIONS];
            assert!(key > 0.0, "position {position} of {sequence} was never computed");
            key.to_bits() - 1
        };
        (0..positions).map(id).collect()
    }
}

/// A scheduler, stages, and what was told.
struct Simulation {
    scheduler: Scheduler,
    stages: Stages,
    told: HashMap<RequestKey, Vec<SequenceEvent>>,
    under_way: VecDeque<StepResult>,
    tally: Tally,
}

impl Simulation {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config),
            stages: Stages::new(config.pages),
            told: HashMap::new(),
            under_way: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    fn submit(&mut self, key: u64, asked: SequenceRequest) {
        let key = RequestKey(key);
        let event = self.scheduler.submit(key, asked).unwrap();
        self.told.entry(key).or_default().extend(event);
    }

    /// Plans a step, if there is one; its results are under way then.
    fn plan(&mut self) -> Option<StepShape> {
        let planned = self.scheduler.plan();
        self.check();
        let planned = planned?;
        for (key, event) in &planned.events {
            self.told.entry(*key).or_default().push(event.clone());
        }
        self.tally.preemptions += planned.tally.preemptions;
        self.tally.hit_tokens += planned.tally.hit_tokens;
        self.tally.drafted += planned.tally.drafted;
        self.tally.accepted += planned.tally.accepted;
        self.under_way.push_back(self.stages.compute(&planned));
        assert!(self.under_way.len() <= self.scheduler.config.steps_in_flight);
        Some(planned.shape)
    }

    /// Takes in the oldest result; false if there is none.
    fn apply(&mut self) -> bool {
        let Some(result) = self.under_way.pop_front() else { return false };
        for (key, event) in self.scheduler.apply(result).unwrap() {
            self.told.entry(key).or_default().push(event);
        }
        self.check();
        true
    }

    fn abandon(&mut self) -> Vec<RequestKey> {
        self.under_way.clear();
        self.stages = Stages::new(self.scheduler.config.pages);
        let keys = self.scheduler.abandon();
        self.check();
        keys
    }

    /// Runs until nothing is left.
    fn drain(&mut self) {
        for _ in 0..50_000 {
            while let Some(shape) = self.plan() {
                self.scheduler.observe(&shape, Duration::from_millis(1));
            }
            if !self.apply() {
                let load = self.scheduler.load();
                assert_eq!((load.running, load.waiting, load.pages_referenced), (0, 0, 0));
                return;
            }
        }
        panic!("no end in 50000 steps");
    }

    fn check(&self) {
        let tables = self.scheduler.running.iter().map(|sequence| sequence.table.pages());
        self.scheduler.pages.assert_exact(tables);
        let waiting = &self.scheduler.waiting;
        assert!(waiting.iter().all(|sequence| sequence.table.pages().is_empty()));
        let load = self.scheduler.load();
        assert!(load.pages_referenced + load.pages_cached <= load.pages);
    }

    /// Returns the tokens of a request that was completed.
    fn completion(&self, key: u64) -> Vec<u32> {
        let told = &self.told[&RequestKey(key)];
        assert!(matches!(told.last(), Some(SequenceEvent::Finished(_))), "{told:?}");
        tokens_of(told)
    }

    /// Returns the cached tokens of each time that a request was begun.
    fn cached(&self, key: u64) -> Vec<usize> {
        let cached = |event: &SequenceEvent| match event {
            SequenceEvent::Scheduled { cached } => Some(*cached),
            _ => None,
        };
        self.told[&RequestKey(key)].iter().filter_map(cached).collect()
    }
}

/// Runs until nothing is left, returns what each request was told.
fn drain(scheduler: Scheduler) -> (HashMap<RequestKey, Vec<SequenceEvent>>, Load) {
    let mut simulation = Simulation::new(scheduler.config);
    simulation.scheduler = scheduler;
    simulation.drain();
    (simulation.told, simulation.scheduler.load())
}

fn tokens_of(events: &[SequenceEvent]) -> Vec<u32> {
    let mut tokens = Vec::new();
    for event in events {
        if let SequenceEvent::Token { index, id, .. } = event {
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
    let mut stages = Stages::new(8);
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
        let (mut told, load) = drain(scheduler);
        let told = told.remove(&RequestKey(1)).unwrap();
        assert_eq!(tokens_of(&told).len(), n);
        assert_eq!(told.last(), Some(&SequenceEvent::Finished(reason)));
        let pages_cached = if n == 509 { 7 } else { 0 };
        assert_eq!(load, Load { pages: 8, pages_cached, ..Load::default() });
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
        let told = drain(scheduler).0.remove(&RequestKey(1)).unwrap();
        let rest: Vec<(usize, u32)> = told
            .iter()
            .filter_map(|event| match event {
                SequenceEvent::Token { index, id, .. } => Some((*index, *id)),
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
    let told = drain(scheduler).0.remove(&RequestKey(1)).unwrap();
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
    let stray = RunResult {
        sequence: SequenceId(99),
        outcome: RunOutcome::Token { id: 1, logprobs: None },
    };
    let result = StepResult { step: planned.plan.step, results: vec![stray] };
    assert!(scheduler.apply(result).is_err());
    assert_eq!(scheduler.abandon(), [RequestKey(1)]);
    assert_eq!(scheduler.load().pages_referenced, 0);
}

fn made_up(index: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| u32::try_from((i * 7 + index) % POISON as usize).unwrap()).collect()
}
