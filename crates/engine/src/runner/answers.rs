//! From the hidden states of a step to the answers of its runs.
//!
//! The rows of all runs go through the head together, some at a time, so that a step reads the
//! head's weights once for many sequences. What is made of a row of logits, a token or a score, is
//! of that row and its sequence alone: threads take rows.

use std::collections::HashMap;

use tercet_kernels::{Kernels, Lead};
use tercet_text::GrammarError;

use super::{LogitsObserver, Opened};
use crate::{
    forward::Forward,
    plan::{RunOutcome, RunOutput, RunResult, Scores, SequenceId, StepPlan, TokenLogprobs},
    sampler::{Sampler, largest, token_id},
};

/// Rows of logits computed at once: bounds the memory of many sequences, and of a `Score`, over a
/// large vocabulary.
const LOGIT_ROWS: usize = 32;

/// What answering needs besides the forward pass.
pub(super) struct Answers<'a> {
    pub(super) sequences: &'a mut HashMap<SequenceId, Opened>,
    /// One for each thread.
    pub(super) samplers: &'a mut Vec<Sampler>,
    pub(super) observer: &'a mut Option<LogitsObserver>,
    pub(super) logits: &'a mut Vec<f32>,
}

/// A row that needs logits.
#[derive(Clone, Copy)]
struct Wanted {
    /// Index of its run.
    run: usize,
    /// Index in the run.
    offset: usize,
    /// Index in the step.
    row: usize,
}

/// How far the answer to a run is.
#[derive(Default)]
struct Progress {
    /// Something of the run was not finite.
    failed: bool,
    sampled: Option<Result<(u32, Option<TokenLogprobs>), GrammarError>>,
    scores: Scores,
}

/// What is to be made of a row of logits.
struct Job<'a> {
    wanted: Wanted,
    task: Task<'a>,
    logits: &'a [f32],
}

enum Task<'a> {
    /// Samples the token at this position.
    Sample { opened: &'a mut Opened, position: usize },
    /// Scores this token, if there is one.
    Score { target: Option<u32> },
}

/// What was made of a row of logits.
enum Made {
    Sampled(Result<(u32, Option<TokenLogprobs>), GrammarError>),
    Scored { top: u32, logprob: Option<f32> },
}

impl Answers<'_> {
    /// Returns what the last stage says of the runs of `plan`, whose rows are in the hidden state;
    /// `failed` says which rows are not finite.
    pub(super) fn answer(
        &mut self,
        forward: &mut Forward<'_>,
        plan: &StepPlan,
        failed: &[bool],
    ) -> Vec<RunResult> {
        let mut progress = Vec::with_capacity(plan.runs.len());
        let mut wanted = Vec::new();
        let mut first = 0;
        for (index, run) in plan.runs.iter().enumerate() {
            let failed = failed[first..first + run.rows].contains(&true);
            progress.push(Progress { failed, ..Progress::default() });
            let offsets = match run.output {
                _ if failed => 0..0,
                RunOutput::Score(_) => 0..run.rows,
                _ if self.observer.is_some() => 0..run.rows,
                RunOutput::Sample => run.rows - 1..run.rows,
                RunOutput::None => 0..0,
            };
            wanted.extend(offsets.map(|offset| Wanted { run: index, offset, row: first + offset }));
            first += run.rows;
        }
        let mut wanted = wanted.into_iter();
        loop {
            let alive = wanted.by_ref().filter(|wanted| !progress[wanted.run].failed);
            let group: Vec<_> = alive.take(LOGIT_ROWS).collect();
            if group.is_empty() {
                break;
            }
            self.answer_rows(forward, plan, &group, &mut progress);
        }
        let answers = plan.runs.iter().zip(progress);
        answers
            .filter_map(|(run, progress)| {
                let outcome = progress.outcome(&run.output)?;
                Some(RunResult { sequence: run.sequence, outcome })
            })
            .collect()
    }

    /// Takes some rows through the head, and their runs further.
    fn answer_rows(
        &mut self,
        forward: &mut Forward<'_>,
        plan: &StepPlan,
        group: &[Wanted],
        progress: &mut [Progress],
    ) {
        let vocab = forward.config.vocab;
        let rows: Vec<_> = group.iter().map(|wanted| wanted.row).collect();
        self.logits.resize(group.len() * vocab, 0.0);
        let finite = forward.logits(&rows, self.logits);
        let mut opened: HashMap<_, _> = self.sequences.iter_mut().collect();
        let mut jobs = Vec::with_capacity(group.len());
        for ((wanted, logits), finite) in
            group.iter().zip(self.logits.chunks_exact(vocab)).zip(finite)
        {
            let (run, progress) = (&plan.runs[wanted.run], &mut progress[wanted.run]);
            progress.failed |= !finite;
            if progress.failed {
                continue;
            }
            if let Some(observer) = self.observer {
                observer(run.sequence, run.position + wanted.offset, logits);
            }
            let task = match &run.output {
                RunOutput::Sample if wanted.offset + 1 == run.rows => Task::Sample {
                    opened: opened.remove(&run.sequence).expect("runs are of open sequences"),
                    position: run.position + run.rows,
                },
                RunOutput::Score(targets) => {
                    Task::Score { target: targets.get(wanted.offset).copied() }
                }
                RunOutput::Sample | RunOutput::None => continue,
            };
            jobs.push(Job { wanted: *wanted, task, logits });
        }
        for (wanted, made) in make_all(forward.kernels, forward.lead, self.samplers, jobs) {
            let progress = &mut progress[wanted.run];
            match made {
                Made::Sampled(sampled) => progress.sampled = Some(sampled),
                Made::Scored { top, logprob } => {
                    progress.scores.top_ids.push(top);
                    progress.scores.logprobs.extend(logprob);
                }
            }
        }
    }
}

impl Progress {
    /// Returns the answer to a run that asked for `output`.
    fn outcome(self, output: &RunOutput) -> Option<RunOutcome> {
        Some(match (output, self.sampled) {
            (RunOutput::None, _) if !self.failed => return None,
            _ if self.failed => RunOutcome::NonFinite,
            (RunOutput::Score(_), _) => RunOutcome::Scores(self.scores),
            (_, Some(Ok((id, logprobs)))) => RunOutcome::Token { id, logprobs },
            (_, Some(Err(error))) => RunOutcome::Grammar(error.to_string()),
            (_, None) => return None,
        })
    }
}

/// Does the jobs, a share on each thread; returns what came out in their order.
fn make_all(
    kernels: Kernels,
    lead: &Lead<'_>,
    samplers: &mut Vec<Sampler>,
    jobs: Vec<Job<'_>>,
) -> Vec<(Wanted, Made)> {
    samplers.resize_with(lead.threads(), Sampler::default);
    let mut made: Vec<_> = jobs.iter().map(|job| (job.wanted, None)).collect();
    let share = jobs.len().div_ceil(lead.threads()).max(1);
    let mut jobs = jobs.into_iter();
    let parts: Vec<_> = made
        .chunks_mut(share)
        .zip(samplers)
        .map(|(made, sampler)| (jobs.by_ref().take(made.len()).collect::<Vec<_>>(), made, sampler))
        .collect();
    lead.run(parts, |_, (jobs, made, sampler)| {
        for (job, (_, made)) in jobs.into_iter().zip(made) {
            *made = Some(job.make(kernels, sampler));
        }
    });
    made.into_iter().filter_map(|(wanted, made)| Some((wanted, made?))).collect()
}

impl Job<'_> {
    fn make(self, kernels: Kernels, sampler: &mut Sampler) -> Made {
        let logits = self.logits;
        match self.task {
            Task::Sample { opened, position } => {
                Made::Sampled(opened.sample(kernels, sampler, logits, position))
            }
            Task::Score { target } => {
                let top = kernels.argmax(logits);
                let logprob = target.map(|target| {
                    Normalizer::new(kernels, logits, logits[top]).logprob(logits, target)
                });
                Made::Scored { top: token_id(top), logprob }
            }
        }
    }
}

impl Opened {
    /// Returns the token sampled from `logits` for `position`, which becomes part of the history.
    fn sample(
        &mut self,
        kernels: Kernels,
        sampler: &mut Sampler,
        logits: &[f32],
        position: usize,
    ) -> Result<(u32, Option<TokenLogprobs>), GrammarError> {
        let Self { sampling, history, constraint } = self;
        let mut constraint = match constraint {
            Some(Ok(constraint)) => Some(constraint),
            Some(Err(error)) => return Err(error.clone()),
            None => None,
        };
        let mask = constraint.as_mut().map(|constraint| constraint.mask()).transpose()?;
        let id = sampler.sample(kernels, logits, sampling, history, mask.as_ref(), position);
        if sampling.looks_at_completion() {
            history.push(id);
        }
        if let Some(constraint) = constraint {
            constraint.accept(id)?;
        }
        let logprobs = sampling.top_logprobs.map(|top| {
            let normal = Normalizer::new(kernels, logits, logits[kernels.argmax(logits)]);
            let top = largest(logits, top as usize);
            TokenLogprobs {
                logprob: normal.logprob(logits, id),
                top: top.into_iter().map(|id| (id, normal.logprob(logits, id))).collect(),
            }
        });
        Ok((id, logprobs))
    }
}

/// What turns the logits of a row into log-probabilities.
struct Normalizer {
    max: f32,
    log_sum: f32,
}

impl Normalizer {
    /// Returns that of `logits`, the largest of which is `max`.
    fn new(kernels: Kernels, logits: &[f32], max: f32) -> Self {
        Self { max, log_sum: libm::logf(kernels.sum_exp(logits, max)) }
    }

    fn logprob(&self, logits: &[f32], id: u32) -> f32 {
        logits[id as usize] - self.max - self.log_sum
    }
}
