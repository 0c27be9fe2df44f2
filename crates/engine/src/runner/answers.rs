//! From the hidden states of a step to the answers of its runs.
//!
//! The rows of all runs go through the head together, some at a time, so that a step reads the
//! head's weights once for many sequences. What is made of a row of logits, a token or a score, is
//! of that row and its sequence alone: threads take rows.

use std::collections::HashMap;

use tercet_kernels::{Kernels, Screen};
use tercet_text::{GrammarError, TokenMask};

use super::{
    LogitsObserver, Opened,
    screening::{MOST_TOKENS, Screening, Wish},
};
use crate::{
    engine::ScreenTally,
    forward::Forward,
    plan::{
        RunOutcome, RunOutput, RunResult, SampledToken, Scores, SequenceId, StepPlan, TokenLogprobs,
    },
    sampler::{Sampler, adjusted, changed, largest, token_id},
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
    pub(super) screen: Option<&'a Screen>,
    pub(super) tally: &'a mut ScreenTally,
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
    /// The rest of the run is of no use.
    complete: bool,
    sampled: Vec<SampledToken>,
    error: Option<GrammarError>,
    scores: Scores,
}

/// What is to be made of rows of logits that follow each other.
struct Job<'a> {
    first: Wanted,
    task: Task<'a>,
    logits: &'a [f32],
}

enum Task<'a> {
    /// Samples the token at this position, and those after it as long as they are these drafts.
    Sample { opened: &'a mut Opened, position: usize, drafts: &'a [u32] },
    /// Scores this token, if there is one.
    Score { target: Option<u32> },
}

/// What was made of rows of logits.
enum Made {
    Sampled(Sampled),
    Scored { top: u32, logprob: Option<f32> },
}

/// What was sampled of rows that follow each other.
#[derive(Default)]
struct Sampled {
    tokens: Vec<SampledToken>,
    /// Why there is no token after those.
    error: Option<GrammarError>,
    /// The last token is not the draft that stands there.
    diverged: bool,
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
            let failed = &failed[first..first + run.rows];
            // Drafts matter to nobody unless they are right: then they come again, as tokens.
            let sound = failed.iter().position(|failed| *failed).unwrap_or(run.rows);
            let failed = sound < run.rows - run.drafts();
            progress.push(Progress { failed, ..Progress::default() });
            let offsets = match run.output {
                _ if failed => 0..0,
                RunOutput::Verify(_) => 0..sound,
                RunOutput::Score(_) => 0..run.rows,
                _ if self.observer.is_some() => 0..run.rows,
                RunOutput::Sample => run.rows - 1..run.rows,
                RunOutput::None => 0..0,
            };
            wanted.extend(offsets.map(|offset| Wanted { run: index, offset, row: first + offset }));
            first += run.rows;
        }
        if let Some(screen) = self.screen
            && (1..=MOST_TOKENS).contains(&wanted.len())
            && self.observer.is_none()
            && self.answer_screened(screen, forward, plan, &wanted, &mut progress).is_some()
        {
            wanted.retain(|wanted| !progress[wanted.run].complete);
        }
        let mut wanted = wanted.into_iter();
        loop {
            let alive = wanted.by_ref().filter(|wanted| {
                let Progress { failed, complete, .. } = progress[wanted.run];
                !failed && !complete
            });
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

    /// Samples what can be sampled without the whole head; `None` if that is nothing, since one of
    /// the rows needs all of it.
    fn answer_screened(
        &mut self,
        screen: &Screen,
        forward: &mut Forward<'_>,
        plan: &StepPlan,
        wanted: &[Wanted],
        progress: &mut [Progress],
    ) -> Option<()> {
        let vocab = forward.config.vocab;
        let mut opened: HashMap<_, _> = self.sequences.iter_mut().collect();
        let mut choices = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let run = &plan.runs[wanted.run];
            if run.output != RunOutput::Sample {
                return None;
            }
            let opened = opened.remove(&run.sequence).expect("runs are of open sequences");
            let wish = opened.wish(vocab)?;
            choices.push((*wanted, run.position + run.rows, opened, wish));
        }
        let rows: Vec<_> = wanted.iter().map(|wanted| wanted.row).collect();
        let (kernels, lead) = (forward.kernels, forward.lead);
        let head = forward.weights.head.as_ref()?;
        let screening = Screening { kernels, lead, screen, head: &head.matrix };
        let x = forward.head_inputs(&rows);
        self.samplers.resize_with(lead.threads(), Sampler::default);
        let wishes: Vec<_> = choices.iter().map(|(_, _, _, wish)| wish).collect();
        let Some(estimates) = screening.estimate(x, &wishes, self.logits) else {
            self.tally.fallbacks += wanted.len() as u64;
            return None;
        };
        for (token, (wanted, position, opened, wish)) in choices.into_iter().enumerate() {
            let adjust = |id, logit| adjusted(id, logit, &opened.sampling, &opened.history);
            let Some(rows) = screening.decide(&estimates, token, &wish, adjust) else {
                self.tally.fallbacks += 1;
                continue;
            };
            self.tally.tokens += 1;
            self.tally.rows += rows.computed;
            let sampler = &mut self.samplers[0];
            let id = sampler.choose_among(kernels, &rows.logits, &opened.sampling, position);
            let progress = &mut progress[wanted.run];
            progress.complete = true;
            match opened.take(id) {
                Ok(()) => progress.sampled.push(SampledToken { id, logprobs: None }),
                Err(error) => progress.error = Some(error),
            }
        }
        Some(())
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
        let mut jobs: Vec<Job<'_>> = Vec::with_capacity(group.len());
        let mut start = 0;
        for wanted in group.chunk_by(|a, b| a.run == b.run && plan.runs[a.run].drafts() > 0) {
            let first = wanted[0];
            let (run, progress) = (&plan.runs[first.run], &mut progress[first.run]);
            let rows = start..start + wanted.len();
            start = rows.end;
            let sound = finite[rows.clone()].iter().take_while(|finite| **finite).count();
            let drafts = match &run.output {
                RunOutput::Verify(drafts) => &drafts[first.offset..],
                RunOutput::None | RunOutput::Sample | RunOutput::Score(_) => &[],
            };
            progress.failed |= sound == 0 && progress.sampled.is_empty();
            progress.complete |= sound < wanted.len();
            if progress.failed || sound == 0 {
                continue;
            }
            let logits = &self.logits[rows.start * vocab..(rows.start + sound) * vocab];
            if let Some(observer) = self.observer.as_mut().filter(|_| run.drafts() == 0) {
                observer(run.sequence, run.position + first.offset, logits);
            }
            let task = match &run.output {
                RunOutput::Sample if first.offset + 1 < run.rows => continue,
                RunOutput::Sample | RunOutput::Verify(_) => Task::Sample {
                    opened: opened.remove(&run.sequence).expect("runs are of open sequences"),
                    position: run.position + first.offset + 1,
                    drafts,
                },
                RunOutput::Score(targets) => {
                    Task::Score { target: targets.get(first.offset).copied() }
                }
                RunOutput::None => continue,
            };
            jobs.push(Job { first, task, logits });
        }
        for (first, logits, made) in make_all(forward, self.samplers, jobs) {
            let (run, progress) = (&plan.runs[first.run], &mut progress[first.run]);
            match made {
                Made::Sampled(Sampled { tokens, error, diverged }) => {
                    if let Some(observer) = self.observer.as_mut().filter(|_| run.drafts() > 0) {
                        let rows = logits.chunks_exact(vocab).take(tokens.len());
                        for (position, logits) in (run.position + first.offset..).zip(rows) {
                            observer(run.sequence, position, logits);
                        }
                    }
                    progress.complete |= diverged || error.is_some();
                    progress.sampled.extend(tokens);
                    progress.error = error;
                }
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
    fn outcome(mut self, output: &RunOutput) -> Option<RunOutcome> {
        if self.failed {
            return Some(RunOutcome::NonFinite);
        }
        // Behind drafts an error comes in the step that has its token for certain.
        let error = self.error.filter(|_| self.sampled.is_empty());
        if let Some(error) = error {
            return Some(RunOutcome::Grammar(error.to_string()));
        }
        match output {
            RunOutput::None => None,
            RunOutput::Sample => {
                let SampledToken { id, logprobs } = self.sampled.pop()?;
                Some(RunOutcome::Token { id, logprobs })
            }
            RunOutput::Verify(_) => Some(RunOutcome::Tokens(self.sampled)),
            RunOutput::Score(_) => Some(RunOutcome::Scores(self.scores)),
        }
    }
}

/// Does the jobs, a share on each thread; returns what came out in their order.
fn make_all<'a>(
    forward: &Forward<'_>,
    samplers: &mut Vec<Sampler>,
    jobs: Vec<Job<'a>>,
) -> Vec<(Wanted, &'a [f32], Made)> {
    let (kernels, lead, vocab) = (forward.kernels, forward.lead, forward.config.vocab);
    samplers.resize_with(lead.threads(), Sampler::default);
    let mut made: Vec<_> = jobs.iter().map(|job| (job.first, job.logits, None)).collect();
    let share = jobs.len().div_ceil(lead.threads()).max(1);
    let mut jobs = jobs.into_iter();
    let parts: Vec<_> = made
        .chunks_mut(share)
        .zip(samplers)
        .map(|(made, sampler)| (jobs.by_ref().take(made.len()).collect::<Vec<_>>(), made, sampler))
        .collect();
    lead.run(parts, |_, (jobs, made, sampler)| {
        for (job, (_, _, made)) in jobs.into_iter().zip(made) {
            *made = Some(job.make(kernels, sampler, vocab));
        }
    });
    made.into_iter().filter_map(|(first, logits, made)| Some((first, logits, made?))).collect()
}

impl Job<'_> {
    fn make(self, kernels: Kernels, sampler: &mut Sampler, vocab: usize) -> Made {
        let logits = self.logits;
        match self.task {
            Task::Sample { opened, position, drafts } => {
                let rows = logits.chunks_exact(vocab);
                Made::Sampled(opened.sample_rows(kernels, sampler, rows, position, drafts))
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
    /// Returns the token sampled from the first of `rows` for `position`, and those from the rows
    /// after it as long as the tokens before them are `drafts`.
    fn sample_rows<'a>(
        &mut self,
        kernels: Kernels,
        sampler: &mut Sampler,
        rows: impl Iterator<Item = &'a [f32]>,
        position: usize,
        drafts: &[u32],
    ) -> Sampled {
        let mut sampled = Sampled::default();
        for (offset, logits) in rows.enumerate() {
            match self.sample(kernels, sampler, logits, position + offset) {
                Ok(token) => {
                    sampled.diverged = drafts.get(offset) != Some(&token.id);
                    sampled.tokens.push(token);
                    if sampled.diverged {
                        break;
                    }
                }
                Err(error) => {
                    // Whatever comes next ends the same way.
                    self.constraint = Some(Err(error.clone()));
                    sampled.error = Some(error);
                    break;
                }
            }
        }
        sampled
    }

    /// Returns the ids that the grammar allows, if there is one.
    fn mask(&mut self) -> Result<Option<TokenMask>, GrammarError> {
        match &mut self.constraint {
            Some(Ok(constraint)) => constraint.mask().map(Some),
            Some(Err(error)) => Err(error.clone()),
            None => Ok(None),
        }
    }

    /// Makes a token part of what came before the next.
    fn take(&mut self, id: u32) -> Result<(), GrammarError> {
        if self.sampling.looks_at_completion() {
            self.history.push(id);
        }
        match &mut self.constraint {
            Some(Ok(constraint)) => constraint.accept(id),
            _ => Ok(()),
        }
    }

    /// Returns what the next choice needs to know, if that is not the whole distribution.
    fn wish(&mut self, vocab: usize) -> Option<Wish> {
        let keep = self.sampling.deciding(vocab)?;
        // What is wrong with a grammar is told where the whole head is computed.
        let mask = self.mask().ok()?;
        Some(Wish { keep, mask, changed: changed(&self.sampling, &self.history) })
    }

    /// Returns the token sampled from `logits` for `position`, which becomes part of the history.
    fn sample(
        &mut self,
        kernels: Kernels,
        sampler: &mut Sampler,
        logits: &[f32],
        position: usize,
    ) -> Result<SampledToken, GrammarError> {
        let mask = self.mask()?;
        let Self { sampling, history, .. } = self;
        let id = sampler.sample(kernels, logits, sampling, history, mask.as_ref(), position);
        self.take(id)?;
        let logprobs = self.sampling.top_logprobs.map(|top| {
            let normal = Normalizer::new(kernels, logits, logits[kernels.argmax(logits)]);
            let top = largest(logits, top as usize);
            TokenLogprobs {
                logprob: normal.logprob(logits, id),
                top: top.into_iter().map(|id| (id, normal.logprob(logits, id))).collect(),
            }
        });
        Ok(SampledToken { id, logprobs })
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
